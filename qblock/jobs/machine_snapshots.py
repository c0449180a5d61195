"""Snapshots of a whole machine: of several disks at one moment, with the machine's own state beside one of them.

Models the jobs snapshot-save, snapshot-load and snapshot-delete and what savevm, loadvm and delvm do (semantics.md section
4.7): the guest is stopped meanwhile, and stays stopped (``restore-vm``) when loading fails. Differs from QEMU: a machine
without a processor has little state, which trays are open and which are locked; it is kept in a form of our own. The state of a
real machine says nothing to this one, so loading such a snapshot only puts the disks back. Disks are not put back while a job
or a bitmap follows what is written to them; where making a snapshot fails, those made of other disks are deleted again.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, ClassVar, Final

import attrs

from qblock.blockers import OpType
from qblock.chain import contains, snapshot_node
from qblock.drain import drained_all
from qblock.driver import SupportsSnapshots, SupportsVmState
from qblock.errors import CommandError, NodeBusy, QBlockError
from qblock.jobs.single_step import SingleStepJob, started
from qblock.node import BlockDriverState
from qblock.runstate import RunState
from qblock.snapshots import SnapshotInfo, find_snapshot

if TYPE_CHECKING:
    from qblock.system import BlockSystem

_OURS: Final = b"qblock machine state 1\n"
_MAX_STATE: Final = 1 << 20


@attrs.frozen(eq=False)
class SnapshottedDisk:
    """A disk that can be kept in internal snapshots."""

    node: BlockDriverState
    driver: SupportsSnapshots

    def find(self, tag: str) -> SnapshotInfo | None:
        """Its first snapshot of that name."""
        return find_snapshot(self.driver.snapshots(), name=tag)


def disks_named(system: BlockSystem, names: Sequence[str]) -> list[SnapshottedDisk]:
    """The disks with these node names, each once; raises `NodeNotFound`, and `CommandError` for one that keeps no snapshots."""
    if not names:
        raise CommandError("The list of devices is empty: a snapshot is of one disk at least")
    return [_snapshotted(system.graph.find_node(name)) for name in dict.fromkeys(names)]


def disks_of_machine(system: BlockSystem) -> list[SnapshottedDisk]:
    """All writable disks: nodes that a drive, a device or nothing but the monitor holds. Raises as `disks_named`."""
    roots = {backend.root.node for backend in system.graph.backends if backend.root is not None}
    nodes = [node for node in system.graph.nodes.values() if node in roots or (node.monitor_owned and not node.parents)]
    disks = [_snapshotted(node) for node in nodes if not node.read_only]
    if not disks:
        raise CommandError("There is no writable disk of which a snapshot could be made")
    return disks


def _snapshotted(node: BlockDriverState) -> SnapshottedDisk:
    driver = snapshot_node(node).driver
    if node.read_only:
        raise CommandError(f"Device '{node.node_name}' is read-only: no snapshot of it can be made or loaded")
    if not isinstance(driver, SupportsSnapshots):
        raise CommandError(
            f"Device '{node.node_name}' is writable, and its format {driver.name} keeps no internal snapshots"
        )
    return SnapshottedDisk(node, driver)


def keeper_among(disks: Iterable[SnapshottedDisk], name: str) -> SnapshottedDisk:
    """The disk beside which the state of the machine is kept; raises `CommandError` when it is not one of ``disks``."""
    for disk in disks:
        if disk.node.node_name == name:
            return disk
    raise CommandError(f"The device for the state of the machine, '{name}', is not among the devices of the snapshot")


@asynccontextmanager
async def _quiet(system: BlockSystem, disks: Iterable[SnapshottedDisk]) -> AsyncIterator[None]:
    """No request is under way anywhere, and the disks stay open, whoever lets go of them."""
    try:
        with system.graph.holding([disk.node for disk in disks]):
            async with drained_all(system.graph):
                yield
    finally:
        await system.opener.close_orphans()


# ------------------------------------------------------------------------------------------------- making and deleting


async def save_machine(
    system: BlockSystem, tag: str, disks: Sequence[SnapshottedDisk], keeper: SnapshottedDisk
) -> None:
    """Keep the disks, and beside ``keeper`` the machine, in snapshots called ``tag``; those that are called so are replaced.

    The guest is stopped meanwhile. Raises `CommandError` and `BlockIOError`.
    """
    ran = system.run.running
    system.run.stop(RunState.SAVE_VM)
    try:
        async with _quiet(system, disks):
            await _delete(disks, tag)
            await _make(system, tag, disks, keeper)
    finally:
        if ran:
            system.run.resume()


async def _make(
    system: BlockSystem, tag: str, disks: Sequence[SnapshottedDisk], keeper: SnapshottedDisk
) -> None:
    if not isinstance(keeper.driver, SupportsVmState):
        raise CommandError(f"Device '{keeper.node.node_name}' has no place for the state of a machine")
    state = _OURS + json.dumps(system.devices.state()).encode()
    made: list[tuple[SnapshottedDisk, SnapshotInfo]] = []
    try:
        await keeper.driver.save_vm_state(0, memoryview(state))
        for disk in disks:
            size = len(state) if disk is keeper else 0
            snapshot = await disk.driver.create_snapshot(tag, vm_clock_ns=system.clock.now_ns(), vm_state_size=size)
            made.append((disk, snapshot))
    except QBlockError:
        for disk, snapshot in made:
            with suppress(QBlockError):
                await disk.driver.delete_snapshot(snapshot)
        raise


async def delete_machine(system: BlockSystem, tag: str, disks: Sequence[SnapshottedDisk]) -> None:
    """Delete the snapshots called ``tag``, where there are any. Raises `BlockIOError`."""
    async with _quiet(system, disks):
        await _delete(disks, tag)


async def _delete(disks: Iterable[SnapshottedDisk], tag: str) -> None:
    for disk in disks:
        while (found := disk.find(tag)) is not None:
            await disk.driver.delete_snapshot(found)


# ---------------------------------------------------------------------------------------------------------- going back


@asynccontextmanager
async def restoring(system: BlockSystem) -> AsyncIterator[None]:
    """The guest is stopped; it goes on when the block ends well, and stays stopped when it fails."""
    ran = system.run.running
    system.run.stop(RunState.RESTORE_VM)
    yield
    if ran:
        system.run.resume()


async def load_machine(
    system: BlockSystem, tag: str, disks: Sequence[SnapshottedDisk], keeper: SnapshottedDisk
) -> None:
    """Put the disks back to what they were in the snapshot ``tag``, and the machine. Called inside `restoring`.

    Raises `CommandError` when that cannot be, and then no disk has changed, and `BlockIOError`.
    """
    async with _quiet(system, disks):
        wanted = [(disk, _loadable(system, disk, tag)) for disk in disks]
        state = keeper.find(tag)
        if state is None or not state.vm_state_size or not isinstance(keeper.driver, SupportsVmState):
            raise CommandError(
                f"The snapshot '{tag}' of '{keeper.node.node_name}' is of the disk alone; qblock-img snapshot -a goes back to it"
            )
        for disk, snapshot in wanted:
            await disk.driver.apply_snapshot(snapshot)
        content = bytearray(min(state.vm_state_size, _MAX_STATE))
        await keeper.driver.load_vm_state(0, memoryview(content))
        if content.startswith(_OURS):
            system.devices.restore(_decoded(bytes(content[len(_OURS) :]), keeper))


async def load_all(system: BlockSystem, tag: str) -> None:
    """What loadvm and ``-loadvm`` do: `load_machine` with all disks, the state beside the first one; raises as that."""
    async with restoring(system):
        disks = disks_of_machine(system)
        await load_machine(system, tag, disks, disks[0])


def _decoded(text: bytes, keeper: SnapshottedDisk) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CommandError(f"The state of the machine in '{keeper.node.node_name}' is damaged: {error}") from None


def _loadable(system: BlockSystem, disk: SnapshottedDisk, tag: str) -> SnapshotInfo:
    found = disk.find(tag)
    if found is None:
        raise CommandError(f"There is no snapshot '{tag}' of the device '{disk.node.node_name}'")
    system.graph.check_op(disk.node, OpType.INTERNAL_SNAPSHOT)
    image = snapshot_node(disk.node)
    if any(node.dirty_bitmaps and contains(node, image) for node in system.graph.nodes.values()):
        raise NodeBusy(disk.node.node_name, "dirty bitmaps of it or above it, which would not see what changes")
    return found


# ------------------------------------------------------------------------------------------------------------ the jobs


class SnapshotJob(SingleStepJob):
    """What the three jobs share. What one has begun it does to its end, whatever is asked of it meanwhile."""

    def __init__(self, system: BlockSystem, job_id: str, act: Callable[[], Awaitable[None]]) -> None:
        super().__init__(system.jobs, job_id)
        self._act = act
        self.acted = False

    async def act(self) -> None:
        """See `SingleStepJob`. The command that started it is answered when the guest goes on, and before the job ends."""
        try:
            await self._act()
        finally:
            self.acted = True
            self.notice()
            await self.runner.clock.sleep_ns(1)


class SnapshotSaveJob(SnapshotJob):
    """``snapshot-save``."""

    type: ClassVar[str] = "snapshot-save"


class SnapshotLoadJob(SnapshotJob):
    """``snapshot-load``."""

    type: ClassVar[str] = "snapshot-load"


class SnapshotDeleteJob(SnapshotJob):
    """``snapshot-delete``."""

    type: ClassVar[str] = "snapshot-delete"


async def start_snapshot_save(
    system: BlockSystem, *, job_id: str, tag: str, vmstate: str, devices: Sequence[str]
) -> SnapshotJob:
    """``snapshot-save``; raises `CommandError` only for the job's id: all else is the job's failure."""

    async def act() -> None:
        disks = disks_named(system, devices)
        for disk in disks:
            if disk.find(tag) is not None:
                raise CommandError(f"Device '{disk.node.node_name}' has a snapshot called '{tag}' already")
        await save_machine(system, tag, disks, keeper_among(disks, vmstate))

    return await _acted(SnapshotSaveJob(system, job_id, act))


async def start_snapshot_load(
    system: BlockSystem, *, job_id: str, tag: str, vmstate: str, devices: Sequence[str]
) -> SnapshotJob:
    """``snapshot-load``; raises as `start_snapshot_save`."""

    async def act() -> None:
        async with restoring(system):
            disks = disks_named(system, devices)
            await load_machine(system, tag, disks, keeper_among(disks, vmstate))

    return await _acted(SnapshotLoadJob(system, job_id, act))


async def start_snapshot_delete(system: BlockSystem, *, job_id: str, tag: str, devices: Sequence[str]) -> SnapshotJob:
    """``snapshot-delete``; raises as `start_snapshot_save`."""
    return await _acted(
        SnapshotDeleteJob(system, job_id, lambda: delete_machine(system, tag, disks_named(system, devices)))
    )


async def _acted(job: SnapshotJob) -> SnapshotJob:
    await started(job)
    while not (job.acted or job.run_ended):
        await job.noticed()
    return job
