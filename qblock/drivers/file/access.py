"""Who runs those requests of a file that are not done at once; QEMU's option ``aio`` is the choice.

Threads are here; see direct.py and ring.py for the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from qblock.threads import ThreadQueue
from qblock.zeroes import fill_zero


class Access(Protocol):
    """Runs requests of one file. A cancelled caller goes on when nobody works on its request any more; raises `OSError`."""

    async def read(self, fd: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, with zeroes behind the end of the file."""

    async def write(self, fd: int, offset: int, buffer: memoryview) -> None:
        """Write all of ``buffer``."""

    async def sync(self, fd: int) -> None:
        """``fdatasync``."""

    def close(self) -> None:
        """Give everything back; there are no requests."""


class ThreadAccess:
    """Everything runs in threads; ``write`` is the blocking function that writes."""

    def __init__(self, threads: ThreadQueue, write: Callable[[int, int, memoryview], None]) -> None:
        self._threads = threads
        self._write = write

    async def read(self, fd: int, offset: int, buffer: memoryview) -> None:
        """See `Access`."""
        await self._threads.run(_read_fully, fd, offset, buffer)

    async def write(self, fd: int, offset: int, buffer: memoryview) -> None:
        """See `Access`."""
        await self._threads.run(self._write, fd, offset, buffer)

    async def sync(self, fd: int) -> None:
        """See `Access`."""
        await self._threads.run(os.fdatasync, fd)

    def close(self) -> None:
        """See `Access`: threads end by themselves."""


def _read_fully(fd: int, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer``, with zeroes behind the end of the file. Blocks."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, (buffer[done:],), offset + done)
        if not count:
            fill_zero(buffer[done:])
            return
        done += count
