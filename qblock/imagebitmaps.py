"""The persistent bitmaps of an open image for plain scripts: what was written since, without a line of asyncio.

`Image.bitmaps` is an `ImageBitmaps`, a mapping of names to `ImageBitmap`. Rules are those of the bitmap commands
(`qblock.bitmaps`); changes are stored when the image is closed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

from qblock.bitmaps import BitmapUse, bitmap_of, check_merge, check_use, forget_stored, new_bitmap
from qblock.dirty import DirtyBitmap
from qblock.driver import SupportsBitmaps
from qblock.errors import BlockIOError
from qblock.node import BlockDriverState
from qblock.ranges import ByteRange


class ImageBitmap:
    """One persistent bitmap. What changes it raises `CommandError` when its state forbids that (inconsistent, read-only)."""

    def __init__(self, bitmap: DirtyBitmap) -> None:
        self._bitmap = bitmap

    @property
    def name(self) -> str:
        """Its name, unique in the image."""
        return self._bitmap.name or ""

    @property
    def granularity(self) -> int:
        """Bytes that count as written when one of them is."""
        return self._bitmap.granularity

    @property
    def recording(self) -> bool:
        """Whether writes are recorded when the image is open for writing."""
        return self._bitmap.recording

    @property
    def inconsistent(self) -> bool:
        """True when it was not stored in time, after a crash: then it says nothing, and can only be removed."""
        return self._bitmap.inconsistent

    @property
    def count(self) -> int:
        """Bytes that are dirty, in whole granules."""
        return self._bitmap.count

    def dirty(self, *, max_length: int | None = None) -> Iterator[ByteRange]:
        """The ranges that were written, in ascending order, in pieces of at most ``max_length`` bytes."""
        check_use(self._bitmap, BitmapUse.READ)
        return self._bitmap.iterate(max_length=max_length)

    def clear(self) -> None:
        """Forget what was written: the record begins anew."""
        check_use(self._bitmap, BitmapUse.CHANGE)
        self._bitmap.clear()

    def merge(self, other: ImageBitmap) -> None:
        """Add what is dirty in ``other``, which may be of another image with a disk of the same size."""
        check_use(self._bitmap, BitmapUse.CHANGE)
        check_merge(other._bitmap, self._bitmap)
        self._bitmap.merge(other._bitmap)

    def enable(self) -> None:
        """Record from now on."""
        self._switch(enabled=True)

    def disable(self) -> None:
        """Record no more; what is dirty stays dirty."""
        self._switch(enabled=False)

    def _switch(self, *, enabled: bool) -> None:
        # The monitor may switch read-only ones, for as long as they are open; here that would be lost without a word.
        check_use(self._bitmap, BitmapUse.CHANGE)
        self._bitmap.enabled = enabled

    def __repr__(self) -> str:
        state = "inconsistent" if self.inconsistent else "recording" if self.recording else "disabled"
        return f"<ImageBitmap {self.name!r} {state} {self.count} bytes dirty, granularity {self.granularity}>"


class ImageBitmaps(Mapping[str, ImageBitmap]):
    """The persistent bitmaps of an image by name, oldest first."""

    def __init__(self, node: BlockDriverState, run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        """``run`` brings a coroutine to its end."""
        self._node = node
        self._run = run

    def __getitem__(self, name: str) -> ImageBitmap:
        for bitmap in self._node.dirty_bitmaps:
            if bitmap.persistent and bitmap.name == name:
                return ImageBitmap(bitmap)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter([bitmap.name or "" for bitmap in self._node.dirty_bitmaps if bitmap.persistent])

    def __len__(self) -> int:
        return sum(bitmap.persistent for bitmap in self._node.dirty_bitmaps)

    def add(self, name: str, *, granularity: int | None = None, enabled: bool = True) -> ImageBitmap:
        """A new bitmap, in which nothing is dirty; ``granularity`` in bytes, a power of two of at least 512.

        Raises `CommandError` (the name is taken, the format stores no bitmaps) and `BlockIOError` (the image is read-only).
        """
        self._check_writable()
        bitmap = new_bitmap(self._node, name, granularity=granularity, persistent=True, enabled=enabled)
        self._node.dirty_bitmaps.append(bitmap)
        return ImageBitmap(bitmap)

    def remove(self, name: str) -> None:
        """Take a bitmap out of the image, durably. Raises `CommandError` and `BlockIOError`."""
        self._check_writable()
        bitmap = bitmap_of(self._node, name)
        check_use(bitmap, BitmapUse.REMOVE)
        self._node.dirty_bitmaps.remove(bitmap)
        self._run(forget_stored(self._node, bitmap))

    def _check_writable(self) -> None:
        if self._node.read_only:
            raise BlockIOError(errno.EROFS, "the image was opened without writable=True: its bitmaps stay as they are")


async def store_bitmaps(node: BlockDriverState) -> None:
    """Store the bitmaps of a node that is about to be closed; raises `BlockIOError`, where closing only warns."""
    if isinstance(node.driver, SupportsBitmaps) and any(bitmap.persistent for bitmap in node.dirty_bitmaps):
        await node.driver.store_bitmaps()
