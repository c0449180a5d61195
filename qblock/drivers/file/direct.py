"""Reading and writing without the page cache (``O_DIRECT``): what alignment it takes, buffers that have it, and who runs it.

All functions raise `OSError`, and those that are not coroutines block.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from typing import Final

from qblock.drivers.file import space
from qblock.drivers.file.aio import LinuxAio
from qblock.drivers.file.slots import LARGEST
from qblock.threads import ThreadQueue
from qblock.units import MiB
from qblock.zeroes import fill_zero

BOUNCE: Final = MiB
"""Bytes of a `Bounce`."""
_PASS_BY: Final = 16
"""Writes that go to threads after one that would have had to wait: space is seldom allocated for one write alone."""
_DIRECT_ALIGNMENTS: Final = (512, 4096)
_BLKSSZGET: Final = 0x1268


class DirectAccess:
    """The requests of one file: small ones by the kernel's own queue where there is one, the others in threads.

    ``alignment`` in bytes is what offsets and lengths are multiples of.
    """

    def __init__(self, threads: ThreadQueue, alignment: int, *, native: bool = False, max_batch: int = 0) -> None:
        """Raises `OSError` where there is no queue and ``native`` insists on it; ``max_batch`` as in `SlotQueue`."""
        self.alignment = alignment
        self._threads = threads
        self._bounce = Bounce()
        self._passing_by = 0
        """How many writes are not even offered to the queue."""
        self._queue: LinuxAio | None = None
        try:
            self._queue = LinuxAio(max_batch=max_batch, may_block=native)
        except OSError:
            if native:
                raise

    def close(self) -> None:
        """Give the queue back; there are no requests."""
        if self._queue is not None:
            self._queue.close()

    async def read(self, fd: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, with zeroes behind the end of the file. A cancelled caller goes on when nobody works on it."""
        done = 0
        if (queue := self._queue_for(buffer)) is not None:
            done = await queue.read(fd, offset, buffer)
            if done == len(buffer):
                return
            done -= done % self.alignment
        await self._threads.run(self._read_blocking, fd, offset + done, buffer[done:])

    async def write(self, fd: int, offset: int, buffer: memoryview) -> None:
        """Write all of ``buffer``; cancelled as `read`."""
        done = 0
        if self._passing_by:
            self._passing_by -= 1
        elif (queue := self._queue_for(buffer)) is not None:
            done = await queue.write(fd, offset, buffer)
            if done == len(buffer):
                return
            done -= done % self.alignment
            self._passing_by = _PASS_BY
        await self._threads.run(self._write_blocking, fd, offset + done, buffer[done:])

    async def sync(self, fd: int) -> None:
        """``fdatasync``."""
        await self._threads.run(os.fdatasync, fd)

    def _queue_for(self, buffer: memoryview) -> LinuxAio | None:
        queue = self._queue
        return queue if queue is not None and len(buffer) <= LARGEST and not queue.refused else None

    def _read_blocking(self, fd: int, offset: int, buffer: memoryview) -> None:
        bounce = self._bounce.buffer
        for start in range(0, len(buffer), BOUNCE):
            piece = bounce[: min(BOUNCE, len(buffer) - start)]
            read_once(fd, offset + start, piece)
            buffer[start : start + len(piece)] = piece

    def _write_blocking(self, fd: int, offset: int, buffer: memoryview) -> None:
        bounce = self._bounce.buffer
        for start in range(0, len(buffer), BOUNCE):
            piece = bounce[: min(BOUNCE, len(buffer) - start)]
            piece[:] = buffer[start : start + len(piece)]
            space.write_fully(fd, offset + start, piece)


class Bounce(threading.local):
    """A thread's aligned buffer for O_DIRECT: making one for each request would cost more than a small request."""

    def __init__(self) -> None:
        self.buffer = memoryview(mmap.mmap(-1, BOUNCE))


def alignment_of(fd: int, *, is_device: bool) -> int:
    """The smallest unit in bytes that O_DIRECT takes for an open file."""
    if is_device:
        answer = fcntl.ioctl(fd, _BLKSSZGET, b"\0" * 4)
        return int.from_bytes(answer, "little")
    with mmap.mmap(-1, _DIRECT_ALIGNMENTS[-1]) as area, memoryview(area) as page:
        for alignment in _DIRECT_ALIGNMENTS:
            with contextlib.suppress(OSError), page[:alignment] as block:
                os.preadv(fd, (block,), 0)
                return alignment
    return _DIRECT_ALIGNMENTS[-1]


def set_direct(fd: int, *, on: bool) -> None:
    """Let an open file bypass the page cache, or use it."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)


def read_once(fd: int, offset: int, piece: memoryview) -> None:
    """Fill ``piece``; a count that is no whole block is the end of the file."""
    done = 0
    while done < len(piece):
        count = os.preadv(fd, (piece[done:],), offset + done)
        done += count
        if not count or done % _DIRECT_ALIGNMENTS[0]:
            fill_zero(piece[done:])
            return
