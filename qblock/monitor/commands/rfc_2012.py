"""drive-mirror as proposed in April 2012; the checks and the job itself are in `qblock.jobs.mirror_2012`."""

from __future__ import annotations

from typing import Final

import attrs

from qblock.actions.mirrors import StartMirror2012
from qblock.jobs.mirror_2012 import Mode2012, Target2012, start_mirror_2012
from qblock.monitor.command import CommandContext, command
from qblock.monitor.dialects import Dialect
from qblock.options import option, required
from qblock.system import BlockSystem

RFC_2012: Final = frozenset({Dialect.RFC_2012})


@attrs.frozen
class DriveMirrorOf2012:
    """Arguments of drive-mirror."""

    device: str = required(doc="device to copy")
    target: str = required(doc="file name of the copy")
    format: str | None = option(None, doc="format of the copy; the source's, or probed if it exists")
    full: bool = required(doc="whether the whole disk is copied, or only the topmost image")
    mode: Mode2012 = option(Mode2012.ABSOLUTE_PATHS, doc="whether the target is to be created")
    speed: int = option(0, doc="bytes per second until it is in sync, 0 for no limit")


def drive_mirror_action(system: BlockSystem, args: DriveMirrorOf2012) -> StartMirror2012:
    """drive-mirror as a part of a transaction, which the proposal says can be added on top."""
    target = Target2012(filename=args.target, format=args.format, mode=args.mode)
    return StartMirror2012(system, device=args.device, target=target, full=args.full, speed=args.speed)


@command("drive-mirror", since="1.1", dialects=RFC_2012)
async def drive_mirror(ctx: CommandContext, args: DriveMirrorOf2012) -> None:
    """Copy a device to a new or existing image, and keep the copy up to date until the job is cancelled."""
    target = Target2012(filename=args.target, format=args.format, mode=args.mode)
    await start_mirror_2012(ctx.system, device=args.device, target=target, full=args.full, speed=args.speed)
