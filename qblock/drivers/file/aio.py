"""Linux's own queue of requests for one file that bypasses the page cache (io_submit(2)).

Models QEMU's ``aio=native``: no thread for a small request. What the tasks of one turn of the loop ask for is handed to the
kernel by one call, and what has completed is fetched by one call when an eventfd tells the loop.

Differs from QEMU: requests ask not to wait (``RWF_NOWAIT``), and what would make io_submit block (space to allocate, a full
queue of the disk) is left to a thread, as are requests of more than `slots.LARGEST` bytes, whose copies would hold the loop up.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
import sys
from typing import Final

from qblock.drivers.file.slots import DEPTH, SlotQueue, call

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


class LinuxAio(SlotQueue):
    """The queue of one file. ``refused`` becomes True where everything has to be done in threads."""

    def __init__(self, *, max_batch: int = 0, may_block: bool = False) -> None:
        """``max_batch`` as in `SlotQueue`. ``may_block``: go on where a file system cannot promise not to wait.

        Raises `OSError` where there is no such queue: another system, a filter of system calls, too many queues.
        """
        super().__init__(max_batch)
        numbers = _CALLS.get(platform.machine())
        if sys.platform != "linux" or numbers is None or sys.maxsize < 1 << 32:
            raise OSError(errno.ENOSYS, "this system has none")
        setup, self._destroy, self._get_events, self._submit_call = numbers
        context = ctypes.c_ulong(0)
        if call(setup, ctypes.c_long(DEPTH), ctypes.byref(context)) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._context = context
        self._requests = bytearray(DEPTH * _REQUEST.size)
        self._requests_address = ctypes.addressof(ctypes.c_char.from_buffer(self._requests))
        self._pointers = (ctypes.c_uint64 * DEPTH)()
        self._events = (ctypes.c_char * (DEPTH * _EVENT.size))()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loop.add_reader(self._eventfd, self._collect)
        self._may_block = may_block
        self._flags = os.RWF_NOWAIT
        self.refused = False

    def close(self) -> None:
        """Give everything back; waits for what the kernel is still doing."""
        self._loop.remove_reader(self._eventfd)
        call(self._destroy, self._context)
        os.close(self._eventfd)

    # ------------------------------------------------------------------------------------------------------- requests

    async def read(self, fd: int, offset: int, buffer: memoryview) -> int:
        """Fill the beginning of ``buffer`` and say how far; less than all is left to a thread. Raises `OSError`.

        Offset and length are multiples of what O_DIRECT takes, the length is at most `slots.LARGEST`. A cancelled caller goes on
        only when the kernel is done.
        """
        slot = self._free.pop() if self._free else await self._next_slot()
        try:
            done = await self._run(slot, _READ, fd, offset, len(buffer))
            buffer[:done] = self._buffers[slot].view[:done]
        finally:
            self._give_back(slot)
        return done

    async def write(self, fd: int, offset: int, buffer: memoryview) -> int:
        """Write the beginning of ``buffer`` and say how much; otherwise as `read`."""
        slot = self._free.pop() if self._free else await self._next_slot()
        try:
            self._buffers[slot].view[: len(buffer)] = buffer
            return await self._run(slot, _WRITE, fd, offset, len(buffer))
        finally:
            self._give_back(slot)

    async def _run(self, slot: int, operation: int, fd: int, offset: int, length: int) -> int:
        buffer = self._buffers[slot].address
        _REQUEST.pack_into(
            self._requests, slot * _REQUEST.size,
            slot, 0, self._flags, operation, 0, fd, buffer, length, offset, 0, _TELL_EVENTFD, self._eventfd,
        )  # fmt: skip
        result = await self._outcome(slot)
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
        """See `SlotQueue`."""
        queued, self._queued = self._queued, []
        first = 0
        while first < len(queued):
            count = min(len(queued) - first, self._max_batch)
            for n in range(count):
                self._pointers[n] = self._requests_address + queued[first + n] * _REQUEST.size
            taken = call(self._submit_call, self._context, ctypes.c_long(count), self._pointers)
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
        count = call(self._get_events, self._context, no_wait, ctypes.c_long(DEPTH), self._events, None)
        for slot, _, result, _ in _EVENT.iter_unpack(memoryview(self._events)[: max(0, count) * _EVENT.size]):
            self._answer(slot, result)
