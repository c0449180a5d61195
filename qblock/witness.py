"""A witness: one byte in a file that outlives the machine, written when a drive has left its old image for the new one.

Models the ``witness`` argument that was proposed for drive-reopen (rfc-2012.md): management opens a file on storage that is
local and persistent, passes the descriptor with ``getfd``, and after a crash of whatever kind looks whether a byte is in it.
What the byte means is told in `drive_reopen`, which decides when it is written.

The name of the file is management's affair: it should have made the directory entry durable before it passed the descriptor.
All that may block runs in an executor; nothing waits for a pipe that is full (a witness that cannot be written at once cannot
be written).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

import attrs

from qblock.errors import BlockIOError

WITNESS_BYTE: Final = b"\x01"
"""What is written. Not zero, so that it also shows in a file that was made longer beforehand."""


@attrs.define(eq=False)
class Witness:
    """Owns ``fd`` until `close`, or until nobody holds the witness any more; ``name`` is what management calls it."""

    fd: int
    name: str = ""
    closed: bool = attrs.field(default=False, init=False)

    async def write(self, executor: Executor) -> None:
        """Write the byte at the descriptor's position; raises `BlockIOError` when it is not written, without waiting."""
        try:
            await _in_thread(executor, self._write_byte)
        except OSError as error:
            raise BlockIOError(error.errno or errno.EIO, f"The witness '{self.name}' could not be written") from None

    async def sync(self, executor: Executor) -> None:
        """Make the byte durable. Failures do not count: a pipe has nothing to make durable."""
        await _in_thread(executor, self._sync_data)

    def close(self) -> None:
        """Give the descriptor back; may be called again."""
        if not self.closed:
            self.closed = True
            os.close(self.fd)

    def __del__(self) -> None:
        self.close()  # for one whose owner never got a turn

    def __enter__(self) -> Witness:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_byte(self) -> None:
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        if not poller.poll(0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        # The interpreter ignores SIGPIPE, but programs may have given it back its deadly meaning.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
        try:
            written = os.write(self.fd, WITNESS_BYTE)
        except BrokenPipeError:
            signal.sigtimedwait({signal.SIGPIPE}, 0)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if not written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _sync_data(self) -> None:
        with contextlib.suppress(OSError):
            os.fdatasync(self.fd)


async def _in_thread(executor: Executor, function: Callable[[], None]) -> None:
    """Run ``function`` in a thread. A cancelled caller goes on only when the thread has let go of the descriptor."""
    done = asyncio.get_running_loop().run_in_executor(executor, function)
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:
        while not done.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({done})
        if not done.cancelled():
            done.exception()  # the cancellation matters more
        raise
