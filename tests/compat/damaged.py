"""Damaged qcow2 images: each kind of damage as a function that patches the bytes of a sound image."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

COPIED: Final = 1 << 63
OFFSETS: Final = 0x00FFFFFFFFFFFE00
FAR: Final = 1 << 40


class Patch:
    """The bytes of an image, with names for the places in it. ``guest`` counts guest clusters."""

    def __init__(self, path: Path) -> None:
        self.raw = bytearray(path.read_bytes())
        self.bits = self.get(20, 4)
        self.size = 1 << self.bits
        self.l1, self.table = self.get(40), self.get(48)

    def get(self, at: int, size: int = 8) -> int:
        return int.from_bytes(self.raw[at : at + size], "big")

    def put(self, at: int, value: int, size: int = 8) -> None:
        self.raw[at : at + size] = value.to_bytes(size, "big")

    @property
    def l2(self) -> int:
        return self.get(self.l1) & OFFSETS

    def entry(self, guest: int) -> int:
        return self.l2 + 8 * guest

    def host(self, guest: int) -> int:
        return self.get(self.entry(guest)) & OFFSETS

    @property
    def block(self) -> int:
        return self.get(self.table)

    def count(self, offset: int) -> int:
        """Where the refcount of the cluster at ``offset`` lies."""
        return self.block + 2 * (offset >> self.bits)

    @property
    def behind(self) -> int:
        """A cluster a little behind the end of the file."""
        return (len(self.raw) // self.size + 4) * self.size

    def lengthen(self) -> int:
        """Four clusters at the end; the offset of the third."""
        end = -(-len(self.raw) // self.size) * self.size
        self.raw.extend(bytes(end + 4 * self.size - len(self.raw)))
        return end + 2 * self.size

    def change(self, at: int, change: Callable[[int], int]) -> None:
        self.put(at, change(self.get(at)))


Damage = Callable[[Patch], None]
DAMAGES: Final[dict[str, Damage]] = {
    "nothing": lambda it: None,
    "leak": lambda it: it.put(it.count(it.lengthen()), 1, 2),
    "leak-of-lost-data": lambda it: it.put(it.entry(1), 0),
    "all-tables-lost": lambda it: it.put(it.l1, 0),
    "count-too-high": lambda it: it.put(it.count(it.host(0)), 3, 2),
    "count-too-high-no-copied": lambda it: (it.put(it.count(it.host(0)), 3, 2), it.put(it.entry(0), it.host(0))),
    "count-zero-of-data": lambda it: it.put(it.count(it.host(0)), 0, 2),
    "count-zero-of-l2": lambda it: it.put(it.count(it.l2), 0, 2),
    "count-zero-of-l1": lambda it: it.put(it.count(it.l1), 0, 2),
    "count-zero-of-header": lambda it: it.put(it.count(0), 0, 2),
    "count-zero-and-leak": lambda it: (it.put(it.count(it.lengthen()), 1, 2), it.put(it.count(it.l1), 0, 2)),
    "two-guests-one-cluster": lambda it: it.put(it.entry(1), it.get(it.entry(0))),
    "two-guests-counted": lambda it: (it.put(it.entry(1), it.get(it.entry(0))), it.put(it.count(it.host(0)), 2, 2)),
    "copied-missing-in-l2": lambda it: it.put(it.entry(0), it.host(0)),
    "copied-missing-in-l1": lambda it: it.put(it.l1, it.l2),
    "l1-unaligned": lambda it: it.change(it.l1, lambda entry: entry + 512),
    "l1-beyond": lambda it: it.put(it.l1, COPIED | FAR),
    "l1-reserved": lambda it: it.change(it.l1, lambda entry: entry | 1),
    "l2-unaligned": lambda it: it.change(it.entry(0), lambda entry: entry + 512),
    "l2-beyond": lambda it: it.put(it.entry(0), COPIED | FAR),
    "l2-beyond-near": lambda it: it.put(it.entry(0), COPIED | it.behind),
    "l2-beyond-no-copied": lambda it: it.put(it.entry(0), FAR),
    "l2-reserved-high": lambda it: it.change(it.entry(0), lambda entry: entry | 1 << 57),
    "l2-reserved-low": lambda it: it.change(it.entry(0), lambda entry: entry | 2),
    "l2-zero-unaligned": lambda it: it.change(it.entry(0), lambda entry: entry + 513),
    "l2-zero-allocated": lambda it: it.change(it.entry(0), lambda entry: entry | 1),
    "l2-to-header": lambda it: it.put(it.entry(0), COPIED),
    "l2-to-l1": lambda it: it.put(it.entry(0), COPIED | it.l1),
    "l2-to-itself": lambda it: it.put(it.entry(0), COPIED | it.l2),
    "l2-to-refcounts": lambda it: it.put(it.entry(0), COPIED | it.block),
    "compressed-copied": lambda it: it.put(it.entry(0), COPIED | 1 << 62 | it.host(0)),
    "compressed-beyond": lambda it: it.put(it.entry(0), 1 << 62 | FAR),
    "block-unaligned": lambda it: it.put(it.table, it.block + 512),
    "block-reserved": lambda it: it.put(it.table, it.block + 1),
    "block-beyond": lambda it: it.put(it.table, FAR),
    "block-beyond-near": lambda it: it.put(it.table, it.behind),
    "block-missing": lambda it: it.put(it.table, 0),
    "block-twice": lambda it: it.put(it.table + 8, it.block),
    "second-block-beyond": lambda it: it.put(it.table + 8, it.behind),
    "block-is-l1": lambda it: it.put(it.table, it.l1),
    "block-zeroed": lambda it: it.raw.__setitem__(slice(it.block, it.block + it.size), bytes(it.size)),
    "block-of-ones": lambda it: it.raw.__setitem__(slice(it.block, it.block + it.size), b"\1" * it.size),
    "table-beyond": lambda it: it.put(48, FAR),
    "table-on-header": lambda it: it.put(48, 0),
    "table-on-l1": lambda it: it.put(48, it.l1),
    "table-on-l2": lambda it: it.put(48, it.l2),
    "table-on-data": lambda it: it.put(48, it.host(0)),
    "table-unaligned": lambda it: it.put(48, it.table + 512),
    "table-of-nothing": lambda it: it.put(56, 0, 4),
    "table-too-large": lambda it: it.put(56, 1 << 20, 4),
    "table-too-long": lambda it: it.put(56, 16, 4),
    "l1-table-beyond": lambda it: it.put(40, FAR),
    "l1-table-unaligned": lambda it: it.put(40, it.l1 + 512),
    "dirty": lambda it: it.put(72, 1),
    "dirty-too-low": lambda it: (it.put(72, 1), it.put(it.count(it.host(0)), 0, 2)),
    "dirty-leak": lambda it: (it.put(72, 1), it.put(it.entry(1), 0)),
    "corrupt": lambda it: it.put(72, 2),
    "corrupt-too-low": lambda it: (it.put(72, 2), it.put(it.count(it.host(0)), 0, 2)),
    "corrupt-for-good": lambda it: (it.put(72, 2), it.change(it.entry(0), lambda entry: entry + 512)),
    "unknown-feature": lambda it: it.put(72, 1 << 40),
    "cut-off": lambda it: it.raw.__delitem__(slice(-2 * it.size, None)),
    "cut-off-a-little": lambda it: it.raw.__delitem__(slice(-it.size // 2, None)),
}  # fmt: skip


def make_sound(path: Path, *, cluster_size: int = 65536, snapshot: bool = False) -> None:
    """A sound image to be damaged; with ``snapshot``, in part shared with a snapshot and with packed clusters."""
    options = f"cluster_size={cluster_size}"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(256 * cluster_size)], check=True
    )
    _write(path, cluster_size, *((guest, guest + 1) for guest in (0, 1, 2, 3, 7, 8)))
    if snapshot:
        subprocess.run(["qemu-img", "snapshot", "-c", "before", path], check=True)
        _write(path, cluster_size, (0, 20), (1, 21), (2, 22), (12, 23))
        packed = ["-c", f"write -q -c -P 9 {20 * cluster_size} {cluster_size}"]
        subprocess.run(["qemu-io", *packed, path], check=True, stdout=subprocess.DEVNULL)


def _write(path: Path, size: int, *clusters: tuple[int, int]) -> None:
    words = [word for guest, value in clusters for word in ("-c", f"write -q -P {value} {guest * size} {size}")]
    subprocess.run(["qemu-io", *words, path], check=True)
