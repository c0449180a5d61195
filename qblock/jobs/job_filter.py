"""The base of the filters that jobs put above a node for as long as they work.

Models what QEMU's filters of jobs have in common (semantics.md section 4.8): requests go through them, and at the end they first
stop asking for anything, so that the switch of the nodes around them is not refused on their account.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from qblock.filtering import FilterDriver
from qblock.options import DriverOptions
from qblock.permissions import ChildRole, Perm, PermissionPair
from qblock.transaction import Transaction


class JobFilter(FilterDriver):
    """Forwards everything. A ``retired`` filter needs nothing from its child and shares everything."""

    options_class: ClassVar[type[DriverOptions]] = DriverOptions

    retired: bool = False

    def retire(self, change: Transaction) -> None:
        """Take part in nothing any more; whoever calls has the permissions refreshed."""
        self.retired = True
        change.add(abort=partial(setattr, self, "retired", False))

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """See `Driver`."""
        if self.retired:
            return PermissionPair(Perm.NONE, Perm.ALL)
        return self.at_work(super().child_permissions(role, perm, shared))

    def at_work(self, forwarding: PermissionPair) -> PermissionPair:
        """What the filter needs and shares while its job works, if it would be ``forwarding`` for one that only forwards."""
        return forwarding
