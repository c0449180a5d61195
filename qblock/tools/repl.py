"""``qblock`` without a sub-command: a machine with the disks and sockets of the command line, and a prompt for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qblock.tools.arguments import UsageError
from qblock.tools.command_line import HELP_FLAGS, CommandLine, parse_command_line, run_program
from qblock.tools.console import PROGRAM_VERSION

PROGRAM: Final = "qblock"
GREETING: Final = "qblock: type `help` for the commands, `quit` or Ctrl-D to leave"

HELP: Final = """usage: qblock [OPTIONS]             a machine with disks, and a prompt for it
       qblock demo [OPTIONS]        a live mirror, from beginning to end, with proofs
       qblock replay [OPTIONS] SCRIPT
                                    perform a script of QMP commands and expectations
       qblock lab EXPERIMENT [OPTIONS]
                                    experiments with live block operations

  -drive if=virtio,id=virtio0,file=FILE,format=qcow2
                          a disk (as QEMU's -drive)
  -blockdev OPTIONS       a block node, as key=value or JSON (as QEMU's -blockdev)
  -qmp unix:PATH,server=on,wait=off
                          serve QMP clients there; also tcp:HOST:PORT,...
  -monitor stdio|none     the prompt, or no prompt: run until told to quit
  -S                      do not start the guest before the command `cont`
  --clock real|virtual    which time the machine lives on; virtual time moves by `step` and `run`
  --dialect NAME          whose commands it has: 7.2 (default), or a proposal of its time, to try it and compare:
                          rfc-2012, blkmirror-2012, block-copy-2011
  --trace [enable=]PATTERN[,events=FILE][,file=FILE][,timestamp=on]
                          write lines about what happens inside, as 'mirror_*'; 'help' lists the events
  --seed N                the seed of all chances (node names, what the guest writes)
  -h, --help              show this; `qblock demo --help` and so on show theirs
  -V, --version           show the version

-drive, -blockdev and -qmp may be repeated; a comma in a value is written twice (as in QEMU).
At the prompt, `help` lists the commands. Lines can also be piped in; the exit code is then 1 if one of them failed."""


_VALUED: Final = frozenset({"drive", "blockdev", "qmp", "monitor", "clock", "seed", "dialect", "trace"})
_FLAGS: Final = HELP_FLAGS | {"V", "version", "S"}


def main(argv: Sequence[str]) -> int:
    """The program; returns its exit code."""
    return run_program(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    line = parse_command_line(argv, valued=_VALUED, flags=_FLAGS)
    if line.has("h") or line.has("help"):
        print(HELP)
        return 0
    if line.has("V") or line.has("version"):
        print(f"qblock version {PROGRAM_VERSION}")
        return 0
    return _run_machine(line)


def _run_machine(line: CommandLine) -> int:
    from qblock.tools.machine_run import run_machine

    if line.words:
        raise UsageError(f"there is no sub-command '{line.words[0]}'; there are demo, replay and lab")
    clock = line.choice("clock", ("real", "virtual"))
    prompt = line.choice("monitor", ("stdio", "none")) == "stdio"
    return run_machine(line, clock=clock, prompt=prompt, greeting=GREETING)
