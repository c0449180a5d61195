"""The ``snapshot-access`` driver: reads the disk as a ``copy-before-write`` filter below keeps it.

Models QEMU's driver of that name (semantics.md section 17). It takes no permission on the filter: a reader gets what was
there when the filter was opened, while guests go on writing through the filter. What is not kept, or was discarded here, gives
``EACCES``. A discard tells the filter that this part is not needed any more. Nothing can be written. On a node that keeps
no snapshot it can be opened, but not read (``ENOTSUP``).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from qblock import requests
from qblock.driver import Driver, NodeInfo
from qblock.errors import BlockIOError
from qblock.extents import Extent
from qblock.options import ChildRef, DriverOptions, child
from qblock.permissions import ChildRole, Perm, PermissionPair

if TYPE_CHECKING:
    from qblock.node import BdrvChild


@frozen
class SnapshotAccessOptions(DriverOptions):
    """``BlockdevOptionsGenericFormat``."""

    file: ChildRef = child(ChildRole.PRIMARY_DATA, doc="the copy-before-write filter", since="7.0")


class SnapshotAccessDriver(Driver):
    """See the module."""

    name: ClassVar[str] = "snapshot-access"
    options_class: ClassVar[type[DriverOptions]] = SnapshotAccessOptions
    supports_reopen: ClassVar[bool] = False
    supports_discard: ClassVar[bool] = True

    options: SnapshotAccessOptions

    @property
    def child(self) -> BdrvChild:
        """The edge to the filter."""
        return self.node.children["file"]

    async def open(self) -> None:
        """See `Driver`: nothing to read."""

    def length(self) -> int:
        """See `Driver`."""
        return self.child.node.length

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        await requests.read_snapshot_into(self.child, offset, buffer)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`: what was cannot be changed."""
        raise BlockIOError(errno.ENOTSUP, f"Node '{self.node.node_name}' shows a snapshot, which cannot be written")

    async def flush(self) -> None:
        """See `Driver`: there is nothing to flush."""

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`."""
        await requests.discard_snapshot(self.child, offset, length)

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """See `Driver`."""
        return await requests.snapshot_status(self.child, offset, length, want_zero=want_zero)

    def info(self) -> NodeInfo:
        """See `Driver`: a snapshot has no clusters, and cannot say whether it was closed cleanly."""
        return NodeInfo(dirty=None)

    def filename(self) -> str | None:
        """See `Driver`: None, since the filter is needed to open this again."""
        return None

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """See `Driver`: nothing is needed, what is read is nobody's any more."""
        return PermissionPair(Perm.NONE, Perm.ALL)
