"""drive-reopen in the forms that were proposed in March and in April 2012; the work is done in `qblock.drive_reopen`.

Models rfc-2012.md. That of April is also offered beside 7.2's commands, where no QEMU has it, so that both ways to leave an
image can be compared: this one, and ``block-job-complete``, which took its place.
"""

from __future__ import annotations

from typing import Final

import attrs

from qblock.drive_reopen import Witness, drive_reopen
from qblock.errors import FdNotFound
from qblock.monitor.command import CommandContext, command
from qblock.monitor.dialects import Dialect
from qblock.options import option, required

WITH_WITNESS: Final = frozenset({Dialect.SYSTEM, Dialect.RFC_2012})
WITHOUT_WITNESS: Final = frozenset({Dialect.BLKMIRROR_2012})


@attrs.frozen
class DriveReopenArguments:
    """Arguments of drive-reopen as proposed in April 2012."""

    device: str = required(doc="device that is to leave its image")
    new_image_file: str = required(doc="file name of its new image")
    format: str | None = option(None, doc="format of the new image; probed if absent")
    witness: str | None = option(None, doc="descriptor, named by getfd, that gets one byte when the new image is open")


@attrs.frozen
class DriveReopenArgumentsOfMarch:
    """Arguments of drive-reopen as proposed in March 2012."""

    device: str = required(doc="device that is to leave its image")
    new_image_file: str = required(doc="file name of its new image")
    format: str = option("qcow2", doc="format of the new image")


@command("drive-reopen", since="7.2", dialects=WITH_WITNESS)
async def drive_reopen_with_witness(ctx: CommandContext, args: DriveReopenArguments) -> None:
    """Close a device's image and open another one in its place, and leave a witness of that if one is given."""
    witness = None if args.witness is None else _take_witness(ctx, args.witness)
    await _reopen(ctx, args.device, args.new_image_file, args.format, witness)


@command("drive-reopen", since="7.2", dialects=WITHOUT_WITNESS)
async def drive_reopen_of_march(ctx: CommandContext, args: DriveReopenArgumentsOfMarch) -> None:
    """Close a device's image and open another one in its place."""
    await _reopen(ctx, args.device, args.new_image_file, args.format, None)


def _take_witness(ctx: CommandContext, name: str) -> Witness:
    """The named descriptor, which belongs to the command from now on, whatever becomes of it; raises `FdNotFound`."""
    if ctx.session is None:
        raise FdNotFound(name)
    return Witness(ctx.session.fds.take(name), name)


async def _reopen(ctx: CommandContext, device: str, filename: str, fmt: str | None, witness: Witness | None) -> None:
    try:
        await drive_reopen(ctx.system, device=device, filename=filename, fmt=fmt, witness=witness)
    finally:
        for listener in ctx.hub.on_resize:
            listener()
