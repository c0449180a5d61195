"""``qblock`` without a sub-command: a machine with the disks and sockets of the command line, and a prompt for it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine, Sequence
from typing import Any, Final, TypeVar

from qblock.errors import QBlockError
from qblock.monitor.console import Console
from qblock.monitor.loopthread import LoopThread
from qblock.monitor.machine import MachineOptions
from qblock.monitor.repl import Repl
from qblock.monitor.repl_commands import install
from qblock.tools.arguments import UsageError
from qblock.tools.console import PROGRAM_VERSION, complain, ending_quietly
from qblock.tools.machine_line import (
    MACHINE_OPTIONS,
    loop_factory,
    machine_options,
    parse_command_line,
    start_machine,
)

T = TypeVar("T")

PROGRAM: Final = "qblock"

HELP: Final = """usage: qblock [OPTIONS]             a machine with disks, and a prompt for it
       qblock demo [OPTIONS]        a live mirror, from beginning to end, with proofs
       qblock replay [OPTIONS] SCRIPT
                                    perform a script of QMP commands and expectations

  -drive if=virtio,id=virtio0,file=FILE,format=qcow2
                          a disk (as QEMU's -drive)
  -blockdev OPTIONS       a block node, as key=value or JSON (as QEMU's -blockdev)
  -qmp unix:PATH,server=on,wait=off
                          serve QMP clients there; also tcp:HOST:PORT; may be repeated
  -monitor stdio|none     the prompt, or no prompt: run until told to quit
  --clock real|virtual    which time the machine lives on; virtual time moves by `step` and `run`
  --seed N                the seed of all chances (node names, what the guest writes)
  -h, --help              show this; `qblock demo --help` and `qblock replay --help` show theirs
  -V, --version           show the version

At the prompt, `help` lists the commands. Lines can also be piped in; the exit code is then 1 if one of them failed."""


def main(argv: Sequence[str]) -> int:
    """The program; returns its exit code."""
    return ending_quietly(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    try:
        flags = frozenset({"h", "help", "V", "version"})
        line = parse_command_line(argv, valued=MACHINE_OPTIONS | {"monitor"}, flags=flags)
        if line.has("h") or line.has("help"):
            print(HELP)
            return 0
        if line.has("V") or line.has("version"):
            print(f"qblock version {PROGRAM_VERSION}")
            return 0
        if line.words:
            raise UsageError(f"there is no sub-command '{line.words[0]}'; there are demo and replay")
        clock = line.choice("clock", ("real", "virtual"))
        if line.choice("monitor", ("stdio", "none")) == "none":
            return _run_without_prompt(clock, machine_options(line))
        return _run_with_prompt(clock, machine_options(line))
    except UsageError as error:
        complain(PROGRAM, f"{error}\nTry 'qblock --help' for more information")
        return 2
    except (QBlockError, OSError) as error:
        complain(PROGRAM, str(error))
        return 1


def _run_with_prompt(clock: str, options: MachineOptions) -> int:
    with LoopThread(loop_factory(clock, manual=True)) as thread:
        machine = thread.call(start_machine(options))
        try:
            repl = Repl(thread, Console(machine), lambda text: print(text, end="", flush=True))
            if sys.stdin.isatty():
                print("qblock: type `help` for the commands, `quit` or Ctrl-D to leave")
                return repl.run_prompt(repl.make_session())
            return repl.run_lines(sys.stdin)
        finally:
            thread.call(machine.close())


def _run_without_prompt(clock: str, options: MachineOptions) -> int:
    with asyncio.Runner(loop_factory=loop_factory(clock, manual=True)) as runner:
        runner.run(_serve(options))
    return 0


async def _serve(options: MachineOptions) -> None:
    """Run until a client or a signal says quit; also a start that waits for a client can be ended by a signal."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    try:
        machine = await _first(start_machine(options), told)
        if machine is None:
            return
        try:
            install(machine)
            await _first(machine.hub.wait_quit(), told)
        finally:
            await machine.close()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)


async def _first(work: Coroutine[Any, Any, T], told: asyncio.Event) -> T | None:
    """The result of ``work``; None, and ``work`` cancelled, when we are told to end before."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(told.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.wait({working, waiting})
