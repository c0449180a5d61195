"""qemu-img convert beside qblock-img convert: qcow2 to raw, qcow2 to qcow2, and a three-layer chain to one image.

    python benchmarks/convert.py [--size MIB] [--rounds N]
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from harness import BIN, Comparison, MiB, best_of, chain, fill, need_qemu, run_program, workspace


def main() -> None:
    """Make the sources, run both programs in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="MiB of the source (default 2048)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    need_qemu("qemu-img", "qemu-io")
    with workspace() as folder:
        fill(folder / "raw", options.size * MiB)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "raw", folder / "flat"], check=True)
        (folder / "raw").unlink()
        top = chain(folder, options.size * MiB)
        for source, fmt in ((folder / "flat", "raw"), (folder / "flat", "qcow2"), (top, "qcow2")):
            compare(source, fmt, folder / "target", size=options.size, rounds=options.rounds)


def compare(source: Path, fmt: str, target: Path, *, size: int, rounds: int) -> None:
    """One line of the table."""

    def convert(program: str | Path) -> object:
        target.unlink(missing_ok=True)
        return run_program([program, "convert", "-O", fmt, source, target])

    real, ours = best_of(lambda: convert("qemu-img"), lambda: convert(BIN / "qblock-img"), rounds=rounds)
    Comparison(f"convert {source.name} to {fmt}", real, ours, size, "MiB/s").show()


if __name__ == "__main__":
    main()
