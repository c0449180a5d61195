"""What the kernel's two queues of requests (aio.py, ring.py) share: slots, each with a buffer, and who waits for which.

A request has a slot from the moment it is filled in until its caller has the result. What the tasks of one turn of the loop ask
for is queued, and handed to the kernel at the end of the turn. Data go through aligned buffers of the slots, so that the kernel
never works on a caller's memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import mmap
from abc import ABC, abstractmethod
from collections import deque
from typing import Final

from qblock.clock import VirtualTime
from qblock.units import KiB

DEPTH: Final = 128
"""Requests of one file that the kernel has at the same time; more wait for their turn."""
LARGEST: Final = 64 * KiB
"""Bytes of a slot's buffer."""

call: Final = ctypes.CDLL(None, use_errno=True).syscall
"""syscall(2); ``ctypes.get_errno`` has the reason of a failure."""
call.restype = ctypes.c_long


class AlignedBuffer:
    """Memory at an address that every device takes: ``view`` for us, ``address`` for the kernel."""

    __slots__ = ("address", "view")

    def __init__(self, view: memoryview, address: int) -> None:
        self.view = view
        self.address = address

    @classmethod
    def make(cls, length: int) -> AlignedBuffer:
        """New memory, all zeroes."""
        area = mmap.mmap(-1, length)
        return cls(memoryview(area), ctypes.addressof(ctypes.c_char.from_buffer(area)))

    def cut(self, length: int) -> list[AlignedBuffer]:
        """Its parts of ``length`` bytes."""
        starts = range(0, len(self.view), length)
        return [AlignedBuffer(self.view[start : start + length], self.address + start) for start in starts]


class SlotQueue(ABC):
    """The slots of one file's queue. Made and used on one loop, in real time.

    ``_answers`` says what waits for each slot that is queued or in the kernel.
    """

    def __init__(self, max_batch: int) -> None:
        """``max_batch``: requests that are handed over by one call at most (0 or negative: all). Raises `OSError`."""
        self._loop = asyncio.get_running_loop()
        if isinstance(self._loop, VirtualTime):
            raise OSError(errno.ENOTSUP, "the kernel does not wait for virtual time")
        self._buffers = AlignedBuffer.make(DEPTH * LARGEST).cut(LARGEST)
        self._answers: list[asyncio.Future[int] | None] = [None] * DEPTH
        self._free = list(range(DEPTH - 1, -1, -1))
        self._queued: list[int] = []
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._max_batch = max_batch if max_batch > 0 else DEPTH

    @abstractmethod
    def _submit(self) -> None:
        """Hand over all that is queued. What the kernel does not take is answered with its reason."""

    async def _next_slot(self) -> int:
        """The next slot that becomes free, for a caller that found none in ``_free``."""
        turn: asyncio.Future[int] = self._loop.create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(turn.result())
            raise

    def _give_back(self, slot: int) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(slot)
                return
        self._free.append(slot)

    async def _outcome(self, slot: int) -> int:
        """Queue the request that is filled in for a slot, and wait for its result: a count, or an errno as a negative number.

        A cancelled caller goes on only when the kernel is done.
        """
        answer: asyncio.Future[int] = self._loop.create_future()
        self._answers[slot] = answer
        if not self._queued:
            self._loop.call_soon(self._submit)
        self._queued.append(slot)
        try:
            return await answer
        except asyncio.CancelledError:
            while self._answers[slot] is not None:
                answer = self._answers[slot] = self._loop.create_future()
                with contextlib.suppress(asyncio.CancelledError):
                    await answer
            raise

    def _answer(self, slot: int, result: int) -> None:
        answer, self._answers[slot] = self._answers[slot], None
        if answer is not None and not answer.done():
            answer.set_result(result)
