"""What a qcow2 driver does to be checked: `SupportsCheck`, and the repair of images that were not shut down cleanly.

The counting is in `check.py`. A table of snapshots that is not whole is written anew as the last step of a repair, when all
refcounts are right; entries that no table can have are dropped before it begins.
"""

from __future__ import annotations

import abc
import errno

import attrs

from qblock.driver import CheckFix, CheckResult, Progress, no_progress
from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.header import Header
from qblock.drivers.qcow2.options import CacheSizes, cache_sizes
from qblock.drivers.qcow2.snapshotted import SnapshottedDriver
from qblock.drivers.qcow2.writeback import WriteBack
from qblock.errors import BlockIOError, CorruptImage


class CheckedDriver(SnapshottedDriver):
    """The base of the qcow2 driver, which provides the open image and reads its tables again."""

    _writeback: WriteBack | None

    @abc.abstractmethod
    async def _read_header(self) -> Header:
        """The header, checked."""

    @abc.abstractmethod
    async def _build(self, header: Header, sizes: CacheSizes) -> None:
        """Read the tables."""

    @abc.abstractmethod
    async def _prepare_writing(self) -> None:
        """Read what writing needs."""

    async def _begin_mending(self) -> None:
        """Begin to write to an image that was opened to be checked; its refcounts are right by now."""
        await self._prepare_writing()
        self._file.writable = True

    def _check_may_write(self, header: Header) -> None:
        """Raise when the image forbids it."""
        self._refuse_while_viewing()
        if header.has(head.CORRUPT) and not self.node.to_check:
            raise CorruptImage(
                self._file.name, "it is marked corrupt, and can be opened for writing only after a repair"
            )

    async def _repair(self) -> None:
        """The image was not shut down cleanly: its refcounts may be too low."""
        file = self._file
        file.writable = True
        result = await self._checked(CheckFix.LEAKS | CheckFix.ERRORS)
        if result.corruptions > result.corruptions_fixed or result.check_errors:
            raise CorruptImage(file.name, "it was not shut down cleanly, and could not be repaired")
        self.env.warn(f"'{file.name}' was not shut down cleanly; its refcounts have been repaired")
        header = await self._read_header()
        await self._build(header, cache_sizes(self.options, header))

    async def _checked(
        self, fix: CheckFix, *, explain: bool = False, progress: Progress = no_progress
    ) -> CheckResult:
        from qblock.drivers.qcow2.check import check_image  # noqa: PLC0415 - 10 ms, and images are rarely checked

        return await check_image(self._file, self._map.l1, self._snapshots, fix, explain=explain, progress=progress)

    async def check(self, fix: CheckFix, *, explain: bool = False, progress: Progress = no_progress) -> CheckResult:
        """See `SupportsCheck`. What is cached is written back first; no request may be in flight when something is fixed."""
        if fix and self.node.read_only:
            raise BlockIOError(errno.EPERM, f"Node '{self.node.node_name}' is read-only: nothing can be repaired")
        self._refuse_while_viewing()
        if self._writeback is not None and self._file.writable:
            await self._writeback.finish()
        broken = self._snapshots.broken
        if broken is not None:
            if not self._snapshots.mendable or CheckFix.ERRORS not in fix:
                return CheckResult(check_errors=1, findings=(f"ERROR the snapshot table cannot be read: {broken}",))
            await self._drop_surplus_snapshots()
        result = await self._checked(fix, explain=explain, progress=progress)
        mends_snapshots = (
            not result.refused and CheckFix.ERRORS in fix and (broken is not None or self._snapshots.defects)
        )
        if mends_snapshots or (not self.node.to_check and (result.corruptions_fixed or result.leaks_fixed)):
            await self._reload()
        if mends_snapshots:
            return await self._mend_snapshots(result, broken)
        return result

    async def _drop_surplus_snapshots(self) -> None:
        """Let the header count only the entries that can be read."""
        file, count = self._file, len(self._snapshots.snapshots)
        if count < file.header.snapshot_count:
            file.header = attrs.evolve(file.header, snapshot_count=count)
            at, data = head.encode_placement(file.header)
            await file.write_metadata(at, memoryview(data))
            await file.barrier()

    async def _mend_snapshots(self, result: CheckResult, broken: str | None) -> CheckResult:
        """Write the snapshot table anew; ``result`` is the check's, which has counted defects as fixed, but not a break."""
        defects = len(self._snapshots.defects)
        try:
            await self.rewrite_snapshots()
        except BlockIOError as error:
            text = f"ERROR the snapshot table cannot be written anew: {error}"
            return attrs.evolve(
                result,
                corruptions=result.corruptions + (broken is not None),
                corruptions_fixed=result.corruptions_fixed - defects,
                findings=(*result.findings, text),
            )
        if broken is None:
            return result
        return attrs.evolve(
            result,
            corruptions=result.corruptions + 1,
            corruptions_fixed=result.corruptions_fixed + 1,
            findings=(f"Repairing the snapshot table: {broken}", *result.findings),
        )
