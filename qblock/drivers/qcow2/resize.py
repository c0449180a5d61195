"""Changing the size of a disk.

Models image-formats.md section 1.14 and semantics.md section 10.4. Growing makes a bigger L1 table elsewhere if needed and zeroes
what an earlier, larger or unaligned size left in the last cluster; shrinking gives up the clusters behind the new end. The new
size and L1 location reach the header last, in one write. Differs from QEMU: the file itself is not made shorter when the disk
shrinks (its free clusters are used again), and version 2 images with snapshots are refused as there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from qblock.drivers.qcow2.allocation import Payload
from qblock.drivers.qcow2.layout import OFFSET_MASK, Kind, zeroes_u64
from qblock.drivers.qcow2.refcounts import Freed
from qblock.drivers.qcow2.storage import Area
from qblock.errors import BlockIOError
from qblock.units import align_up
from qblock.zeroes import zero_view

if TYPE_CHECKING:
    from qblock.drivers.qcow2.allocation import Allocator
    from qblock.drivers.qcow2.clusters import ClusterMap

_L1_SECTOR = 64


async def resize(writer: Allocator, length: int, *, has_snapshots: bool, adopt: Callable[[int], None]) -> None:
    """Make the disk ``length`` bytes long; ``adopt`` takes over the size in memory. Durable on return."""
    clusters = writer.map
    if length % 512:
        raise BlockIOError(errno.EINVAL, "the size of a qcow2 disk must be a multiple of 512")
    if clusters.geometry.version < 3 and has_snapshots:
        raise BlockIOError(errno.ENOTSUP, "a version 2 image with internal snapshots cannot be resized")
    if length > clusters.geometry.max_size:
        raise BlockIOError(errno.EFBIG, f"the largest disk with this cluster size has {clusters.geometry.max_size} bytes")
    if length == clusters.length:
        return
    if length > clusters.length:
        await _clean_last_cluster(writer)
        await _grow_l1(writer, clusters.geometry.l1_entries(length))
    else:
        await _shrink(writer, length)
    adopt(length)
    clusters.changed_header = True
    await writer.writeback.commit(durable=True)


async def _clean_last_cluster(writer: Allocator) -> None:
    """What lies behind the end in the last cluster must read as zeroes when the end moves."""
    clusters = writer.map
    rest = -clusters.length % clusters.geometry.cluster_size
    if not rest:
        return
    kind, _, _ = await clusters.status(clusters.length - 1, 1)
    if kind in (Kind.DATA, Kind.COMPRESSED):
        await writer.write(clusters.length, Payload(zero_view(rest)))


async def _grow_l1(writer: Allocator, entries: int) -> None:
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


async def _shrink(writer: Allocator, length: int) -> None:
    clusters, geometry = writer.map, writer.map.geometry
    first, end = align_up(length, geometry.cluster_size), align_up(clusters.length, geometry.cluster_size)
    await writer.cut(first, end)
    writer.file.event("l1_shrink_write_table")
    for index in range(geometry.l1_entries(length), len(clusters.l1)):
        if clusters.l1[index] & OFFSET_MASK:
            _drop_table(clusters, index)


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
