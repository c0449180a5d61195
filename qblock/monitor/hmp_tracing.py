"""The commands of the human monitor about trace events: ``trace-event`` and ``info trace-events``.

As in QEMU their errors are printed without the word "Error:".
"""

from __future__ import annotations

from qblock.errors import QBlockError
from qblock.monitor.commands.tracing import events_named
from qblock.monitor.hmp_command import HmpCall, PlainError, hmp_command


@hmp_command(
    "trace-event", "name:s,option:b,vcpu:i?", "name on|off [vcpu]", "log a trace event (or those of a pattern), or stop that"
)
async def trace_event(call: HmpCall) -> None:
    """As trace-event-set-state."""
    trace = call.context.system.env.trace
    for name in _names(call, call.text("name") or ""):
        trace.switch(name, on=call.flag("option"))


@hmp_command("info trace-events", "name:s?,vcpu:i?", "[name [vcpu]]", "show which trace events are logged")
async def info_trace_events(call: HmpCall) -> None:
    """A line for each event: 1 when it is logged."""
    trace = call.context.system.env.trace
    for name in _names(call, call.text("name") or "*"):
        call.say(f"{name} : state {int(trace.is_logged(name))}")


def _names(call: HmpCall, wanted: str) -> list[str]:
    try:
        return events_named(call.context.system.env.trace, wanted, call.number("vcpu"))
    except QBlockError as error:
        raise PlainError(str(error)) from None
