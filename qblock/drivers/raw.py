"""The ``raw`` driver: the bytes of the storage are the bytes of the disk, all of them or those of a window.

Models QEMU's ``raw`` with ``offset`` and ``size`` (semantics.md section 17, image-formats.md section 10). A node whose format
was guessed to be raw refuses to write anything into its first 512 bytes that would make it look like another format: a guest
could otherwise turn its disk into an image that names any file of the host.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from attrs import frozen

from qblock import requests
from qblock.chain import skip_filters
from qblock.driver import Driver, Json, Limits, Measurement, NodeInfo, Progress, no_progress
from qblock.errors import BlockIOError, CommandError, InvalidParameter
from qblock.extents import Data, Extent, Unallocated
from qblock.options import ChildRef, DriverOptions, child, option
from qblock.permissions import ChildRole, Perm, PermissionPair, default_child_permissions
from qblock.units import align_up

if TYPE_CHECKING:
    from qblock.node import BdrvChild, BlockDriverState

_SECTOR: Final = 512

_SIGNATURES: Final[tuple[tuple[int, bytes], ...]] = (
    (0, b"QFI\xfb"),  # qcow, qcow2
    (0, b"QED\0"),
    (0, b"KDMV"),
    (0, b"COWD"),
    (0, b"# Disk DescriptorFile"),
    (0, b"vhdxfile"),
    (0, b"conectix"),
    (0, b"LUKS\xba\xbe"),
    (0, b"WithoutFreeSpace"),
    (0, b"WithouFreSpacExt"),
    (0, b"Bochs Virtual HD Image"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
    (64, b"\x7f\x10\xda\xbe"),  # vdi
)
"""Where, and by which bytes, the other formats are recognised (image-formats.md)."""


@frozen
class RawOptions(DriverOptions):
    """``BlockdevOptionsRaw``."""

    file: ChildRef = child(ChildRole.PRIMARY_DATA, doc="the storage")
    offset: int = option(0, doc="where the window begins, in bytes")
    size: int | None = option(None, doc="size of the window in bytes; default: the rest of the storage")


def looks_like_an_image(head: bytes) -> bool:
    """Whether the first 512 bytes of a disk would make it be recognised as something else than raw."""
    return any(head[at : at + len(signature)] == signature for at, signature in _SIGNATURES)


class RawDriver(Driver):
    """A window on its storage child."""

    name: ClassVar[str] = "raw"
    options_class: ClassVar[type[DriverOptions]] = RawOptions
    reopens_with: ClassVar[frozenset[str]] = frozenset({"offset", "size"})
    reopens_without: ClassVar[frozenset[str]] = reopens_with
    zero_initialised: ClassVar[bool] = True
    supports_write_zeroes: ClassVar[bool] = True
    supports_discard: ClassVar[bool] = True
    supports_copy_range: ClassVar[bool] = True
    probes_storage = True

    options: RawOptions
    _traced = False

    @property
    def _edge(self) -> BdrvChild:
        return self.node.children["file"]

    async def open(self) -> None:
        """See `Driver`. Raises `CommandError` when the window does not lie in the storage."""
        self._check_window(self.options)
        self._traced = self._edge.node.driver.wants_debug_events
        if self.node.probed:
            self.limits = Limits(request_alignment=_SECTOR)

    def _check_window(self, options: RawOptions) -> None:
        available = self._edge.node.length
        offset, size = options.offset, options.size
        if offset < 0:
            raise InvalidParameter("offset", f"cannot be negative ({offset})")
        if size is not None and (size < 0 or size % _SECTOR):
            raise InvalidParameter("size", f"must be a multiple of {_SECTOR} ({size})")
        if offset > available:
            raise CommandError(f"The window begins at {offset}, behind the end of the storage of {available} bytes")
        if offset + (size or 0) > available:
            raise CommandError(
                f"The window of {size} bytes at {offset} ends behind the end of the storage of {available} bytes"
            )

    def length(self) -> int:
        """See `Driver`."""
        size = self.options.size
        return size if size is not None else max(0, self._edge.node.length - self.options.offset)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        if self._traced:
            self._edge.node.driver.debug_event("read_aio")
        await requests.read_into(self._edge, offset + self.options.offset, buffer)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`. ``ENOSPC`` behind a window of fixed size, ``EPERM`` for what looks like another format."""
        self._check_room(offset + len(buffer))
        if self.node.probed and offset < _SECTOR and looks_like_an_image(bytes(buffer[:_SECTOR])):
            raise BlockIOError(
                errno.EPERM,
                f"The format of '{self.node.node_name}' was guessed to be raw, so its first sector must not look like another "
                "format; open it with an explicit driver=raw",
            )
        if self._traced:
            self._edge.node.driver.debug_event("write_aio")
        await requests.write_from(self._edge, offset + self.options.offset, buffer, fua=fua)

    def _check_room(self, end: int) -> None:
        if self.options.size is not None and end > self.options.size:
            raise BlockIOError(errno.ENOSPC, f"The window of '{self.node.node_name}' has {self.options.size} bytes")

    async def flush(self) -> None:
        """See `Driver`."""
        below = self._edge.node.driver
        if below.wants_debug_events:
            await below.reach_event("flush_to_os")
            await below.reach_event("flush_to_disk")
        await requests.flush(self._edge.node)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`."""
        self._check_room(offset + length)
        await requests.write_zeroes(
            self._edge,
            offset + self.options.offset,
            length,
            may_unmap=may_unmap,
            no_fallback=no_fallback,
            fua=fua,
        )

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`; not for a part of a first sector that must be looked at."""
        if self.node.probed and offset < _SECTOR and (offset or length < _SECTOR):
            raise BlockIOError(errno.ENOTSUP)
        await requests.discard(self._edge, offset + self.options.offset, length)

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """See `Driver`: all of it is data, and the border looks for holes of the storage; or what an image as storage lacks, is
        lacking here. Where that image has a backing file there are data (7.2 calls them neither held nor zero).
        """
        place, image = offset + self.options.offset, skip_filters(self._edge.node)
        if image.driver.is_protocol:
            return Data(length, place)
        extent = await requests.block_status(self._edge.node, place, length, want_zero=want_zero)
        if isinstance(extent, Unallocated) and image.backing is None:
            return Unallocated(extent.length)
        return Data(extent.length, place)

    async def copy_range(self, offset: int, target: BdrvChild, target_offset: int, length: int) -> None:
        """See `Driver`."""
        await requests.copy_range(self._edge, offset + self.options.offset, target, target_offset, length)

    async def receive_range(self, offset: int, source: BdrvChild, source_offset: int, length: int) -> None:
        """See `Driver`; not where the content must be looked at first."""
        self._check_room(offset + length)
        if self.node.probed and offset < _SECTOR:
            raise BlockIOError(errno.ENOTSUP)
        await requests.copy_range(source, source_offset, self._edge, offset + self.options.offset, length)

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """See `Driver`. ``ENOTSUP`` for a window of fixed size."""
        if self.options.size is not None:
            raise BlockIOError(errno.ENOTSUP, f"'{self.node.node_name}' is a raw window of fixed size")
        await requests.truncate(self._edge, length + self.options.offset, exact=exact, preallocation=preallocation)

    def info(self) -> NodeInfo:
        """See `Driver`: the storage's."""
        return self._edge.node.driver.info()

    def filename(self) -> str | None:
        """See `Driver`; None for a window."""
        window = self.options.offset or self.options.size is not None
        return None if window else super().filename()

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """See `Driver`: what the parents take and share, but nobody else may cut off the storage of a window."""
        pair = default_child_permissions(self, role, perm, shared)
        window = self.options.offset or self.options.size is not None
        return PermissionPair(pair.perm, pair.shared & ~Perm.RESIZE) if window else pair

    def check_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`: the window can be changed; children are the graph's."""
        assert isinstance(options, RawOptions)
        self._check_window(options)

    def commit_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`."""
        super().commit_reopen(options, read_only=read_only)
        requests.refresh_length(self.node)

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """See `Driver`: whatever nothing else claims."""
        return 1

    @classmethod
    async def measure(
        cls,
        options: Mapping[str, Json],
        length: int,
        source: BlockDriverState | None,
        progress: Progress = no_progress,
    ) -> Measurement:
        """See `SupportsMeasure`: nothing is kept beside the disk, and holes are not reckoned with."""
        return Measurement(align_up(length, _SECTOR), align_up(length, _SECTOR))
