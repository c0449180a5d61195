"""Commands about the guest's memory: there is none, but a balloon device can be asked to change it.

Models a machine of QEMU 7.2 whose guest has no driver for its balloon: what it is asked for is never done, and its memory keeps
the size that the command line (``-m``) has named.
"""

from __future__ import annotations

import attrs

from qblock.errors import DeviceNotActive, InvalidParameter
from qblock.monitor.command import CommandContext, NoArguments, command
from qblock.monitor.dialects import SYSTEM_ONLY
from qblock.options import required


@attrs.frozen
class BalloonArguments:
    """Arguments of balloon."""

    value: int = required(doc="bytes that the guest is to keep")


@attrs.frozen
class BalloonInfo:
    """Reply of query-balloon."""

    actual: int = required(doc="bytes that the guest has kept: all of them")


@command("balloon", since="0.14", dialects=SYSTEM_ONLY)
async def balloon(ctx: CommandContext, args: BalloonArguments) -> None:
    """Ask the guest to hand memory back, which it does not."""
    _check_balloon(ctx)
    if args.value <= 0:
        raise InvalidParameter("value", f"must be above 0, not {args.value}")


@command("query-balloon", since="0.14", returns=BalloonInfo, dialects=SYSTEM_ONLY)
async def query_balloon(ctx: CommandContext, args: NoArguments) -> BalloonInfo:
    """Tell how much memory the guest has kept."""
    del args
    _check_balloon(ctx)
    return BalloonInfo(actual=ctx.system.board.identity.memory)


def _check_balloon(ctx: CommandContext) -> None:
    if not any(device.model.name.startswith("virtio-balloon") for device in ctx.system.devices.devices):
        raise DeviceNotActive("virtio-balloon-pci", "The machine has no")
