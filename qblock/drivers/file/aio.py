"""Linux's own queue of requests for one file that bypasses the page cache (io_submit(2)).

Models QEMU's ``aio=native``: no thread for a small request. What the tasks of one turn of the loop ask for is handed to the
kernel by one call, and what has completed is fetched by one call when an eventfd tells the loop. Data go through aligned buffers
of the queue, so that the kernel never works on a caller's memory.

Differs from QEMU: requests ask not to wait (``RWF_NOWAIT``), and what would make io_submit block (space to allocate, a full
queue of the disk) is left to a thread, as are requests of more than `LARGEST` bytes, whose copies would hold the loop up.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import mmap
import os
import platform
import struct
import sys
from collections import deque
from typing import Final

from qblock.clock import VirtualTime
from qblock.units import KiB

DEPTH: Final = 128
"""Requests of one file that the kernel has at the same time; more wait for their turn."""
LARGEST: Final = 64 * KiB
"""Bytes of a request at most."""

_READ: Final = 0
_WRITE: Final = 1
_TELL_EVENTFD: Final = 1
_REQUEST: Final = struct.Struct("<QIiHhIQQqQII")
"""``struct iocb`` of io_submit(2) on little-endian machines: data, key, flags, opcode, priority, descriptor, buffer, length,
offset, nothing, what to do at the end, eventfd."""
_EVENT: Final = struct.Struct("<QQqq")
"""``struct io_event``: data, the request, the result, nothing."""
_CALLS: Final = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2), "riscv64": (0, 1, 4, 2)}
"""The numbers of io_setup, io_destroy, io_getevents and io_submit."""
_FOR_A_THREAD: Final = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""Results that say nothing about the data: the same request in a thread either works or tells the true error."""

_call = ctypes.CDLL(None, use_errno=True).syscall
_call.restype = ctypes.c_long


class LinuxAio:
    """The queue of one file. Made, used and closed on one loop, in real time.

    A request uses one of `DEPTH` slots: a request block and a buffer. ``_answers`` says what waits for each slot that is
    queued or in the kernel. ``refused`` becomes True where everything has to be done in threads.
    """

    def __init__(self, *, max_batch: int = 0, may_block: bool = False) -> None:
        """``max_batch``: requests of one call at most (0: all). ``may_block``: go on where a file system cannot promise not to
        wait. Raises `OSError` where there is no such queue: another system, a filter of system calls, too many queues.
        """
        self._loop = asyncio.get_running_loop()
        numbers = _CALLS.get(platform.machine())
        if sys.platform != "linux" or numbers is None or sys.maxsize < 1 << 32:
            raise OSError(errno.ENOSYS, "this system has none")
        if isinstance(self._loop, VirtualTime):
            raise OSError(errno.ENOTSUP, "the kernel does not wait for virtual time")
        setup, self._destroy, self._get_events, self._submit_call = numbers
        context = ctypes.c_ulong(0)
        if _call(setup, ctypes.c_long(DEPTH), ctypes.byref(context)) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._context = context
        self._make_slots()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loop.add_reader(self._eventfd, self._collect)
        self._queued: list[int] = []
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._max_batch = max_batch or DEPTH
        self._may_block = may_block
        self._flags = os.RWF_NOWAIT
        self.refused = False

    def _make_slots(self) -> None:
        area = mmap.mmap(-1, DEPTH * LARGEST)
        self._area_address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        view = memoryview(area)
        self._buffers = [view[start : start + LARGEST] for start in range(0, len(view), LARGEST)]
        self._requests = bytearray(DEPTH * _REQUEST.size)
        self._requests_address = ctypes.addressof(ctypes.c_char.from_buffer(self._requests))
        self._pointers = (ctypes.c_uint64 * DEPTH)()
        self._events = (ctypes.c_char * (DEPTH * _EVENT.size))()
        self._answers: list[asyncio.Future[int] | None] = [None] * DEPTH
        self._free = list(range(DEPTH - 1, -1, -1))

    def close(self) -> None:
        """Give everything back; waits for what the kernel is still doing."""
        self._loop.remove_reader(self._eventfd)
        _call(self._destroy, self._context)
        os.close(self._eventfd)

    # ------------------------------------------------------------------------------------------------------- requests

    async def read(self, fd: int, offset: int, buffer: memoryview) -> int:
        """Fill the beginning of ``buffer`` and say how far; less than all is left to a thread. Raises `OSError`.

        Offset and length are multiples of what O_DIRECT takes, the length is at most `LARGEST`. A cancelled caller goes on
        only when the kernel is done.
        """
        slot = self._free.pop() if self._free else await self._next_slot()
        try:
            done = await self._run(slot, _READ, fd, offset, len(buffer))
            buffer[:done] = self._buffers[slot][:done]
        finally:
            self._give_back(slot)
        return done

    async def write(self, fd: int, offset: int, buffer: memoryview) -> int:
        """Write the beginning of ``buffer`` and say how much; otherwise as `read`."""
        slot = self._free.pop() if self._free else await self._next_slot()
        try:
            self._buffers[slot][: len(buffer)] = buffer
            return await self._run(slot, _WRITE, fd, offset, len(buffer))
        finally:
            self._give_back(slot)

    async def _next_slot(self) -> int:
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

    async def _run(self, slot: int, operation: int, fd: int, offset: int, length: int) -> int:
        buffer = self._area_address + slot * LARGEST
        _REQUEST.pack_into(
            self._requests, slot * _REQUEST.size,
            slot, 0, self._flags, operation, 0, fd, buffer, length, offset, 0, _TELL_EVENTFD, self._eventfd,
        )  # fmt: skip
        answer = self._answers[slot] = self._loop.create_future()
        if not self._queued:
            self._loop.call_soon(self._submit)
        self._queued.append(slot)
        try:
            result: int = await answer
        except asyncio.CancelledError:
            while self._answers[slot] is not None:
                answer = self._answers[slot] = self._loop.create_future()
                with contextlib.suppress(asyncio.CancelledError):
                    await answer
            raise
        if result >= 0:
            return result
        if -result not in _FOR_A_THREAD:
            raise OSError(-result, os.strerror(-result))
        if result == -errno.EOPNOTSUPP:
            self.refused = not self._may_block
            self._flags = 0
        return 0

    # --------------------------------------------------------------------------------------------------- to the kernel

    def _submit(self) -> None:
        """Hand over all that is queued. What the kernel does not take is answered with its reason."""
        queued, self._queued = self._queued, []
        first = 0
        while first < len(queued):
            count = min(len(queued) - first, self._max_batch)
            for n in range(count):
                self._pointers[n] = self._requests_address + queued[first + n] * _REQUEST.size
            taken = _call(self._submit_call, self._context, ctypes.c_long(count), self._pointers)
            if taken > 0:
                first += taken
            else:
                self._answer(queued[first], -ctypes.get_errno() if taken < 0 else -errno.EAGAIN)
                first += 1

    def _collect(self) -> None:
        """Hand out all that has completed; called when the eventfd is readable."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)
        no_wait = ctypes.c_long(0)
        count = _call(self._get_events, self._context, no_wait, ctypes.c_long(DEPTH), self._events, None)
        for slot, _, result, _ in _EVENT.iter_unpack(memoryview(self._events)[: max(0, count) * _EVENT.size]):
            self._answer(slot, result)

    def _answer(self, slot: int, result: int) -> None:
        answer, self._answers[slot] = self._answers[slot], None
        if answer is not None and not answer.done():
            answer.set_result(result)
