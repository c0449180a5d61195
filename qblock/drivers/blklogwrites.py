"""The ``blklogwrites`` filter: writes, zero writes, discards and flushes are noted in a log, from which they can be replayed.

Models QEMU's filter of that name and the format of Linux's ``dm-log-writes`` (image-formats.md section 12). All numbers in the
log are little-endian; its sectors have the size of the log, to which requests are aligned. Sector 0 is the superblock, then come
entries: a sector with the header, and the data of writes. An entry has its place as soon as its request arrives; it is written
while the request goes on, and the request fails if either does.

The superblock tells the number of entries. It is rewritten, and the log flushed, at every flush and after every
``log-super-update-interval`` entries. A log that is appended to is walked to its end, which is found by that number.

Differs from QEMU in that an image whose length is no multiple of the log's sectors can be written: the last request is logged
with whole sectors.
"""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Coroutine
from typing import Any, ClassVar, Final

from attrs import evolve, frozen

from qblock import requests
from qblock.environment import Environment
from qblock.errors import BlockIOError, CorruptImage, InvalidParameter
from qblock.filtering import FilterDriver, outcomes
from qblock.node import BdrvChild, BlockDriverState
from qblock.options import ChildRef, DriverOptions, child, option
from qblock.permissions import ChildRole
from qblock.units import MiB, align_up, is_power_of_two

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
SUPER: Final = struct.Struct("<QQQI")
"""Superblock: magic, version, number of entries, sector size."""
ENTRY: Final = struct.Struct("<QQQQ")
"""Header of an entry: first sector on the disk, number of sectors, flags, length of a mark (always 0 here)."""
_SECTOR: Final = 512
_LARGEST: Final = 16 * MiB


class EntryFlag(enum.IntFlag):
    """What kind of request an entry stands for; 0 is a write."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8


@frozen
class BlklogwritesOptions(DriverOptions):
    """``BlockdevOptionsBlklogwrites``."""

    file: ChildRef = child(ChildRole.FILTERED, doc="the node whose writes are logged", since="3.0")
    log: ChildRef = child(ChildRole.METADATA, doc="the node with the log", since="3.0")
    log_sector_size: int | None = option(None, doc="bytes in a sector of the log (512)", since="3.0")
    log_append: bool = option(False, doc="go on with a log that exists", since="3.0")
    log_super_update_interval: int = option(4096, doc="entries until the superblock is written", since="3.0")


class BlklogwritesDriver(FilterDriver):
    """Keeps the log. ``entries`` is their number, ``next_sector`` the place of the next one."""

    name: ClassVar[str] = "blklogwrites"
    options_class: ClassVar[type[DriverOptions]] = BlklogwritesOptions
    supports_copy_range: ClassVar[bool] = False
    supports_reopen: ClassVar[bool] = False
    flushes_writes_only: ClassVar[bool] = True

    options: BlklogwritesOptions

    def __init__(self, node: BlockDriverState, options: Any, env: Environment) -> None:
        super().__init__(node, options, env)
        self.sector_size = _SECTOR
        self.entries = 0
        self.next_sector = 1

    @property
    def log(self) -> BdrvChild:
        """The edge to the log."""
        return self.node.children["log"]

    async def open(self) -> None:
        """See `Driver`. Raises `InvalidParameter`, `CorruptImage` (a log that cannot be appended to) and `BlockIOError`."""
        options = self.options
        if options.log_super_update_interval < 1:
            raise InvalidParameter("log-super-update-interval", "must be at least 1")
        if options.log_append and options.log_sector_size is not None:
            raise InvalidParameter("log-sector-size", "cannot be given with 'log-append': the log tells it")
        if options.log_sector_size is not None:
            self.sector_size = options.log_sector_size
        if not _is_sector_size(self.sector_size):
            raise InvalidParameter(
                "log-sector-size", f"cannot be {self.sector_size}: it must be a power of two from 32 to below {_LARGEST}"
            )
        if options.log_append and self.log.node.length:
            await self._find_end()
        self.limits = evolve(self.limits, request_alignment=self.sector_size)

    # --------------------------------------------------------------------------------------------------- an old log

    async def _find_end(self) -> None:
        magic, version, entries, sector_size = SUPER.unpack(await self._read_log(0, SUPER.size))
        if magic != MAGIC:
            raise self._broken("it does not begin with the magic number of a log")
        if version != VERSION:
            raise self._broken(f"it is of version {version}, and only version {VERSION} is known")
        if not _is_sector_size(sector_size):
            raise self._broken(f"its sectors of {sector_size} bytes are impossible")
        self.sector_size = sector_size
        while self.entries < entries:
            at = self.next_sector * sector_size
            if at + ENTRY.size > self.log.node.length:
                raise self._broken(f"it ends in the middle: it should have {entries} entries")
            _, sectors, flags, _ = ENTRY.unpack(await self._read_log(at, ENTRY.size))
            if flags & ~sum(EntryFlag):
                raise self._broken(f"entry {self.entries} has the unknown flags {flags:#x}")
            self.next_sector += 1 + (0 if flags & EntryFlag.DISCARD else sectors)
            self.entries += 1

    async def _read_log(self, offset: int, length: int) -> bytes:
        content = bytearray(length)
        await requests.read_into(self.log, offset, memoryview(content))
        return bytes(content)

    def _broken(self, how: str) -> CorruptImage:
        return CorruptImage(self.log.node.node_name, f"this log cannot be appended to: {how}")

    # ------------------------------------------------------------------------------------------------------- requests

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        place = self._enter(offset, len(buffer), data_length=len(buffer))
        await _both(self._log(place, buffer), super().write_from(offset, buffer, fua=fua))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`: logged as a write of zeroes. It is not tried without a fallback."""
        if no_fallback:
            raise BlockIOError(errno.ENOTSUP, f"Node '{self.node.node_name}' logs zeroes as data, and needs a buffer for them")
        place = self._enter(offset, length, data_length=length)
        work = super().write_zeroes(offset, length, may_unmap=may_unmap, fua=fua)
        await _both(self._log(place, length), work)

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`."""
        await _both(self._log(self._enter(offset, length, EntryFlag.DISCARD)), super().discard(offset, length))

    async def flush(self) -> None:
        """See `Driver`."""
        await _both(self._log(self._enter(0, 0, EntryFlag.FLUSH)), super().flush())

    def _enter(self, offset: int, length: int, flags: int = 0, data_length: int = 0) -> _Place:
        """Give an entry its place; ``data_length`` bytes of data are to follow its header."""
        size = self.sector_size
        header = ENTRY.pack(offset // size, length // size, flags, 0)
        self.entries += 1
        is_due = bool(flags & EntryFlag.FLUSH) or self.entries % self.options.log_super_update_interval == 0
        place = _Place(self.next_sector * size, header, self.entries if is_due else None)
        self.next_sector += 1 + align_up(data_length, size) // size
        return place

    async def _log(self, place: _Place, data: memoryview | int = 0) -> None:
        """Write an entry with its data (an int: so many zeroes), and the superblock when it is due."""
        size = self.sector_size
        await requests.write_from(self.log, place.offset, memoryview(place.header.ljust(size, b"\0")))
        if not isinstance(data, int):
            await requests.write_from(self.log, place.offset + size, data)
        elif data:
            await requests.write_zeroes(self.log, place.offset + size, data)
        if place.entries is not None:
            await self._write_superblock(place.entries)

    async def _write_superblock(self, entries: int) -> None:
        size = self.sector_size
        content = SUPER.pack(MAGIC, VERSION, entries, size).ljust(size, b"\0")
        await requests.write_from(self.log, 0, memoryview(content))
        await requests.flush(self.log.node)


@frozen
class _Place:
    """Where an entry goes, in bytes; ``entries``: the superblock is to tell this number afterwards."""

    offset: int
    header: bytes
    entries: int | None


def _is_sector_size(size: int) -> bool:
    return ENTRY.size <= size < _LARGEST and is_power_of_two(size)


async def _both(*work: Coroutine[Any, Any, None]) -> None:
    """Do the logging and the request at once, to their ends; raises the first error."""
    for error in await outcomes(work):
        if error is not None:
            raise error
