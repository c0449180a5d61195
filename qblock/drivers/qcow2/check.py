"""Checking an image's metadata against each other, and repairing refcounts and COPIED flags.

Models image-formats.md section 1.13. References are counted from all tables into a `census.Census`; then the stored refcounts are
compared with it, block by block, and the COPIED flags of the active tables with the counts. Repairs: leaks and wrong counts are
written in place; when a block is missing or the structure itself is broken, it is rebuilt at the end of the file and the header
switched to it, so that a crash leaves the old one or the new one. Entries that are damaged themselves are reported and never
changed, except that QEMU, too, leaves them.

Nothing may be using the image for writing meanwhile, when something is to be fixed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

import attrs

from qblock.driver import CheckFix, CheckResult
from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.census import Census
from qblock.drivers.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    OFFSET_MASK,
    REFCOUNT_TABLE_OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    Geometry,
    Kind,
    compressed_clusters,
    decode_u64,
    encode_u64,
    find_run,
    zeroes_u64,
)
from qblock.drivers.qcow2.refcounts import RefcountCodec, read_refcount_table
from qblock.errors import BlockIOError

if TYPE_CHECKING:
    from qblock.drivers.qcow2.snapshots import SnapshotTable
    from qblock.drivers.qcow2.storage import ImageFile

MAX_FINDINGS: Final = 1000
"""Lines that a result carries; more are counted only."""


async def check_image(file: ImageFile, l1: array[int], snapshots: SnapshotTable, fix: CheckFix) -> CheckResult:
    """Check, and repair what ``fix`` allows. ``l1`` is the active L1 table. Raises `BlockIOError` when the file cannot be read."""
    checker = Checker(file, l1, snapshots, fix)
    await checker.run()
    return checker.result()


@attrs.define
class _Tally:
    """Counters of a `CheckResult`."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0


class Checker:
    """One check of one image."""

    def __init__(self, file: ImageFile, l1: array[int], snapshots: SnapshotTable, fix: CheckFix) -> None:
        self.file = file
        self.geometry = Geometry.of(file.header)
        self.l1 = l1
        self.snapshots = snapshots
        self.fix = fix
        self.tally = _Tally()
        self.census = Census()
        self.table: array[int] = zeroes_u64(0)
        self.findings: list[str] = []
        self._codec = RefcountCodec(self.geometry.refcount_order)
        self._stored: dict[int, int] = {}
        """Clusters whose stored count differs from the references."""
        self._rebuild = False
        self._repairable = 0
        self._file_clusters = self.geometry.clusters(file.length())

    async def run(self) -> None:
        """All steps, in order."""
        self.table = await read_refcount_table(self.file)
        await self._count_mapping()
        self._count_refcount_structure()
        await self._compare()
        if CheckFix.ERRORS in self.fix and self._rebuild:
            await self._rebuild_refcounts()
        await self._check_copied()
        await self._finish_repair()

    def result(self) -> CheckResult:
        """What was found."""
        tally = self.tally
        total = self.geometry.clusters(self.file.header.size)
        return CheckResult(
            corruptions=tally.corruptions,
            leaks=tally.leaks,
            check_errors=tally.check_errors,
            corruptions_fixed=tally.corruptions_fixed,
            leaks_fixed=tally.leaks_fixed,
            image_end_offset=self.census.end() << self.geometry.cluster_bits,
            total_clusters=total,
            allocated_clusters=tally.allocated,
            fragmented_clusters=tally.fragmented,
            compressed_clusters=tally.compressed,
            findings=tuple(self.findings),
        )

    def _corruption(self, text: str) -> None:
        self.tally.corruptions += 1
        self._note(f"ERROR {text}")

    def _note(self, text: str) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(text)
        elif len(self.findings) == MAX_FINDINGS:
            self.findings.append("(further findings are counted, but not listed)")

    # ----------------------------------------------------------------------------------------------------- counting

    async def _count_mapping(self) -> None:
        header = self.file.header
        self._count_bytes(0, header.cluster_size)
        self._count_bytes(header.l1_offset, header.l1_size * 8)
        await self._count_tables(self.l1, active=True)
        for snapshot in self.snapshots.snapshots:
            self._count_bytes(snapshot.l1_offset, snapshot.l1_size * 8)
            raw = await self.file.read(snapshot.l1_offset, snapshot.l1_size * 8)
            await self._count_tables(decode_u64(raw), active=False)
        self._count_bytes(header.snapshots_offset, self.snapshots.length)
        self._count_bytes(header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size)
        await self._count_bitmaps()

    def _count_bytes(self, offset: int, length: int) -> None:
        bits = self.geometry.cluster_bits
        if length:
            first = offset >> bits
            self.census.add_runs([(first, -(-(offset + length) >> bits) - first)])

    async def _count_tables(self, l1: array[int], *, active: bool) -> None:
        """Count an L1 table's L2 tables, and what they refer to."""
        size, runs = self.geometry.cluster_size, []
        for index, entry in enumerate(l1):
            if not entry:
                continue
            if entry & L1_RESERVED:
                self._corruption(f"L1 entry {index} has reserved bits set: {entry:#x}")
            offset = entry & OFFSET_MASK
            if not offset:
                continue
            if offset & (size - 1):
                self._corruption(f"L2 table of L1 entry {index} is not cluster aligned: {entry:#x}")
                continue
            if offset + size > self.file.length():
                self._corruption(f"L2 table of L1 entry {index} lies behind the end of the file: {entry:#x}")
                continue
            runs.append((offset >> self.geometry.cluster_bits, 1))
            await self._count_l2(offset, active=active)
        self.census.add_runs(runs)

    async def _count_l2(self, offset: int, *, active: bool) -> None:
        entries = decode_u64(await self.file.read(offset, self.geometry.cluster_size))
        self.census.add_runs(self._l2_runs(entries, offset, active=active))

    def _l2_runs(self, entries: array[int], offset: int, *, active: bool) -> Iterator[tuple[int, int]]:
        """The host clusters that an L2 table refers to; counts allocation of the active ones."""
        bits, tally, at, expected = self.geometry.cluster_bits, self.tally, 0, 0
        while at < len(entries):
            run = find_run(entries, at, len(entries) - at, self.geometry)
            entry, kind = run.entry, run.kind
            if kind is Kind.DATA or kind is Kind.ZERO_ALLOCATED:
                host = (entry & OFFSET_MASK) >> bits
                if active:
                    tally.allocated += run.count if kind is Kind.DATA else 0
                    tally.fragmented += bool(expected and host != expected)
                expected = host + run.count
                yield host, run.count
            elif kind is Kind.COMPRESSED:
                touched = compressed_clusters(entry, bits)
                if entry & COPIED:
                    self._corruption(f"compressed cluster in the L2 table at {offset:#x}, entry {at}, has COPIED set: {entry:#x}")
                if active:
                    tally.allocated += 1
                    tally.compressed += 1
                    tally.fragmented += 1
                yield touched.start, len(touched)
            elif kind is Kind.CORRUPT:
                self._corruption(f"entry {at} of the L2 table at {offset:#x} is {entry:#x}")
            at += run.count

    async def _count_bitmaps(self) -> None:
        """Persistent bitmaps that are consistent keep their clusters."""
        header = self.file.header
        data = header.extension(head.EXT_BITMAPS)
        if data is None or not header.has(head.BITMAPS) or len(data) < 24:
            return
        size, offset = int.from_bytes(data[8:16], "big"), int.from_bytes(data[16:24], "big")
        if size > 65535 * 1024 or offset + size > self.file.length():
            self._corruption("the bitmap directory lies behind the end of the file")
            return
        self._count_bytes(offset, size)
        raw, at = await self.file.read(offset, size), 0
        while at + 24 <= len(raw):
            table_offset, entries = int.from_bytes(raw[at : at + 8], "big"), int.from_bytes(raw[at + 8 : at + 12], "big")
            if table_offset + entries * 8 > self.file.length():
                self._corruption("a bitmap table lies behind the end of the file")
                return
            self._count_bytes(table_offset, entries * 8)
            table = decode_u64(await self.file.read(table_offset, entries * 8))
            self.census.add_runs(
                ((entry & OFFSET_MASK) >> self.geometry.cluster_bits, 1) for entry in table if entry & OFFSET_MASK
            )
            name, extra = int.from_bytes(raw[at + 18 : at + 20], "big"), int.from_bytes(raw[at + 20 : at + 24], "big")
            at += -(-(24 + name + extra) // 8) * 8

    def _count_refcount_structure(self) -> None:
        """Count the blocks; entries of the table that are damaged demand a rebuild."""
        runs, seen = [], set()
        for index, entry in enumerate(self.table):
            if not entry:
                continue
            offset = entry & REFCOUNT_TABLE_OFFSET_MASK
            if entry & REFCOUNT_TABLE_RESERVED or offset & (self.geometry.cluster_size - 1) or not offset:
                self._damaged_structure(f"refcount table entry {index} is {entry:#x}")
                self.table[index] = 0
            elif offset + self.geometry.cluster_size > self.file.length():
                self._damaged_structure(f"refcount block {index} lies behind the end of the file: {entry:#x}")
                self.table[index] = 0
            elif offset in seen:
                self._damaged_structure(f"refcount block {index} is the same as another: {entry:#x}")
                self.table[index] = 0
            else:
                seen.add(offset)
                runs.append((offset >> self.geometry.cluster_bits, 1))
        self.census.add_runs(runs)

    def _damaged_structure(self, text: str) -> None:
        self._corruption(text)
        self._rebuild = True
        self._repairable += 1

    # ---------------------------------------------------------------------------------------------------- comparing

    async def _compare(self) -> None:
        per_block = 1 << self.geometry.block_bits
        end = max(self.census.end(), self._file_clusters)
        blocks = min(-(-end // per_block), max(len(self.table), self._last_counted_block() + 1))
        for block in self._interesting_blocks(blocks):
            first = block * per_block
            last = min(first + per_block, end)
            if first >= last:
                continue
            offset = self.table[block] & REFCOUNT_TABLE_OFFSET_MASK if block < len(self.table) else 0
            if offset:
                stored = self._codec.decode(await self.file.read(offset, self.geometry.cluster_size))
                await self._compare_block(offset, first, stored, self.census.counts(first, last))
            else:
                self._missing_block(first, last)

    def _last_counted_block(self) -> int:
        return (self.census.end() - 1) >> self.geometry.block_bits

    def _interesting_blocks(self, blocks: int) -> Iterable[int]:
        """Blocks that exist or should; the gaps of a sparse hostile file are skipped."""
        bits = self.geometry.block_bits
        wanted = {index for index, entry in enumerate(self.table) if entry}
        for plane in self.census.planes:
            at = plane.min() if plane else None
            while at is not None:
                wanted.add(at >> bits)
                at = plane.next_set_bit(((at >> bits) + 1) << bits) if plane.max() >= ((at >> bits) + 1) << bits else None
        return sorted(index for index in wanted if index < blocks)

    async def _compare_block(self, offset: int, first: int, stored: array[int], counts: array[int]) -> None:
        part = stored[: len(counts)]
        if part.typecode == counts.typecode and part == counts or part.tolist() == counts.tolist():
            return
        changed = False
        for i, (have, want) in enumerate(zip(part, counts, strict=True)):
            if have == want:
                continue
            self._stored[first + i] = have
            if have > want:
                self.tally.leaks += 1
                fixed = CheckFix.LEAKS in self.fix and not (self._rebuild and CheckFix.ERRORS in self.fix)
                text = f"Leaked cluster {first + i} refcount={have} reference={want}"
                self.tally.leaks_fixed += fixed
            else:
                fixed = CheckFix.ERRORS in self.fix
                text = f"cluster {first + i} refcount={have} reference={want}"
                self.tally.corruptions += 1
                self.tally.corruptions_fixed += fixed
                text = f"ERROR {text}"
            self._note(f"Repairing {text}" if fixed else text)
            if fixed:
                stored[i] = min(want, self.geometry.max_refcount)
                changed = True
                del self._stored[first + i]
        if changed:
            await self.file.write_metadata(offset, self._codec.encode(stored))

    def _missing_block(self, first: int, last: int) -> None:
        fixed = CheckFix.ERRORS in self.fix
        for i, want in enumerate(self.census.counts(first, last)):
            if want:
                self._corruption(f"cluster {first + i} refcount=0 reference={want}")
                self._rebuild = True
                self._stored[first + i] = 0
                self.tally.corruptions_fixed += fixed

    # ------------------------------------------------------------------------------------------------------- copied

    def _alone(self, first: int, count: int) -> bool | None:
        """Is the refcount of each cluster of a run 1 (True), of none (False), or of some (None)?"""
        if not self._stored and self.census.only_once(first, count):
            return True
        singles = sum(self._stored.get(c, self.census.count(c)) == 1 for c in range(first, first + count))
        return True if singles == count else None if singles else False

    async def _check_copied(self) -> None:
        """COPIED must be set exactly where the refcount is 1, in the active tables."""
        bits, size = self.geometry.cluster_bits, self.geometry.cluster_size
        l1_changed = False
        for index, entry in enumerate(self.l1):
            offset = entry & OFFSET_MASK
            if not offset or offset & (size - 1) or offset + size > self.file.length():
                continue
            if self._alone(offset >> bits, 1) is not bool(entry & COPIED):
                self._wrong_flag(f"L2 table: l1_index={index} l1_entry={entry:x}")
                if CheckFix.ERRORS in self.fix:
                    self.l1[index] ^= COPIED
                    l1_changed = True
            await self._check_copied_in(offset)
        if l1_changed:
            await self.file.write_metadata(self.file.header.l1_offset, encode_u64(self.l1[:]))

    async def _check_copied_in(self, offset: int) -> None:
        bits, at = self.geometry.cluster_bits, 0
        entries = decode_u64(await self.file.read(offset, self.geometry.cluster_size))
        changed = False
        while at < len(entries):
            run = find_run(entries, at, len(entries) - at, self.geometry)
            if (run.kind is Kind.DATA or run.kind is Kind.ZERO_ALLOCATED) and not run.entry & COMPRESSED:
                host, copied = (run.entry & OFFSET_MASK) >> bits, bool(run.entry & COPIED)
                if self._alone(host, run.count) is not copied:
                    for i in range(run.count):
                        if (self._alone(host + i, 1) is True) is not copied:
                            self._wrong_flag(f"data cluster: l2_entry={entries[at + i]:x}")
                            if CheckFix.ERRORS in self.fix:
                                entries[at + i] ^= COPIED
                                changed = True
            at += run.count
        if changed:
            await self.file.write_metadata(offset, encode_u64(entries))

    def _wrong_flag(self, text: str) -> None:
        fixed = CheckFix.ERRORS in self.fix
        self.tally.corruptions += 1
        self.tally.corruptions_fixed += fixed
        self._note(f"{'Repairing' if fixed else 'ERROR'} OFLAG_COPIED {text}")

    # ------------------------------------------------------------------------------------------------------- repair

    async def _rebuild_refcounts(self) -> None:
        """Write a complete new refcount structure behind everything that is in use, and switch the header to it."""
        geometry, header = self.geometry, self.file.header
        census = Census()
        census.planes = list(self.census.planes)
        old = [(entry >> geometry.cluster_bits, 1) for entry in self.table if entry]
        first_free = max(self.census.end(), self._file_clusters)
        self.census = await self._recount(old)
        blocks, clusters = self._plan_rebuild(first_free)
        start = first_free
        self.census.add_runs([(start, len(blocks) + clusters)])
        per_block, bits = 1 << geometry.block_bits, geometry.cluster_bits
        table = zeroes_u64(clusters << (bits - 3))
        for i, block in enumerate(blocks):
            counts = self.census.counts(block * per_block, (block + 1) * per_block)
            stored = array(self._codec.typecode, [min(count, geometry.max_refcount) for count in counts])
            await self.file.write_metadata((start + i) << bits, self._codec.encode(stored))
            table[block] = (start + i) << bits
        table_offset = (start + len(blocks)) << bits
        await self.file.write_metadata(table_offset, encode_u64(table[:]))
        await self.file.barrier()
        at, location = head.encode_refcount_location(table_offset, clusters)
        await self.file.write_metadata(at, memoryview(location))
        await self.file.barrier()
        self.file.header = attrs.evolve(header, refcount_table_offset=table_offset, refcount_table_clusters=clusters)
        self.table = table
        self._stored.clear()
        self.tally.corruptions_fixed += self._repairable

    async def _recount(self, old_blocks: list[tuple[int, int]]) -> Census:
        """The census without the present refcount structure."""
        header = self.file.header
        tally, findings = attrs.evolve(self.tally), list(self.findings)
        kept, self.census = self.census, Census()
        await self._count_mapping()
        self.tally, self.findings = tally, findings
        census, self.census = self.census, kept
        table = range(header.refcount_table_offset >> header.cluster_bits, 0)
        assert not len(table) and old_blocks is not None
        return census

    def _plan_rebuild(self, first_free: int) -> tuple[list[int], int]:
        """Which blocks are needed, with those for the new structure itself, and the clusters of the table."""
        bits = self.geometry.block_bits
        used = set(self._interesting_blocks(1 << 62))
        blocks, clusters = sorted(used), 1
        while True:
            end = first_free + len(blocks) + clusters
            wanted = sorted(used | set(range(first_free >> bits, ((end - 1) >> bits) + 1)))
            wanted_clusters = self.geometry.clusters((wanted[-1] + 1) * 8)
            if wanted == blocks and wanted_clusters == clusters:
                return blocks, clusters
            blocks, clusters = wanted, max(wanted_clusters, clusters)

    async def _finish_repair(self) -> None:
        """Clear the dirty and corrupt bits when nothing is left that they warn of."""
        header, tally = self.file.header, self.tally
        if CheckFix.ERRORS not in self.fix or tally.check_errors or tally.corruptions > tally.corruptions_fixed:
            return
        bad = head.DIRTY.mask | head.CORRUPT.mask
        await self.file.barrier()
        if header.version >= 3 and header.incompatible & bad:
            self.file.header = attrs.evolve(header, incompatible=header.incompatible & ~bad)
            at, data = head.encode_features(self.file.header.incompatible, header.compatible, header.autoclear)
            await self.file.write_metadata(at, memoryview(data))
            await self.file.barrier()


__all__ = ["BlockIOError", "CheckFix", "CheckResult", "Checker", "check_image"]
