"""The filter that a stream job puts above its device while it copies data up.

Models the implicit ``copy-on-read`` node of ``block-stream`` (semantics.md sections 4.1 and 4.8). It takes *write unchanged*
on the device, so that the job may populate it, and forwards everything. Differs from QEMU in that a guest's own reads are
not copied up on the way: the job gets there anyway.
"""

from __future__ import annotations

from typing import ClassVar

from qblock.filtering import FilterDriver
from qblock.options import DriverOptions
from qblock.permissions import ChildRole, Perm, PermissionPair


class StreamTop(FilterDriver):
    """See the module. A ``retired`` filter needs nothing from its child."""

    name: ClassVar[str] = "copy-on-read"
    options_class: ClassVar[type[DriverOptions]] = DriverOptions

    retired: bool = False

    def length(self) -> int:
        """See `Driver`: the device's; what it was last, once the filter is taken out."""
        return self.node.length if self.node.filtered is None else super().length()

    async def flush(self) -> None:
        """See `Driver`: nothing to do once the filter is taken out."""
        if self.node.filtered is not None:
            await super().flush()

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """Passes the needs of its parents on, and adds the job's own."""
        if self.retired:
            return PermissionPair(Perm.NONE, Perm.ALL)
        needs, shares = super().child_permissions(role, perm, shared)
        return PermissionPair(needs | Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED, shares)
