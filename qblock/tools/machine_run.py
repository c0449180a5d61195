"""Running the machine of ``qblock``: at a prompt, with lines from a pipe, or without either until told to quit."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from contextlib import closing
from typing import Any, Final, TypeVar

from qblock.monitor.console import Console
from qblock.monitor.loopthread import LoopThread
from qblock.monitor.machine import MachineOptions
from qblock.monitor.repl import Repl
from qblock.monitor.repl_commands import install
from qblock.monitor.reports import Report, Reports
from qblock.streams import tell
from qblock.tools.command_line import CommandLine
from qblock.tools.machine_line import answers_trace_help, loop_factory, machine_options, start_machine
from qblock.tools.tracing import Tracer

PROGRAM: Final = "qblock"
T = TypeVar("T")


def run_machine(line: CommandLine, *, clock: str, prompt: bool, greeting: str) -> int:
    """Start the machine that the command line describes and run it to its end; returns the exit code.

    ``greeting`` is for a person at a terminal. Raises `QBlockError` and `OSError` when the machine cannot start.
    """
    if answers_trace_help(line):
        return 0
    with closing(Tracer.of(PROGRAM, line.values.get("trace", ()))) as tracer:
        options = machine_options(line, tracer)
        if prompt:
            return _run_with_prompt(clock, options, greeting)
        with asyncio.Runner(loop_factory=loop_factory(clock, manual=True)) as runner:
            runner.run(_serve(options))
    return 0


def _print(report: Report) -> None:
    tell(report.text, sys.stderr if report.is_complaint else sys.stdout)


def _print_aside(report: Report) -> None:
    """Where standard output belongs to a QMP client."""
    tell(report.text, sys.stderr)


def _run_with_prompt(clock: str, options: MachineOptions, greeting: str) -> int:
    with LoopThread(loop_factory(clock, manual=True)) as thread:
        reports = Reports(_print)  # until there is a prompt
        machine = thread.call(start_machine(options, reports))
        try:
            repl = Repl(thread, Console(machine), lambda text: print(text, end="", flush=True))
            if sys.stdin.isatty():
                print(greeting)
                return repl.run_prompt(repl.make_session())
            return repl.run_lines(sys.stdin)
        finally:
            reports.listener = _print
            thread.call(machine.close())


async def _serve(options: MachineOptions) -> None:
    """Run until a client or a signal says quit; also a start that waits for a client can be ended by a signal."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    try:
        machine = await first_of(start_machine(options, Reports(_print_aside if "stdio" in options.qmp else _print)), told)
        if machine is None:
            return
        try:
            install(machine)
            await first_of(machine.hub.wait_quit(), told)
        finally:
            await machine.close()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)


async def first_of(work: Coroutine[Any, Any, T], told: asyncio.Event) -> T | None:
    """The result of ``work``; None, and ``work`` cancelled, when we are told to end before."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(told.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.wait({working, waiting})
