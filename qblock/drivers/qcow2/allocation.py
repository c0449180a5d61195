"""Writes, zero writes and discards: everything that changes where a guest cluster lies.

Models image-formats.md section 1.7. Plan, then perform: the planning step looks at a run of L2 entries and decides without an
``await``; then space is claimed, data are written, and last the entries change in memory, to be written back by `writeback.py`.

Invariant: while a run of guest clusters is given a new place it stands in ``map.allocations``, entered in the step in which its
entries were looked at. Nobody else changes entries of the run meanwhile, so the old entries stay what they were: two writes into
one unallocated cluster, or a discard against a write, wait for each other. Overwriting in place needs no entry there; the
epochs keep the host cluster from being reused before it ends.

Space that the file never had (`ImageFile.virgin`) reads as zeroes, so that the part of a new cluster that is not written and
would be zero is not written at all. Otherwise head and tail are completed from where the cluster was read before: backing node,
shared or compressed cluster. They are written together with the data when that is little, and beside it when it is much.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from qblock import requests
from qblock.drivers.qcow2.layout import (
    COPIED,
    L1_IN_USE,
    OFFSET_MASK,
    U64,
    ZERO,
    Kind,
    Run,
    classify,
    compressed_clusters,
    find_run,
)
from qblock.drivers.qcow2.refcounts import Claim, Freed, Refcounts
from qblock.errors import BlockIOError
from qblock.units import KiB

if TYPE_CHECKING:
    from qblock.drivers.qcow2.cache import CachedTable
    from qblock.drivers.qcow2.clusters import ClusterMap
    from qblock.drivers.qcow2.packing import CompressedWriter
    from qblock.drivers.qcow2.storage import ImageFile
    from qblock.drivers.qcow2.writeback import WriteBack
    from qblock.node import BdrvChild

JOIN_BELOW: Final = 128 * KiB
"""Head, data and tail of a new cluster run up to this size are copied into one buffer and written at once."""
_MANY_PENDING: Final = 4096
"""So many runs of clusters waiting for release start a write-back."""


class Allocation:
    """Guest clusters ``first`` to ``end`` (exclusive) that are being given a new place; ``done`` is made by who waits."""

    __slots__ = ("done", "end", "first")

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end
        self.done: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Return when the allocation has ended, one way or the other."""
        if self.done is None:
            self.done = asyncio.get_running_loop().create_future()
        await asyncio.shield(self.done)


class Payload:
    """What a write brings: a caller's buffer, or a range of another node that is copied without a buffer."""

    __slots__ = ("length", "source", "source_offset", "view")

    def __init__(
        self, view: memoryview | None, *, source: BdrvChild | None = None, source_offset: int = 0, length: int = 0
    ) -> None:
        self.view = view
        self.source = source
        self.source_offset = source_offset
        self.length = len(view) if view is not None else length

    def part(self, start: int, length: int) -> Payload:
        """A piece of it."""
        if self.view is not None:
            return Payload(self.view[start : start + length])
        return Payload(None, source=self.source, source_offset=self.source_offset + start, length=length)

    async def store(self, file: ImageFile, host: int, guest: int) -> None:
        """Write it to a place in the file, for a place on the disk."""
        if self.view is not None:
            view = self.view if file.crypto is None else await file.crypto.encrypted(host, guest, self.view)
            await requests.write_from(file.data, host, view)
        else:
            assert self.source is not None
            await requests.copy_range(self.source, self.source_offset, file.data, host, self.length)


class Allocator:
    """Changes the mapping of one image that is open for writing."""

    def __init__(
        self,
        clusters: ClusterMap,
        refcounts: Refcounts,
        writeback: WriteBack,
        *,
        pass_discard: bool,
        keep_discarded: bool = False,
    ) -> None:
        self.map = clusters
        self.refcounts = refcounts
        self.writeback = writeback
        self.file = clusters.file
        self.pass_discard = pass_discard
        """Clusters freed by the guest's discards are discarded in the file too."""
        self.keep_discarded = keep_discarded
        """Clusters that the guest gives up keep their places (``discard-no-unref``), unless a snapshot has them, too."""
        refcounts.empty = self._empty_kept
        self.packer: CompressedWriter | None = None
        """Who writes compressed clusters, once there have been any."""

    # ------------------------------------------------------------------------------------------------------- writes

    async def write(self, offset: int, payload: Payload) -> None:
        """Write all of the payload at a guest offset, run by run."""
        done = 0
        while done < payload.length:
            done += await self._write_some(offset + done, payload.part(done, payload.length - done))
        await self.write_back_if_crowded()

    async def _write_some(self, guest: int, payload: Payload) -> int:
        """Write the first run of the payload; returns its bytes, 0 after a wait for another allocation."""
        clusters, geometry = self.map, self.map.geometry
        self.file.check_writable()
        table = await clusters.writable_slice(guest)
        start = guest & (geometry.cluster_size - 1)
        index = clusters.index(guest)
        limit = min(geometry.clusters(start + payload.length), len(table.entries) - index)
        run = clusters.run_at(table, index, limit)
        if run.kind is Kind.DATA and run.entry & COPIED:
            count = min(run.clusters * geometry.cluster_size - start, payload.length)
            await self._write_in_place((run.entry & OFFSET_MASK) + start, guest, payload.part(0, count))
            return count
        first = guest >> geometry.cluster_bits
        limit = await self.free_to_change(first, limit)
        if not limit:
            return 0
        if run.kind is Kind.ZERO_ALLOCATED and run.entry & COPIED:
            reuse, limit = Claim(run.entry & OFFSET_MASK, min(run.clusters, limit), False), min(run.clusters, limit)
        else:
            reuse, limit = None, self._run_to_place(table, index, limit)
        if not limit:
            await self.file.fatal(f"the L2 entry for guest offset {guest:#x} is {run.entry:#x}")
        return await self._write_new(guest, payload, table.entries[index : index + limit], reuse)

    async def free_to_change(self, first: int, limit: int) -> int:
        """How many clusters from ``first`` on are not being allocated; without a wait if any, else 0 after one."""
        for allocation in self.map.allocations:
            if allocation.first < first + limit and allocation.end > first:
                if allocation.first <= first:
                    await allocation.wait()
                    return 0
                limit = allocation.first - first
        return limit

    @contextmanager
    def allocating(self, first: int, count: int) -> Iterator[Allocation]:
        """Have ``count`` guest clusters from ``first`` on to oneself; `free_to_change` has said that they are free."""
        allocation = Allocation(first, first + count)
        self.map.allocations.append(allocation)
        try:
            yield allocation
        finally:
            self.map.allocations.remove(allocation)
            if allocation.done is not None:
                allocation.done.set_result(None)

    def _run_to_place(self, table: CachedTable, index: int, limit: int) -> int:
        """How many entries from ``index`` on need a new place for a write."""
        count = 0
        while count < limit:
            run = self.map.run_at(table, index + count, limit - count)
            in_place = run.kind in (Kind.DATA, Kind.ZERO_ALLOCATED) and run.entry & COPIED
            if in_place or run.kind is Kind.CORRUPT:
                break
            count += run.clusters
        return count

    async def guard(self, host: int, length: int) -> None:
        """Stop a write of guest data that would hit metadata."""
        if self.file.overlaps(host, length):
            await self.file.check_overlap(host, length)

    async def claim(self, first: int, count: int) -> Claim:
        """Space for up to ``count`` (at least one) guest clusters from ``first`` on."""
        claim = await self.refcounts.allocate(count)
        # What an encrypted image shows of space that was never written is noise.
        return claim if self.file.crypto is None else claim._replace(virgin=False)

    async def give_back(self, claim: Claim) -> None:
        """The space of a claim was not used after all."""
        await self.refcounts.release([Freed(claim.host >> self.map.geometry.cluster_bits, claim.clusters, False)])

    async def clear(self, offset: int, length: int, *, unmap: bool) -> None:
        """A guest range is about to read as zeroes by its entries; here its space is given back instead of being emptied."""

    async def _write_in_place(self, host: int, guest: int, payload: Payload) -> None:
        await self.guard(host, payload.length)
        epochs = self.map.epochs
        epoch = epochs.current
        epoch.count += 1
        try:
            if self.file.traced:
                await self.file.reach("write_aio")
            await payload.store(self.file, host, guest)
        finally:
            epochs.leave(epoch)

    async def _write_new(self, guest: int, payload: Payload, old: array[int], reuse: Claim | None) -> int:
        """Give the clusters with the entries ``old`` a new place (or reuse the one they have) with the payload in it."""
        clusters, geometry = self.map, self.map.geometry
        start = guest & (geometry.cluster_size - 1)
        first = guest >> geometry.cluster_bits
        with self.allocating(first, len(old)) as allocation:
            claim = reuse or await self.claim(first, len(old))
            allocation.end = first + claim.clusters
            count = min(claim.clusters * geometry.cluster_size - start, payload.length)
            try:
                if reuse:
                    await self.guard(claim.host, claim.clusters * geometry.cluster_size)
                await self._fill(claim, guest, payload.part(0, count), old)
                table = await clusters.writable_slice(guest)
                self.file.check_writable()
            except BlockIOError:
                if reuse is None:
                    await self.give_back(claim)
                raise
            entry, step = claim.host | COPIED, geometry.cluster_size
            clusters.change(table, clusters.index(guest), array(U64, range(entry, entry + claim.clusters * step, step)))
            if reuse is None:
                self.drop(old[: claim.clusters], pass_discard=self.refcounts.discard_other)
        return count

    async def _fill(self, claim: Claim, guest: int, payload: Payload, old: array[int]) -> None:
        """Write the payload to its new place, and around it what the rest of the first and last cluster showed before."""
        size = self.map.geometry.cluster_size
        head = guest & (size - 1)
        end = head + payload.length
        total = -(-end // size) * size
        first, last = old[0], old[total // size - 1]
        write_head = head if head and not (claim.virgin and self._shows_zeroes(first)) else 0
        write_tail = total - end if end < total and not (claim.virgin and self._shows_zeroes(last)) else 0
        from_, to = head - write_head, end + write_tail
        if payload.view is not None and (write_head or write_tail) and to - from_ <= max(JOIN_BELOW, size):
            buffer = memoryview(bytearray(to - from_))
            await self.file.reach("cow_read")
            await self._read_old(first, guest - head, 0, buffer[:write_head])
            await self._read_old(last, guest - head + total - size, end - (total - size), buffer[write_head + payload.length :])
            buffer[write_head : write_head + payload.length] = payload.view
            self.file.event("cow_write")
            if self.file.traced:
                await self.file.reach("write_aio")
            await Payload(buffer).store(self.file, claim.host + from_, guest - write_head)
            return
        if self.file.traced:
            await self.file.reach("write_aio")
        await payload.store(self.file, claim.host + head, guest)
        if write_head:
            buffer = memoryview(bytearray(write_head))
            await self.file.reach("cow_read")
            await self._read_old(first, guest - head, 0, buffer)
            self.file.event("cow_write")
            await Payload(buffer).store(self.file, claim.host, guest - head)
        if write_tail:
            buffer = memoryview(bytearray(write_tail))
            await self.file.reach("cow_read")
            await self._read_old(last, guest - head + total - size, end - (total - size), buffer)
            self.file.event("cow_write")
            await Payload(buffer).store(self.file, claim.host + end, guest + payload.length)

    def _shows_zeroes(self, entry: int) -> bool:
        kind = classify(entry, self.map.geometry)
        if kind is Kind.UNALLOCATED:
            return self.file.node.backing is None
        return kind is Kind.ZERO or kind is Kind.ZERO_ALLOCATED

    async def _read_old(self, entry: int, guest: int, start: int, view: memoryview) -> None:
        """Read from ``start`` inside the cluster at ``guest`` what ``entry`` shows; behind the disk's end it is zero."""
        inside = max(0, min(len(view), self.map.length - guest - start))
        if inside and not self._shows_zeroes(entry):
            await self.map.read_run(Run(classify(entry, self.map.geometry), 1, entry), guest + start, view[:inside])

    def drop(self, old: array[int], *, pass_discard: bool) -> None:
        """Give up the host clusters that these entries point to; they are released when their absence is durable."""
        geometry, pending = self.map.geometry, self.refcounts.pending
        bits = geometry.cluster_bits
        at = 0
        while at < len(old):
            run = find_run(old, at, len(old) - at, geometry)
            if run.kind is Kind.COMPRESSED:
                touched = compressed_clusters(run.entry, bits)
                pending.append(Freed(touched.start, len(touched), pass_discard))
            elif run.kind is Kind.DATA or run.kind is Kind.ZERO_ALLOCATED:
                pending.append(Freed((run.entry & OFFSET_MASK) >> bits, run.clusters, pass_discard))
            at += run.clusters

    def empty_later(self, run: Run, guest: int) -> None:
        """The run of guest clusters from ``guest`` on reads as zeroes, at the places it has; what these hold is of no use."""
        if self.pass_discard:
            first = (run.entry & OFFSET_MASK) >> self.map.geometry.cluster_bits
            self.refcounts.pending.append(Freed(first, run.clusters, True, guest))

    async def _empty_kept(self, freed: Freed) -> None:
        """Discard what clusters of one slice hold that are places of zero clusters, by the file as well: see `Freed`.

        Whoever uses the places again meanwhile waits.
        """
        clusters, bits = self.map, self.map.geometry.cluster_bits
        host, count, _, guest = freed
        assert guest is not None
        while count:
            table = await clusters.slice_at(guest << bits)
            if table is None:
                return
            if table.end_dirty or table.writing:
                # The file may still, or again, say something else.
                self.refcounts.pending.append(Freed(host, count, True, guest))
                return
            run = clusters.places_of_zeroes(table, clusters.index(guest << bits), count)
            used = any(one.first < guest + run.clusters and one.end > guest for one in clusters.allocations)
            own = run.kind is Kind.ZERO_ALLOCATED and run.entry & (OFFSET_MASK | COPIED) == host << bits | COPIED
            if own and not used:
                with self.allocating(guest, run.clusters):
                    await requests.discard(self.file.edge, host << bits, run.clusters << bits)
            host, guest, count = host + run.clusters, guest + run.clusters, count - run.clusters

    async def write_back_if_crowded(self) -> None:
        """Start a write-back when much is waiting for one."""
        if (
            self.map.cache.crowded
            or self.refcounts.cache.crowded
            or len(self.refcounts.pending) > _MANY_PENDING
        ):
            await self.writeback.commit(durable=False)

    # -------------------------------------------------------------------------------------------- zeroes and discard

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make clusters read as zeroes by their entries. ``BlockIOError(ENOTSUP)`` where only a part of one can be meant."""
        mask = self.map.geometry.cluster_size - 1
        end = offset + length
        partial = offset & mask or (end & mask and end < self.map.length)
        if partial and not (
            await self._rest_is_zero(offset & ~mask, offset) and await self._rest_is_zero(end, end + (-end & mask))
        ):
            raise BlockIOError(errno.ENOTSUP)
        if self.map.geometry.version < 3:
            # There is no flag for zeroes, but without a backing node clusters that are not there read as such.
            if not partial:
                await self._rewrite(offset, end, _Discarding(self, leave_zeroes=False, full=True))
            return
        await self.clear(offset, length, unmap=unmap)
        await self._rewrite(offset, end, _Zeroing(self, unmap=unmap, only_unallocated=bool(partial)))

    async def _rest_is_zero(self, start: int, end: int) -> bool:
        """Does this part of a cluster read as zeroes already, without being data?"""
        end = min(end, self.map.length)
        while start < end:
            kind, length, _ = await self.map.status(start, end - start)
            if kind in (Kind.DATA, Kind.COMPRESSED):
                return False
            backing = self.file.node.backing
            if kind is Kind.UNALLOCATED and backing is not None:
                inside = min(start + length, backing.node.length) - start
                if inside > 0 and not await requests.is_zero(backing.node, start, inside):
                    return False
            start += length
        return True

    async def discard(self, offset: int, length: int) -> None:
        """Give up whole clusters. ``BlockIOError(ENOTSUP)`` for parts, and for version 2 over a backing node."""
        mask = self.map.geometry.cluster_size - 1
        end = offset + length
        has_backing = self.file.node.backing is not None
        if offset & mask or (end & mask and end < self.map.length) or (has_backing and self.map.geometry.version < 3):
            raise BlockIOError(errno.ENOTSUP)
        await self.clear(offset, length, unmap=True)
        await self._rewrite(offset, end, _Discarding(self, leave_zeroes=has_backing))

    async def cut(self, start: int, end: int, *, pass_discard: bool | None = None) -> None:
        """Leave everything between two guest offsets unallocated (shrinking); ``start`` is a cluster boundary.

        ``pass_discard``: whether the file gets discards for it; default: as for the guest's own.
        """
        rule = _Discarding(self, leave_zeroes=False, full=True)
        if pass_discard is not None:
            rule.pass_discard = pass_discard
        await self._rewrite(start, end, rule)

    async def cover(self, start: int, end: int) -> None:
        """Make whole clusters between two guest offsets read as zeroes, with the space they have (growing)."""
        await self._rewrite(start, end, _Zeroing(self, unmap=False, only_unallocated=False))

    async def _rewrite(self, offset: int, end: int, rule: _Rule) -> None:
        """Apply a rule to the entries of all clusters that the range touches, slice by slice."""
        clusters, geometry = self.map, self.map.geometry
        bits, slice_entries = geometry.cluster_bits, 1 << geometry.slice_bits
        cluster, last = offset >> bits, geometry.clusters(end)
        while cluster < last:
            guest = cluster << bits
            self.file.check_writable()
            if rule.skips_missing_tables and not clusters.l1[guest >> geometry.l1_shift] & L1_IN_USE:
                cluster = ((guest >> geometry.l1_shift) + 1) << geometry.l2_bits
                continue
            table = await clusters.writable_slice(guest)
            limit = await self.free_to_change(cluster, min(last - cluster, slice_entries - clusters.index(guest)))
            if not limit:
                continue
            start = index = clusters.index(guest)
            stop = start + limit
            while index < stop:
                run = clusters.run_at(table, index, stop - index)
                if run.kind is Kind.CORRUPT:
                    await self.file.fatal(f"the L2 entry for guest offset {guest:#x} is {run.entry:#x}")
                entries = rule.apply(run, table.entries[index : index + run.clusters], cluster + index - start)
                if entries is not None:
                    clusters.change(table, index, entries)
                index += run.clusters
            cluster += limit
            await self.write_back_if_crowded()


class _Rule:
    """What to make of a run of entries."""

    skips_missing_tables = False

    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator

    def apply(self, run: Run, old: array[int], guest: int) -> array[int] | None:
        """New entries for the run, which begins at guest cluster ``guest``, or None to leave it; drops what is given up.

        Never waits.
        """
        raise AssertionError("every rule has one")

    def keeps(self, run: Run) -> bool:
        """Does a run that is given up keep its places, which are its own?"""
        return self.allocator.keep_discarded and bool(run.entry & COPIED)

    def zeroes_in_place(self, run: Run, guest: int, *, empty: bool) -> array[int]:
        """Entries by which a run of data reads as zeroes at its places; ``empty``: what these hold is of no use."""
        if empty:
            self.allocator.empty_later(run, guest)
        step = self.allocator.map.geometry.cluster_size
        return array(U64, range(run.entry | ZERO, (run.entry | ZERO) + run.clusters * step, step))


class _Zeroing(_Rule):
    def __init__(self, allocator: Allocator, *, unmap: bool, only_unallocated: bool) -> None:
        super().__init__(allocator)
        self.unmap = unmap
        self.only_unallocated = only_unallocated

    def apply(self, run: Run, old: array[int], guest: int) -> array[int] | None:
        kind, keep = run.kind, not self.unmap or self.keeps(run)
        if kind is Kind.ZERO or (kind is Kind.ZERO_ALLOCATED and keep):
            return None
        if kind is not Kind.UNALLOCATED:
            if self.only_unallocated and kind is not Kind.ZERO_ALLOCATED:
                # Written since it was looked at: that write and this one are concurrent, the data may stay.
                return None
            if kind is Kind.DATA and keep:
                return self.zeroes_in_place(run, guest, empty=self.unmap)
            self.allocator.drop(old, pass_discard=self.allocator.pass_discard)
        return array(U64, [ZERO]) * run.clusters


class _Discarding(_Rule):
    def __init__(self, allocator: Allocator, *, leave_zeroes: bool, full: bool = False) -> None:
        super().__init__(allocator)
        self.leave = array(U64, [ZERO if leave_zeroes else 0])
        self.full = full
        self.pass_discard = allocator.pass_discard
        self.skips_missing_tables = not leave_zeroes

    def apply(self, run: Run, old: array[int], guest: int) -> array[int] | None:
        kind = run.kind
        if not self.full and self.keeps(run) and kind in (Kind.DATA, Kind.ZERO_ALLOCATED):
            return self.zeroes_in_place(run, guest, empty=True) if kind is Kind.DATA else None
        if kind is Kind.UNALLOCATED:
            return self.leave * run.clusters if self.leave[0] else None
        if kind is Kind.ZERO:
            return self.leave * run.clusters if self.full else None
        self.allocator.drop(old, pass_discard=self.pass_discard)
        if not self.full and self.allocator.map.geometry.version >= 3:
            return array(U64, [ZERO]) * run.clusters
        return self.leave * run.clusters
