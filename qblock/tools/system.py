"""``qblock-system``: a machine with disks and monitors, started by the command line of qemu-system-x86_64 7.2.

What the command line says of drives, nodes, devices, objects and monitors is done; what it says of processors, memory,
networks and displays is accepted, as it has no effect on a machine without a processor; what cannot be had is refused by
name.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Final

from qblock.tools.command_line import run_program
from qblock.tools.console import PROGRAM_VERSION
from qblock.tools.system_options import Given, parse_options

PROGRAM: Final = "qblock-system"

HELP: Final = """usage: qblock-system [options] [disk_image]

'disk_image' is the image of the first hard disk

A machine without a processor: its disks, its monitors, and a guest that does what it is told (the command `guest`).

  -drive [file=FILE][,if=none|virtio|ide|floppy|pflash][,format=F][,id=ID][,media=cdrom][,snapshot=on][,werror=A][,...]
  -blockdev OPTIONS, -object OPTIONS, -device MODEL[,PROPERTY=VALUE...]     (also as JSON)
  -hda -hdb -hdc -hdd -cdrom -fda -fdb -pflash FILE, -snapshot
  -machine pc|q35|none, -nodefaults, -global MODEL.PROPERTY=VALUE, -usb
  -chardev socket|stdio|file|null|pty,id=ID,...  -mon chardev=ID[,mode=control|readline][,pretty=on]
  -qmp DEV, -qmp-pretty DEV, -monitor DEV        DEV: unix:PATH|tcp:HOST:PORT[,server=on][,wait=off]|stdio|pty|null
  -qtest DEV with -accel qtest                   time passes only as `clock_step` and `clock_set` say there
  -S                                             wait for the command cont
  -add-fd fd=FD,set=SET, -readconfig FILE, -set GROUP.ID.ARG=VALUE
  -name NAME, -uuid UUID, -seed N, -no-reboot, -no-shutdown, -action reboot=shutdown
  -pidfile FILE, -daemonize, -trace PATTERN
  -version, -machine help, -device help, -device MODEL,help, -accel help, -object help, -chardev help

The other options of qemu-system-x86_64 are accepted and have no effect, as -cpu, -m, -smp, -display, -vga, -netdev, -serial."""


def main(argv: list[str] | None = None) -> int:
    """The program: returns its exit code."""
    args = sys.argv[1:] if argv is None else argv
    return run_program(PROGRAM, lambda: _run(args), misused=1, help_option="-help")


def _run(args: Sequence[str]) -> int:
    given = parse_options(args)
    answer = _answer(given)
    if answer is not None:
        print(answer)
        return 0
    return _run_machine(given)


def _answer(given: Sequence[Given]) -> str | None:
    """What the first question among the options is answered; None when there is none."""
    from qblock.tools.system_help import answer

    for option in given:
        if option.name in ("h", "help"):
            return HELP
        if option.name == "version":
            return f"QEMU emulator version 7.2.22 ({PROGRAM} {PROGRAM_VERSION})\nA model of QEMU's block layer, not QEMU"
        if (text := answer(option)) is not None:
            return text
    return None


def _run_machine(given: Sequence[Given]) -> int:
    from qblock.monitor.dialects import Dialect
    from qblock.tools.background import Ready, in_background
    from qblock.tools.machine_line import loop_factory
    from qblock.tools.system_machine import serve
    from qblock.tools.system_plan import Plan
    from qblock.tools.tracing import Tracer, asks_for_list, monitor_trace, print_events

    plan = Plan.of(given)
    if asks_for_list(plan.values("trace")):
        print_events(monitor_trace(Dialect.SYSTEM))
        return 0
    with closing(Tracer.of(PROGRAM, plan.values("trace"))) as tracer:

        def run(ready: Ready) -> None:
            clock = "virtual" if plan.virtual_time else "real"
            with asyncio.Runner(loop_factory=loop_factory(clock, manual=True)) as runner:
                runner.run(serve(plan, tracer, ready))

        if plan.has("daemonize"):
            return in_background(PROGRAM, run)
        run(lambda: None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
