"""The filter that a commit job puts above the topmost image that it commits.

Models ``commit_top`` (semantics.md sections 4.2 and 4.8): reads go through it, and it asks for nothing and shares everything,
so that the job may write to what lies far below although the users above do not allow writers. What they see stays the same:
the layers between hold all that the job writes.
"""

from __future__ import annotations

from typing import ClassVar

from qblock.jobs.job_filter import JobFilter
from qblock.permissions import Perm, PermissionPair


class CommitTop(JobFilter):
    """See the module."""

    name: ClassVar[str] = "commit_top"

    def at_work(self, forwarding: PermissionPair) -> PermissionPair:
        """See the module."""
        del forwarding
        return PermissionPair(Perm.NONE, Perm.ALL)
