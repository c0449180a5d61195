"""``qblock lab compare``: the command line around `qblock.lab.compare`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from qblock.errors import QBlockError
from qblock.lab.compare.comparison import compare
from qblock.lab.compare.crashes import make_left_files
from qblock.lab.compare.disks import DISKS
from qblock.lab.compare.history import read_history
from qblock.lab.compare.picture import draw
from qblock.lab.compare.report import Report, as_json, differences, examine, load_settings, save_verdicts
from qblock.lab.compare.running import Settings
from qblock.lab.compare.strategies import STRATEGIES, Strategy
from qblock.lab.compare.table import WIDTH, Painter, render
from qblock.lab.ending import ending_at_once, scratch_directory
from qblock.tools.arguments import UsageError
from qblock.tools.command_line import HELP_FLAGS, CommandLine, parse_command_line, run_program
from qblock.tools.console import complain
from qblock.units import MiB, align_up, parse_size

PROGRAM: Final = "qblock lab compare"
MIN_SIZE: Final = 8 * MiB
MAX_SIZE: Final = 1024 * MiB
_VALUED: Final = frozenset({"seed", "disk", "size", "only", "output", "picture", "keep", "recompute", "crash", "guest"})

HELP: Final = """usage: qblock lab compare [OPTIONS]
Moves a disk in every way that was proposed or built, each time under the same guest on the same modelled disks, and tells
what that takes, what the guest feels, what is allowed meanwhile, and what a crash leaves at which moment.

  --only NAME[,NAME...] only these strategies: {names}
  --disk {disks:17} the kind of disks (default: {disk})
  --size SIZE           size of the disk that is moved (default: by the kind of disks)
  --guest bursty|steady whether the guest makes pauses in its writing, in which a copy can catch up (default: bursty)
  --seed N              the seed of the guest's load and the content (default: 1)
  --output json|human   what to print (default: human)
  --picture FILE.svg    draw it, too
  --keep DIRECTORY      leave the images, histories and answers there, to compute everything again
  --recompute DIRECTORY run nothing; compute everything from the files that --keep has left
  --crash NAME:MOMENT   with --recompute: run nothing and tell nothing; make the image files that a crash at that moment (a
                        number from the JSON output) leaves, in DIRECTORY/NAME/crash/kill and .../power
  -h, --help            show this

Exit code: 0 every strategy has brought the guest to a target that holds all it wrote, 1 one has not, 2 the command line is
wrong."""


def main(argv: Sequence[str]) -> int:
    """The sub-command; returns the exit code."""
    return run_program(PROGRAM, lambda: _run(argv))


def help_text() -> str:
    """What ``--help`` prints."""
    names = ", ".join(strategy.name for strategy in STRATEGIES)
    return HELP.format(names=names, disks="|".join(DISKS), disk=next(iter(DISKS)))


def _run(argv: Sequence[str]) -> int:
    line = parse_command_line(argv, valued=_VALUED, flags=HELP_FLAGS)
    if line.has("h") or line.has("help"):
        print(help_text())
        return 0
    if line.words:
        raise UsageError(f"the comparison takes options only, not '{line.words[0]}'")
    if line.has("crash"):
        return _make_crash_files(line)
    as_json_text, picture = line.choice("output", ("human", "json")) == "json", _picture(line)
    with ending_at_once():
        report, complaints = _report(line)
    code = _tell(report, as_json_text=as_json_text, picture=picture)
    for text in complaints:
        complain(PROGRAM, text)
    return 1 if complaints else code


def _report(line: CommandLine) -> tuple[Report, list[str]]:
    """What is to be told, and what is wrong with the files that it was computed from."""
    if line.has("recompute"):
        for option in ("keep", "only", "disk", "size", "seed", "guest"):
            if line.has(option):
                raise UsageError(f"--recompute takes the files as they are: --{option} does not go with it")
        return _examined(Path(line.last("recompute", "")).resolve())
    settings, strategies = _settings(line), _strategies(line)
    with _directory(line) as directory:
        compare(settings, strategies, directory, progress=_progress())
        report = examine(directory)
        if line.has("keep"):
            save_verdicts(directory, report)
        return report, []


def _examined(directory: Path) -> tuple[Report, list[str]]:
    try:
        report = examine(directory)
        return report, differences(directory, report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QBlockError(f"'{directory}' does not hold what --keep has left: {error}") from None


def _settings(line: CommandLine) -> Settings:
    model = DISKS[line.choice("disk", tuple(DISKS))]
    try:
        size = align_up(parse_size(line.last("size", str(model.size))), MiB)
    except ValueError as error:
        raise UsageError(f"--size: {error}") from None
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UsageError(f"--size: the disk must have {MIN_SIZE // MiB}M to {MAX_SIZE // MiB}M")
    seed = line.number("seed")
    steady = line.choice("guest", ("bursty", "steady")) == "steady"
    return Settings(seed=1 if seed is None else seed, disk=model.name, size=size, steady=steady)


def _strategies(line: CommandLine) -> list[Strategy]:
    known = {strategy.name: strategy for strategy in STRATEGIES}
    names = line.last("only", ",".join(known)).split(",")
    for name in names:
        if name not in known:
            raise UsageError(f"--only: there is no strategy '{name}'; there are {', '.join(known)}")
    return [strategy for name, strategy in known.items() if name in names]


@contextlib.contextmanager
def _directory(line: CommandLine) -> Iterator[Path]:
    if line.has("keep"):
        directory = Path(line.last("keep", ""))
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise UsageError(f"--keep: {directory} is not empty")
        yield directory.resolve()
        return
    with scratch_directory() as directory:
        yield directory


def _progress() -> Callable[[str], None]:
    """Says on a terminal's stderr what is being done; elsewhere nothing."""
    if not sys.stderr.isatty():
        return lambda _: None
    return lambda text: print(f"... {text}", file=sys.stderr, flush=True)


def _picture(line: CommandLine) -> Path | None:
    """The file to draw to; that it cannot be is told before the runs are made. Raises `UsageError` and `OSError`."""
    if not line.has("picture"):
        return None
    path = Path(line.last("picture", ""))
    if path.suffix.lower() != ".svg":
        raise UsageError(f"--picture: the picture is an SVG file; '{path}' should end with .svg")
    with path.open("a", encoding="utf-8"):
        pass
    return path


def _tell(report: Report, *, as_json_text: bool, picture: Path | None) -> int:
    if as_json_text:
        print(json.dumps(as_json(report), indent=1))
    else:
        colours = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
        width = min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH
        sys.stdout.write(render(report, Painter(colours, width)))
    if picture is not None:
        picture.write_text(draw(report), encoding="utf-8")
    return 0 if all(run.switched and run.crashes[-1].kill.target.good for run in report.runs) else 1


def _make_crash_files(line: CommandLine) -> int:
    name, _, number = line.last("crash", "").partition(":")
    if not line.has("recompute") or not number.isdecimal():
        raise UsageError("--crash takes NAME:MOMENT, and --recompute with the directory")
    directory = Path(line.last("recompute", "")).resolve()
    _, strategies = load_settings(directory)
    if name not in (strategy.name for strategy in strategies):
        raise UsageError(f"--crash: '{name}' was not compared in {directory}")
    records = read_history(directory / name)
    if int(number) > len(records):
        raise UsageError(f"--crash: the history of '{name}' has {len(records)} moments")
    scratch = directory / name / "crash"
    shutil.rmtree(scratch, ignore_errors=True)
    make_left_files(directory / name, records, scratch, int(number))
    print(scratch)
    return 0
