"""The file under a qcow2 node as its metadata code sees it: reads, ordered writes, overlap protection, poison.

Models image-formats.md section 1.7 (overlap protection) and semantics.md section 14.4 (BLOCK_IMAGE_CORRUPTED). All writes of
metadata pass through `ImageFile`. Tables that the caller can write again may fail; a single write that changes the meaning of
the image (of a snapshot, the bitmaps, the features) poisons the node when it does: what is on disk is then not known, and only
reopening (which reads it again) makes the node writable. A write that would hit the image's own metadata is a fatal
corruption: the corrupt bit is set, the event sent, the node poisoned; from then on it gives nothing, as in QEMU.

Differs from QEMU in where the areas are looked up: clusters of tables that are spread over the file are kept in a compressed
bitmap, so that the question costs the same for every write and every size of image.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NoReturn

import attrs

from qblock import requests
from qblock.drivers.qcow2.header import CORRUPT, DATA_FILE, MAX_OFFSET, Header, encode_features
from qblock.errors import BlockIOError, FatalDamage, ImagePoisoned

if TYPE_CHECKING:
    from pyroaring import BitMap64

    from qblock.drivers.qcow2.cache import CachedTable
    from qblock.drivers.qcow2.encryption import GuestCipher
    from qblock.environment import Environment
    from qblock.node import BdrvChild, BlockDriverState


class Area(enum.Enum):
    """Kinds of metadata that overlap protection knows; the values are QEMU's option names."""

    HEADER = "main-header"
    ACTIVE_L1 = "active-l1"
    ACTIVE_L2 = "active-l2"
    REFCOUNT_TABLE = "refcount-table"
    REFCOUNT_BLOCK = "refcount-block"
    SNAPSHOT_TABLE = "snapshot-table"
    INACTIVE_L1 = "inactive-l1"
    INACTIVE_L2 = "inactive-l2"
    BITMAP_DIRECTORY = "bitmap-directory"


CONSTANT_AREAS: Final = frozenset(
    {Area.HEADER, Area.ACTIVE_L1, Area.REFCOUNT_TABLE, Area.SNAPSHOT_TABLE, Area.BITMAP_DIRECTORY}
)
CACHED_AREAS: Final = CONSTANT_AREAS | {Area.ACTIVE_L2, Area.REFCOUNT_BLOCK, Area.INACTIVE_L1}
TEMPLATES: Final = {
    "none": frozenset[Area](),
    "constant": CONSTANT_AREAS,
    "cached": CACHED_AREAS,
    "all": frozenset(Area),
}


class MetadataMap:
    """Which clusters of the file hold metadata of the protected kinds; cluster numbers throughout."""

    def __init__(self, protected: frozenset[Area], cluster_bits: int) -> None:
        from pyroaring import BitMap64  # noqa: PLC0415 - 20 ms, and images that are only read do not need it

        self.protected = protected
        self._cluster_bits = cluster_bits
        self._clusters: dict[Area, BitMap64] = {}
        self.all: BitMap64 = BitMap64()
        """The union of all areas: one look-up answers nearly every question."""
        self._new = BitMap64

    def add(self, area: Area, clusters: Iterable[int]) -> None:
        """These clusters hold ``area`` from now on."""
        if area in self.protected:
            self._add(area, self._new(clusters))

    def add_bytes(self, area: Area, offset: int, length: int) -> None:
        """As `add`, for the clusters that a byte range touches."""
        if area in self.protected and length:
            added = self._new()
            added.add_range(offset >> self._cluster_bits, -(-(offset + length) >> self._cluster_bits))
            self._add(area, added)

    def _add(self, area: Area, added: BitMap64) -> None:
        members = self._clusters.setdefault(area, self._new())
        members |= added
        self.all |= added

    def add_one(self, area: Area, cluster: int) -> None:
        """As `add`, for one cluster, cheaply."""
        if area in self.protected:
            self._clusters.setdefault(area, self._new()).add(cluster)
            self.all.add(cluster)

    def remove(self, area: Area, clusters: Iterable[int]) -> None:
        """These clusters do not hold ``area`` any more."""
        if area in self._clusters:
            gone = self._new(clusters)
            self._clusters[area] -= gone
            for other, members in self._clusters.items():
                if other is not area:
                    gone -= members
            self.all -= gone

    def touches(self, first: int, end: int) -> bool:
        """Is any of clusters ``first`` to ``end`` (exclusive) metadata?"""
        if end - first == 1:
            return first in self.all
        return self.all.range_cardinality(first, end) > 0

    def hit(self, first: int, end: int, *, ignore: Area | None = None) -> Area | None:
        """The area that clusters ``first`` to ``end`` (exclusive) overlap, if any."""
        if not self.touches(first, end):
            return None
        wanted = self._new(range(first, end))
        return next((area for area, members in self._clusters.items() if area is not ignore and members.intersect(wanted)), None)


@attrs.define(eq=False)
class ImageFile:
    """Access to the file of one open image.

    ``virgin`` is the host offset from which on nothing was ever written, so that it reads as zeroes. ``writable`` is False
    for read-only nodes and for poisoned ones. ``metadata`` is None while the node is read-only.
    """

    node: BlockDriverState
    env: Environment
    edge: BdrvChild
    header: Header
    writable: bool = False
    metadata: MetadataMap | None = None
    virgin: int = 0
    traced: bool = False
    """The file's driver wants to hear of each step of the work on the image (blkdebug)."""
    data_edge: BdrvChild | None = None
    """Where guest clusters lie: the external data file; the file itself when the image has none (`data`)."""
    crypto: GuestCipher | None = None
    """Stands between guest buffers and guest clusters in an encrypted image."""
    cached_tables: dict[int, CachedTable] = attrs.field(factory=dict)
    """The slices of L2 tables by which reads are answered at once; none is left after `fatal`."""
    _reported: bool = False

    @property
    def name(self) -> str:
        """What messages call the image: its file name, or else the node's name."""
        return self.edge.node.driver.filename() or self.node.node_name

    def length(self) -> int:
        """The present length of the file in bytes."""
        return self.edge.node.driver.length()

    @property
    def data(self) -> BdrvChild:
        """Where guest clusters lie. ``BlockIOError(ENOMEDIUM)`` for an image that was opened without its data file."""
        if self.data_edge is not None:
            return self.data_edge
        if self.header.has(DATA_FILE):
            raise BlockIOError(errno.ENOMEDIUM, f"'{self.name}' was opened without its data file")
        return self.edge

    def event(self, step: str) -> None:
        """Come to a step of the work, see `Driver.debug_event`; nothing happens unless the file is ``traced``."""
        if self.traced:
            self.edge.node.driver.debug_event(step)

    async def reach(self, step: str) -> None:
        """As `event`, and stand still there if a breakpoint holds the request: only where others may come in between."""
        if self.traced:
            await self.edge.node.driver.reach_event(step)

    async def read(self, offset: int, length: int) -> bytearray:
        """Bytes of the file; behind its end they are zero."""
        raw = bytearray(length)
        await requests.read_into(self.edge, offset, memoryview(raw))
        return raw

    async def write_metadata(self, offset: int, data: memoryview) -> None:
        """Write metadata that the image refers to, or is about to; a failure poisons the node."""
        try:
            await requests.write_from(self.edge, offset, data)
        except BlockIOError as error:
            self.poison(error)
            raise

    async def write_table(self, offset: int, content: memoryview) -> None:
        """Write what nothing refers to yet, or what will be written again: failing does no harm, and poisons nothing."""
        await requests.write_from(self.edge, offset, content)

    async def flush(self) -> None:
        """Everything written so far is durable before anything written later. Failing poisons nothing."""
        await self.reach("flush_to_disk")
        if self.data_edge is not None:
            await requests.flush(self.data_edge.node)
        await requests.flush(self.edge.node)

    async def barrier(self) -> None:
        """As `flush`, but a failure poisons the node."""
        try:
            await self.flush()
        except BlockIOError as error:
            self.poison(error)
            raise

    # ------------------------------------------------------------------------------------------------------ refusal

    def poison(self, cause: BaseException) -> None:
        """Refuse writes from now on; the first cause is kept."""
        self.writable = False
        if self.node.poisoned is None:
            self.node.poisoned = cause

    def give_up(self, cause: BaseException) -> None:
        """The file is sound, but what is known of it is not: from now on the node gives nothing, until it is opened anew."""
        self.writable = False
        detail = f"the tables of '{self.name}' have changed and could not be read again: {cause}"
        self.node.poisoned = FatalDamage(errno.EIO, detail)
        self.cached_tables.clear()

    def check_writable(self) -> None:
        """Raise when writes must be refused."""
        if not self.writable:
            if self.node.poisoned is not None:
                raise ImagePoisoned(self.node.node_name, self.node.poisoned)
            raise BlockIOError(errno.EPERM, f"Node '{self.node.node_name}' is read-only")

    def check_readable(self) -> None:
        """Raise when `fatal` was called: the image is as good as gone."""
        if isinstance(self.node.poisoned, FatalDamage):
            raise ImagePoisoned(self.node.node_name, self.node.poisoned)

    def overlaps(self, offset: int, length: int) -> bool:
        """Would a write to this part of the file perhaps hit metadata, or lie outside of it? Then `check_overlap` decides."""
        if offset >= self.virgin:
            return True
        metadata = self.metadata
        bits = self.header.cluster_bits
        return metadata is not None and metadata.touches(offset >> bits, ((offset + length - 1) >> bits) + 1)

    async def check_overlap(self, offset: int, length: int, *, ignore: Area | None = None) -> None:
        """Raise (after marking the image corrupt) when a write to this part of the file would hit metadata."""
        if offset >= self.virgin or offset + length > MAX_OFFSET:
            await self.fatal("a write was stopped that lies behind everything in the file", offset, length)
        metadata = self.metadata
        if metadata is None or not metadata.protected:
            return
        bits = self.header.cluster_bits
        area = metadata.hit(offset >> bits, ((offset + length - 1) >> bits) + 1, ignore=ignore)
        if area is not None:
            await self.fatal(f"a write was stopped that would have hit metadata ({area.value})", offset, length)

    # --------------------------------------------------------------------------------------------------- corruption

    def report(self, detail: str, offset: int | None = None, size: int | None = None, *, fatal: bool = False) -> None:
        """Send BLOCK_IMAGE_CORRUPTED: once per open node for what reads find, and for the fatal one."""
        if self._reported and not fatal:
            return
        self._reported = True
        device = next((name for edge in self.node.parents if (name := getattr(edge.parent, "name", ""))), "")
        data: dict[str, object] = {"device": device, "node-name": self.node.node_name, "msg": detail, "fatal": fatal}
        if offset is not None:
            data["offset"] = offset
        if size is not None:
            data["size"] = size
        self.env.emit("BLOCK_IMAGE_CORRUPTED", data)

    def bad_entry(self, detail: str, offset: int | None = None) -> BlockIOError:
        """Report damage that a read met, and make the error that the read fails with."""
        self.report(detail, offset)
        return BlockIOError(errno.EIO, f"'{self.name}' is damaged: {detail}")

    async def fatal(self, detail: str, offset: int | None = None, size: int | None = None) -> NoReturn:
        """Damage that writing would make worse: set the corrupt bit (version 3), poison the node, raise EIO."""
        error = FatalDamage(errno.EIO, f"'{self.name}' is damaged: {detail}")
        if self.writable:
            self.poison(error)
            self.cached_tables.clear()
            self.report(detail, offset, size, fatal=True)
            await self._mark_corrupt()
        raise error

    async def _mark_corrupt(self) -> None:
        header = self.header
        if header.version < 3:
            return
        self.header = attrs.evolve(header, incompatible=header.incompatible | CORRUPT.mask)
        at, data = encode_features(self.header.incompatible, header.compatible, header.autoclear)
        try:
            await requests.write_from(self.edge, at, memoryview(data))
            await requests.flush(self.edge.node)
        except BlockIOError as error:
            self.env.warn(f"the corrupt bit of '{self.name}' could not be written: {error}")
