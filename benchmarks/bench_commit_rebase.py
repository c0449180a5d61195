"""qemu-img commit and rebase beside qblock-img: overlays of a qcow2 and a raw base, full, scattered, and moved in three ways.

python benchmarks/bench_commit_rebase.py [--size MIB] [--rounds N] [--only TEXT]
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from harness import BIN, Comparison, MiB, Run, best_of, fill, need_qemu, run_program, workspace


def main() -> None:
    """Make the images, run both programs in turns on fresh copies, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of each disk (default 1024)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="run only the lines with this text")
    options = parser.parse_args()
    need_qemu("qemu-img", "qemu-io")
    with workspace() as folder:
        Gallery(folder, options.size, options.rounds, options.only).show()


class Gallery:
    """The images, as they are before each run, and the table."""

    def __init__(self, folder: Path, size: int, rounds: int, only: str) -> None:
        self.folder, self.size, self.rounds, self.only = folder, size, rounds, only
        fill(folder / "base.raw", size * MiB)
        self.qemu("convert", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2")
        self.qemu("convert", "-f", "raw", "-O", "qcow2", "base.raw", "other.qcow2")
        self.overlay(
            "full", "base.qcow2", "qcow2", [f"write -q -P 5 0 {size // 2}M", f"write -q -z {size // 2}M {size // 8}M"]
        )
        self.overlay("full-on-raw", "base.raw", "raw", [f"write -q -P 5 0 {size // 2}M"])
        rng = random.Random(1)
        spots = sorted(rng.sample(range(size * 16), size * 2))
        self.overlay("scattered", "base.qcow2", "qcow2", [f"write -q -P 6 {spot * 64}k 64k" for spot in spots])
        self.overlay("top", "full", "qcow2", ["write -q -P 7 0 1M"])
        self.overlay("thin", "base.qcow2", "qcow2", ["write -q -P 7 0 1M"])

    def qemu(self, *words: str) -> None:
        subprocess.run(["qemu-img", *words], check=True, cwd=self.folder, stdout=subprocess.DEVNULL)

    def overlay(self, name: str, below: str, fmt: str, commands: Sequence[str]) -> None:
        """An overlay with what the commands of qemu-io write."""
        self.qemu("create", "-q", "-f", "qcow2", "-b", below, "-F", fmt, name)
        script = "\n".join(commands).encode()
        subprocess.run(
            ["qemu-io", "-f", "qcow2", name], input=script, check=True, cwd=self.folder, stdout=subprocess.DEVNULL
        )

    def show(self) -> None:
        """Run everything."""
        half = self.size / 2
        self.compare("commit half a disk to qcow2", ("commit",), "full", "base.qcow2", amount=half)
        self.compare("commit half a disk to raw", ("commit",), "full-on-raw", "base.raw", amount=half)
        self.compare("commit 64 KiB here and there", ("commit",), "scattered", "base.qcow2", amount=self.size / 8)
        self.compare("commit -d, half a disk", ("commit", "-d"), "full", "base.qcow2", amount=half)
        self.compare("rebase onto nothing", ("rebase", "-b", ""), "thin", amount=self.size)
        self.compare("rebase down the chain", ("rebase", "-b", "base.qcow2", "-F", "qcow2"), "top", amount=self.size)
        self.compare(
            "rebase onto an equal image", ("rebase", "-b", "other.qcow2", "-F", "qcow2"), "thin", amount=self.size
        )

    def compare(self, title: str, words: Sequence[str], top: str, changed: str | None = None, *, amount: float) -> None:
        """One line of the table; ``changed`` is the base that the command writes to."""
        if self.only not in title:
            return

        def runner(program: str | Path) -> Callable[[], Run]:
            def run() -> Run:
                for name in (top, changed):
                    if name is not None:
                        shutil.copyfile(self.folder / name, self.folder / f"{name}.kept")
                try:
                    return run_program([program, *words, self.folder / top])
                finally:
                    for name in (top, changed):
                        if name is not None:
                            (self.folder / f"{name}.kept").replace(self.folder / name)

            return run

        real, ours = best_of(runner("qemu-img"), runner(BIN / "qblock-img"), rounds=self.rounds)
        Comparison(title, real, ours, amount, "MiB/s").show()


if __name__ == "__main__":
    main()
