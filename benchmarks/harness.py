"""What the benchmarks share: runs side by side with time and peak memory, and a table of ratios.

Each line runs the real program and qblock in turns, several times, and takes the best of each: the machine's noise is the same
for both. Nothing here is a test: numbers are printed, never asserted.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

MiB = 1 << 20
BIN = Path(sys.executable).parent
BULK, SMALL = 0.8, 0.5
"""The ratios (time of the real program / time of qblock) that are required: for bulk data; for metadata and small requests."""


class Run(NamedTuple):
    """Wall-clock seconds, peak resident memory in bytes, and processor seconds (0 where not measured) of one run."""

    seconds: float
    memory: int
    processor: float = 0


class Comparison(NamedTuple):
    """The best runs of both, for the same work."""

    title: str
    real: Run
    ours: Run
    required: float

    @property
    def ratio(self) -> float:
        """How fast ours is, as a multiple of the real one's speed."""
        return self.real.seconds / self.ours.seconds

    @property
    def processor_ratio(self) -> float | None:
        """The same of the processor time, user and system; None where it was not measured, or was too short to be."""
        return self.real.processor / self.ours.processor if self.ours.processor and self.real.processor else None

    def line(self) -> str:
        """One line of the table."""
        of_processor = f"{self.processor_ratio:6.2f}" if self.processor_ratio is not None else "     -"
        mark = "" if max(self.ratio, self.processor_ratio or 0) >= self.required else f"  below {self.required}"
        return (
            f"{self.title:<52} {_duration(self.real.seconds)} {_duration(self.ours.seconds)} {self.ratio:6.2f} {of_processor}"
            f"  {self.real.memory / MiB:6.0f} {self.ours.memory / MiB:6.0f}{mark}"
        )

    def report(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "title": self.title,
            "required": self.required,
            "ratio": round(self.ratio, 3),
            "processor-ratio": None if self.processor_ratio is None else round(self.processor_ratio, 3),
            "real": self.real._asdict(),
            "qblock": self.ours._asdict(),
        }


HEADING = f"{'':<52} {'QEMU':>9} {'qblock':>9} {'ratio':>6} {'of CPU':>6}  {'MiB':>6} {'MiB':>6}"


def _duration(seconds: float) -> str:
    return f"{seconds:7.2f} s" if seconds >= 1 else f"{seconds * 1000:6.1f} ms"


class Table:
    """Compares, prints a line for each comparison, and keeps them."""

    def __init__(self, folder: Path, *, size: int, rounds: int, only: str) -> None:
        self.folder = folder
        self.size = size
        self.rounds = rounds
        self.only = only
        self.lines: list[Comparison] = []

    def wants(self, title: str) -> bool:
        """Whether a line is asked for (``--only``)."""
        return self.only in title

    def compare(self, title: str, real: Callable[[], Run], ours: Callable[[], Run], *, required: float) -> None:
        """Run both in turns; keep the fastest of each, with the largest memory of each."""
        if not self.wants(title):
            return
        runs: tuple[list[Run], list[Run]] = ([], [])
        for _ in range(self.rounds):
            runs[0].append(real())
            runs[1].append(ours())
        best = [
            Run(min(run.seconds for run in side), max(run.memory for run in side), min(run.processor for run in side))
            for side in runs
        ]
        self.lines.append(Comparison(title, *best, required))
        print(self.lines[-1].line(), flush=True)

    def compare_tool(
        self,
        title: str,
        words: Sequence[str | Path],
        *,
        required: float,
        before: Callable[[], object] = lambda: None,
        timed_by_itself: bool = False,
    ) -> None:
        """`compare` the same command line of qemu-img and qblock-img; ``before`` runs before each."""

        def runner(program: str | Path) -> Callable[[], Run]:
            def run() -> Run:
                before()
                return run_program([program, *words], timed_by_itself=timed_by_itself)

            return run

        self.compare(title, runner("qemu-img"), runner(BIN / "qblock-img"), required=required)


def main(description: str, *parts: Callable[[Table], None], size: int = 1024) -> None:
    """The command line of each benchmark: run ``parts``, print their lines, and keep them as JSON where asked to."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--size", type=int, default=size, help=f"MiB of the disks (default {size})")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program (default 3)")
    parser.add_argument("--only", default="", help="run only the lines with this text")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    options = parser.parse_args()
    need_qemu("qemu-img", "qemu-io", "qemu-storage-daemon")
    with workspace() as folder:
        table = Table(folder, size=options.size, rounds=options.rounds, only=options.only)
        print(HEADING)
        for part in parts:
            part(table)
    if options.json is not None:
        options.json.write_text(json.dumps([line.report() for line in table.lines], indent=2) + "\n")


def need_qemu(*programs: str) -> None:
    """End with a message when a real program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise SystemExit(f"this benchmark compares with the real QEMU; not installed: {', '.join(missing)}")


@contextmanager
def workspace() -> Iterator[Path]:
    """An empty directory (on the file system of TMPDIR), removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="qblock-bench-") as folder:
        yield Path(folder)


def qemu(*words: str | Path) -> None:
    """Run the real qemu-img, quietly."""
    subprocess.run(["qemu-img", *words], check=True, stdout=subprocess.DEVNULL)


@functools.cache
def compiled_once() -> dict[str, str]:
    """The environment of the programs: Python keeps what it has compiled, as it does where qblock is installed."""
    folder = tempfile.mkdtemp(prefix="qblock-bench-bytecode-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    return environment | {"PYTHONPYCACHEPREFIX": folder}


def run_program(words: Sequence[str | Path], *, timed_by_itself: bool = False) -> Run:
    """Run a program to its end and measure it; ``timed_by_itself``: the time is the one that it prints (``bench``)."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        pid = os.posix_spawnp(str(words[0]), [str(word) for word in words], compiled_once(),
                              file_actions=[(os.POSIX_SPAWN_DUP2, output.fileno(), 1)])  # fmt: skip
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - started
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"failed: {' '.join(map(str, words))}")
        if timed_by_itself:
            output.seek(0)
            found = re.search(rb"completed in ([0-9.]+) seconds", output.read())
            assert found is not None
            seconds = float(found[1])
    return Run(seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)
