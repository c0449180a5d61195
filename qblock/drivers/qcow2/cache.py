"""A bounded cache of metadata tables (L2 slices, refcount slices) with write-back.

Models QEMU's qcow2 metadata cache (``l2-cache-size``, ``refcount-cache-size``, ``cache-clean-interval``). It differs in what a
dirty table is: writing back takes a *snapshot* of the dirty parts of all tables at one instant (`take_dirty`), and the order
of effects is settled over snapshots by `writeback.py`; tables may be changed again while a snapshot is on its way to the disk.

Invariants: a table is evicted only while it is clean and no snapshot of it is being written, so that loading it again cannot
read an older state. Two loads of one table never run at the same time. ``tables`` may be looked up directly by hot paths,
which then set ``used`` (second chance for eviction).
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Iterator

import attrs

SECTOR = 512
"""Tables are written in whole sectors: a torn write leaves each sector old or new."""


@attrs.define(eq=False, slots=True)
class CachedTable:
    """One cached table. ``host`` is its file offset in bytes; entries ``first_dirty`` to ``end_dirty`` are not on disk yet."""

    key: int
    entries: array[int]
    host: int
    first_dirty: int = 0
    end_dirty: int = 0
    writing: int = 0
    used: bool = True


@attrs.frozen(slots=True)
class DirtyPart:
    """A snapshot of entries ``first`` to ``end`` of a table: ``data`` (bytes in file order) belongs at file offset ``offset``."""

    table: CachedTable
    first: int
    end: int
    offset: int
    data: memoryview


class TableCache:
    """Tables by key. When there are more than ``capacity`` since no other is clean, it is `crowded` and must be written back."""

    def __init__(
        self, capacity: int, *, entries_per_sector: int, encode: Callable[[array[int]], memoryview], sector: int = SECTOR
    ) -> None:
        self.capacity = max(capacity, 2)
        self.tables: dict[int, CachedTable] = {}
        self.dirty: dict[int, CachedTable] = {}
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._per_sector = entries_per_sector
        self._encode = encode
        self._sector = sector

    def get(self, key: int) -> CachedTable | None:
        """The table if it is cached."""
        table = self.tables.get(key)
        if table is not None:
            table.used = True
        return table

    async def load(self, key: int, host: int, read: Callable[[int], Awaitable[array[int]]]) -> None:
        """Bring a table into the cache. It may be gone again, or be a newer one, when the caller runs: look it up again."""
        waiting = self._loading.get(key)
        if waiting is not None:
            await asyncio.shield(waiting)
            return
        future = self._loading[key] = asyncio.get_running_loop().create_future()
        try:
            entries = await read(host)
            if key not in self.tables:
                self.insert(key, entries, host)
        finally:
            del self._loading[key]
            future.set_result(None)

    def insert(self, key: int, entries: array[int], host: int) -> CachedTable:
        """Put a table in, evicting clean ones when there is no room."""
        if len(self.tables) >= self.capacity:
            self._evict()
        table = self.tables[key] = self.make_table(key, entries, host)
        return table

    def make_table(self, key: int, entries: array[int], host: int) -> CachedTable:
        """A table with the content that its place ``host`` in the file has, or would have."""
        return CachedTable(key, entries, host)

    def _evict(self) -> None:
        for _ in range(2 * len(self.tables)):
            key = next(iter(self.tables))
            table = self.tables.pop(key)
            if not (table.used or table.writing or table.end_dirty):
                if len(self.tables) < self.capacity:
                    return
                continue
            table.used = False
            self.tables[key] = table

    def stored_bytes(self) -> int:
        """What the cached tables take in the file."""
        return sum(len(table.entries) for table in self.tables.values()) * self._sector // self._per_sector

    @property
    def crowded(self) -> bool:
        """There was no clean table to evict any more: time to write back."""
        return len(self.tables) > self.capacity and bool(self.dirty)

    def mark_dirty(self, table: CachedTable, first: int, end: int) -> None:
        """Entries ``first`` to ``end`` (exclusive) of a cached table were changed."""
        if table.end_dirty:
            table.first_dirty = min(table.first_dirty, first)
            table.end_dirty = max(table.end_dirty, end)
        else:
            table.first_dirty, table.end_dirty = first, end
            self.dirty[table.key] = table

    def take_dirty(self) -> list[DirtyPart]:
        """Snapshot all dirty parts, in file order; the tables count as clean, but stay until `settle`."""
        parts = []
        per_sector = self._per_sector
        for table in self.dirty.values():
            first = table.first_dirty // per_sector * per_sector
            end = min(-(-table.end_dirty // per_sector) * per_sector, len(table.entries))
            table.first_dirty = table.end_dirty = 0
            table.writing += 1
            data = self.encode_part(table, first, end)
            parts.append(DirtyPart(table, first, end, table.host + first // per_sector * self._sector, data))
        self.dirty.clear()
        parts.sort(key=_file_order)
        return parts

    def encode_part(self, table: CachedTable, first: int, end: int) -> memoryview:
        """Entries ``first`` to ``end`` (exclusive) of a table as the file holds them."""
        return self._encode(table.entries[first:end])

    @staticmethod
    def settle(parts: list[DirtyPart]) -> None:
        """These snapshots are in the file: the tables may be evicted again."""
        for part in parts:
            part.table.writing -= 1

    def give_back(self, parts: list[DirtyPart]) -> None:
        """Whether these snapshots are in the file is not known: they count as dirty again, but for tables that are void now."""
        self.settle(parts)
        for part in parts:
            if self.tables.get(part.table.key) is part.table:
                self.mark_dirty(part.table, part.first, part.end)

    def discard_clean(self, *, unused_only: bool = False) -> None:
        """Drop tables that need not be written, to give back memory (all, or those not used since the last call)."""
        for key in list(self.tables):
            table = self.tables[key]
            if table.writing or table.end_dirty or (unused_only and table.used):
                table.used = False
            else:
                del self.tables[key]

    def forget(self, keys: Iterator[int] | range) -> None:
        """Drop tables whose content is void, dirty or not."""
        for key in keys:
            if (table := self.tables.pop(key, None)) is not None:
                self.dirty.pop(key, None)
                table.end_dirty = 0


def _file_order(part: DirtyPart) -> int:
    return part.offset
