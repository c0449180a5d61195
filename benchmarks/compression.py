"""qemu-img convert -c beside qblock-img convert -c, with zlib and zstd, of content that packs to about a half.

    python benchmarks/compression.py [--size MIB] [--rounds N]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from harness import BIN, Comparison, MiB, best_of, need_qemu, run_program, workspace


def main() -> None:
    """Make the source, run both programs in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="MiB of the source (default 512)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    need_qemu("qemu-img")
    with workspace() as folder:
        fill_with_text(folder / "raw", options.size)
        for kind in ("zlib", "zstd"):
            compare(folder / "raw", kind, folder / "target", size=options.size, rounds=options.rounds)


def fill_with_text(path: Path, size: int) -> None:
    """``size`` MiB of words and noise."""
    rng = random.Random(size)
    words = [b"lorem ipsum dolor ", b"sit amet consectetur ", b""]
    text = b"".join(rng.choice(words) or rng.randbytes(20) for _ in range(2 * MiB // 16))
    with path.open("wb") as file:
        for _ in range(size):
            start = rng.randrange(len(text) - MiB)
            file.write(text[start : start + MiB])


def compare(source: Path, kind: str, target: Path, *, size: int, rounds: int) -> None:
    """One line of the table."""

    def convert(program: str | Path) -> object:
        target.unlink(missing_ok=True)
        words = [program, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}", source, target]
        return run_program(words)

    real, ours = best_of(lambda: convert("qemu-img"), lambda: convert(BIN / "qblock-img"), rounds=rounds)
    Comparison(f"convert -c to qcow2, {kind}", real, ours, size, "MiB/s").show()


if __name__ == "__main__":
    main()
