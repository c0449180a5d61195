"""The trace events of the monitor: two for each command, one for each QMP event.

Models QEMU's ``qmp_enter_NAME`` and ``qmp_exit_NAME``: the arguments as JSON when a command has been understood, then its
result with 1, or the text of its error with 0. ``qmp_event_NAME`` is ours. They are declared at run time, since the table of the
commands depends on the dialect.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from qblock.errors import QBlockError
from qblock.monitor import visitor

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.monitor.command import Command, CommandContext
    from qblock.tracing import Trace

_EVENT: Final = "qmp_event_"


def _name(prefix: str, name: str) -> str:
    return f"{prefix}{name.replace('-', '_').lower()}"


def declare_events(trace: Trace, commands: Iterable[str], events: Iterable[str] = ()) -> None:
    """Declare the trace events of the QMP ``commands`` and ``events`` of these names."""
    for name in commands:
        trace.declare(_name("qmp_enter_", name), f"The command {name} is executed", "{arguments}")
        trace.declare(_name("qmp_exit_", name), f"The command {name} has ended; 1: well", "{result} {succeeded}")
    for name in events:
        trace.declare(_name(_EVENT, name), f"The event {name} is sent", "{data}")


async def run_traced(command: Command, ctx: CommandContext, arguments: Mapping[str, Json]) -> Json:
    """`Command.run` with trace events before and after; arguments that are wrong are no execution."""
    if not command.checks_itself:
        visitor.arguments(command.arguments, arguments)
    extra = ctx.system.env.trace.extra
    if (hit := extra.get(_name("qmp_enter_", command.name))) is not None:
        hit(arguments=json.dumps(arguments))
    try:
        reply = await command.run(ctx, arguments)
    except QBlockError as error:
        if (hit := extra.get(_name("qmp_exit_", command.name))) is not None:
            hit(result=str(error), succeeded=0)
        raise
    if (hit := extra.get(_name("qmp_exit_", command.name))) is not None:
        hit(result=json.dumps(reply), succeeded=1)
    return reply


def trace_event(trace: Trace, name: str, data: Mapping[str, Json]) -> None:
    """Tell a QMP event as a trace event."""
    if trace.extra and (hit := trace.extra.get(_name(_EVENT, name))) is not None:
        hit(data=" ".join(f"{key.replace('-', '_')}={_text(value)}" for key, value in data.items()))


def _text(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value)
