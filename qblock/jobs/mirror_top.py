"""The filter that a mirror job puts above its source, so that it sees what guests write.

Models QEMU's ``mirror_top`` (semantics.md section 4.4). In background mode it only forwards: the dirty bitmap on the source
sees the writes. In write-blocking mode every change goes through `MirrorHost`, which applies it to both sides before the
guest is answered. In semi-sync mode only a flush does, after the source has done it. Not opened by users: `mirror.py` inserts it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar, Protocol

from qblock.errors import BlockIOError
from qblock.jobs.job_filter import JobFilter
from qblock.permissions import Perm, PermissionPair

if TYPE_CHECKING:
    from qblock.node import BdrvChild


class MirrorHost(Protocol):
    """The job, as its filter sees it."""

    @property
    def copies_guest_writes(self) -> bool:
        """Whether guest writes must reach the target before they are answered."""

    async def guest_write(self, offset: int, buffer: memoryview, *, fua: bool) -> None:
        """Write to both sides."""

    async def guest_write_zeroes(self, offset: int, length: int, *, may_unmap: bool, fua: bool) -> None:
        """Zero both sides."""

    async def guest_discard(self, offset: int, length: int) -> None:
        """Discard on both sides."""

    async def guest_flushed(self, generation: int) -> None:
        """The source is durable up to this write generation: wait for the target, if that is the copy mode."""


class MirrorTop(JobFilter):
    """See the module. ``host`` is set while the job follows the source."""

    name: ClassVar[str] = "mirror_top"

    host: MirrorHost | None = None
    within_chain: bool = False
    """The target is a layer below: writing to it must be allowed, although the users above do not allow other writers."""
    generation: int = 0
    """How many changes of the source have ended, well or badly. Whoever was answered before is counted."""

    @property
    def _host(self) -> MirrorHost | None:
        """The job, if guest writes go through it now."""
        return self.host if self.host is not None and self.host.copies_guest_writes else None

    async def flush(self) -> None:
        """See `Driver`: of the source, and in semi-sync mode of the target too."""
        if self.node.filtered is None:
            return
        generation = self.generation
        await super().flush()
        if self.host is not None:
            await self.host.guest_flushed(generation)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        if (host := self._host) is not None:
            await host.guest_write(offset, buffer, fua=fua)
            return
        try:
            await super().write_from(offset, buffer, fua=fua)
        finally:
            self.generation += 1

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`."""
        if (host := self._host) is not None:
            await host.guest_write_zeroes(offset, length, may_unmap=may_unmap, fua=fua)
            return
        try:
            await super().write_zeroes(offset, length, may_unmap=may_unmap, no_fallback=no_fallback, fua=fua)
        finally:
            self.generation += 1

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`."""
        if (host := self._host) is not None:
            await host.guest_discard(offset, length)
            return
        try:
            await super().discard(offset, length)
        finally:
            self.generation += 1

    async def receive_range(self, offset: int, source: BdrvChild, source_offset: int, length: int) -> None:
        """See `Driver`: what must reach both sides is written by buffer."""
        if self._host is not None:
            raise BlockIOError(errno.ENOTSUP)
        try:
            await super().receive_range(offset, source, source_offset, length)
        finally:
            self.generation += 1

    def at_work(self, forwarding: PermissionPair) -> PermissionPair:
        """See `JobFilter`."""
        if self.within_chain:
            return PermissionPair(forwarding.perm & ~Perm.CONSISTENT_READ, forwarding.shared | Perm.WRITE)
        return forwarding
