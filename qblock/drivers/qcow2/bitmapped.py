"""What a qcow2 driver does with persistent bitmaps: `SupportsBitmaps`, as a part of the driver in a file of its own.

The work is done in `bitmaps.py`, which is imported when an image has bitmaps or is to get one. When bitmaps are loaded, marked as
in use and stored is told there; here it is tied to what happens to the node: it is opened, written to for the first time after a
change from read-only, changed to read-only, closed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from qblock.driver import Driver
from qblock.drivers.qcow2 import header as head
from qblock.errors import BlockIOError

if TYPE_CHECKING:
    from qblock.dirty import DirtyBitmap
    from qblock.drivers.qcow2.bitmaps import BitmapStore
    from qblock.drivers.qcow2.clusters import ClusterMap
    from qblock.drivers.qcow2.storage import ImageFile
    from qblock.drivers.qcow2.writeback import WriteBack


class BitmappedDriver(Driver):
    """The base of the qcow2 driver, which provides the open image. ``_inactive``: the image must be activated before a write."""

    _file: ImageFile
    _map: ClusterMap
    _writeback: WriteBack | None
    _inactive: bool
    _size: int
    _store: BitmapStore | None = None
    """None while there are no bitmaps and none were asked for."""

    async def _activate(self) -> None:
        """Begin writing."""
        raise AssertionError("provided by the driver")

    # ---------------------------------------------------------------------------------------------- offered to others

    @property
    def can_store_bitmaps(self) -> bool:
        """See `SupportsBitmaps`."""
        return self._file.header.version > 2

    def check_new_bitmap(self, bitmap: DirtyBitmap) -> None:
        """See `SupportsBitmaps`."""
        self._bitmap_store().check_new(bitmap, self._file.header.version)

    async def forget_bitmap(self, name: str) -> None:
        """See `SupportsBitmaps`. Nothing happens on a node that cannot be written."""
        if self._store is None or self.node.read_only or self._writeback is None:
            return
        if self._inactive:
            await self._activate()
        self._file.check_writable()
        await self._store.forget(name, self._file, self._writeback.refcounts, self._writeback)

    async def store_bitmaps(self) -> None:
        """See `SupportsBitmaps`."""
        if self.node.read_only or self._writeback is None or self.node.poisoned is not None:
            return
        if not self.can_store_bitmaps:
            return  # they were lost when the version was lowered
        if not any(bitmap.persistent for bitmap in self.node.dirty_bitmaps) and self._store is None:
            return
        store = self._bitmap_store()
        if not store.has_work:
            return
        if self._inactive:
            await self._activate()
        await self._writeback.finish()
        await store.store(self._file, self._writeback.refcounts, self._writeback)
        # The file says now that its bitmaps are true: before the next write they are marked again.
        self._inactive, self._file.writable = True, False

    # ------------------------------------------------------------------------------------------ used by the driver

    def _bitmap_store(self) -> BitmapStore:
        if self._store is None:
            from qblock.drivers.qcow2.bitmaps import BitmapStore  # noqa: PLC0415 - see the module

            self._store = BitmapStore(self.node)
        return self._store

    async def _load_bitmaps(self) -> None:
        """Put the image's bitmaps on the node, which has none of them yet."""
        header = self._file.header
        if header.extension(head.EXT_BITMAPS) is None:
            return
        if header.has(head.BITMAPS):
            await self._bitmap_store().load(self._file, self._size)
        else:
            self.env.warn(
                f"'{self._file.name}' was changed by a program that knows no bitmaps; its persistent bitmaps are ignored, "
                "and their clusters are leaked until they are repaired"
            )

    async def _mark_bitmaps(self) -> None:
        """What the file says of bitmaps may become untrue from now on."""
        if self._store is not None:
            await self._store.mark(self._file)

    async def _drop_stale_bitmaps(self) -> None:
        """Take the reference to bitmaps that are not true any more out of the header; the image is active."""
        header = self._file.header
        if header.has(head.BITMAPS) or header.extension(head.EXT_BITMAPS) is None or not self._file.writable:
            return
        assert self._writeback is not None
        from qblock.drivers.qcow2.bitmaps import with_bitmaps  # noqa: PLC0415 - see the module

        await self._writeback.rewrite_header(lambda header: with_bitmaps(header, None))

    async def _reread_bitmaps(self) -> None:
        """The image was read again: its node's bitmaps are still right, but what the file has of them is not known any more."""
        if self._store is not None:
            await self._store.reread(self._file)

    def _check_bitmaps_fit(self, size: int) -> None:
        """Raise ``BlockIOError(ENOTSUP)`` when a bitmap stands in the way of a disk of ``size`` bytes."""
        if any(bitmap.persistent for bitmap in self.node.dirty_bitmaps):
            self._bitmap_store().check_resize(size)

    def _check_bitmaps_stored(self) -> None:
        """Raise ``BlockIOError(EROFS)`` if the node, which is read-only and shall stay so, was given bitmaps to be stored."""
        added = self._store.to_store() if self._store is not None and self.node.read_only else []
        if added:
            raise BlockIOError(
                errno.EROFS, f"Bitmap '{added[0].name}' cannot be stored in a read-only image; reopen it writable, or remove it"
            )

    def _switch_bitmaps(self, *, read_only: bool) -> None:
        """The node has become read-only, or the opposite."""
        for bitmap in self.node.dirty_bitmaps:
            if bitmap.persistent:
                bitmap.readonly = read_only

    async def settle_reopen(self) -> None:
        """See `Driver`: a node that can be written again marks its bitmaps now, since they can be changed without a write."""
        if self._store is not None and self._inactive and not self.node.read_only and self._store.unmarked:
            await self._activate()
