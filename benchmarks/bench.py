"""qemu-img bench beside qblock-img bench: requests of 4 KiB, 64 at a time, to raw and qcow2 images, cached and past the cache,
and by io_uring.

    python benchmarks/bench.py [--rounds N] [--only TEXT] [--json FILE]

The time is the one that bench prints.
"""

from __future__ import annotations

from harness import SMALL, MiB, Table, main, qemu
from images import fill

COUNTS = {"writeback": 75000, "none": 20000}


def compare_all(table: Table) -> None:
    """Make the images, compare."""
    folder = table.folder / "bench"
    folder.mkdir()
    fill(folder / "raw", 512 * MiB, share=1)
    qemu("convert", "-f", "raw", "-O", "qcow2", folder / "raw", folder / "qcow2")
    for cache, count in COUNTS.items():
        for fmt in ("raw", "qcow2"):
            for flags, what in (([], "reads"), (["-w"], "writes")):
                words = ["bench", *flags, "-t", cache, "-d", "64", "-s", "4096", "-c", str(count), "-f", fmt, folder / fmt]
                title = f"bench 4 KiB {what}, depth 64, {fmt}, -t {cache}"
                table.compare_tool(title, words, required=SMALL, timed_by_itself=True)
        for flags, what in (([], "reads"), (["-w"], "writes")):
            words = ["bench", *flags, "-i", "io_uring", "-t", cache, "-c", str(count), "-f", "raw", folder / "raw"]
            title = f"bench 4 KiB {what}, io_uring, raw, -t {cache}"
            table.compare_tool(title, words, required=SMALL, timed_by_itself=True)
    # Each request meets another cluster.
    stride = ["bench", "-S", str(4096 * 4099), "-d", "64", "-s", "4096", "-c", "75000", "-t", "writeback", "-f", "qcow2"]
    for flags, what in (([], "reads"), (["-w"], "writes")):
        words = [*stride, *flags, folder / "qcow2"]
        table.compare_tool(f"bench 4 KiB {what}, scattered, qcow2", words, required=SMALL, timed_by_itself=True)


if __name__ == "__main__":
    main(__doc__, compare_all)
