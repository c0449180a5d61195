"""File descriptors that a client sent along: owned here from arrival until a command claims them or nobody can any more.

Models QEMU's getfd and closefd. A batch of descriptors belongs to the requests whose last byte arrived with or after it, until
the next batch arrives. Differs from QEMU: requests that wait in the queue keep their own batch when another one arrives, and
named descriptors are closed with the session that named them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import attrs

from qblock.errors import CommandError, FdNotFound, UnknownFd


@attrs.define(eq=False)
class FdBatch:
    """Descriptors of one arrival. ``users``: queued requests that may claim them; ``current``: requests may still join."""

    fds: list[int] = attrs.field(factory=list)
    users: int = 0
    current: bool = True

    def claim(self) -> int:
        """The next descriptor, which the caller now owns; raises `CommandError` when there is none."""
        if not self.fds:
            raise CommandError("No file descriptor came with the command (it travels as SCM_RIGHTS on a unix socket)")
        return self.fds.pop(0)

    def release(self) -> None:
        """One user less, or no longer current: close what nobody can claim any more."""
        if not self.users and not self.current:
            for fd in self.fds:
                os.close(fd)
            self.fds.clear()


@attrs.define(eq=False)
class ReceivedFds:
    """The descriptors of one session: the current batch and those given a name by getfd."""

    _batch: FdBatch = attrs.field(factory=FdBatch, init=False)
    _named: dict[str, int] = attrs.field(factory=dict, init=False)

    def arrive(self, fds: Iterable[int]) -> None:
        """Descriptors have come: they replace the current batch."""
        if arrived := list(fds):
            self._batch.current = False
            self._batch.release()
            self._batch = FdBatch(arrived)

    def join(self) -> FdBatch:
        """The batch that a request that just became complete may claim from; give it back with `leave`."""
        self._batch.users += 1
        return self._batch

    @staticmethod
    def leave(batch: FdBatch) -> None:
        """The request is done with."""
        batch.users -= 1
        batch.release()

    def name(self, name: str, fd: int) -> None:
        """Keep ``fd`` under ``name``; one of that name is replaced, and closed."""
        if (old := self._named.pop(name, None)) is not None:
            os.close(old)
        self._named[name] = fd

    def take(self, name: str) -> int:
        """The descriptor ``name``, which the caller now owns; raises `FdNotFound`."""
        fd = self._named.pop(name, None)
        if fd is None:
            raise FdNotFound(name)
        return fd

    def close_named(self, name: str) -> None:
        """Close the descriptor ``name``; raises `UnknownFd` when there is none."""
        fd = self._named.pop(name, None)
        if fd is None:
            raise UnknownFd(name)
        os.close(fd)

    @staticmethod
    def discard(fd: int) -> None:
        """Close a descriptor that was claimed and is not wanted after all."""
        os.close(fd)

    def close(self) -> None:
        """The session ends."""
        for name in list(self._named):
            self.close_named(name)
        self._batch.current = False
        self._batch.release()
