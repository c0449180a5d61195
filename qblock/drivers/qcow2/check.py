"""Checking an image's metadata against each other, and repairing what can be repaired.

Models image-formats.md section 1.13. References are counted from all tables (`references.py`); the stored refcounts are compared
with them, block by block, and then the COPIED flags of the active tables with the counts. The verdicts are qemu-img's: what
counts as one corruption or one leak there does so here. Repair differs in being careful:

- Wrong counts are corrected in place, also those of clusters that are not counted at all. Only when a block is missing, damaged
  or shared, the structure is written anew: behind everything in the file, then the header is switched to it, so that a crash
  leaves the old one or the new one.
- Each write corrects something by itself, so a crash between two of them leaves an image with less damage, never with other.
- When the L1 table is not in the file, nothing is repaired: by its references all data would be leaks.

Nothing may be using the image for writing meanwhile, when something is to be fixed.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import attrs
from pyroaring import BitMap64

from qblock.driver import CheckFix, CheckResult, Progress, no_progress
from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.damage import Damage, Report
from qblock.drivers.qcow2.lanes import plain_entries
from qblock.drivers.qcow2.layout import (
    COPIED,
    OFFSET_MASK,
    REFCOUNT_TABLE_OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    U64,
    Geometry,
    Kind,
    decode_u64,
    encode_u64,
    find_run,
    first_words,
    ramp_run,
    with_first_words,
    zeroes_u64,
)
from qblock.drivers.qcow2.refcounts import RefcountCodec, read_refcount_table
from qblock.drivers.qcow2.references import ReferenceCounter
from qblock.ranges import ByteRange
from qblock.units import MiB

if TYPE_CHECKING:
    from qblock.drivers.qcow2.census import Census
    from qblock.drivers.qcow2.snapshots import SnapshotTable
    from qblock.drivers.qcow2.storage import ImageFile


_AT_ONCE: Final = MiB
"""Bytes of adjacent refcount blocks that are compared together."""
_FARTHEST: Final = (1 << 63) - 1
"""No file has anything behind this offset."""


async def check_image(
    file: ImageFile,
    l1: array[int],
    snapshots: SnapshotTable,
    fix: CheckFix,
    *,
    explain: bool = False,
    progress: Progress = no_progress,
) -> CheckResult:
    """Check, and repair what ``fix`` allows. ``l1`` is the active L1 table. Raises `BlockIOError` from the file.

    ``explain``: find out for wrong refcounts which parts of the disk they concern; costs reading all tables once more.
    ``progress`` hears twice of each byte of the disks: when its references have been counted, and when their counts are compared.
    """
    checker = _Checker(file, l1, snapshots, fix, progress)
    await checker.run()
    if explain:
        from qblock.drivers.qcow2.owners import name_users  # noqa: PLC0415 - rarely wanted

        checker.report.findings = await name_users(file, l1, snapshots, checker.report.findings)
    return checker.result()


class _Checker:
    """One check of one image."""

    def __init__(
        self, file: ImageFile, l1: array[int], snapshots: SnapshotTable, fix: CheckFix, progress: Progress
    ) -> None:
        self.file = file
        self.geometry = Geometry.of(file.header)
        self.l1 = l1
        self.snapshots = snapshots
        self.refused: str | None = None
        if fix and self._l1_is_lost():
            fix, self.refused = (
                CheckFix.NONE,
                "the L1 table is not in the file; by its references all data would be leaks",
            )
        self.fix = fix
        self.fix_leaks = CheckFix.LEAKS in fix
        self.fix_errors = CheckFix.ERRORS in fix
        self.report = Report()
        self._progress = progress
        self._entries = len(l1) + sum(one.l1_bytes // 8 for one in snapshots.usable(file))
        """Entries of all L1 tables."""
        self._followed = 0
        self.counter = ReferenceCounter(
            file, l1, snapshots, self.report, mend=self.fix_errors, heard=self._hear_of_entries
        )
        self.table: array[int] = zeroes_u64(0)
        self._codec = RefcountCodec(self.geometry.refcount_order)
        self._rebuild = False
        """Something is wrong that only a new refcount structure repairs."""
        self._unreadable: set[int] = set()
        """Blocks that the refcount table does not lead to."""
        self._differ, self._ones = BitMap64(), BitMap64()
        """Clusters whose stored count is not (any more) the number of references; those of them whose count is 1."""
        self._held = 0
        """One more than the highest cluster with a stored count that is wrong and not 0."""

    @property
    def census(self) -> Census:
        """The references to each cluster."""
        return self.counter.census

    def _l1_is_lost(self) -> bool:
        header = self.file.header
        return (
            bool(header.l1_size) and header.l1_offset + header.l1_size * 8 - self.file.length() >= header.cluster_size
        )

    def _hear_of_entries(self, count: int) -> None:
        self._followed += count
        self._tell(self._followed)

    def _tell(self, entries: int) -> None:
        """Tell the caller how far this is: ``entries`` of L1 tables have been followed, or compared after that."""
        shift = self.geometry.l1_shift
        self._progress(entries << shift, 2 * self._entries << shift)

    async def run(self) -> None:
        """All steps, in order."""
        self.table = await read_refcount_table(self.file)
        await self.counter.run()
        if self.counter.mended:
            await self.file.barrier()
        for text in self.snapshots.defects:
            # The table is written anew when everything else is right (`checked.py`).
            self.report.add(Damage.SNAPSHOT_ENTRY, text, fixed=self.fix_errors)
        self._count_refcount_structure()
        if self.fix_leaks and not self.fix_errors and await self._needs_rebuild():
            self.refused = "the refcount structure has to be written anew, which '-r leaks' does not do; use '-r all'"
            self.fix_leaks = False
        await self._compare()
        if self._rebuild and self.fix_errors:
            await self._write_new_structure()
        await self._check_copied()
        await self._finish_repair()
        self._tell(2 * self._entries)

    def result(self) -> CheckResult:
        """What was found."""
        report = self.report
        return CheckResult(
            corruptions=report.corruptions,
            leaks=report.leaks,
            check_errors=report.check_errors,
            corruptions_fixed=report.corruptions_fixed,
            leaks_fixed=report.leaks_fixed,
            image_end_offset=max(self.census.end(), self._held) << self.geometry.cluster_bits,
            total_clusters=self.geometry.clusters(self.file.header.disk_size),
            allocated_clusters=self.counter.allocated,
            fragmented_clusters=self.counter.fragmented,
            compressed_clusters=self.counter.compressed,
            findings=report.lines(),
            details=tuple(report.findings),
            refused=self.refused,
        )

    # ------------------------------------------------------------------------------------------------ refcount structure

    def _count_refcount_structure(self) -> None:
        """Count table and blocks; entries of the table that are damaged demand a new structure."""
        header, size, bits = self.file.header, self.geometry.cluster_size, self.geometry.cluster_bits
        self.counter.add_bytes(header.refcount_table_offset, header.refcount_table_clusters * size)
        seen, again = BitMap64(), []
        for index, entry in enumerate(self.table):
            offset = entry & REFCOUNT_TABLE_OFFSET_MASK
            if not entry:
                continue
            if offset & (size - 1) or offset > _FARTHEST:
                self._bad_table_entry(index, "cannot be followed")
                self._unreadable.add(index)
                self.table[index] = 0
            elif entry & REFCOUNT_TABLE_RESERVED:
                self._bad_table_entry(index, "has reserved bits set")
                self.table[index] = offset
            elif offset >> bits >= self.counter.limit:
                # It counts nothing, so that leaks can be repaired without it.
                self._bad_table_entry(index, "leads out of the file", demands_rebuild=self.fix_errors)
                self.table[index] = 0
            else:
                cluster = offset >> bits
                if cluster in seen or self.census.count(cluster):
                    self._rebuild = True
                    text = f"refcount block {index} is used for something else, too"
                    self.report.add(Damage.BLOCK, text, place=ByteRange(offset, size), fixed=self.fix_errors)
                if cluster in seen:
                    again.append((cluster, 1))
                seen.add(cluster)
        self.census.add(seen)
        self.census.add_runs(again)

    def _bad_table_entry(self, index: int, trouble: str, *, demands_rebuild: bool = True) -> None:
        self._rebuild = self._rebuild or demands_rebuild
        place = ByteRange(self.file.header.refcount_table_offset + 8 * index, 8)
        text = f"refcount table entry {index} {trouble}: {self.table[index]:x}"
        self.report.add(Damage.TABLE_ENTRY, text, place=place, fixed=self.fix_errors)

    # ------------------------------------------------------------------------------------------------------- comparison

    def _blocks(self) -> list[int]:
        """Numbers of the blocks that exist or are needed."""
        wanted = set(self.census.groups(self.geometry.block_bits))
        return sorted(wanted | {index for index, entry in enumerate(self.table) if entry} | self._unreadable)

    def _end(self) -> int:
        return max(self.census.end(), self.counter.limit)

    async def _stored(self, block: int) -> array[int] | None:
        """The counts in a block; None when it does not exist."""
        offset = self.table[block] & REFCOUNT_TABLE_OFFSET_MASK if block < len(self.table) else 0
        return self._codec.decode(await self.file.read(offset, self.geometry.cluster_size)) if offset else None

    async def _needs_rebuild(self) -> bool:
        """Is a cluster in use that is not counted at all? QEMU repairs that, and damaged structures, by a new structure only."""
        bits = self.geometry.block_bits
        if self._rebuild:
            return True
        for block in self._blocks():
            counts = self.census.counts(block << bits, (block + 1) << bits)
            stored = await self._stored(block)
            if stored is None:
                if any(counts):
                    return True
            elif stored.tolist() != counts.tolist() and any(w and not h for h, w in zip(stored, counts, strict=True)):
                return True
        return False

    async def _compare(self) -> None:
        """Compare stored counts with the references, block by block; correct in place what can be."""
        bits, end, in_place, done = self.geometry.block_bits, self._end(), not self._rebuild, 0
        blocks = self._blocks()
        for place, block in enumerate(blocks):
            if block < done:
                continue
            self._tell(self._entries + self._entries * place // len(blocks))
            first, last = block << bits, (block + 1) << bits
            if block in self._unreadable:
                self.report.check_errors += max(0, min(last, end) - first) * (not self.fix_errors)
                continue
            if (equal := await self._ordinary_blocks(block)) > 0:
                done = block + equal
                continue
            counts = self.census.counts(first, last)
            stored = await self._stored(block)
            missing = stored is None
            if stored is None:
                stored = array(self._codec.typecode, bytes(len(counts) * array(self._codec.typecode).itemsize))
            if not self._compare_block(first, stored, counts):
                continue
            if missing:
                self._rebuild = True
            elif in_place:
                await self.file.write_metadata(
                    self.table[block] & REFCOUNT_TABLE_OFFSET_MASK, self._codec.encode(stored)
                )

    async def _ordinary_blocks(self, block: int) -> int:
        """How many blocks from here on lie side by side, and rightly say 1 of each cluster; 0: compare this one in detail."""
        size, bits = self.geometry.cluster_size, self.geometry.block_bits
        if block >= len(self.table) or not self.table[block]:
            return 0
        count = ramp_run(self.table, block, min(len(self.table) - block, max(_AT_ONCE // size, 1)), size)
        while not self.census.only_once(block << bits, count << bits):
            count >>= 1
            if not count:
                return 0
        stored = await self.file.read(self.table[block], count * size)
        ones = bytes(self._codec.encode(array(self._codec.typecode, [1]) * (1 << bits))) * count
        return count if stored == ones else 0

    def _compare_block(self, first: int, stored: array[int], counts: array[int]) -> bool:
        """Note differences, and correct them in ``stored`` where allowed; True when there were any to be corrected."""
        if stored.tolist() == counts.tolist():
            return False
        changed, size, most = self.fix_errors and self._rebuild, self.geometry.cluster_size, self.geometry.max_refcount
        inside = self._end() - first
        for i, (have, want) in enumerate(zip(stored.tolist(), counts.tolist(), strict=True)):
            if have == want:
                continue
            if i >= inside:
                # Behind the end of the file nothing leaks; but writing in place goes by what is counted.
                self._differ.add(first + i)
                if have == 1:
                    self._ones.add(first + i)
                continue
            damage = Damage.LEAK if have > want else Damage.TOO_LOW
            fixed = self.fix_leaks if have > want else self.fix_errors and want <= most
            text = f"cluster {first + i} refcount={have} reference={want}"
            self.report.add(damage, text, place=ByteRange((first + i) * size, size), fixed=fixed)
            if fixed:
                stored[i] = want
                changed = True
                continue
            self._differ.add(first + i)
            if have == 1:
                self._ones.add(first + i)
            if have:
                self._held = max(self._held, first + i + 1)
        return changed

    # ------------------------------------------------------------------------------------------------------------ rebuild

    async def _write_new_structure(self) -> None:
        """Write a complete new refcount structure behind everything, and switch the header to it."""
        geometry, bits = self.geometry, self.geometry.cluster_bits
        start = self._end()
        fresh = ReferenceCounter(self.file, self.l1, self.snapshots, Report())
        await fresh.run()
        self.counter = fresh
        blocks, clusters = self._plan_structure(start)
        self.census.add_runs([(start, len(blocks) + clusters)])
        table = zeroes_u64(clusters << (bits - 3))
        for i, block in enumerate(blocks):
            counts = self.census.counts(block << geometry.block_bits, (block + 1) << geometry.block_bits)
            stored = array(self._codec.typecode, [min(count, geometry.max_refcount) for count in counts])
            await self.file.write_metadata((start + i) << bits, self._codec.encode(stored))
            table[block] = (start + i) << bits
        table_offset = (start + len(blocks)) << bits
        await self.file.write_metadata(table_offset, encode_u64(table))
        await self.file.barrier()
        at, location = head.encode_refcount_location(table_offset, clusters)
        await self.file.write_metadata(at, memoryview(location))
        await self.file.barrier()
        self.file.header = attrs.evolve(
            self.file.header, refcount_table_offset=table_offset, refcount_table_clusters=clusters
        )
        self._differ, self._ones, self._held = BitMap64(), BitMap64(), 0

    def _plan_structure(self, start: int) -> tuple[list[int], int]:
        """Which blocks are needed, those for the new structure itself included, and the clusters of the table."""
        bits = self.geometry.block_bits
        used = set(self.census.groups(bits))
        blocks, clusters = sorted(used), 1
        while True:
            end = start + len(blocks) + clusters
            wanted = sorted(used | set(range(start >> bits, ((end - 1) >> bits) + 1)))
            needed = max(self.geometry.clusters((wanted[-1] + 1) * 8), clusters)
            if wanted == blocks and needed == clusters:
                return blocks, clusters
            blocks, clusters = wanted, needed

    # ------------------------------------------------------------------------------------------------------------- copied

    def _agrees(self, cluster: int, entry: int) -> bool:
        """Does an entry's COPIED flag agree with the refcount, as far as that is known?"""
        if not self.fix_errors and cluster >> self.geometry.block_bits in self._unreadable:
            return True
        return self._is_alone(cluster) is bool(entry & COPIED)

    def _is_alone(self, cluster: int) -> bool:
        return cluster in self._ones if cluster in self._differ else self.census.count(cluster) == 1

    def _may_fix_copied(self, cluster: int) -> bool:
        """Leaks and flags are alike: both can be set right without touching what anybody refers to. Unless it is not counted."""
        return self.fix_errors or (self.fix_leaks and (cluster in self._differ or self.census.count(cluster) > 0))

    async def _check_copied(self) -> None:
        """COPIED must be set exactly where the refcount is 1, in the active tables."""
        if not self.report.findings and self.counter.all_copied and not self._differ and not self.census.several:
            return
        bits, size = self.geometry.cluster_bits, self.geometry.cluster_size
        changed, seen = False, BitMap64()
        for index, entry in enumerate(self.l1):
            offset = entry & OFFSET_MASK
            if not offset:
                continue
            cluster = offset >> bits
            if not self._agrees(cluster, entry):
                fixed = self._may_fix_copied(cluster)
                text = f"OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x}"
                guest = ByteRange(index << self.geometry.l1_shift, 1 << self.geometry.l1_shift)
                place = ByteRange(self.file.header.l1_offset + 8 * index, 8)
                self.report.add(Damage.COPIED, text, place=place, guest=guest, fixed=fixed)
                if fixed:
                    self.l1[index] ^= COPIED
                    changed = True
            if not offset & (size - 1) and offset + size <= self.file.length() and cluster not in seen:
                seen.add(cluster)
                await self._check_copied_in(offset, index << self.geometry.l2_bits)
        if changed:
            await self.file.write_metadata(self.file.header.l1_offset, encode_u64(self.l1[:]))

    async def _check_copied_in(self, offset: int, first: int) -> None:
        at, changed = 0, False
        raw = decode_u64(await self.file.read(offset, self.geometry.cluster_size))
        entries = first_words(raw, self.geometry)
        if self._copied_is_right_everywhere(entries):
            return
        while at < len(entries):
            kind, clusters, entry = find_run(entries, at, len(entries) - at, self.geometry)
            if (kind is Kind.DATA or kind is Kind.ZERO_ALLOCATED) and not self._copied_is_right(clusters, entry):
                for i in range(at, at + clusters):
                    changed |= self._check_copied_at(entries, i, offset, first)
            at += clusters
        if changed:
            await self.file.write_metadata(offset, encode_u64(with_first_words(raw, entries, self.geometry)))

    def _copied_is_right_everywhere(self, entries: array[int]) -> bool:
        """The quick answer for tables of plain data; False: they must be looked at run by run."""
        if self._differ or self.geometry.data_file or self.geometry.extended:
            return False
        plain = plain_entries(entries, self.geometry.cluster_bits, clusters=self.counter.limit)
        if plain is None:
            return False
        alone, shared = plain.clusters, array(U64)
        if not plain.copied:
            pairs = list(zip(plain.entries, plain.clusters, strict=True))
            alone = array(U64, [cluster for entry, cluster in pairs if entry & COPIED])
            shared = array(U64, [cluster for entry, cluster in pairs if not entry & COPIED])
        # All of them are referenced, those of `several` more than once.
        several = self.census.several
        return BitMap64(alone).isdisjoint(several) and BitMap64(shared).issubset(several)

    def _copied_is_right(self, clusters: int, entry: int) -> bool:
        """The quick answer for runs; False: they must be looked at one by one."""
        if not entry & COPIED:
            return False
        host = (entry & OFFSET_MASK) >> self.geometry.cluster_bits
        return self.geometry.data_file or (not self._differ and self.census.only_once(host, clusters))

    def _check_copied_at(self, entries: array[int], at: int, table: int, first: int) -> bool:
        """Check one entry of the table at ``table``, whose first guest cluster is ``first``; True when it was changed."""
        entry, bits = entries[at], self.geometry.cluster_bits
        cluster = (entry & OFFSET_MASK) >> bits
        if bool(entry & COPIED) if self.geometry.data_file else self._agrees(cluster, entry):
            return False
        fixed = self._may_fix_copied(cluster)
        place = ByteRange(table + (at << self.geometry.entry_bits), 1 << self.geometry.entry_bits)
        guest = ByteRange((first + at) << bits, self.geometry.cluster_size)
        text = f"OFLAG_COPIED data cluster: l2_entry={entry:x}"
        self.report.add(Damage.COPIED, text, place=place, guest=guest, fixed=fixed)
        if fixed:
            entries[at] ^= COPIED
        return fixed

    # ------------------------------------------------------------------------------------------------------------- finish

    async def _finish_repair(self) -> None:
        """Clear the dirty and corrupt bits when nothing is left that they warn of."""
        report, header = self.report, self.file.header
        if report.leaks_fixed or report.corruptions_fixed:
            await self.file.barrier()
        bad = head.DIRTY.mask | head.CORRUPT.mask
        if not self.fix or self.refused or not report.clean or not header.incompatible & bad:
            return
        self.file.header = attrs.evolve(header, incompatible=header.incompatible & ~bad)
        at, data = head.encode_features(self.file.header.incompatible, header.compatible, header.autoclear)
        await self.file.write_metadata(at, memoryview(data))
        await self.file.barrier()
