"""The ``qcow2`` driver: opening, requests, size and links of an image. The theory is in the modules it puts together.

Models QEMU's qcow2 driver, versions 2 and 3, for reading and writing. ``lazy-refcounts`` allows to postpone refcount updates, and
is a mark for others: here they go out under the flush that the data need anyway (`writeback.py`), so that postponing them would
save nothing. The dirty bit is never set; an image that has it is repaired when it is opened for writing.

`read_into` and `write_from` contain the fast path: one cluster whose L2 slice is cached. It does not suspend unless the file
does; everything else goes to `clusters.py` and `allocation.py`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar, Final, assert_never

import attrs

from qblock import requests
from qblock.driver import BackingLink, Limits
from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.allocation import Allocator, Payload
from qblock.drivers.qcow2.checked import CheckedDriver
from qblock.drivers.qcow2.clusters import ClusterMap
from qblock.drivers.qcow2.create import create_image
from qblock.drivers.qcow2.datafile import fit, name_in_header
from qblock.drivers.qcow2.described import DescribedDriver
from qblock.drivers.qcow2.emptying import make_empty
from qblock.drivers.qcow2.header import Header
from qblock.drivers.qcow2.layout import COPIED, OFFSET_MASK, Geometry, Kind, decode_u64
from qblock.drivers.qcow2.options import (
    CacheSizes,
    Qcow2CreateOptions,
    Qcow2Options,
    cache_sizes,
    protected_areas,
    refuse_for_v2,
    refuse_unsupported,
)
from qblock.drivers.qcow2.packing import CompressedWriter
from qblock.drivers.qcow2.preallocation import lies_on_holes
from qblock.drivers.qcow2.refcounts import Refcounts, block_clusters, read_refcount_table
from qblock.drivers.qcow2.resize import resize
from qblock.drivers.qcow2.snapshots import SnapshotTable, read_snapshot_table
from qblock.drivers.qcow2.storage import Area, ImageFile, MetadataMap
from qblock.drivers.qcow2.subwriting import allocator_class, map_class
from qblock.drivers.qcow2.vmstate import VmStateDriver
from qblock.drivers.qcow2.writeback import WriteBack
from qblock.errors import (
    BlockIOError,
    CorruptImage,
    ImagePoisoned,
    InvalidParameter,
    NotThisFormat,
)
from qblock.extents import Compressed, Data, Extent, Fragment, Unallocated, Zero
from qblock.options import DriverOptions
from qblock.units import align_up
from qblock.zeroes import fill_zero

if TYPE_CHECKING:
    from qblock.driver import CreateContext
    from qblock.environment import Environment
    from qblock.node import BdrvChild, BlockDriverState

_SECTOR: Final = 512


class Qcow2Driver(CheckedDriver, VmStateDriver, DescribedDriver):
    """One open image."""

    name: ClassVar[str] = "qcow2"
    options_class: ClassVar[type[DriverOptions]] = Qcow2Options
    reopens_with: ClassVar[frozenset[str]] = frozenset(
        {
            "cache-clean-interval", "cache-size", "encrypt", "l2-cache-entry-size", "l2-cache-size", "lazy-refcounts",
            "overlap-check", "pass-discard-other", "pass-discard-request", "pass-discard-snapshot", "refcount-cache-size",
        }
    )  # fmt: skip
    reopens_without: ClassVar[frozenset[str]] = reopens_with
    create_options_class: ClassVar[type[DriverOptions]] = Qcow2CreateOptions
    supports_backing: ClassVar[bool] = True
    zero_initialised: ClassVar[bool] = True
    supports_write_zeroes: ClassVar[bool] = True
    supports_discard: ClassVar[bool] = True
    supports_compressed: ClassVar[bool] = True
    supports_copy_range: ClassVar[bool] = True

    options: Qcow2Options

    def __init__(self, node: BlockDriverState, options: Any, env: Environment) -> None:
        super().__init__(node, options, env)
        self._file: ImageFile
        self._map: ClusterMap
        self._snapshots = SnapshotTable((), 0)
        self._writer: Allocator | None = None
        self._writeback: WriteBack | None = None
        self._size = 0
        self._inactive = False
        """Prepared for writing by a reopen, but nothing was written yet."""
        self._reactivate = False
        self._kept = self.options
        self._early: Header | None = None
        """The header, read by `data_file_link` right before opening."""

    # ------------------------------------------------------------------------------------------------- open and close

    async def open(self) -> None:
        """See `Driver`. Raises `ImageError`, `BlockIOError` or `InvalidParameter`; reads header, L1 and snapshot table."""
        refuse_unsupported(self.options)
        header = self._early or await self._read_header()
        self._early = None
        if "data-file" in self.node.children and not header.has(head.DATA_FILE):
            raise InvalidParameter("data-file", f"cannot be given: '{self._image}' keeps its data itself")
        sizes = cache_sizes(self.options, header)
        refuse_for_v2(self.options, header, self._image)
        await self._unlock(self._edge, header)
        await self._build(header, sizes)
        self.probes_storage = self._lies_on_holes() and not header.has(head.DATA_FILE)
        if self.node.to_check:
            return
        if not self.node.read_only:
            self._check_may_write(header)
            if header.has(head.DIRTY):
                await self._repair()
        await self._load_bitmaps()
        if not self.node.read_only:
            await self._prepare_writing()
            await self._activate()

    async def data_file_link(self) -> str | None:
        """See `SupportsDataFile`."""
        header = self._early = await self._read_header()
        given = "data-file" in self.node.children
        return name_in_header(header, self._image) if header.has(head.DATA_FILE) and not given else None

    @property
    def _edge(self) -> BdrvChild:
        return self.node.children["file"]

    @property
    def _image(self) -> str:
        return self._edge.node.driver.filename() or self.node.node_name

    def _lies_on_holes(self) -> bool:
        # Of an encrypted image holes do not read as zeroes.
        return self._encryption is None and lies_on_holes(self._edge.node.driver, self._cluster_bits)

    async def _read_header(self) -> Header:
        raw = bytearray(head.V2_LENGTH)
        length = self._edge.node.driver.length()
        if length < head.V2_LENGTH:
            raise NotThisFormat(self._image, "qcow2", "the file is too short")
        await requests.read_into(self._edge, 0, memoryview(raw))
        cluster = 1 << head.cluster_bits_of(bytes(raw), self._image)
        raw = bytearray(min(cluster, length))
        await requests.read_into(self._edge, 0, memoryview(raw))
        header = head.parse_header(bytes(raw), self._image)
        head.validate(header, length, self._image, to_check=self.node.to_check)
        return header

    async def _build(self, header: Header, sizes: CacheSizes) -> None:
        traced = self._edge.node.driver.wants_debug_events
        data = self.node.children.get("data-file")
        file = self._file = ImageFile(self.node, self.env, self._edge, header, traced=traced, data_edge=data)
        file.crypto = self._guest_cipher
        geometry = Geometry.of(header, sizes.l2_entry)
        l1 = decode_u64(await file.read(header.l1_offset, header.l1_size * 8))
        self._map = map_class(geometry)(file, geometry, l1, sizes.l2, sizes.clean_interval)
        self._snapshots = await read_snapshot_table(file)
        if self._snapshots.broken is not None:
            self._take_broken_snapshots(self._snapshots.broken)
        self._writer = self._writeback = None
        self._adopt_size(header.disk_size)
        cluster = geometry.cluster_size
        alignment = 1 if file.crypto is None else _SECTOR
        self.limits = Limits(
            request_alignment=alignment, zero_alignment=1 << geometry.subcluster_bits, discard_alignment=cluster
        )
        # Hot paths use these; they are the same objects for the life of the image.
        self._storage = self._edge
        # The fast path announces no steps, so that a file that is told of them gets none of it; nor does it check places,
        # nor encrypt.
        plain = file.crypto is None and not (geometry.data_file or geometry.extended)
        self._tables = self._map.tables if plain and not traced else {}
        file.cached_tables = self._tables
        self._epochs = self._map.epochs
        self._slice_shift, self._cluster_bits = geometry.slice_shift, geometry.cluster_bits
        self._slice_mask, self._cluster_mask = (1 << geometry.slice_bits) - 1, cluster - 1
        self._offset_mask = OFFSET_MASK & ~(cluster - 1)
        self._flags_mask = ~(self._offset_mask | COPIED)
        self._metadata: Any = ()

    def _adopt_size(self, size: int) -> None:
        self._size = size
        self._map.length = size

    async def _prepare_writing(self) -> None:
        """Read what writing needs. Nothing is written before `_activate`."""
        file, header = self._file, self._file.header
        file.event("reftable_load")
        table = await read_refcount_table(file)
        file.virgin = align_up(file.length(), header.cluster_size)
        file.metadata = await self._protect(table)
        sizes = cache_sizes(self.options, header)
        refcounts = Refcounts(
            file, self._map.geometry, table, sizes.refcount, discard_other=self.options.pass_discard_other
        )
        self._map.refcounts = refcounts
        self._writeback = WriteBack(file, refcounts, self._map)
        pass_discard = self.options.pass_discard_request
        self._writer = allocator_class(self._map.geometry)(
            self._map,
            refcounts,
            self._writeback,
            pass_discard=self.node.discard_unmap if pass_discard is None else pass_discard,
            keep_discarded=self.options.discard_no_unref and header.version >= 3,
        )
        self._metadata = file.metadata.all

    async def _activate(self) -> None:
        """Begin writing: at the end of opening, or with the first write after a change from read-only to read-write."""
        await self._clear_autoclear()
        await self._mark_bitmaps()
        self._inactive = False
        self._file.writable = self.node.poisoned is None
        await self._drop_stale_bitmaps()

    async def _protect(self, table: Any) -> MetadataMap:
        """Collect where metadata lie, for overlap protection."""
        header, bits = self._file.header, self._file.header.cluster_bits
        protected = protected_areas(self.options.overlap_check)
        areas = MetadataMap(protected, bits)
        areas.add_bytes(Area.HEADER, 0, header.cluster_size)
        areas.add_bytes(Area.ACTIVE_L1, header.l1_offset, header.l1_size * 8)
        areas.add_bytes(Area.REFCOUNT_TABLE, header.refcount_table_offset, len(table) * 8)
        areas.add_bytes(Area.SNAPSHOT_TABLE, *self._snapshots.place(self._file))
        if self._store is not None and self._store.directory is not None:
            areas.add_bytes(Area.BITMAP_DIRECTORY, self._store.directory.offset, self._store.directory.size)
        areas.add(Area.REFCOUNT_BLOCK, block_clusters(table, bits))
        areas.add(Area.ACTIVE_L2, (entry >> bits for entry in map(OFFSET_MASK.__and__, self._map.l1) if entry))
        for snapshot in self._snapshots.usable(self._file):
            areas.add_bytes(Area.INACTIVE_L1, snapshot.l1_offset, snapshot.l1_bytes)
            if Area.INACTIVE_L2 in protected:
                l1 = decode_u64(await self._file.read(snapshot.l1_offset, snapshot.l1_size * 8))
                areas.add(Area.INACTIVE_L2, (entry >> bits for entry in map(OFFSET_MASK.__and__, l1) if entry))
        return areas

    async def _clear_autoclear(self) -> None:
        """Features that qblock does not know of may become untrue by writing: their autoclear bits go, before any write."""
        header = self._file.header
        keep = header.autoclear & head.MAINTAINED_AUTOCLEAR
        if header.extension(head.EXT_BITMAPS) is None:
            keep &= ~head.BITMAPS.mask
        if header.raw_data_file:
            keep |= head.DATA_FILE_RAW.mask
        if header.version >= 3 and keep != header.autoclear:
            self._file.header = attrs.evolve(header, autoclear=keep)
            await self._write_features()

    async def _write_features(self) -> None:
        header = self._file.header
        at, data = head.encode_features(header.incompatible, header.compatible, header.autoclear)
        await self._file.write_metadata(at, memoryview(data))
        await self._file.barrier()

    async def close(self) -> None:
        """See `Driver`: everything is written back, unless the node is poisoned."""
        try:
            await self.store_bitmaps()
        except BlockIOError as error:
            self.env.warn(f"the persistent bitmaps of '{self._image}' could not be stored, and are inconsistent now: {error}")
        writeback, self._writer = self._writeback, None
        self._writeback = None
        if writeback is not None and self._file.writable:
            await writeback.finish()
            self._file.writable = False

    # ------------------------------------------------------------------------------------------------------- requests

    def length(self) -> int:
        """See `Driver`."""
        return self._size

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        table = self._tables.get(offset >> self._slice_shift)
        if table is not None:
            entry = table.entries[offset >> self._cluster_bits & self._slice_mask]
            start = offset & self._cluster_mask
            host = entry & self._offset_mask
            if (
                host
                and not entry & self._flags_mask
                and start + len(buffer) <= self._cluster_mask + 1
                and offset + len(buffer) <= self._size
            ):
                table.used = True
                epoch = self._epochs.current
                epoch.count += 1
                try:
                    await requests.read_into(self._storage, host + start, buffer)
                finally:
                    epoch.count -= 1
                    if epoch.freed is not None:
                        self._epochs.advance()
                return
        self._file.check_readable()
        inside = max(0, min(len(buffer), self._size - offset))
        if inside < len(buffer):
            fill_zero(buffer[inside:])
        await self._map.read(offset, buffer[:inside])

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        if fua:
            await self.write_from(offset, buffer)
            await self.flush()
            return
        table = self._tables.get(offset >> self._slice_shift)
        if table is not None and self._file.writable:
            entry = table.entries[offset >> self._cluster_bits & self._slice_mask]
            start = offset & self._cluster_mask
            host = entry & self._offset_mask
            if (
                host
                and entry & ~self._offset_mask == COPIED
                and start + len(buffer) <= self._cluster_mask + 1
                and host < self._file.virgin
                and host >> self._cluster_bits not in self._metadata
            ):
                table.used = True
                epoch = self._epochs.current
                epoch.count += 1
                try:
                    await requests.write_from(self._storage, host + start, buffer)
                finally:
                    epoch.count -= 1
                    if epoch.freed is not None:
                        self._epochs.advance()
                return
        writer = await self._writing(offset, len(buffer))
        await writer.write(offset, Payload(buffer))

    async def _writing(self, offset: int, length: int) -> Allocator:
        """What changes the mapping; raises when the node cannot be written or the range is no part of the disk."""
        if self._inactive:
            await self._activate()
        self._file.check_writable()
        if offset + length > align_up(self._size, _SECTOR):
            raise BlockIOError(errno.EIO, f"a request ends behind the end of '{self._image}'")
        assert self._writer is not None
        return self._writer

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`; version 2 has no zero clusters, and only without a backing node other means."""
        writer = await self._writing(offset, length)
        if self._map.geometry.version < 3 and self.node.backing is not None:
            raise BlockIOError(errno.ENOTSUP)
        await writer.zero(offset, length, unmap=may_unmap)
        if fua:
            await self.flush()

    async def write_compressed(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`; data files hold no compressed clusters."""
        writer = await self._writing(offset, len(buffer))
        if self._map.geometry.data_file or self._encryption is not None:
            raise BlockIOError(errno.ENOTSUP, "compressed clusters cannot be kept in a data file, nor encrypted")
        await (writer.packer or CompressedWriter(writer)).write(offset, buffer)

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`."""
        writer = await self._writing(offset, length)
        await writer.discard(offset, length)

    async def flush(self) -> None:
        """See `Driver`."""
        if self._writeback is None or self._inactive:
            return
        if self.node.poisoned is not None:
            raise ImagePoisoned(self.node.node_name, self.node.poisoned)
        await self._file.reach("flush_to_os")
        await self._writeback.flush()

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """See `Driver`: runs over any number of L2 tables."""
        if offset >= self._size:
            return Zero(length)
        kind, length, host = await self._map.status(offset, min(length, self._size - offset))
        if self._encryption is not None:
            host = None
        match kind:
            case Kind.DATA:
                return Data(length, host)
            case Kind.ZERO | Kind.ZERO_ALLOCATED:
                return Zero(length, host)
            case Kind.UNALLOCATED:
                return Unallocated(length, host)
            case Kind.COMPRESSED:
                return Compressed(length)
            case Kind.CORRUPT:
                raise AssertionError("the map has reported it")
            case _:
                assert_never(kind)

    async def fragments(self, offset: int, length: int, *, after: int, gaps: bool = False) -> list[Fragment]:
        """See `SupportsFragments`."""
        return await self._map.fragments(offset, min(length, self._size - offset), after=after, gaps=gaps)

    async def copy_range(self, offset: int, target: BdrvChild, target_offset: int, length: int) -> None:
        """See `Driver`: plain data are copied in the file, zeroes are written as such, the rest is the backing node's."""
        if self._encryption is not None:
            raise BlockIOError(errno.ENOTSUP)
        done = 0
        while done < length:
            # Entered before the question, so that what it answers is not given to anybody else meanwhile.
            epoch = self._epochs.current
            epoch.count += 1
            try:
                kind, count, host = await self._map.status(offset + done, length - done)
                await self._copy_run(
                    kind, offset + done, host, target=target, target_offset=target_offset + done, length=count
                )
            finally:
                self._epochs.leave(epoch)
            done += count

    async def _copy_run(
        self, kind: Kind, offset: int, host: int | None, *, target: BdrvChild, target_offset: int, length: int
    ) -> None:
        backing = self.node.backing
        if kind is Kind.COMPRESSED:
            raise BlockIOError(errno.ENOTSUP)
        if kind is Kind.DATA and host is not None:
            # The file may end in the middle of its last cluster.
            inside = max(0, min(length, self._file.data.node.driver.length() - host))
            if inside:
                await requests.copy_range(self._file.data, host, target, target_offset, inside)
            if inside < length:
                await requests.write_zeroes(target, target_offset + inside, length - inside)
        elif kind is Kind.UNALLOCATED and backing is not None and offset + length <= backing.node.length:
            await requests.copy_range(backing, offset, target, target_offset, length)
        elif kind is Kind.UNALLOCATED and backing is not None and offset < backing.node.length:
            raise BlockIOError(errno.ENOTSUP)
        else:
            await requests.write_zeroes(target, target_offset, length)

    async def receive_range(self, offset: int, source: BdrvChild, source_offset: int, length: int) -> None:
        """See `Driver`: space is allocated as for a write, and filled by the file."""
        if self._encryption is not None:
            raise BlockIOError(errno.ENOTSUP)
        payload = Payload(None, source=source, source_offset=source_offset, length=length)
        writer = await self._writing(offset, length)
        await writer.write(offset, payload)

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """See `Driver`. Shrinking gives up what lies behind, and the end of the file; the size changes last, and durably."""
        writer = await self._writing(0, 0)
        self._check_bitmaps_fit(length)
        await resize(
            writer,
            length,
            has_snapshots=bool(self._snapshots.snapshots),
            adopt=self._adopt_size,
            preallocation=preallocation,
        )
        if self._map.geometry.data_file:
            await fit(self._file, length)
        else:
            self.probes_storage = self._lies_on_holes()

    async def make_empty(self) -> None:
        """See `SupportsEmptying`."""
        await make_empty(await self._writing(0, 0), has_snapshots=bool(self._snapshots.snapshots))

    async def _reload(self) -> None:
        """What is known of the tables is void: read them again. If that fails, the node gives nothing any more."""
        try:
            header = await self._read_header()
            await self._build(header, cache_sizes(self.options, header))
            if self.node.to_check:
                await self._begin_mending()
            elif not self.node.read_only:
                await self._prepare_writing()
                await self._activate()
        except BaseException as error:
            self._file.give_up(error)
            raise

    # ---------------------------------------------------------------------------------------------------- backing link

    def backing_link(self) -> BackingLink | None:
        """See `SupportsBacking`."""
        header = self._file.header
        return BackingLink(header.backing_file, header.backing_format) if header.backing_file is not None else None

    async def change_backing_link(self, link: BackingLink | None) -> None:
        """See `SupportsBacking`. ENOSPC when the name does not fit in the header's cluster; durable on return."""
        await self._writing(0, 0)
        assert self._writeback is not None
        filename, fmt = (link.filename, link.format) if link else (None, None)
        await self._writeback.rewrite_header(lambda header: header.with_backing(filename, fmt))

    # --------------------------------------------------------------------------------------------------------- reopen

    def check_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`. Options other than for caches and discards are no more than equal; a dirty image must be opened anew."""
        refuse_unsupported(options)
        header = self._file.header
        if options.encrypt != self.options.encrypt:
            raise InvalidParameter("encrypt", "cannot be changed while the image is open")
        cache_sizes(options, header)
        refuse_for_v2(options, header, self._image)
        if read_only:
            self._check_bitmaps_stored()
        else:
            self._check_may_write(header)
            if self._writer is None and header.has(head.DIRTY):
                raise CorruptImage(self._image, "it was not shut down cleanly; open it for writing anew to repair it")

    async def prepare_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`. Reads what writing needs, or writes back what is cached; other cache sizes take effect here."""
        if self._writeback is not None and self._file.writable:
            await self._writeback.finish()
        if read_only:
            await self.store_bitmaps()
        if self.node.poisoned is not None:
            # Reopening is the cure: everything is read again.
            header = await self._read_header()
            self._check_may_write(header)
            await self._build(header, cache_sizes(options, header))
            await self._reread_bitmaps()
        self._kept = self.options
        self.options = options
        try:
            if not read_only and (self._writer is None or not self._file.writable or options != self._kept):
                await self._prepare_writing()
                self._reactivate = True
        except BaseException:
            self.options = self._kept
            raise

    def commit_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`."""
        self.node.poisoned = None
        self._switch_bitmaps(read_only=read_only)
        if read_only:
            self._file.writable = self._reactivate = False
        elif self._reactivate:
            self._reactivate, self._inactive, self._file.writable = False, True, False

    def abort_reopen(self) -> None:
        """See `Driver`."""
        self.options = self._kept
        self._reactivate = False

    @classmethod
    async def create(cls, options: Qcow2CreateOptions, context: CreateContext) -> None:
        """See `SupportsCreate`."""
        await create_image(options, context)
