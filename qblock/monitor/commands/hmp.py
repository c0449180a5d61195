"""human-monitor-command: a line of the human monitor by way of QMP."""

from __future__ import annotations

import attrs

from qblock.monitor.command import CommandContext, command
from qblock.monitor.dialects import SYSTEM_ONLY
from qblock.options import option, required


@attrs.frozen
class HumanMonitorCommandArguments:
    """Arguments of human-monitor-command."""

    command_line: str = required(doc="the line, as a person would type it")
    cpu_index: int | None = option(None, doc="CPU that the line is about; block commands are about none")


@command("human-monitor-command", since="0.14", returns=str, features=("savevm-monitor-nodes",), dialects=SYSTEM_ONLY)
async def human_monitor_command(ctx: CommandContext, args: HumanMonitorCommandArguments) -> str:
    """Execute a line of the human monitor and answer with what it prints; lines end with CR LF."""
    output = await ctx.hub.hmp.run(ctx, args.command_line)
    return output.text.replace("\n", "\r\n")
