"""Starting backups, alone or as a part of a transaction: several disks as they were at one moment, or with a bitmap's end.

Models ``blockdev-backup`` and ``drive-backup`` (semantics.md sections 4.5 and 5); the single commands are transactions of one
action, as in QEMU. Prepared means that the filter is above the source and the job holds its nodes, committed that the job runs.
Undone, nothing is left but a target file that was made: a bitmap has what it had, whatever its mode (in QEMU 7.2
``bitmap-mode: always`` takes effect on a job that never ran).
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar

from qblock.actions.action import Action, paused
from qblock.jobs.backup import (
    BackupFile,
    BackupRequest,
    PreparedBackup,
    prepare_blockdev_backup,
    prepare_drive_backup,
)
from qblock.node import BlockDriverState

if TYPE_CHECKING:
    from qblock.system import BlockSystem


class _StartBackup(Action):
    joins_groups: ClassVar[bool] = True

    def __init__(self, system: BlockSystem, device: str, request: BackupRequest) -> None:
        super().__init__(system)
        self.device = device
        self.request = request
        self._backup: PreparedBackup

    @abc.abstractmethod
    async def _prepared(self, source: BlockDriverState) -> PreparedBackup:
        """All that can fail."""

    async def prepare(self) -> None:
        """See `Action`."""
        source = self.system.graph.lookup(self.device)
        await self.drain(source)
        self._backup = await self._prepared(source)

    def commit(self) -> None:
        """See `Action`."""
        self._backup.start()

    async def afterwards(self) -> None:
        """See `Action`: the job begins with a pause."""
        await paused(self._backup.job)

    async def abort(self) -> None:
        """See `Action`."""
        await self._backup.give_up()


class StartDriveBackup(_StartBackup):
    """``drive-backup``: the target is a file, which is made first unless it exists."""

    kind: ClassVar[str] = "drive-backup"

    def __init__(self, system: BlockSystem, *, device: str, target: BackupFile, request: BackupRequest) -> None:
        super().__init__(system, device, request)
        self.target = target

    async def _prepared(self, source: BlockDriverState) -> PreparedBackup:
        return await prepare_drive_backup(
            self.system, source=source, target=self.target, request=self.request, txn=self.group
        )


class StartBlockdevBackup(_StartBackup):
    """``blockdev-backup``: the target is the device or node ``target``."""

    kind: ClassVar[str] = "blockdev-backup"

    def __init__(self, system: BlockSystem, *, device: str, target: str, request: BackupRequest) -> None:
        super().__init__(system, device, request)
        self.target = target

    async def _prepared(self, source: BlockDriverState) -> PreparedBackup:
        return await prepare_blockdev_backup(
            self.system, source=source, target=self.target, request=self.request, txn=self.group
        )
