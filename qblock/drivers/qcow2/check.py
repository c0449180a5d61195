"""Checking an image's metadata against each other, and repairing refcounts and COPIED flags.

Models image-formats.md section 1.13. References are counted from all tables (`references.py`); the stored refcounts are compared
with them, block by block, and then the COPIED flags of the active tables with the counts. Leaks and wrong counts are repaired in
place. When a block is missing or the structure itself is broken, it is written anew behind everything that is in use and the
header switched to it, so that a crash leaves the old one or the new one. Damaged entries are reported and never changed.

Nothing may be using the image for writing meanwhile, when something is to be fixed.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import attrs

from qblock.driver import CheckFix, CheckResult
from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.layout import (
    COPIED,
    OFFSET_MASK,
    REFCOUNT_TABLE_OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    Geometry,
    Kind,
    decode_u64,
    encode_u64,
    find_run,
    zeroes_u64,
)
from qblock.drivers.qcow2.refcounts import RefcountCodec, read_refcount_table
from qblock.drivers.qcow2.references import ReferenceCounter

if TYPE_CHECKING:
    from qblock.drivers.qcow2.census import Census
    from qblock.drivers.qcow2.snapshots import SnapshotTable
    from qblock.drivers.qcow2.storage import ImageFile

MAX_FINDINGS: Final = 1000
"""Lines that a result carries; more are counted only."""


async def check_image(file: ImageFile, l1: array[int], snapshots: SnapshotTable, fix: CheckFix) -> CheckResult:
    """Check, and repair what ``fix`` allows. ``l1`` is the active L1 table. Raises `BlockIOError` from the file."""
    checker = _Checker(file, l1, snapshots, fix)
    await checker.run()
    return checker.result()


class _Checker:
    """One check of one image."""

    def __init__(self, file: ImageFile, l1: array[int], snapshots: SnapshotTable, fix: CheckFix) -> None:
        self.file = file
        self.geometry = Geometry.of(file.header)
        self.l1 = l1
        self.snapshots = snapshots
        self.fix_leaks = CheckFix.LEAKS in fix
        self.fix_errors = CheckFix.ERRORS in fix
        self.counter = ReferenceCounter(file, l1, snapshots)
        self.table: array[int] = zeroes_u64(0)
        self.corruptions = self.corruptions_fixed = self.leaks = self.leaks_fixed = 0
        self.findings: list[str] = []
        self._codec = RefcountCodec(self.geometry.refcount_order)
        self._stored: dict[int, int] = {}
        """Clusters whose stored count is not (any more) the number of references."""
        self._rebuild: list[str] = []
        """What can only be repaired by a new refcount structure."""

    @property
    def census(self) -> Census:
        """The references to each cluster."""
        return self.counter.census

    async def run(self) -> None:
        """All steps, in order."""
        self.table = await read_refcount_table(self.file)
        await self.counter.run()
        for text in (*self.snapshots.misplaced(self.file), *self.counter.problems):
            self._corruption(text, fixed=False)
        for text in self.snapshots.defects:
            # The table is written anew when everything else is right (`snapshotted.py`).
            self._corruption(text, fixed=self.fix_errors)
        self._count_refcount_structure()
        await self._compare()
        if self._rebuild and self.fix_errors:
            await self._write_new_structure()
        await self._check_copied()
        await self._finish_repair()

    def result(self) -> CheckResult:
        """What was found."""
        return CheckResult(
            corruptions=self.corruptions,
            leaks=self.leaks,
            corruptions_fixed=self.corruptions_fixed,
            leaks_fixed=self.leaks_fixed,
            image_end_offset=self._image_end() << self.geometry.cluster_bits,
            total_clusters=self.geometry.clusters(self.file.header.size),
            allocated_clusters=self.counter.allocated,
            fragmented_clusters=self.counter.fragmented,
            compressed_clusters=self.counter.compressed,
            findings=tuple(self.findings),
        )

    def _image_end(self) -> int:
        """One more than the highest cluster that is in use or counted as such (leaked)."""
        leaked = max((cluster + 1 for cluster, count in self._stored.items() if count), default=0)
        return max(self.census.end(), leaked)

    def _corruption(self, text: str, *, fixed: bool) -> None:
        self.corruptions += 1
        self.corruptions_fixed += fixed
        self._note(f"{'Repairing' if fixed else 'ERROR'} {text}")

    def _leak(self, text: str, *, fixed: bool) -> None:
        self.leaks += 1
        self.leaks_fixed += fixed
        self._note(f"{'Repairing' if fixed else 'Leaked'} {text}")

    def _note(self, text: str) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(text)
        elif len(self.findings) == MAX_FINDINGS:
            self.findings.append("(further findings are counted, but not listed)")

    # ------------------------------------------------------------------------------------------------ refcount structure

    def _count_refcount_structure(self) -> None:
        """Count table and blocks; entries of the table that are damaged demand a new structure."""
        header, size = self.file.header, self.geometry.cluster_size
        self.counter.add_bytes(header.refcount_table_offset, header.refcount_table_clusters * size)
        blocks: set[int] = set()
        for index, entry in enumerate(self.table):
            offset = entry & REFCOUNT_TABLE_OFFSET_MASK
            if not entry:
                continue
            if entry & REFCOUNT_TABLE_RESERVED or offset & (size - 1):
                trouble = "is damaged"
            elif offset + size > self.file.length():
                trouble = "points behind the end of the file"
            elif offset in blocks:
                trouble = "points to the same block as another"
            else:
                blocks.add(offset)
                continue
            self._rebuild.append(trouble)
            self._corruption(f"refcount table entry {index} {trouble}: {entry:x}", fixed=self.fix_errors)
            self.table[index] = 0
        self.census.add_runs((offset >> self.geometry.cluster_bits, 1) for offset in sorted(blocks))

    async def _compare(self) -> None:
        """Compare stored counts with the references, block by block; repair in place what can be."""
        bits = self.geometry.block_bits
        end = max(self.census.end(), self.geometry.clusters(self.file.length()))
        wanted = set(self.census.groups(bits)) | {index for index, entry in enumerate(self.table) if entry}
        for block in sorted(wanted):
            first, last = block << bits, min((block + 1) << bits, end)
            if first >= last:
                continue
            offset = self.table[block] if block < len(self.table) else 0
            counts = self.census.counts(first, last)
            if offset:
                stored = self._codec.decode(await self.file.read(offset, self.geometry.cluster_size))
                if self._compare_block(first, stored, counts):
                    await self.file.write_metadata(offset, self._codec.encode(stored))
            else:
                self._missing_block(first, counts)

    def _compare_block(self, first: int, stored: array[int], counts: array[int]) -> bool:
        """Note differences, and correct them in ``stored`` where allowed; True when something was corrected."""
        if stored[: len(counts)].tolist() == counts.tolist():
            return False
        changed = False
        for i, want in enumerate(counts):
            have = stored[i]
            if have == want:
                continue
            text = f"cluster {first + i} refcount={have} reference={want}"
            if have > want:
                fixed = self.fix_leaks
                self._leak(text, fixed=fixed)
            else:
                fixed = self.fix_errors
                self._corruption(text, fixed=fixed)
            if fixed:
                stored[i] = min(want, self.geometry.max_refcount)
                changed = True
            else:
                self._stored[first + i] = have
        return changed

    def _missing_block(self, first: int, counts: array[int]) -> None:
        for i, want in enumerate(counts):
            if want:
                self._corruption(f"cluster {first + i} refcount=0 reference={want}", fixed=self.fix_errors)
                if not self.fix_errors:
                    self._stored[first + i] = 0
        if any(counts):
            self._rebuild.append("has no refcount block")

    # ------------------------------------------------------------------------------------------------------- rebuild

    async def _write_new_structure(self) -> None:
        """Write a complete new refcount structure behind everything, and switch the header to it."""
        geometry, bits = self.geometry, self.geometry.cluster_bits
        start = max(self.census.end(), geometry.clusters(self.file.length()))
        fresh = ReferenceCounter(self.file, self.l1, self.snapshots)
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
        self._stored.clear()

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

    # -------------------------------------------------------------------------------------------------------- copied

    def _is_alone(self, cluster: int) -> bool:
        return self._stored.get(cluster, self.census.count(cluster)) == 1

    async def _check_copied(self) -> None:
        """COPIED must be set exactly where the refcount is 1, in the active tables."""
        bits, size = self.geometry.cluster_bits, self.geometry.cluster_size
        changed = False
        for index, entry in enumerate(self.l1):
            offset = entry & OFFSET_MASK
            if not offset or offset & (size - 1) or offset + size > self.file.length():
                continue
            if self._is_alone(offset >> bits) is not bool(entry & COPIED):
                self._corruption(f"OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x}", fixed=self.fix_errors)
                if self.fix_errors:
                    self.l1[index] ^= COPIED
                    changed = True
            await self._check_copied_in(offset)
        if changed:
            await self.file.write_metadata(self.file.header.l1_offset, encode_u64(self.l1[:]))

    async def _check_copied_in(self, offset: int) -> None:
        at, changed = 0, False
        entries = decode_u64(await self.file.read(offset, self.geometry.cluster_size))
        while at < len(entries):
            kind, clusters, entry = find_run(entries, at, len(entries) - at, self.geometry)
            if kind is Kind.DATA or kind is Kind.ZERO_ALLOCATED:
                changed |= self._check_copied_run(entries, at, clusters, entry)
            at += clusters
        if changed:
            await self.file.write_metadata(offset, encode_u64(entries))

    def _check_copied_run(self, entries: array[int], at: int, clusters: int, entry: int) -> bool:
        host, copied = (entry & OFFSET_MASK) >> self.geometry.cluster_bits, bool(entry & COPIED)
        if self.geometry.data_file and copied:
            return False
        if not self._stored and copied and self.census.only_once(host, clusters):
            return False
        changed = False
        for i in range(clusters):
            if (self.geometry.data_file or self._is_alone(host + i)) is not copied:
                self._corruption(f"OFLAG_COPIED data cluster: l2_entry={entries[at + i]:x}", fixed=self.fix_errors)
                if self.fix_errors:
                    entries[at + i] ^= COPIED
                    changed = True
        return changed

    # -------------------------------------------------------------------------------------------------------- finish

    async def _finish_repair(self) -> None:
        """Clear the dirty and corrupt bits when nothing is left that they warn of."""
        if self.leaks_fixed or self.corruptions_fixed:
            await self.file.barrier()
        header = self.file.header
        bad = head.DIRTY.mask | head.CORRUPT.mask
        if not self.fix_errors or self.corruptions > self.corruptions_fixed or not header.incompatible & bad:
            return
        self.file.header = attrs.evolve(header, incompatible=header.incompatible & ~bad)
        at, data = head.encode_features(self.file.header.incompatible, header.compatible, header.autoclear)
        await self.file.write_metadata(at, memoryview(data))
        await self.file.barrier()
