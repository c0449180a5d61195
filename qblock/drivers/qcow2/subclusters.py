"""Extended L2 entries: clusters of 32 subclusters, each of which is data, zero or unallocated by itself.

Models image-formats.md section 1.5, "Extended L2". An entry has two words: the first says where the host cluster is, as in plain
images but without the zero flag; the second has one bit per subcluster for "data", and one for "zero" 32 bits above. Both set, or
data without a host cluster, is damage. In memory a slice of a table is two arrays, so that whatever only asks where clusters lie
works on the first words as it does in plain images.

This module holds the pure part (states, runs) and the mapping for reading; `subwriting.py` changes it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

import attrs

from qblock.drivers.qcow2.cache import SECTOR, CachedTable, TableCache
from qblock.drivers.qcow2.clusters import ClusterMap
from qblock.drivers.qcow2.layout import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    U64,
    ZERO,
    Geometry,
    Kind,
    Run,
    classify,
    constant_run,
    decode_u64,
    encode_u64,
    ramp_run,
    zeroes_u64,
)
from qblock.extents import Fragment

SUBCLUSTERS: Final = 32
ALL_DATA: Final = (1 << SUBCLUSTERS) - 1
"""The second word of a cluster that is data throughout; also the mask of all subclusters."""
ALL_ZERO: Final = ALL_DATA << SUBCLUSTERS
_ENTRIES_PER_SECTOR: Final = SECTOR // 16
_RUNS_LOOKED_AT: Final = 256
"""Runs that one status question joins before it answers."""
_WHOLE: Final = {Kind.DATA: ALL_DATA, Kind.ZERO: ALL_ZERO, Kind.ZERO_ALLOCATED: ALL_ZERO, Kind.UNALLOCATED: 0}


class SubRun(NamedTuple):
    """``length`` bytes of one kind; ``entry`` is the first word of the first cluster, those that follow are consecutive."""

    kind: Kind
    length: int
    entry: int


def is_damaged(states: int, *, hosted: bool) -> bool:
    """Whether a second word contradicts itself, or claims data where there is no host cluster."""
    data = states & ALL_DATA
    return bool(data & states >> SUBCLUSTERS or (data and not hosted))


def subcluster_kind(entry: int, states: int, number: int, geometry: Geometry) -> Kind:
    """What subcluster ``number`` of a cluster with these two words is; damage concerns all of the cluster."""
    whole = classify(entry, geometry)
    if whole is Kind.COMPRESSED or whole is Kind.CORRUPT:
        return whole
    hosted = whole is Kind.DATA
    if is_damaged(states, hosted=hosted):
        return Kind.CORRUPT
    bit = 1 << number
    if states & bit:
        return Kind.DATA
    if states >> SUBCLUSTERS & bit:
        return Kind.ZERO_ALLOCATED if hosted else Kind.ZERO
    return Kind.UNALLOCATED


def alike(states: int, number: int, kind: Kind) -> int:
    """How many subclusters from ``number`` on are of ``kind``, which that one is."""
    data, zero = states & ALL_DATA, states >> SUBCLUSTERS
    if kind is Kind.DATA:
        bits = data & ~zero
    elif kind is Kind.UNALLOCATED:
        bits = ~(data | zero)
    else:
        bits = zero & ~data
    bits = (bits & ALL_DATA) >> number
    return min((~bits & bits + 1).bit_length() - 1, SUBCLUSTERS - number)


def runs_of_bits(bits: int) -> Iterator[tuple[int, int]]:
    """The runs of set bits, as (first, end)."""
    at = 0
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        count = (~bits & bits + 1).bit_length() - 1
        yield at + skip, at + skip + count
        bits >>= count
        at += skip + count


@attrs.define(eq=False, slots=True)
class ExtendedTable(CachedTable):
    """A slice of a table: ``entries`` are the first words, ``states`` the second ones."""

    states: array[int] = attrs.field(factory=lambda: zeroes_u64(0), kw_only=True)


class ExtendedCache(TableCache):
    """Slices of extended tables, which the file holds with the two words of an entry side by side."""

    def make_table(self, key: int, entries: array[int], host: int) -> CachedTable:
        """See `TableCache`: ``entries`` as in the file."""
        return ExtendedTable(key, entries[::2], host, states=entries[1::2])

    def encode_part(self, table: CachedTable, first: int, end: int) -> memoryview:
        """See `TableCache`."""
        both = zeroes_u64(2 * (end - first))
        both[::2], both[1::2] = table.entries[first:end], states_of(table)[first:end]
        return encode_u64(both)


def with_states(entries: array[int], states: int) -> array[int]:
    """Extended entries as the file has them (but for the order of bytes), all with the same second word."""
    both = zeroes_u64(2 * len(entries))
    both[::2], both[1::2] = entries, array(U64, [states]) * len(entries)
    return both


def states_of(table: CachedTable) -> array[int]:
    """The second words of a slice."""
    assert isinstance(table, ExtendedTable)
    return table.states


def find_sub_run(table: CachedTable, index: int, start: int, length: int, geometry: Geometry) -> SubRun:
    """The run that begins ``start`` bytes into the cluster at ``index`` of a slice, at most ``length`` bytes and this slice."""
    entries, states, bits = table.entries, states_of(table), geometry.subcluster_bits
    entry, number = entries[index], start >> bits
    kind = subcluster_kind(entry, states[index], number, geometry)
    if kind is Kind.COMPRESSED or kind is Kind.CORRUPT:
        return SubRun(kind, min(length, geometry.cluster_size - start), entry)
    end = number + alike(states[index], number, kind)
    got = (end << bits) - start
    if end == SUBCLUSTERS and got < length:
        got += _following(table, index + 1, length - got, kind, geometry)
    return SubRun(kind, min(got, length), entry)


def _following(table: CachedTable, at: int, length: int, kind: Kind, geometry: Geometry) -> int:
    """Bytes from the beginning of the cluster at ``at`` that continue a run of ``kind`` which ends right before it."""
    entries, states, size = table.entries, states_of(table), geometry.cluster_size
    hosted = classify(entries[at - 1], geometry) is Kind.DATA
    step, got = size if hosted else 0, 0
    while got < length and at < len(entries) and entries[at] == entries[at - 1] + step:
        limit = min(len(entries) - at, -(-(length - got) // size))
        if states[at] != _WHOLE[kind]:
            if subcluster_kind(entries[at], states[at], 0, geometry) is kind:
                got += alike(states[at], 0, kind) << geometry.subcluster_bits
            break
        clusters = constant_run(states, at, limit)
        clusters = ramp_run(entries, at, clusters, step) if hosted else constant_run(entries, at, clusters)
        got += clusters * size
        at += clusters
    return got


def _whole_state(entry: int, geometry: Geometry) -> int:
    if entry & COMPRESSED:
        return 0
    if entry & ZERO:
        return ALL_ZERO
    return ALL_DATA if classify(entry, geometry) is Kind.DATA else 0


class ExtendedMap(ClusterMap):
    """The mapping of an image with extended L2 entries."""

    def _make_cache(self, slices: int) -> TableCache:
        return ExtendedCache(slices, entries_per_sector=_ENTRIES_PER_SECTOR, encode=encode_u64)

    async def _read_shared_slice(self, host: int) -> array[int]:
        entries = decode_u64(await self.file.read(host, self._slice_bytes))
        entries[::2] = array(U64, [entry & ~COPIED for entry in entries[::2]])
        return entries

    # ----------------------------------------------------------------------------------------------------------- runs

    def sub_run(self, table: CachedTable, guest: int, length: int) -> SubRun:
        """The run at a guest offset, at most ``length`` bytes, inside this slice."""
        start, index = guest & (self.geometry.cluster_size - 1), self.index(guest)
        run = find_sub_run(table, index, start, length, self.geometry)
        if self.geometry.data_file and self._lies_elsewhere(run.entry, guest - start):
            return SubRun(Kind.CORRUPT, min(length, self.geometry.cluster_size - start), run.entry)
        return run

    def _lies_elsewhere(self, entry: int, guest: int) -> bool:
        """Does an entry point to another place in the data file than its own?"""
        return classify(entry, self.geometry) is Kind.DATA and entry & OFFSET_MASK != guest

    def run_at(self, table: CachedTable, index: int, limit: int) -> Run:
        """See `ClusterMap`: a cluster with a host cluster counts as data, one with zero subclusters and none as zero."""
        entry, states = table.entries[index], states_of(table)[index]
        kind = classify(entry, self.geometry)
        if kind is Kind.COMPRESSED or kind is Kind.CORRUPT:
            return Run(kind, 1, entry)
        guest = (table.key << self.geometry.slice_shift) + (index << self.geometry.cluster_bits)
        elsewhere = self.geometry.data_file and self._lies_elsewhere(entry, guest)
        if elsewhere or is_damaged(states, hosted=kind is Kind.DATA):
            return Run(Kind.CORRUPT, 1, entry)
        if kind is Kind.UNALLOCATED and states:
            return Run(Kind.ZERO, 1, entry)
        return Run(kind, 1, entry)

    def places_of_zeroes(self, table: CachedTable, index: int, limit: int) -> Run:
        """See `ClusterMap`."""
        run = self.run_at(table, index, limit)
        zeroes = run.kind is Kind.DATA and states_of(table)[index] == ALL_ZERO
        return run._replace(kind=Kind.ZERO_ALLOCATED) if zeroes else run

    def change(self, table: CachedTable, index: int, entries: array[int]) -> None:
        """See `ClusterMap`: clusters that are data or zero, by the flag of plain entries, are so throughout."""
        states = array(U64, [_whole_state(entry, self.geometry) for entry in entries])
        words = array(U64, [entry if entry & COMPRESSED else entry & ~ZERO for entry in entries])
        self.change_both(table, index, words, states)

    def reserve(self, table: CachedTable, index: int, entries: array[int]) -> None:
        """See `ClusterMap`: the places are there, but no subcluster counts as written."""
        self.change_both(table, index, array(U64, [entry & ~ZERO for entry in entries]), zeroes_u64(len(entries)))

    def change_both(self, table: CachedTable, index: int, entries: array[int], states: array[int]) -> None:
        """Replace both words of entries of a slice that `writable_slice` has just returned."""
        states_of(table)[index : index + len(states)] = states
        super().change(table, index, entries)

    # -------------------------------------------------------------------------------------------------------- reading

    async def read(self, offset: int, view: memoryview) -> None:
        """See `ClusterMap`."""
        done, wanted = 0, len(view)
        within_table = (1 << self.geometry.l1_shift) - 1
        while done < wanted:
            guest = offset + done
            table = await self.slice_at(guest)
            if table is None:
                count = min(wanted - done, within_table + 1 - (guest & within_table))
                await self.read_below(guest, view[done : done + count])
            else:
                kind, count, entry = self.sub_run(table, guest, wanted - done)
                if kind is Kind.COMPRESSED:
                    count = await self.read_packed(table, guest, view[done:])
                else:
                    await self.read_run(Run(kind, 1, entry), guest, view[done : done + count])
            done += count

    async def status(self, offset: int, length: int) -> tuple[Kind, int, int | None]:
        """See `ClusterMap`; runs are of subclusters."""
        kind, got, host = await self._place_at(offset, length)
        looked = 1
        while got < length and looked < _RUNS_LOOKED_AT:
            more, count, place = await self._place_at(offset + got, length - got)
            if more is not kind or place != (None if host is None else host + got):
                break
            got += count
            looked += 1
        if kind is Kind.CORRUPT:
            raise self.file.bad_entry(f"the L2 entry for guest offset {offset:#x} is damaged", offset)
        return kind, got, host

    async def fragments(self, offset: int, length: int, *, after: int, gaps: bool) -> list[Fragment]:
        """See `ClusterMap`: none, since clusters have parts."""
        return []

    async def _place_at(self, guest: int, length: int) -> tuple[Kind, int, int | None]:
        """The run at a guest offset, and where it lies if it has a host cluster."""
        geometry = self.geometry
        table = await self.slice_at(guest)
        if table is not None:
            kind, got, entry = self.sub_run(table, guest, length)
            hosted = classify(entry, geometry) is Kind.DATA
            return kind, got, (entry & OFFSET_MASK) + (guest & (geometry.cluster_size - 1)) if hosted else None
        index = guest >> geometry.l1_shift
        missing = index < len(self.l1) and not self.l1[index]
        empty = constant_run(self.l1, index, len(self.l1) - index) if missing else 1
        return Kind.UNALLOCATED, min(length, (index + empty << geometry.l1_shift) - guest), None
