"""``qblock replay``: the command line around `qblock.monitor.replay`. See docs/replay.md."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import attrs

from qblock.clock import RealClock
from qblock.monitor.machine import MachineOptions, qmp_socket
from qblock.monitor.replay import (
    JsonTranscript,
    MonitorGuest,
    Replay,
    StreamWire,
    TextTranscript,
    Transcript,
)
from qblock.monitor.script import ScriptError, Step, parse_script
from qblock.tools.arguments import UsageError
from qblock.tools.command_line import HELP_FLAGS, CommandLine, parse_command_line, run_program
from qblock.tools.console import complain
from qblock.tools.machine_line import answers_trace_help, loop_factory, machine_options, start_machine
from qblock.tools.tracing import Tracer

PROGRAM: Final = "qblock replay"
OK, UNUSABLE = 0, 2

HELP: Final = """usage: qblock replay [OPTIONS] SCRIPT
Performs a script of QMP commands and expectations (see docs/replay.md); '-' reads it from standard input.

  --socket PATH         run it against the QMP server there (PATH, unix:PATH or tcp:HOST:PORT)
  --define NAME=VALUE   what ${NAME} in the script stands for
  --output text|json    how the transcript is printed
  --clock virtual|real  the clock of the machine that is made for the run (default: virtual)
  --seed N              the seed of its chances
  --dialect NAME        whose commands it has: 7.2 (default), rfc-2012, blkmirror-2012, block-copy-2011
  --trace PATTERN       which of its trace events are written to standard error (see qblock --help)
  -drive OPTIONS        a disk of that machine
  -blockdev OPTIONS     a node of that machine
  -h, --help            show this

Exit code: 0 everything was as expected, 1 something was not, 2 the script or the command line is wrong."""


_VALUED: Final = frozenset({"socket", "define", "output", "clock", "seed", "dialect", "drive", "blockdev", "trace"})


def main(argv: Sequence[str]) -> int:
    """The sub-command; returns the exit code."""
    return run_program(PROGRAM, lambda: _run(argv), misused=UNUSABLE)


def _run(argv: Sequence[str]) -> int:
    line = parse_command_line(argv, valued=_VALUED, flags=HELP_FLAGS)
    if line.has("h") or line.has("help"):
        print(HELP)
        return OK
    if answers_trace_help(line):
        return OK
    try:
        steps = parse_script(_script_text(line), _variables(line))
        transcript = _transcript(line)
        if line.has("socket"):
            _check_no_machine(line)
            asyncio.run(_run_on_socket(line.last("socket", ""), steps, transcript))
        else:
            _run_here(line, steps, transcript)
    except ScriptError as error:
        complain(PROGRAM, str(error))
        return UNUSABLE
    return OK


def _run_here(line: CommandLine, steps: Sequence[Step], transcript: Transcript) -> None:
    clock = line.choice("clock", ("virtual", "real"))
    loop = loop_factory(clock, manual=False)
    with closing(Tracer.of(PROGRAM, line.values.get("trace", ()))) as tracer, asyncio.Runner(loop_factory=loop) as runner:
        runner.run(_run_on_machine(machine_options(line, tracer), steps, transcript))


def _script_text(line: CommandLine) -> str:
    if len(line.words) != 1:
        raise UsageError("give one script, or '-' for standard input")
    (name,) = line.words
    if name == "-":
        return sys.stdin.read()
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the script '{name}' cannot be read: {error}") from None


def _variables(line: CommandLine) -> dict[str, str]:
    variables: dict[str, str] = {}
    for text in line.values.get("define", ()):
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--define takes NAME=VALUE, not '{text}'")
        variables[name] = value
    return variables


def _transcript(line: CommandLine) -> Transcript:
    if line.choice("output", ("text", "json")) == "json":
        return JsonTranscript(sys.stdout.write)
    return TextTranscript(sys.stdout.write)


def _check_no_machine(line: CommandLine) -> None:
    for name in ("drive", "blockdev", "clock", "seed", "dialect", "trace"):
        if line.has(name):
            raise UsageError(f"--{name} describes a machine of its own, and --socket means another one")


async def _run_on_socket(address: str, steps: Sequence[Step], transcript: Transcript) -> None:
    wire = await StreamWire.connect(address)
    try:
        await Replay(wire, RealClock(), transcript, MonitorGuest()).run(steps)
    finally:
        await wire.close()


async def _run_on_machine(options: MachineOptions, steps: Sequence[Step], transcript: Transcript) -> None:
    with tempfile.TemporaryDirectory(prefix="qblock-replay-") as directory:
        path = os.path.join(directory, "qmp")
        machine = await start_machine(attrs.evolve(options, qmp=(qmp_socket(path),)))
        try:
            wire = await StreamWire.connect(path)
            try:
                await Replay(wire, machine.clock, transcript, machine).run(steps)
            finally:
                await wire.close()
        finally:
            await machine.close()
