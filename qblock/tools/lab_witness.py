"""``qblock lab witness``: the command line around `qblock.lab.witness`. See docs/labs.md."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from qblock.lab.ending import ending_at_once, scratch_directory
from qblock.lab.witness.experiment import Experiment, Outcome, Progress, Scope, UnknownStep, recompute
from qblock.lab.witness.plan import Part, Victim
from qblock.lab.witness.report import as_json, as_text, plain, step_lines
from qblock.tools.arguments import UsageError
from qblock.tools.command_line import HELP_FLAGS, CommandLine, parse_command_line, run_program
from qblock.tools.console import complain

PROGRAM: Final = "qblock lab witness"
SHOWN, NOT_SHOWN, UNUSABLE = 0, 1, 2

HELP: Final = """usage: qblock lab witness [OPTIONS]
       qblock lab witness --recompute DIRECTORY
Kills management, the machine, both, or the host beneath them at every step of drive-reopen with a witness (dialect rfc-2012),
lets whoever is left decide which image the guest goes on with, and looks for every write that the guest had flushed. Then the
same without the witness: how much each image would lose, and pairs of crashes that look the same and need different images.

  --step NAME           this step only; may be repeated (see --list)
  --kill WHO            with a witness: management, machine, both or host (a power cut) only; may be repeated
  --part NAME           with-witness, refused-witness or without-witness: this part only; may be repeated
  --seed N              the seed of the guest's pace; it decides every line (default: 1)
  --keep DIRECTORY      leave the files of all cases there: images, journals, witness, verdict.json (some 300 MiB)
  --recompute DIRECTORY find the verdicts on such files again, and compare them with those that were kept
  --qemu-img            have the real qemu-img check each image that is chosen
  --output human|json   tables, or all of it for programs (default: human)
  --list                show the steps
  -h, --help            show this

Exit code: 0 no write was lost with the witness, and without it there are crashes that nobody can tell apart; 1 it is not so;
2 the command line is wrong."""

Kind = TypeVar("Kind", bound=enum.Enum)
_VALUED: Final = frozenset({"step", "kill", "part", "seed", "keep", "recompute", "output"})
_FLAGS: Final = HELP_FLAGS | {"list", "qemu-img"}


def main(argv: Sequence[str]) -> int:
    """The sub-command; returns the exit code."""
    return run_program(PROGRAM, lambda: _run(argv), misused=UNUSABLE)


def _run(argv: Sequence[str]) -> int:
    line = parse_command_line(argv, valued=_VALUED, flags=_FLAGS)
    if line.has("h") or line.has("help"):
        print(HELP)
        return SHOWN
    if line.words:
        raise UsageError(f"there is nothing to be said about '{line.words[0]}': all is told by options")
    try:
        return _recompute(line) if line.has("recompute") else _perform(line)
    except UnknownStep as error:
        raise UsageError(str(error)) from None


def _perform(line: CommandLine) -> int:
    scope = _scope(line)
    output = line.choice("output", ("human", "json"))
    with ending_at_once(), _directory(line) as directory, _progress() as progress:
        experiment = Experiment(scope, directory, keep=line.has("keep"), progress=progress, checker=_checker(line))
        if line.has("list"):
            print("\n".join(step_lines(experiment.steps())))
            return SHOWN
        outcome = experiment.run()
    _show(outcome, output)
    if line.has("keep"):
        print(f"the files are in {line.last('keep', '')}", file=sys.stderr)
    return SHOWN if outcome.shown else NOT_SHOWN


def _recompute(line: CommandLine) -> int:
    for name in ("step", "kill", "part", "seed", "keep", "list"):
        if line.has(name):
            raise UsageError(f"--{name} is for a new run, and --recompute looks at an old one")
    output = line.choice("output", ("human", "json"))
    with _progress() as progress:
        outcome, different = recompute(Path(line.last("recompute", "")), progress, _checker(line))
    _show(outcome, output)
    for text in different:
        complain(PROGRAM, text)
    if not different:
        print(f"the verdicts are those that were kept ({len(outcome.verdicts)} in all)", file=sys.stderr)
    return SHOWN if outcome.shown and not different else NOT_SHOWN


def _scope(line: CommandLine) -> Scope:
    seed = line.number("seed")
    return Scope(
        seed=1 if seed is None else seed,
        steps=tuple(line.values.get("step", ())),
        victims=_chosen(line, "kill", Victim),
        parts=_chosen(line, "part", Part),
    )


def _checker(line: CommandLine) -> str | None:
    """The qemu-img to be used, if one is wanted."""
    program = shutil.which("qemu-img")
    if line.has("qemu-img") and program is None:
        raise UsageError("--qemu-img: there is no qemu-img in PATH")
    return program if line.has("qemu-img") else None


def _chosen(line: CommandLine, option: str, kinds: type[Kind]) -> tuple[Kind, ...]:
    """Those members of an enum that were asked for, in their order; all, if none was."""
    known = [kind.value for kind in kinds]
    wanted = line.values.get(option, known)
    if not set(wanted) <= set(known):
        raise UsageError(f"--{option} takes {', '.join(known)}")
    return tuple(kind for kind in kinds if kind.value in wanted)


@contextlib.contextmanager
def _directory(line: CommandLine) -> Iterator[Path]:
    """Where the files go: what is not kept goes to memory, if that can be (a kill takes nothing from the kernel's hands)."""
    if line.has("keep"):
        directory = Path(line.last("keep", ""))
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UsageError(f"--keep: {directory} is there already, and is not an empty directory")
        yield directory
        return
    memory = Path("/dev/shm")
    place = memory if "TMPDIR" not in os.environ and os.access(memory, os.W_OK) else None
    with scratch_directory(where=place) as directory:
        yield directory


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """On a terminal: a line that tells how far we are, and is gone afterwards."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return

    def show(done: int, total: int) -> None:
        print(f"\r\x1b[K{done} of {total} cases", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _show(outcome: Outcome, output: str) -> None:
    if output == "json":
        print(json.dumps(as_json(outcome)))
        return
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    paint = (lambda text, colour: f"\x1b[{colour}m{text}\x1b[0m") if colours else plain
    for text in as_text(outcome, paint):
        print(text)
    sys.stdout.flush()
