"""drive-backup and blockdev-backup, each a transaction of one action as in QEMU; checks and job are in `qblock.jobs.backup`."""

from __future__ import annotations

import attrs

from qblock.actions.action import perform
from qblock.actions.backups import StartBlockdevBackup, StartDriveBackup
from qblock.jobs.backup import BackupRequest, Performance
from qblock.jobs.backup_plan import BitmapMode
from qblock.jobs.new_copy import NewImageMode, SyncMode, TargetFile
from qblock.jobs.state import OnError
from qblock.monitor.command import CommandContext, command
from qblock.options import option, required
from qblock.system import BlockSystem


@attrs.frozen
class BackupPerf:
    """How a backup job copies."""

    use_copy_range: bool = option(False, doc="copy inside the storage where that is possible")
    max_workers: int = option(64, doc="how many requests the job has under way at most")
    max_chunk: int = option(0, doc="the most bytes that a request of the job copies; 0: no limit")


@attrs.frozen
class BackupArguments:
    """Arguments that both commands have."""

    job_id: str | None = option(None, doc="id of the job; the name of the device if absent")
    device: str = required(doc="device or node to copy")
    sync: SyncMode = required(doc="what to copy")
    speed: int = option(0, doc="bytes per second, 0 for no limit")
    bitmap: str | None = option(None, doc="bitmap of the node: says what to copy, or is to say what was not copied")
    bitmap_mode: BitmapMode | None = option(None, doc="what becomes of the bitmap at the end")
    compress: bool = option(False, doc="store the copy compressed")
    on_source_error: OnError = option(OnError.REPORT, doc="what to do when reading fails")
    on_target_error: OnError = option(OnError.REPORT, doc="what to do when writing fails")
    auto_finalize: bool = option(True, doc="make the graph changes without asking")
    auto_dismiss: bool = option(True, doc="forget the job when it has ended")
    filter_node_name: str | None = option(None, doc="name for the filter that the job inserts")
    x_perf: BackupPerf = option(BackupPerf(), doc="how the job copies")


@attrs.frozen
class DriveBackupArguments(BackupArguments):
    """Arguments of drive-backup."""

    target: str = required(doc="file name of the copy")
    format: str | None = option(None, doc="format of the copy; the source's, or probed if it exists")
    mode: NewImageMode = option(NewImageMode.ABSOLUTE_PATHS, doc="whether the target is to be created")


@attrs.frozen
class BlockdevBackupArguments(BackupArguments):
    """Arguments of blockdev-backup."""

    target: str = required(doc="device or node to copy to")


def _request(args: BackupArguments) -> BackupRequest:
    return BackupRequest(
        sync=args.sync,
        job_id=args.job_id,
        speed=args.speed,
        bitmap=args.bitmap,
        bitmap_mode=args.bitmap_mode,
        compress=args.compress,
        on_source_error=args.on_source_error,
        on_target_error=args.on_target_error,
        filter_node_name=args.filter_node_name,
        performance=Performance(
            use_copy_range=args.x_perf.use_copy_range,
            max_workers=args.x_perf.max_workers,
            max_chunk=args.x_perf.max_chunk,
        ),
        auto_finalize=args.auto_finalize,
        auto_dismiss=args.auto_dismiss,
    )


def drive_backup_action(system: BlockSystem, args: DriveBackupArguments) -> StartDriveBackup:
    """The action of drive-backup."""
    target = TargetFile(filename=args.target, format=args.format, mode=args.mode)
    return StartDriveBackup(system, device=args.device, target=target, request=_request(args))


def blockdev_backup_action(system: BlockSystem, args: BlockdevBackupArguments) -> StartBlockdevBackup:
    """The action of blockdev-backup."""
    return StartBlockdevBackup(system, device=args.device, target=args.target, request=_request(args))


@command("drive-backup", since="1.6", features=("deprecated",))
async def drive_backup(ctx: CommandContext, args: DriveBackupArguments) -> None:
    """Copy a device as it is now to a new or existing image, while it goes on being used."""
    await perform(ctx.system, [drive_backup_action(ctx.system, args)])


@command("blockdev-backup", since="2.3")
async def blockdev_backup(ctx: CommandContext, args: BlockdevBackupArguments) -> None:
    """Copy a device as it is now to another node, while it goes on being used."""
    await perform(ctx.system, [blockdev_backup_action(ctx.system, args)])
