"""The machine that the options of a command line describe, and the loop it lives on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from qblock.clock import Clock, LoopClock, RealClock, VirtualTime
from qblock.monitor.dialects import Dialect, dialect_named
from qblock.monitor.machine import Machine, MachineOptions
from qblock.monitor.reports import Reports
from qblock.testing.simloop import SimLoop
from qblock.tools.command_line import CommandLine
from qblock.tools.console import end_program
from qblock.tools.tracing import Tracer, asks_for_list, monitor_trace, print_events


def machine_options(line: CommandLine, tracer: Tracer) -> MachineOptions:
    """The machine that the command line describes, its trace events logged as ``tracer`` says."""
    return MachineOptions(
        drives=line.values.get("drive", ()),
        blockdevs=line.values.get("blockdev", ()),
        qmp=line.values.get("qmp", ()),
        seed=line.number("seed"),
        paused=line.has("S"),
        dialect=dialect_named(line.last("dialect", Dialect.SYSTEM.value)),
        watch=tracer.watch,
        fatal=end_program,
    )


def answers_trace_help(line: CommandLine) -> bool:
    """Print the trace events when ``--trace help`` asks for them; False when it does not."""
    if not asks_for_list(line.values.get("trace", ())):
        return False
    print_events(monitor_trace(dialect_named(line.last("dialect", Dialect.SYSTEM.value))))
    return True


def loop_factory(clock: str, *, manual: bool) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes the loop for a ``virtual`` or ``real`` clock; ``manual``: virtual time is moved by hand."""
    return asyncio.new_event_loop if clock == "real" else lambda: SimLoop(manual=manual)


async def start_machine(options: MachineOptions, reports: Reports | None = None) -> Machine:
    """Start a machine on the running loop, with the clock that belongs to it."""
    loop = asyncio.get_running_loop()
    virtual = loop if isinstance(loop, VirtualTime) else None
    clock: Clock = LoopClock() if virtual is not None else RealClock()
    return await Machine.open(options, clock=clock, virtual_time=virtual, reports=reports)
