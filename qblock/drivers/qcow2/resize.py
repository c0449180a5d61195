"""Changing the size of a disk.

Models image-formats.md section 1.14 and semantics.md section 10.4. Growing makes a bigger L1 table elsewhere if needed, zeroes
what an earlier, larger or unaligned size left in the last cluster and what a longer backing node holds behind it, and with a
preallocation gives the new clusters their places (`preallocation.py`). Shrinking gives up the clusters behind the new end, and
then the end of the file (`shrinking.py`). The new size and L1 location reach the header last, in one write: a crash leaves the
old size. Version 2 images with snapshots are refused, as in QEMU.

Differs from QEMU: what a shrinking disk loses inside its last cluster does not come back when it grows, and disks of version 2
can grow over a longer backing node.
"""

from __future__ import annotations

import contextlib
import errno
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qblock.drivers.qcow2.allocation import Payload
from qblock.drivers.qcow2.layout import L1_IN_USE, OFFSET_MASK, U64, Kind, zeroes_u64
from qblock.drivers.qcow2.preallocation import preallocate
from qblock.drivers.qcow2.refcounts import Freed
from qblock.drivers.qcow2.shrinking import give_back_end
from qblock.drivers.qcow2.storage import Area
from qblock.errors import BlockIOError
from qblock.units import align_up
from qblock.zeroes import ZERO_PIECE, all_zero, zero_view

if TYPE_CHECKING:
    from qblock.drivers.qcow2.allocation import Allocator
    from qblock.drivers.qcow2.clusters import ClusterMap

_L1_SECTOR: Final = 64
_MANY_PENDING: Final = 4096


async def resize(
    writer: Allocator,
    length: int,
    *,
    has_snapshots: bool,
    adopt: Callable[[int], None],
    preallocation: str = "off",
) -> None:
    """Make the disk ``length`` bytes long; ``adopt`` takes over the size in memory. Durable on return.

    ``preallocation`` (off, metadata, falloc, full) is for the clusters that are added. Raises `BlockIOError`; the size is the
    old one then, unless only the space behind the new end could not be given back.
    """
    clusters = writer.map
    old = clusters.length
    if length % 512:
        raise BlockIOError(errno.EINVAL, "the size of a qcow2 disk must be a multiple of 512")
    if clusters.geometry.version < 3 and has_snapshots:
        raise BlockIOError(errno.ENOTSUP, "a version 2 image with internal snapshots cannot be resized")
    if length > clusters.geometry.max_size:
        raise BlockIOError(
            errno.EFBIG, f"the largest disk with this cluster size has {clusters.geometry.max_size} bytes"
        )
    if preallocation != "off" and length < old:
        raise BlockIOError(errno.ENOTSUP, "only a disk that grows can have clusters preallocated")
    if length == old:
        return
    if length > old:
        if preallocation == "off" and writer.file.header.raw_data_file:
            preallocation = "metadata"
        await _grow(writer, length, preallocation)
    else:
        await _shrink(writer, length)
    adopt(length)
    clusters.changed_header = True
    try:
        await writer.writeback.commit(durable=True)
    except BlockIOError:
        adopt(old)
        await _cut_off(writer, old, length)
        raise
    if length < old:
        await give_back_end(writer.refcounts, writer.writeback)


# ------------------------------------------------------------------------------------------------------------- growing


async def _grow(writer: Allocator, length: int, preallocation: str) -> None:
    """Make everything ready for the new size, which is not taken over yet."""
    clusters, geometry = writer.map, writer.map.geometry
    first, end = align_up(clusters.length, geometry.cluster_size), align_up(length, geometry.cluster_size)
    # Whatever somebody left behind the end must not become content of the disk.
    await writer.cut(first, min(end, len(clusters.l1) << geometry.l1_shift))
    # A cluster of subclusters has a place without counting as written.
    await _clean_last_cluster(writer, allocate=preallocation != "off" and not geometry.extended)
    await grow_l1(writer, geometry.l1_entries(length))
    try:
        if preallocation != "off":
            await preallocate(writer, first, end, preallocation)
        backing = writer.file.node.backing
        if backing is not None and backing.node.length > first:
            await _hide(writer, first, end, backing.node.length)
    except BlockIOError:
        await _cut_off(writer, clusters.length, length)
        raise


async def _cut_off(writer: Allocator, old: int, length: int) -> None:
    """Give back what was prepared for a growth from ``old`` to ``length`` bytes that has failed. The cause of that matters more
    than what this runs into.
    """
    size = writer.map.geometry.cluster_size
    first, end = align_up(old, size), align_up(length, size)
    if first < end:
        with contextlib.suppress(BlockIOError):
            await writer.cut(first, end)
            await give_back_end(writer.refcounts, writer.writeback)


async def _hide(writer: Allocator, first: int, end: int, length: int) -> None:
    """Let nothing be seen between two cluster boundaries of a backing node of ``length`` bytes."""
    if writer.map.geometry.version >= 3:
        await writer.cover(first, end)
        return
    end = min(end, align_up(length, writer.map.geometry.cluster_size))
    while first < end:
        count = min(end - first, ZERO_PIECE)
        await writer.write(first, Payload(zero_view(count)))
        first += count


async def _clean_last_cluster(writer: Allocator, *, allocate: bool) -> None:
    """What lies behind the end in the last cluster must read as zeroes when the end moves; ``allocate`` gives it a place."""
    clusters = writer.map
    backing = writer.file.node.backing
    at, end = clusters.length, align_up(clusters.length, clusters.geometry.cluster_size)
    while at < end:
        kind, length, _ = await clusters.status(at, end - at)
        shines_through = kind is Kind.UNALLOCATED and backing is not None and backing.node.length > at
        stored = kind in (Kind.DATA, Kind.COMPRESSED) and not await _is_zero(clusters, at, length)
        if stored or shines_through or (allocate and kind not in (Kind.DATA, Kind.COMPRESSED)):
            await writer.write(at, Payload(zero_view(length)))
        at += length


async def _is_zero(clusters: ClusterMap, offset: int, length: int) -> bool:
    """Does a part of a cluster, which may lie behind the end of the disk, hold nothing but zeroes?"""
    content = bytearray(length)
    await clusters.read(offset, memoryview(content))
    return all_zero(memoryview(content))


async def grow_l1(writer: Allocator, entries: int) -> None:
    """Make the L1 table at least ``entries`` long; the header gets to know of its new place with the next commit."""
    clusters, refcounts, geometry = writer.map, writer.refcounts, writer.map.geometry
    if entries <= len(clusters.l1):
        return
    writer.file.event("l1_grow_alloc_table")
    claim = await refcounts.allocate_contiguous(geometry.clusters(entries * 8))
    # From here on nothing waits.
    bits, old_host, old_clusters = geometry.cluster_bits, clusters.l1_host, geometry.clusters(len(clusters.l1) * 8)
    clusters.l1.extend(zeroes_u64(entries - len(clusters.l1)))
    clusters.l1_host = claim.host
    clusters.moved_l1 = clusters.changed_header = True
    if old_clusters:
        refcounts.pending.append(Freed(old_host >> bits, old_clusters, refcounts.discard_other))
    metadata = writer.file.metadata
    if metadata is not None:
        metadata.remove(Area.ACTIVE_L1, range(old_host >> bits, (old_host >> bits) + old_clusters))
        metadata.add(Area.ACTIVE_L1, range(claim.host >> bits, (claim.host >> bits) + claim.clusters))


# ----------------------------------------------------------------------------------------------------------- shrinking


async def _shrink(writer: Allocator, length: int) -> None:
    clusters, geometry = writer.map, writer.map.geometry
    whole = geometry.l1_entries(length)
    first, end = align_up(length, geometry.cluster_size), align_up(clusters.length, geometry.cluster_size)
    if first < end:
        await writer.cut(first, min(end, whole << geometry.l1_shift), pass_discard=True)
    writer.file.event("l1_shrink_write_table")
    await drop_tables(writer, whole, pass_discard=True)
    writer.file.event("l1_shrink_free_l2_clusters")


async def drop_tables(writer: Allocator, first: int, *, pass_discard: bool) -> None:
    """Leave everything from L1 entry ``first`` on unallocated, without writing the L2 tables that go. No request is there."""
    clusters, geometry = writer.map, writer.map.geometry
    for index in range(first, len(clusters.l1)):
        if not clusters.l1[index] & L1_IN_USE:
            continue
        old = array(U64)
        for guest in range(index << geometry.l1_shift, (index + 1) << geometry.l1_shift, 1 << geometry.slice_shift):
            table = await clusters.slice_at(guest)
            assert table is not None, "the L1 entry is in use"
            old.extend(table.entries)
        # From here to the end of the table nothing waits: clusters are released only with what refers to them.
        writer.drop(old, pass_discard=pass_discard)
        _drop_table(clusters, index)
        if len(writer.refcounts.pending) > _MANY_PENDING:
            await writer.writeback.commit(durable=False)


def _drop_table(clusters: ClusterMap, index: int) -> None:
    refcounts, bits = clusters.refcounts, clusters.geometry.cluster_bits
    assert refcounts is not None
    host = clusters.l1[index] & OFFSET_MASK
    clusters.l1[index] = 0
    clusters.dirty_l1.add(index // _L1_SECTOR)
    slices_shift = clusters.geometry.l2_bits - clusters.geometry.slice_bits
    clusters.cache.forget(range(index << slices_shift, (index + 1) << slices_shift))
    refcounts.pending.append(Freed(host >> bits, 1, refcounts.discard_other))
    if clusters.file.metadata is not None:
        clusters.file.metadata.remove(Area.ACTIVE_L2, [host >> bits])
