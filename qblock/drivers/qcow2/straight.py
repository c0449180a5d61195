"""Data that lie straight on through many L2 tables, as in an image that was written from its beginning to its end.

There is nothing like it in QEMU. Tables side by side in the file are read together and compared with what they would hold if the
run went on, byte for byte; they are neither decoded nor kept in the cache. Only for images that nobody writes to: there the file
is the truth about every table that is not cached.
"""

from __future__ import annotations

import functools
import sys
from array import array
from typing import TYPE_CHECKING, Final

from qblock.drivers.qcow2.layout import OFFSET_MASK
from qblock.units import KiB

if TYPE_CHECKING:
    from qblock.drivers.qcow2.clusters import ClusterMap

_AT_ONCE: Final = 128 * KiB
"""Bytes of tables that are read together."""
_WORD: Final = 8
_HALF: Final = 32
"""Bits of half a word."""


async def slices_straight_on(mapping: ClusterMap, key: int, entry: int, limit: int) -> int:
    """How many slices (at most ``limit``) from ``key`` on hold nothing but a run of data that goes on with ``entry``.

    Slices that are cached, of extended entries or of tables that do not lie side by side are left to the caller.
    """
    geometry = mapping.geometry
    step, size = geometry.cluster_size, _WORD << geometry.slice_bits
    span = step << geometry.slice_bits
    if geometry.extended or mapping.refcounts is not None or (entry & OFFSET_MASK) + limit * span > OFFSET_MASK:
        return 0
    done = 0
    while done < limit:
        count = _side_by_side(mapping, key + done, min(limit - done, max(_AT_ONCE // size, 1)))
        if not count:
            break
        found = await mapping.file.read(mapping.slice_host(key + done), count * size)
        if found != _run(entry + done * span, step, count << geometry.slice_bits):
            break
        done += count
    return done


def _side_by_side(mapping: ClusterMap, key: int, most: int) -> int:
    """How many slices from ``key`` on lie one behind the other in the file, none of them cached."""
    count, size = 0, _WORD << mapping.geometry.slice_bits
    start = mapping.slice_host(key)
    while start and count < most and key + count not in mapping.tables:
        if mapping.slice_host(key + count) != start + count * size:
            break
        count += 1
    return count


def _run(entry: int, step: int, count: int) -> bytearray:
    """``count`` entries from ``entry`` on, each ``step`` more than the one before it, as they are in a file."""
    words = bytearray()
    while count:
        upper, lower = divmod(entry, 1 << _HALF)
        alike = min(count, -(-((1 << _HALF) - lower) // step))
        part = bytearray(_lower_halves(lower, step, alike))
        for place, byte in enumerate(upper.to_bytes(_HALF // 8, "big")):
            if byte:
                part[place::_WORD] = bytes((byte,)) * alike
        words += part
        entry += alike * step
        count -= alike
    return words


@functools.lru_cache(maxsize=16)
def _lower_halves(first: int, step: int, count: int) -> bytes:
    """Words that grow from ``first`` by ``step`` and stay below 2^32; those of the next table are often the same."""
    words = array("Q", range(first, first + count * step, step))
    if sys.byteorder == "little":
        words.byteswap()
    return bytes(words)
