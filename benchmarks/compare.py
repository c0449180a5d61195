"""qemu-img compare beside qblock-img compare: equal images in two formats, and with holes in different places.

python benchmarks/compare.py [--size MIB] [--rounds N] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

from harness import BULK, MiB, Table, main, qemu
from images import fill


def compare_all(table: Table) -> None:
    """Make the images, compare."""
    folder = table.folder / "compare"
    folder.mkdir()
    raw, flat, small = folder / "raw", folder / "flat", folder / "small"
    fill(raw, table.size * MiB)
    qemu("convert", "-f", "raw", "-O", "qcow2", raw, flat)
    qemu("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, small)
    table.compare_tool("compare raw with raw", ["compare", "-f", "raw", "-F", "raw", raw, raw], required=BULK)
    table.compare_tool("compare raw with qcow2", ["compare", "-f", "raw", "-F", "qcow2", raw, flat], required=BULK)
    table.compare_tool("compare qcow2 with qcow2 of 4 KiB clusters", ["compare", flat, small], required=BULK)
    raw.unlink()


if __name__ == "__main__":
    main(__doc__, compare_all)
