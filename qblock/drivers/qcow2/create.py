"""Making a new qcow2 image: the layout is planned, then written; the header, which makes it an image, comes last.

Models image-formats.md section 1.8: header, refcount table, refcount blocks, L1 table; with preallocation the L2 tables and data
clusters follow. Differs from QEMU in the order of preallocated clusters: all L2 tables lie before the data, which are then one
run.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING, Final

import attrs

from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.header import Extension, Header, encode_header
from qblock.drivers.qcow2.layout import COPIED, U64, ZERO, Geometry, encode_u64
from qblock.drivers.qcow2.options import Qcow2CreateOptions, refuse_unsupported
from qblock.drivers.qcow2.refcounts import RefcountCodec
from qblock.drivers.qcow2.subclusters import with_states
from qblock.errors import BlockIOError, InvalidParameter
from qblock.options import ABSENT
from qblock.units import MiB, align_up, is_power_of_two

if TYPE_CHECKING:
    from qblock.driver import CreateContext, CreateTarget
    from qblock.drivers.qcow2.encrypting import NewEncryption

_SECTOR: Final = 512


@attrs.frozen(kw_only=True)
class ImagePlan:
    """Where everything of a new image lies, in clusters; ``l2_tables`` and ``mapped`` are 0 without preallocation.

    ``data`` are those of the ``mapped`` guest clusters that lie in this file: all, or none when there is a data file.
    """

    header: Header
    geometry: Geometry
    table_clusters: int
    blocks: int
    l1_clusters: int
    l2_tables: int
    data: int
    mapped: int
    encryption: int = 0
    """The LUKS header with its key slots."""

    @property
    def first_block(self) -> int:
        """The first refcount block; the refcount table lies before it, from cluster 1 on."""
        return 1 + self.table_clusters

    @property
    def first_encryption(self) -> int:
        """The LUKS header with its key slots."""
        return self.first_block + self.blocks + self.l1_clusters

    @property
    def first_l2(self) -> int:
        """The first L2 table."""
        return self.first_encryption + self.encryption

    @property
    def total(self) -> int:
        """All clusters."""
        return self.first_l2 + self.l2_tables + self.data

    @property
    def file_length(self) -> int:
        """Bytes of the new file."""
        if self.l2_tables or self.encryption or not self.l1_clusters:
            return self.total << self.geometry.cluster_bits
        return self.header.l1_offset + self.header.l1_size * 8


async def create_image(options: Qcow2CreateOptions, context: CreateContext) -> None:
    """Make an image as the options say. Raises `CommandError` for options that cannot be, `BlockIOError` when writing fails."""
    encryption = None
    if options.encrypt is not None:
        _check_encrypted(options)
        from qblock.drivers.qcow2.encrypting import new_encryption  # noqa: PLC0415 - few images need it

        encryption = await new_encryption(options.encrypt, context.env)
    plan = plan_image(options, encryption)
    target = await context.open_reference(options.file)
    try:
        if options.data_file is not ABSENT:
            plan = await _prepare_data_file(options, context, plan, image=target.filename())
            await _make_room(target, plan, "metadata")
        else:
            await _make_room(target, plan, options.preallocation)
        await _write_refcounts(target, plan)
        await _write_mapping(target, plan)
        if encryption is not None and plan.encryption:
            area = encryption.area.ljust(plan.encryption << plan.geometry.cluster_bits, b"\0")
            await target.write_from(plan.first_encryption << plan.geometry.cluster_bits, memoryview(area))
        await target.flush()
        encoded = encode_header(plan.header)
        await target.write_from(0, memoryview(encoded + bytes(plan.header.cluster_size - len(encoded))))
        await target.flush()
    finally:
        await target.release()


async def _prepare_data_file(
    options: Qcow2CreateOptions, context: CreateContext, plan: ImagePlan, *, image: str | None
) -> ImagePlan:
    """Make the data file long enough, what it holds is left; gives the plan with its name in the header."""
    header = plan.header
    length = align_up(options.size, header.cluster_size) if plan.mapped else options.size
    preallocation = options.preallocation if options.preallocation in ("falloc", "full") else "off"
    data = await context.open_reference(options.data_file)
    try:
        if image is not None and data.filename() == image:
            raise InvalidParameter("data-file", f"cannot be the file of the image itself ({image})")
        if data.length() < length:
            await data.truncate(length, preallocation=preallocation)
            await data.flush()
        name = data.filename()
    finally:
        await data.release()
    if name is None:
        return plan
    extension = Extension(head.EXT_DATA_FILE, name.encode("utf-8", "surrogateescape"))
    return attrs.evolve(plan, header=attrs.evolve(header, extensions=(*header.extensions, extension)))


def plan_image(options: Qcow2CreateOptions, encryption: NewEncryption | None = None) -> ImagePlan:
    """Check the options and lay the image out."""
    _check(options)
    cluster, version = options.cluster_size, int(options.version[1])
    order = options.refcount_bits.bit_length() - 1
    external = options.data_file is not ABSENT
    geometry = Geometry(
        cluster.bit_length() - 1, order, version, 0, data_file=external, extended=options.extended_l2
    )
    l1_size = geometry.l1_entries(options.size)
    if l1_size * 8 > head.MAX_L1_BYTES:
        raise InvalidParameter("size", f"must not exceed {geometry.max_size} bytes with clusters of {cluster} bytes")
    # A raw data file holds all of the disk from the beginning, so all of it is mapped.
    preallocated = options.preallocation != "off" or options.data_file_raw
    l2_tables = l1_size if preallocated else 0
    mapped = geometry.clusters(options.size) if preallocated else 0
    data = 0 if external else mapped
    l1_clusters = geometry.clusters(l1_size * 8)
    area = geometry.clusters(len(encryption.area)) if encryption is not None else 0
    blocks = table_clusters = 1
    while True:
        total = 1 + table_clusters + blocks + l1_clusters + area + l2_tables + data
        wanted = max(-(-total >> geometry.block_bits), 1), max(geometry.clusters(blocks * 8), 1)
        if wanted <= (blocks, table_clusters) and wanted[1] <= table_clusters:
            break
        blocks, table_clusters = max(blocks, wanted[0]), max(table_clusters, wanted[1])
    if table_clusters * cluster > head.MAX_REFCOUNT_TABLE_BYTES:
        raise InvalidParameter("size", "needs a larger refcount table than the format allows; choose larger clusters")
    header = _header(options, geometry, l1_size, (1 + table_clusters + blocks) * cluster, table_clusters)
    if encryption is not None:
        header = _encrypted(header, encryption, (1 + table_clusters + blocks + l1_clusters) * cluster)
    return ImagePlan(
        header=header,
        geometry=geometry,
        table_clusters=table_clusters,
        blocks=blocks,
        l1_clusters=l1_clusters,
        l2_tables=l2_tables,
        data=data,
        mapped=mapped,
        encryption=area,
    )


def _encrypted(header: Header, encryption: NewEncryption, offset: int) -> Header:
    pointer = (encryption.extension(offset),) if encryption.area else ()
    return attrs.evolve(header, crypt_method=encryption.method, extensions=(*header.extensions, *pointer))


def _check(options: Qcow2CreateOptions) -> None:
    refuse_unsupported(options)
    if not is_power_of_two(options.cluster_size) or not 512 <= options.cluster_size <= 2 * MiB:
        raise InvalidParameter("cluster-size", "must be a power of two from 512 bytes to 2 MiB")
    if options.size % _SECTOR or options.size < 0:
        raise InvalidParameter("size", "must be a multiple of 512 bytes")
    if not is_power_of_two(options.refcount_bits) or options.refcount_bits > 64:
        raise InvalidParameter("refcount-bits", "must be a power of two up to 64")
    if options.version == "v2":
        if options.refcount_bits != 16:
            raise InvalidParameter("refcount-bits", "must be 16 with version v2 (compat 0.10)")
        if options.lazy_refcounts:
            raise InvalidParameter("lazy-refcounts", "needs version v3 (compat 1.1)")
        if options.compression_type != "zlib":
            raise InvalidParameter("compression-type", "must be zlib with version v2 (compat 0.10)")
    _check_data_file(options)
    if options.extended_l2:
        if options.version == "v2":
            raise InvalidParameter("extended-l2", "needs version v3 (compat 1.1)")
        if options.cluster_size < 1 << head.MIN_EXTENDED_CLUSTER_BITS:
            raise InvalidParameter("cluster-size", "must be at least 16 KiB with extended L2 entries")
    elif options.backing_file is not None and options.preallocation != "off":
        raise InvalidParameter("preallocation", "cannot be used together with a backing file")
    if options.backing_file is None and options.backing_fmt is not None:
        raise InvalidParameter("backing-fmt", "is given without a backing-file")


def _check_data_file(options: Qcow2CreateOptions) -> None:
    if options.data_file is ABSENT:
        if options.data_file_raw:
            raise InvalidParameter("data-file-raw", "needs a data-file")
        return
    if options.version == "v2":
        raise InvalidParameter("data-file", "needs version v3 (compat 1.1)")
    if options.data_file_raw and options.backing_file is not None:
        raise InvalidParameter("data-file-raw", "cannot be used together with a backing file")


def _check_encrypted(options: Qcow2CreateOptions) -> None:
    if options.data_file_raw:
        raise InvalidParameter("data-file-raw", "cannot be used together with encryption")
    if options.version == "v2" and options.preallocation != "off":
        raise InvalidParameter("preallocation", "needs version v3 (compat 1.1) in an encrypted image")


def _header(options: Qcow2CreateOptions, geometry: Geometry, l1_size: int, l1_offset: int, table_clusters: int) -> Header:
    version = geometry.version
    zstd = options.compression_type == "zstd"
    features = {head.COMPRESSION: zstd, head.DATA_FILE: geometry.data_file, head.EXTENDED_L2: geometry.extended}
    extensions = []
    if version >= 3 and options.cluster_size > head.FEATURE_TABLE_MIN_CLUSTER:
        extensions.append(Extension(head.EXT_FEATURE_TABLE, head.feature_table()))
    return Header(
        version=version,
        cluster_bits=geometry.cluster_bits,
        size=options.size,
        l1_size=l1_size,
        l1_offset=l1_offset if l1_size else 0,
        refcount_table_offset=options.cluster_size,
        refcount_table_clusters=table_clusters,
        incompatible=sum(feature.mask for feature, wanted in features.items() if wanted),
        autoclear=head.DATA_FILE_RAW.mask if options.data_file_raw else 0,
        compatible=head.LAZY_REFCOUNTS.mask if options.lazy_refcounts else 0,
        refcount_order=geometry.refcount_order,
        header_length=head.V2_LENGTH if version == 2 else head.V3_LENGTH,
        compression_type=1 if zstd else 0,
        extensions=tuple(extensions),
    ).with_backing(options.backing_file, options.backing_fmt)


async def _make_room(target: CreateTarget, plan: ImagePlan, preallocation: str) -> None:
    """Empty the file and make it as long as the image, with space behind it if that was asked for."""
    try:
        await target.truncate(0)
        await target.truncate(plan.file_length, preallocation="off" if preallocation == "metadata" else preallocation)
    except BlockIOError as error:
        # A storage of fixed size (a block device): its tables are written over, whatever it held.
        if error.errno not in (errno.ENOTSUP, errno.EINVAL) or target.length() < plan.file_length:
            raise


async def _write_refcounts(target: CreateTarget, plan: ImagePlan) -> None:
    bits, per_block = plan.geometry.cluster_bits, 1 << plan.geometry.block_bits
    table = array(U64, [(plan.first_block + i) << bits for i in range(plan.blocks)])
    table.extend(array(U64, bytes((plan.table_clusters << bits) - 8 * plan.blocks)))
    await target.write_from(1 << bits, encode_u64(table))
    codec = RefcountCodec(plan.geometry.refcount_order)
    full = codec.encode(array(codec.typecode, [1]) * per_block)
    for i in range(plan.blocks):
        used = min(plan.total - i * per_block, per_block)
        one = array(codec.typecode, [1])
        block = full if used == per_block else codec.encode(one * used + array(codec.typecode, [0]) * (per_block - used))
        await target.write_from((plan.first_block + i) << bits, block)


async def _write_mapping(target: CreateTarget, plan: ImagePlan) -> None:
    bits, per_table = plan.geometry.cluster_bits, 1 << plan.geometry.l2_bits
    words = 2 if plan.geometry.extended else 1
    l1 = array(U64, bytes(8 * plan.header.l1_size))
    for i in range(plan.l2_tables):
        l1[i] = (plan.first_l2 + i) << bits | COPIED
    if l1:
        await target.write_from(plan.header.l1_offset, encode_u64(l1))
    # What an encrypted image shows of space that was never written is noise, so the entries say that it reads as zeroes.
    flags = COPIED | (ZERO if plan.header.crypt_method and not plan.geometry.extended else 0)
    first_data = flags if plan.geometry.data_file else (plan.first_l2 + plan.l2_tables) << bits | flags
    end = first_data + (plan.mapped << bits)
    for i in range(plan.l2_tables):
        start = first_data + (i * per_table << bits)
        table = array(U64, range(start, min(start + (per_table << bits), end), 1 << bits))
        if plan.geometry.extended:
            # The places are there, but no subcluster counts as written: a backing file shows.
            table = with_states(table, 0)
        table.extend(array(U64, bytes(8 * (per_table * words - len(table)))))
        await target.write_from((plan.first_l2 + i) << bits, encode_u64(table))
