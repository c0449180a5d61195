"""Internal snapshots of a running disk: made among the actions of a transaction, and deleted.

Models ``blockdev-snapshot-internal-sync`` and ``blockdev-snapshot-delete-internal-sync`` (semantics.md section 10.6). The node is
drained from before it is looked at until the end of the transaction, so the snapshot is of the same moment as what the other
actions do. Undone, the snapshot is deleted again. A filter, or anything else with one child only, passes both commands on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from qblock.actions.action import Action
from qblock.blockers import OpType
from qblock.chain import snapshot_node
from qblock.drain import drained
from qblock.driver import SupportsSnapshots
from qblock.errors import CommandError, InvalidParameter, QBlockError
from qblock.node import BlockDriverState
from qblock.snapshots import SnapshotInfo, find_snapshot

if TYPE_CHECKING:
    from qblock.system import BlockSystem

FindNode = Callable[[], BlockDriverState]
"""Finds the disk when the action's turn has come; raises `CommandError`."""


class InternalSnapshot(Action):
    """``blockdev-snapshot-internal-sync`` of the node that ``find`` gives; ``device`` is how the user calls it."""

    kind: ClassVar[str] = "blockdev-snapshot-internal-sync"

    def __init__(self, system: BlockSystem, find: FindNode, *, device: str, name: str) -> None:
        super().__init__(system)
        self._find = find
        self._device = device
        self._name = name
        self._driver: SupportsSnapshots
        self._made: SnapshotInfo

    async def prepare(self) -> None:
        """See `Action`."""
        node = self._find()
        await self.drain(snapshot_node(node))
        self.system.graph.check_op(node, OpType.INTERNAL_SNAPSHOT)
        self._driver = _snapshotted(node, self._device)
        if not self._name:
            raise InvalidParameter("name", "must not be empty")
        if find_snapshot(self._driver.snapshots(), name=self._name) is not None:
            raise CommandError(f"Device '{self._device}' has a snapshot called '{self._name}' already")
        self._made = await self._driver.create_snapshot(self._name, vm_clock_ns=self.system.clock.now_ns())

    def commit(self) -> None:
        """See `Action`: it is there already."""

    async def abort(self) -> None:
        """See `Action`."""
        try:
            await self._driver.delete_snapshot(self._made)
        except QBlockError as error:
            self.system.env.warn(
                f"The snapshot '{self._name}' of '{self._device}', made in a transaction that failed, is still there: {error}"
            )


async def delete_internal_snapshot(
    system: BlockSystem, node: BlockDriverState, *, device: str, id: str | None, name: str | None
) -> SnapshotInfo:
    """Delete the snapshot with this id, this name, or both, and tell what it was.

    Raises `CommandError` when there is none, when nothing says which, or when the node is in use by a job, and `BlockIOError`.
    """
    async with drained(snapshot_node(node)):
        system.graph.check_op(node, OpType.INTERNAL_SNAPSHOT_DELETE)
        if id is None and name is None:
            raise CommandError("An 'id' or a 'name' must be given, to tell which snapshot is to be deleted")
        driver = _snapshotted(node, device)
        found = find_snapshot(driver.snapshots(), id=id, name=name)
        if found is None:
            given = " and ".join(f"the {what} '{value}'" for what, value in (("id", id), ("name", name)) if value is not None)
            raise CommandError(f"Device '{device}' has no snapshot with {given}")
        await driver.delete_snapshot(found)
        return found


def _snapshotted(node: BlockDriverState, device: str) -> SupportsSnapshots:
    if node.read_only:
        raise CommandError(f"Device '{device}' is read-only: no snapshot of it can be made or deleted")
    driver = snapshot_node(node).driver
    if not isinstance(driver, SupportsSnapshots):
        raise CommandError(f"Device '{device}' has the format {driver.name}, which keeps no internal snapshots")
    return driver
