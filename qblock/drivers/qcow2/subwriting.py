"""Writes, zero writes and discards in images with extended L2 entries.

Models image-formats.md sections 1.5 and 1.7 for subclusters. Host clusters are claimed and given up whole, as in plain images,
and all that `allocation.py` says of who may change what holds here, too. What differs is how much of a cluster counts: a write
fills up the subclusters that it begins and ends in, no more, and leaves the others to the backing node; when a cluster moves
(it was shared, or compressed) the subclusters that hold data move with it. Zeroes are written subcluster by subcluster;
discards are for whole clusters, as in QEMU.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from qblock.drivers.qcow2.allocation import JOIN_BELOW, Allocator, Payload
from qblock.drivers.qcow2.clusters import ClusterMap
from qblock.drivers.qcow2.datafile import DataFileAllocator, DataFileMap
from qblock.drivers.qcow2.layout import (
    COPIED,
    L1_IN_USE,
    OFFSET_MASK,
    U64,
    Geometry,
    Kind,
    Run,
    classify,
    constant_run,
    ramp_run,
)
from qblock.drivers.qcow2.refcounts import Claim
from qblock.drivers.qcow2.subclusters import (
    ALL_DATA,
    ALL_ZERO,
    SUBCLUSTERS,
    ExtendedMap,
    is_damaged,
    runs_of_bits,
    states_of,
    subcluster_kind,
)
from qblock.errors import BlockIOError
from qblock.units import align_up

Entry: TypeAlias = tuple[int, int]
"""The two words of an L2 entry."""
Change: TypeAlias = Callable[[int, int, int], Entry | None]
"""From the two words of an entry, and the mask of the subclusters that are meant, the new words; None: they stay."""


class Filling(NamedTuple):
    """What a write into part of a cluster makes of it: the new second word, and the byte ranges of the cluster that have to be
    written beside the payload, with what they showed before.
    """

    states: int
    ranges: list[tuple[int, int]]


def plan_filling(entry: Entry, start: int, end: int, *, kind: Kind, moved: bool, bits: int) -> Filling:
    """Plan a write to bytes ``start`` to ``end`` of a cluster whose first word is of ``kind``; ``bits``: log2 of a subcluster.

    ``moved``: the cluster gets a new host cluster.
    """
    data = ALL_DATA if kind is Kind.COMPRESSED else entry[1] & ALL_DATA
    zero = 0 if kind is Kind.COMPRESSED else entry[1] >> SUBCLUSTERS
    first, last = start >> bits, end - 1 >> bits
    written = (1 << last + 1) - (1 << first)
    ranges = [(a << bits, b << bits) for a, b in runs_of_bits(data & ~written)] if moved else []
    if start > first << bits and (moved or not data >> first & 1):
        ranges.append((first << bits, start))
    if end < last + 1 << bits and (moved or not data >> last & 1):
        ranges.append((end, last + 1 << bits))
    return Filling(data | written | (zero & ~written) << SUBCLUSTERS, _joined(ranges))


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for a, b in sorted(ranges):
        if result and result[-1][1] == a:
            result[-1] = (result[-1][0], b)
        else:
            result.append((a, b))
    return result


class ExtendedAllocator(Allocator):
    """Changes the mapping of an image with extended L2 entries."""

    map: ExtendedMap

    # ---------------------------------------------------------------------------------------------------------- writes

    async def _write_some(self, guest: int, payload: Payload) -> int:
        clusters, geometry = self.map, self.map.geometry
        self.file.check_writable()
        table = await clusters.writable_slice(guest)
        run = clusters.sub_run(table, guest, payload.length)
        start, index = guest & (geometry.cluster_size - 1), clusters.index(guest)
        if run.kind is Kind.DATA and run.entry & COPIED:
            await self._write_in_place((run.entry & OFFSET_MASK) + start, guest, payload.part(0, run.length))
            return run.length
        limit = min(geometry.clusters(start + payload.length), len(table.entries) - index)
        limit = await self.free_to_change(guest >> geometry.cluster_bits, limit)
        if not limit:
            return 0
        whole = clusters.run_at(table, index, 1)
        if whole.kind is Kind.CORRUPT:
            await self.file.fatal(f"the L2 entry for guest offset {guest:#x} is {run.entry:#x}")
        if whole.kind is Kind.DATA and whole.entry & COPIED:
            reuse, limit = Claim(whole.entry & OFFSET_MASK, 1, False), 1
        else:
            reuse, limit = None, self._run_to_place(table, index, limit)
        old = list(zip(table.entries[index : index + limit], states_of(table)[index : index + limit], strict=True))
        return await self._write_parts(guest, payload, old, reuse)

    async def _write_parts(self, guest: int, payload: Payload, old: list[Entry], reuse: Claim | None) -> int:
        """Give the clusters with the entries ``old`` a new place (or reuse the one they have) with the payload in it."""
        clusters, geometry = self.map, self.map.geometry
        start = guest & (geometry.cluster_size - 1)
        first = guest >> geometry.cluster_bits
        with self.allocating(first, len(old)) as allocation:
            claim = reuse or await self.claim(first, len(old))
            allocation.end = first + claim.clusters
            payload = payload.part(0, min(claim.clusters * geometry.cluster_size - start, payload.length))
            try:
                if reuse:
                    await self.guard(claim.host, geometry.cluster_size)
                states = await self._fill_parts(claim, guest, payload, old, moved=reuse is None)
                table = await clusters.writable_slice(guest)
                self.file.check_writable()
            except BlockIOError:
                if reuse is None:
                    await self.give_back(claim)
                raise
            entry, step = claim.host | COPIED, geometry.cluster_size
            entries = array(U64, range(entry, entry + claim.clusters * step, step))
            clusters.change_both(table, clusters.index(guest), entries, states)
            if reuse is None:
                words = array(U64, [word for word, _ in old[: claim.clusters]])
                self.drop(words, pass_discard=self.refcounts.discard_other)
        return payload.length

    async def _fill_parts(
        self, claim: Claim, guest: int, payload: Payload, old: list[Entry], *, moved: bool
    ) -> array[int]:
        """Write the payload to its place and what belongs around it; gives the new second words."""
        geometry, size = self.map.geometry, self.map.geometry.cluster_size
        start = guest & (size - 1)
        end = start + payload.length
        states = array(U64, [ALL_DATA]) * claim.clusters
        pieces: list[tuple[int, int, Entry]] = []
        for number in sorted({0, claim.clusters - 1}):
            at = number * size
            filling = plan_filling(
                old[number],
                max(start - at, 0),
                min(end - at, size),
                kind=classify(old[number][0], geometry),
                moved=moved,
                bits=geometry.subcluster_bits,
            )
            states[number] = filling.states
            pieces += [(at + a, at + b, old[number]) for a, b in filling.ranges]
        if claim.virgin:
            pieces = [piece for piece in pieces if not self._reads_zero(piece[2], piece[0] & (size - 1))]
        await self._write_pieces(claim.host, guest - start, payload, start, pieces)
        return states

    async def _write_pieces(
        self, host: int, guest: int, payload: Payload, start: int, pieces: list[tuple[int, int, Entry]]
    ) -> None:
        """Write the payload ``start`` bytes behind ``host``, the place of ``guest``, and around it what was there before.

        Pieces that touch a payload which is not long are written together with it.
        """
        end = start + payload.length
        from_ = next((a for a, b, _ in pieces if b == start), start)
        to = next((b for a, b, _ in pieces if a == end), end)
        if payload.view is None or to - from_ > max(JOIN_BELOW, self.map.geometry.cluster_size):
            from_, to = start, end
        if from_ < start or end < to:
            buffer = memoryview(bytearray(to - from_))
            assert payload.view is not None
            buffer[start - from_ : end - from_] = payload.view
            for a, b, entry in pieces:
                if from_ <= a and b <= to:
                    await self.file.reach("cow_read")
                    await self._read_piece(entry, guest, a, buffer[a - from_ : b - from_])
            self.file.event("cow_write")
            payload = Payload(buffer)
        if self.file.traced:
            await self.file.reach("write_aio")
        await payload.store(self.file, host + from_, guest + from_)
        for a, b, entry in pieces:
            if not (from_ <= a and b <= to):
                buffer = memoryview(bytearray(b - a))
                await self.file.reach("cow_read")
                await self._read_piece(entry, guest, a, buffer)
                self.file.event("cow_write")
                await Payload(buffer).store(self.file, host + a, guest + a)

    def _kind_at(self, entry: Entry, start: int) -> Kind:
        return subcluster_kind(*entry, start >> self.map.geometry.subcluster_bits, self.map.geometry)

    def _reads_zero(self, entry: Entry, start: int) -> bool:
        kind = self._kind_at(entry, start)
        if kind is Kind.UNALLOCATED:
            return self.file.node.backing is None
        return kind is Kind.ZERO or kind is Kind.ZERO_ALLOCATED

    async def _read_piece(self, entry: Entry, guest: int, at: int, view: memoryview) -> None:
        """Read from ``at`` bytes behind the cluster boundary ``guest`` what ``entry``, its cluster's, shows there."""
        within = at & (self.map.geometry.cluster_size - 1)
        inside = max(0, min(len(view), self.map.length - guest - at))
        if inside and not self._reads_zero(entry, within):
            await self.map.read_run(Run(self._kind_at(entry, within), 1, entry[0]), guest + at, view[:inside])

    # ----------------------------------------------------------------------------------------------- zeroes and discard

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """See `Allocator`; the unit is the subcluster."""
        mask = (1 << self.map.geometry.subcluster_bits) - 1
        end = offset + length
        partial = bool(offset & mask or (end & mask and end < self.map.length))
        if partial and not (
            await self._rest_is_zero(offset & ~mask, offset) and await self._rest_is_zero(end, end + (-end & mask))
        ):
            raise BlockIOError(errno.ENOTSUP)
        await self.clear(offset, length, unmap=unmap)

        def change(entry: int, states: int, meant: int) -> Entry | None:
            kind = classify(entry, self.map.geometry)
            if kind is Kind.COMPRESSED and meant != ALL_DATA:
                raise BlockIOError(errno.ENOTSUP)
            if partial and (kind is Kind.COMPRESSED or states & meant):
                # Written since it was looked at: that write and this one are concurrent, the data may stay.
                return None
            if meant == ALL_DATA and (kind is Kind.COMPRESSED or (unmap and not self._keeps(entry))):
                return 0, ALL_ZERO
            return entry, (states | meant << SUBCLUSTERS) & ~meant

        await self._rewrite_both(offset, end, change, pass_discard=self.pass_discard, empties=unmap)

    def _keeps(self, entry: int) -> bool:
        """Does a cluster that is given up keep its place, which is its own?"""
        return self.keep_discarded and bool(entry & COPIED)

    async def discard(self, offset: int, length: int) -> None:
        """See `Allocator`."""
        mask = self.map.geometry.cluster_size - 1
        end = offset + length
        if offset & mask or (end & mask and end < self.map.length):
            raise BlockIOError(errno.ENOTSUP)
        await self.clear(offset, length, unmap=True)
        hides = self.file.node.backing is not None

        def change(entry: int, states: int, meant: int) -> Entry | None:
            if self._keeps(entry):
                return entry, ALL_ZERO
            kept = classify(entry, self.map.geometry) is Kind.UNALLOCATED and not hides
            return None if kept else (0, ALL_ZERO)

        await self._rewrite_both(
            offset, end, change, pass_discard=self.pass_discard, skips_missing_tables=not hides, empties=True
        )

    async def cut(self, start: int, end: int, *, pass_discard: bool | None = None) -> None:
        """See `Allocator`."""
        passed = self.pass_discard if pass_discard is None else pass_discard
        await self._rewrite_both(start, end, lambda *_: (0, 0), pass_discard=passed, skips_missing_tables=True)

    async def cover(self, start: int, end: int) -> None:
        """See `Allocator`."""
        await self._rewrite_both(start, end, lambda entry, *_: (entry, ALL_ZERO), pass_discard=False)

    async def _rewrite_both(
        self,
        offset: int,
        end: int,
        change: Change,
        *,
        pass_discard: bool,
        skips_missing_tables: bool = False,
        empties: bool = False,
    ) -> None:
        """Change the entries of all clusters that the range touches, slice by slice; what they lose is given up.

        ``empties``: clusters that become zero throughout, at the places they have, hold nothing of use any more.
        """
        clusters, geometry = self.map, self.map.geometry
        bits = geometry.cluster_bits
        if end >= clusters.length:
            end = align_up(end, geometry.cluster_size)
        while offset < end:
            self.file.check_writable()
            if skips_missing_tables and not clusters.l1[offset >> geometry.l1_shift] & L1_IN_USE:
                offset = (offset >> geometry.l1_shift) + 1 << geometry.l1_shift
                continue
            table = await clusters.writable_slice(offset)
            index = clusters.index(offset)
            last = end - 1 >> bits
            limit = min(last - (offset >> bits) + 1, len(table.entries) - index)
            limit = await self.free_to_change(offset >> bits, limit)
            stop = index + limit
            while index < stop:
                if is_damaged_entry(table.entries[index], states_of(table)[index], clusters):
                    await self.file.fatal(f"the L2 entry for guest offset {offset:#x} is {table.entries[index]:#x}")
                count = self._change_run(
                    index, stop, offset, end, change, pass_discard=pass_discard, empties=empties
                )
                index += count
                offset = ((offset >> bits) + count) << bits
            await self.write_back_if_crowded()

    def _change_run(
        self, index: int, stop: int, offset: int, end: int, change: Change, *, pass_discard: bool, empties: bool
    ) -> int:
        """Change the entries from ``index`` on that are alike; returns how many. Never waits."""
        clusters, geometry = self.map, self.map.geometry
        table = clusters.tables[offset >> geometry.slice_shift]
        entries, states = table.entries, states_of(table)
        start = offset & (geometry.cluster_size - 1)
        meant = _mask(start, min(end - offset + start, geometry.cluster_size), geometry.subcluster_bits)
        hosted = classify(entries[index], geometry) is Kind.DATA
        count = 1
        if meant == ALL_DATA:
            whole = index + (end - offset >> geometry.cluster_bits)
            count = constant_run(states, index, max(min(stop, whole) - index, 1))
            step = geometry.cluster_size
            count = ramp_run(entries, index, count, step) if hosted else constant_run(entries, index, count)
        old = entries[index : index + count]
        new = change(old[0], states[index], meant)
        if new is None or new == (old[0], states[index]):
            return count
        entry, state = new
        if entry != old[0]:
            self.drop(old, pass_discard=pass_discard)
            old = array(U64, [entry]) * count
        elif empties and self._keeps(entry) and state == ALL_ZERO and states[index] & ALL_DATA:
            self.empty_later(Run(Kind.DATA, count, entry), offset >> geometry.cluster_bits)
        clusters.change_both(table, index, old, array(U64, [state]) * count)
        return count


def _mask(start: int, end: int, bits: int) -> int:
    """The subclusters that bytes ``start`` to ``end`` of a cluster touch."""
    return (1 << (end - 1 >> bits) + 1) - (1 << (start >> bits))


def is_damaged_entry(entry: int, states: int, clusters: ExtendedMap) -> bool:
    """Whether the two words of an entry are such that nothing may be made of them."""
    kind = classify(entry, clusters.geometry)
    return kind is Kind.CORRUPT or (kind is not Kind.COMPRESSED and is_damaged(states, hosted=kind is Kind.DATA))


class ExtendedDataFileAllocator(DataFileAllocator, ExtendedAllocator):
    """As `ExtendedAllocator`, with the clusters in a data file."""


def map_class(geometry: Geometry) -> type[ClusterMap]:
    """What reads the mapping of an image of this kind."""
    if geometry.extended:
        return ExtendedMap
    return DataFileMap if geometry.data_file else ClusterMap


def allocator_class(geometry: Geometry) -> type[Allocator]:
    """What changes the mapping of an image of this kind."""
    if geometry.extended:
        return ExtendedDataFileAllocator if geometry.data_file else ExtendedAllocator
    return DataFileAllocator if geometry.data_file else Allocator
