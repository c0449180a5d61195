"""Which host clusters an image's tables refer to, and which of their entries are damaged.

Models the counting half of image-formats.md section 1.13. Entries that are damaged are reported and not followed, so that a
hostile table costs no more than reading it. Differs from QEMU: an L2 table behind the end of the file is a corruption.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.census import Census
from qblock.drivers.qcow2.layout import (
    COPIED,
    L1_RESERVED,
    OFFSET_MASK,
    Geometry,
    Kind,
    compressed_clusters,
    decode_u64,
    find_run,
)

if TYPE_CHECKING:
    from qblock.drivers.qcow2.snapshots import SnapshotTable
    from qblock.drivers.qcow2.storage import ImageFile



class ReferenceCounter:
    """Counts all references but those to the refcount structure. ``problems`` are texts about damaged entries."""

    def __init__(self, file: ImageFile, l1: array[int], snapshots: SnapshotTable) -> None:
        self.file = file
        self.geometry = Geometry.of(file.header)
        self.l1 = l1
        self.snapshots = snapshots
        self.census = Census()
        self.problems: list[str] = []
        self.allocated = 0
        self.fragmented = 0
        self.compressed = 0

    async def run(self) -> None:
        """Count header, active and inactive tables with what they refer to, snapshot table and persistent bitmaps."""
        header = self.file.header
        self.add_bytes(0, header.cluster_size)
        self.add_bytes(header.l1_offset, header.l1_size * 8)
        await self._add_tables(self.l1, active=True)
        for snapshot in self.snapshots.usable(self.file):
            self.add_bytes(snapshot.l1_offset, snapshot.l1_size * 8)
            raw = await self.file.read(snapshot.l1_offset, snapshot.l1_size * 8)
            await self._add_tables(decode_u64(raw), active=False)
        self.add_bytes(*self.snapshots.place(self.file))
        self.add_bytes(*header.encryption_area)
        await self._add_bitmaps()

    def add_bytes(self, offset: int, length: int) -> None:
        """Count the clusters that a byte range touches."""
        bits = self.geometry.cluster_bits
        if length:
            first = offset >> bits
            self.census.add_runs([(first, -(-(offset + length) >> bits) - first)])

    async def _add_tables(self, l1: array[int], *, active: bool) -> None:
        runs = []
        for index, entry in enumerate(l1):
            if entry and (offset := self._l2_offset(index, entry)):
                runs.append((offset >> self.geometry.cluster_bits, 1))
                entries = decode_u64(await self.file.read(offset, self.geometry.cluster_size))
                self.census.add_runs(self._l2_runs(entries, offset, index, active=active))
        self.census.add_runs(runs)

    def _l2_offset(self, index: int, entry: int) -> int:
        """Where the L2 table lies; 0 when there is none that could be followed."""
        size, offset = self.geometry.cluster_size, entry & OFFSET_MASK
        if entry & L1_RESERVED:
            self.problems.append(f"L1 entry {index} has reserved bits set: {entry:x}")
        if offset & (size - 1):
            self.problems.append(f"L2 table of L1 entry {index} is not cluster aligned: {entry:x}")
            return 0
        if offset and offset + size > self.file.length():
            self.problems.append(f"L2 table of L1 entry {index} lies behind the end of the file: {entry:x}")
            return 0
        return offset

    def _l2_runs(self, entries: array[int], offset: int, index: int, *, active: bool) -> Iterator[tuple[int, int]]:
        """The host clusters that an L2 table refers to, as (first, count)."""
        bits, at, expected = self.geometry.cluster_bits, 0, -1
        while at < len(entries):
            kind, clusters, entry = find_run(entries, at, len(entries) - at, self.geometry)
            if kind is Kind.DATA or kind is Kind.ZERO_ALLOCATED:
                host = (entry & OFFSET_MASK) >> bits
                if active:
                    self.allocated += clusters
                    self.fragmented += expected >= 0 and host != expected
                expected = host + clusters
                if not self.geometry.data_file:
                    yield host, clusters
                elif host != (guest := (index << self.geometry.l2_bits) + at):
                    self.problems.append(f"guest cluster {guest} lies elsewhere in the data file: {entry:x}")
            elif kind is Kind.COMPRESSED:
                touched = compressed_clusters(entry, bits)
                if entry & COPIED:
                    self.problems.append(f"compressed entry {at} of the L2 table at {offset:#x} is marked COPIED: {entry:x}")
                if active:
                    self.allocated += 1
                    self.compressed += 1
                    self.fragmented += 1
                yield touched.start, len(touched)
            elif kind is Kind.CORRUPT:
                self.problems.append(f"entry {at} of the L2 table at {offset:#x} is damaged: {entry:x}")
            at += clusters

    async def _add_bitmaps(self) -> None:
        """Persistent bitmaps keep their clusters, whether or not they are in use; `CorruptImage` when they cannot be read."""
        if self.file.header.extension(head.EXT_BITMAPS) is not None:
            from qblock.drivers.qcow2.bitmaps import bitmap_clusters  # noqa: PLC0415 - few images have bitmaps

            self.census.add_runs([run async for run in bitmap_clusters(self.file)])
