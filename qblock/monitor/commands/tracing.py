"""trace-event-get-state and trace-event-set-state: which trace events are logged; the events are in `qblock.tracing`.

Differs from QEMU: there are no CPUs here, so every ``vcpu`` is refused.
"""

from __future__ import annotations

import attrs

from qblock.errors import CommandError, InvalidParameter
from qblock.monitor.command import CommandContext, command
from qblock.monitor.dialects import SYSTEM_ONLY
from qblock.monitor.replies import TraceEventInfo
from qblock.options import option, required
from qblock.tracing import Trace


@attrs.frozen
class TraceEventGetStateArguments:
    """Arguments of trace-event-get-state."""

    name: str = required(doc="name of an event, or a pattern with '*'")
    vcpu: int | None = option(None, doc="CPU whose state is asked for; there is none")


@attrs.frozen
class TraceEventSetStateArguments:
    """Arguments of trace-event-set-state."""

    name: str = required(doc="name of an event, or a pattern with '*'")
    enable: bool = required(doc="whether the events are logged from now on")
    ignore_unavailable: bool | None = option(None, doc="pass over events that cannot be switched on; there are none")
    vcpu: int | None = option(None, doc="CPU whose state is changed; there is none")


@command("trace-event-get-state", since="2.2", returns=list[TraceEventInfo], dialects=SYSTEM_ONLY)
async def trace_event_get_state(ctx: CommandContext, args: TraceEventGetStateArguments) -> list[TraceEventInfo]:
    """Tell which of the events of that name are logged."""
    trace = ctx.system.env.trace
    return [
        TraceEventInfo(name=name, state="enabled" if trace.is_logged(name) else "disabled", vcpu=False)
        for name in events_named(trace, args.name, args.vcpu)
    ]


@command("trace-event-set-state", since="2.2", dialects=SYSTEM_ONLY)
async def trace_event_set_state(ctx: CommandContext, args: TraceEventSetStateArguments) -> None:
    """Have the events of that name logged, or not any longer."""
    trace = ctx.system.env.trace
    for name in events_named(trace, args.name, args.vcpu):
        trace.switch(name, on=args.enable)


def events_named(trace: Trace, name: str, vcpu: int | None = None) -> list[str]:
    """The names of the events that ``name`` means, newest declaration first.

    Raises `CommandError` when it is no pattern and there is no such event; a pattern that fits nothing is no mistake.
    """
    found = [event.name for event in trace.matching(name)]
    if not found and "*" not in name:
        raise CommandError(f"There is no trace event '{name}'")
    if vcpu is not None:
        raise InvalidParameter("vcpu", f"cannot be {vcpu}: there are no CPUs here")
    return found
