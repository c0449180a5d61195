"""Starting backups, alone or as a part of a transaction: several disks as they were at one moment, or with a bitmap's end.

Models ``blockdev-backup`` and ``drive-backup`` (semantics.md sections 4.5 and 5); the single commands are transactions of one
action, as in QEMU. Prepared means that the filter is above the source and the job holds its nodes, committed that the job runs.
Undone, nothing is left but a target file that was made: a bitmap has what it had, whatever its mode (in QEMU 7.2
``bitmap-mode: always`` takes effect on a job that never ran).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from qblock.actions.starting import StartJob
from qblock.jobs.backup import (
    BackupRequest,
    PreparedBackup,
    prepare_blockdev_backup,
    prepare_drive_backup,
)
from qblock.jobs.new_copy import TargetFile
from qblock.node import BlockDriverState

if TYPE_CHECKING:
    from qblock.system import BlockSystem


class StartDriveBackup(StartJob):
    """``drive-backup``: the target is a file, which is made first unless it exists."""

    kind: ClassVar[str] = "drive-backup"

    def __init__(self, system: BlockSystem, *, device: str, target: TargetFile, request: BackupRequest) -> None:
        super().__init__(system, device)
        self.target = target
        self.request = request

    async def set_up(self, source: BlockDriverState) -> PreparedBackup:
        """See `StartJob`."""
        return await prepare_drive_backup(
            self.system, source=source, target=self.target, request=self.request, txn=self.group
        )


class StartBlockdevBackup(StartJob):
    """``blockdev-backup``: the target is the device or node ``target``."""

    kind: ClassVar[str] = "blockdev-backup"

    def __init__(self, system: BlockSystem, *, device: str, target: str, request: BackupRequest) -> None:
        super().__init__(system, device)
        self.target = target
        self.request = request

    async def set_up(self, source: BlockDriverState) -> PreparedBackup:
        """See `StartJob`."""
        return await prepare_blockdev_backup(
            self.system, source=source, target=self.target, request=self.request, txn=self.group
        )
