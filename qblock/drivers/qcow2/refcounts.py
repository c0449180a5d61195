"""Reference counts of host clusters: stored form, allocation of free clusters, release of used ones.

Models image-formats.md section 1.4. Theory, in three rules:

1. *Counts in memory are never below what any table in memory refers to.* A cluster is claimed (its count raised) in the same
   step in which it was found free, with no ``await`` between; only later do tables refer to it.
2. *A count is lowered only when nothing durable refers to the cluster any more, and no request is still using it.* Those who
   drop a reference hand the clusters to `writeback.py`, which calls `release` after the tables are on disk. So the counts in
   memory can be written at any time, before the tables, and a crash leaves leaks and nothing worse.
3. *A structure is linked only after it is durable.* New refcount blocks are written as zeroes before the table in memory
   points to them; `writeback.py` flushes between writing counts and writing table entries. A bigger refcount table is written
   at a new place and the header switched to it.

Locks: ``structure`` (an `asyncio.Lock`) is held while blocks or the table are added. Allocation does not take clusters while it
is held, so the holder may plan over several ``await``; release and loading go on. The cache loads slices of blocks (4 KiB);
counts narrower than a byte are unpacked to one byte each.

Differs from QEMU: a missing block is placed at the first cluster that is asked for in its range, so that it describes itself.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from qblock import requests
from qblock.drivers.qcow2.cache import SECTOR, CachedTable, TableCache
from qblock.drivers.qcow2.header import MAX_REFCOUNT_TABLE_BYTES
from qblock.drivers.qcow2.layout import (
    REFCOUNT_TABLE_OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    Geometry,
    constant_run,
    decode_u64,
    encode_u64,
    zeroes_u64,
)
from qblock.drivers.qcow2.storage import Area, ImageFile
from qblock.errors import BlockIOError
from qblock.zeroes import zero_view

SLICE_BYTES: Final = 4096
_TYPECODES: Final = {3: "B", 4: "H", 5: "I", 6: "Q"}
_ENTRIES_PER_TABLE_SECTOR: Final = SECTOR // 8


class Freed(NamedTuple):
    """Clusters that lost a reference: first index, count, and whether the file should get a discard when they become free.

    ``guest``: they keep their reference, and lose their content only; the first guest cluster whose place they are.
    """

    first: int
    clusters: int
    pass_discard: bool
    guest: int | None = None


class Claim(NamedTuple):
    """Newly allocated adjacent clusters: byte offset, count, and whether the file is known to read as zeroes there."""

    host: int
    clusters: int
    virgin: bool


# ----------------------------------------------------------------------------------------------------------- stored form


class RefcountCodec:
    """Stored refcounts of one width to and from arrays of one count per element."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.bits = 1 << order
        self.typecode = _TYPECODES[max(order, 3)]
        self._per_byte = max(8 // self.bits, 1)
        mask = (1 << self.bits) - 1 if order < 3 else 0xFF
        self._unpack = [bytes(byte >> (i * self.bits) & mask for byte in range(256)) for i in range(self._per_byte)]
        self._pack = [bytes((byte << (i * self.bits)) & 0xFF for byte in range(256)) for i in range(self._per_byte)]

    def decode(self, raw: bytes | bytearray) -> array[int]:
        """Counts from stored bytes."""
        if self.order < 3:
            out = bytearray(len(raw) * self._per_byte)
            for i, table in enumerate(self._unpack):
                out[i :: self._per_byte] = raw.translate(table)
            return array("B", bytes(out))
        counts = array(self.typecode)
        counts.frombytes(raw)
        if self.order > 3:
            counts.byteswap()
        return counts

    def encode(self, counts: array[int]) -> memoryview:
        """Stored bytes from counts; ``counts`` is consumed."""
        if self.order < 3:
            flat = counts.tobytes()
            total = 0
            for i, table in enumerate(self._pack):
                total |= int.from_bytes(flat[i :: self._per_byte].translate(table), "little")
            return memoryview(total.to_bytes(len(flat) // self._per_byte, "little"))
        if self.order > 3:
            counts.byteswap()
        return memoryview(counts).cast("B")


def find_free(counts: array[int], start: int) -> int:
    """Position of the first zero from ``start`` on, or -1."""
    size = counts.itemsize
    raw = counts.tobytes()
    zero = bytes(size)
    at = raw.find(zero, start * size)
    while at >= 0 and at % size:
        at = raw.find(zero, at + 1)
    return at // size if at >= 0 else -1


class Refcounts:
    """The refcounts of one image open for writing. Cluster indices and byte offsets are of the host file."""

    def __init__(
        self, file: ImageFile, geometry: Geometry, table: array[int], cache_bytes: int, *, discard_other: bool = False
    ) -> None:
        self.file = file
        self.geometry = geometry
        self.table = table
        self.table_host = file.header.refcount_table_offset
        self.moved_table = False
        """The table has a new place that the header on disk does not know of yet."""
        self.dirty_sectors: set[int] = set()
        self.codec = RefcountCodec(geometry.refcount_order)
        self.empty: Callable[[Freed], Awaitable[None]] | None = None
        """Discards in the file what clusters held that keep their places (`Freed`)."""
        self.discard_other = discard_other
        """Clusters that become free otherwise than by a guest's discard are discarded in the file too."""
        self.hint = 0
        """No cluster below this index is free, as far as known."""
        self.pending: list[Freed] = []
        """Clusters that lost a reference in memory; they are released once that is durable (`writeback.py`)."""
        self.packed_end = 0
        """File offset of the room left in a host cluster of compressed data (`packing.py`); 0 when there is none."""
        self.structure = asyncio.Lock()
        slice_bytes = min(SLICE_BYTES, geometry.cluster_size)
        self._slice_bits = (slice_bytes * 8 >> geometry.refcount_order).bit_length() - 1
        self._slice_bytes = slice_bytes
        self.cache = TableCache(
            cache_bytes // slice_bytes,
            entries_per_sector=SECTOR * 8 >> geometry.refcount_order,
            encode=self.codec.encode,
        )

    # ------------------------------------------------------------------------------------------------- look-up

    def block_offset(self, block: int) -> int:
        """File offset of a refcount block, 0 when there is none; the entry must be valid (see `bad_table_entry`)."""
        return self.table[block] & REFCOUNT_TABLE_OFFSET_MASK if block < len(self.table) else 0

    async def _checked_block(self, block: int) -> int:
        offset = self.block_offset(block)
        if offset and (
            offset & (self.geometry.cluster_size - 1)
            or self.table[block] & REFCOUNT_TABLE_RESERVED
            or offset + self.geometry.cluster_size > self.file.length()
        ):
            await self.file.fatal(f"refcount table entry {block} is {self.table[block]:#x}", offset)
        return offset

    async def _load(self, key: int, block_offset: int) -> None:
        within = (key << self._slice_bits) & ((1 << self.geometry.block_bits) - 1)
        self.file.event("refblock_load")
        await self.cache.load(key, block_offset + (within << self.geometry.refcount_order >> 3), self._read_slice)

    async def _read_slice(self, host: int) -> array[int]:
        return self.codec.decode(await self.file.read(host, self._slice_bytes))

    # ---------------------------------------------------------------------------------------------- allocation

    async def add_user(self, packed_end: int) -> bool:
        """Count one more user of the host cluster with room from ``packed_end`` on; False if it has none any more."""
        cluster = packed_end >> self.geometry.cluster_bits
        cached = await self._slice_of(cluster)
        if self.packed_end != packed_end:
            return False
        at = cluster & ((1 << self._slice_bits) - 1)
        if cached.entries[at] >= self.geometry.max_refcount:
            self.packed_end = 0
            return False
        cached.entries[at] += 1
        self.cache.mark_dirty(cached, at, at + 1)
        return True

    async def allocate(self, count: int, *, for_table: bool = False) -> Claim:
        """Claim up to ``count`` adjacent free clusters (at least one). ``BlockIOError(EFBIG)`` when the format has no more.

        ``for_table``: an L2 table must not lie at the beginning of the file, whatever is protected.
        """
        self.file.event("cluster_alloc")
        return await self._claim(None, count, for_table=for_table)

    async def allocate_contiguous(self, count: int) -> Claim:
        """Claim exactly ``count`` adjacent clusters, for a table."""
        self.file.event("cluster_alloc")
        if count > 1 << (self.geometry.block_bits - 1):
            async with self.structure:
                return Claim(await self._add_region(count) << self.geometry.cluster_bits, count, False)
        start, got, virgin = self.hint, 0, True
        while got < count:
            piece = await self._claim(start + got, count - got)
            first = piece.host >> self.geometry.cluster_bits
            if first != start + got:
                if got:
                    await self.release([Freed(start, got, False)])
                start, got, virgin = first, 0, True
            got += piece.clusters
            virgin = virgin and piece.virgin
        return Claim(start << self.geometry.cluster_bits, count, virgin)

    async def _claim(self, position: int | None, count: int, *, for_table: bool = False) -> Claim:
        """Claim free clusters at or behind ``position``; None: wherever the hint is by then, which is moved along."""
        at_hint = position is None
        slice_clusters = 1 << self._slice_bits
        while True:
            if self.structure.locked():
                async with self.structure:
                    continue
            where = self.hint if at_hint or position is None else position
            base = where & -slice_clusters
            cached = self.cache.get(where >> self._slice_bits)
            if cached is None:
                await self._provide(where)
                continue
            at = find_free(cached.entries, where - base)
            if at < 0:
                position = base + slice_clusters
                if at_hint:
                    self.hint = position
                continue
            got = constant_run(cached.entries, at, min(count, slice_clusters - at))
            cached.entries[at : at + got] = array(self.codec.typecode, [1]) * got
            self.cache.mark_dirty(cached, at, at + got)
            if where == self.hint:
                self.hint = base + at + got
            return await self._checked_claim(base + at, got, for_table=for_table)

    async def _provide(self, cluster: int) -> None:
        """Load the slice that covers ``cluster``, or make its block."""
        block = cluster >> self.geometry.block_bits
        offset = await self._checked_block(block)
        if offset:
            await self._load(cluster >> self._slice_bits, offset)
        else:
            await self._add_block(cluster)

    async def _checked_claim(self, first: int, got: int, *, for_table: bool) -> Claim:
        file, bits = self.file, self.geometry.cluster_bits
        host, end = first << bits, (first + got) << bits
        virgin = host >= file.virgin
        file.virgin = max(file.virgin, end)
        if for_table and not first:
            await file.fatal("the header's cluster is counted as free")
        if file.overlaps(host, end - host):
            # A refcount that says "free" of metadata is damage; using the cluster would destroy more.
            await file.check_overlap(host, end - host)
        return Claim(host, got, virgin)

    # ------------------------------------------------------------------------------------------------ structure

    async def _add_block(self, cluster: int) -> None:
        """Make the refcount block that covers ``cluster``, at that cluster itself."""
        block = cluster >> self.geometry.block_bits
        async with self.structure:
            if self.block_offset(block):
                return
            if block >= len(self.table):
                await self._add_region(0)
                return
            host = cluster << self.geometry.cluster_bits
            self.file.event("refblock_alloc")
            self.file.virgin = max(self.file.virgin, host + self.geometry.cluster_size)
            await self.file.check_overlap(host, self.geometry.cluster_size)
            self.file.event("refblock_alloc_write")
            await self._write_zero_blocks(host, 1)
            self._link_block(block, host)
            self._count_fresh(cluster, cluster + 1)
            if self.hint == cluster:
                self.hint = cluster + 1

    async def _add_region(self, extra: int) -> int:
        """Open up an area behind everything: new refcount blocks for it, a bigger table when needed, and ``extra`` clusters.

        The caller holds ``structure``. Returns the first of the ``extra`` clusters, which are claimed.
        """
        bits = self.geometry.cluster_bits
        base, blocks, clusters = self._plan_region(extra)
        end = base + blocks + clusters + extra
        self.file.event("refblock_alloc_write_blocks")
        await self._write_zero_blocks(base << bits, blocks)
        # From here on nothing waits: the new structure appears in memory at once.
        self.file.virgin = max(self.file.virgin, end << bits)
        if clusters:
            self._move_table(base + blocks, clusters)
        for i in range(blocks):
            self._link_block((base >> self.geometry.block_bits) + i, (base + i) << bits)
        self._count_fresh(base, end)
        return end - extra

    def _plan_region(self, extra: int) -> tuple[int, int, int]:
        """First cluster, number of new blocks, clusters of a bigger table (0: it is big enough) of an area in missing blocks."""
        geometry = self.geometry
        first_block = -(-self.file.virgin >> (geometry.cluster_bits + geometry.block_bits))
        while first_block < len(self.table) and any(self.table[first_block:]):
            first_block += 1
        if not extra:
            first_block = max(first_block, len(self.table))
        blocks, clusters = 1, 0
        while True:
            if first_block + blocks > len(self.table):
                entries = max(first_block + blocks, len(self.table) + len(self.table) // 2)
                clusters = min(-(-entries * 8 >> geometry.cluster_bits), MAX_REFCOUNT_TABLE_BYTES >> geometry.cluster_bits)
                if first_block + blocks > clusters << (geometry.cluster_bits - 3):
                    raise BlockIOError(errno.EFBIG, "the refcount table has reached the size limit of the format")
            needed = -(-(blocks + clusters + extra) >> geometry.block_bits)
            if needed <= blocks:
                return first_block << geometry.block_bits, blocks, clusters
            blocks = needed

    def _move_table(self, first: int, clusters: int) -> None:
        bits = self.geometry.cluster_bits
        old_first, old_clusters = self.table_host >> bits, len(self.table) >> (bits - 3)
        self.table.extend(zeroes_u64((clusters << (bits - 3)) - len(self.table)))
        self.table_host = first << bits
        self.moved_table = True
        self.pending.append(Freed(old_first, old_clusters, self.discard_other))
        if self.file.metadata is not None:
            self.file.metadata.remove(Area.REFCOUNT_TABLE, range(old_first, old_first + old_clusters))
            self.file.metadata.add(Area.REFCOUNT_TABLE, range(first, first + clusters))

    async def _write_zero_blocks(self, host: int, count: int) -> None:
        size = self.geometry.cluster_size
        self.file.virgin = max(self.file.virgin, host + count * size)
        for i in range(count):
            await self.file.write_table(host + i * size, zero_view(size))

    def _link_block(self, block: int, host: int) -> None:
        self.table[block] = host
        self.dirty_sectors.add(block // _ENTRIES_PER_TABLE_SECTOR)
        if self.file.metadata is not None:
            self.file.metadata.add_one(Area.REFCOUNT_BLOCK, host >> self.geometry.cluster_bits)

    def unlink_block(self, block: int) -> None:
        """Forget a block that counts nothing. The caller holds ``structure`` until that is durable."""
        self.table[block] = 0
        self.dirty_sectors.add(block // _ENTRIES_PER_TABLE_SECTOR)
        slices_shift = self.geometry.block_bits - self._slice_bits
        self.cache.forget(range(block << slices_shift, (block + 1) << slices_shift))

    def overlaid(self, block: int, counts: array[int]) -> array[int]:
        """The counts of a block as the file has them, brought up to date with what is cached."""
        size = 1 << self._slice_bits
        first = block << (self.geometry.block_bits - self._slice_bits)
        for at in range(0, len(counts), size):
            if (cached := self.cache.get(first + at // size)) is not None:
                counts[at : at + size] = cached.entries
        return counts

    def _count_fresh(self, first: int, end: int) -> None:
        """Count 1 for clusters whose blocks were just made: their slices are zeroes, and none is cached."""
        while first < end:
            key = first >> self._slice_bits
            at = first & ((1 << self._slice_bits) - 1)
            cached = self.cache.get(key)
            if cached is None:
                within = (key << self._slice_bits) & ((1 << self.geometry.block_bits) - 1)
                host = self.block_offset(first >> self.geometry.block_bits) + (within << self.geometry.refcount_order >> 3)
                zeroes = array(self.codec.typecode, bytes((1 << self._slice_bits) * array(self.codec.typecode).itemsize))
                cached = self.cache.insert(key, zeroes, host)
            count = min(end - first, (1 << self._slice_bits) - at)
            cached.entries[at : at + count] = array(self.codec.typecode, [1]) * count
            self.cache.mark_dirty(cached, at, at + count)
            first += count

    # -------------------------------------------------------------------------------------------------- release

    async def release(self, freed: list[Freed]) -> None:
        """Lower counts by one. What reaches zero may be claimed again at once, after the file got its discard."""
        slice_clusters = 1 << self._slice_bits
        self.file.event("cluster_free")
        for run in freed:
            first, count, pass_discard, guest = run
            if guest is not None:
                assert self.empty is not None, "there are places to keep"
                await self.empty(run)
                continue
            while count:
                key = first >> self._slice_bits
                at = first & (slice_clusters - 1)
                part = min(count, slice_clusters - at)
                await self._release_in_slice(key, at, part, pass_discard=pass_discard)
                first += part
                count -= part

    async def _release_in_slice(self, key: int, at: int, count: int, *, pass_discard: bool) -> None:
        first, bits = (key << self._slice_bits) + at, self.geometry.cluster_bits
        if first <= self.packed_end >> bits < first + count:
            # The cluster may get other content from here on.
            self.packed_end = 0
        if pass_discard:
            counts = (await self._slice_of(first)).entries
            alone = constant_run(counts, at, count) if counts[at] == 1 else 0
            if alone:
                # While the count is still 1 nobody else can be given the clusters. A shared run is left as it is.
                await requests.discard(self.file.edge, first << bits, alone << bits)
        cached = await self._slice_of(first)
        counts = cached.entries
        ones = array(self.codec.typecode, [1]) * count
        if counts[at : at + count] == ones:
            counts[at : at + count] = array(self.codec.typecode, bytes(count * counts.itemsize))
        else:
            for i in range(at, at + count):
                if not counts[i]:
                    await self.file.fatal("a cluster in use has the refcount 0", (first + i - at) << bits)
                counts[i] -= 1
        self.cache.mark_dirty(cached, at, at + count)
        # What became free lies at or behind `first`.
        self.hint = min(self.hint, first)

    async def _slice_of(self, cluster: int) -> CachedTable:
        """The cached slice that covers a cluster in use. The caller must not wait before it has used it."""
        key = cluster >> self._slice_bits
        while (cached := self.cache.get(key)) is None:
            offset = await self._checked_block(cluster >> self.geometry.block_bits)
            if not offset:
                await self.file.fatal(f"cluster {cluster} is in use, but has no refcount block")
            await self._load(key, offset)
        return cached

    # -------------------------------------------------------------------------------------------------- writing

    def take_table(self) -> tuple[list[tuple[int, memoryview]], bool]:
        """Snapshot of what must be written of the refcount table, as (offset, bytes), and whether the header must be switched."""
        moved, self.moved_table = self.moved_table, False
        if moved:
            self.dirty_sectors.clear()
            return [(self.table_host, encode_u64(self.table[:]))], True
        parts = []
        for sector in sorted(self.dirty_sectors):
            first = sector * _ENTRIES_PER_TABLE_SECTOR
            parts.append((self.table_host + first * 8, encode_u64(self.table[first : first + _ENTRIES_PER_TABLE_SECTOR])))
        self.dirty_sectors.clear()
        return parts, False

    def give_back_table(self, sectors: set[int], *, moved: bool) -> None:
        """Whether these sectors of the table are in the file is not known, nor whether the header was switched."""
        self.dirty_sectors |= sectors
        self.moved_table |= moved

    @property
    def is_dirty(self) -> bool:
        """Something is not written yet."""
        return bool(self.cache.dirty or self.dirty_sectors or self.moved_table)


async def read_refcount_table(file: ImageFile) -> array[int]:
    """The refcount table of an image, whole (at most 8 MiB)."""
    header = file.header
    raw = await file.read(header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits)
    return decode_u64(raw)


def block_clusters(table: array[int], cluster_bits: int) -> list[int]:
    """Cluster indices of all refcount blocks of a table."""
    return [entry >> cluster_bits for entry in table if entry]
