"""qemu-img bench beside qblock-img bench: requests of 4 KiB, 64 at a time, to raw and qcow2 images in the page cache.

    python benchmarks/bench.py [--count N] [--rounds N]
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
from pathlib import Path

from harness import BIN, Comparison, MiB, Run, best_of, compiled_once, fill, need_qemu, workspace


def main() -> None:
    """Make the images, run both programs in turns, print the table: what bench itself says of the time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=75000, help="requests (default 75000)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    need_qemu("qemu-img")
    with workspace() as folder:
        fill(folder / "raw", 256 * MiB, share=1)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "raw", folder / "qcow2"], check=True)
        for fmt in ("raw", "qcow2"):
            for flags, what in (([], "read"), (["-w"], "write")):
                words: list[str | Path] = [*flags, "-f", fmt, "-c", str(options.count), folder / fmt]
                real, ours = best_of(
                    functools.partial(bench, "qemu-img", words),
                    functools.partial(bench, BIN / "qblock-img", words),
                    rounds=options.rounds,
                )
                Comparison(f"bench {what} 4 KiB, depth 64, {fmt}", real, ours, options.count / 1000, "k/s").show()


def bench(program: str | Path, words: list[str | Path]) -> Run:
    """One run, timed by itself."""
    done = subprocess.run([program, "bench", *words], check=True, capture_output=True, text=True, env=compiled_once())
    found = re.search(r"completed in ([0-9.]+) seconds", done.stdout)
    assert found is not None
    return Run(float(found[1]), 0)


if __name__ == "__main__":
    main()
