"""Writing metadata back in a crash-safe order, and the release of clusters that nothing refers to any more.

Models the ordering rules of image-formats.md section 1.7. Where QEMU tracks dependencies between cached tables, qblock works in
rounds. A round takes a snapshot of everything dirty at *one instant* and writes it in this order:

    1. refcounts
       (flush; refcount table; flush; header, if the table moved)
    2. flush: data clusters, new tables and refcounts are durable before anything refers to them
    3. L2 slices and L1 sectors
       (flush; header, if disk size or L1 table changed)
    4. flush, when somebody waits for durability or clusters are to be released
    5. clusters whose last reference was dropped before the snapshot may be released

Why it is safe. A process killed between two writes, and a power cut that keeps any subset of the writes since the last flush
(in whole 512-byte sectors), leave on disk a state in which every reference points to a cluster whose count and content were
written before: new tables are written before they are linked in memory (`clusters.py`), data before its entry is changed in
memory, counts are raised before that as well. Dropped references lower a count only after step 4 of the round that wrote their
absence. What may be left are clusters counted and not referenced: leaks. Rounds never overlap; what changes during a round
belongs to the next one.

A round that fails gives its snapshot back: all of it counts as dirty again, for the next round, which somebody begins when there
is room on the disk again. What has reached the file meanwhile is such a subset as above. After a flush that the *system* has
failed at, storage refuses all further ones (`drivers.file`), and so no round can do harm.

Step 5 waits for one more thing: requests that looked up a mapping before it was dropped may still be reading or writing the
cluster. `Epochs` counts them; a batch of freed clusters is released when all requests that began before it have ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import attrs

from qblock.drivers.qcow2.cache import SECTOR, DirtyPart, TableCache
from qblock.drivers.qcow2.header import Header, encode_refcount_location, encode_size_and_l1, encode_switch
from qblock.drivers.qcow2.refcounts import Freed, Refcounts
from qblock.errors import BlockIOError

if TYPE_CHECKING:
    from qblock.drivers.qcow2.storage import ImageFile


class Epoch:
    """Requests that use looked-up mappings and began in one period; ``freed`` waits for them and all before them."""

    __slots__ = ("count", "freed")

    def __init__(self) -> None:
        self.count = 0
        self.freed: list[Freed] | None = None


class Epochs:
    """Which requests may still use clusters that were dropped. Users do ``epoch = epochs.current; epoch.count += 1``."""

    def __init__(self) -> None:
        self.current = Epoch()
        self._closed: deque[Epoch] = deque()
        self.ready: list[Freed] = []
        """Clusters that no request can be using any more."""

    def defer(self, freed: list[Freed]) -> None:
        """These clusters are to become ``ready`` when all present users are gone."""
        closed = self.current
        closed.freed = freed
        self._closed.append(closed)
        self.current = Epoch()
        self.advance()

    def leave(self, epoch: Epoch) -> None:
        """A user is done."""
        epoch.count -= 1
        if not epoch.count and epoch.freed is not None:
            self.advance()

    def advance(self) -> None:
        """Move batches to ``ready`` whose users are all gone, oldest first."""
        while self._closed and not self._closed[0].count:
            self.ready += self._closed.popleft().freed or ()


class MappingLocation(NamedTuple):
    """What the header says of the mapping: disk size in bytes, entries and file offset of the L1 table."""

    size: int
    l1_size: int
    l1_offset: int


class MappingTables(Protocol):
    """What the write-back needs of the L1 and L2 tables (`clusters.ClusterMap`)."""

    cache: TableCache
    epochs: Epochs
    dirty_l1: set[int]
    moved_l1: bool
    changed_header: bool

    def take_l1(self) -> list[tuple[int, memoryview]]:
        """Dirty sectors of the L1 table as (file offset, bytes); they count as clean then."""

    def give_back_l1(self, sectors: set[int], *, moved: bool) -> None:
        """Whether these sectors of the L1 table are in the file is not known."""

    def take_header(self) -> MappingLocation | None:
        """What the header must say of disk size and L1 table, if that changed."""

    @property
    def is_dirty(self) -> bool:
        """Something is not written yet."""


@attrs.frozen
class _Snapshot:
    """What is to be written by one round: the parts, and what has to be marked again when that fails."""

    counts: list[DirtyPart]
    table_parts: list[tuple[int, memoryview]]
    table_sectors: set[int]
    table_moved: bool
    table_place: tuple[int, int]
    """File offset in bytes and length in clusters of the refcount table."""
    slices: list[DirtyPart]
    l1_parts: list[tuple[int, memoryview]]
    l1_sectors: set[int]
    l1_moved: bool
    location: MappingLocation | None
    freed: list[Freed]


class WriteBack:
    """Runs the rounds for one image."""

    def __init__(self, file: ImageFile, refcounts: Refcounts, tables: MappingTables) -> None:
        self.file = file
        self.refcounts = refcounts
        self.tables = tables
        self.epochs = tables.epochs
        self._running: asyncio.Future[None] | None = None
        self._started = 0
        self._finished = 0
        self._want_durable = False

    @property
    def is_dirty(self) -> bool:
        """There is metadata that is not written yet."""
        return self.tables.is_dirty or self.refcounts.is_dirty or bool(self.refcounts.pending)

    async def flush(self) -> None:
        """All metadata changes made so far, and all data written so far, are durable on return."""
        if self._running is None and not self.is_dirty:
            await self.file.flush()
        else:
            await self.commit(durable=True)

    async def commit(self, *, durable: bool) -> None:
        """Have a round that covers all changes made so far; callers at the same time share one."""
        if durable:
            self._want_durable = True
        target = self._started + 1
        while self._finished < target:
            self.file.check_writable()
            if self._running is not None:
                await asyncio.shield(self._running)
                continue
            done = self._running = asyncio.get_running_loop().create_future()
            self._started += 1
            durable, self._want_durable = self._want_durable, False
            try:
                await self._round(durable=durable)
                self._finished = self._started
            except (BlockIOError, asyncio.CancelledError):
                self._want_durable |= durable  # those who wait for this round begin another one
                raise
            except BaseException as bug:
                self.file.poison(bug)
                raise
            finally:
                self._running = None
                done.set_result(None)

    async def _round(self, *, durable: bool) -> None:
        snapshot = self._take()
        try:
            await self._write_counts(snapshot)
            await self._write_mapping(snapshot)
            if durable or snapshot.freed or snapshot.location:
                await self.file.flush()
        except (BlockIOError, asyncio.CancelledError):
            self._give_back(snapshot)
            raise
        self.refcounts.cache.settle(snapshot.counts)
        self.tables.cache.settle(snapshot.slices)
        if snapshot.freed:
            self.epochs.defer(snapshot.freed)
        await self.release_ready()

    def _take(self) -> _Snapshot:
        refcounts, tables = self.refcounts, self.tables
        table_sectors, l1_sectors, l1_moved = refcounts.dirty_sectors.copy(), tables.dirty_l1.copy(), tables.moved_l1
        freed, refcounts.pending = refcounts.pending, []
        table_parts, table_moved = refcounts.take_table()
        return _Snapshot(
            counts=refcounts.cache.take_dirty(),
            table_parts=table_parts,
            table_sectors=table_sectors,
            table_moved=table_moved,
            table_place=(refcounts.table_host, len(refcounts.table) * 8 >> self.file.header.cluster_bits),
            slices=tables.cache.take_dirty(),
            l1_parts=tables.take_l1(),
            l1_sectors=l1_sectors,
            l1_moved=l1_moved,
            location=tables.take_header(),
            freed=freed,
        )

    def _give_back(self, snapshot: _Snapshot) -> None:
        """Any part of the snapshot may be in the file, or not: all of it is to be written again."""
        refcounts, tables = self.refcounts, self.tables
        refcounts.cache.give_back(snapshot.counts)
        refcounts.give_back_table(snapshot.table_sectors, moved=snapshot.table_moved)
        refcounts.pending[:0] = snapshot.freed
        tables.cache.give_back(snapshot.slices)
        tables.give_back_l1(snapshot.l1_sectors, moved=snapshot.l1_moved)
        tables.changed_header |= snapshot.location is not None

    async def _write_counts(self, snapshot: _Snapshot) -> None:
        file, moved = self.file, snapshot.table_moved
        await self._write(snapshot.counts, step="refblock_update_part")
        if snapshot.table_parts:
            await file.flush()
            file.event("refblock_alloc_write_table" if moved else "refblock_alloc_hookup")
            for offset, data in snapshot.table_parts:
                await file.write_table(offset, data)
            if moved:
                await file.flush()
                file.event("refblock_alloc_switch_table")
                await self._switch_refcount_table(*snapshot.table_place)

    async def _write_mapping(self, snapshot: _Snapshot) -> None:
        file, moved = self.file, snapshot.l1_moved
        if snapshot.slices or snapshot.l1_parts or snapshot.location:
            await file.flush()
            await self._write(snapshot.slices, step="l2_update")
            for offset, data in snapshot.l1_parts:
                file.event("l1_grow_write_table" if moved else "l1_update")
                await file.write_table(offset, data)
            if snapshot.location:
                await file.flush()
                if moved:
                    file.event("l1_grow_activate_table")
                await self._switch_mapping(snapshot.location)

    async def _switch_refcount_table(self, table_offset: int, clusters: int) -> None:
        at, data = encode_refcount_location(table_offset, clusters)
        await self.file.write_table(at, memoryview(data))
        self.file.header = attrs.evolve(
            self.file.header, refcount_table_offset=table_offset, refcount_table_clusters=clusters
        )

    async def _switch_mapping(self, location: MappingLocation) -> None:
        at, data = encode_size_and_l1(*location, crypt_method=self.file.header.crypt_method)
        await self.file.write_table(at, memoryview(data))
        size, l1_size, l1_offset = location
        self.file.header = attrs.evolve(self.file.header, size=size, l1_size=l1_size, l1_offset=l1_offset)

    async def rewrite_header(self, change: Callable[[Header], Header]) -> None:
        """Change the header's fields and extensions, between two rounds, when ``file.header`` is what the file says. Durable."""
        while self._running is not None:
            await asyncio.shield(self._running)
        self.file.check_writable()
        new, writes = encode_switch(self.file.header, change(self.file.header), SECTOR)
        done = self._running = asyncio.get_running_loop().create_future()
        try:
            await self.file.barrier()
            for offset, data in writes:
                await self.file.write_metadata(offset, memoryview(data))
                await self.file.barrier()
            self.file.header = new
        finally:
            self._running = None
            done.set_result(None)

    async def _write(self, parts: list[DirtyPart], *, step: str) -> None:
        for part in parts:
            self.file.event(step)
            await self.file.write_table(part.offset, part.data)

    async def release_ready(self) -> None:
        """Release clusters that nothing refers to and nobody uses."""
        ready, self.epochs.ready = self.epochs.ready, []
        if ready:
            await self.refcounts.release(ready)

    async def finish(self) -> None:
        """Write everything, including the counts of clusters that get released on the way. No request is in flight."""
        while self.is_dirty or self.epochs.ready:
            await self.commit(durable=True)
        await self.file.flush()
