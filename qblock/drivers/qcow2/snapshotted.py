"""What a qcow2 driver does with internal snapshots: `SupportsSnapshots`, as a part of the driver in a file of its own.

The work is done in `snapshotting.py` and `shadow.py`, which are imported when a snapshot is made, applied or deleted. No request
may be in flight then: the caller holds the node drained, or is alone.
"""

from __future__ import annotations

import abc
import contextlib
import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from qblock import requests
from qblock.driver import Driver
from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.layout import decode_u64
from qblock.drivers.qcow2.shrinking import give_back_end
from qblock.errors import BlockIOError, CommandError, CorruptImage, NodeBusy
from qblock.snapshots import SnapshotInfo
from qblock.units import align_up

if TYPE_CHECKING:
    from qblock.drivers.qcow2.allocation import Allocator
    from qblock.drivers.qcow2.clusters import ClusterMap
    from qblock.drivers.qcow2.options import Qcow2Options
    from qblock.drivers.qcow2.shadow import Change
    from qblock.drivers.qcow2.snapshots import Snapshot, SnapshotTable
    from qblock.drivers.qcow2.storage import ImageFile


class SnapshottedDriver(Driver):
    """The base of the qcow2 driver, which provides the tables of the open image and reads them again."""

    options: Qcow2Options
    _file: ImageFile
    _map: ClusterMap
    _snapshots: SnapshotTable
    _viewing: SnapshotInfo | None = None
    """The snapshot that is shown in place of the disk."""

    @abc.abstractmethod
    async def _writing(self, offset: int, length: int) -> Allocator:
        """What changes the mapping; raises when the node cannot be written."""

    @abc.abstractmethod
    async def _reload(self) -> None:
        """Read header and tables again."""

    @abc.abstractmethod
    def _adopt_size(self, size: int) -> None:
        """The disk has ``size`` bytes now."""

    def _take_broken_snapshots(self, trouble: str) -> None:
        """The table cannot be read to its end: what is there can be read, and writing is refused."""
        if not self.node.read_only and not self.node.to_check:
            raise CorruptImage(self._file.name, f"{trouble}; it can be opened for reading only")
        self.env.warn(f"'{self._file.name}' is damaged: {trouble}; its other snapshots cannot be seen")

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """See `SupportsSnapshots`: in the order of the table."""
        return tuple(_told(snapshot) for snapshot in self._snapshots.snapshots)

    async def create_snapshot(
        self, name: str, *, icount: int | None = None, vm_clock_ns: int = 0, vm_state_size: int = 0
    ) -> SnapshotInfo:
        """See `SupportsSnapshots`. ``BlockIOError(EINVAL)`` when a refcount would not fit in its bits."""
        from qblock.drivers.qcow2.snapshotting import plan_create  # noqa: PLC0415 - see the module

        async def plan(writer: Allocator) -> Change:
            return plan_create(
                writer, self._snapshots, name, icount=icount, vm_clock_ns=vm_clock_ns, vm_state_size=vm_state_size
            )

        await self._change(plan)
        if vm_state_size:
            writer = await self._writing(0, 0)
            state = writer.map.geometry.l1_entries(self.length()) << writer.map.geometry.l1_shift
            await writer.cut(state, align_up(state + vm_state_size, writer.map.geometry.cluster_size), pass_discard=False)
        return self.snapshots()[-1]

    async def apply_snapshot(self, snapshot: SnapshotInfo) -> None:
        """See `SupportsSnapshots`."""
        from qblock.drivers.qcow2.snapshotting import plan_apply  # noqa: PLC0415 - see the module

        found = self._found(snapshot)
        if self.node.dirty_bitmaps:
            raise NodeBusy(self.node.node_name, "its dirty bitmaps, which would not see what changes")
        await self._change(lambda writer: plan_apply(writer, self._snapshots, found))

    async def delete_snapshot(self, snapshot: SnapshotInfo) -> None:
        """See `SupportsSnapshots`."""
        from qblock.drivers.qcow2.snapshotting import plan_delete  # noqa: PLC0415 - see the module

        found = self._found(snapshot)
        await self._change(lambda writer: plan_delete(writer, self._snapshots, found))

    async def rewrite_snapshots(self) -> None:
        """Write the table anew, with entries that are whole."""
        from qblock.drivers.qcow2.snapshotting import plan_rewrite  # noqa: PLC0415 - see the module

        async def plan(writer: Allocator) -> Change:
            return plan_rewrite(writer, self._snapshots)

        await self._change(plan)

    async def view_snapshot(self, snapshot: SnapshotInfo, *, keep_size: bool = False) -> None:
        """See `SupportsSnapshots`."""
        found, file = self._found(snapshot), self._file
        if not self.node.read_only:
            raise CommandError(f"Node '{self.node.node_name}' is not read-only: only then it can show a snapshot")
        if (defect := found.defect(file.length(), file.header.cluster_size)) is not None:
            raise BlockIOError(errno.EIO, f"'{file.name}' is damaged: {defect}")
        l1 = decode_u64(await file.read(found.l1_offset, found.l1_bytes))
        self._viewing = snapshot
        self._map.cache.forget(iter(list(self._map.tables)))
        self._map.l1, self._map.l1_host = l1, found.l1_offset
        if not keep_size and found.disk_size is not None:
            self._adopt_size(found.disk_size)
            requests.refresh_length(self.node)

    def _refuse_while_viewing(self) -> None:
        """Raise when the tables in memory are those of a snapshot."""
        if self._viewing is not None:
            raise CommandError(
                f"Node '{self.node.node_name}' shows the snapshot '{self._viewing.name}': it can only be read; open it anew"
            )

    def _found(self, wanted: SnapshotInfo) -> Snapshot:
        for snapshot in self._snapshots.snapshots:
            if (snapshot.id, snapshot.name) == (wanted.id, wanted.name):
                return snapshot
        raise CommandError(f"There is no snapshot '{wanted.name}' (id {wanted.id}) in '{self._file.name}'")

    async def _change(self, plan: Callable[[Allocator], Awaitable[Change]]) -> None:
        """Let a change of the tables take effect."""
        from qblock.drivers.qcow2.shadow import Switch  # noqa: PLC0415 - see the module

        writer = await self._writing(0, 0)
        if self._file.header.has(head.DATA_FILE):
            raise BlockIOError(errno.ENOTSUP, "an image with an external data file cannot have internal snapshots")
        await writer.writeback.finish()
        switch = Switch(writer, self._snapshots, await plan(writer))
        await switch.perform()
        if self.options.pass_discard_snapshot:
            await switch.discard_freed()
        await self._reload()
        requests.refresh_length(self.node)
        # The change has taken effect: what fails from here on costs space, and poisons the node where it must.
        with contextlib.suppress(BlockIOError):
            writer = await self._writing(0, 0)
            await writer.refcounts.release(switch.spare)
            await give_back_end(writer.refcounts, writer.writeback)


def _told(snapshot: Snapshot) -> SnapshotInfo:
    return SnapshotInfo(
        id=snapshot.id,
        name=snapshot.name,
        vm_state_size=snapshot.vm_state_size,
        date_sec=snapshot.date_sec,
        date_nsec=snapshot.date_nsec,
        vm_clock_ns=snapshot.vm_clock_ns,
        icount=snapshot.icount,
        disk_size=snapshot.disk_size,
    )
