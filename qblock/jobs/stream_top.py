"""The filter that a stream job puts above its device while it copies data up.

Models the implicit ``copy-on-read`` node of ``block-stream`` (semantics.md sections 4.1 and 4.8). It takes *write unchanged*
on the device, so that the job may populate it, and forwards everything. Differs from QEMU in that a guest's own reads are
not copied up on the way: the job gets there anyway.
"""

from __future__ import annotations

from typing import ClassVar

from qblock.jobs.job_filter import JobFilter
from qblock.permissions import Perm, PermissionPair


class StreamTop(JobFilter):
    """See the module."""

    name: ClassVar[str] = "copy-on-read"

    def at_work(self, forwarding: PermissionPair) -> PermissionPair:
        """See `JobFilter`: adds what the job needs."""
        return PermissionPair(forwarding.perm | Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED, forwarding.shared)
