"""``qblock`` without a sub-command: a machine with the disks and sockets of the command line, and a prompt for it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import Final

from qblock.errors import QBlockError
from qblock.monitor.console import Console
from qblock.monitor.loopthread import LoopThread
from qblock.monitor.machine import Machine, MachineOptions
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
    """Run until a client or a signal says quit."""
    machine = await start_machine(options)
    try:
        install(machine)
        _quit_on_signals(machine)
        await machine.hub.wait_quit()
    finally:
        await machine.close()


def _quit_on_signals(machine: Machine) -> None:
    loop = asyncio.get_running_loop()
    quitting: list[asyncio.Task[None]] = []

    def begin() -> None:
        if not quitting:
            quitting.append(loop.create_task(machine.hub.quit(), name="quit on a signal"))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, begin)
