"""Who refers to a host cluster: the question that a person asks about a wrong refcount.

There is nothing like it in QEMU. The tables are walked once more, and of each run of clusters that is asked about the guest
range, or the table it belongs to, is noted. What is found is added to the findings of a check.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final, NamedTuple

import attrs
from pyroaring import BitMap64

from qblock.drivers.qcow2.damage import Damage
from qblock.drivers.qcow2.layout import (
    OFFSET_MASK,
    Geometry,
    Kind,
    compressed_clusters,
    decode_u64,
    find_run,
    first_words,
)
from qblock.findings import Finding
from qblock.ranges import ByteRange

if TYPE_CHECKING:
    from qblock.drivers.qcow2.snapshots import SnapshotTable
    from qblock.drivers.qcow2.storage import ImageFile

_MAX_USERS: Final = 16
"""Users of one cluster that are named."""
_COUNTED: Final = frozenset({Damage.LEAK.value, Damage.TOO_LOW.value, Damage.BLOCK.value})


class _User(NamedTuple):
    """Somebody who refers to a cluster, and the part of the disk that this concerns."""

    text: str
    guest: ByteRange | None


async def name_users(
    file: ImageFile, l1: array[int], snapshots: SnapshotTable, findings: list[Finding]
) -> list[Finding]:
    """The findings, those about refcounts with their users and guest ranges."""
    bits = file.header.cluster_bits
    wanted = BitMap64(one.place.offset >> bits for one in findings if one.kind in _COUNTED and one.place is not None)
    if not wanted:
        return findings
    search = _Search(file, wanted)
    await search.run(l1, snapshots)
    named = []
    for one in findings:
        if one.kind in _COUNTED and one.place is not None:
            users = search.users.get(one.place.offset >> bits, [])
            guest = tuple(sorted({user.guest for user in users if user.guest is not None}))
            one = attrs.evolve(one, users=tuple(user.text for user in users), guest=guest)
        named.append(one)
    return named


class _Search:
    """One walk through all tables. ``users``: of the clusters that are wanted."""

    def __init__(self, file: ImageFile, wanted: BitMap64) -> None:
        self.file = file
        self.geometry = Geometry.of(file.header)
        self.wanted = wanted
        self.users: dict[int, list[_User]] = {}

    async def run(self, l1: array[int], snapshots: SnapshotTable) -> None:
        """Look at header, tables, and the trees of the disk and of each snapshot."""
        header = self.file.header
        self._bytes(0, header.cluster_size, "header")
        self._bytes(header.l1_offset, header.l1_size * 8, "L1 table")
        self._bytes(
            header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size, "refcount table"
        )
        self._bytes(header.snapshots_offset, snapshots.length, "snapshot table")
        self._bytes(*header.encryption_area, "encryption header")
        await self._tree(l1, "")
        for snapshot in snapshots.usable(self.file):
            of = f" of snapshot {snapshot.id} ({snapshot.name})"
            self._bytes(snapshot.l1_offset, snapshot.l1_bytes, f"L1 table{of}")
            await self._tree(decode_u64(await self.file.read(snapshot.l1_offset, snapshot.l1_bytes)), of)

    def _bytes(self, offset: int, length: int, text: str) -> None:
        bits = self.geometry.cluster_bits
        if length:
            self._run(offset >> bits, -(-(offset + length) >> bits), text, None)

    def _run(self, first: int, end: int, text: str, guest: int | None) -> None:
        """Clusters ``first`` to ``end`` (exclusive) are used; the first one for guest offset ``guest``, the others behind it."""
        if not self.wanted.range_cardinality(first, end):
            return
        size = self.geometry.cluster_size
        for cluster in self.wanted & BitMap64(range(first, end)):
            users = self.users.setdefault(cluster, [])
            if len(users) < _MAX_USERS:
                at = None if guest is None else ByteRange(guest + (cluster - first) * size, size)
                users.append(_User(text, at))

    async def _tree(self, l1: array[int], of: str) -> None:
        geometry, bits = self.geometry, self.geometry.cluster_bits
        span = 1 << geometry.l1_shift
        for index, entry in enumerate(l1):
            offset = entry & OFFSET_MASK
            if not offset or offset >= self.file.length():
                continue
            if offset >> bits in self.wanted:
                guest = ByteRange(index * span, span)
                self.users.setdefault(offset >> bits, []).append(_User(f"L2 table{of}", guest))
            raw = decode_u64(await self.file.read(offset, geometry.cluster_size))
            self._table(first_words(raw, geometry), index * span, of)

    def _table(self, entries: array[int], guest: int, of: str) -> None:
        geometry, bits, at = self.geometry, self.geometry.cluster_bits, 0
        while at < len(entries):
            kind, clusters, entry = find_run(entries, at, len(entries) - at, geometry)
            first = (entry & OFFSET_MASK) >> bits
            if kind is Kind.COMPRESSED:
                for cluster in compressed_clusters(entry, bits):
                    self._run(cluster, cluster + 1, f"compressed data{of}", guest + (at << bits))
            elif kind is Kind.CORRUPT:
                self._run(first, first + 2, f"a damaged entry{of}", guest + (at << bits))
            elif first and not geometry.data_file:
                self._run(first, first + clusters, f"data{of}", guest + (at << bits))
            at += clusters
