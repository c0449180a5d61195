"""The table of internal snapshots: its entries as they are stored, what is wrong with a table, and where their L1 tables lie.

Models image-formats.md section 1.9. Bytes in, values out, and back; what changes snapshots is `snapshotting.py`. Unknown extra
data are kept. Damage is told apart as qemu-img 7.2 does: a table whose extent cannot be known (misplaced, more than 65536
entries, more than 64 MiB, more than 1024 bytes of extra data) is ``broken``, and the image can be opened for reading only, with
the entries before the break; an entry that lacks members it must have is a defect that `check` reports and repairs; an L1 table
that cannot be one is refused by whoever wants to use it. Differs from QEMU: it refuses images with broken tables for reading too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import attrs

from qblock.drivers.qcow2.header import MAX_L1_BYTES, MAX_OFFSET, MAX_SNAPSHOTS, Header
from qblock.units import MiB, align_up

if TYPE_CHECKING:
    from qblock.drivers.qcow2.storage import ImageFile

MAX_TABLE_BYTES: Final = 64 * MiB
MAX_EXTRA: Final = 1024
_ENTRY: Final = struct.Struct(">QIHHIIQII")
_EXTRA: Final = struct.Struct(">QQQ")
_NO_ICOUNT: Final = (1 << 64) - 1
_LONGEST_ENTRY: Final = _ENTRY.size + MAX_EXTRA + 2 * 65536
_READ_AHEAD: Final = MiB
_V3_EXTRA: Final = 16
"""Extra data that an entry of a version 3 image must have at least."""


@attrs.frozen
class Snapshot:
    """One internal snapshot. ``l1_size`` is entries; sizes and offsets are bytes; ``disk_size`` is None in old tables.

    ``extra`` is what the entry holds behind the members that are known.
    """

    id: str
    name: str
    l1_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_ns: int = 0
    vm_state_size: int = 0
    disk_size: int | None = None
    icount: int | None = None
    extra: bytes = b""

    @property
    def l1_bytes(self) -> int:
        """The length of its L1 table."""
        return self.l1_size * 8

    def defect(self, file_length: int, cluster_size: int) -> str | None:
        """Why its L1 table cannot be used, if so."""
        if self.l1_bytes > MAX_L1_BYTES:
            return f"snapshot {self.id} ({self.name}): its L1 table of {self.l1_size} entries is larger than the format allows"
        if self.l1_offset % cluster_size:
            return f"snapshot {self.id} ({self.name}): its L1 table at {self.l1_offset:#x} is not cluster aligned"
        if self.l1_size and self.l1_offset + self.l1_bytes > align_up(file_length, cluster_size):
            return f"snapshot {self.id} ({self.name}): its L1 table at {self.l1_offset:#x} lies behind the end of the file"
        return None


@attrs.frozen
class SnapshotTable:
    """All snapshots, and the length of their table in bytes.

    ``defects`` say which entries must be written anew; ``broken``, why the table cannot be read to its end; ``mendable``:
    writing the entries that were read makes it whole.
    """

    snapshots: tuple[Snapshot, ...]
    length: int
    defects: tuple[str, ...] = ()
    broken: str | None = None
    mendable: bool = True

    def place(self, file: ImageFile) -> tuple[int, int]:
        """Byte offset and length of what the table takes in the file; one that leads out of it takes nothing."""
        offset, length = file.header.snapshots_offset, self.length
        return (offset, length) if offset + length - file.length() < file.header.cluster_size else (0, 0)

    def usable(self, file: ImageFile) -> Iterable[Snapshot]:
        """Those whose L1 tables can be ones, and do not overlap those of earlier ones."""
        end, length = 0, file.length()
        fit = [one for one in self.snapshots if one.l1_size and one.defect(length, file.header.cluster_size) is None]
        for snapshot in sorted(fit, key=_place):
            if snapshot.l1_offset >= end:
                end = snapshot.l1_offset + snapshot.l1_bytes
                yield snapshot

    def misplaced(self, file: ImageFile) -> Iterable[str]:
        """What is wrong with L1 tables of snapshots."""
        end, length = 0, file.length()
        for snapshot in sorted(self.snapshots, key=_place):
            trouble = snapshot.defect(length, file.header.cluster_size)
            if trouble is not None:
                yield trouble
            elif snapshot.l1_size and snapshot.l1_offset < end:
                yield f"snapshot {snapshot.id} ({snapshot.name}): its L1 table overlaps that of another snapshot"
            elif snapshot.l1_size:
                end = snapshot.l1_offset + snapshot.l1_bytes


def _place(snapshot: Snapshot) -> tuple[int, int]:
    return snapshot.l1_offset, snapshot.l1_size


class _Broken(Exception):
    """The table cannot be read further."""


async def read_snapshot_table(file: ImageFile) -> SnapshotTable:
    """Read the snapshot table as far as it can be read; never raises for what it holds."""
    reader = _Reader(file)
    misplaced = _misplaced(file.header)
    if misplaced is not None:
        return SnapshotTable((), 0, broken=misplaced, mendable=False)
    broken = None
    if file.header.snapshot_count > MAX_SNAPSHOTS:
        broken = f"it has {file.header.snapshot_count} snapshots, of which the format allows {MAX_SNAPSHOTS}"
    try:
        for number in range(min(file.header.snapshot_count, MAX_SNAPSHOTS)):
            await reader.read(number)
    except _Broken as error:
        broken = str(error)
    return SnapshotTable(tuple(reader.snapshots), reader.position, tuple(reader.defects), broken or reader.surplus)


def _misplaced(header: Header) -> str | None:
    """Why there cannot be a snapshot table where the header says it is."""
    start, count, cluster = header.snapshots_offset, header.snapshot_count, header.cluster_size
    if not count:
        return None
    if start % cluster:
        return "the snapshot table does not begin at a cluster boundary"
    if start > MAX_OFFSET - MAX_TABLE_BYTES:
        return "the snapshot table lies behind everything that a file can hold"
    others = (
        ("header", 0, cluster),
        ("active L1 table", header.l1_offset, header.l1_size * 8),
        ("refcount table", header.refcount_table_offset, header.refcount_table_clusters * cluster),
    )
    for name, offset, length in others:
        if offset < start + _ENTRY.size * min(count, MAX_SNAPSHOTS) and start < offset + length:
            return f"the snapshot table overlaps the {name}"
    return None


class _Reader:
    """Reads entry by entry, through a window of the file."""

    def __init__(self, file: ImageFile) -> None:
        self.file = file
        self.snapshots: list[Snapshot] = []
        self.defects: list[str] = []
        self.surplus: str | None = None
        """Which entry has more extra data than it may have; it is read without them."""
        self.position = 0
        self._raw, self._start = b"", 0

    async def read(self, number: int) -> None:
        """The next entry."""
        base = self.file.header.snapshots_offset
        if self.position + _LONGEST_ENTRY > self._start + len(self._raw):
            self._start = self.position
            # What lies behind the end of the file reads as zeroes.
            self._raw = bytes(await self.file.read(base + self._start, _READ_AHEAD))
        snapshot, length, extra_size = _parse(self._raw, self.position - self._start)
        if extra_size > MAX_EXTRA:
            self.surplus = f"snapshot {number} has {extra_size} bytes of extra data, of which the format allows {MAX_EXTRA}"
            snapshot = await self._without_surplus(base + self.position)
        if self.position + length > MAX_TABLE_BYTES:
            raise _Broken("the snapshot table is larger than 64 MiB")
        if self.file.header.version >= 3 and extra_size < _V3_EXTRA:
            self.defects.append(f"snapshot table entry {number} is incomplete")
        self.snapshots.append(snapshot)
        self.position += length

    async def _without_surplus(self, at: int) -> Snapshot:
        """An entry with too much extra data, whose names are read from behind them."""
        head = bytearray(await self.file.read(at, _ENTRY.size + MAX_EXTRA))
        fields = _ENTRY.unpack_from(head)
        if fields[8] > MAX_TABLE_BYTES:
            raise _Broken(self.surplus or "")
        names = await self.file.read(at + _ENTRY.size + fields[8], fields[2] + fields[3])
        struct.pack_into(">I", head, 36, MAX_EXTRA)
        return _parse(bytes(head) + bytes(names), 0)[0]


def _parse(raw: bytes, at: int) -> tuple[Snapshot, int, int]:
    """The entry at ``at``, its length with padding, and the bytes of extra data it says to have."""
    l1_offset, l1_size, id_size, name_size, sec, nsec, clock, state, extra_size = _ENTRY.unpack_from(raw, at)
    extra = raw[at + _ENTRY.size : at + _ENTRY.size + min(extra_size, MAX_EXTRA)]
    names = at + _ENTRY.size + extra_size
    end = names + id_size + name_size
    words = struct.unpack_from(f">{min(len(extra) // 8, 3)}Q", extra)
    snapshot = Snapshot(
        id=raw[names : names + id_size].decode("utf-8", "surrogateescape"),
        name=raw[names + id_size : end].decode("utf-8", "surrogateescape"),
        l1_offset=l1_offset,
        l1_size=l1_size,
        date_sec=sec,
        date_nsec=nsec,
        vm_clock_ns=clock,
        vm_state_size=words[0] if words else state,
        disk_size=words[1] if len(words) > 1 else None,
        icount=words[2] if len(words) > 2 and words[2] != _NO_ICOUNT else None,
        extra=extra[_EXTRA.size :],
    )
    return snapshot, align_up(end - at, 8), extra_size


def encode_snapshot_table(snapshots: Iterable[Snapshot], disk_size: int) -> bytes:
    """The table as it is stored; entries that do not know the size of their disk get ``disk_size``."""
    out = bytearray()
    for one in snapshots:
        name_of, id_of = one.name.encode("utf-8", "surrogateescape"), one.id.encode("utf-8", "surrogateescape")
        extra = _EXTRA.pack(
            one.vm_state_size,
            disk_size if one.disk_size is None else one.disk_size,
            _NO_ICOUNT if one.icount is None else one.icount,
        )
        extra += one.extra
        legacy_state = min(one.vm_state_size, (1 << 32) - 1)
        out += _ENTRY.pack(
            one.l1_offset, one.l1_size, len(id_of), len(name_of), one.date_sec, one.date_nsec, one.vm_clock_ns,
            legacy_state, len(extra),
        )  # fmt: skip
        out += extra + id_of + name_of
        out += bytes(-len(out) % 8)
    return bytes(out)
