"""Changing which trees of tables an image has, with all that follows from it, in one write of the header.

Creating, applying and deleting a snapshot changes many refcounts between 1 and more, and with them COPIED flags in the active
tables, which must agree with the refcounts at every moment. No order of writing them in place does that. So nothing that is in
use is changed: refcount blocks, the refcount table, L2 tables with flags to change, the active L1 table and the snapshot table
are written anew into free clusters, and one write into the first sector of the file switches size, L1 table, refcount table and
snapshot table together. A crash before it leaves the old state and leaked clusters; after it, the new state.

The steps, of which the first may refuse and has changed nothing then:

    1. walk the trees that gain or lose a user; check that every count stays within its width and above zero
    2. L2 tables whose flags change, the L1 table, the snapshot table: claimed as any cluster, and written
    3. clusters for new refcount blocks are claimed; the claims reach the file by ordinary write-back
    4. refcounts as they will be, what goes out of use not counted any more; the refcount table
    5. flush, header, flush; what became free is discarded in the file

Differs from QEMU, which changes refcounts and flags in place, so that a crash in between leaves errors for its check to repair.
Nobody else may use the image meanwhile; afterwards everything in memory about its tables is void.
"""

from __future__ import annotations

import errno
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import attrs
from pyroaring import BitMap64

from qblock import requests
from qblock.drivers.qcow2.census import Census
from qblock.drivers.qcow2.header import encode_placement
from qblock.drivers.qcow2.layout import (
    COPIED,
    L1_RESERVED,
    OFFSET_MASK,
    U64,
    Kind,
    compressed_clusters,
    constant_run,
    decode_u64,
    encode_u64,
    find_run,
    first_words,
    with_first_words,
    zeroes_u64,
)
from qblock.drivers.qcow2.refcounts import Freed
from qblock.drivers.qcow2.snapshots import Snapshot, SnapshotTable, encode_snapshot_table
from qblock.errors import BlockIOError

if TYPE_CHECKING:
    from qblock.drivers.qcow2.allocation import Allocator

_FEW: Final = 64
"""Clusters of a block that may be counted otherwise than the rest of it, to be looked at as runs."""


@attrs.frozen
class Change:
    """What the image is to be: the active L1 table (flags aside), the disk's size, the snapshots, and who gains or loses a user.

    ``gained`` and ``lost`` are L1 tables whose trees get one user more or less. ``freed`` are byte ranges (offset, length) that
    go out of use beside the tables that are replaced; ``keeps_l1``: the present L1 table does not, somebody else has it now.
    """

    l1: array[int]
    size: int
    snapshots: Sequence[Snapshot]
    gained: Sequence[array[int]] = ()
    lost: Sequence[array[int]] = ()
    freed: Sequence[tuple[int, int]] = ()
    keeps_l1: bool = False


class Switch:
    """Performs one change of one image."""

    def __init__(self, writer: Allocator, old: SnapshotTable, change: Change) -> None:
        self.writer = writer
        self.file = writer.file
        self.geometry = writer.map.geometry
        self.refcounts = writer.refcounts
        self.old = old
        self.change = change
        self.l1 = change.l1[:]
        self.more, self.less = Census(), Census()
        self.claimed: list[Freed] = []
        """All that was claimed, to be given back when the change fails."""
        self.spare: list[Freed] = []
        """Claimed, but not needed in the end."""
        self.freed = BitMap64()
        self._affected = BitMap64()
        """Clusters that gain or lose users because of trees."""
        self._alone = BitMap64()
        """Those of them with a refcount of 1 afterwards."""
        self._less_structure = Census()

    async def perform(self) -> None:
        """All steps. Raises `BlockIOError` with nothing changed, or with the node poisoned."""
        await self.writer.writeback.finish()
        await self._count()
        try:
            await self._copy_tables()
            l1_offset = await self._place_l1()
            table = encode_snapshot_table(self.change.snapshots, self.change.size)
            table_offset = await self._place(len(table), memoryview(table)) if table else 0
            blocks, counts_offset = await self._claim_structure()
            await self._write_counts(blocks, counts_offset)
            self._check_freed(blocks)
            await self.file.barrier()
        except BlockIOError:
            if self.file.writable:
                await self.refcounts.release(self.claimed)
            raise
        await self._switch(l1_offset, table_offset, counts_offset)

    # ----------------------------------------------------------------------------------------------------------- counting

    async def _count(self) -> None:
        """Who gains and who loses; refuses what cannot be counted."""
        for l1 in self.change.gained:
            await self._walk(l1, self.more)
        for l1 in self.change.lost:
            await self._walk(l1, self.less)
        # The old table is looked up before the file grows: one that led out of it was never counted.
        for offset, length in (*self.change.freed, self.old.place(self.file)):
            self._lose_bytes(offset, length)
        for census in (self.more, self.less):
            for plane in census.planes:
                self._affected |= plane
        for block in self._touched_blocks():
            for run in await self._runs_of(block):
                if run.new == 1:
                    self._alone.add_range(run.first, run.first + run.clusters)
        self._alone &= self._affected

    def _touched_blocks(self) -> list[int]:
        """The blocks in which some count changes."""
        bits = self.geometry.block_bits
        return sorted({*self.more.groups(bits), *self.less.groups(bits)})

    def _lose_bytes(self, offset: int, length: int) -> None:
        bits = self.geometry.cluster_bits
        if length:
            first = offset >> bits
            self.less.add_runs([(first, -(-(offset + length) >> bits) - first)])

    async def _walk(self, l1: array[int], census: Census) -> None:
        """Count all L2 tables of an L1 table, and what they refer to."""
        bits, seen = self.geometry.cluster_bits, BitMap64()
        for index, entry in enumerate(l1):
            if not entry:
                continue
            offset = self._table_offset(index, entry)
            if offset >> bits in seen:
                raise self._damaged(f"entry {index} of an L1 table refers to the same L2 table as another one")
            seen.add(offset >> bits)
            census.add_runs(self._references(first_words(await self._table(offset), self.geometry), offset))
        census.add(seen)

    def _table_offset(self, index: int, entry: int) -> int:
        size, offset = self.geometry.cluster_size, entry & OFFSET_MASK
        if entry & L1_RESERVED or not offset or offset & (size - 1) or offset + size > self.file.length():
            raise self._damaged(f"entry {index} of an L1 table is {entry:#x}")
        return offset

    async def _table(self, offset: int) -> array[int]:
        return decode_u64(await self.file.read(offset, self.geometry.cluster_size))

    def _references(self, entries: array[int], offset: int) -> Iterator[tuple[int, int]]:
        bits, at = self.geometry.cluster_bits, 0
        while at < len(entries):
            kind, clusters, entry = find_run(entries, at, len(entries) - at, self.geometry)
            if kind is Kind.DATA or kind is Kind.ZERO_ALLOCATED:
                yield (entry & OFFSET_MASK) >> bits, clusters
            elif kind is Kind.COMPRESSED:
                touched = compressed_clusters(entry, bits)
                yield touched.start, len(touched)
            elif kind is Kind.CORRUPT:
                raise self._damaged(f"entry {at} of the L2 table at {offset:#x} is {entry:#x}")
            at += clusters

    def _damaged(self, detail: str) -> BlockIOError:
        return BlockIOError(errno.EIO, f"'{self.file.name}' is damaged, repair it first: {detail}")

    async def _runs_of(self, block: int) -> list[_Run]:
        """The refcounts of a block as they are and as they will be; raises when one of them cannot be."""
        bits = self.geometry.block_bits
        first = block << bits
        offset = self.refcounts.block_offset(block)
        if not offset:
            raise self._damaged(f"clusters from {first} on are in use, but have no refcounts")
        stored = self.refcounts.codec.decode(await self.file.read(offset, self.geometry.cluster_size))
        runs = []
        for run in _joined(stored, self.more, self.less, first):
            if run.new < 0 or (run.gains and not run.old):
                raise self._damaged(f"the refcount of cluster {run.first} is too low")
            if run.new > self.geometry.max_refcount:
                raise BlockIOError(
                    errno.EINVAL,
                    f"a cluster would have more users than refcounts of {self.geometry.refcount_bits} bits can count",
                )
            runs.append(run)
        return runs

    # ------------------------------------------------------------------------------------------------------------- tables

    async def _claim(self, clusters: int) -> int:
        """Adjacent free clusters; their byte offset."""
        # A single cluster is looked for where the last one was found.
        refcounts = self.refcounts
        claim = await (refcounts.allocate(1) if clusters == 1 else refcounts.allocate_contiguous(clusters))
        self.claimed.append(Freed(claim.host >> self.geometry.cluster_bits, clusters, False))
        return claim.host

    async def _place(self, length: int, content: memoryview) -> int:
        """Write a new table of ``length`` bytes; its byte offset."""
        host = await self._claim(self.geometry.clusters(length))
        await self.file.write_table(host, content)
        return host

    async def _copy_tables(self) -> None:
        """Make the flags of the new active tables right, in copies of the tables in which some are wrong."""
        bits = self.geometry.cluster_bits
        for index, entry in enumerate(self.l1):
            if not entry:
                continue
            offset = self._table_offset(index, entry)
            table = await self._table(offset)
            entries = first_words(table, self.geometry)
            if self._set_flags(entries):
                content = encode_u64(with_first_words(table, entries, self.geometry))
                self.l1[index] = await self._place(self.geometry.cluster_size, content) | COPIED
                self.less.add_runs([(offset >> bits, 1)])
            elif offset >> bits in self._affected:
                self.l1[index] = offset | (COPIED if offset >> bits in self._alone else 0)

    def _set_flags(self, entries: array[int]) -> bool:
        """Make COPIED say of each entry whether its cluster is used once; True when something changed."""
        at, changed = 0, False
        while at < len(entries):
            kind, clusters, entry = find_run(entries, at, len(entries) - at, self.geometry)
            if kind is Kind.DATA or kind is Kind.ZERO_ALLOCATED:
                changed |= self._set_run(entries, at, clusters, (entry & OFFSET_MASK) >> self.geometry.cluster_bits)
            at += clusters
        return changed

    def _set_run(self, entries: array[int], at: int, clusters: int, host: int) -> bool:
        """As `_set_flags`, for ``clusters`` entries from ``at`` that point to clusters from ``host`` on, flagged alike."""
        flagged, step, end = bool(entries[at] & COPIED), self.geometry.cluster_size, host + clusters
        affected = self._affected.range_cardinality(host, end)
        alone = self._alone.range_cardinality(host, end)
        if not affected or (affected == clusters and alone == clusters * flagged):
            return False
        if affected == clusters and alone in (0, clusters):
            start = entries[at] ^ COPIED
            entries[at : at + clusters] = array(U64, range(start, start + clusters * step, step))
            return True
        changed = False
        for i in range(clusters):
            if host + i in self._affected and (host + i in self._alone) is not flagged:
                entries[at + i] ^= COPIED
                changed = True
        return changed

    async def _place_l1(self) -> int:
        """Write the new active L1 table, unless the present one is what it is to be; its byte offset."""
        now = self.writer.map
        if not self.change.keeps_l1 and self.l1 == now.l1:
            return now.l1_host
        if not self.change.keeps_l1:
            self._lose_bytes(now.l1_host, len(now.l1) * 8)
        length = len(self.l1) * 8
        return await self._place(length, encode_u64(self.l1[:])) if length else 0

    # ------------------------------------------------------------------------------------------------ refcount structure

    async def _claim_structure(self) -> tuple[dict[int, int], int]:
        """Claim clusters for the blocks that change (block: its new byte offset) and for the table (byte offset).

        Claiming may itself make the structure grow, so it is looked at again until all that changes has its place.
        """
        places: list[int] = []
        tables: dict[int, int] = {}
        while True:
            await self.writer.writeback.finish()
            clusters = len(self.refcounts.table) * 8 >> self.geometry.cluster_bits
            self._less_structure, blocks = self._closed()
            if len(places) >= len(blocks) and clusters in tables:
                break
            if clusters not in tables:
                tables[clusters] = await self._claim(clusters)
            while len(places) < len(blocks):
                places.append(await self._claim(1))
        self.spare += [Freed(host >> self.geometry.cluster_bits, 1, False) for host in places[len(blocks) :]]
        self.spare += [
            Freed(host >> self.geometry.cluster_bits, count, False) for count, host in tables.items() if count != clusters
        ]
        return dict(zip(blocks, places, strict=False)), tables[clusters]

    def _closed(self) -> tuple[Census, list[int]]:
        """What goes out of use of the refcount structure, and all blocks in which counts change, those of old blocks included."""
        bits, cluster_bits = self.geometry.block_bits, self.geometry.cluster_bits
        less = Census()
        first = self.refcounts.table_host >> cluster_bits
        less.add_runs([(first, len(self.refcounts.table) * 8 >> cluster_bits)])
        known = {*self._touched_blocks(), *less.groups(bits)}
        waiting = list(known)
        while waiting:
            cluster = self.refcounts.block_offset(waiting.pop()) >> cluster_bits
            less.add_runs([(cluster, 1)])
            if cluster >> bits not in known:
                known.add(cluster >> bits)
                waiting.append(cluster >> bits)
        return less, sorted(known)

    async def _write_counts(self, blocks: dict[int, int], table_offset: int) -> None:
        """Write blocks and table as they will be."""
        for level, plane in enumerate(self._less_structure.planes):
            for _ in range(1 << level):
                self.less.add(plane)
        table = self.refcounts.table[:]
        typecode = self.refcounts.codec.typecode
        for block, host in blocks.items():
            counts = array(typecode)
            for run in await self._runs_of(block):
                counts.extend(array(typecode, [run.new]) * run.clusters)
                if run.old and not run.new:
                    self.freed.add_range(run.first, run.first + run.clusters)
            await self.file.write_table(host, self.refcounts.codec.encode(counts))
            table[block] = host
        await self.file.write_table(table_offset, encode_u64(table))

    def _check_freed(self, blocks: dict[int, int]) -> None:
        """Nothing becomes free that the new state needs; in an image whose refcounts are right it does not."""
        bits, needed = self.geometry.cluster_bits, BitMap64([0])
        for block, offset in enumerate(self.refcounts.table):
            if offset and block not in blocks:
                needed.add(offset >> bits)
        needed |= BitMap64((entry & OFFSET_MASK) >> bits for entry in self.l1 if entry)
        for claim in self.claimed:
            needed.add_range(claim.first, claim.first + claim.clusters)
        for snapshot in self.change.snapshots:
            if snapshot.defect(self.file.length(), self.geometry.cluster_size) is None:
                first = snapshot.l1_offset >> bits
                needed.add_range(first, first + self.geometry.clusters(snapshot.l1_bytes))
        if needed & self.freed:
            raise self._damaged("tables overlap, or refcounts are too low")

    # ------------------------------------------------------------------------------------------------------------- switch

    async def _switch(self, l1_offset: int, table_offset: int, counts_offset: int) -> None:
        """The one write that makes it so."""
        file = self.file
        header = attrs.evolve(
            file.header,
            size=self.change.size,
            l1_size=len(self.l1),
            l1_offset=l1_offset,
            refcount_table_offset=counts_offset,
            refcount_table_clusters=len(self.refcounts.table) * 8 >> self.geometry.cluster_bits,
            snapshot_count=len(self.change.snapshots),
            snapshots_offset=table_offset,
        )
        at, data = encode_placement(header)
        try:
            await file.write_metadata(at, memoryview(data))
            await file.barrier()
        except BaseException as error:
            # Also when cancelled: which state is on disk is not known any more.
            file.poison(error)
            raise
        file.header = header

    async def discard_freed(self) -> None:
        """Give the space of what became free back to the file's host."""
        bits = self.geometry.cluster_bits
        for first, count in _runs(self.freed):
            await requests.discard(self.file.edge, first << bits, count << bits)


class _Run(NamedTuple):
    """Adjacent clusters with the same refcount, which becomes another one; ``gains``: they get users."""

    first: int
    clusters: int
    old: int
    new: int
    gains: bool


def _joined(stored: array[int], more: Census, less: Census, first: int) -> Iterator[_Run]:
    """The counts of clusters from ``first`` on, with what is to be added and taken away, as runs."""
    end = first + len(stored)
    cuts = _cuts((*more.planes, *less.planes), first, end)
    if cuts is None:
        yield from _joined_one_by_one(stored, more, less, first)
        return
    for start, stop in itertools.pairwise(cuts):
        gain, loss = more.count(start), less.count(start)
        while start < stop:
            old = stored[start - first]
            count = constant_run(stored, start - first, stop - start)
            yield _Run(start, count, old, old + gain - loss, gain > 0)
            start += count


def _cuts(planes: Iterable[BitMap64], first: int, end: int) -> list[int] | None:
    """Where clusters must be parted so that each part is wholly inside or outside of every plane; None when that is often."""
    cuts = {first, end}
    for plane in planes:
        members = plane.range_cardinality(first, end)
        if not 0 < members < end - first:
            continue
        here = BitMap64()
        here.add_range(first, end)
        odd = here & plane if members <= _FEW else here - plane
        if len(odd) > _FEW:
            return None
        for cluster in odd:
            cuts.update((cluster, cluster + 1))
    return sorted(cuts)


def _joined_one_by_one(stored: array[int], more: Census, less: Census, first: int) -> Iterator[_Run]:
    end, at = first + len(stored), first
    changes = zip(stored, more.counts(first, end), less.counts(first, end), strict=True)
    for (old, gain, loss), group in itertools.groupby(changes):
        count = sum(1 for _ in group)
        yield _Run(at, count, old, old + gain - loss, gain > 0)
        at += count


def _runs(clusters: BitMap64) -> Iterable[tuple[int, int]]:
    """Runs of adjacent clusters as (first, count)."""
    first = end = -1
    for cluster in clusters:
        if cluster != end:
            if first >= 0:
                yield first, end - first
            first = cluster
        end = cluster + 1
    if first >= 0:
        yield first, end - first


def resized(l1: array[int], entries: int) -> array[int]:
    """An L1 table with that many entries."""
    return l1[:entries] + zeroes_u64(max(0, entries - len(l1)))
