"""The images that the benchmarks work on."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from array import array
from pathlib import Path
from typing import BinaryIO

from harness import MiB, qemu

COPIED = 1 << 63


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


def fill_with_text(path: Path, size: int) -> None:
    """``size`` bytes of words and noise, which pack to about a half."""
    rng = random.Random(size)
    words = [b"lorem ipsum dolor ", b"sit amet consectetur ", b""]
    text = b"".join(rng.choice(words) or rng.randbytes(20) for _ in range(2 * MiB // 16))
    with path.open("wb") as file:
        for _ in range(size // MiB):
            start = rng.randrange(len(text) - MiB)
            file.write(text[start : start + MiB])


def chain(folder: Path, size: int) -> Path:
    """A three-layer qcow2 chain, made by the real qemu-img; returns its top."""
    raw = folder / "content"
    fill(raw, size)
    qemu("convert", "-f", "raw", "-O", "qcow2", raw, folder / "base")
    raw.unlink()
    below = "base"
    for name, pattern, start in (("middle", 2, size // 4), ("top", 3, size // 2)):
        qemu("create", "-q", "-f", "qcow2", "-b", folder / below, "-F", "qcow2", folder / name)
        write = f"write -q -P {pattern} {start} {min(size // 8, 1 << 30)}"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", write, folder / name], check=True, stdout=subprocess.DEVNULL)
        below = name
    return folder / "top"


def allocated(path: Path, *, clusters: int, cluster_bits: int, piece: int = 0, window: int = 0) -> None:
    """A qcow2 image with all of its clusters allocated; the data are holes of the file.

    They lie in order, or, with ``piece``, in pieces of so many clusters in random order; with ``window`` the pieces are mixed
    only within each so many clusters, as those of a guest that fills its disk with several files at a time.
    """
    size = 1 << cluster_bits
    tables = -(-clusters * 8 // size)
    l1_clusters = -(-tables * 8 // size)
    blocks, table_clusters = 0, 0
    while True:
        # The refcounts count their own blocks, too.
        total = 1 + table_clusters + blocks + l1_clusters + tables + clusters
        needed = -(-total * 2 // size), -(-blocks * 8 // size)
        if needed == (blocks, table_clusters):
            break
        blocks, table_clusters = needed
    block, l1 = 1 + table_clusters, 1 + table_clusters + blocks
    first_table = l1 + l1_clusters
    header = struct.pack(
        ">IIQIIQIIQQIIQQQQII", 0x514649FB, 3, 0, 0, cluster_bits, clusters << cluster_bits, 0, tables, l1 << cluster_bits,
        1 << cluster_bits, table_clusters, 0, 0, 0, 0, 0, 4, 104,
    )  # fmt: skip
    places = array("Q", [at << cluster_bits | COPIED for at in _order(first_table + tables, clusters, piece, window)])
    with path.open("wb") as file:
        file.truncate(total << cluster_bits)
        file.write(header)
        _write(file, 1 << cluster_bits, array("Q", [at << cluster_bits for at in range(block, l1)]))
        _write(file, block << cluster_bits, array("H", [1]) * total)
        tables_at = array("Q", [at << cluster_bits | COPIED for at in range(first_table, first_table + tables)])
        _write(file, l1 << cluster_bits, tables_at)
        _write(file, first_table << cluster_bits, places)


def _order(first: int, count: int, piece: int, window: int) -> list[int]:
    rng = random.Random(count)
    order = list(range(first, first + count))
    if not piece:
        return order
    mixed: list[int] = []
    for start in range(0, count, window or count):
        part = order[start : start + (window or count)]
        pieces = [part[at : at + piece] for at in range(0, len(part), piece)]
        rng.shuffle(pieces)
        for one in pieces:
            mixed.extend(one)
    return mixed


def _write(file: BinaryIO, offset: int, words: array[int]) -> None:
    if sys.byteorder == "little":
        words.byteswap()
    file.seek(offset)
    file.write(words.tobytes())
