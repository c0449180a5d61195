"""The filter that a commit job puts above the topmost image that it commits.

Models ``commit_top`` (semantics.md sections 4.2 and 4.8): reads go through it, and it asks for nothing and shares everything,
so that the job may write to what lies far below although the users above do not allow writers. What they see stays the same:
the layers between hold all that the job writes.
"""

from __future__ import annotations

from typing import ClassVar

from qblock.filtering import FilterDriver
from qblock.options import DriverOptions
from qblock.permissions import ChildRole, Perm, PermissionPair


class CommitTop(FilterDriver):
    """See the module."""

    name: ClassVar[str] = "commit_top"
    options_class: ClassVar[type[DriverOptions]] = DriverOptions

    def length(self) -> int:
        """See `Driver`: the image's; what it was last, once the filter is taken out."""
        return self.node.length if self.node.filtered is None else super().length()

    async def flush(self) -> None:
        """See `Driver`: nothing to do once the filter is taken out."""
        if self.node.filtered is not None:
            await super().flush()

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """See the module."""
        return PermissionPair(Perm.NONE, Perm.ALL)
