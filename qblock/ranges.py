"""Half-open byte ranges, and sets of them that stay sorted and merged.

Serves what QEMU does with pairs of numbers and hand-written lists: areas in flight, areas already copied, free space.
Offsets and lengths are bytes. A `RangeSet` takes O(log n) for each range touched and keeps no two ranges that meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs
from sortedcontainers import SortedDict


@attrs.frozen(slots=True, order=True)
class ByteRange:
    """``length`` bytes from ``offset`` on; both are at least 0."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte behind the range."""
        return self.offset + self.length

    def overlaps(self, other: ByteRange) -> bool:
        """True when at least one byte is in both (an empty range overlaps nothing)."""
        return max(self.offset, other.offset) < min(self.end, other.end)

    def intersect(self, other: ByteRange) -> ByteRange | None:
        """The bytes in both, or None when there are none."""
        start, end = max(self.offset, other.offset), min(self.end, other.end)
        return ByteRange(start, end - start) if start < end else None

    def __str__(self) -> str:
        return f"[{self.offset:#x}, {self.end:#x})"


@attrs.define(eq=False, slots=True)
class RangeSet:
    """A set of bytes, kept as the fewest ranges; iteration yields them in ascending order.

    It must not be changed while it is being iterated.
    """

    _ends: SortedDict[int, int] = attrs.field(init=False, factory=SortedDict)
    _total: int = attrs.field(init=False, default=0)

    @classmethod
    def of(cls, ranges: Iterable[ByteRange]) -> RangeSet:
        """The union of ``ranges``."""
        result = cls()
        for item in ranges:
            result.add(item.offset, item.length)
        return result

    @property
    def total(self) -> int:
        """How many bytes are in the set."""
        return self._total

    def add(self, offset: int, length: int) -> None:
        """Put ``length`` bytes from ``offset`` in; those that are in already stay."""
        if length <= 0:
            return
        start, end = offset, offset + length
        for known_start, known_end in self._touching(start, end):
            start, end = min(start, known_start), max(end, known_end)
            self._drop(known_start, known_end)
        self._ends[start] = end
        self._total += end - start

    def remove(self, offset: int, length: int) -> None:
        """Take ``length`` bytes from ``offset`` out; those that are not in do not matter."""
        if length <= 0:
            return
        end = offset + length
        for known_start, known_end in self._touching(offset, end):
            if known_end <= offset or known_start >= end:
                continue
            self._drop(known_start, known_end)
            if known_start < offset:
                self._ends[known_start] = offset
                self._total += offset - known_start
            if end < known_end:
                self._ends[end] = known_end
                self._total += known_end - end

    def contains(self, offset: int, length: int = 1) -> bool:
        """True when all ``length`` bytes from ``offset`` are in the set."""
        index = self._ends.bisect_right(offset) - 1
        return index >= 0 and bool(self._ends.peekitem(index)[1] >= offset + length)

    def overlaps(self, offset: int, length: int) -> bool:
        """True when at least one of the ``length`` bytes from ``offset`` is in the set."""
        index = self._ends.bisect_left(offset + length) - 1
        return length > 0 and index >= 0 and bool(self._ends.peekitem(index)[1] > offset)

    def __iter__(self) -> Iterator[ByteRange]:
        return (ByteRange(start, end - start) for start, end in self._ends.items())

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, offset: object) -> bool:
        return isinstance(offset, int) and self.contains(offset)

    def __repr__(self) -> str:
        return f"<RangeSet {' '.join(map(str, self))}>" if self._ends else "<RangeSet empty>"

    def _touching(self, start: int, end: int) -> list[tuple[int, int]]:
        """The known ranges that overlap or meet [start, end)."""
        first = max(self._ends.bisect_right(start) - 1, 0)
        found = []
        for known_start in self._ends.islice(first):
            if known_start > end:
                break
            known_end = self._ends[known_start]
            if known_end >= start:
                found.append((known_start, known_end))
        return found

    def _drop(self, start: int, end: int) -> None:
        del self._ends[start]
        self._total -= end - start
