"""How a qcow2 image maps offsets: its geometry, the forms of table entries, and runs of equal or consecutive entries.

Models image-formats.md section 1.5. Pure functions over tables held as ``array('Q')`` in native byte order. A question about
a range is answered in runs: the functions compare whole slices of a table with the slice that a run would have, doubling
the step, so that a table of 8192 consecutive clusters costs a handful of comparisons and no loop over entries.
"""

from __future__ import annotations

import enum
import functools
import sys
from array import array
from collections.abc import Callable
from typing import Final, NamedTuple

import attrs

from qblock.drivers.qcow2.header import DATA_FILE, EXTENDED_L2, MAX_L1_BYTES, Header

COPIED: Final = 1 << 63
"""In L1 and L2 entries: the refcount of what the entry points to is exactly 1, so it may be written in place."""
COMPRESSED: Final = 1 << 62
ZERO: Final = 1
OFFSET_MASK: Final = ((1 << 56) - 1) & ~511
"""Bits 9 to 55: the host offset in an L1 or L2 entry."""
L2_RESERVED: Final = ((1 << 63) - 1) & ~(OFFSET_MASK | ZERO | COMPRESSED)
"""Bits 1 to 8 and 56 to 61 of an L2 entry."""
L1_RESERVED: Final = ((1 << 63) - 1) & ~OFFSET_MASK
L1_IN_USE: Final = OFFSET_MASK | L1_RESERVED
"""An L1 entry with none of these bits has no L2 table; with reserved ones it is damaged."""
REFCOUNT_TABLE_OFFSET_MASK: Final = ((1 << 64) - 1) & ~511
REFCOUNT_TABLE_RESERVED: Final = 511
DEFAULT_SLICE_BYTES: Final = 64 * 1024

U64: Final = "Q"
_SWAP: Final = sys.byteorder == "little"


class Kind(enum.Enum):
    """What an L2 entry says of a cluster."""

    UNALLOCATED = "unallocated"
    ZERO = "zero"
    ZERO_ALLOCATED = "zero, space allocated"
    DATA = "data"
    COMPRESSED = "compressed"
    CORRUPT = "corrupt"


class Run(NamedTuple):
    """``clusters`` clusters of one kind; ``entry`` is the first one's entry, those of DATA and ZERO_ALLOCATED are consecutive."""

    kind: Kind
    clusters: int
    entry: int


@attrs.frozen
class Geometry:
    """The sizes that follow from a header. ``slice_bits``: an L2 table is cached in slices of 2^slice_bits entries.

    ``data_file``: guest clusters lie in a file of their own, each at its guest offset. ``extended``: the entries of L2 tables
    have a second word for the states of 32 subclusters (`subclusters.py`).
    """

    cluster_bits: int
    refcount_order: int
    version: int
    slice_bits: int
    data_file: bool = False
    extended: bool = False

    @classmethod
    def of(cls, header: Header, slice_bytes: int | None = None) -> Geometry:
        """Geometry of an image; ``slice_bytes`` overrides the cached part of an L2 table (at most a cluster)."""
        slice_bytes = min(slice_bytes or DEFAULT_SLICE_BYTES, header.cluster_size)
        extended = header.has(EXTENDED_L2)
        return cls(
            header.cluster_bits,
            header.refcount_order,
            header.version,
            slice_bytes.bit_length() - (5 if extended else 4),
            data_file=header.has(DATA_FILE),
            extended=extended,
        )

    @property
    def cluster_size(self) -> int:
        """Bytes per cluster."""
        return 1 << self.cluster_bits

    @property
    def entry_bits(self) -> int:
        """log2 of the bytes of an L2 entry."""
        return 4 if self.extended else 3

    @property
    def subcluster_bits(self) -> int:
        """log2 of the bytes of the smallest unit that has a state of its own: of a subcluster, or else of a cluster."""
        return self.cluster_bits - 5 if self.extended else self.cluster_bits

    @property
    def l2_bits(self) -> int:
        """log2 of the entries of an L2 table."""
        return self.cluster_bits - self.entry_bits

    @property
    def l1_shift(self) -> int:
        """A guest offset shifted right by this is an L1 index."""
        return self.cluster_bits + self.l2_bits

    @property
    def slice_shift(self) -> int:
        """A guest offset shifted right by this is the key of an L2 slice."""
        return self.cluster_bits + self.slice_bits

    @property
    def refcount_bits(self) -> int:
        """Width of a refcount in bits."""
        return 1 << self.refcount_order

    @property
    def max_refcount(self) -> int:
        """The largest value that a refcount can have."""
        return (1 << self.refcount_bits) - 1

    @property
    def block_bits(self) -> int:
        """log2 of the refcounts in one refcount block."""
        return self.cluster_bits + 3 - self.refcount_order

    @property
    def max_size(self) -> int:
        """The largest disk in bytes that an L1 table of the allowed size can map."""
        return (MAX_L1_BYTES // 8) << self.l1_shift

    def l1_entries(self, size: int) -> int:
        """L1 entries that a disk of ``size`` bytes needs."""
        return -(-size >> self.l1_shift) if size else 0

    def clusters(self, length: int) -> int:
        """Clusters that ``length`` bytes take."""
        return -(-length >> self.cluster_bits)


def decode_u64(raw: bytes | bytearray | memoryview) -> array[int]:
    """Big-endian 64-bit words as a native array."""
    words = array(U64)
    words.frombytes(raw)
    if _SWAP:
        words.byteswap()
    return words


def encode_u64(words: array[int]) -> memoryview:
    """A native array (or a slice of one, which is a copy already) as big-endian bytes; ``words`` is consumed."""
    if _SWAP:
        words.byteswap()
    return memoryview(words).cast("B")


def zeroes_u64(count: int) -> array[int]:
    """``count`` words of zero."""
    return array(U64, bytes(8 * count))


def first_words(entries: array[int], geometry: Geometry) -> array[int]:
    """Those words of an L2 table that say where clusters lie: of extended entries the first ones."""
    return entries[::2] if geometry.extended else entries


def with_first_words(entries: array[int], words: array[int], geometry: Geometry) -> array[int]:
    """The L2 table with other first words."""
    if not geometry.extended:
        return words
    changed = entries[:]
    changed[::2] = words
    return changed


# -------------------------------------------------------------------------------------------------------- single entries


def classify(entry: int, geometry: Geometry) -> Kind:
    """What one L2 entry means in an image of this geometry."""
    if entry & COMPRESSED:
        return Kind.CORRUPT if geometry.data_file else Kind.COMPRESSED
    if entry & L2_RESERVED:
        return Kind.CORRUPT
    offset = entry & OFFSET_MASK
    if offset & ((1 << geometry.cluster_bits) - 1) or (entry & ZERO and (geometry.version < 3 or geometry.extended)):
        return Kind.CORRUPT
    if entry & ZERO:
        return Kind.ZERO_ALLOCATED if offset else Kind.ZERO
    if offset or (entry & COPIED and geometry.data_file):
        return Kind.DATA
    return Kind.UNALLOCATED


def compressed_location(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Byte offset in the file, and readable length in bytes, of a compressed cluster."""
    x = 62 - (cluster_bits - 8)
    offset = entry & ((1 << x) - 1)
    sectors = (entry & (COMPRESSED - 1)) >> x
    return offset, (sectors + 1) * 512 - (offset & 511)


def compressed_clusters(entry: int, cluster_bits: int) -> range:
    """Indices of the host clusters that a compressed cluster touches, each of which counts it as a user."""
    offset, length = compressed_location(entry, cluster_bits)
    return range(offset >> cluster_bits, ((offset + length - 1) >> cluster_bits) + 1)


# ------------------------------------------------------------------------------------------------------------------ runs


def constant_run(entries: array[int], start: int, limit: int) -> int:
    """How many entries from ``start`` (at most ``limit``) equal the first one."""
    first, size = entries[start], entries.itemsize

    def others(at: int, count: int) -> int:
        return as_lanes(entries[start + at : start + at + count]) ^ first * repeated(1, count, size)

    return run_length(limit, others, size)


def ramp_run(entries: array[int], start: int, limit: int, step: int) -> int:
    """How many entries of 64 bits from ``start`` (at most ``limit``) are each ``step`` more than the one before."""
    first = entries[start]
    if limit > 1 and entries[start + 1] != first + step:
        return 1

    def others(at: int, count: int) -> int:
        ramp = (first + at * step) * repeated(1, count) + _ramp(step, count)
        return as_lanes(entries[start + at : start + at + count]) ^ ramp

    if first >= 1 << 63 and first - (1 << 63) >= 1 << 62:
        return 1
    limit = min(limit, _MOST // step)
    if entries[start + limit - 1] == first + (limit - 1) * step and not others(0, limit):
        return limit
    return run_length(limit, others)


_MOST: Final = 1 << 61
"""No run is longer than this in units of its entries, so that none leaves its 64 bits."""
_WORD: Final = 8
_FIRST_WINDOW: Final = 32


def as_lanes(words: array[int]) -> int:
    """An array as one number with a lane for each word, the first one lowest: comparing and adding it costs no loop."""
    if not _SWAP:
        words = words[:]
        words.byteswap()
    return int.from_bytes(memoryview(words).cast("B"), "little")


@functools.lru_cache(maxsize=64)
def repeated(word: int, count: int, size: int = _WORD) -> int:
    """A number of ``count`` lanes of ``size`` bytes that are all alike."""
    return int.from_bytes(word.to_bytes(size, "little") * count, "little")


@functools.lru_cache(maxsize=64)
def _ramp(step: int, count: int) -> int:
    """Lanes that begin with 0 and grow by ``step``."""
    return as_lanes(array(U64, range(0, count * step, step)))


def run_length(limit: int, others: Callable[[int, int], int], size: int = _WORD) -> int:
    """How long a run is, at most ``limit`` members, of which the first one is known.

    ``others(at, count)``: lanes of ``size`` bytes for so many members from there, those that belong to the run 0.
    """
    done, window = 1, _FIRST_WINDOW
    while done < limit:
        window = min(window, limit - done)
        if rest := others(done, window):
            return done + ((rest & -rest).bit_length() - 1) // (8 * size)
        done += window
        window *= 4
    return done


def find_run(entries: array[int], start: int, limit: int, geometry: Geometry) -> Run:
    """The run of clusters of one kind that begins at ``start``, at most ``limit`` entries."""
    entry = entries[start]
    kind = classify(entry, geometry)
    if kind is Kind.DATA or kind is Kind.ZERO_ALLOCATED:
        return Run(kind, ramp_run(entries, start, limit, 1 << geometry.cluster_bits) if limit > 1 else 1, entry)
    if kind is Kind.UNALLOCATED or kind is Kind.ZERO:
        return Run(kind, constant_run(entries, start, limit) if limit > 1 else 1, entry)
    return Run(kind, 1, entry)
