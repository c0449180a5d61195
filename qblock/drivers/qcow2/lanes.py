"""Whole tables at once: an L2 table as one long integer whose 64-bit lanes are its entries.

There is nothing like it in QEMU. A loop over entries costs Python a tenth of a microsecond and more for each; arithmetic on one
integer of a million bits costs it next to nothing. The lanes never carry into each other: masks leave the top bit free for what
is added. Only tables of the common form are understood, which is most of nearly every image: plain data with refcount 1, and
entries of zero.
"""

from __future__ import annotations

import functools
import sys
from array import array
from typing import Final

import attrs

from qblock.drivers.qcow2.layout import COPIED, OFFSET_MASK, U64

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
        clusters, breaks, runs, at = self.clusters, self.breaks, [], 0
        while at >= 0:
            end = breaks.find(b"\x80", at + 1)
            runs.append((clusters[at], (end if end >= 0 else len(clusters)) - at))
            at = end
        return runs


@functools.lru_cache(maxsize=64)
def _repeated(word: int, count: int) -> int:
    """A number of ``count`` lanes that are all alike."""
    return int.from_bytes(word.to_bytes(_LANE, "little") * count, "little")


def plain_entries(entries: array[int], cluster_bits: int, *, clusters: int) -> PlainEntries | None:
    """The entries of a table when all of them are those of plain data, or zero; None when some are not, or all are zero.

    Data must lie in a file of so many ``clusters``.
    """
    offsets = OFFSET_MASK >> cluster_bits << cluster_bits
    lanes = _lanes(entries)
    if lanes & _repeated(~(COPIED | offsets) & ((1 << 64) - 1), len(entries)):
        return None
    if _allocated(lanes, len(entries)) < len(entries):
        entries = array(U64, filter(None, entries))
        lanes = _lanes(entries)
        if not entries or _allocated(lanes, len(entries)) < len(entries):
            return None
    count, top = len(entries), _repeated(_TOP, len(entries))
    found = (lanes & _repeated(offsets, count)) >> cluster_bits
    if found + _repeated(_TOP - clusters, count) & top:
        return None
    following = (found << 64) + _repeated(1, count) & (1 << 64 * count) - 1
    breaks = ((found ^ following) + _repeated(_TOP - 1, count) & top).to_bytes(_LANE * count, "little")
    return PlainEntries(
        entries, _array(found, count), lanes & top == top, b"\x80" + breaks[2 * _LANE - 1 :: _LANE]
    )


def _allocated(lanes: int, count: int) -> int:
    """How many of ``count`` entries have a place in the file."""
    return ((lanes & _repeated(OFFSET_MASK, count)) + _repeated(_TOP - 1, count) & _repeated(_TOP, count)).bit_count()


def _lanes(words: array[int]) -> int:
    # Lane 0 holds the first word on a machine of either byte order.
    if sys.byteorder == "little":
        return int.from_bytes(memoryview(words).cast("B"), "little")
    swapped = words[:]
    swapped.byteswap()
    return int.from_bytes(memoryview(swapped).cast("B"), "little")


def _array(lanes: int, count: int) -> array[int]:
    words = array(U64)
    words.frombytes(lanes.to_bytes(_LANE * count, "little"))
    if sys.byteorder != "little":
        words.byteswap()
    return words
