"""What copying jobs share: the requests they have under way, and the buffers these use.

Models the bookkeeping of QEMU's mirror and stream loops (semantics.md section 4.4: at most 16 requests of at most 1 MiB).
Offsets and lengths are bytes. Memory is bounded by the pool, which is allocated once.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
from typing import Final

import attrs

from qblock.errors import BlockIOError, ImageError
from qblock.units import MiB

MAX_IN_FLIGHT: Final = 16
MAX_REQUEST: Final = MiB
SLICE_NS: Final = 100_000_000
"""How long a job with nothing to do sleeps before it looks again, in nanoseconds."""

IO_FAILURES: Final = (OSError, ImageError)
"""What a request of a job can fail with on purpose."""


def io_error(error: Exception) -> OSError:
    """The failure as one with an errno, which error policies look at (EIO for trouble with an image's content)."""
    return error if isinstance(error, OSError) else BlockIOError(errno.EIO, str(error))


@attrs.define(eq=False, slots=True)
class Operation:
    """A request under way on ``length`` bytes at ``offset``, of which ``counted`` are progress; ``foreground`` when a guest
    waits for it. ``ret`` is a negative errno once it has failed.
    """

    offset: int
    length: int
    counted: int
    foreground: bool = False
    ret: int = 0


@attrs.define(eq=False, slots=True)
class InFlight:
    """The operations under way; ``bytes`` of them are progress to come.

    Looking and beginning happen without a wait between them, so two operations never overlap.
    """

    limit: int = MAX_IN_FLIGHT
    operations: list[Operation] = attrs.field(factory=list, init=False)
    background: int = attrs.field(default=0, init=False)
    bytes: int = attrs.field(default=0, init=False)
    _waiters: list[asyncio.Future[None]] = attrs.field(factory=list, init=False, repr=False)

    @property
    def full(self) -> bool:
        """Whether the job itself must wait before it begins another one."""
        return self.background >= self.limit

    def conflict(self, offset: int, length: int) -> Operation | None:
        """An operation that overlaps the range, or None."""
        end = offset + length
        for operation in self.operations:
            if operation.offset < end and offset < operation.offset + operation.length:
                return operation
        return None

    def clear_run(self, offset: int, length: int) -> int:
        """How many bytes from ``offset`` on, at most ``length``, are free of operations."""
        end = offset + length
        for operation in self.operations:
            if operation.offset < end and offset < operation.offset + operation.length:
                end = max(operation.offset, offset)
        return end - offset

    def begin(self, offset: int, length: int) -> Operation:
        """Register an operation of the job itself on a range that is free of others."""
        self.background += 1
        return self._register(Operation(offset, length, length))

    def begin_foreground(self, offset: int, length: int, *, counted: int) -> Operation:
        """Register an operation that a guest waits for, likewise; ``counted`` are the bytes that the guest sees."""
        return self._register(Operation(offset, length, counted, foreground=True))

    def _register(self, operation: Operation) -> Operation:
        self.operations.append(operation)
        self.bytes += operation.counted
        return operation

    def end(self, operation: Operation) -> None:
        """The operation is over; all who wait look again."""
        self.operations.remove(operation)
        self.background -= not operation.foreground
        self.bytes -= operation.counted
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self) -> None:
        """Wait until some operation ends."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    async def clear_of(self, offset: int, length: int) -> None:
        """Wait until the range is free of operations; it is so when this returns, for what follows at once."""
        while self.conflict(offset, length) is not None:
            await self.changed()

    async def all_background_ended(self) -> None:
        """Wait until the job has nothing of its own under way."""
        while self.background:
            await self.changed()


class BufferPool:
    """Page-aligned buffers of at most ``piece`` bytes each, ``size`` bytes in all, taken and given back."""

    def __init__(self, size: int, *, piece: int = MAX_REQUEST) -> None:
        self.piece = min(size, piece)
        self.count = min(MAX_IN_FLIGHT, max(1, size // self.piece))
        memory = memoryview(mmap.mmap(-1, self.piece * self.count))
        self._free = [memory[start : start + self.piece] for start in range(0, len(memory), self.piece)]

    def take(self) -> memoryview:
        """A free buffer of `piece` bytes; there must be one (there are as many as operations may be under way)."""
        return self._free.pop()

    def give(self, buffer: memoryview) -> None:
        """Put a buffer back."""
        self._free.append(buffer)

    def close(self) -> None:
        """Forget the memory; it goes back to the system when nobody refers to a part of it any more."""
        assert len(self._free) == self.count, "a buffer has not been given back"
        self._free.clear()
