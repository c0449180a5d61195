"""Dirty bitmaps: which parts of a node changed since someone last looked.

Models ``BdrvDirtyBitmap`` (semantics.md section 11). A granule is dirty as a whole; offsets and lengths are bytes, counts
are bytes too (a multiple of the granularity). Differs from QEMU in its memory: a compressed bitmap of granule numbers
(pyroaring) takes room for what is dirty, not for the size of the disk, so 200,000 random dirty clusters of a 16 TiB disk
take less than a megabyte.

Three ways to change a bitmap: `DirtyBitmap.set` is the write path's and records only while recording is on;
`DirtyBitmap.mark` and `DirtyBitmap.reset` are the owner's and always act.
"""

from __future__ import annotations

import hashlib
import re
import struct
from array import array
from collections.abc import Iterator
from typing import Any, Final

import attrs

from qblock.errors import CommandError
from qblock.ranges import ByteRange

WORD_BITS: Final = 64
"""Serialised bitmaps are padded to whole little-endian words of this many bits."""

_ROARING32_LIMIT: Final = 1 << 32
_CONTAINER: Final = 1 << 16
"""Granules in one container of a roaring bitmap, which stores them as bits when there are more than `_ARRAY_LIMIT`."""
_ARRAY_LIMIT: Final = 4096
_NO_RUNS: Final = 12346
"""The portable format's mark of a bitmap without containers of runs; with one container 16 bytes precede its bits."""
_CONTAINER_HEAD: Final = 16
_OFFSETS_FROM: Final = 4
"""With so many containers their offsets stand in the format even if some are runs."""
_NOT_ZERO: Final = re.compile(rb"[^\0]")
_BITS_OF: Final = [[bit for bit in range(8) if byte >> bit & 1] for byte in range(256)]
_SERIAL_STEP: Final = 1 << 22  # granules per piece when serialising: 512 KiB of bytes at a time


def _new_bits(granules: int) -> Any:
    """An empty set of granule numbers below ``granules``."""
    import pyroaring  # noqa: PLC0415  (an extension module that read-only tools never need)

    return pyroaring.BitMap() if granules <= _ROARING32_LIMIT else pyroaring.BitMap64()


@attrs.frozen(eq=False)
class DirtyContent:
    """What was dirty in a bitmap at one time: see `DirtyBitmap.content`."""

    bits: Any
    dirty: int


@attrs.define(eq=False, slots=True)
class DirtyBitmap:
    """Dirty granules of ``size`` bytes in units of ``granularity`` bytes (a power of two of at least 512).

    ``enabled`` is whether the write path is recorded here, ``busy`` whether a job or an export has claimed the bitmap,
    ``persistent``, ``inconsistent`` and ``readonly`` are as QMP's ``BlockDirtyInfo`` shows them. An internal bitmap has no
    ``name``.
    """

    size: int
    granularity: int
    name: str | None = None
    enabled: bool = True
    busy: bool = False
    persistent: bool = False
    inconsistent: bool = False
    readonly: bool = False
    successor: DirtyBitmap | None = attrs.field(default=None, init=False)
    _shift: int = attrs.field(init=False, repr=False)
    _bits: Any = attrs.field(init=False, repr=False)
    _dirty: int = attrs.field(init=False, default=0, repr=False)

    def __attrs_post_init__(self) -> None:
        assert self.granularity >= 512 and self.granularity & (self.granularity - 1) == 0, self.granularity
        self._shift = self.granularity.bit_length() - 1
        self._bits = _new_bits(self.granules)

    @property
    def granules(self) -> int:
        """How many granules the bitmap covers, the last one possibly partly."""
        return -(-self.size >> self._shift)

    @property
    def count(self) -> int:
        """Dirty bytes, counting whole granules."""
        return self._dirty << self._shift

    @property
    def recording(self) -> bool:
        """Whether writes are recorded, here or in the successor."""
        return self.enabled or (self.successor is not None and self.successor.enabled)

    # ------------------------------------------------------------------------------------------------------- changing

    def set(self, offset: int, length: int) -> None:
        """Record a write of ``length`` bytes at ``offset``: the write path calls this; nothing happens while disabled."""
        if self.enabled:
            first = offset >> self._shift
            if first == (offset + length - 1) >> self._shift and offset < self.size:
                if first not in self._bits:  # the common case: one granule
                    self._bits.add(first)
                    self._dirty += 1
            else:
                self.mark(offset, length)

    def mark(self, offset: int, length: int) -> None:
        """Make every granule dirty that the range touches, whether or not recording is on."""
        end = min(offset + length, self.size)
        if end <= offset:
            return
        first, stop = offset >> self._shift, ((end - 1) >> self._shift) + 1
        self._dirty += stop - first - self._bits.range_cardinality(first, stop)
        self._bits.add_range(first, stop)

    def reset(self, offset: int, length: int) -> None:
        """Make every granule clean that lies wholly in the range (the last, partial one counts as ending at the size)."""
        first = -(-offset >> self._shift)
        end = offset + length
        stop = self.granules if end >= self.size else end >> self._shift
        if stop > first:
            self._dirty -= self._bits.range_cardinality(first, stop)
            self._bits.remove_range(first, stop)

    def clear(self) -> None:
        """Make everything clean."""
        self._bits.clear()
        self._dirty = 0

    def content(self) -> DirtyContent:
        """A copy of what is dirty now, for `restore`."""
        return DirtyContent(self._bits.copy(), self._dirty)

    def restore(self, content: DirtyContent) -> None:
        """Make just that dirty which was when `content` made the copy; the size must be the same. Uses the copy up."""
        self._bits, self._dirty = content.bits, content.dirty

    def enable(self) -> None:
        """Record writes from now on."""
        self.enabled = True

    def disable(self) -> None:
        """Stop recording; what is dirty stays dirty."""
        self.enabled = False

    def truncate(self, size: int) -> None:
        """Follow a change of the node's size: an added area is clean, a removed one is cut off."""
        old_granules, self.size = self.granules, size
        granules = self.granules
        if granules < old_granules:
            self._bits.remove_range(granules, old_granules)
            self._dirty = len(self._bits)
        elif granules > _ROARING32_LIMIT >= old_granules:
            bits = _new_bits(granules)
            bits.update(self._bits)
            self._bits = bits

    def merge(self, other: DirtyBitmap) -> None:
        """Add what is dirty in ``other``; granularities may differ, sizes must be equal (`CommandError`). All or nothing."""
        if other.size != self.size:
            raise CommandError(
                f"Bitmaps of {self.size} and {other.size} bytes cannot be merged: they must cover the same size"
            )
        if other._shift == self._shift:
            self._bits |= other._bits
        elif other._shift < self._shift:
            by = self._shift - other._shift
            self._bits.update(granule >> by for granule in other._bits)
        else:
            for run in other.iterate():
                self.mark(run.offset, run.length)
        self._dirty = len(self._bits)

    # -------------------------------------------------------------------------------------------------------- looking

    def get(self, offset: int) -> bool:
        """Whether the granule that holds byte ``offset`` is dirty."""
        return (offset >> self._shift) in self._bits

    def next_dirty(self, offset: int, end: int | None = None) -> int | None:
        """The first dirty byte at or behind ``offset`` and before ``end`` (default: the size), or None."""
        limit = self.size if end is None else min(end, self.size)
        if offset >= limit or not self._dirty:
            return None
        try:
            granule: int = self._bits.next_set_bit(offset >> self._shift)
        except ValueError:
            return None
        found = max(offset, granule << self._shift)
        return found if found < limit else None

    def next_dirty_range(self, offset: int, *, max_length: int) -> ByteRange | None:
        """The first dirty run at or behind ``offset``, cut to ``max_length`` bytes and to the size, or None."""
        start = self.next_dirty(offset)
        if start is None:
            return None
        granule = start >> self._shift
        limit = (min(start + max_length, self.size) - 1 >> self._shift) + 1
        end = min(self._run_end(granule, limit) << self._shift, start + max_length, self.size)
        return ByteRange(start, end - start)

    def _run_end(self, granule: int, limit: int) -> int:
        """The first clean granule behind the dirty one ``granule``, at most ``limit``: galloping, then halving."""
        covers = self._bits.contains_range
        if covers(granule, limit):
            return limit
        step = 1
        while covers(granule, granule + step):
            granule += step
            step *= 2
        # The first clean one lies in [granule, granule + step).
        high = granule + step
        while granule < high:
            middle = (granule + high) // 2
            if covers(granule, middle + 1):
                granule = middle + 1
            else:
                high = middle
        return granule

    def iterate(self, *, max_length: int | None = None) -> Iterator[ByteRange]:
        """Dirty runs in ascending order. Changes made meanwhile are seen when they lie ahead, and never upset the walk."""
        cursor = 0
        while (run := self.next_dirty_range(cursor, max_length=max_length or self.size)) is not None:
            yield run
            cursor = run.end

    # ------------------------------------------------------------------------------------------------------ successors

    def create_successor(self) -> DirtyBitmap:
        """Freeze this bitmap for a user: it becomes busy, and a nameless successor is to record writes in its place.

        The node must know the successor, too; see `bitmaps.freeze`.
        """
        if self.busy:
            raise CommandError(f"Bitmap '{self.name}' is in use by another operation; wait until that has ended")
        assert self.successor is None
        self.successor = DirtyBitmap(self.size, self.granularity, enabled=self.enabled)
        self.enabled = False
        self.busy = True
        return self.successor

    def abdicate(self) -> None:
        """The user consumed this bitmap's content: what the successor recorded becomes the content."""
        heir = self._take_successor()
        self._bits, self._dirty = heir._bits, heir._dirty

    def reclaim(self) -> None:
        """The user gave up: the content is what it was and what the successor recorded."""
        self.merge(self._take_successor())

    def _take_successor(self) -> DirtyBitmap:
        heir = self.successor
        assert heir is not None, "there is no successor"
        self.enabled, self.busy, self.successor = heir.enabled, False, None
        return heir

    # ---------------------------------------------------------------------------------------------------- serialising

    def to_bytes(self, first: int = 0, granules: int | None = None) -> bytes:
        """Granules ``first`` to ``first + granules`` as bits: granule i of the piece is bit i % 8 of byte i // 8.

        Zero bits pad the piece to a multiple of 64; the whole bitmap by default. ``first`` is a granule number.
        """
        stop = self.granules if granules is None else min(self.granules, first + granules)
        data = bytearray(-(-max(stop - first, 0) // WORD_BITS) * (WORD_BITS // 8))
        if not self._dirty:
            return bytes(data)
        if first % 8 or self.granules > _ROARING32_LIMIT:
            for run in self._runs(first, stop):
                _fill_bits(data, run.start - first, run.stop - first)
        elif stop > first:
            part = self._bits & type(self._bits)(range(first, stop))
            for base, members in _containers(part.serialize()):
                _place(data, base - first, members)
        return bytes(data)

    def load_bytes(self, first: int, data: bytes | bytearray) -> None:
        """Make dirty what `to_bytes` would have given as ``data`` from granule ``first`` (a multiple of 8) on."""
        positions = _positions if first % _CONTAINER or self.granules > _ROARING32_LIMIT else _container
        for at in range(0, len(data), _CONTAINER // 8):
            piece = bytes(data[at : at + _CONTAINER // 8])
            base = first + at * 8
            if base >= self.granules:
                break
            if (count := int.from_bytes(piece, "little").bit_count()) == _CONTAINER:
                self._bits.add_range(base, base + count)
            elif count > _ARRAY_LIMIT:
                self._bits |= positions(piece, base, count)
            elif count:
                self._bits |= _positions(piece, base, count)
        self._bits.remove_range(self.granules, max(self.granules, first + len(data) * 8))
        self._dirty = len(self._bits)

    def sha256(self) -> str:
        """SHA-256 in hexadecimal over `to_bytes` of everything, as ``x-debug-block-dirty-bitmap-sha256`` shows it: over one word
        of zeroes for an empty disk.
        """
        digest = hashlib.sha256(b"" if self.granules else bytes(WORD_BITS // 8))
        for first in range(0, self.granules, _SERIAL_STEP):
            digest.update(self.to_bytes(first, _SERIAL_STEP))
        return digest.hexdigest()

    def _runs(self, first: int, stop: int) -> Iterator[range]:
        while first < stop:
            try:
                first = self._bits.next_set_bit(first)
            except ValueError:
                return
            if first >= stop:
                return
            end = self._run_end(first, stop)
            yield range(first, end)
            first = end


def _positions(piece: bytes, base: int, count: int) -> Any:
    """The set bits of ``piece`` as granule numbers, the first bit being ``base``; ``count`` of them are set."""
    bits = _new_bits(base + len(piece) * 8)
    bits.update(base + at.start() * 8 + bit for at in _NOT_ZERO.finditer(piece) for bit in _BITS_OF[piece[at.start()]])
    assert len(bits) == count
    return bits


def _container(piece: bytes, base: int, count: int) -> Any:
    """As `_positions`, for many bits: in the portable format of roaring bitmaps a container of many bits is these bytes."""
    import pyroaring  # noqa: PLC0415  (see `_new_bits`)

    head = struct.pack("<IIHHI", _NO_RUNS, 1, base // _CONTAINER, count - 1, _CONTAINER_HEAD)
    return pyroaring.BitMap.deserialize(head + piece.ljust(_CONTAINER // 8, b"\0"))


def _containers(raw: bytes) -> Iterator[tuple[int, bytes | array[int] | list[range]]]:
    """The containers of a roaring bitmap in the portable format: first granule, and its bits, its members or runs of them."""
    cookie, count = struct.unpack_from("<II", raw)
    runs_at, at = 0, 8
    if cookie != _NO_RUNS:
        count, runs_at = (cookie >> 16) + 1, 4
        at = 4 + (count + 7) // 8
    heads = struct.unpack_from(f"<{2 * count}H", raw, at)
    at += 4 * count
    if not runs_at or count >= _OFFSETS_FROM:
        at += 4 * count
    for index in range(count):
        base, members = heads[2 * index] * _CONTAINER, heads[2 * index + 1] + 1
        if runs_at and raw[runs_at + index // 8] >> (index % 8) & 1:
            length = 2 + 4 * struct.unpack_from("<H", raw, at)[0]
            ends = struct.unpack_from(f"<{(length - 2) // 2}H", raw, at + 2)
            yield base, [range(start, start + more + 1) for start, more in zip(ends[::2], ends[1::2], strict=True)]
        elif members > _ARRAY_LIMIT:
            length = _CONTAINER // 8
            yield base, raw[at : at + length]
        else:
            length = 2 * members
            yield base, array("H", struct.unpack_from(f"<{members}H", raw, at))
        at += length


def _place(data: bytearray, at: int, members: bytes | array[int] | list[range]) -> None:
    """Set the bits of one container in ``data``; its first granule is bit ``at``, a multiple of 8 that may be negative."""
    if isinstance(members, bytes):
        start = at // 8
        piece = members[max(0, -start) : len(data) - start]
        data[max(0, start) : max(0, start) + len(piece)] = piece
    elif isinstance(members, list):
        for run in members:
            _fill_bits(data, at + run.start, at + run.stop)
    else:
        for member in members:
            data[(at + member) >> 3] |= 1 << (member & 7)


def _fill_bits(data: bytearray, start: int, stop: int) -> None:
    """Set bits ``start`` to ``stop`` (exclusive) of ``data``, least significant bit of each byte first."""
    first, last = start >> 3, (stop - 1) >> 3
    head = 0xFF << (start & 7) & 0xFF
    tail = 0xFF >> (7 - ((stop - 1) & 7))
    if first == last:
        data[first] |= head & tail
        return
    data[first] |= head
    data[last] |= tail
    data[first + 1 : last] = b"\xff" * (last - first - 1)
