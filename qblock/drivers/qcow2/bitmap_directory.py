"""The stored form of persistent bitmaps: header extension, directory entries and table entries, and their limits.

Models image-formats.md section 1.10. Pure functions: bytes in, frozen values out, and back. An image is refused, as in QEMU,
for what the format does not allow: unknown flags or types, a name twice, counts that contradict each other. Differs from QEMU
in entries with extra data, which it refuses whatever they are: here they are taken as the format says. With the flag that
allows it the bitmap is used and the extra data kept; without it the bitmap is shown as inconsistent, and can only be removed.
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

from qblock.drivers.qcow2.layout import OFFSET_MASK
from qblock.errors import CorruptImage
from qblock.units import MiB, align_up

IN_USE: Final = 1
AUTO: Final = 2
EXTRA_COMPATIBLE: Final = 4
KNOWN_FLAGS: Final = IN_USE | AUTO | EXTRA_COMPATIBLE

DIRTY_TRACKING: Final = 1
"""The only type of bitmap that there is."""
MAX_BITMAPS: Final = 65535
MAX_DIRECTORY: Final = MAX_BITMAPS * 1024
MAX_NAME: Final = 1023
MIN_GRANULARITY_BITS: Final = 9
MAX_GRANULARITY_BITS: Final = 31
MAX_STORED: Final = 512 * MiB
"""Bytes that one bitmap may take."""

ALL_ONES: Final = 1
"""In a table entry without an offset: every bit of the cluster is set."""
TABLE_RESERVED: Final = ((1 << 64) - 1) & ~(OFFSET_MASK | ALL_ONES)

_EXTENSION: Final = struct.Struct(">IIQQ")
_ENTRY: Final = struct.Struct(">QIIBBHI")


@attrs.frozen
class Directory:
    """What the header extension says: how many bitmaps, and bytes and file offset of their directory."""

    count: int
    size: int
    offset: int

    def encode(self) -> bytes:
        """The content of the extension."""
        return _EXTENSION.pack(self.count, 0, self.size, self.offset)


@attrs.frozen
class BitmapEntry:
    """One directory entry: a stored bitmap. ``table_offset`` is a file offset in bytes."""

    name: str
    table_offset: int
    table_entries: int
    granularity_bits: int
    flags: int
    extra: bytes = b""

    @property
    def in_use(self) -> bool:
        """Whoever opened the image for writing last has not stored the bitmap."""
        return bool(self.flags & IN_USE)

    @property
    def auto(self) -> bool:
        """Writes are recorded in it whenever the image is open for writing."""
        return bool(self.flags & AUTO)

    @property
    def usable(self) -> bool:
        """It says what changed: stored in time, and without extra data that would have to be understood."""
        return not self.in_use and (not self.extra or bool(self.flags & EXTRA_COMPATIBLE))

    def encode(self) -> bytes:
        """The entry with its padding."""
        name = encode_name(self.name)
        head = _ENTRY.pack(
            self.table_offset, self.table_entries, self.flags, DIRTY_TRACKING, self.granularity_bits, len(name), len(self.extra)
        )
        return (head + self.extra + name).ljust(align_up(len(head) + len(self.extra) + len(name), 8), b"\0")


def encode_name(name: str) -> bytes:
    """A bitmap's name as it is stored."""
    return name.encode("utf-8", "surrogateescape")


def encode_directory(entries: tuple[BitmapEntry, ...]) -> bytes:
    """All entries, one behind the other."""
    return b"".join(entry.encode() for entry in entries)


def parse_extension(data: bytes, cluster_size: int, file_length: int, image: str) -> Directory:
    """Read the header extension; raises `CorruptImage`."""
    if len(data) != _EXTENSION.size:
        raise CorruptImage(image, f"the header extension for bitmaps has {len(data)} bytes")
    count, reserved, size, offset = _EXTENSION.unpack(data)
    if reserved:
        raise CorruptImage(image, "a reserved field of the header extension for bitmaps is set")
    if not 1 <= count <= MAX_BITMAPS:
        raise CorruptImage(image, f"the header counts {count} bitmaps")
    if offset % cluster_size or not offset:
        raise CorruptImage(image, "the bitmap directory does not begin at a cluster boundary", offset=offset)
    if not _ENTRY.size <= size <= MAX_DIRECTORY or offset + size > file_length:
        raise CorruptImage(image, f"the bitmap directory of {size} bytes is too large, or not all in the file", offset=offset)
    return Directory(count, size, offset)


def parse_directory(raw: bytes | bytearray, count: int, cluster_size: int, image: str) -> tuple[BitmapEntry, ...]:
    """Read the entries of a directory of ``count`` bitmaps; raises `CorruptImage`."""
    entries: list[BitmapEntry] = []
    names: set[str] = set()
    at = 0
    while at < len(raw):
        if at + _ENTRY.size > len(raw):
            raise CorruptImage(image, "the bitmap directory ends inside an entry")
        table, table_entries, flags, kind, bits, name_size, extra_size = _ENTRY.unpack_from(raw, at)
        start = at + _ENTRY.size + extra_size
        end = align_up(start + name_size, 8)
        if end > len(raw):
            raise CorruptImage(image, "the bitmap directory ends inside an entry")
        name = bytes(raw[start : start + name_size]).decode("utf-8", "surrogateescape")
        entry = BitmapEntry(name, table, table_entries, bits, flags, bytes(raw[start - extra_size : start]))
        if kind != DIRTY_TRACKING:
            raise CorruptImage(image, f"bitmap '{name}' is of type {kind}, which the format does not know")
        _check_entry(entry, name_size, cluster_size, image)
        if name in names:
            raise CorruptImage(image, f"it has two bitmaps of the name '{name}'")
        names.add(name)
        entries.append(entry)
        at = end
    if len(entries) != count:
        raise CorruptImage(image, f"the header counts {count} bitmaps, their directory has {len(entries)}")
    return tuple(entries)


def _check_entry(entry: BitmapEntry, name_size: int, cluster_size: int, image: str) -> None:
    def refuse(what: str) -> CorruptImage:
        return CorruptImage(image, f"the directory entry of bitmap '{entry.name}' has {what}")

    if not 1 <= name_size <= MAX_NAME:
        raise refuse(f"a name of {name_size} bytes")
    if entry.flags & ~KNOWN_FLAGS:
        raise refuse(f"flags that the format does not know: {entry.flags:#x}")
    if not MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS:
        raise refuse(f"a granularity of 2^{entry.granularity_bits} bytes")
    if not 1 <= entry.table_entries <= MAX_STORED // cluster_size:
        raise refuse(f"a table of {entry.table_entries} entries")
    if not entry.table_offset or entry.table_offset % cluster_size:
        raise refuse(f"a table at {entry.table_offset:#x}, which is no cluster boundary")


def stored_bytes(size: int, granularity_bits: int) -> int:
    """Bytes of bits for a disk of ``size`` bytes."""
    granules = -(-size >> granularity_bits)
    return -(-granules // 8)


def table_entries(size: int, granularity_bits: int, cluster_size: int) -> int:
    """Entries of the table of a bitmap for a disk of ``size`` bytes."""
    return -(-stored_bytes(size, granularity_bits) // cluster_size)


def why_not_storable(size: int, granularity: int) -> str | None:
    """Why a bitmap of this granularity for a disk of ``size`` bytes cannot be stored; None when it can."""
    bits = granularity.bit_length() - 1
    if not size:
        return "a disk of 0 bytes has nothing to record"
    if bits > MAX_GRANULARITY_BITS:
        return f"the format allows granularities up to {1 << MAX_GRANULARITY_BITS} bytes"
    if stored_bytes(size, bits) > MAX_STORED:
        return f"it would take more than {MAX_STORED} bytes; use a larger granularity"
    return None
