"""What a mirror job is to do: values that the starting command (`mirror.py`) checks and completes, and the job reads.

Models the arguments of QEMU's mirror job (semantics.md section 4.4).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import attrs

from qblock.jobs.state import OnError
from qblock.units import align_down

if TYPE_CHECKING:
    from qblock.node import BlockDriverState
    from qblock.status import ChainExtent


class BackingAtEnd(enum.Enum):
    """What backing node the target gets when the job is finished."""

    KEEP = "keep"  # whatever it has: blockdev-mirror
    SOURCE_CHAIN = "source chain"  # a node of the source's chain: drive-mirror to a new image
    HEADER = "header"  # the one that its header names: drive-mirror to an existing image


class Method(enum.Enum):
    """How a part of the source gets to the target."""

    COPY = "copy"
    ZERO = "zero"
    DISCARD = "discard"
    """Nobody holds anything there, and what is read is undefined."""


@attrs.frozen(kw_only=True)
class MirrorPlan:
    """What to mirror, as checked and completed by the starting command.

    ``scan`` is False when only new writes are copied (sync none); ``base`` is the first layer that is not copied (None:
    everything is). ``unit`` is the size in bytes that target requests are widened to (1: none are).
    """

    scan: bool
    base: BlockDriverState | None
    granularity: int
    buf_size: int
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    unmap: bool = True
    write_blocking: bool = False
    semi_sync: bool = False
    zero_target: bool = False
    unit: int = 1
    backing_at_end: BackingAtEnd = BackingAtEnd.KEEP
    backing_node: BlockDriverState | None = None
    replaces: str | None = None

    def next_request(
        self, extent: ChainExtent, offset: int, *, piece: int, target_cluster: int
    ) -> tuple[int, Method]:
        """How many bytes from ``offset`` on one request is to take, and how. ``extent`` is what the source has there.

        As in QEMU granules are copied whole: one that holds anything is copied, and so is what would be zero in only a part
        of a cluster of the target (``target_cluster`` bytes, 0 if it has none). Copies take ``piece`` bytes at most.
        """
        begun = offset % self.granularity
        whole = align_down(extent.length, self.granularity)
        if begun or not whole:
            return min(self.granularity - begun, piece), Method.COPY
        if extent.data or (target_cluster and (offset % target_cluster or whole % target_cluster)):
            return min(whole, piece), Method.COPY
        return whole, Method.ZERO if extent.zero else Method.DISCARD
