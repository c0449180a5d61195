"""Starting mirrors as a part of a transaction: several disks are copied from one moment on.

No QEMU has these actions; the announcement of mirroring (April 2012) leaves them out "for simplicity". Prepared means that
the target is open and the job holds its nodes, committed that it runs; what the guest writes is watched from the one moment of
the transaction. Undone, nothing is left but a target file that was made. As QEMU's backup jobs do, the job of a transaction that
fails goes from created by way of aborting to null, and one that succeeds begins with a pause, since its nodes are drained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from qblock.actions.action import Action, paused
from qblock.actions.starting import StartJob
from qblock.errors import DeviceNotFound, NodeNotFound
from qblock.jobs.mirror import (
    MirrorRequest,
    PreparedMirror,
    prepare_blockdev_mirror,
    prepare_drive_mirror,
    root_node,
)
from qblock.jobs.mirror_2012 import Mirror2012Job, Target2012, prepare_mirror_2012
from qblock.jobs.new_copy import TargetFile

if TYPE_CHECKING:
    from qblock.node import BlockDriverState
    from qblock.system import BlockSystem


class _StartMirror(StartJob):
    def __init__(self, system: BlockSystem, device: str, request: MirrorRequest) -> None:
        super().__init__(system, device)
        self.request = request

    def source(self) -> BlockDriverState:
        """See `StartJob`: nobody but devices may use it."""
        return root_node(self.system, self.device)


class StartDriveMirror(_StartMirror):
    """``drive-mirror`` of QEMU 7.2: the target is a file, which is made first unless it exists."""

    kind: ClassVar[str] = "drive-mirror"

    def __init__(self, system: BlockSystem, *, device: str, target: TargetFile, request: MirrorRequest) -> None:
        super().__init__(system, device, request)
        self.target = target

    async def set_up(self, source: BlockDriverState) -> PreparedMirror:
        """See `StartJob`."""
        del source  # it is looked up again, with all that is checked of it
        return await prepare_drive_mirror(
            self.system, device=self.device, target=self.target, request=self.request, txn=self.group
        )


class StartBlockdevMirror(_StartMirror):
    """``blockdev-mirror`` of QEMU 7.2: the target is the device or node ``target``."""

    kind: ClassVar[str] = "blockdev-mirror"

    def __init__(self, system: BlockSystem, *, device: str, target: str, request: MirrorRequest) -> None:
        super().__init__(system, device, request)
        self.target = target

    async def set_up(self, source: BlockDriverState) -> PreparedMirror:
        """See `StartJob`."""
        del source  # it is looked up again, with all that is checked of it
        return await prepare_blockdev_mirror(
            self.system, device=self.device, target=self.target, request=self.request, txn=self.group
        )


class StartMirror2012(Action):
    """``drive-mirror`` of April 2012. ``speed`` is in bytes per second, 0 for no limit."""

    kind: ClassVar[str] = "drive-mirror"

    def __init__(
        self, system: BlockSystem, *, device: str, target: Target2012, full: bool, speed: int = 0
    ) -> None:
        super().__init__(system)
        self.device = device
        self.target = target
        self.full = full
        self.speed = speed
        self._job: Mirror2012Job

    async def prepare(self) -> None:
        """See `Action`."""
        try:
            node = self.system.graph.lookup(self.device)
        except NodeNotFound as error:
            raise DeviceNotFound(self.device) from error
        await self.drain(node)
        self._job = await prepare_mirror_2012(
            self.system, device=self.device, target=self.target, full=self.full, speed=self.speed
        )

    def commit(self) -> None:
        """See `Action`."""
        self.system.jobs.start(self._job)

    async def afterwards(self) -> None:
        """See `Action`."""
        await paused(self._job)

    async def abort(self) -> None:
        """See `Action`."""
        await self._job.give_up()
