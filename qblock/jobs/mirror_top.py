"""The filter that a mirror job puts above its source, so that it sees what guests write.

Models QEMU's ``mirror_top`` (semantics.md section 4.4). In background mode it only forwards: the dirty bitmap on the source
sees the writes. In write-blocking mode every change goes through `MirrorHost`, which applies it to both sides before the
guest is answered. Not opened by users: `mirror.py` inserts it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from qblock import requests
from qblock.driver import Driver, NodeInfo
from qblock.options import DriverOptions
from qblock.permissions import ChildRole, Perm, PermissionPair

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


class MirrorTop(Driver):
    """See the module. ``host`` is set once the job exists; after `retire` the filter needs nothing from its child."""

    name: ClassVar[str] = "mirror_top"
    options_class: ClassVar[type[DriverOptions]] = DriverOptions
    is_filter: ClassVar[bool] = True
    supports_write_zeroes: ClassVar[bool] = True
    supports_discard: ClassVar[bool] = True
    supports_copy_range: ClassVar[bool] = True

    host: MirrorHost | None = None
    retired: bool = False

    @property
    def child(self) -> BdrvChild:
        """The edge to the source."""
        edge = self.node.filtered
        assert edge is not None
        return edge

    async def open(self) -> None:
        """See `Driver`: there is nothing to read."""

    def length(self) -> int:
        """See `Driver`: the source's."""
        return self.child.node.driver.length()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        await requests.read_into(self.child, offset, buffer)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        if self.host is not None and self.host.copies_guest_writes:
            await self.host.guest_write(offset, buffer, fua=fua)
        else:
            await requests.write_from(self.child, offset, buffer, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`."""
        if self.host is not None and self.host.copies_guest_writes:
            await self.host.guest_write_zeroes(offset, length, may_unmap=may_unmap, fua=fua)
        else:
            await requests.write_zeroes(
                self.child, offset, length, may_unmap=may_unmap, no_fallback=no_fallback, fua=fua
            )

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`."""
        if self.host is not None and self.host.copies_guest_writes:
            await self.host.guest_discard(offset, length)
        else:
            await requests.discard(self.child, offset, length)

    async def copy_range(self, offset: int, target: BdrvChild, target_offset: int, length: int) -> None:
        """See `Driver`."""
        await requests.copy_range(self.child, offset, target, target_offset, length)

    async def flush(self) -> None:
        """See `Driver`."""
        await requests.flush(self.child.node)

    def info(self) -> NodeInfo:
        """See `Driver`."""
        return self.child.node.driver.info()

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """Passes the needs of its parents on; once retired it must not stand in the way of the switch."""
        if self.retired:
            return PermissionPair(Perm.NONE, Perm.ALL)
        return super().child_permissions(role, perm, shared)
