"""What a qcow2 driver does to be amended: `SupportsAmend`. The work is in `amending.py`, imported when it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qblock import requests
from qblock.driver import Json, Progress, SupportsBitmaps
from qblock.drivers.qcow2.snapshotted import SnapshottedDriver

if TYPE_CHECKING:
    from qblock.drivers.qcow2.amending import Amendments
    from qblock.drivers.qcow2.header import Header


class AmendedDriver(SnapshottedDriver):
    """The base of the qcow2 driver, which provides the open image and reads its tables again."""

    async def amend(self, options: Mapping[str, Json], progress: Progress) -> None:
        """See `SupportsAmend`."""
        from qblock.drivers.qcow2 import amending  # noqa: PLC0415 - images are rarely amended

        await self._writing(0, 0)
        header = self._file.header
        wanted = amending.plan_amendments(header, options)
        down = wanted.version is not None and wanted.version < header.version
        if down:
            size = self.length() if wanted.size is None else wanted.size
            await amending.check_snapshots_for_downgrade(self._file, self._snapshots, size)
        if wanted.version is not None and wanted.version > header.version:
            if any(one.disk_size is None for one in self._snapshots.snapshots):
                await self.rewrite_snapshots()
            await self._rewrite(amending.upgraded)
        if amending.with_settings(self._file.header, wanted) != self._file.header:
            await self._rewrite(lambda header: amending.with_settings(header, wanted))
        if wanted.refcount_order not in (None, self._file.header.refcount_order):
            await self._change_width(wanted, progress)
        if wanted.size is not None:
            await self.truncate(wanted.size)
            requests.refresh_length(self.node)
        if down:
            await self._lose_bitmaps()
            await amending.expand_zeroes(await self._writing(0, 0), progress)
            await self._rewrite(amending.downgraded)

    async def _lose_bitmaps(self) -> None:
        """Take the persistent bitmaps away, which version 2 does not have."""
        assert isinstance(self, SupportsBitmaps), "the whole driver is"
        bitmaps = self.node.dirty_bitmaps
        lost = [bitmap for bitmap in bitmaps if bitmap.persistent]
        for bitmap in lost:
            assert bitmap.name is not None
            await self.forget_bitmap(bitmap.name)
            bitmaps.remove(bitmap)
        if lost:
            names = ", ".join(f"'{bitmap.name}'" for bitmap in lost)
            self.env.warn(f"Bitmaps that compat 0.10 cannot store have been removed from '{self.filename()}': {names}")

    async def _change_width(self, wanted: Amendments, progress: Progress) -> None:
        from qblock.drivers.qcow2.amending import WidthChange  # noqa: PLC0415 - see above

        assert wanted.refcount_order is not None
        await WidthChange(await self._writing(0, 0), wanted.refcount_order).perform(progress)
        await self._reload()

    async def _rewrite(self, change: Callable[[Header], Header]) -> None:
        """Change the header, and go by it from then on."""
        writer = await self._writing(0, 0)
        await writer.writeback.finish()
        await writer.writeback.rewrite_header(change)
        await self._reload()
