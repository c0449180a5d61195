"""Counting references to host clusters: a bit-sliced counter on compressed bitmaps.

Plane k holds bit k of every cluster's count, so that adding a set of clusters is a ripple of set operations, and a run of
millions of clusters that are referenced once costs a few bytes. A hostile image whose references are scattered over the whole
address space costs memory by the number of its references, not by the size that it claims.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

from pyroaring import BitMap64


class Census:
    """How often each cluster is referenced."""

    def __init__(self) -> None:
        self.planes: list[BitMap64] = []
        self._several: BitMap64 | None = None

    def add(self, clusters: BitMap64, level: int = 0) -> None:
        """2^``level`` more references to each of a set of clusters."""
        self._several = None
        self.planes.extend(BitMap64() for _ in range(level - len(self.planes)))
        for at in range(level, len(self.planes)):
            plane = self.planes[at]
            carry = plane & clusters
            plane ^= clusters
            self.planes[at] = plane
            if not carry:
                return
            clusters = carry
        self.planes.append(BitMap64(clusters))

    def add_runs(self, runs: Iterable[tuple[int, int]], times: int = 1) -> None:
        """References by runs of (first cluster, count), in which a cluster may come several times; each counts ``times``."""
        batch = BitMap64()
        for first, count in runs:
            if batch.range_cardinality(first, first + count):
                self.add_set(batch, times)
                batch = BitMap64()
            batch.add_range(first, first + count)
        if batch:
            self.add_set(batch, times)

    def add_set(self, batch: BitMap64, times: int = 1) -> None:
        """``times`` more references to each of a set of clusters."""
        for level in range(times.bit_length()):
            if times >> level & 1:
                self.add(batch, level)

    def count(self, cluster: int) -> int:
        """References to one cluster."""
        return sum(1 << level for level, plane in enumerate(self.planes) if cluster in plane)

    @property
    def several(self) -> BitMap64:
        """The clusters that are referenced more than once."""
        if self._several is None:
            self._several = BitMap64().union(*self.planes[1:])
        return self._several

    def only_once(self, first: int, count: int) -> bool:
        """Is every cluster of a run referenced exactly once?"""
        if not self.planes or self.planes[0].range_cardinality(first, first + count) != count:
            return False
        return not any(plane.range_cardinality(first, first + count) for plane in self.planes[1:])

    def counts(self, first: int, end: int) -> array[int]:
        """The counts of clusters ``first`` to ``end`` (exclusive)."""
        if self.only_once(first, end - first):
            return array("Q", [1]) * (end - first)
        counts = array("Q", bytes(8 * (end - first)))
        for level, plane in enumerate(self.planes):
            if plane.range_cardinality(first, end):
                for cluster in plane & BitMap64(range(first, end)):
                    counts[cluster - first] += 1 << level
        return counts

    def end(self) -> int:
        """One more than the highest referenced cluster; 0 when there is none."""
        return max((plane.max() + 1 for plane in self.planes if plane), default=0)

    def groups(self, bits: int) -> Iterator[int]:
        """Numbers of the groups of 2^bits clusters in which some cluster is referenced; those of a plane in order."""
        for plane in self.planes:
            last = plane.max() >> bits if plane else -1
            group = plane.min() >> bits if plane else 0
            while group <= last:
                yield group
                if group == last:
                    break
                group = plane.next_set_bit((group + 1) << bits) >> bits
