"""Who may do what to a node: permission flags, the table of what parents need, and conflicts that explain themselves.

Models QEMU's cumulative permissions (semantics.md sections 4.8 and 9). Each edge of the block graph *takes* a set of
permissions on the node below it and *shares* a set with everybody else. A node's cumulative permissions are the union of
what its parents take and the intersection of what they share; from these, by the role of each child, follows what the node
takes and shares one level further down. Two parents conflict when one takes what another does not share, and a change of
the graph is refused before it makes a conflict. The rules by role, as the real program shows them in its graph dump:

================  ==========================================================  ==========================================
role              takes                                                       shares
================  ==========================================================  ==========================================
filtered,         what the node's own parents take                            what the node's own parents share
primary data
storage           the same; also consistent-read always, and write and       the same without write and resize
                  resize while the node is writable
metadata          like storage                                                like storage
data              the same as its parents; write and resize come with any     the same without resize
                  write
backing           consistent-read when its parents take it                    consistent-read and write-unchanged always;
                                                                              write and resize when its parents share write
================  ==========================================================  ==========================================

Differs from QEMU in that images are never inactive (there is no migration), so no rule is suspended for that.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from qblock.driver import Driver
    from qblock.node import BdrvChild


class Perm(enum.Flag):
    """The four permissions; their bit numbers are also the byte numbers of file locks (image-locking.md)."""

    NONE = 0
    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8
    ALL = 15


SINGLE_PERMISSIONS: Final[tuple[Perm, ...]] = (
    Perm.CONSISTENT_READ,
    Perm.WRITE,
    Perm.WRITE_UNCHANGED,
    Perm.RESIZE,
)
"""The permissions one by one, in the order of their bits."""

PERMISSION_NAMES: Final[Mapping[Perm, str]] = {
    Perm.CONSISTENT_READ: "consistent-read",
    Perm.WRITE: "write",
    Perm.WRITE_UNCHANGED: "write-unchanged",
    Perm.RESIZE: "resize",
}
"""The wire names, as in QMP's ``BlockPermission``."""

ANY_WRITE: Final[Perm] = Perm.WRITE | Perm.WRITE_UNCHANGED
"""What a read-only node cannot give; either of them lets an edge carry writes."""

_WRITE_AND_RESIZE: Final = Perm.WRITE | Perm.RESIZE
_ALWAYS_SHARED_BACKING: Final = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED


def permission_names(perm: Perm) -> list[str]:
    """The wire names of the permissions in ``perm``, in the order of their bits."""
    return [PERMISSION_NAMES[single] for single in SINGLE_PERMISSIONS if single in perm]


class PermissionPair(NamedTuple):
    """What is taken, and what others may take."""

    perm: Perm
    shared: Perm


class ChildRole(enum.Enum):
    """What a parent uses a child for."""

    STORAGE = "storage"  # data and metadata of a format (``file``)
    PRIMARY_DATA = "primary data"  # raw over file: data only
    METADATA = "metadata"  # qcow2's file when the data lie in an external file
    DATA = "data"  # pure data: an external data file, a quorum member
    BACKING = "backing"
    FILTERED = "filtered"
    ROOT = "root"  # a block backend's edge
    JOB = "job"  # a job's edge


# ------------------------------------------------------------------------------------------------- the rules by role


def _pass_through(perm: Perm, shared: Perm, *, writable: bool) -> PermissionPair:
    return PermissionPair(perm, shared)


def _storage(perm: Perm, shared: Perm, *, writable: bool) -> PermissionPair:
    own = Perm.CONSISTENT_READ | (_WRITE_AND_RESIZE if writable else Perm.NONE)
    return PermissionPair(perm | own, shared & ~_WRITE_AND_RESIZE)


def _data(perm: Perm, shared: Perm, *, writable: bool) -> PermissionPair:
    if perm & ANY_WRITE:
        perm |= _WRITE_AND_RESIZE
    return PermissionPair(perm, shared & ~Perm.RESIZE)


def _backing(perm: Perm, shared: Perm, *, writable: bool) -> PermissionPair:
    # A writer below would show through wherever this node has no data of its own, so its parents decide.
    writers = _WRITE_AND_RESIZE if Perm.WRITE in shared else Perm.NONE
    return PermissionPair(perm & Perm.CONSISTENT_READ, _ALWAYS_SHARED_BACKING | writers)


_RULES: Final[Mapping[ChildRole, Callable[..., PermissionPair]]] = {
    ChildRole.STORAGE: _storage,
    ChildRole.PRIMARY_DATA: _pass_through,
    ChildRole.METADATA: _storage,
    ChildRole.DATA: _data,
    ChildRole.BACKING: _backing,
    ChildRole.FILTERED: _pass_through,
}


def default_child_permissions(driver: Driver, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
    """What ``driver``'s node takes and shares on a child of that ``role``, by the table at the head of this module.

    ``perm`` and ``shared`` are the cumulative permissions of the node's own parents. Only the roles that a node can give
    to its children have a rule; the edges of backends and jobs carry what their owners ask for.
    """
    return _RULES[role](perm, shared, writable=not driver.node.read_only)


# ---------------------------------------------------------------------------------------- what all parents together do


def cumulative(edges: Sequence[BdrvChild]) -> PermissionPair:
    """The union of what ``edges`` take and the intersection of what they share (nothing and all when there are none)."""
    perm, shared = Perm.NONE, Perm.ALL
    for edge in edges:
        perm |= edge.perm
        shared &= edge.shared
    return PermissionPair(perm, shared)


class Clash(NamedTuple):
    """Two edges to one node that exclude each other: ``user`` takes ``perm``, which ``holder`` does not share."""

    user: BdrvChild
    holder: BdrvChild
    perm: Perm


def find_clash(edges: Sequence[BdrvChild]) -> Clash | None:
    """The first two of ``edges`` (all to the same node) that exclude each other, or None; linear in their number."""
    for single in SINGLE_PERMISSIONS:
        users = [edge for edge in edges if single in edge.perm]
        if not users:
            continue
        holders = [edge for edge in edges if single not in edge.shared]
        pair = _two_different(users, holders)
        if pair is not None:
            user, holder = pair
            return Clash(user, holder, user.perm & ~holder.shared)
    return None


def _two_different(users: list[BdrvChild], holders: list[BdrvChild]) -> tuple[BdrvChild, BdrvChild] | None:
    """One of each that are not the same edge: an edge does not exclude itself."""
    for user in users[:2]:
        for holder in holders[:2]:
            if user is not holder:
                return user, holder
    return None
