"""How large a new qcow2 image would become: with nothing but the data of a source in it, and with all of its disk in use.

Models image-formats.md section 1.8 (size estimate), as qemu-img 7.2 counts: header, refcount table and blocks, L1 table, all L2
tables, data clusters. Clusters of the source count when they are stored in some layer and are not known to read as zeroes; over
a backing file all do, since nobody knows yet what it will hold.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qblock.driver import Measurement, Progress
from qblock.drivers.qcow2.header import BITMAPS, EXT_BITMAPS, MAX_L1_BYTES
from qblock.drivers.qcow2.options import EncryptionCreate
from qblock.errors import CorruptImage, InvalidParameter
from qblock.node import BlockDriverState
from qblock.options import visit
from qblock.status import FIRST_QUESTION, Further, chain_status, next_question
from qblock.units import KiB, MiB, align_up, is_power_of_two

if TYPE_CHECKING:
    from qblock.drivers.qcow2.storage import ImageFile

_EXTENDED_MIN_CLUSTER: Final = 16 * KiB
_EXTENSION: Final = struct.Struct(">IIQQ")
"""The bitmap extension: number of bitmaps, reserved, size of the directory in bytes, its file offset."""
_ENTRY: Final = struct.Struct(">QIIBBHI")
"""An entry of the directory: table offset, table entries, flags, type, log2 of the granularity, name and extra data length."""
_MAX_DIRECTORY: Final = 65535 * 1024
_MAX_GRANULARITY_BITS: Final = 31
_PREALLOCATIONS: Final = ("off", "metadata", "falloc", "full")


class StoredBitmap(NamedTuple):
    """What a persistent bitmap takes: length of its name in bytes, log2 of the bytes that one bit stands for."""

    name_length: int
    granularity_bits: int


class _Layout(NamedTuple):
    cluster: int
    refcount_bits: int
    entry: int
    """Bytes of an L2 entry."""


async def measure_image(
    options: Mapping[str, Any],
    length: int,
    source: BlockDriverState | None,
    bitmaps: Iterable[StoredBitmap] | None,
    progress: Progress,
) -> Measurement:
    """Sizes in bytes of an image with these creation options (by their wire names) and a disk of ``length`` bytes.

    ``source``: whose data it gets; None for an empty disk. ``bitmaps``: those of the source, None when it can have none.
    Raises `InvalidParameter` for options that no image can have, `BlockIOError` from reading the source.
    """
    layout = _layout(options)
    cluster = layout.cluster
    length = align_up(length, cluster)
    total = length + _metadata(layout, length) + _encryption(options, cluster)
    preallocated = options.get("preallocation") in ("falloc", "full")
    if preallocated or (source is not None and options.get("backing-file") is not None):
        needed = length
    else:
        needed = 0 if source is None else await _stored_clusters(source, cluster, progress) * cluster
    has_bitmaps = bitmaps is not None and options.get("version") != "v2"
    return Measurement(
        required=total - length + needed,
        fully_allocated=total,
        bitmaps=_bitmaps_size(bitmaps or (), length=source.length, cluster=cluster)
        if has_bitmaps and source is not None
        else None,
    )


async def stored_bitmaps(file: ImageFile) -> list[StoredBitmap] | None:
    """The persistent bitmaps that an open image lists, None when its version has none. Raises `CorruptImage`."""
    header = file.header
    if header.version < 3:
        return None
    extension = header.extension(EXT_BITMAPS)
    if extension is None or not header.autoclear & BITMAPS.mask:
        return []
    if len(extension) != _EXTENSION.size:
        raise CorruptImage(file.name, "its bitmap extension has a wrong length")
    count, _, size, offset = _EXTENSION.unpack(extension)
    if size > _MAX_DIRECTORY or offset + size > file.length():
        raise CorruptImage(file.name, "its bitmap directory does not lie in the file")
    raw, at, found = await file.read(offset, size), 0, []
    for _ in range(count):
        if at + _ENTRY.size > size:
            raise CorruptImage(file.name, "its bitmap directory ends too early")
        *_, granularity_bits, name_length, extra = _ENTRY.unpack_from(raw, at)
        if granularity_bits > _MAX_GRANULARITY_BITS:
            raise CorruptImage(file.name, "a bitmap has an impossible granularity")
        found.append(StoredBitmap(name_length, granularity_bits))
        at += align_up(_ENTRY.size + extra + name_length, 8)
    return found


def _encryption(options: Mapping[str, Any], cluster: int) -> int:
    given = options.get("encrypt")
    if given is None:
        return 0
    from qblock.drivers.qcow2.encrypting import encryption_overhead  # noqa: PLC0415 - few images need it

    return encryption_overhead(visit(EncryptionCreate, given, path="encrypt"), cluster)


def _layout(options: Mapping[str, Any]) -> _Layout:
    cluster, extended = options.get("cluster-size", 64 * KiB), bool(options.get("extended-l2"))
    if not is_power_of_two(cluster) or not 512 <= cluster <= 2 * MiB:
        raise InvalidParameter("cluster-size", "must be a power of two from 512 to 2 MiB")
    if extended and cluster < _EXTENDED_MIN_CLUSTER:
        raise InvalidParameter("cluster-size", f"must be at least {_EXTENDED_MIN_CLUSTER} with extended L2 entries")
    bits = options.get("refcount-bits", 16)
    if not is_power_of_two(bits) or bits > 64:
        raise InvalidParameter("refcount-bits", "must be a power of two up to 64")
    if options.get("version") == "v2" and bits != 16:
        raise InvalidParameter("refcount-bits", "must be 16 with version v2 (compat 0.10)")
    if options.get("preallocation", "off") not in _PREALLOCATIONS:
        raise InvalidParameter("preallocation", f"must be one of {', '.join(_PREALLOCATIONS)}")
    return _Layout(cluster, bits, 16 if extended else 8)


def _metadata(layout: _Layout, length: int) -> int:
    """Bytes of everything but the data, for a disk of ``length`` bytes (whole clusters) that is all in use."""
    cluster = layout.cluster
    data = length // cluster
    tables = -(-data * layout.entry // cluster)
    if tables * 8 > MAX_L1_BYTES:
        raise InvalidParameter("size", f"is too large for clusters of {cluster} bytes")
    used = 1 + data + tables + -(-tables * 8 // cluster)
    per_block, per_table = cluster * 8 // layout.refcount_bits, cluster // 8
    blocks = clusters = 0
    while True:
        more = -(-(used + blocks + clusters) // per_block)
        more_clusters = -(-more // per_table)
        if (more, more_clusters) == (blocks, clusters):
            return (used - data + blocks + clusters) * cluster
        blocks, clusters = more, more_clusters


async def _stored_clusters(source: BlockDriverState, cluster: int, progress: Progress) -> int:
    """How many clusters of the new image hold something that the source stores and does not know to be zero."""
    count = at = counted = 0
    question, further = FIRST_QUESTION, Further()
    while at < source.length:
        extent = await chain_status(source, at, min(source.length - at, question), further=further)
        length = extent.length + further.length
        question = next_question(question, length)
        if extent.present and extent.data and not extent.zero:
            first, end = max(at // cluster, counted), -(-(at + length) // cluster)
            count += max(end - first, 0)
            counted = max(counted, end)
        at += length
        progress(min(at, source.length), source.length)
    return count


def _bitmaps_size(bitmaps: Iterable[StoredBitmap], *, length: int, cluster: int) -> int:
    """Bytes of the tables, data and directory of bitmaps over a disk of ``length`` bytes."""
    clusters = directory = 0
    for bitmap in bitmaps:
        bits = -(-length >> bitmap.granularity_bits)
        data = -(-bits // (8 * cluster))
        clusters += data + -(-data * 8 // cluster)
        directory += align_up(_ENTRY.size + bitmap.name_length, 8)
    return (clusters + -(-directory // cluster)) * cluster
