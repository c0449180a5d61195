"""drive-mirror and block-stream as proposed in March 2012; the work is done in `qblock.actions.blkmirror` and
`qblock.jobs.stream_through`.
"""

from __future__ import annotations

from typing import Final

import attrs

from qblock.actions.action import perform
from qblock.actions.blkmirror import BlkmirrorMode, BlkmirrorTarget, MirrorByDriver
from qblock.jobs.stream import StreamRequest
from qblock.jobs.stream_through import start_stream_2012
from qblock.monitor.command import CommandContext, command
from qblock.monitor.commands.jobs_1_1 import BlockStreamOf11
from qblock.monitor.dialects import Dialect
from qblock.options import option, required
from qblock.system import BlockSystem

BLKMIRROR_2012: Final = frozenset({Dialect.BLKMIRROR_2012})


@attrs.frozen
class DriveMirrorOfMarch2012:
    """Arguments of drive-mirror."""

    device: str = required(doc="device whose writes are to go to a second image too")
    target: str = required(doc="file name of that image")
    format: str = required(doc="its format")
    mode: BlkmirrorMode = option(BlkmirrorMode.ABSOLUTE_PATHS, doc="whether it is to be made, and over which backing file")


@command("drive-mirror", since="1.1", dialects=BLKMIRROR_2012)
async def drive_mirror(ctx: CommandContext, args: DriveMirrorOfMarch2012) -> None:
    """Write what is written to a device to a second image as well, from now on."""
    await perform(ctx.system, [drive_mirror_action(ctx.system, args)])


def drive_mirror_action(system: BlockSystem, args: DriveMirrorOfMarch2012) -> MirrorByDriver:
    """What drive-mirror does, alone or in a transaction."""
    target = BlkmirrorTarget(filename=args.target, format=args.format, mode=args.mode)
    return MirrorByDriver(system, device=args.device, target=target)


@command("block-stream", since="1.1", dialects=BLKMIRROR_2012)
async def block_stream(ctx: CommandContext, args: BlockStreamOf11) -> None:
    """Copy the data of backing images up into a device; if it has a mirror, write everything that it has through that."""
    await start_stream_2012(ctx.system, device=args.device, request=StreamRequest(base=args.base, speed=args.speed))
