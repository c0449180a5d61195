"""The ``copy-on-read`` filter: what is read from the backing chain of its child is kept in the child.

Models QEMU's filter of that name (semantics.md section 17). With ``bottom`` only data of the layers down to and including that
node are kept; what lies below is passed on without a copy. It takes write-unchanged on its child, as long as somebody reads
through it and the child can be written.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from qblock import requests
from qblock.chain import backing_chain, chain_next, skip_filters, whole_chain
from qblock.errors import BlockIOError, CommandError, NodeNotFound
from qblock.filtering import FilterDriver
from qblock.node import BlockDriverState
from qblock.options import ChildRef, DriverOptions, child, option
from qblock.permissions import ChildRole, Perm, PermissionPair

if TYPE_CHECKING:
    from qblock.node import BdrvChild


@frozen
class CopyOnReadOptions(DriverOptions):
    """``BlockdevOptionsCor``."""

    file: ChildRef = child(ChildRole.FILTERED, doc="the node that keeps what is read")
    bottom: str | None = option(None, doc="node name of the lowest layer whose data are kept", since="6.0")


class CopyOnReadDriver(FilterDriver):
    """Reads with `requests.copy_on_read_into`; everything else passes."""

    name: ClassVar[str] = "copy-on-read"
    options_class: ClassVar[type[DriverOptions]] = CopyOnReadOptions
    supports_reopen: ClassVar[bool] = False

    supports_compressed: ClassVar[bool] = True

    options: CopyOnReadOptions
    _bottom: BlockDriverState | None = None

    async def open(self) -> None:
        """See `Driver`. Raises `NodeNotFound` or `CommandError` for a ``bottom`` that is no layer of the chain."""
        name = self.options.bottom
        if name is None:
            return
        for layer in whole_chain(self.child.node):
            if layer.node_name == name:
                if layer.driver.is_filter:
                    raise CommandError(f"The bottom node '{name}' is a filter; name the layer below it")
                self._bottom = layer
                return
        raise NodeNotFound(name, detail=f"The chain of '{self.child.node.node_name}' has no bottom node")

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        edge = self.child
        if edge.node.read_only:
            await requests.read_into(edge, offset, buffer)
            return
        if self._bottom is None:
            await requests.copy_on_read_into(edge, offset, buffer)
            return
        done = 0
        while done < len(buffer):
            done += await self._read_run(offset + done, buffer[done:])

    async def write_compressed(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        await requests.write_compressed(self.child, offset, buffer)

    async def copy_range(self, offset: int, target: BdrvChild, target_offset: int, length: int) -> None:
        """See `Driver`: a copy inside the storage would leave nothing here, so while copying up it is refused (``ENOTSUP``)."""
        if not self.child.node.read_only:
            raise BlockIOError(errno.ENOTSUP)
        await super().copy_range(offset, target, target_offset, length)

    async def _read_run(self, offset: int, buffer: memoryview) -> int:
        """Read one run of the same kind: with a copy if a layer from the one below the child to the bottom holds it."""
        edge = self.child
        top = skip_filters(edge.node)
        extent = await requests.chain_status(top, offset, len(buffer), base=chain_next(top), want_zero=False)
        piece, copied = buffer[: extent.length], False
        below = chain_next(top)
        if not extent.present and below is not None and self._reaches(below):
            copied, length = await requests.is_allocated_above(
                below, self._bottom, offset, len(piece), include_base=True
            )
            piece = piece[:length]
        if copied:
            await requests.copy_on_read_into(edge, offset, piece)
        else:
            await requests.read_into(edge, offset, piece)
        return len(piece)

    def _reaches(self, layer: BlockDriverState) -> bool:
        """Whether the bottom is still in the chain from ``layer`` down (a job may have made it the child itself)."""
        return any(other is self._bottom for other in backing_chain(layer))

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """See `Driver`: always write-unchanged beside what the parents take, so a read-only child is refused."""
        pair = super().child_permissions(role, perm, shared)
        return PermissionPair(pair.perm | Perm.WRITE_UNCHANGED, pair.shared)
