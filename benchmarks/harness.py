"""What the benchmarks share: images, runs side by side with time and peak memory, and a table of ratios.

Each benchmark runs the real program and qblock in turns, several times, and takes the best of each: the machine's noise is the
same for both. Nothing here is a test: numbers are printed, never asserted.
"""

from __future__ import annotations

import atexit
import functools
import os
import random
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
    amount: float
    unit: str

    def show(self) -> None:
        """Print one line: rates, ratio of ours to the real one, memory."""
        real, ours = self.amount / self.real.seconds, self.amount / self.ours.seconds
        print(
            f"{self.title:<42} QEMU {real:10.1f} {self.unit:<6} qblock {ours:10.1f} {self.unit:<6} "
            f"ratio {ours / real:5.2f}   memory {self.real.memory / MiB:6.1f} / {self.ours.memory / MiB:6.1f} MiB"
            + (f"   processor {self.real.processor:.2f} / {self.ours.processor:.2f} s" if self.ours.processor else ""),
            flush=True,
        )


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


def fill(path: Path, size: int, *, start: int = 0, share: float = 0.875) -> None:
    """Write random data into ``share`` of the file's MiB blocks, from ``start`` on; the rest stays a hole."""
    rng = random.Random(size + start)
    block = rng.randbytes(MiB)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(max(size, path.stat().st_size))
        for index in range(start // MiB, size // MiB):
            if rng.random() < share:
                turn = index % MiB
                file.seek(index * MiB)
                file.write(block[turn:] + block[:turn])


def chain(folder: Path, size: int) -> Path:
    """A three-layer qcow2 chain, made by the real qemu-img; returns its top."""
    raw = folder / "content"
    fill(raw, size)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, folder / "base"], check=True)
    raw.unlink()
    below = "base"
    for name, pattern, start in (("middle", 2, size // 4), ("top", 3, size // 2)):
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", folder / below, "-F", "qcow2", folder / name], check=True
        )
        write = f"write -q -P {pattern} {start} {min(size // 8, 1 << 30)}"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, folder / name], check=True, stdout=subprocess.DEVNULL)
        below = name
    return folder / "top"


@functools.cache
def compiled_once() -> dict[str, str]:
    """The environment of the programs: Python keeps what it has compiled, as it does where qblock is installed."""
    folder = tempfile.mkdtemp(prefix="qblock-bench-bytecode-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return environment | {"PYTHONPYCACHEPREFIX": folder}


def run_program(words: Sequence[str | Path]) -> Run:
    """Run a program to its end and measure it."""
    started = time.perf_counter()
    pid = os.posix_spawnp(str(words[0]), [str(word) for word in words], compiled_once(),
                          file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])  # fmt: skip
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {' '.join(map(str, words))}")
    return Run(seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)


def best_of(real: Callable[[], Run], ours: Callable[[], Run], *, rounds: int) -> tuple[Run, Run]:
    """Run both in turns; the fastest of each, with the largest memory of each."""
    runs: tuple[list[Run], list[Run]] = ([], [])
    for _ in range(rounds):
        runs[0].append(real())
        runs[1].append(ours())
    best = [
        Run(min(run.seconds for run in side), max(run.memory for run in side), min(run.processor for run in side))
        for side in runs
    ]
    return best[0], best[1]
