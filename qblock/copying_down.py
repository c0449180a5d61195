"""Moving what the upper layers of a chain hold into a lower one: the plan, the copying of a piece, and workers that do it.

Models the copying of QEMU's commit, and is what tools and jobs that move data between layers share. `pieces_above` asks the chain
for long extents and cuts them to what a buffer takes; `copy_piece` performs one; `spread` runs several at a time for who need not
stop in between (a job, which must, takes the first two). Offsets and lengths are bytes. Differs from QEMU in that block status is
asked once for each extent, of any length, and not for each request.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import attrs

from qblock import requests
from qblock.clock import Clock, RateLimit
from qblock.errors import BlockIOError
from qblock.node import BdrvChild, BlockDriverState
from qblock.status import FIRST_QUESTION, Further, chain_status, next_question
from qblock.units import GiB, MiB

CHUNK: Final = 2 * MiB
"""Bytes that are copied at a time, and the size of a worker's buffer."""
MAX_ZEROES: Final = GiB
WORKERS: Final = 8
_CANNOT_OFFLOAD: Final = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL)


@attrs.frozen(slots=True)
class Piece:
    """``length`` bytes at ``offset`` for which ``work`` is to be done, or none; what the work is depends on the plan."""

    offset: int
    length: int
    work: bool = True
    zero: bool = False
    """It is known to become zero, so nothing has to be read."""


def cut(offset: int, length: int, step: int) -> list[tuple[int, int]]:
    """The range in parts that end at multiples of ``step``, as offset and length."""
    parts = []
    end = offset + length
    while offset < end:
        count = min(step - offset % step, end - offset)
        parts.append((offset, count))
        offset += count
    return parts


async def pieces_above(top: BlockDriverState, base: BlockDriverState, *, end: int) -> AsyncIterator[Piece]:
    """Everything from 0 to ``end``: work is what a layer from ``top`` down to but not including ``base`` holds."""
    at, question, further = 0, FIRST_QUESTION, Further(gaps=True)
    while at < end:
        start = at
        extent = await chain_status(top, at, min(end - at, question), base=base, further=further)
        if not extent.present:
            yield Piece(at, extent.length, work=False)
            at += extent.length
        else:
            for run_at, run_length in [(at, extent.length), *((run[0], run[1]) for run in further.runs)]:
                if at < run_at:
                    yield Piece(at, run_at - at, work=False)
                for offset, length in cut(run_at, run_length, MAX_ZEROES if extent.zero else CHUNK):
                    yield Piece(offset, length, zero=extent.zero)
                at = run_at + run_length
        question = next_question(question, at - start)


async def copy_piece(
    piece: Piece, source: BdrvChild, target: BdrvChild, buffer: bytearray, *, fua: bool = False
) -> None:
    """Make ``target`` hold what ``source`` shows there; with ``fua`` it is durable on return.

    Space of what becomes zero is given back where the target may do that.
    """
    offset, length = piece.offset, piece.length
    if piece.zero:
        await requests.write_zeroes(target, offset, length, may_unmap=True, fua=fua)
        return
    if not fua and _shares_blocks(target.node):
        try:
            await requests.copy_range(source, offset, target, offset, length)
        except BlockIOError as error:
            if error.errno not in _CANNOT_OFFLOAD:
                raise
        else:
            return
    view = memoryview(buffer)[:length]
    await requests.read_into(source, offset, view)
    await requests.write_from(target, offset, view, fua=fua)


def _shares_blocks(node: BlockDriverState) -> bool:
    """Whether the storage below can copy without moving data."""
    while (edge := node.storage) is not None:
        node = edge.node
    return node.driver.prefers_copy_range


@attrs.define(eq=False)
class _Spreading:
    """One run of `spread`."""

    pieces: AsyncIterator[Piece]
    perform: Callable[[Piece], Awaitable[None]]
    ended: Callable[[Piece], None]
    clock: Clock
    limit: RateLimit
    planning: asyncio.Lock = attrs.field(factory=asyncio.Lock)
    failure: Exception | None = None

    async def work(self) -> None:
        """One worker: pieces until there are none, or one has failed. The others are not cancelled: a driver is never stopped
        in the middle of a write.
        """
        try:
            while self.failure is None and await self.step():
                pass
        except Exception as error:  # raised again by `spread`
            self.failure = self.failure or error

    async def step(self) -> bool:
        """One piece; False when there are no more."""
        async with self.planning:
            piece = await anext(self.pieces, None)
        if piece is None:
            return False
        if piece.work:
            await self.perform(piece)
        self.ended(piece)
        if piece.work and (delay := self.limit.delay_ns(piece.length)):
            await self.clock.sleep_ns(delay)
        return True


async def spread(
    pieces: AsyncIterator[Piece],
    perform: Callable[[Piece], Awaitable[None]],
    ended: Callable[[Piece], None],
    *,
    clock: Clock,
    speed: int = 0,
    workers: int = WORKERS,
) -> None:
    """``perform`` each piece with work, several at a time, and tell ``ended`` of every piece; the first failure ends it.

    ``speed`` is the limit in bytes of work per second, 0 for none.
    """
    limit = RateLimit(clock)
    limit.set_speed(speed)
    run = _Spreading(pieces, perform, ended, clock, limit)
    async with asyncio.TaskGroup() as tasks:
        for _ in range(workers):
            tasks.create_task(run.work())
    if run.failure is not None:
        raise run.failure


class Buffers:
    """Buffers of `CHUNK` bytes for whoever works at the moment: the one used last is in the processor's cache."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self) -> bytearray:
        """A buffer; put it back with `give`."""
        return self._free.pop() if self._free else bytearray(CHUNK)

    def give(self, buffer: bytearray) -> None:
        """It is not used any more."""
        self._free.append(buffer)
