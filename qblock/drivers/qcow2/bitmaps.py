"""Persistent bitmaps of an open image: loaded, marked as in use before the first write, and stored again at the end.

Models image-formats.md section 1.10. A bitmap lives in the node's ``dirty_bitmaps`` while the image is open; the file keeps what
it was when the image was opened. The order of effects makes a bitmap of the file either true or unusable at every moment:

* Before anything is written, every directory entry gets its in-use flag, in place. The flags of a directory may reach the
  medium one sector before the other: nothing was written by then that a bitmap could have missed.
* At the end all bitmaps go to fresh clusters, data and tables and a new directory; when these and their refcounts are durable
  the header is switched to the new directory in one sector, and when that is durable the old clusters are released. A crash
  before the switch leaves bitmaps that are in use, which means that nobody may use them (*inconsistent*); a crash behind it
  leaks clusters.

Bitmaps that were inconsistent when they were loaded are never used: they stay as they are until somebody removes them.
Differs from QEMU: marking does not take the autoclear bit away for a moment, so a crash loses no bitmap; a bitmap that a job
or an export is still using is stored with what was recorded since; bitmaps that refer to more clusters than the file has, or
than it can have in so little space, are refused, so that reading them takes no longer than reading the file.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Final

import attrs

from qblock.dirty import DirtyBitmap
from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.bitmap_directory import (
    ALL_ONES,
    AUTO,
    EXTRA_COMPATIBLE,
    IN_USE,
    MAX_BITMAPS,
    MAX_DIRECTORY,
    TABLE_RESERVED,
    BitmapEntry,
    Directory,
    encode_directory,
    parse_directory,
    parse_extension,
    table_entries,
    why_not_storable,
)
from qblock.drivers.qcow2.header import Extension, Header
from qblock.drivers.qcow2.layout import OFFSET_MASK, decode_u64, encode_u64, zeroes_u64
from qblock.drivers.qcow2.refcounts import Freed
from qblock.drivers.qcow2.storage import Area
from qblock.errors import BlockIOError, CommandError, CorruptImage
from qblock.units import MiB, align_up

if TYPE_CHECKING:
    from qblock.drivers.qcow2.refcounts import Refcounts
    from qblock.drivers.qcow2.storage import ImageFile
    from qblock.drivers.qcow2.writeback import WriteBack
    from qblock.node import BlockDriverState

_READ_STEP: Final = MiB
"""Bytes of a bitmap that are read and decoded at a time; a multiple of every cluster size but the largest."""
_WRITE_STEP: Final = MiB
_EMPTY: Final = zeroes_u64(512)
_HOLES: Final = 256 * MiB
"""Bytes of bitmaps that may lie in holes of the file."""
_PACKED: Final = 64
"""A file system that compresses may show so many times what it takes."""


def has_bitmaps(header: Header) -> bool:
    """Does the header refer to a directory of bitmaps that is still true?"""
    return header.has(head.BITMAPS) and header.extension(head.EXT_BITMAPS) is not None


def with_bitmaps(header: Header, directory: Directory | None) -> Header:
    """The header with another directory, or without bitmaps."""
    rest = tuple(ext for ext in header.extensions if ext.kind != head.EXT_BITMAPS)
    if directory is None:
        return attrs.evolve(header, extensions=rest, autoclear=header.autoclear & ~head.BITMAPS.mask)
    extension = Extension(head.EXT_BITMAPS, directory.encode())
    return attrs.evolve(header, extensions=(*rest, extension), autoclear=header.autoclear | head.BITMAPS.mask)


async def read_directory(file: ImageFile) -> tuple[Directory | None, tuple[BitmapEntry, ...]]:
    """The directory that the header refers to, with its entries; raises `CorruptImage`."""
    data = file.header.extension(head.EXT_BITMAPS)
    if data is None or not file.header.has(head.BITMAPS):
        return None, ()
    size = file.header.cluster_size
    directory = parse_extension(data, size, file.length(), file.name)
    raw = await file.read(directory.offset, directory.size)
    entries = parse_directory(raw, directory.count, size, file.name)
    if sum(entry.table_entries for entry in entries) * 8 > _reading_budget(file):
        raise _too_much(file)
    return directory, entries


def bad_table_entry(entry: int, cluster_size: int) -> bool:
    """Is this entry of a bitmap's table against the format?"""
    offset = entry & OFFSET_MASK
    return bool(entry & TABLE_RESERVED or offset & (cluster_size - 1) or (offset and entry & ALL_ONES))


class BitmapStore:
    """The bitmaps of one open image. ``entries`` are the directory as the file has it."""

    def __init__(self, node: BlockDriverState) -> None:
        self.node = node
        self.directory: Directory | None = None
        self.entries: tuple[BitmapEntry, ...] = ()
        self._changing: asyncio.Lock | None = None
        """Held while the directory is replaced."""

    # ------------------------------------------------------------------------------------------------------- looking

    @property
    def unmarked(self) -> bool:
        """The file says of some bitmap that it is true, which the next write may change."""
        return any(not entry.in_use for entry in self.entries)

    def to_store(self) -> list[DirtyBitmap]:
        """The node's bitmaps that belong into the file, oldest first."""
        return [
            bitmap
            for bitmap in self.node.dirty_bitmaps
            if bitmap.persistent and not bitmap.inconsistent and not bitmap.readonly
        ]

    @property
    def has_work(self) -> bool:
        """Storing would change the file."""
        present = {bitmap.name for bitmap in self.node.dirty_bitmaps if bitmap.persistent}
        return bool(self.to_store()) or any(entry.name not in present for entry in self.entries)

    def info(self) -> list[dict[str, object]]:
        """``Qcow2BitmapInfo`` of what the file has."""
        flags = ((IN_USE, "in-use"), (AUTO, "auto"))
        return [
            {
                "flags": [name for mask, name in flags if entry.flags & mask],
                "name": entry.name,
                "granularity": 1 << entry.granularity_bits,
            }
            for entry in self.entries
        ]

    def check_new(self, bitmap: DirtyBitmap, version: int) -> None:
        """Raise `CommandError` when one more bitmap could not be stored."""
        reason = why_not_storable(bitmap.size, bitmap.granularity)
        if version < 3:
            reason = "images of version 2 (compat 0.10) have no bitmaps"
        names = {entry.name for entry in self.entries}
        names |= {other.name or "" for other in self.to_store()}
        if len(names) >= MAX_BITMAPS:
            reason = f"the image has {MAX_BITMAPS} bitmaps already"
        if reason:
            raise CommandError(f"Bitmap '{bitmap.name}' cannot be persistent in '{self.node.node_name}': {reason}")

    def check_resize(self, size: int) -> None:
        """Raise ``BlockIOError(ENOTSUP)`` when a bitmap stands in the way of a disk of ``size`` bytes."""
        for bitmap in self.node.dirty_bitmaps:
            if not bitmap.persistent:
                continue
            if bitmap.inconsistent:
                raise BlockIOError(errno.ENOTSUP, f"Bitmap '{bitmap.name}' is inconsistent: remove it before resizing the disk")
            reason = why_not_storable(size, bitmap.granularity)
            if reason is not None:
                raise BlockIOError(errno.ENOTSUP, f"Bitmap '{bitmap.name}' could not be stored with that size: {reason}")

    # ------------------------------------------------------------------------------------------------------- loading

    async def load(self, file: ImageFile, size: int) -> None:
        """Read everything, and put the bitmaps on the node; ``size`` is the disk's. Raises `CorruptImage`, `BlockIOError`."""
        await self.reread(file)
        budget = _reading_budget(file)
        loaded = []
        for entry in self.entries:
            bitmap = DirtyBitmap(
                align_up(size, 512),
                1 << entry.granularity_bits,
                entry.name,
                enabled=entry.auto and entry.usable,
                persistent=True,
                inconsistent=not entry.usable,
                readonly=self.node.read_only,
            )
            if entry.usable:
                budget -= await _load_bits(file, entry, bitmap, budget)
            loaded.append(bitmap)
        self.node.dirty_bitmaps += loaded

    async def reread(self, file: ImageFile) -> None:
        """Look again at what the file says; the node's bitmaps stay as they are."""
        self.directory, self.entries = await read_directory(file)

    # ------------------------------------------------------------------------------------------------------- writing

    async def mark(self, file: ImageFile) -> None:
        """Note in the file that its bitmaps are not kept up to date from now on. Durable on return."""
        async with self._lock():
            if self.directory is None or not self.unmarked:
                return
            entries = tuple(attrs.evolve(entry, flags=entry.flags | IN_USE) for entry in self.entries)
            await file.write_table(self.directory.offset, memoryview(encode_directory(entries)))
            await file.flush()
            self.entries = entries

    async def store(self, file: ImageFile, refcounts: Refcounts, writeback: WriteBack) -> None:
        """Bring the file's bitmaps up to date with the node's; durable on return. Raises `BlockIOError`: then they are not."""
        async with self._lock():
            if not self.has_work:
                return
            writer = _Writer(file, refcounts)
            try:
                entries = await self._write_all(writer)
                directory = await writer.directory(entries)
                await self._switch(file, refcounts, writeback, directory=directory, entries=entries)
            except BlockIOError:
                await writer.undo()
                raise

    async def forget(self, name: str, file: ImageFile, refcounts: Refcounts, writeback: WriteBack) -> None:
        """Take one bitmap out of the file; durable on return."""
        async with self._lock():
            entries = tuple(entry for entry in self.entries if entry.name != name)
            if len(entries) == len(self.entries):
                return
            writer = _Writer(file, refcounts)
            try:
                directory = await writer.directory(entries)
                await self._switch(file, refcounts, writeback, directory=directory, entries=entries)
            except BlockIOError:
                await writer.undo()
                raise

    def _lock(self) -> asyncio.Lock:
        if self._changing is None:
            self._changing = asyncio.Lock()
        return self._changing

    async def _write_all(self, writer: _Writer) -> tuple[BitmapEntry, ...]:
        """Write data and tables of all bitmaps that are to be stored; gives the new directory entries in file order."""
        stored = {bitmap.name: bitmap for bitmap in self.to_store()}
        kept = {bitmap.name for bitmap in self.node.dirty_bitmaps if bitmap.persistent and bitmap.inconsistent}
        entries = []
        for entry in self.entries:
            if (bitmap := stored.pop(entry.name, None)) is not None:
                extra, flags = entry.extra, entry.flags & EXTRA_COMPATIBLE
                entries.append(attrs.evolve(await writer.bitmap(bitmap, flags), extra=extra))
            elif entry.name in kept:
                entries.append(entry)
        for bitmap in reversed(stored.values()):
            entries.append(await writer.bitmap(bitmap, 0))
        return tuple(entries)

    async def _switch(
        self,
        file: ImageFile,
        refcounts: Refcounts,
        writeback: WriteBack,
        *,
        directory: Directory | None,
        entries: tuple[BitmapEntry, ...],
    ) -> None:
        """Make the header refer to what was written, then release what only the old directory referred to."""
        old_directory, old_entries = self.directory, self.entries
        gone = [entry for entry in old_entries if entry not in entries]
        freed = [run for entry in gone for run in await _released(file, entry)]
        await writeback.finish()
        await writeback.rewrite_header(lambda header: with_bitmaps(header, directory))
        self.directory, self.entries = directory, entries
        bits, metadata = file.header.cluster_bits, file.metadata
        if old_directory is not None:
            first, count = old_directory.offset >> bits, -(-old_directory.size >> bits)
            freed.append((first, count))
            if metadata is not None:
                metadata.remove(Area.BITMAP_DIRECTORY, range(first, first + count))
        if directory is not None and metadata is not None:
            metadata.add_bytes(Area.BITMAP_DIRECTORY, directory.offset, directory.size)
        refcounts.pending += [Freed(first, count, refcounts.discard_other) for first, count in freed]
        await writeback.finish()


# ---------------------------------------------------------------------------------------------------------------- reading


def _reading_budget(file: ImageFile) -> int:
    """Bytes that all bitmaps together may take in the file: no more than it has. Holes of a file count little."""
    allocated = file.edge.node.driver.allocated_size()
    return file.length() if allocated is None else min(file.length(), _HOLES + _PACKED * allocated)


async def _read_table(file: ImageFile, entry: BitmapEntry) -> array[int]:
    """The table of a bitmap; raises `CorruptImage`."""
    size = file.header.cluster_size
    if entry.table_offset + entry.table_entries * 8 > file.length():
        raise CorruptImage(file.name, f"the table of bitmap '{entry.name}' lies behind the end of the file")
    table = decode_u64(await file.read(entry.table_offset, entry.table_entries * 8))
    for place, word in _present(table):
        if bad_table_entry(word, size):
            raise CorruptImage(file.name, f"entry {place} of the table of bitmap '{entry.name}' is damaged: {word:x}")
    return table


def _present(table: array[int]) -> Iterator[tuple[int, int]]:
    """Index and value of the entries that are not 0; most tables are nearly empty."""
    for start in range(0, len(table), len(_EMPTY)):
        part = table[start : start + len(_EMPTY)]
        if part != _EMPTY:
            yield from ((place, word) for place, word in enumerate(part, start) if word)


async def _load_bits(file: ImageFile, entry: BitmapEntry, bitmap: DirtyBitmap, budget: int) -> int:
    """Fill a bitmap from the file; returns the bytes that its table and data take there, at most ``budget``."""
    size = file.header.cluster_size
    reason = why_not_storable(bitmap.size, bitmap.granularity)
    if reason is not None or entry.table_entries != table_entries(bitmap.size, entry.granularity_bits, size):
        raise CorruptImage(
            file.name, f"bitmap '{entry.name}' has a table of {entry.table_entries} entries, which does not fit the disk"
        )
    taken = entry.table_entries * 8
    if taken > budget:
        raise _too_much(file)
    table = await _read_table(file, entry)
    taken += sum(1 for _, word in _present(table) if word & OFFSET_MASK) * size
    if taken - size > budget:  # the last cluster of the file need not be there to its end
        raise _too_much(file)
    step = max(_READ_STEP // size, 1)
    for first in range(0, len(table), step):
        await _load_step(file, bitmap, table[first : first + step], first * size)
    return taken


def _too_much(file: ImageFile) -> CorruptImage:
    return CorruptImage(file.name, "its bitmaps refer to more clusters than the file has")


async def _load_step(file: ImageFile, bitmap: DirtyBitmap, words: array[int], at: int) -> None:
    """Take over the bits of some clusters; ``at`` is where they begin, in bytes of the bitmap."""
    size = file.header.cluster_size
    raw: bytearray | None = None
    for place, word in _present(words):
        if not word & OFFSET_MASK:
            granule = (at + place * size) * 8
            bitmap.mark(granule * bitmap.granularity, size * 8 * bitmap.granularity)
            continue
        if raw is None:
            raw = bytearray(len(words) * size)
        raw[place * size : (place + 1) * size] = await file.read(word & OFFSET_MASK, size)
    if raw is not None:
        bitmap.load_bytes(at * 8, raw)


async def bitmap_clusters(file: ImageFile, entry: BitmapEntry) -> AsyncIterator[tuple[int, int]]:
    """The clusters of a stored bitmap, table and data, as runs of (first, count); raises `CorruptImage`."""
    bits = file.header.cluster_bits
    table = await _read_table(file, entry)
    yield entry.table_offset >> bits, -(-entry.table_entries * 8 >> bits)
    for run in _runs((word & OFFSET_MASK) >> bits for word in table if word & OFFSET_MASK):
        yield run


async def _released(file: ImageFile, entry: BitmapEntry) -> list[tuple[int, int]]:
    """The clusters that become free with a stored bitmap. None when it is damaged: they stay leaked."""
    end = -(-file.length() >> file.header.cluster_bits)
    try:
        return [(first, count) async for first, count in bitmap_clusters(file, entry) if first + count <= end]
    except CorruptImage as error:
        file.env.warn(f"{error}; its clusters are not released")
        return []


def _runs(clusters: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Adjacent ascending clusters as (first, count)."""
    first = count = 0
    for cluster in clusters:
        if count and cluster == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = cluster, 1
    if count:
        yield first, count


# ---------------------------------------------------------------------------------------------------------------- writing


class _Writer:
    """Writes what nothing refers to yet into fresh clusters, and can give all of it back."""

    def __init__(self, file: ImageFile, refcounts: Refcounts) -> None:
        self.file = file
        self.refcounts = refcounts
        self.claimed: list[Freed] = []

    async def undo(self) -> None:
        """Give back what was claimed, unless the file is not writable any more."""
        claimed, self.claimed = self.claimed, []
        if self.file.writable:
            await self.refcounts.release(claimed)

    async def directory(self, entries: tuple[BitmapEntry, ...]) -> Directory | None:
        """Write a directory; None when there is nothing to be in it."""
        if not entries:
            return None
        raw = encode_directory(entries)
        if len(raw) > MAX_DIRECTORY:
            raise BlockIOError(errno.ENOSPC, f"the directory of {len(entries)} bitmaps is larger than the format allows")
        return Directory(len(entries), len(raw), await self._table(raw))

    async def bitmap(self, bitmap: DirtyBitmap, flags: int) -> BitmapEntry:
        """Write data and table of one bitmap."""
        reason = why_not_storable(bitmap.size, bitmap.granularity)
        if reason is not None:
            raise BlockIOError(errno.EFBIG, f"bitmap '{bitmap.name}' cannot be stored: {reason}")
        bits = bitmap.granularity.bit_length() - 1
        recording = bitmap.recording
        content = _frozen(bitmap)
        table = zeroes_u64(table_entries(content.size, bits, self.file.header.cluster_size))
        for places in _dirty_pieces(content, self.file.header.cluster_size):
            await self._data(content, places, table)
        count, offset = len(table), await self._table(encode_u64(table))
        return BitmapEntry(bitmap.name or "", offset, count, bits, flags | (AUTO if recording else 0))

    async def _data(self, content: DirtyBitmap, places: list[int], table: array[int]) -> None:
        """Write the clusters ``places`` of the bitmap, and enter them in the table."""
        size = self.file.header.cluster_size
        raw = bytearray(len(places) * size)
        for index, place in enumerate(places):
            piece = content.to_bytes(place * size * 8, size * 8)
            raw[index * size : index * size + len(piece)] = piece
        done = 0
        while done < len(places):
            claim = await self.refcounts.allocate(len(places) - done)
            self._claimed(claim.host, claim.clusters)
            view = memoryview(raw)[done * size : (done + claim.clusters) * size]
            await self.file.write_table(claim.host, view)
            for index in range(claim.clusters):
                table[places[done + index]] = claim.host + index * size
            done += claim.clusters

    async def _table(self, raw: bytes | memoryview) -> int:
        size = self.file.header.cluster_size
        claim = await self.refcounts.allocate_contiguous(-(-len(raw) // size))
        self._claimed(claim.host, claim.clusters)
        await self.file.write_table(claim.host, memoryview(bytes(raw).ljust(claim.clusters * size, b"\0")))
        return claim.host

    def _claimed(self, host: int, clusters: int) -> None:
        self.claimed.append(Freed(host >> self.file.header.cluster_bits, clusters, False))


def _frozen(bitmap: DirtyBitmap) -> DirtyBitmap:
    """What is dirty now in the bitmap and in the successor that records in its place: writes while it is stored do not matter."""
    copy = DirtyBitmap(bitmap.size, bitmap.granularity, bitmap.name)
    copy.merge(bitmap)
    if bitmap.successor is not None:
        copy.merge(bitmap.successor)
    return copy


def _dirty_pieces(bitmap: DirtyBitmap, cluster_size: int) -> Iterator[list[int]]:
    """Numbers of the clusters of a bitmap in which a bit is set, in ascending order, as many at a time as are written at once."""
    covered = cluster_size * 8 * bitmap.granularity
    limit = max(_WRITE_STEP // cluster_size, 1)
    places: list[int] = []
    at: int | None = 0
    while at is not None and (at := bitmap.next_dirty(at)) is not None:
        places.append(at // covered)
        at = (at // covered + 1) * covered
        if len(places) == limit:
            yield places
            places = []
    if places:
        yield places
