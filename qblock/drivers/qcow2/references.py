"""Which host clusters an image's tables refer to, and which of their entries are damaged.

Models the counting half of image-formats.md section 1.13. As in QEMU, an entry with damage is reported and its clusters count as
referenced all the same, as far as they lie in the file: they may be all that is left of somebody's data. Differs from QEMU in
that a table to which many entries (of snapshots, say) refer is read once more and counted as often: a hostile image cannot
make a check last longer than reading its file twice.

Tables that lie one after the other are read together, and those of the common form counted as a whole (`lanes.py`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from pyroaring import BitMap64

from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.census import Census
from qblock.drivers.qcow2.damage import Damage, Report
from qblock.drivers.qcow2.lanes import plain_entries
from qblock.drivers.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    U64,
    ZERO,
    Geometry,
    Kind,
    compressed_location,
    decode_u64,
    encode_u64,
    find_run,
    first_words,
    ramp_run,
    with_first_words,
)
from qblock.ranges import ByteRange
from qblock.units import KiB

if TYPE_CHECKING:
    from qblock.drivers.qcow2.snapshots import SnapshotTable
    from qblock.drivers.qcow2.storage import ImageFile

_LOW: Final = (1 << 32) - 1
_AT_ONCE: Final = 128 * KiB
"""Bytes of adjacent tables that are read together."""
_SHORT_RUN: Final = 32
"""Clusters of shorter runs are counted one by one."""
_MANY: Final = 1 << 16


class ReferenceCounter:
    """Counts all references but those to the refcount structure; damage goes to ``report``.

    ``mend``: entries whose repair is known are repaired in the file. ``heard`` hears how many entries of L1 tables have been
    followed since it was called last.
    """

    def __init__(
        self,
        file: ImageFile,
        l1: array[int],
        snapshots: SnapshotTable,
        report: Report,
        *,
        mend: bool = False,
        heard: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.file = file
        self.geometry = Geometry.of(file.header)
        self.l1 = l1
        self.snapshots = snapshots
        self.report = report
        self.mend = mend
        self._heard = heard
        self.mended = False
        self.census = Census()
        self.file_length = file.length()
        self.limit = self.geometry.clusters(self.file_length)
        """Clusters that the file has; the last one need not be complete."""
        self.allocated = 0
        self.fragmented = 0
        self.compressed = 0
        self.all_copied = True
        """All entries met that lead to tables or plain data have COPIED set."""
        self._scattered = array(U64)
        """Clusters that are referenced once more, and will be counted together: adding many to a set is quicker for each."""
        self._seen = BitMap64()
        """Sectors at which L2 tables begin that were read."""
        self._again: dict[int, list[int]] = {}
        """Offset of L2 tables that were read, how often entries refer to them besides: [active, others, L1 index]."""

    async def run(self) -> None:
        """Count header, active and inactive tables with what they refer to, snapshot table and persistent bitmaps."""
        header = self.file.header
        self.add_bytes(0, header.cluster_size)
        if self.add_bytes(header.l1_offset, header.l1_size * 8):
            await self._add_tables(self.l1, active=True)
        for text in self.snapshots.misplaced(self.file):
            self.report.add(Damage.SNAPSHOT_L1, text)
        for snapshot in self.snapshots.usable(self.file):
            self.add_bytes(snapshot.l1_offset, snapshot.l1_bytes)
            raw = await self.file.read(snapshot.l1_offset, snapshot.l1_bytes)
            await self._add_tables(decode_u64(raw), active=False)
        for offset, (active, others, index) in self._again.items():
            await self._add_table(offset, index, active=active, others=others, again=True)
        self._again.clear()
        self._add_scattered()
        self.add_bytes(header.snapshots_offset, self.snapshots.length)
        self.add_bytes(*header.encryption_area)
        await self._add_bitmaps()

    def add_bytes(self, offset: int, length: int, *, guest: ByteRange | None = None, times: int = 1) -> bool:
        """Count the clusters that a byte range touches; False when it leads out of the file, which is reported."""
        if not length:
            return True
        if offset + length - self.file_length >= self.geometry.cluster_size:
            self._beyond(offset, length, guest, times)
            return False
        bits = self.geometry.cluster_bits
        first = offset >> bits
        self.census.add_runs([(first, -(-(offset + length) >> bits) - first)], times)
        return True

    def _beyond(self, offset: int, length: int, guest: ByteRange | None, times: int = 1) -> None:
        text = f"a reference leads out of the file: offset {offset:#x} size {length:#x}"
        self.report.add(Damage.BEYOND_END, text, place=ByteRange(offset, length), guest=guest, times=times)

    # ------------------------------------------------------------------------------------------------------------ tables

    async def _add_tables(self, l1: array[int], *, active: bool) -> None:
        index = 0
        while index < len(l1):
            count = self._adjacent_tables(l1, index)
            if count > 1:
                await self._add_adjacent(l1[index] & OFFSET_MASK, index, count, active=active)
            elif l1[index] & ~COPIED:
                await self._add_entry(l1[index], index, active=active)
            index += count
            self._heard(count)

    def _adjacent_tables(self, l1: array[int], index: int) -> int:
        """How many entries of an L1 table lead to tables in a row, none of them read before; 1: this one by itself."""
        entry, size = l1[index], self.geometry.cluster_size
        offset = entry & OFFSET_MASK
        most = min(len(l1) - index, _AT_ONCE // size, (self.file_length - offset) // size)
        if entry & ~COPIED != offset or not offset or offset & (size - 1) or not entry & COPIED or most < 2:
            return 1
        count = ramp_run(l1, index, most, size)
        return 1 if self._seen.range_cardinality(offset >> 9, offset + count * size >> 9) else count

    async def _add_adjacent(self, offset: int, index: int, count: int, *, active: bool) -> None:
        """Count ``count`` sound entries of an L1 table from ``index`` on, whose tables lie side by side at ``offset``."""
        size = self.geometry.cluster_size
        self.add_bytes(offset, count * size)
        self._seen |= BitMap64(range(offset >> 9, offset + count * size >> 9, size >> 9))
        raw = await self.file.read(offset, count * size)
        if self._add_plain(decode_u64(raw), times=1, active=int(active), tables=count):
            return
        for at in range(0, count * size, size):
            content = raw[at : at + size]
            await self._add_table(
                offset + at, index + at // size, active=int(active), others=int(not active), raw=content
            )

    async def _add_entry(self, entry: int, index: int, *, active: bool) -> None:
        """Count what one entry of an L1 table leads to."""
        offset = entry & OFFSET_MASK
        guest = self._guest_of_table(index)
        if entry & L1_RESERVED:
            text = f"L1 entry {index} has reserved bits set: {entry:x}"
            self.report.add(Damage.L1_ENTRY, text, place=self._l1_place(index, active=active), guest=guest)
        if offset & (self.geometry.cluster_size - 1):
            text = f"L2 table of L1 entry {index} is not cluster aligned: {entry:x}"
            self.report.add(Damage.L1_ENTRY, text, place=self._l1_place(index, active=active), guest=guest)
        if not offset or not self.add_bytes(offset, self.geometry.cluster_size, guest=guest):
            return
        self.all_copied = self.all_copied and bool(entry & COPIED)
        if offset >> 9 in self._seen:
            users = self._again.setdefault(offset, [0, 0, index])
            users[0 if active else 1] += 1
            return
        self._seen.add(offset >> 9)
        await self._add_table(offset, index, active=int(active), others=int(not active))

    def _guest_of_table(self, index: int) -> ByteRange:
        size = 1 << self.geometry.l1_shift
        return ByteRange(index * size, size)

    def _l1_place(self, index: int, *, active: bool) -> ByteRange | None:
        return ByteRange(self.file.header.l1_offset + 8 * index, 8) if active else None

    async def _add_table(
        self, offset: int, index: int, *, active: int, others: int, raw: bytearray | None = None, again: bool = False
    ) -> None:
        """Count what an L2 table refers to, to which ``active`` and ``others`` entries of L1 tables refer."""
        words = decode_u64(raw or await self.file.read(offset, self.geometry.cluster_size))
        if again and active and self.geometry.data_file:
            text = f"the L2 table at {offset:#x} is that of several parts of the disk"
            self.report.add(
                Damage.SHARED_TABLE, text, place=ByteRange(offset, self.geometry.cluster_size), times=active
            )
        if self._add_plain(words, times=active + others, active=active):
            return
        walk = _TableWalk(self, first_words(words, self.geometry), offset, index, times=active + others, active=active)
        if self.geometry.extended:
            walk.check_subclusters(words[1::2])
        self.census.add_runs(walk.runs(), active + others)
        if walk.changed:
            entries = with_first_words(words, walk.entries, self.geometry)
            await self.file.write_metadata(offset, encode_u64(entries))
            self.mended = True

    def _add_plain(self, entries: array[int], *, times: int, active: int, tables: int = 1) -> bool:
        """Count what one table, or so many together, refers to, if all of it is plain data; False when it is not."""
        if self.geometry.extended or self.geometry.data_file:
            return False
        plain = plain_entries(entries, self.geometry.cluster_bits, clusters=self.limit)
        if plain is None or (tables > 1 and len(plain.clusters) < len(entries)):
            return False
        if times > 1 or plain.breaks.count(b"\x80") * _SHORT_RUN < len(plain.clusters):
            self.census.add_runs(plain.runs(), times)
        else:
            self._scattered.extend(plain.clusters)
            if len(self._scattered) >= _MANY:
                self._add_scattered()
        self.all_copied = self.all_copied and plain.copied
        self.allocated += active * len(plain.clusters)
        # The first entry of each table does not follow any other.
        starts = plain.breaks[:: len(entries) // tables].count(b"\x80")
        self.fragmented += active * (plain.breaks.count(b"\x80") - starts)
        return True

    def _add_scattered(self) -> None:
        """Count the clusters that were put off."""
        clusters = BitMap64(self._scattered)
        if len(clusters) == len(self._scattered):
            self.census.add_set(clusters)
        else:
            self.census.add_runs((cluster, 1) for cluster in self._scattered)
        self._scattered = array(U64)

    # ----------------------------------------------------------------------------------------------------------- bitmaps

    async def _add_bitmaps(self) -> None:
        """Persistent bitmaps keep their clusters, whether or not they are in use; `CorruptImage` when a table cannot be read."""
        if self.file.header.extension(head.EXT_BITMAPS) is None:
            return
        from qblock.drivers.qcow2.bitmaps import bitmap_clusters, read_directory  # noqa: PLC0415 - few images have them

        bits = self.geometry.cluster_bits
        directory, entries = await read_directory(self.file)
        if directory is not None:
            self.add_bytes(directory.offset, directory.size)
        for entry in entries:
            place = ByteRange(entry.table_offset, entry.table_entries * 8)
            if place.end > self.file_length:
                text = f"the table of bitmap '{entry.name}' lies behind the end of the file"
                self.report.add(Damage.BITMAPS, text, place=place)
                continue
            async for first, count in bitmap_clusters(self.file, entry):
                self.add_bytes(first << bits, count << bits)


class _TableWalk:
    """One L2 table, entry by entry. ``times`` tables of L1 refer to it, ``active`` of them from the active one."""

    def __init__(
        self, counter: ReferenceCounter, entries: array[int], offset: int, index: int, *, times: int, active: int
    ) -> None:
        self.counter = counter
        self.geometry = counter.geometry
        self.entries = entries
        self.offset = offset
        self.first = index << counter.geometry.l2_bits
        self.times = times
        self.active = active
        self.changed = False
        self._expected = -1

    def runs(self) -> Iterator[tuple[int, int]]:
        """The host clusters that the table refers to, as (first, count)."""
        geometry, entries, at = self.geometry, self.entries, 0
        limit = self.counter.limit
        while at < len(entries):
            kind, clusters, entry = find_run(entries, at, len(entries) - at, geometry)
            if kind is Kind.DATA or kind is Kind.ZERO_ALLOCATED:
                host = (entry & OFFSET_MASK) >> geometry.cluster_bits
                self._count(entry & OFFSET_MASK, clusters)
                self.counter.all_copied = self.counter.all_copied and bool(entry & COPIED)
                if geometry.data_file:
                    if host != self.first + at:
                        self._bad(at, f"guest cluster {self.first + at} lies elsewhere in the data file: {entry:x}")
                else:
                    if host < limit:
                        yield host, min(clusters, limit - host)
                    for i in range(max(0, limit - host), clusters):
                        self._beyond(at + i, (host + i) << geometry.cluster_bits, geometry.cluster_size)
            elif kind is Kind.COMPRESSED:
                yield from self._compressed(at, entry)
            elif kind is Kind.CORRUPT:
                yield from self._damaged(at, entry)
            at += clusters

    def check_subclusters(self, words: array[int]) -> None:
        """The second words of extended entries must fit to each other and to the first words."""
        for at, word in enumerate(words):
            entry = self.entries[at]
            if not word:
                continue
            if entry & COMPRESSED:
                trouble = "of a compressed cluster"
            elif word & _LOW & word >> 32:
                trouble = "allocated and zero at once"
            elif word & _LOW and not entry & OFFSET_MASK and not (self.geometry.data_file and entry & COPIED):
                trouble = "allocated without a place"
            else:
                continue
            self._bad(at, f"subclusters {trouble}: {entry:x} {word:x}", Damage.SUBCLUSTERS)

    def _count(self, offset: int, clusters: int) -> None:
        counter, active = self.counter, self.active
        counter.allocated += clusters * active
        counter.fragmented += active * (self._expected >= 0 and offset != self._expected)
        self._expected = offset + (clusters << self.geometry.cluster_bits)

    def _guest(self, at: int) -> ByteRange:
        return ByteRange((self.first + at) << self.geometry.cluster_bits, self.geometry.cluster_size)

    def _bad(self, at: int, text: str, damage: Damage = Damage.L2_ENTRY, *, fixed: bool = False) -> None:
        entry_size = 1 << self.geometry.entry_bits
        place = ByteRange(self.offset + at * entry_size, entry_size)
        self.counter.report.add(damage, text, place=place, guest=self._guest(at), fixed=fixed, times=self.times)

    def _beyond(self, at: int, offset: int, length: int) -> None:
        self.counter._beyond(offset, length, self._guest(at), self.times)

    def _touched(self, at: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The clusters of a byte range that a damaged or packed entry refers to."""
        bits = self.geometry.cluster_bits
        if offset + length - self.counter.file_length >= self.geometry.cluster_size:
            self._beyond(at, offset, length)
        else:
            first = offset >> bits
            yield first, -(-(offset + length) >> bits) - first

    def _compressed(self, at: int, entry: int) -> Iterator[tuple[int, int]]:
        if entry & COPIED:
            self._bad(at, f"compressed entry {at} of the L2 table at {self.offset:#x} is marked COPIED: {entry:x}")
        self.counter.allocated += self.active
        self.counter.compressed += self.active
        self.counter.fragmented += self.active
        yield from self._touched(at, *compressed_location(entry, self.geometry.cluster_bits))

    def _damaged(self, at: int, entry: int) -> Iterator[tuple[int, int]]:
        geometry = self.geometry
        if entry & COMPRESSED:
            self._bad(
                at, f"entry {at} of the L2 table at {self.offset:#x} is compressed, which it cannot be here: {entry:x}"
            )
            return
        where = f"entry {at} of the L2 table at {self.offset:#x}"
        if entry & L2_RESERVED or (entry & ZERO and geometry.extended):
            self._bad(at, f"{where} has reserved bits set: {entry:x}")
        offset = entry & OFFSET_MASK
        unaligned = offset & (geometry.cluster_size - 1)
        zero = entry & ZERO and geometry.version >= 3 and not geometry.extended
        if unaligned and zero and not geometry.data_file:
            self._bad(
                at, f"{where} keeps space that is not aligned: {entry:x}", Damage.ZERO_ENTRY, fixed=self.counter.mend
            )
            if self.counter.mend:
                self.entries[at] = ZERO
                self.changed = True
                return
        elif unaligned:
            self._bad(at, f"{where} is not cluster aligned: {entry:x}")
        elif entry & ZERO and not zero and not geometry.extended:
            self._bad(at, f"{where} is marked as zero, which version 2 does not have: {entry:x}")
        if offset:
            self._count(offset, 1)
            if not geometry.data_file:
                yield from self._touched(at, offset, geometry.cluster_size)
