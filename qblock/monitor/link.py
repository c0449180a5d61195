"""Bytes and file descriptors over sockets and pipes, for both ends of a monitor connection.

Models the part of QEMU's character devices that monitors use: descriptors passed with SCM_RIGHTS, reading that can be held
up, output that is kept until the other side reads it. Everything goes by readiness of the descriptor, so it works on the
virtual-time loop of the tests as well.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

READ_SIZE: Final = 1 << 16
MAX_FDS: Final = 16
"""Descriptors taken with one message; the kernel closes what does not fit."""


class Receiver(Protocol):
    """Who gets what a link reads."""

    def received(self, data: bytes, fds: Sequence[int]) -> None:
        """Bytes have come, and descriptors with them, which now belong to the receiver."""

    def ended(self) -> None:
        """The other side will send nothing more, or the connection is lost. Called once."""


class Link(Protocol):
    """One side of a connection."""

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Queue ``data``; never blocks. ``fds`` go with its first byte and remain the caller's."""

    @property
    def backlog(self) -> int:
        """Bytes that the other side has not taken yet."""

    async def drain(self) -> None:
        """Wait until the backlog is small, or the connection is lost."""

    def pause_reading(self) -> None:
        """Call `Receiver.received` no more until `resume_reading`."""

    def resume_reading(self) -> None:
        """End of `pause_reading`."""

    def close(self) -> None:
        """Drop the connection at once, with what is queued."""


class Outbox:
    """What waits to be sent, and who waits for it to shrink; bytes are kept until ``write`` took them."""

    LOW_WATER: Final = 1 << 16

    def __init__(self) -> None:
        self.backlog = 0
        self._chunks: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._waiters: list[asyncio.Future[None]] = []

    def put(self, data: bytes, fds: Sequence[int]) -> None:
        """Append; descriptors are duplicated, so that the caller may close its own."""
        self._chunks.append((memoryview(data), tuple(map(os.dup, fds))))
        self.backlog += len(data)

    def flush(self, write: Callable[[memoryview, Sequence[int]], int]) -> None:
        """Send until nothing is left or ``write`` raises BlockingIOError; other errors are the caller's."""
        while self._chunks:
            data, fds = self._chunks[0]
            try:
                sent = write(data, fds)
            except BlockingIOError:
                break
            _close_all(fds)
            self._chunks[0] = (data[sent:], ())
            self.backlog -= sent
            if sent == len(data):
                self._chunks.popleft()
        if self.backlog <= self.LOW_WATER:
            self._wake()

    def clear(self) -> None:
        """Forget everything; waiters go on."""
        for _, fds in self._chunks:
            _close_all(fds)
        self._chunks.clear()
        self.backlog = 0
        self._wake()

    async def drain(self) -> None:
        """Wait until at most `LOW_WATER` bytes are left."""
        if self.backlog > self.LOW_WATER:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class DescriptorLink:
    """A link over a pair of descriptors: a socket twice, or a program's standard input and output."""

    def __init__(self, reading: int, writing: int, receiver: Receiver) -> None:
        self._loop = asyncio.get_running_loop()
        self._in, self._out = reading, writing
        self._receiver = receiver
        self._outbox = Outbox()
        self._open = self._can_read = self._can_write = True
        self._writing = self._reading = self._polled = False
        self._was_blocking = {fd: os.get_blocking(fd) for fd in (reading, writing)}
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)
        self.resume_reading()

    @property
    def backlog(self) -> int:
        """See `Link`."""
        return self._outbox.backlog

    async def drain(self) -> None:
        """See `Link`."""
        await self._outbox.drain()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """See `Link`. What is sent after the connection is lost goes nowhere."""
        if self._can_write and data:
            self._outbox.put(data, fds)
            if not self._writing:
                self._flush()

    def pause_reading(self) -> None:
        """See `Link`."""
        if self._reading:
            self._reading = False
            if not self._polled:
                self._loop.remove_reader(self._in)

    def resume_reading(self) -> None:
        """See `Link`."""
        if self._reading or not (self._open and self._can_read):
            return
        self._reading = True
        try:
            self._loop.add_reader(self._in, self._readable)
        except PermissionError:  # epoll refuses regular files, which are always ready
            self._polled = True
            self._loop.call_soon(self._readable)

    def close(self) -> None:
        """See `Link`."""
        if self._open:
            self.pause_reading()
            self._open = False
            self._stop_writing()
            self._end_reading()
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        """Standard input and output belong to the program, and maybe to the shell that started it: as they were."""
        for fd, was_blocking in self._was_blocking.items():
            os.set_blocking(fd, was_blocking)

    def _read(self) -> tuple[bytes, Sequence[int]]:
        return os.read(self._in, READ_SIZE), ()

    def _write(self, data: memoryview, fds: Sequence[int]) -> int:
        assert not fds, "descriptors go over sockets only"
        return os.write(self._out, data)

    def _readable(self) -> None:
        if not self._reading:
            return
        try:
            data, fds = self._read()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, fds = b"", ()
        if data:
            self._receiver.received(data, fds)
            if self._polled and self._reading:
                self._loop.call_soon(self._readable)
        else:
            _close_all(fds)
            self.pause_reading()
            self._end_reading()

    def _end_reading(self) -> None:
        if self._can_read:
            self._can_read = False
            self._receiver.ended()

    def _flush(self) -> None:
        try:
            self._outbox.flush(self._write)
        except OSError:
            self._stop_writing()
            return
        if bool(self._outbox.backlog) is not self._writing:
            self._writing = not self._writing
            if self._writing:
                self._loop.add_writer(self._out, self._flush)
            else:
                self._loop.remove_writer(self._out)

    def _stop_writing(self) -> None:
        self._can_write = False
        self._outbox.clear()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._out)


class SocketLink(DescriptorLink):
    """A link over a connected stream socket, which it owns; unix sockets carry descriptors."""

    def __init__(self, sock: socket.socket, receiver: Receiver) -> None:
        self._socket = sock
        self._passes_fds = sock.family == socket.AF_UNIX
        super().__init__(sock.fileno(), sock.fileno(), receiver)

    def _close_descriptors(self) -> None:
        self._socket.close()

    def _read(self) -> tuple[bytes, Sequence[int]]:
        if not self._passes_fds:
            return self._socket.recv(READ_SIZE), ()
        fds = array.array("i")
        room = socket.CMSG_SPACE(MAX_FDS * fds.itemsize)
        data, ancillary, _, _ = self._socket.recvmsg(READ_SIZE, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        return data, fds.tolist()

    def _write(self, data: memoryview, fds: Sequence[int]) -> int:
        if fds:
            rights = array.array("i", fds).tobytes()
            return self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_NOSIGNAL)
        return self._socket.send(data, socket.MSG_NOSIGNAL)


class MemoryLink:
    """A link to another one in the same process; what is sent arrives in a later step of the loop."""

    def __init__(self, receiver: Receiver) -> None:
        self._loop = asyncio.get_running_loop()
        self._receiver = receiver
        self._peer: MemoryLink
        self._outbox = Outbox()
        self._open = self._reading = True
        self._scheduled = False

    @classmethod
    def pair(cls, one: Receiver, other: Receiver) -> tuple[MemoryLink, MemoryLink]:
        """Two connected links, the first for the receiver ``one``."""
        first, second = cls(one), cls(other)
        first._peer, second._peer = second, first
        return first, second

    @property
    def backlog(self) -> int:
        """See `Link`."""
        return self._outbox.backlog

    async def drain(self) -> None:
        """See `Link`."""
        await self._outbox.drain()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """See `Link`."""
        if self._open and self._peer._open and data:
            self._outbox.put(data, fds)
            self._schedule()

    def pause_reading(self) -> None:
        """See `Link`."""
        self._reading = False

    def resume_reading(self) -> None:
        """See `Link`."""
        self._reading = True
        self._peer._schedule()

    def close(self) -> None:
        """See `Link`; the peer still gets what was sent before."""
        if self._open:
            self._open = False
            self._receiver.ended()
            self._schedule()
            self._peer._outbox.clear()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._pass)

    def _pass(self) -> None:
        self._scheduled = False
        if self._peer._open:
            self._outbox.flush(self._hand_over)
            if not self._open and not self.backlog:
                self._peer.close()

    def _hand_over(self, data: memoryview, fds: Sequence[int]) -> int:
        if not self._peer._reading or not self._peer._open:
            raise BlockingIOError
        self._peer._receiver.received(bytes(data), [os.dup(fd) for fd in fds])
        return len(data)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
