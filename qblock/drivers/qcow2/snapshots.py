"""The table of internal snapshots, as far as a live image must respect it: where their L1 tables lie.

Models image-formats.md section 1.9. Reading only; the limits of the format are checked, so that a hostile table costs little.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import attrs

from qblock.drivers.qcow2.header import MAX_L1_BYTES
from qblock.errors import CorruptImage
from qblock.units import MiB, align_up

if TYPE_CHECKING:
    from qblock.drivers.qcow2.storage import ImageFile

MAX_TABLE_BYTES: Final = 64 * MiB
MAX_EXTRA: Final = 1024
_ENTRY: Final = struct.Struct(">QIHHIIQII")
_READ_AHEAD: Final = MiB


@attrs.frozen
class Snapshot:
    """One internal snapshot. ``l1_size`` is entries; sizes and offsets are bytes; ``disk_size`` is None in old tables."""

    id: str
    name: str
    l1_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_ns: int
    vm_state_size: int
    disk_size: int | None
    icount: int | None


@attrs.frozen
class SnapshotTable:
    """All snapshots, and the length of their table in bytes."""

    snapshots: tuple[Snapshot, ...]
    length: int


async def read_snapshot_table(file: ImageFile) -> SnapshotTable:
    """Read and check the snapshot table; raises `CorruptImage`."""
    header = file.header
    snapshots: list[Snapshot] = []
    base, position, raw, start = header.snapshots_offset, 0, b"", 0
    end_of_file = file.length() - base
    for number in range(header.snapshot_count):
        # The longest entry: fixed part, extra data, two names of 64 KiB.
        if position + _ENTRY.size + MAX_EXTRA + 2 * 65536 > start + len(raw):
            start = position
            raw = bytes(await file.read(base + start, max(0, min(_READ_AHEAD, end_of_file - start))))
        snapshot, length = _parse(raw, position - start, file, base + position)
        _check(snapshot, file, number)
        snapshots.append(snapshot)
        position += length
        if position > MAX_TABLE_BYTES:
            raise CorruptImage(file.name, "the snapshot table is larger than 64 MiB", offset=base)
    return SnapshotTable(tuple(snapshots), position)


def _parse(raw: bytes, at: int, file: ImageFile, offset: int) -> tuple[Snapshot, int]:
    if at + _ENTRY.size > len(raw):
        raise CorruptImage(file.name, "the snapshot table ends behind the end of the file", offset=offset)
    l1_offset, l1_size, id_size, name_size, sec, nsec, clock, state, extra_size = _ENTRY.unpack_from(raw, at)
    if extra_size > MAX_EXTRA:
        raise CorruptImage(file.name, f"a snapshot has {extra_size} bytes of extra data", offset=offset)
    names = at + _ENTRY.size + extra_size
    end = names + id_size + name_size
    if end > len(raw):
        raise CorruptImage(file.name, "the snapshot table ends behind the end of the file", offset=offset)
    extra = raw[at + _ENTRY.size : names]
    words = struct.unpack(f">{min(len(extra) // 8, 3)}Q", extra[: min(len(extra) // 8, 3) * 8])
    snapshot = Snapshot(
        id=raw[names : names + id_size].decode("utf-8", "replace"),
        name=raw[names + id_size : end].decode("utf-8", "replace"),
        l1_offset=l1_offset,
        l1_size=l1_size,
        date_sec=sec,
        date_nsec=nsec,
        vm_clock_ns=clock,
        vm_state_size=words[0] if words else state,
        disk_size=words[1] if len(words) > 1 else None,
        icount=words[2] if len(words) > 2 and words[2] != (1 << 64) - 1 else None,
    )
    return snapshot, align_up(end - at, 8)


def _check(snapshot: Snapshot, file: ImageFile, number: int) -> None:
    size = snapshot.l1_size * 8
    if size > MAX_L1_BYTES or snapshot.l1_offset % file.header.cluster_size:
        raise CorruptImage(file.name, f"the L1 table of snapshot {number} is too large or misplaced", offset=snapshot.l1_offset)
    if size and snapshot.l1_offset + size > file.length():
        raise CorruptImage(file.name, f"the L1 table of snapshot {number} ends behind the end of the file")
