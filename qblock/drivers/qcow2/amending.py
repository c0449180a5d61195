"""Changing what is otherwise chosen when an image is made: version, refcount width, lazy refcounts, size, data file.

Models image-formats.md section 1.14. First everything is checked, then it is done step by step; every step is durable and leaves
an image that is whole, so that a run which ends early has done some of the steps. The version goes up first and down last.

Another refcount width is a new refcount structure: it is written behind everything in the file, and one write of the first sector
switches width and place together. Differs from QEMU: an image is not downgraded whose snapshots hold zero clusters, and bitmaps
that are lost by a downgrade leave no leaks behind.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import attrs

from qblock.driver import Json, Progress
from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.allocation import Payload
from qblock.drivers.qcow2.header import Extension, Header
from qblock.drivers.qcow2.layout import OFFSET_MASK as OFFSETS
from qblock.drivers.qcow2.layout import Geometry, Kind, decode_u64, encode_u64, find_run, first_words, zeroes_u64
from qblock.drivers.qcow2.refcounts import RefcountCodec
from qblock.errors import BlockIOError, CommandError, InvalidParameter
from qblock.units import is_power_of_two
from qblock.zeroes import zero_view

if TYPE_CHECKING:
    from qblock.drivers.qcow2.allocation import Allocator
    from qblock.drivers.qcow2.snapshots import SnapshotTable
    from qblock.drivers.qcow2.storage import ImageFile

VERSIONS: Final[Mapping[str, int]] = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_ZERO_PIECE: Final = 1 << 20
_V2_REFCOUNT_ORDER: Final = 4


@attrs.frozen(kw_only=True)
class Amendments:
    """What is to change; None: leave it. ``data_file`` "" takes the name out of the header."""

    version: int | None = None
    refcount_order: int | None = None
    lazy_refcounts: bool | None = None
    size: int | None = None
    data_file: str | None = None
    data_file_raw: bool | None = None


def plan_amendments(header: Header, options: Mapping[str, Json]) -> Amendments:
    """What options by their names on command lines ask for, checked against the image; raises `CommandError`."""
    _check_backing(header, options)
    wanted = Amendments(
        version=_version(options),
        refcount_order=_order(options),
        lazy_refcounts=_flag(options, "lazy_refcounts"),
        size=_number(options, "size") or None,
        data_file=None if options.get("data_file") is None else str(options["data_file"]),
        data_file_raw=_flag(options, "data_file_raw"),
    )
    version = wanted.version or header.version
    order = header.refcount_order if wanted.refcount_order is None else wanted.refcount_order
    if version < 3:
        if order != _V2_REFCOUNT_ORDER:
            raise InvalidParameter("refcount_bits", "must be 16 with compat 0.10")
        if wanted.lazy_refcounts:
            raise InvalidParameter("lazy_refcounts", "needs compat 1.1")
    if not header.has(head.DATA_FILE) and wanted.data_file is not None:
        raise InvalidParameter("data_file", "is only for images that keep their data in another file")
    if wanted.data_file_raw and not header.raw_data_file:
        raise InvalidParameter("data_file_raw", "cannot be set on an image that was made without it")
    if wanted.size is not None and wanted.size % 512:
        raise InvalidParameter("size", "must be a multiple of 512 bytes")
    if version < header.version:
        _check_downgrade(header)
    return wanted


def _check_backing(header: Header, options: Mapping[str, Json]) -> None:
    name, fmt = options.get("backing_file"), options.get("backing_fmt")
    if (name is not None or fmt is not None) and (name, fmt) != (header.backing_file, header.backing_format):
        raise CommandError("the backing file cannot be amended; use 'qblock-img rebase' for that")


def _version(options: Mapping[str, Json]) -> int | None:
    compat = options.get("compat")
    if compat is None:
        return None
    if str(compat) not in VERSIONS:
        raise InvalidParameter("compat", "must be 0.10 (v2) or 1.1 (v3)")
    return VERSIONS[str(compat)]


def _order(options: Mapping[str, Json]) -> int | None:
    bits = _number(options, "refcount_bits")
    if bits is None:
        return None
    if not is_power_of_two(bits) or bits > 64:
        raise InvalidParameter("refcount_bits", "must be a power of two up to 64")
    return bits.bit_length() - 1


def _number(options: Mapping[str, Json], name: str) -> int | None:
    value = options.get(name)
    assert value is None or isinstance(value, int)
    return value


def _flag(options: Mapping[str, Json], name: str) -> bool | None:
    value = options.get(name)
    assert value is None or isinstance(value, bool)
    return value


def _check_downgrade(header: Header) -> None:
    if header.has(head.DATA_FILE):
        raise CommandError("an image with an external data file cannot have compat 0.10")
    if others := header.incompatible & ~(head.DIRTY.mask | head.CORRUPT.mask):
        names = ", ".join(head.feature_names(header, 0, others))
        raise CommandError(f"compat 0.10 does not have what the image needs: {names}")


# --------------------------------------------------------------------------------------------------------------- headers


def upgraded(header: Header) -> Header:
    """The same image as version 3."""
    extensions = header.extensions
    if header.cluster_size > head.FEATURE_TABLE_MIN_CLUSTER and header.extension(head.EXT_FEATURE_TABLE) is None:
        extensions = (*extensions, Extension(head.EXT_FEATURE_TABLE, head.feature_table()))
    return attrs.evolve(header, version=3, header_length=head.V3_LENGTH, extensions=extensions)


def downgraded(header: Header) -> Header:
    """The same image as version 2, which has no features."""
    extensions = tuple(one for one in header.extensions if one.kind != head.EXT_FEATURE_TABLE)
    return attrs.evolve(
        header,
        version=2,
        header_length=head.V2_LENGTH,
        tail=b"",
        extensions=extensions,
        incompatible=0,
        compatible=0,
        autoclear=0,
    )


def with_settings(header: Header, wanted: Amendments) -> Header:
    """The header with lazy refcounts, and the name and nature of the data file, as they are wanted."""
    if wanted.lazy_refcounts is not None:
        bit = head.LAZY_REFCOUNTS.mask
        compatible = header.compatible | bit if wanted.lazy_refcounts else header.compatible & ~bit
        header = attrs.evolve(header, compatible=compatible)
    if wanted.data_file is not None:
        extensions = tuple(one for one in header.extensions if one.kind != head.EXT_DATA_FILE)
        if wanted.data_file:
            name = wanted.data_file.encode("utf-8", "surrogateescape")
            extensions = (*extensions, Extension(head.EXT_DATA_FILE, name))
        header = attrs.evolve(header, extensions=extensions)
    if wanted.data_file_raw is False:
        header = attrs.evolve(header, autoclear=header.autoclear & ~head.DATA_FILE_RAW.mask)
    return header


# ----------------------------------------------------------------------------------------------------- zero clusters


async def check_snapshots_for_downgrade(file: ImageFile, snapshots: SnapshotTable, size: int) -> None:
    """Raise `CommandError` when snapshots hold what version 2 cannot: another disk size, or zero clusters."""
    geometry = Geometry.of(file.header)
    for snapshot in snapshots.snapshots:
        named = f"snapshot '{snapshot.name}'"
        if snapshot.disk_size is not None and snapshot.disk_size != size:
            raise CommandError(f"the disk of {named} has another size, which compat 0.10 does not have")
        for entry in decode_u64(await file.read(snapshot.l1_offset, snapshot.l1_bytes)):
            if not entry & OFFSETS:
                continue
            entries = first_words(decode_u64(await file.read(entry & OFFSETS, geometry.cluster_size)), geometry)
            if _has_zeroes(entries, geometry):
                raise CommandError(f"{named} has zero clusters, which compat 0.10 does not have; delete it first")


def _has_zeroes(entries: array[int], geometry: Geometry) -> bool:
    at = 0
    while at < len(entries):
        kind, clusters, _ = find_run(entries, at, len(entries) - at, geometry)
        if kind in (Kind.ZERO, Kind.ZERO_ALLOCATED):
            return True
        at += clusters
    return False


async def expand_zeroes(writer: Allocator, progress: Progress) -> None:
    """Leave no zero cluster: they become unallocated where nothing shines through then, else they get zeroes as data."""
    clusters, cluster = writer.map, writer.map.geometry.cluster_size
    end = -(-clusters.length // cluster) * cluster
    at = 0
    while at < end:
        kind, count, _ = await clusters.status(at, min(end - at, 1 << 40))
        if kind in (Kind.ZERO, Kind.ZERO_ALLOCATED):
            if writer.file.node.backing is None and writer.file.header.backing_file is None:
                await writer.cut(at, at + -(-count // cluster) * cluster)
            else:
                count = min(count, _ZERO_PIECE)
                await writer.write(at, Payload(zero_view(min(count, clusters.length - at))))
        at += -(-count // cluster) * cluster
        progress(at, end)
    await writer.writeback.finish()


# -------------------------------------------------------------------------------------------------------- refcount width


class WidthChange:
    """Writes the refcounts of an image anew with another width. Nobody else may use the image meanwhile."""

    def __init__(self, writer: Allocator, order: int) -> None:
        self.writer = writer
        self.file = writer.file
        self.old = writer.map.geometry
        self.new = attrs.evolve(self.old, refcount_order=order)
        self.table = writer.refcounts.table
        self._old_codec, self._codec = RefcountCodec(self.old.refcount_order), RefcountCodec(order)
        self._structure: set[int] = set()
        """Clusters of the old structure, which go out of use."""

    async def perform(self, progress: Progress) -> None:
        """All steps. Raises `CommandError` or `BlockIOError` with nothing changed, or with the node poisoned."""
        writer, bits = self.writer, self.old.cluster_bits
        await writer.writeback.finish()
        self._find_structure()
        used = await self._used_blocks(progress)
        start = -(-max(self.file.virgin, self.file.length()) >> bits)
        blocks, clusters = self._plan(used, start)
        table = zeroes_u64(clusters << (bits - 3))
        end = start + len(blocks) + clusters
        for i, block in enumerate(blocks):
            counts = await self._counts(block, start, end)
            await self.file.write_table((start + i) << bits, self._codec.encode(counts))
            table[block] = (start + i) << bits
            progress(len(self.table) + i * len(self.table) // len(blocks), 2 * len(self.table))
        place = (start + len(blocks)) << bits
        await self.file.write_table(place, encode_u64(table))
        order = self.new.refcount_order
        await writer.writeback.rewrite_header(
            lambda header: attrs.evolve(
                header, refcount_order=order, refcount_table_offset=place, refcount_table_clusters=clusters
            )
        )

    def _find_structure(self) -> None:
        bits = self.old.cluster_bits
        first = self.writer.refcounts.table_host >> bits
        self._structure = set(range(first, first + (len(self.table) * 8 >> bits)))
        self._structure |= {offset >> bits for index in range(len(self.table)) if (offset := self._offset(index))}

    def _offset(self, block: int) -> int:
        return self.writer.refcounts.block_offset(block)

    async def _old_counts(self, block: int) -> array[int]:
        return self._old_codec.decode(await self.file.read(self._offset(block), self.old.cluster_size))

    async def _used_blocks(self, progress: Progress) -> set[int]:
        """The new blocks that are needed; raises when a count does not fit."""
        used: set[int] = set()
        old_bits, new_bits = self.old.block_bits, self.new.block_bits
        for block in range(len(self.table)):
            progress(block, 2 * len(self.table))
            if not self._offset(block):
                continue
            counts = await self._old_counts(block)
            if max(counts) > self.new.max_refcount:
                cluster = (block << old_bits) + next(i for i, n in enumerate(counts) if n > self.new.max_refcount)
                raise CommandError(
                    f"refcounts of {self.new.refcount_bits} bits are too narrow: the cluster at "
                    f"{cluster << self.old.cluster_bits:#x} is used more often"
                )
            step = min(1 << new_bits, len(counts))
            for at in range(0, len(counts), step):
                if any(counts[at : at + step]):
                    used.add(((block << old_bits) + at) >> new_bits)
        return used

    def _plan(self, used: set[int], start: int) -> tuple[list[int], int]:
        """The new blocks, those that count the new structure included, and the clusters of the new table."""
        blocks, clusters = sorted(used), 1
        while True:
            end = start + len(blocks) + clusters
            wanted = sorted(used | set(range(start >> self.new.block_bits, ((end - 1) >> self.new.block_bits) + 1)))
            needed = max(self.new.clusters((wanted[-1] + 1) * 8), clusters)
            if needed << self.new.cluster_bits > head.MAX_REFCOUNT_TABLE_BYTES:
                raise BlockIOError(errno.EFBIG, "the refcount table would be larger than the format allows")
            if wanted == blocks and needed == clusters:
                return blocks, clusters
            blocks, clusters = wanted, needed

    async def _counts(self, block: int, start: int, end: int) -> array[int]:
        """What a new block counts: what is counted now, without the old structure, and clusters ``start`` to ``end``."""
        size = 1 << self.new.block_bits
        first = block * size
        counts = array(self._codec.typecode, bytes(size * array(self._codec.typecode).itemsize))
        old_size = 1 << self.old.block_bits
        for old in range(first >> self.old.block_bits, ((first + size - 1) >> self.old.block_bits) + 1):
            if old >= len(self.table) or not self._offset(old):
                continue
            stored, base = await self._old_counts(old), old * old_size
            low, high = max(base, first), min(base + old_size, first + size)
            counts[low - first : high - first] = array(self._codec.typecode, stored[low - base : high - base].tolist())
        for cluster in self._structure:
            if first <= cluster < first + size:
                if counts[cluster - first] != 1:
                    raise BlockIOError(
                        errno.EIO, f"'{self.file.name}' is damaged: the refcounts are used by others, too"
                    )
                counts[cluster - first] = 0
        for cluster in range(max(start, first), min(end, first + size)):
            counts[cluster - first] = 1
        return counts
