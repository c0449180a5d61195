"""Where guest clusters lie: the L1 table, cached slices of L2 tables, and reading through them.

Models image-formats.md sections 1.5 and 1.6. The L1 table is held in memory whole (at most 32 MiB); L2 tables are cached in
slices. A slice's key is the guest offset shifted right by ``geometry.slice_shift``, so that the hot path is one dict look-up and
one array index.

Theory of concurrency. Everything may change at every ``await``: slices are evicted, tables are moved, clusters get mapped,
zeroed and dropped. Therefore a mapping is looked up and used (an epoch entered, a run registered as being allocated, entries
changed) in one step without ``await``; after a wait it is looked up again. Three things make later use of a mapping safe:

- `writeback.Epochs`: a host cluster is not given to anybody else while a request that looked it up is under way.
- `ClusterMap.allocations` (see `allocation.py`): the guest clusters that are being given a new place. Other changes of their
  entries wait.
- `writable_slice`: slices are changed only where the L2 table belongs to the active L1 table alone (COPIED); tables shared with
  snapshots are copied first, and the copy is linked in memory only after it was written.
"""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING, Final

from qblock import requests
from qblock.drivers.qcow2.cache import SECTOR, CachedTable, TableCache
from qblock.drivers.qcow2.lanes import plain_pieces
from qblock.drivers.qcow2.layout import (
    COPIED,
    L1_IN_USE,
    L1_RESERVED,
    OFFSET_MASK,
    Geometry,
    Kind,
    Run,
    constant_run,
    decode_u64,
    encode_u64,
    find_run,
    zeroes_u64,
)
from qblock.drivers.qcow2.refcounts import Freed, Refcounts
from qblock.drivers.qcow2.storage import Area, ImageFile
from qblock.drivers.qcow2.straight import slices_straight_on
from qblock.drivers.qcow2.unpacking import Unpacker, packed_row
from qblock.drivers.qcow2.writeback import Epochs, MappingLocation
from qblock.errors import BlockIOError
from qblock.extents import Fragment, Unallocated
from qblock.zeroes import fill_zero, zero_view

if TYPE_CHECKING:
    from qblock.drivers.qcow2.allocation import Allocation
    from qblock.node import BlockDriverState

_ENTRIES_PER_SECTOR: Final = SECTOR // 8
_STATUS_SLICES: Final = 64
"""Slices that one status question looks at before it answers."""


class ClusterMap:
    """The mapping of one open image. ``length`` is the disk's size in bytes."""

    def __init__(
        self, file: ImageFile, geometry: Geometry, l1: array[int], cache_bytes: int, clean_interval: int
    ) -> None:
        self.file = file
        self.geometry = geometry
        self.length = file.header.disk_size
        self.l1 = l1
        self.l1_host = file.header.l1_offset
        self.dirty_l1: set[int] = set()
        self.moved_l1 = False
        self.changed_header = False
        """Size or L1 location differ from the header on disk."""
        slice_bytes = 1 << geometry.slice_bits + geometry.entry_bits
        self.cache = self._make_cache(cache_bytes // slice_bytes)
        self.tables = self.cache.tables
        self.unpacker = Unpacker(file, geometry)
        self.epochs = Epochs()
        self.allocations: list[Allocation] = []
        self.refcounts: Refcounts | None = None
        """Set while the image is open for writing."""
        self._building: dict[int, asyncio.Future[None]] = {}
        self._slice_bytes = slice_bytes
        self._slice_mask = (1 << geometry.slice_bits) - 1
        self._slices_shift = geometry.l2_bits - geometry.slice_bits
        self._clean_interval = clean_interval * 1_000_000_000
        self._cleaned_at = file.env.clock.now_ns()

    def _make_cache(self, slices: int) -> TableCache:
        return TableCache(slices, entries_per_sector=_ENTRIES_PER_SECTOR, encode=encode_u64)

    # ------------------------------------------------------------------------------------------------------- slices

    def index(self, guest: int) -> int:
        """Position of a guest offset's entry in its slice."""
        return guest >> self.geometry.cluster_bits & self._slice_mask

    async def slice_at(self, guest: int) -> CachedTable | None:
        """The L2 slice for a guest offset, None when there is no L2 table. Valid until the caller's next ``await``."""
        key = guest >> self.geometry.slice_shift
        while (table := self.cache.get(key)) is None:
            index = guest >> self.geometry.l1_shift
            if index >= len(self.l1) or not self.l1[index] & L1_IN_USE:
                return None
            await self._load(key, self._l2_offset(index))
        return table

    def _l2_offset(self, index: int) -> int:
        """File offset of an L2 table that exists; `BlockIOError` when the entry is damaged."""
        entry = self.l1[index]
        if not self._is_sound(entry):
            raise self.file.bad_entry(f"entry {index} of the L1 table is {entry:#x}", self.l1_host + 8 * index)
        return entry & OFFSET_MASK

    def _is_sound(self, entry: int) -> bool:
        """Whether an entry of the L1 table that is not 0 can be what it says, the place of an L2 table."""
        offset, size = entry & OFFSET_MASK, self.geometry.cluster_size
        return not (entry & L1_RESERVED or offset & (size - 1) or offset + size > self.file.length())

    def slice_host(self, key: int) -> int:
        """File offset of a slice, 0 when its table does not exist or its L1 entry is damaged."""
        index = key >> self._slices_shift
        entry = self.l1[index] if index < len(self.l1) else 0
        return self._slice_host(key, entry & OFFSET_MASK) if entry and self._is_sound(entry) else 0

    def _slice_host(self, key: int, l2_offset: int) -> int:
        return l2_offset + (key & ((1 << self._slices_shift) - 1)) * self._slice_bytes

    async def _load(self, key: int, l2_offset: int) -> None:
        now = self.file.env.clock.now_ns()
        if self._clean_interval and now - self._cleaned_at > self._clean_interval:
            self._cleaned_at = now
            self.cache.discard_clean(unused_only=True)
        owned = self.l1[key >> self._slices_shift] & COPIED
        self.file.event("l2_load")
        await self.cache.load(
            key, self._slice_host(key, l2_offset), self._read_slice if owned else self._read_shared_slice
        )

    async def _read_slice(self, host: int) -> array[int]:
        return decode_u64(await self.file.read(host, self._slice_bytes))

    async def _read_shared_slice(self, host: int) -> array[int]:
        """A slice of a table that a snapshot shares: nothing it points to may be written in place, whatever it says."""
        raw = await self.file.read(host, self._slice_bytes)
        entries = decode_u64(raw)
        if not raw[::8].isascii():
            entries = array("Q", [entry & ~COPIED for entry in entries])
        return entries

    async def writable_slice(self, guest: int) -> CachedTable:
        """The L2 slice for a guest offset, in a table of the active L1's own. Valid until the caller's next ``await``."""
        key = guest >> self.geometry.slice_shift
        index = guest >> self.geometry.l1_shift
        while True:
            entry = self.l1[index]
            if not (entry & COPIED and entry & OFFSET_MASK):
                await self._own_table(index, key)
                continue
            table = self.cache.get(key)
            if table is None:
                await self._load(key, await self._trusted_l2_offset(index))
            elif table.host != self._slice_host(key, entry & OFFSET_MASK):
                # Its load had begun before the table was copied.
                del self.tables[key]
            else:
                return table

    async def _trusted_l2_offset(self, index: int) -> int:
        """As `_l2_offset` for a table that will be written, or copied: damage is fatal."""
        try:
            offset = self._l2_offset(index)
        except BlockIOError as error:
            await self.file.fatal(error.strerror or "the L1 table is damaged", self.l1_host + 8 * index)
        if self.l1[index] & COPIED:
            await self.file.check_overlap(offset, self.geometry.cluster_size, ignore=Area.ACTIVE_L2)
        return offset

    async def _own_table(self, index: int, key: int) -> None:
        """Give the active L1 entry an L2 table of its own: an empty one, or a copy of the one shared with snapshots."""
        if (building := self._building.get(index)) is not None:
            await asyncio.shield(building)
            return
        future = self._building[index] = asyncio.get_running_loop().create_future()
        try:
            old = await self._trusted_l2_offset(index) if self.l1[index] & L1_IN_USE else 0
            host = await self._write_table(old)
            self.file.check_writable()
            # From here on nothing waits.
            self._link_table(index, host, old)
            if not old:
                self.cache.insert(key, zeroes_u64(self._slice_bytes // 8), self._slice_host(key, host))
        finally:
            del self._building[index]
            future.set_result(None)

    async def _write_table(self, old: int) -> int:
        size, refcounts = self.geometry.cluster_size, self.refcounts
        assert refcounts is not None
        claim = await refcounts.allocate(1, for_table=True)
        try:
            if old:
                self.file.event("l2_alloc_cow_read")
            content = memoryview(await self.file.read(old, size)) if old else zero_view(size)
            self.file.event("l2_alloc_write")
            await self.file.write_table(claim.host, content)
        except BlockIOError:
            await refcounts.release([Freed(claim.host >> self.geometry.cluster_bits, 1, False)])
            raise
        return claim.host

    def _link_table(self, index: int, host: int, old: int) -> None:
        refcounts, bits = self.refcounts, self.geometry.cluster_bits
        assert refcounts is not None
        self.l1[index] = host | COPIED
        self.dirty_l1.add(index // _ENTRIES_PER_SECTOR)
        first_key = index << self._slices_shift
        if old:
            refcounts.pending.append(Freed(old >> bits, 1, refcounts.discard_other))
            for key in range(first_key, first_key + (1 << self._slices_shift)):
                if (table := self.tables.get(key)) is not None:
                    table.host = self._slice_host(key, host)
        if self.file.metadata is not None:
            self.file.metadata.add_one(Area.ACTIVE_L2, host >> bits)
            if old:
                self.file.metadata.remove(Area.ACTIVE_L2, [old >> bits])

    def reserve(self, table: CachedTable, index: int, entries: array[int]) -> None:
        """As `change`, for clusters that get a place in which there is nothing but zeroes yet."""
        self.change(table, index, entries)

    def run_at(self, table: CachedTable, index: int, limit: int) -> Run:
        """The run of clusters of one kind that begins at ``index`` of a slice, at most ``limit`` entries."""
        return find_run(table.entries, index, limit, self.geometry)

    def places_of_zeroes(self, table: CachedTable, index: int, limit: int) -> Run:
        """As `run_at`; of kind ZERO_ALLOCATED are clusters that read as zeroes and have a place."""
        return self.run_at(table, index, limit)

    def change(self, table: CachedTable, index: int, entries: array[int]) -> None:
        """Replace entries of a slice that `writable_slice` has just returned."""
        table.entries[index : index + len(entries)] = entries
        self.cache.mark_dirty(table, index, index + len(entries))

    # ------------------------------------------------------------------------------------------------------ reading

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``, which lies inside the disk, run by run."""
        geometry, done, wanted = self.geometry, 0, len(view)
        within_table = (1 << geometry.l1_shift) - 1
        while done < wanted:
            guest = offset + done
            table = await self.slice_at(guest)
            if table is None:
                count = min(wanted - done, within_table + 1 - (guest & within_table))
                await self.read_below(guest, view[done : done + count])
            else:
                start = guest & (geometry.cluster_size - 1)
                index = self.index(guest)
                limit = min(geometry.clusters(start + wanted - done), len(table.entries) - index)
                run = self.run_at(table, index, limit)
                if run.kind is Kind.COMPRESSED:
                    count = await self.read_packed(table, guest, view[done:])
                else:
                    count = min(run.clusters * geometry.cluster_size - start, wanted - done)
                    await self.read_run(run, guest, view[done : done + count])
            done += count

    async def read_run(self, run: Run, guest: int, view: memoryview) -> None:
        """Read from a run that was looked up in this same step; ``guest`` may lie inside its first cluster."""
        kind = run.kind
        if kind is Kind.ZERO or kind is Kind.ZERO_ALLOCATED:
            fill_zero(view)
        elif kind is Kind.UNALLOCATED:
            await self.read_below(guest, view)
        elif kind is Kind.CORRUPT:
            raise self.file.bad_entry(f"the L2 entry for guest offset {guest:#x} is {run.entry:#x}", guest)
        else:
            epoch = self.epochs.current
            epoch.count += 1
            try:
                start = guest & (self.geometry.cluster_size - 1)
                if kind is Kind.DATA:
                    if self.file.traced:
                        await self.file.reach("read_aio")
                    if (crypto := self.file.crypto) is None:
                        await requests.read_into(self.file.data, (run.entry & OFFSET_MASK) + start, view)
                    else:
                        await crypto.read(self.file.data, (run.entry & OFFSET_MASK) + start, guest, view)
                else:
                    await self.unpacker.read([run.entry], start, view)
            finally:
                self.epochs.leave(epoch)

    async def read_packed(self, table: CachedTable, guest: int, view: memoryview) -> int:
        """Read from the compressed clusters in a row at a guest offset, which was looked up in this same step.

        Returns how many bytes of ``view`` they fill.
        """
        geometry, index, start = self.geometry, self.index(guest), guest & (self.geometry.cluster_size - 1)
        limit = min(geometry.clusters(start + len(view)), len(table.entries) - index)
        row = packed_row(table.entries, index, limit)
        count = min(len(row) * geometry.cluster_size - start, len(view))
        epoch = self.epochs.current
        epoch.count += 1
        try:
            await self.unpacker.read(row, start, view[:count])
        finally:
            self.epochs.leave(epoch)
        return count

    async def read_below(self, guest: int, view: memoryview) -> None:
        """Read what an unallocated area shows: the backing node, or zeroes.

        Layers that have nothing here are passed by in a loop: chains may be longer than calls can be nested.
        """
        edge = self.file.node.backing
        if edge is None:
            fill_zero(view)
            return
        if self.file.traced:
            await self.file.reach("read_backing_aio")
        while (below := edge.node.backing) is not None and await _has_nothing(edge.node, guest, len(view)):
            edge = below
        await requests.read_into(edge, guest, view)

    # ------------------------------------------------------------------------------------------------------- status

    async def status(self, offset: int, length: int) -> tuple[Kind, int, int | None]:
        """What is at ``offset``: kind, how many bytes (at most ``length``) alike, and the file offset of a contiguous run."""
        geometry = self.geometry
        start = offset & (geometry.cluster_size - 1)
        kind, clusters, entry = await self._run_at(offset, geometry.clusters(start + length))
        got = clusters * geometry.cluster_size - start
        allocated = kind is Kind.DATA or kind is Kind.ZERO_ALLOCATED
        host = (entry & OFFSET_MASK) + start if allocated else None
        looked = 1
        while got < length and looked < _STATUS_SLICES:
            more, _, entry = await self._run_at(offset + got, 1)
            if more is not kind or (host is not None and entry & OFFSET_MASK != host + got):
                break
            _, clusters, entry = await self._run_at(offset + got, geometry.clusters(length - got))
            got += clusters * geometry.cluster_size
            looked += 1
            if kind is Kind.DATA and clusters == 1 << geometry.slice_bits:
                limit = min(length - got >> geometry.slice_shift, _STATUS_SLICES - looked)
                following = entry + clusters * geometry.cluster_size
                slices = await slices_straight_on(self, (offset + got) >> geometry.slice_shift, following, limit)
                got += slices << geometry.slice_shift
                looked += slices
        if kind is Kind.CORRUPT:
            raise self.file.bad_entry(f"the L2 entry for guest offset {offset:#x} is damaged", offset)
        return kind, min(got, length), host

    async def fragments(self, offset: int, length: int, *, after: int, gaps: bool) -> list[Fragment]:
        """See `SupportsFragments`: whole clusters, to the end of a slice at most."""
        size, index = self.geometry.cluster_size, self.index(offset)
        table = await self.slice_at(offset)
        if table is None or offset & (size - 1) or table.entries[index] & OFFSET_MASK == after:
            return []
        if self.file.crypto is not None or self.geometry.data_file:
            # Nothing lies in the file as it is; or nothing may lie elsewhere than at its guest offset.
            return []
        limit = min(length // size, len(table.entries) - index)
        pieces = plain_pieces(table.entries, index, limit, self.geometry.cluster_bits, gaps=gaps)
        return [(offset + first * size, count * size, place) for first, count, place in pieces]

    async def _run_at(self, guest: int, limit: int) -> Run:
        geometry = self.geometry
        table = await self.slice_at(guest)
        if table is not None:
            index = self.index(guest)
            return self.run_at(table, index, min(limit, len(table.entries) - index))
        index = guest >> geometry.l1_shift
        empty = constant_run(self.l1, index, len(self.l1) - index) if index < len(self.l1) and not self.l1[index] else 1
        end = (index + empty) << geometry.l1_shift
        return Run(Kind.UNALLOCATED, min(limit, (end >> geometry.cluster_bits) - (guest >> geometry.cluster_bits)), 0)

    # ------------------------------------------------------------------------------------------------------ writing

    def take_l1(self) -> list[tuple[int, memoryview]]:
        """See `writeback.MappingTables`."""
        dirty, self.dirty_l1 = sorted(self.dirty_l1), set()
        if self.moved_l1:
            self.moved_l1 = False
            return [(self.l1_host, encode_u64(self.l1[:]))]
        parts = []
        for sector in dirty:
            first = sector * _ENTRIES_PER_SECTOR
            parts.append((self.l1_host + first * 8, encode_u64(self.l1[first : first + _ENTRIES_PER_SECTOR])))
        return parts

    def give_back_l1(self, sectors: set[int], *, moved: bool) -> None:
        """See `writeback.MappingTables`."""
        self.dirty_l1 |= sectors
        self.moved_l1 |= moved

    def take_header(self) -> MappingLocation | None:
        """See `writeback.MappingTables`."""
        if not self.changed_header:
            return None
        self.changed_header = False
        return MappingLocation(self.length, len(self.l1), self.l1_host)

    @property
    def is_dirty(self) -> bool:
        """See `writeback.MappingTables`."""
        return bool(self.cache.dirty or self.dirty_l1 or self.moved_l1 or self.changed_header)


async def _has_nothing(node: BlockDriverState, guest: int, length: int) -> bool:
    """Whether all of a range is for the layers below ``node`` to show, and reading it leaves nothing in ``node``."""
    if node.copy_on_read or guest + length > node.length:
        return False
    extent = await requests.block_status(node, guest, length, want_zero=False)
    return isinstance(extent, Unallocated) and extent.length >= length
