"""Whole tables at once: an L2 table as one long integer whose 64-bit lanes are its entries.

There is nothing like it in QEMU. A loop over entries costs Python a tenth of a microsecond and more for each; arithmetic on one
integer of a million bits costs it next to nothing. The lanes never carry into each other: masks leave the top bit free for what
is added. Only tables of the common form are understood, which is most of nearly every image: plain data with refcount 1, and
entries of zero.
"""

from __future__ import annotations

import sys
from array import array
from itertools import accumulate
from typing import Final

import attrs

from qblock.drivers.qcow2.layout import COPIED, OFFSET_MASK, U64, as_lanes, repeated, run_length

_TOP: Final = 1 << 63
_LANE: Final = 8


@attrs.frozen
class PlainEntries:
    """Entries of plain data, those of zero left out.

    ``clusters`` are their host clusters in order, ``copied`` says whether all of them have COPIED set. ``breaks`` has a byte for
    each: 0x80 where the cluster does not follow the one before it in the file (and for the first one), otherwise 0.
    """

    entries: array[int]
    clusters: array[int]
    copied: bool
    breaks: bytes

    def runs(self) -> list[tuple[int, int]]:
        """The host clusters as (first, count), each run as long as it can be."""
        lengths = _lengths(self.breaks)
        return [(self.clusters[at], length) for at, length in zip(accumulate(lengths, initial=0), lengths, strict=False)]


def plain_pieces(entries: array[int], start: int, limit: int, cluster_bits: int) -> list[tuple[int, int]]:
    """Plain data in a row from ``start`` on, at most ``limit`` entries: (file offset, clusters) of each piece that lies together.

    A piece is as long as it can be, and may lie anywhere.
    """

    def others(at: int, count: int) -> int:
        lanes, top = as_lanes(entries[start + at : start + at + count]), repeated(_TOP, count)
        places = (lanes & repeated(OFFSET_MASK, count)) + repeated(_TOP - 1, count) & top
        return lanes & repeated(_odd(cluster_bits), count) | places ^ top

    if not limit or others(0, 1):
        return []
    count = run_length(limit, others)
    row = entries[start : start + count]
    lengths = _lengths(_breaks(as_lanes(row) & repeated(OFFSET_MASK, count), 1 << cluster_bits, count))
    return [(row[at] & OFFSET_MASK, length) for at, length in zip(accumulate(lengths, initial=0), lengths, strict=False)]


def plain_entries(entries: array[int], cluster_bits: int, *, clusters: int) -> PlainEntries | None:
    """The entries of a table when all of them are those of plain data, or zero; None when some are not, or all are zero.

    Data must lie in a file of so many ``clusters``.
    """
    lanes = as_lanes(entries)
    if lanes & repeated(_odd(cluster_bits), len(entries)):
        return None
    if not _all_have(OFFSET_MASK, lanes, len(entries)):
        entries = array(U64, filter(None, entries))
        lanes = as_lanes(entries)
        if not entries or not _all_have(OFFSET_MASK, lanes, len(entries)):
            return None
    count, top = len(entries), repeated(_TOP, len(entries))
    found = (lanes & repeated(OFFSET_MASK, count)) >> cluster_bits
    if found + repeated(_TOP - clusters, count) & top:
        return None
    return PlainEntries(entries, _array(found, count), lanes & top == top, _breaks(found, 1, count))


def _odd(cluster_bits: int) -> int:
    """The bits that no entry of plain data has."""
    return ~(COPIED | OFFSET_MASK >> cluster_bits << cluster_bits) & (1 << 64) - 1


def _all_have(mask: int, lanes: int, count: int) -> bool:
    """Whether each of ``count`` lanes has some of the bits of ``mask``, which leaves the top bit free."""
    top = repeated(_TOP, count)
    return (lanes & repeated(mask, count)) + repeated(_TOP - 1, count) & top == top


def _breaks(lanes: int, step: int, count: int) -> bytes:
    """A byte for each of ``count`` lanes: 0 where it is ``step`` more than the one before it, otherwise 0x80."""
    following = (lanes << 64) + repeated(step, count) & (1 << 64 * count) - 1
    breaks = (lanes ^ following) + repeated(_TOP - 1, count) & repeated(_TOP, count)
    return b"\x80" + breaks.to_bytes(_LANE * count, "little")[2 * _LANE - 1 :: _LANE]


def _lengths(breaks: bytes) -> list[int]:
    """The lengths of the runs that begin where there are breaks."""
    return [len(rest) + 1 for rest in breaks.split(b"\x80")[1:]]


def _array(lanes: int, count: int) -> array[int]:
    words = array(U64)
    words.frombytes(lanes.to_bytes(_LANE * count, "little"))
    if sys.byteorder != "little":
        words.byteswap()
    return words
