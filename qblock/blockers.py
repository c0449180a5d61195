"""Operations that a user of a node forbids to others, and by whom.

Models QEMU's op blockers (semantics.md section 8), the coarser sibling of the permissions: a job blocks every operation on
each node that it lists, and a backing node is blocked for all but a few operations by its overlay. Differs from QEMU in
that the latter is read off the backing edge, so it cannot get out of step with the graph.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import attrs

from qblock.permissions import ChildRole

if TYPE_CHECKING:
    from qblock.node import BlockDriverState


class OpType(enum.Enum):
    """The operations that can be blocked."""

    BACKUP_SOURCE = "backup-source"
    BACKUP_TARGET = "backup-target"
    CHANGE = "change"
    COMMIT_SOURCE = "commit-source"
    COMMIT_TARGET = "commit-target"
    DATAPLANE = "dataplane"
    DRIVE_DEL = "drive-del"
    EJECT = "eject"
    EXTERNAL_SNAPSHOT = "external-snapshot"
    INTERNAL_SNAPSHOT = "internal-snapshot"
    INTERNAL_SNAPSHOT_DELETE = "internal-snapshot-delete"
    MIRROR_SOURCE = "mirror-source"
    MIRROR_TARGET = "mirror-target"
    RESIZE = "resize"
    STREAM = "stream"
    REPLACE = "replace"


ALLOWED_ON_BACKING: Final[frozenset[OpType]] = frozenset(
    {OpType.COMMIT_TARGET, OpType.STREAM, OpType.BACKUP_SOURCE, OpType.BACKUP_TARGET}
)
"""What may be done to a node while an overlay uses it as backing."""


@attrs.define(eq=False)
class OpBlocker:
    """All operations but ``exempt`` are blocked on ``node``; ``reason`` tells who holds it."""

    node: BlockDriverState
    reason: str
    exempt: frozenset[OpType]


def block_all(node: BlockDriverState, reason: str, *, except_: Iterable[OpType] = ()) -> OpBlocker:
    """Block every operation on ``node`` but ``except_``; give the result to `unblock` when done."""
    blocker = OpBlocker(node, reason, frozenset(except_))
    node.blockers.append(blocker)
    return blocker


def unblock(blocker: OpBlocker) -> None:
    """Take back one `block_all`."""
    blocker.node.blockers.remove(blocker)


def blocking_reason(node: BlockDriverState, op: OpType) -> str | None:
    """Who forbids ``op`` on ``node``, in words; None when nobody does."""
    for blocker in node.blockers:
        if op not in blocker.exempt:
            return str(blocker.reason)
    if op in ALLOWED_ON_BACKING:
        return None
    for edge in node.parents:
        if edge.role is ChildRole.BACKING:
            return f"{edge.parent.describe_user()} uses it as its backing"
    return None
