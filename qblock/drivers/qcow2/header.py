"""The qcow2 header: its fields, feature bits and extensions as tables, and the functions that walk them.

Models image-formats.md sections 1.2 and 1.3. Everything here is pure: bytes in, a frozen `Header` out, and back. Fields and
extensions that qblock does not know are kept and written back as they were. Differs from QEMU in being stricter about
tables that lie outside the file: such an image was cut off, and is refused instead of reading as zeroes.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import attrs

from qblock.errors import BlockIOError, CorruptImage, NotThisFormat, UnsupportedFeature
from qblock.units import KiB, MiB, align_up

MAGIC: Final = b"QFI\xfb"
V2_LENGTH: Final = 72
V3_LENGTH: Final = 112
"""Header bytes that this version writes for compat 0.10 and 1.1."""

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MIN_EXTENDED_CLUSTER_BITS: Final = 14
"""With extended L2 entries a 32nd of a cluster must be a sector at least."""
MAX_L1_BYTES: Final = 32 * MiB
MAX_REFCOUNT_TABLE_BYTES: Final = 8 * MiB
MAX_SNAPSHOTS: Final = 65536
MAX_BACKING_NAME: Final = 1023
MAX_BACKING_FORMAT: Final = 15
MAX_OFFSET: Final = (1 << 56) - 1
"""Host offsets have 56 bits."""
FEATURE_TABLE_MIN_CLUSTER: Final = 4 * KiB
"""The feature table is written only into clusters larger than this."""


class Field(NamedTuple):
    """One header field: attribute name, byte offset, big-endian ``struct`` code."""

    name: str
    offset: int
    code: str


V2_FIELDS: Final = (
    Field("version", 4, "I"),
    Field("backing_offset", 8, "Q"),
    Field("backing_size", 16, "I"),
    Field("cluster_bits", 20, "I"),
    Field("size", 24, "Q"),
    Field("crypt_method", 32, "I"),
    Field("l1_size", 36, "I"),
    Field("l1_offset", 40, "Q"),
    Field("refcount_table_offset", 48, "Q"),
    Field("refcount_table_clusters", 56, "I"),
    Field("snapshot_count", 60, "I"),
    Field("snapshots_offset", 64, "Q"),
)
V3_FIELDS: Final = (
    *V2_FIELDS,
    Field("incompatible", 72, "Q"),
    Field("compatible", 80, "Q"),
    Field("autoclear", 88, "Q"),
    Field("refcount_order", 96, "I"),
    Field("header_length", 100, "I"),
)
COMPRESSION_TYPE_OFFSET: Final = 104


class Feature(NamedTuple):
    """A feature bit: which word (0 incompatible, 1 compatible, 2 autoclear), which bit, its name in the feature table."""

    word: int
    bit: int
    name: str

    @property
    def mask(self) -> int:
        """The bit as a mask of its word."""
        return 1 << self.bit


DIRTY: Final = Feature(0, 0, "dirty bit")
CORRUPT: Final = Feature(0, 1, "corrupt bit")
DATA_FILE: Final = Feature(0, 2, "external data file")
COMPRESSION: Final = Feature(0, 3, "compression type")
EXTENDED_L2: Final = Feature(0, 4, "extended L2 entries")
LAZY_REFCOUNTS: Final = Feature(1, 0, "lazy refcounts")
BITMAPS: Final = Feature(2, 0, "bitmaps")
DATA_FILE_RAW: Final = Feature(2, 1, "raw external data")
FEATURES: Final = (DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2, LAZY_REFCOUNTS, BITMAPS, DATA_FILE_RAW)
"""In the order of the feature table."""

SUPPORTED_INCOMPATIBLE: Final = DIRTY.mask | CORRUPT.mask | DATA_FILE.mask | COMPRESSION.mask | EXTENDED_L2.mask
"""Incompatible bits that an image may have set for qblock to open it at all."""
MAINTAINED_AUTOCLEAR: Final = BITMAPS.mask
"""Autoclear bits that a read-write open may leave set, besides that of raw external data."""

COMPRESSION_NAMES: Final[Mapping[int, str]] = {0: "zlib", 1: "zstd"}
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2
MAX_ENCRYPTION_AREA: Final = 64 * MiB
"""Bytes that a LUKS header with its key slots may take."""

EXT_END: Final = 0x00000000
EXT_BACKING_FORMAT: Final = 0xE2792ACA
EXT_FEATURE_TABLE: Final = 0x6803F857
EXT_BITMAPS: Final = 0x23852875
EXT_ENCRYPTION: Final = 0x0537BE77
EXT_DATA_FILE: Final = 0x44415441
EXT_ORDER: Final = (EXT_BACKING_FORMAT, EXT_DATA_FILE, EXT_ENCRYPTION, EXT_FEATURE_TABLE, EXT_BITMAPS)
"""Known extensions in the order of writing; others follow in the order they were found."""


@attrs.frozen
class Extension:
    """A header extension: its type code and raw content."""

    kind: int
    data: bytes


@attrs.frozen(kw_only=True)
class Header:
    """A parsed header. Offsets and sizes are bytes, ``l1_size`` is entries; ``tail`` are header bytes behind the known fields."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    backing_file: str | None = None
    crypt_method: int = 0
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = V3_LENGTH
    compression_type: int = 0
    tail: bytes = b""
    extensions: tuple[Extension, ...] = ()
    backing_offset: int = attrs.field(default=0, eq=False)
    """Where the name lies in the file; 0 in a header that was not read from one."""

    @property
    def cluster_size(self) -> int:
        """Bytes per cluster."""
        return 1 << self.cluster_bits

    @property
    def disk_size(self) -> int:
        """Bytes of the disk: ``size`` without what is no whole sector at its end."""
        return self.size // 512 * 512

    def has(self, feature: Feature) -> bool:
        """Is this feature bit set?"""
        return bool((self.incompatible, self.compatible, self.autoclear)[feature.word] & feature.mask)

    def extension(self, kind: int) -> bytes | None:
        """Content of the first extension of this type."""
        return next((ext.data for ext in self.extensions if ext.kind == kind), None)

    @property
    def data_file(self) -> str | None:
        """The external data file's name, if the header has one."""
        data = self.extension(EXT_DATA_FILE)
        return data.decode("utf-8", "surrogateescape") if data else None

    @property
    def raw_data_file(self) -> bool:
        """Is the external data file a raw image of the disk?"""
        return self.has(DATA_FILE) and self.has(DATA_FILE_RAW)

    @property
    def backing_format(self) -> str | None:
        """The backing file's format by the header extension, if there is one."""
        data = self.extension(EXT_BACKING_FORMAT)
        return data.decode("utf-8", "surrogateescape") if data else None

    @property
    def encryption_area(self) -> tuple[int, int]:
        """Offset and length of the LUKS header with its key slots in the file; (0, 0) when there is none."""
        data = self.extension(EXT_ENCRYPTION)
        if data is None or self.crypt_method != CRYPT_LUKS:
            return 0, 0
        offset, length = struct.unpack(">QQ", data)
        return offset, length

    def with_backing(self, filename: str | None, fmt: str | None) -> Header:
        """The same header with another backing link."""
        rest = tuple(ext for ext in self.extensions if ext.kind != EXT_BACKING_FORMAT)
        if fmt is not None:
            rest = (Extension(EXT_BACKING_FORMAT, fmt.encode("utf-8", "surrogateescape")), *rest)
        return attrs.evolve(self, backing_file=filename, extensions=rest)


# ------------------------------------------------------------------------------------------------------------ reading


def probe(head: bytes) -> int:
    """100 when the magic and a version of at least 2 are there, else 0."""
    return 100 if len(head) >= 8 and head[:4] == MAGIC and struct.unpack_from(">I", head, 4)[0] >= 2 else 0


def cluster_bits_of(head: bytes, image: str) -> int:
    """The cluster size exponent, from the first 72 bytes; checks magic, version and the exponent itself."""
    if len(head) < V2_LENGTH or head[:4] != MAGIC:
        raise NotThisFormat(image, "qcow2", "it does not begin with the qcow2 magic")
    version, bits = struct.unpack_from(">I", head, 4)[0], struct.unpack_from(">I", head, 20)[0]
    if version not in (2, 3):
        raise UnsupportedFeature(image, f"qcow2 version {version}")
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise CorruptImage(image, f"cluster size 2^{bits} is not between 512 bytes and 2 MiB", offset=20)
    return int(bits)


def parse_header(raw: bytes, image: str) -> Header:
    """Read a header from ``raw``, the first cluster (or as much of it as the file has). Raises `ImageError`."""
    cluster_bits = cluster_bits_of(raw, image)
    fields = {field.name: struct.unpack_from(">" + field.code, raw, field.offset)[0] for field in V2_FIELDS}
    backing_offset, backing_size = fields.pop("backing_offset"), fields.pop("backing_size")
    if fields["version"] == 2:
        fields |= {"refcount_order": 4, "header_length": V2_LENGTH}
        tail, compression = b"", 0
    else:
        fields |= _parse_v3_fields(raw, 1 << cluster_bits, image)
        length = fields["header_length"]
        compression = raw[COMPRESSION_TYPE_OFFSET] if length > COMPRESSION_TYPE_OFFSET else 0
        tail = raw[min(V3_LENGTH, length) : length]
    limit = min(len(raw), 1 << cluster_bits)
    if backing_offset:
        limit = min(limit, backing_offset)
    extensions = _parse_extensions(raw, fields["header_length"], limit, image)
    backing = _parse_backing(raw, backing_offset, backing_size, image) if backing_offset else None
    fields["backing_offset"] = backing_offset
    header = Header(backing_file=backing, compression_type=compression, tail=tail, extensions=extensions, **fields)
    fmt = header.extension(EXT_BACKING_FORMAT)
    if fmt is not None and len(fmt) > MAX_BACKING_FORMAT:
        raise CorruptImage(image, "the backing format name has more than 15 bytes")
    return header


def _parse_v3_fields(raw: bytes, cluster_size: int, image: str) -> dict[str, int]:
    if len(raw) < 104:
        raise CorruptImage(image, "the file ends inside the header", offset=len(raw))
    fields: dict[str, int] = {
        f.name: struct.unpack_from(">" + f.code, raw, f.offset)[0] for f in V3_FIELDS[len(V2_FIELDS) :]
    }
    length = fields["header_length"]
    if length < 104 or length % 8 or length > min(cluster_size, len(raw)):
        raise CorruptImage(image, f"header length {length} is out of range", offset=100)
    if fields["refcount_order"] > 6:
        raise CorruptImage(image, f"refcount width 2^{fields['refcount_order']} exceeds 64 bits", offset=96)
    return fields


def _parse_extensions(raw: bytes, position: int, limit: int, image: str) -> tuple[Extension, ...]:
    found = []
    while position + 8 <= limit:
        kind, length = struct.unpack_from(">II", raw, position)
        if kind == EXT_END:
            break
        if length > limit - position - 8:
            raise CorruptImage(
                image, f"header extension {kind:#010x} is longer than the header's cluster", offset=position
            )
        found.append(Extension(kind, bytes(raw[position + 8 : position + 8 + length])))
        position += 8 + align_up(length, 8)
    return tuple(found)


def _parse_backing(raw: bytes, offset: int, size: int, image: str) -> str | None:
    if size > MAX_BACKING_NAME or offset + size > min(len(raw), 1 << struct.unpack_from(">I", raw, 20)[0]):
        raise CorruptImage(image, "the backing file name is too long or lies outside the first cluster", offset=8)
    return bytes(raw[offset : offset + size]).decode("utf-8", "surrogateescape") if size else None


# --------------------------------------------------------------------------------------------------------- validating


def validate(header: Header, file_length: int, image: str, *, to_check: bool = False) -> None:
    """Check every field against the limits of the format and the length of the file; raises `ImageError`.

    The snapshot table is looked at by who reads it: an image can be read without it. ``to_check``: tables that are not where
    they are said to be are for the check to find; the image can be looked at, and perhaps be repaired.
    """
    _check_features(header, image)
    cluster = header.cluster_size
    if header.has(EXTENDED_L2) and header.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise CorruptImage(image, f"clusters of {cluster} bytes are too small for extended L2 entries", offset=20)
    per_table = cluster // (16 if header.has(EXTENDED_L2) else 8)
    if header.size > MAX_OFFSET << 6 or -(-header.size // (cluster * per_table)) > header.l1_size:
        raise CorruptImage(image, f"the L1 table is too small for a disk of {header.size} bytes", offset=36)
    tables = _tables(header)
    if to_check:
        for table in tables:
            _check_table(table, MAX_OFFSET, cluster, image)
        return
    if header.refcount_table_clusters < 1:
        raise CorruptImage(image, "it has no refcount table", offset=56)
    if header.refcount_table_offset == 0:
        raise CorruptImage(image, "the refcount table lies on the header", offset=48)
    for table in tables:
        _check_table(table, file_length, cluster, image)
    areas = sorted([_Table("header", 0, cluster, cluster), *(table for table in tables if table.length)], key=_place)
    for first, second in itertools.pairwise(areas):
        if second.offset < first.offset + first.length:
            raise CorruptImage(image, f"{first.name} and {second.name} overlap", offset=second.offset)


class _Table(NamedTuple):
    """A table that the header points to: its place and the largest length allowed, in bytes."""

    name: str
    offset: int
    length: int
    limit: int


def _tables(header: Header) -> tuple[_Table, ...]:
    refcount_bytes = header.refcount_table_clusters * header.cluster_size
    return (
        _Table("L1 table", header.l1_offset, header.l1_size * 8, MAX_L1_BYTES),
        _Table("refcount table", header.refcount_table_offset, refcount_bytes, MAX_REFCOUNT_TABLE_BYTES),
        _Table("encryption header", *header.encryption_area, MAX_ENCRYPTION_AREA),
    )


def _place(table: _Table) -> tuple[int, int]:
    return table.offset, table.length


def _check_table(table: _Table, file_length: int, cluster: int, image: str) -> None:
    name, offset, length, limit = table
    if length > limit:
        raise CorruptImage(
            image, f"the {name} of {length} bytes is larger than the format allows ({limit})", offset=offset
        )
    if length and offset % cluster:
        raise CorruptImage(image, f"the {name} does not begin at a cluster boundary", offset=offset)
    # Whole clusters belong to the table, but the last one of the file need not be written to its end.
    end = align_up(file_length, cluster) if name == "refcount table" else file_length
    if length and offset + length > end:
        raise CorruptImage(image, f"the {name} ends behind the end of the file ({file_length} bytes)", offset=offset)


def _check_features(header: Header, image: str) -> None:
    unsupported = header.incompatible & ~SUPPORTED_INCOMPATIBLE
    if unsupported:
        raise UnsupportedFeature(image, ", ".join(feature_names(header, 0, unsupported)))
    if header.crypt_method not in (0, CRYPT_AES, CRYPT_LUKS):
        raise UnsupportedFeature(image, f"encryption method {header.crypt_method}")
    pointer = header.extension(EXT_ENCRYPTION)
    if (None if pointer is None else len(pointer)) != (16 if header.crypt_method == CRYPT_LUKS else None):
        raise CorruptImage(image, "encryption method and encryption header contradict each other", offset=32)
    if header.has(DATA_FILE_RAW) and not header.has(DATA_FILE) and header.version >= 3:
        raise CorruptImage(image, "its data file is said to be raw, but it has none", offset=88)
    if header.compression_type not in COMPRESSION_NAMES:
        raise UnsupportedFeature(image, f"compression type {header.compression_type}")
    if bool(header.compression_type) != header.has(COMPRESSION):
        raise CorruptImage(
            image, "compression type and its feature bit contradict each other", offset=COMPRESSION_TYPE_OFFSET
        )


def feature_names(header: Header, word: int, bits: int) -> Iterator[str]:
    """Names of the set ``bits`` of a feature word: by the image's own feature table, then by ours, else the mask in hex."""
    names = {feature.bit: feature.name for feature in FEATURES if feature.word == word}
    table = header.extension(EXT_FEATURE_TABLE) or b""
    for start in range(0, len(table) - 47, 48):
        if table[start] == word:
            names[table[start + 1]] = table[start + 2 : start + 48].rstrip(b"\0").decode("utf-8", "replace")
    for bit in range(64):
        if bits >> bit & 1:
            yield names.get(bit) or f"unknown {('incompatible', 'compatible', 'autoclear')[word]} feature {1 << bit:x}"


# ------------------------------------------------------------------------------------------------------------ writing


def feature_table() -> bytes:
    """The feature name table that this version writes."""
    return b"".join(struct.pack(">BB46s", f.word, f.bit, f.name.encode()) for f in FEATURES)


def encode_header(header: Header) -> bytes:
    """The bytes from file offset 0 up to the end of the backing file name. ENOSPC when they do not fit in the first cluster."""
    name = _encode_name(header)
    extensions = _encode_extensions(header)
    out = _encode_fields(header, name, header.header_length + len(extensions)) + extensions + name
    if len(out) > header.cluster_size:
        raise BlockIOError(28, "header, extensions and backing file name do not fit in the first cluster")
    return out


def encode_switch(old: Header, new: Header, sector: int) -> tuple[Header, list[tuple[int, bytes]]]:
    """Writes (file offset, bytes) that turn ``old`` into ``new``, to be done in this order with a barrier behind each.

    All that is parsed is brought into the first sector, whose write is not torn, and a new backing file name goes where the
    old one is not: so there is one link or the other at every moment. For that the feature name table, which is only for
    messages, loses the names that have no room; the header as it will be is returned too. Where an unknown extension
    leaves no room even so, the whole header is written at once. Raises as `encode_header`.
    """
    whole = encode_header(new)
    if len(whole) <= sector:
        return _placed(new, len(whole)), [(0, whole.ljust(sector, b"\0")), *_wiped(old, sector, sector, b"")]
    short = _with_short_table(new, sector)
    extensions = _encode_extensions(short)
    place = _free_place(old, short, sector)
    if short.header_length + len(extensions) > sector or place is None:
        return _placed(new, len(whole)), [(0, whole.ljust(align_up(len(whole), sector), b"\0"))]
    name = _encode_name(short)
    short = attrs.evolve(short, backing_offset=place if name else 0)
    first = (_encode_fields(short, name, place) + extensions).ljust(sector, b"\0")
    writes = [(place, name), (0, first)] if name else [(0, first)]
    return short, [*writes, *_wiped(old, sector, place, name)]


def _wiped(old: Header, sector: int, place: int, name: bytes) -> list[tuple[int, bytes]]:
    """The write that clears what ``old`` had behind the first sector, when nothing refers to it any more, but for ``name``."""
    end = max(len(encode_header(old)), _name_place(old)[1])
    if end <= sector:
        return []
    cleared = bytearray(max(end - sector, place - sector + len(name)))
    cleared[place - sector : place - sector + len(name)] = name
    return [(sector, bytes(cleared))]


def _placed(header: Header, end: int) -> Header:
    """The header whose encoding ends, with the backing file name, at ``end``."""
    name = _encode_name(header)
    return attrs.evolve(header, backing_offset=end - len(name) if name else 0)


def _free_place(old: Header, new: Header, sector: int) -> int | None:
    """A place in the first cluster behind ``sector`` for the new name that is clear of all that ``old`` refers to."""
    start, end = _name_place(old)
    parsed = max(old.header_length + len(_encode_extensions(old)), sector)
    length = len(_encode_name(new))
    for place in (parsed, align_up(max(end, parsed), 8)):
        clear = place + length <= start or place >= end
        if clear and place + length <= new.cluster_size:
            return place
    return None


def _name_place(header: Header) -> tuple[int, int]:
    """Where the backing file name of a header that was read or written begins and ends; (0, 0) when there is none."""
    return header.backing_offset, header.backing_offset + len(_encode_name(header))


def _with_short_table(header: Header, sector: int) -> Header:
    """The header with as many entries of the feature name table as leave the extensions inside ``sector``."""
    others = tuple(ext for ext in header.extensions if ext.kind != EXT_FEATURE_TABLE)
    table = header.extension(EXT_FEATURE_TABLE) or b""
    without = attrs.evolve(header, extensions=others)
    room = (sector - header.header_length - len(_encode_extensions(without)) - 8) // 48 * 48
    if room <= 0 or not table:
        return without
    return attrs.evolve(header, extensions=(*others, Extension(EXT_FEATURE_TABLE, table[:room])))


def _encode_name(header: Header) -> bytes:
    name = (header.backing_file or "").encode("utf-8", "surrogateescape")
    if len(name) > MAX_BACKING_NAME:
        raise BlockIOError(22, f"a backing file name may have at most {MAX_BACKING_NAME} bytes")
    return name


def _encode_extensions(header: Header) -> bytes:
    """The extensions in the order that 7.2 writes, and their end mark."""
    extensions = sorted(
        header.extensions, key=lambda ext: EXT_ORDER.index(ext.kind) if ext.kind in EXT_ORDER else len(EXT_ORDER)
    )
    body = bytearray()
    for ext in extensions:
        body += struct.pack(">II", ext.kind, len(ext.data)) + ext.data
        body += bytes(-len(body) % 8)
    return bytes(body) + bytes(8)


def _encode_fields(header: Header, name: bytes, name_offset: int) -> bytes:
    out = bytearray(header.header_length)
    values = attrs.asdict(header, recurse=False)
    values |= {"backing_offset": name_offset if name else 0, "backing_size": len(name)}
    out[:4] = MAGIC
    for field in V2_FIELDS if header.version == 2 else V3_FIELDS:
        struct.pack_into(">" + field.code, out, field.offset, values[field.name])
    if header.version > 2 and header.header_length > COMPRESSION_TYPE_OFFSET:
        out[COMPRESSION_TYPE_OFFSET] = header.compression_type
        out[V3_LENGTH : V3_LENGTH + len(header.tail)] = header.tail
    return bytes(out)


def encode_size_and_l1(size: int, l1_size: int, l1_offset: int, *, crypt_method: int) -> tuple[int, bytes]:
    """Offset and bytes of the header part that switches size and L1 table (``l1_size`` entries) in one write."""
    return 24, struct.pack(">QIIQ", size, crypt_method, l1_size, l1_offset)


def encode_placement(header: Header) -> tuple[int, bytes]:
    """Offset and bytes of the header part that says where L1, refcount and snapshot tables lie, all switched in one write."""
    return 24, struct.pack(
        ">QIIQQIIQ", header.size, header.crypt_method, header.l1_size, header.l1_offset, header.refcount_table_offset,
        header.refcount_table_clusters, header.snapshot_count, header.snapshots_offset,
    )  # fmt: skip


def encode_refcount_location(offset: int, clusters: int) -> tuple[int, bytes]:
    """Offset and bytes of the header part that switches the refcount table in one write."""
    return 48, struct.pack(">QI", offset, clusters)


def encode_features(incompatible: int, compatible: int, autoclear: int) -> tuple[int, bytes]:
    """Offset and bytes of the three feature words."""
    return 72, struct.pack(">QQQ", incompatible, compatible, autoclear)
