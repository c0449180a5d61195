"""Commands about the machine around the block layer: run state, name, objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs

from qblock.driver import Json
from qblock.monitor.command import CommandContext, NoArguments, command
from qblock.monitor.dialects import SYSTEM_ONLY
from qblock.monitor.replies import NameInfo, StatusInfo
from qblock.objects import ObjectOptions
from qblock.options import option, required


@attrs.frozen
class ObjectArguments:
    """Names an object."""

    id: str = required(doc="id of the object")


@attrs.frozen
class ActionArguments:
    """Arguments of set-action. There is neither a panic nor a watchdog here."""

    reboot: Literal["reset", "shutdown"] | None = option(None, doc="what becomes of a reboot")
    shutdown: Literal["poweroff", "pause"] | None = option(None, doc="what becomes of a shutdown")
    panic: Literal["pause", "shutdown", "exit-failure", "none"] | None = option(None, doc="without effect")
    watchdog: Literal["reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi"] | None = option(
        None, doc="without effect"
    )


@command("object-add", since="2.0", open_arguments=ObjectOptions)
async def object_add(ctx: CommandContext, args: Mapping[str, Json]) -> None:
    """Make an object that options can refer to; there are secrets and throttle groups."""
    await ctx.system.add_object(args)


@command("object-del", since="2.0")
async def object_del(ctx: CommandContext, args: ObjectArguments) -> None:
    """Remove an object."""
    ctx.system.objects.delete(args.id)


@command("query-status", since="0.14", returns=StatusInfo, dialects=SYSTEM_ONLY)
async def query_status(ctx: CommandContext, args: NoArguments) -> StatusInfo:
    """Tell whether the guest runs."""
    del args
    return StatusInfo(running=ctx.system.run.running, singlestep=False, status=ctx.system.run.state.value)


@command("query-name", since="0.14", returns=NameInfo, dialects=SYSTEM_ONLY)
async def query_name(ctx: CommandContext, args: NoArguments) -> NameInfo:
    """Tell the name of the machine, if it has one."""
    del args
    return NameInfo(name=ctx.hub.name)


@command("system_reset", since="0.14", dialects=SYSTEM_ONLY)
async def system_reset(ctx: CommandContext, args: NoArguments) -> None:
    """Reset the machine: trays close, what was told to leave goes, requests that an error has stopped are forgotten."""
    del args
    await ctx.hub.reset()


@command("system_powerdown", since="0.14", dialects=SYSTEM_ONLY)
async def system_powerdown(ctx: CommandContext, args: NoArguments) -> None:
    """Press the power button: the guest is asked to shut down."""
    del args
    ctx.system.emit("POWERDOWN", {})


@command("set-action", since="6.0", dialects=SYSTEM_ONLY)
async def set_action(ctx: CommandContext, args: ActionArguments) -> None:
    """Set what the machine does instead of a reboot, and at its end."""
    ctx.hub.actions.reboot = args.reboot or ctx.hub.actions.reboot
    ctx.hub.actions.shutdown = args.shutdown or ctx.hub.actions.shutdown


@command("stop", since="0.14", dialects=SYSTEM_ONLY)
async def stop(ctx: CommandContext, args: NoArguments) -> None:
    """Stop the guest; jobs go on. Requests under way end first and all images become durable, also when it had stopped before."""
    del args
    ctx.system.run.stop()
    await ctx.system.come_to_rest()


@command("cont", since="0.14", dialects=SYSTEM_ONLY)
async def cont(ctx: CommandContext, args: NoArguments) -> None:
    """Let the guest go on; devices that an I/O error has stopped try again."""
    del args
    ctx.system.run.resume()
