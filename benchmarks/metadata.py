"""check, map, measure and info beside the real ones, of images with four million allocated clusters.

python benchmarks/metadata.py [--rounds N] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

import multiprocessing

from harness import SMALL, Table, main, qemu
from images import allocated

CLUSTERS = 4 << 20
FEWER = 256 << 10
"""Of the image that is scattered all over: the real check reads a refcount block for each cluster."""


def compare_all(table: Table) -> None:
    """Make one image after the other, compare what looks at it."""
    for bits, unit in ((16, "64 KiB"), (12, "4 KiB"), (9, "512 B")):
        whole(table, f"4 M clusters of {unit} in order", clusters=CLUSTERS, cluster_bits=bits)
    whole(table, "4 M clusters of 64 KiB, pieces of 16", clusters=CLUSTERS, cluster_bits=16, piece=16)
    whole(table, "4 M clusters of 64 KiB, mixed nearby", clusters=CLUSTERS, cluster_bits=16, piece=1, window=8192)
    whole(table, "256 K clusters of 64 KiB, scattered", clusters=FEWER, cluster_bits=16, piece=1)
    image = table.folder / "empty"
    qemu("create", "-q", "-f", "qcow2", image, "1G")
    for words in (["info"], ["check"], ["map"], ["measure", "-O", "qcow2"]):
        table.compare_tool(f"{words[0]}, empty image", [*words, image], required=SMALL)


def whole(table: Table, what: str, *, clusters: int, cluster_bits: int, piece: int = 0, window: int = 0) -> None:
    """All commands on one image."""
    commands = (["check"], ["map", "--output=json"], ["map"], ["measure", "-O", "qcow2"])
    titles = [f"{' '.join(words[:2] if words[0] == 'map' else words[:1])}, {what}" for words in commands]
    if not any(map(table.wants, titles)):
        return
    image = table.folder / "allocated"
    # In a process of its own: the peak memory of a program counts from what its parent had.
    settings = {"clusters": clusters, "cluster_bits": cluster_bits, "piece": piece, "window": window}
    maker = multiprocessing.get_context("spawn").Process(target=allocated, args=(image,), kwargs=settings)
    maker.start()
    maker.join()
    for title, words in zip(titles, commands, strict=True):
        table.compare_tool(title, [*words, image], required=SMALL)
    image.unlink()


if __name__ == "__main__":
    main(__doc__, compare_all)
