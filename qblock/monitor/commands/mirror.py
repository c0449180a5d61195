"""drive-mirror and blockdev-mirror, alone and in a transaction; the checks and the job are in `qblock.jobs.mirror`."""

from __future__ import annotations

from typing import Final

import attrs

from qblock.actions.mirrors import StartBlockdevMirror, StartDriveMirror
from qblock.errors import InvalidParameter
from qblock.jobs.mirror import (
    CopyMode,
    MirrorRequest,
    start_blockdev_mirror,
    start_drive_mirror,
)
from qblock.jobs.new_copy import NewImageMode, SyncMode, TargetFile
from qblock.jobs.state import OnError
from qblock.monitor.command import CommandContext, command
from qblock.options import option, required
from qblock.system import BlockSystem

_UINT32_MAX: Final = (1 << 32) - 1


@attrs.frozen
class DriveMirrorArguments:
    """Arguments of drive-mirror."""

    job_id: str | None = option(None, doc="id of the job; the name of the device if absent")
    device: str = required(doc="device or root node to copy")
    target: str = required(doc="file name of the copy")
    format: str | None = option(None, doc="format of the copy; the source's, or probed if it exists")
    node_name: str | None = option(None, doc="name for the target's node")
    replaces: str | None = option(None, doc="node to be replaced by the copy, instead of the source")
    sync: SyncMode = required(doc="what to copy")
    mode: NewImageMode = option(NewImageMode.ABSOLUTE_PATHS, doc="whether the target is to be created")
    speed: int = option(0, doc="bytes per second, 0 for no limit")
    granularity: int = option(0, doc="bytes per bit of the dirty bitmap; 0: by the target's clusters")
    buf_size: int = option(0, doc="bytes under way at a time; 0: 16 MiB")
    on_source_error: OnError = option(OnError.REPORT, doc="what to do when reading fails")
    on_target_error: OnError = option(OnError.REPORT, doc="what to do when writing fails")
    unmap: bool = option(True, doc="copy zeroes and discarded areas as holes")
    copy_mode: CopyMode = option(CopyMode.BACKGROUND, doc="when the guest's writes reach the target")
    auto_finalize: bool = option(True, doc="make the graph changes without asking")
    auto_dismiss: bool = option(True, doc="forget the job when it has ended")


@attrs.frozen
class BlockdevMirrorArguments:
    """Arguments of blockdev-mirror."""

    job_id: str | None = option(None, doc="id of the job; the name of the device if absent")
    device: str = required(doc="device or root node to copy")
    target: str = required(doc="device or node to copy to")
    replaces: str | None = option(None, doc="node to be replaced by the copy, instead of the source")
    sync: SyncMode = required(doc="what to copy")
    speed: int = option(0, doc="bytes per second, 0 for no limit")
    granularity: int = option(0, doc="bytes per bit of the dirty bitmap; 0: by the target's clusters")
    buf_size: int = option(0, doc="bytes under way at a time; 0: 16 MiB")
    on_source_error: OnError = option(OnError.REPORT, doc="what to do when reading fails")
    on_target_error: OnError = option(OnError.REPORT, doc="what to do when writing fails")
    filter_node_name: str | None = option(None, doc="name for the filter that the job inserts")
    copy_mode: CopyMode = option(CopyMode.BACKGROUND, doc="when the guest's writes reach the target")
    auto_finalize: bool = option(True, doc="make the graph changes without asking")
    auto_dismiss: bool = option(True, doc="forget the job when it has ended")


def _request(
    args: DriveMirrorArguments | BlockdevMirrorArguments, *, unmap: bool, filter_node_name: str | None
) -> MirrorRequest:
    if not 0 <= args.granularity <= _UINT32_MAX:  # before a target is made; what is wrong with the others is told after that
        raise InvalidParameter("granularity", f"must be from 0 to {_UINT32_MAX}, not {args.granularity}")
    return MirrorRequest(
        sync=args.sync,
        job_id=args.job_id,
        replaces=args.replaces,
        speed=args.speed,
        granularity=args.granularity,
        buf_size=args.buf_size,
        on_source_error=args.on_source_error,
        on_target_error=args.on_target_error,
        copy_mode=args.copy_mode,
        filter_node_name=filter_node_name,
        unmap=unmap,
        auto_finalize=args.auto_finalize,
        auto_dismiss=args.auto_dismiss,
    )


def _target(args: DriveMirrorArguments) -> TargetFile:
    return TargetFile(filename=args.target, format=args.format, node_name=args.node_name, mode=args.mode)


def drive_mirror_action(system: BlockSystem, args: DriveMirrorArguments) -> StartDriveMirror:
    """drive-mirror as a part of a transaction."""
    request = _request(args, unmap=args.unmap, filter_node_name=None)
    return StartDriveMirror(system, device=args.device, target=_target(args), request=request)


def blockdev_mirror_action(system: BlockSystem, args: BlockdevMirrorArguments) -> StartBlockdevMirror:
    """blockdev-mirror as a part of a transaction."""
    request = _request(args, unmap=True, filter_node_name=args.filter_node_name)
    return StartBlockdevMirror(system, device=args.device, target=args.target, request=request)


@command("drive-mirror", since="1.3")
async def drive_mirror(ctx: CommandContext, args: DriveMirrorArguments) -> None:
    """Copy a device to a new or existing image, and keep the copy up to date until the job is completed."""
    request = _request(args, unmap=args.unmap, filter_node_name=None)
    await start_drive_mirror(ctx.system, device=args.device, target=_target(args), request=request)


@command("blockdev-mirror", since="2.6")
async def blockdev_mirror(ctx: CommandContext, args: BlockdevMirrorArguments) -> None:
    """Copy a device to another node, and keep the copy up to date until the job is completed."""
    request = _request(args, unmap=True, filter_node_name=args.filter_node_name)
    await start_blockdev_mirror(ctx.system, device=args.device, target=args.target, request=request)
