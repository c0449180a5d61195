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


def plain_pieces(
    entries: array[int], start: int, limit: int, cluster_bits: int, *, gaps: bool = False
) -> list[tuple[int, int, int]]:
    """Plain data from ``start`` on, at most ``limit`` entries: (first, clusters, file offset) of each piece that lies together.

    ``first`` counts from ``start``. Pieces are as long as they can be, and may lie anywhere. They end before what is no plain
    data; with ``gaps`` there may be entries between them that have no place.
    """

    def others(at: int, count: int) -> int:
        lanes = as_lanes(entries[start + at : start + at + count])
        odd = lanes & repeated(_odd(cluster_bits), count)
        return odd if gaps else odd | _without(OFFSET_MASK, lanes, count)

    if not limit or others(0, 1):
        return []
    count = run_length(limit, others)
    row = entries[start : start + count]
    places = as_lanes(row) & repeated(OFFSET_MASK, count)
    marks = _breaks(places, 1 << cluster_bits, count)
    if gaps:
        # What is behind an entry without a place begins anew, unless it has none either.
        empty = _without(OFFSET_MASK, places, count)
        before = empty << 64 & repeated(_TOP, count)
        marks = (marks | before) ^ (empty & before)
    lengths = _lengths(_top_bytes(marks, count))
    pieces = zip(accumulate(lengths, initial=0), lengths, strict=False)
    return [(first, length, place) for first, length in pieces if (place := row[first] & OFFSET_MASK)]


def plain_entries(entries: array[int], cluster_bits: int, *, clusters: int) -> PlainEntries | None:
    """The entries of a table when all of them are those of plain data, or zero; None when some are not, or all are zero.

    Data must lie in a file of so many ``clusters``.
    """
    lanes = as_lanes(entries)
    if lanes & repeated(_odd(cluster_bits), len(entries)):
        return None
    if _without(OFFSET_MASK, lanes, len(entries)):
        entries = array(U64, filter(None, entries))
        lanes = as_lanes(entries)
        if not entries or _without(OFFSET_MASK, lanes, len(entries)):
            return None
    count, top = len(entries), repeated(_TOP, len(entries))
    found = (lanes & repeated(OFFSET_MASK, count)) >> cluster_bits
    if found + repeated(_TOP - clusters, count) & top:
        return None
    return PlainEntries(entries, _array(found, count), lanes & top == top, _top_bytes(_breaks(found, 1, count), count))


def _odd(cluster_bits: int) -> int:
    """The bits that no entry of plain data has."""
    return ~(COPIED | OFFSET_MASK >> cluster_bits << cluster_bits) & (1 << 64) - 1


def _without(mask: int, lanes: int, count: int) -> int:
    """The top bits of those of ``count`` lanes that have none of the bits of ``mask``, which leaves the top bit free."""
    top = repeated(_TOP, count)
    return (lanes & repeated(mask, count)) + repeated(_TOP - 1, count) & top ^ top


def _breaks(lanes: int, step: int, count: int) -> int:
    """The top bits of those of ``count`` lanes that are not ``step`` more than the one before, and of the first one."""
    following = (lanes << 64) + repeated(step, count) & (1 << 64 * count) - 1
    return (lanes ^ following) + repeated(_TOP - 1, count) & repeated(_TOP, count) | _TOP


def _top_bytes(lanes: int, count: int) -> bytes:
    """The highest byte of each lane."""
    return lanes.to_bytes(_LANE * count, "little")[_LANE - 1 :: _LANE]


def _lengths(breaks: bytes) -> list[int]:
    """The lengths of the runs that begin where there are breaks."""
    return [len(rest) + 1 for rest in breaks.split(b"\x80")[1:]]


def _array(lanes: int, count: int) -> array[int]:
    words = array(U64)
    words.frombytes(lanes.to_bytes(_LANE * count, "little"))
    if sys.byteorder != "little":
        words.byteswap()
    return words
