"""Creating, applying and deleting internal snapshots of an open image.

Models image-formats.md section 1.9. Each is worked out as a `shadow.Change` and takes effect in one write of the header. A new
snapshot takes over the active L1 table, and the active tree goes on with a copy: the L2 tables in which entries were marked as
written in place are the snapshot's afterwards, with the marks, which mean nothing there. The state of a machine that an applied
snapshot holds comes with it, behind the end of the disk.

Differs from QEMU: a snapshot that cannot be made leaves no leaked clusters; to apply one, refcounts must have room for the users
in the end, not for old and new ones together.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qblock.drivers.qcow2.header import MAX_SNAPSHOTS
from qblock.drivers.qcow2.layout import decode_u64
from qblock.drivers.qcow2.shadow import Change, resized
from qblock.drivers.qcow2.snapshots import MAX_TABLE_BYTES, Snapshot, SnapshotTable, encode_snapshot_table
from qblock.errors import BlockIOError

if TYPE_CHECKING:
    from array import array

    from qblock.drivers.qcow2.allocation import Allocator
    from qblock.drivers.qcow2.storage import ImageFile

_MAX_NAME = 65535


def next_id(snapshots: Sequence[Snapshot]) -> str:
    """The id of the next snapshot: one more than the largest number that an id begins with."""
    return str(max((_number(snapshot.id) for snapshot in snapshots), default=0) + 1)


def _number(text: str) -> int:
    digits = text[: len(text) - len(text.lstrip("0123456789"))]
    return int(digits) if 0 < len(digits) < 20 else 0


def plan_create(
    writer: Allocator, table: SnapshotTable, name: str, *, icount: int | None, vm_clock_ns: int, vm_state_size: int
) -> Change:
    """What a new snapshot changes; raises `BlockIOError` when there cannot be another one."""
    clusters, (seconds, micros) = writer.map, writer.file.env.clock.wall()
    if len(table.snapshots) >= MAX_SNAPSHOTS:
        raise BlockIOError(errno.EFBIG, f"the image has {MAX_SNAPSHOTS} snapshots, and the format allows no more")
    if len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME:
        raise BlockIOError(errno.EINVAL, f"the name of a snapshot may have at most {_MAX_NAME} bytes")
    fresh = Snapshot(
        id=next_id(table.snapshots),
        name=name,
        l1_offset=clusters.l1_host,
        l1_size=len(clusters.l1),
        date_sec=seconds & 0xFFFFFFFF,
        date_nsec=micros * 1000,
        vm_clock_ns=vm_clock_ns,
        vm_state_size=vm_state_size,
        disk_size=clusters.length,
        icount=icount,
    )
    snapshots = (*table.snapshots, fresh)
    if len(encode_snapshot_table(snapshots, clusters.length)) > MAX_TABLE_BYTES:
        raise BlockIOError(errno.EFBIG, "the table of snapshots may have at most 64 MiB")
    return Change(clusters.l1, clusters.length, snapshots, gained=[clusters.l1], keeps_l1=bool(clusters.l1))


async def plan_apply(writer: Allocator, table: SnapshotTable, snapshot: Snapshot) -> Change:
    """What it changes to make a snapshot the disk's content; raises `BlockIOError` when its size cannot be."""
    geometry = writer.map.geometry
    l1 = await read_l1(writer.file, snapshot)
    size = writer.map.length if snapshot.disk_size is None else snapshot.disk_size
    if size != writer.map.length and geometry.version < 3:
        raise BlockIOError(errno.ENOTSUP, "a version 2 image with internal snapshots cannot be resized")
    if size % 512:
        raise BlockIOError(errno.EINVAL, f"the disk of the snapshot has {size} bytes, which is no multiple of 512")
    if size > geometry.max_size:
        raise BlockIOError(errno.EFBIG, f"the disk of the snapshot has {size} bytes, and a disk may have {geometry.max_size}")
    new = resized(l1, max(geometry.l1_entries(size), len(l1)))
    return Change(new, size, table.snapshots, gained=[l1], lost=[writer.map.l1])


async def plan_delete(writer: Allocator, table: SnapshotTable, snapshot: Snapshot) -> Change:
    """What it changes to drop a snapshot."""
    l1 = await read_l1(writer.file, snapshot)
    rest = tuple(one for one in table.snapshots if one is not snapshot)
    return Change(
        writer.map.l1, writer.map.length, rest, lost=[l1], freed=[(snapshot.l1_offset, snapshot.l1_bytes)]
    )


def plan_rewrite(writer: Allocator, table: SnapshotTable) -> Change:
    """The same snapshots in a new table, whose entries are whole."""
    return Change(writer.map.l1, writer.map.length, table.snapshots)


async def read_l1(file: ImageFile, snapshot: Snapshot) -> array[int]:
    """The L1 table of a snapshot; raises ``BlockIOError(EFBIG or EIO)`` when there cannot be one."""
    defect = snapshot.defect(file.length(), file.header.cluster_size)
    if defect is not None:
        raise BlockIOError(errno.EIO, f"'{file.name}' is damaged: {defect}")
    return decode_u64(await file.read(snapshot.l1_offset, snapshot.l1_bytes))
