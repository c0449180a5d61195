"""The ``memory`` driver: a RAM disk that takes room only for what is not zero.

QEMU has no such driver; ours serves tests, demos and scratch targets. The disk is a table of pages that are made when they are
first written; what has no page reads as zeroes. The content goes with the node.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Final

from attrs import frozen

from qblock.driver import Driver
from qblock.errors import InvalidParameter
from qblock.extents import Data, Extent, Zero
from qblock.options import DriverOptions, option
from qblock.units import KiB
from qblock.zeroes import fill_zero, zero_view

_PAGE: Final = 64 * KiB


@frozen
class MemoryOptions(DriverOptions):
    """Options of ``memory``."""

    size: int = option(0, doc="size of the disk in bytes; it grows when a format driver writes behind its end")


class MemoryDriver(Driver):
    """A sparse RAM disk."""

    name: ClassVar[str] = "memory"
    options_class: ClassVar[type[DriverOptions]] = MemoryOptions
    is_protocol: ClassVar[bool] = True
    zero_initialised: ClassVar[bool] = True
    supports_write_zeroes: ClassVar[bool] = True
    supports_discard: ClassVar[bool] = True

    options: MemoryOptions
    _length = 0
    _pages: dict[int, bytearray]

    async def open(self) -> None:
        """See `Driver`."""
        if self.options.size < 0:
            raise InvalidParameter("size", f"cannot be negative ({self.options.size})")
        self._length = self.options.size
        self._pages = {}

    async def close(self) -> None:
        """See `Driver`: the content is gone."""
        self._pages.clear()

    def length(self) -> int:
        """See `Driver`."""
        return self._length

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        for number, skip, piece in _by_page(offset, buffer):
            page = self._pages.get(number)
            if page is None:
                fill_zero(piece)
            else:
                piece[:] = memoryview(page)[skip : skip + len(piece)]

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        for number, skip, piece in _by_page(offset, buffer):
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = bytearray(_PAGE)
            page[skip : skip + len(piece)] = piece
        self._length = max(self._length, offset + len(buffer))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`: whole pages are dropped."""
        self._clear(offset, offset + length)
        self._length = max(self._length, offset + length)

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`: reads as zeroes afterwards."""
        self._clear(offset, offset + length)

    def _clear(self, start: int, end: int) -> None:
        first, last = start // _PAGE, -(-end // _PAGE)
        # Whichever is shorter: the range or the table.
        numbers = (
            range(first, last) if last - first < len(self._pages) else [n for n in self._pages if first <= n < last]
        )
        for number in numbers:
            page = self._pages.get(number)
            if page is None:
                continue
            skip, stop = max(start - number * _PAGE, 0), min(end - number * _PAGE, _PAGE)
            if stop - skip == _PAGE:
                del self._pages[number]
            else:
                page[skip:stop] = zero_view(stop - skip)

    async def flush(self) -> None:
        """See `Driver`: there is nothing more durable here."""

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """See `Driver`: pages are data, the rest is zero."""
        end = min(offset + length, self._length)
        if offset >= end:
            return Zero(length, offset)
        first = offset // _PAGE
        present = first in self._pages
        number = first + 1
        while number * _PAGE < end and (number in self._pages) == present:
            number += 1
        run = min(number * _PAGE, end) - offset
        return Data(run, offset) if present else Zero(run, offset)

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """See `Driver`; memory is taken when it is written, so ``preallocation`` makes no difference."""
        if length < self._length:
            self._clear(length, -(-self._length // _PAGE) * _PAGE)
        self._length = length

    def allocated_size(self) -> int | None:
        """See `Driver`: the pages."""
        return len(self._pages) * _PAGE


def _by_page(offset: int, buffer: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Cut a request at page borders: number of the page, offset in it, and the part of ``buffer``."""
    done = 0
    while done < len(buffer):
        number, skip = divmod(offset + done, _PAGE)
        count = min(_PAGE - skip, len(buffer) - done)
        yield number, skip, buffer[done : done + count]
        done += count
