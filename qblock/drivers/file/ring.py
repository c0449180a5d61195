"""The requests of one file by way of rings that are shared with the kernel (io_uring(7)).

Models QEMU's ``aio=io_uring``: reads, writes and ``fdatasync`` of a file, through the page cache or past it, without threads.
Requests are described in memory that the kernel reads, results appear in memory that the kernel writes. What the tasks of one
turn of the loop ask for is handed over by one call; the loop watches the descriptor of the rings, which is readable while there
are results.

Differs from QEMU: what is larger than `PIECE` goes in pieces, one after the other. Only for x86-64, where memory that two
processors share is read in the order that the program says, which is all that Python can promise about the rings.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
import sys
from typing import Final

from qblock.drivers.file.slots import DEPTH, LARGEST, AlignedBuffer, SlotQueue, call
from qblock.units import MiB
from qblock.zeroes import fill_zero

PIECE: Final = MiB
"""Bytes that the kernel is asked for at once at most."""
_SPARE: Final = 8
"""Buffers of `PIECE` bytes that are kept for the next large request."""

_WORD: Final = (1 << 32) - 1
_SETUP: Final = 425
_ENTER: Final = 426
_FSYNC: Final = 3
_READ: Final = 22
_WRITE: Final = 23
_DATA_ONLY: Final = 1
"""The flag of ``_FSYNC`` that makes it fdatasync(2)."""
_ENTRY: Final = struct.Struct("<BBHiQQIIQHHiQQ")
"""``struct io_uring_sqe``: operation, flags, priority, descriptor, offset, buffer, length, flags of the operation, data, and what
is not used here."""
_RESULT: Final = struct.Struct("<Qi")
"""The beginning of ``struct io_uring_cqe``: data, result."""
_RESULT_SIZE: Final = 16
_PARAMETERS: Final = struct.Struct("<7I3I8IQ8IQ")
"""``struct io_uring_params``: entries of both rings, flags, two members for a kernel thread, features, one more; nothing; where
the members of the ring of requests lie, and an address; those of the ring of results, and an address."""
_ONE_MAPPING: Final = 1 << 0
_CAN_READ: Final = 1 << 3
"""Features: both rings lie in one mapping; a feature that came with `_READ` and `_WRITE` (Linux 5.6)."""
_ENTRIES_OFFSET: Final = 0x10000000
_LATER: Final = (-errno.EAGAIN, -errno.EINTR, -errno.EBUSY)


class IoUring(SlotQueue):
    """The rings of one file. ``alignment`` in bytes: what offsets and lengths are multiples of.

    A slot's number is the number of its entry. Heads and tails of the rings count on for ever, modulo 2**32.
    """

    def __init__(self, alignment: int, *, max_batch: int = 0) -> None:
        """``max_batch`` as in `SlotQueue`. Raises `OSError` where there are no rings: another system or machine, a kernel before
        5.6 or without them, a filter of system calls.
        """
        super().__init__(max_batch)
        if sys.platform != "linux" or platform.machine() != "x86_64" or sys.maxsize < 1 << 32:
            raise OSError(errno.ENOSYS, "this system has none")
        self.alignment = alignment
        self._spare: list[AlignedBuffer] = []
        parameters = bytearray(_PARAMETERS.size)
        in_place = (ctypes.c_char * len(parameters)).from_buffer(parameters)
        self._fd = int(call(_SETUP, ctypes.c_uint(DEPTH), in_place))
        if self._fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        try:
            self._map(_PARAMETERS.unpack(parameters))
        except BaseException:
            os.close(self._fd)
            raise
        self._loop.add_reader(self._fd, self._collect)

    def _map(self, parameters: tuple[int, ...]) -> None:
        """Map what io_uring_setup(2) made."""
        requests, results, features = parameters[0], parameters[1], parameters[5]
        if not features & _ONE_MAPPING or not features & _CAN_READ:
            raise OSError(errno.ENOSYS, "it takes Linux 5.6 or newer")
        _, request_tail, request_mask, *_ = requests_at = parameters[10:18]
        array = requests_at[6]
        result_head, result_tail, result_mask, *_ = results_at = parameters[19:27]
        self._results_at = results_at[5]
        length = max(array + requests * 4, self._results_at + results * _RESULT_SIZE)
        self._rings = mmap.mmap(self._fd, length)
        self._entries = mmap.mmap(self._fd, requests * _ENTRY.size, offset=_ENTRIES_OFFSET)
        words = self._words = memoryview(self._rings)[: length // 4 * 4].cast("I")
        self._order = words[array // 4 : array // 4 + requests]
        self._request_tail, self._result_head, self._result_tail = request_tail // 4, result_head // 4, result_tail // 4
        self._request_mask, self._result_mask = words[request_mask // 4], words[result_mask // 4]

    def close(self) -> None:
        """Give everything back; there are no requests."""
        self._loop.remove_reader(self._fd)
        self._order.release()
        self._words.release()
        self._rings.close()
        self._entries.close()
        os.close(self._fd)

    # ------------------------------------------------------------------------------------------------------- requests

    async def read(self, fd: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, with zeroes behind the end of the file. Raises `OSError`.

        A cancelled caller goes on only when the kernel is done.
        """
        for start in range(0, len(buffer), PIECE):
            await self._read_piece(fd, offset + start, buffer[start : start + PIECE])

    async def _read_piece(self, fd: int, offset: int, piece: memoryview) -> None:
        slot = self._free.pop() if self._free else await self._next_slot()
        memory = self._memory_for(slot, len(piece))
        try:
            done = 0
            while done < len(piece):
                count = await self._run(
                    slot, _READ, fd, offset=offset + done, address=memory.address + done, length=len(piece) - done
                )
                done += count
                if not count or done % self.alignment:
                    break  # the end of the file
            piece[:done] = memory.view[:done]
            fill_zero(piece[done:])
        finally:
            self._let_go(slot, memory)

    async def write(self, fd: int, offset: int, buffer: memoryview) -> None:
        """Write all of ``buffer``; otherwise as `read`."""
        for start in range(0, len(buffer), PIECE):
            await self._write_piece(fd, offset + start, buffer[start : start + PIECE])

    async def _write_piece(self, fd: int, offset: int, piece: memoryview) -> None:
        slot = self._free.pop() if self._free else await self._next_slot()
        memory = self._memory_for(slot, len(piece))
        try:
            memory.view[: len(piece)] = piece
            done = 0
            while done < len(piece):
                count = await self._run(
                    slot, _WRITE, fd, offset=offset + done, address=memory.address + done, length=len(piece) - done
                )
                if not count:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done += count - count % self.alignment
        finally:
            self._let_go(slot, memory)

    async def sync(self, fd: int) -> None:
        """``fdatasync``; otherwise as `read`."""
        slot = self._free.pop() if self._free else await self._next_slot()
        try:
            await self._run(slot, _FSYNC, fd, flags=_DATA_ONLY)
        finally:
            self._give_back(slot)

    def _memory_for(self, slot: int, length: int) -> AlignedBuffer:
        if length <= LARGEST:
            return self._buffers[slot]
        return self._spare.pop() if self._spare else AlignedBuffer.make(PIECE)

    def _let_go(self, slot: int, memory: AlignedBuffer) -> None:
        if memory is not self._buffers[slot] and len(self._spare) < _SPARE:
            self._spare.append(memory)
        self._give_back(slot)

    async def _run(
        self, slot: int, operation: int, fd: int, *, offset: int = 0, address: int = 0, length: int = 0, flags: int = 0
    ) -> int:
        while True:
            _ENTRY.pack_into(
                self._entries, slot * _ENTRY.size,
                operation, 0, 0, fd, offset, address, length, flags, slot, 0, 0, 0, 0, 0,
            )  # fmt: skip
            result = await self._outcome(slot)
            if result >= 0:
                return result
            if result not in _LATER:
                raise OSError(-result, os.strerror(-result))

    # --------------------------------------------------------------------------------------------------- to the kernel

    def _submit(self) -> None:
        """See `SlotQueue`."""
        queued, self._queued = self._queued, []
        words, order, mask = self._words, self._order, self._request_mask
        first = 0
        while first < len(queued):
            batch = queued[first : first + self._max_batch]
            begin = words[self._request_tail]
            for n, slot in enumerate(batch, begin):
                order[n & mask] = slot
            words[self._request_tail] = (begin + len(batch)) & _WORD
            taken = call(_ENTER, ctypes.c_uint(self._fd), ctypes.c_uint(len(batch)), 0, 0, None, 0)
            if taken <= 0:
                self._answer(batch[0], -ctypes.get_errno() if taken < 0 else -errno.EAGAIN)
            # What has not been taken is taken back: the kernel reads requests only while it is being called.
            words[self._request_tail] = (begin + max(taken, 0)) & _WORD
            first += max(taken, 1)
        self._collect()

    def _collect(self) -> None:
        """Hand out all that has completed; called when the descriptor is readable, and when requests have been handed over."""
        words, rings, mask = self._words, self._rings, self._result_mask
        head = words[self._result_head]
        while head != words[self._result_tail]:
            slot, result = _RESULT.unpack_from(rings, self._results_at + (head & mask) * _RESULT_SIZE)
            head = (head + 1) & _WORD
            words[self._result_head] = head
            self._answer(slot, result)
