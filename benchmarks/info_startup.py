"""How long `info` takes, interpreter included: qemu-img beside qblock-img.

    python benchmarks/info_startup.py [--rounds N]
"""

from __future__ import annotations

import argparse
import subprocess

from harness import BIN, best_of, need_qemu, run_program, workspace


def main() -> None:
    """Print the best time of both, in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    need_qemu("qemu-img")
    with workspace() as folder:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "image", "1G"], check=True)
        real, ours = best_of(
            lambda: run_program(["qemu-img", "info", folder / "image"]),
            lambda: run_program([BIN / "qblock-img", "info", folder / "image"]),
            rounds=options.rounds,
        )
    print(f"info: QEMU {real.seconds * 1000:.0f} ms, qblock {ours.seconds * 1000:.0f} ms (aim: under 150 ms)")


if __name__ == "__main__":
    main()
