"""The block graph and every way to change it: names, edges, insertion and removal of nodes, permissions.

Models QEMU's node graph (semantics.md sections 2, 7 to 10). The graph knows all nodes by name and all block backends; the
edges live in the nodes. Everything here is ``def``: a change is never interrupted half-way by another task.

How a change works: each step is done at once and registers with a `Transaction` how to undo it, permissions included. A
step that raises may have done a part of its work; abort the transaction then (leaving its ``with`` block by the exception
does). Permissions are recomputed from the touched nodes down in topological order, once per step, or once at the end of
`Graph.deferred_permissions` when the states in between need not be consistent.

Drained sections stay balanced: an edge that comes to a node in *n* sections quiesces its parent *n* times, an edge that
leaves resumes it as often. So at all times a node's ``quiesce_counter`` is the number of sections begun on the node itself
plus the counters of all its children (per edge), whatever was changed or undone while they lasted.

Differs from QEMU in that there is no global list of nodes: one graph belongs to one BlockSystem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final, TypeVar

import attrs

from qblock import blockers, chain, homes
from qblock.blockers import OpBlocker, OpType
from qblock.errors import (
    CommandError,
    DeviceNotFound,
    DuplicateName,
    FrozenLink,
    InvalidParameter,
    NodeBusy,
    NodeNotFound,
    PermissionConflict,
    ReadOnlyNode,
)
from qblock.node import BdrvChild, BlockDriverState, EdgeParent
from qblock.permissions import ANY_WRITE, ChildRole, Perm, PermissionPair, cumulative, find_clash, permission_names

if TYPE_CHECKING:
    from qblock.backend import BlockBackend
    from qblock.transaction import Transaction

__all__ = ["Graph", "OpBlocker", "OpType", "check_identifier", "check_node_name"]

MAX_NODE_NAME: Final = 31
"""Longest node name that a user can give, in characters."""

_NAME_MARKS: Final = "-._"

_Value = TypeVar("_Value")


def check_identifier(name: str, *, parameter: str) -> None:
    """Raise `InvalidParameter` unless ``name`` is a letter followed by letters, digits, ``-``, ``.`` and ``_`` (ASCII)."""
    rest = name[1:]
    if not (name[:1].isalpha() and name.isascii() and all(mark.isalnum() or mark in _NAME_MARKS for mark in rest)):
        raise InvalidParameter(
            parameter, f"cannot be '{name}': it takes a letter, then letters, digits, '-', '.' and '_'"
        )


def check_node_name(name: str) -> None:
    """Raise `InvalidParameter` unless a user may give this name to a node (31 characters at most)."""
    check_identifier(name, parameter="node-name")
    if len(name) > MAX_NODE_NAME:
        raise InvalidParameter("node-name", f"cannot be '{name}': it is longer than {MAX_NODE_NAME} characters")


@attrs.define(eq=False)
class Graph:
    """All nodes and block backends of one BlockSystem. ``random`` supplies the last digits of automatic names."""

    random: Random = attrs.field(factory=Random, repr=False)
    nodes: dict[str, BlockDriverState] = attrs.field(factory=dict, init=False)
    backends: list[BlockBackend] = attrs.field(factory=list, init=False)
    _names_made: int = attrs.field(default=0, init=False)
    _names_reserved: set[str] = attrs.field(factory=set, init=False)
    _deferred: list[BlockDriverState] | None = attrs.field(default=None, init=False)

    # ------------------------------------------------------------------------------------------------------------- names

    def make_name(self) -> str:
        """A new automatic node name: ``#block``, a counter, two random digits; `add_node` accepts it once."""
        name = f"#block{self._names_made}{self.random.randrange(100):02d}"
        self._names_made += 1
        self._names_reserved.add(name)
        return name

    def check_name_is_free(self, name: str, *, kind: str = "node") -> None:
        """Raise `DuplicateName` when a node or a block backend has that name; ``kind`` is what the caller wants to name."""
        if name in self.nodes or any(backend.name == name for backend in self.backends):
            raise DuplicateName(kind, name)

    def add_node(self, node: BlockDriverState, change: Transaction | None = None) -> None:
        """Enter a node under its name; an empty ``node_name`` is replaced by an automatic one.

        Raises `InvalidParameter` and `DuplicateName`.
        """
        name = node.node_name or self.make_name()
        if name in self._names_reserved:
            self._names_reserved.discard(name)
        else:
            check_node_name(name)
        self.check_name_is_free(name)
        node.node_name = name
        self.nodes[name] = node
        if change is not None:
            change.add(abort=partial(self.nodes.pop, name))

    def list_last(self, node: BlockDriverState) -> None:
        """Let ``node`` stand behind all nodes in ``nodes``, as the newest one: as in QEMU one is newer than its own storage."""
        self.nodes[node.node_name] = self.nodes.pop(node.node_name)

    def remove_node(self, node: BlockDriverState, change: Transaction | None = None) -> None:
        """Forget a node that has no parents any more; its own children are the caller's to detach."""
        assert not node.parents, f"{node!r} is still used by {node.parents}"
        assert self.nodes.get(node.node_name) is node, f"{node!r} is not in this graph"
        position = list(self.nodes).index(node.node_name) if change is not None else 0
        del self.nodes[node.node_name]
        if change is not None:
            change.add(abort=partial(_insert, self.nodes, node.node_name, node, position=position))

    def add_backend(self, backend: BlockBackend) -> None:
        """Enter a block backend. An empty name is anonymous; raises `InvalidParameter` and `DuplicateName`."""
        if backend.name:
            check_identifier(backend.name, parameter="id")
            self.check_name_is_free(backend.name, kind="device")
        self.backends.append(backend)

    def remove_backend(self, backend: BlockBackend) -> None:
        """Forget a block backend; its root edge is the owner's to detach."""
        self.backends.remove(backend)

    # ----------------------------------------------------------------------------------------------------------- lookups

    def find_node(self, name: str) -> BlockDriverState:
        """The node of that name; raises `NodeNotFound`."""
        try:
            return self.nodes[name]
        except KeyError:
            raise NodeNotFound(name) from None

    def find_backend(self, name: str) -> BlockBackend:
        """The block backend of that name; raises `DeviceNotFound`."""
        for backend in self.backends:
            if name and backend.name == name:
                return backend
        raise DeviceNotFound(name)

    def lookup(self, name: str) -> BlockDriverState:
        """The node that a command's ``device`` (or ``node``) means: a device's node, otherwise the node of that name.

        A device's implicit filters are not skipped. Raises `NodeNotFound`, or `CommandError` for a device without medium.
        """
        for backend in self.backends:
            if name and backend.name == name:
                if backend.root is None:
                    raise CommandError(f"Device '{name}' has no medium")
                return backend.root.node
        if name not in self.nodes:
            raise NodeNotFound(name, detail="There is neither a device nor a block node named")
        return self.nodes[name]

    def device_name(self, node: BlockDriverState) -> str:
        """The name of the first named block backend whose root is ``node``; empty when there is none."""
        for backend in self.backends:
            if backend.name and backend.root is not None and backend.root.node is node:
                return backend.name
        return ""

    def orphans(self) -> list[BlockDriverState]:
        """Nodes that nothing uses or holds and that the monitor does not own: `opening.close_orphans` closes them."""
        return [node for node in self.nodes.values() if not node.parents and not node.monitor_owned and not node.holders]

    @contextmanager
    def holding(self, nodes: Sequence[BlockDriverState]) -> Iterator[None]:
        """Keep nodes open while the block lasts, whoever lets go of them; raises `NodeNotFound` for one that is closing.

        Those that have no user any more at the end are orphans then.
        """
        for node in nodes:
            if node.closed:
                raise NodeNotFound(node.node_name)
        for node in nodes:
            node.holders += 1
        try:
            yield
        finally:
            for node in nodes:
                node.holders -= 1

    # ------------------------------------------------------------------------------------- chain walks (see chain.py)

    backing_chain = staticmethod(chain.backing_chain)
    whole_chain = staticmethod(chain.whole_chain)
    skip_filters = staticmethod(chain.skip_filters)
    skip_implicit = staticmethod(chain.skip_implicit)
    cow_node = staticmethod(chain.cow_node)
    chain_next = staticmethod(chain.chain_next)
    base_of = staticmethod(chain.base_of)
    find_overlay = staticmethod(chain.find_overlay)
    contains = staticmethod(chain.contains)
    find_backing_image = staticmethod(chain.find_backing_image)
    is_root = staticmethod(chain.is_root)

    # ------------------------------------------------------------------------------ operation blockers (see blockers.py)

    block_all = staticmethod(blockers.block_all)
    unblock = staticmethod(blockers.unblock)

    def check_op(self, node: BlockDriverState, op: OpType) -> None:
        """Raise `NodeBusy` when a user of ``node`` forbids ``op``; names the node's device if it has one."""
        reason = blockers.blocking_reason(node, op)
        if reason is not None:
            raise NodeBusy(self.device_name(node) or node.node_name, reason)

    # ------------------------------------------------------------------------------------------------------------- edges

    def attach(
        self,
        parent: EdgeParent,
        node: BlockDriverState,
        *,
        name: str,
        role: ChildRole,
        change: Transaction,
        perm: Perm = Perm.NONE,
        shared: Perm = Perm.ALL,
    ) -> BdrvChild:
        """Make ``node`` the child of ``parent`` called ``name``.

        ``perm`` and ``shared`` are for backends and jobs; what a node takes from its child is for its driver to say.
        Raises `CommandError` (loop, name of the child taken), `PermissionConflict`, `ReadOnlyNode`, and `NodeNotFound` when
        ``node`` was closed since the caller has looked it up.
        """
        if node.closed:
            raise NodeNotFound(node.node_name)
        if isinstance(parent, BlockDriverState):
            if name in parent.children:
                raise CommandError(f"Node '{parent.node_name}' has a child '{name}' already")
            _refuse_cycle(parent, node, name)
            perm, shared = _child_pair(parent, role)
        homes.join(parent, node, change)
        edge = BdrvChild(name, role, node, parent)
        _store_pair(edge, PermissionPair(perm, shared))
        _link(edge)
        change.add(abort=partial(_unlink, edge))
        self.refresh_permissions([node], change)
        return edge

    def detach(self, edge: BdrvChild, change: Transaction) -> None:
        """Remove an edge; raises `FrozenLink`. The node below stays in the graph, even when nothing uses it any more."""
        _refuse_frozen(edge)
        index, position = _unlink(edge)
        change.add(abort=partial(_link, edge, index=index, position=position))
        self.refresh_permissions([edge.node], change)

    def replace_child(self, edge: BdrvChild, node: BlockDriverState, change: Transaction) -> None:
        """Point an edge to another node; raises `FrozenLink`, `CommandError` (loop), `PermissionConflict`."""
        _refuse_frozen(edge)
        if isinstance(edge.parent, BlockDriverState):
            _refuse_cycle(edge.parent, node, edge.name)
        old = edge.node
        homes.join(edge.parent, node, change, instead=edge)
        _move(edge, node, change)
        self.refresh_permissions([old, node], change)

    def set_edge_permissions(self, edge: BdrvChild, perm: Perm, shared: Perm, change: Transaction) -> None:
        """Change what a backend or a job takes and shares; raises `PermissionConflict` and `ReadOnlyNode`."""
        change.add(abort=partial(_store_pair, edge, PermissionPair(edge.perm, edge.shared)))
        _store_pair(edge, PermissionPair(perm, shared))
        self.refresh_permissions([edge.node], change)

    def replace_node(
        self,
        old: BlockDriverState,
        new: BlockDriverState,
        change: Transaction,
        *,
        only: Callable[[BdrvChild], bool] = lambda edge: True,
    ) -> None:
        """Move the parents of ``old`` (those for which ``only`` is true) to ``new``.

        Edges of jobs stay, they mean this very node; so do edges whose parent is ``new`` or below it, which would make
        a loop (that is how a filter is inserted above a node). Raises `FrozenLink`, `PermissionConflict`.
        """
        movable = [edge for edge in old.parents if edge.role is not ChildRole.JOB and edge.parent is not new]
        if any(isinstance(edge.parent, BlockDriverState) for edge in movable):
            below = chain.descendants(new)
            movable = [edge for edge in movable if edge.parent not in below]
        moving = [edge for edge in movable if only(edge)]
        for edge in moving:
            _refuse_frozen(edge)
        for edge in moving:
            homes.join(edge.parent, new, change, instead=edge)
            _move(edge, new, change)
        self.refresh_permissions([old, new], change)

    # ------------------------------------------------------------------------------------------- insertion and removal

    def append(
        self, overlay: BlockDriverState, *, onto: BlockDriverState, change: Transaction, name: str | None = None
    ) -> None:
        """Put ``overlay`` on top of ``onto``: its parents move to ``overlay``, whose child it becomes.

        The child is the filtered one (called ``file`` unless ``name`` says otherwise) when ``overlay`` is a filter, else
        the backing. Dirty bitmaps and blockers stay where they are. Raises as `attach` and `replace_node`.
        """
        is_filter = overlay.driver.is_filter
        role = ChildRole.FILTERED if is_filter else ChildRole.BACKING
        if not is_filter:
            _refuse_without_backing_support(overlay)
        with self.deferred_permissions(change):
            self.attach(overlay, onto, name=name or ("file" if is_filter else "backing"), role=role, change=change)
            self.replace_node(onto, overlay, change)

    def drop(self, filter_node: BlockDriverState, change: Transaction) -> None:
        """Take a filter out: its parents move to its filtered child, and it lets go of that child. It is not to be used again;
        `opening.close_orphans` closes it.
        """
        edge = filter_node.filtered
        assert edge is not None, f"{filter_node!r} is not a filter with a child"
        change.add(commit=partial(setattr, filter_node, "closed", True))
        with self.deferred_permissions(change):
            self.replace_node(filter_node, edge.node, change)
            self.detach(edge, change)

    def set_backing(self, node: BlockDriverState, backing: BlockDriverState | None, change: Transaction) -> None:
        """Give ``node`` another backing node, or none; raises `FrozenLink`, `CommandError`, `PermissionConflict`."""
        edge = node.backing
        if edge is None:
            if backing is not None:
                _refuse_without_backing_support(node)
                self.attach(node, backing, name="backing", role=ChildRole.BACKING, change=change)
        elif backing is None:
            self.detach(edge, change)
        elif backing is not edge.node:
            self.replace_child(edge, backing, change)

    def freeze_chain(self, top: BlockDriverState, base: BlockDriverState | None) -> None:
        """Forbid changes of the links from ``top`` down to ``base`` (None: to the end), all or none; raises `FrozenLink`."""
        edges = chain.chain_edges(top, base)
        for edge in edges:
            _refuse_frozen(edge)
        for edge in edges:
            edge.frozen = True

    def unfreeze_chain(self, top: BlockDriverState, base: BlockDriverState | None) -> None:
        """Allow again what one `freeze_chain` with the same ends has forbidden."""
        for edge in chain.chain_edges(top, base):
            assert edge.frozen, f"{edge!r} is not frozen"
            edge.frozen = False

    # ------------------------------------------------------------------------------------------------------- permissions

    @contextmanager
    def deferred_permissions(self, change: Transaction) -> Iterator[None]:
        """Check permissions once, at the end of the block, for all steps in it; the steps belong to ``change``.

        There must be no await in the block. May be nested; the outermost one checks.
        """
        if self._deferred is not None:
            yield
            return
        touched: list[BlockDriverState] = []
        self._deferred = touched
        try:
            yield
        finally:
            self._deferred = None
        self.refresh_permissions(touched, change)

    def refresh_permissions(self, nodes: Iterable[BlockDriverState], change: Transaction) -> None:
        """Recompute permissions from ``nodes`` down; call it also after changing ``read_only`` of a node.

        Each touched node's driver may refuse (file locks). Raises `PermissionConflict`, `ReadOnlyNode`. Work is linear in
        the number of edges below ``nodes``, and stops at once where nothing changes.
        """
        if self._deferred is not None:
            self._deferred.extend(nodes)
            return
        touched = dict.fromkeys(nodes)
        if any(_needs_refresh(node) for node in touched):
            for node in chain.in_order(touched, chain.children_of):
                if node in touched:
                    touched.update(dict.fromkeys(_refresh_node(node, change)))


# ----------------------------------------------------------------------------------------------------- single edge steps


def _insert(mapping: dict[str, _Value], key: str, value: _Value, *, position: int) -> None:
    """Put an item into a dict so that it stands at ``position`` in the order of the keys."""
    items = list(mapping.items())
    items.insert(position, (key, value))
    mapping.clear()
    mapping.update(items)


def _link(edge: BdrvChild, *, index: int | None = None, position: int | None = None) -> None:
    """Enter an edge at both ends; ``index`` and ``position`` are where it stood before, when that is to be restored."""
    node, parent = edge.node, edge.parent
    node.parents.insert(len(node.parents) if index is None else index, edge)
    if isinstance(parent, BlockDriverState):
        _insert(parent.children, edge.name, edge, position=len(parent.children) if position is None else position)
    _quiesce_parent(edge, times=node.quiesce_counter)


def _unlink(edge: BdrvChild) -> tuple[int, int]:
    """Take an edge out at both ends; the result is where it stood, for `_link`."""
    node, parent = edge.node, edge.parent
    index = node.parents.index(edge)
    del node.parents[index]
    position = 0
    if isinstance(parent, BlockDriverState):
        position = list(parent.children).index(edge.name)
        del parent.children[edge.name]
    _resume_parent(edge, times=node.quiesce_counter)
    node.wake_idle_waiters()
    return index, position


def _move(edge: BdrvChild, node: BlockDriverState, change: Transaction) -> None:
    """Point an edge to another node, undoably."""
    old = edge.node
    index = old.parents.index(edge)
    _repoint(edge, node)
    change.add(abort=partial(_repoint, edge, old, index=index))


def _repoint(edge: BdrvChild, node: BlockDriverState, *, index: int | None = None) -> None:
    old = edge.node
    old.parents.remove(edge)
    edge.node = node
    node.parents.insert(len(node.parents) if index is None else index, edge)
    # Quiesced by the new node before the old one resumes: a parent drained by both must not run in between.
    _quiesce_parent(edge, times=node.quiesce_counter)
    _resume_parent(edge, times=old.quiesce_counter)
    old.wake_idle_waiters()


def _quiesce_parent(edge: BdrvChild, *, times: int) -> None:
    for _ in range(times):
        edge.parent.quiesce()


def _resume_parent(edge: BdrvChild, *, times: int) -> None:
    for _ in range(times):
        edge.parent.resume()


def _refuse_frozen(edge: BdrvChild) -> None:
    if edge.frozen:
        raise FrozenLink(name=edge.name, parent=edge.parent.describe_user(), child=edge.node.node_name)


def _refuse_cycle(parent: BlockDriverState, node: BlockDriverState, name: str) -> None:
    """Raise when ``parent`` can be reached from ``node``. Looks upwards, which costs nothing for a node just opened."""
    seen: set[BlockDriverState] = {parent}
    pending = [parent]
    while pending:
        current = pending.pop()
        if current is node:
            raise CommandError(
                f"Making '{node.node_name}' the '{name}' child of '{parent.node_name}' would create a cycle"
            )
        for edge in current.parents:
            if isinstance(edge.parent, BlockDriverState) and edge.parent not in seen:
                seen.add(edge.parent)
                pending.append(edge.parent)


def _refuse_without_backing_support(node: BlockDriverState) -> None:
    if not node.driver.supports_backing:
        raise CommandError(f"Node '{node.node_name}' cannot have a backing node: {node.driver.name} has no such link")


# ------------------------------------------------------------------------------------------------- permissions per node


def _store_pair(edge: BdrvChild, pair: PermissionPair) -> None:
    edge.perm, edge.shared = pair
    edge.may_write = bool(pair.perm & ANY_WRITE)
    edge.may_resize = Perm.RESIZE in pair.perm


def _child_pair(node: BlockDriverState, role: ChildRole) -> PermissionPair:
    """What ``node`` takes and shares on a child, given its present cumulative permissions."""
    perm, shared = node.driver.child_permissions(role, node.perm, node.shared)
    return PermissionPair(perm, Perm.ALL if node.force_share else shared)


def _needs_refresh(node: BlockDriverState) -> bool:
    """Whether `_refresh_node` would change or refuse anything."""
    pair = cumulative(node.parents)
    return (
        pair != (node.perm, node.shared)
        or (node.read_only and bool(pair.perm & ANY_WRITE))
        or find_clash(node.parents) is not None
        or any(_child_pair(node, edge.role) != (edge.perm, edge.shared) for edge in node.children.values())
    )


def _refresh_node(node: BlockDriverState, change: Transaction) -> list[BlockDriverState]:
    """Recompute one node and its edges to children; the result are the children that take part in the change."""
    _check_sharing(node)
    pair = cumulative(node.parents)
    if pair != (node.perm, node.shared):
        change.add(abort=partial(_store_cumulative, node, PermissionPair(node.perm, node.shared)))
        _store_cumulative(node, pair)
        node.driver.check_permissions(*pair)
        change.add(commit=partial(_settle, node), abort=node.driver.abort_permissions)
    changed = []
    for edge in node.children.values():
        before, after = PermissionPair(edge.perm, edge.shared), _child_pair(node, edge.role)
        if before != after:
            change.add(abort=partial(_store_pair, edge, before))
            _store_pair(edge, after)
            changed.append(edge.node)
    return changed


def _check_sharing(node: BlockDriverState) -> None:
    """Raise when the parents of ``node`` exclude each other, or want to write to a read-only node."""
    clash = find_clash(node.parents)
    if clash is not None:
        raise PermissionConflict(
            node=node.node_name,
            user=clash.user.parent.describe_user(),
            holder=clash.holder.parent.describe_user(),
            permissions=", ".join(permission_names(clash.perm)),
            user_child=clash.user.name,
            holder_child=clash.holder.name,
        )
    if node.read_only:
        for edge in node.parents:
            if edge.may_write:
                wanted = ", ".join(permission_names(edge.perm & ANY_WRITE))
                raise ReadOnlyNode(node=node.node_name, user=edge.parent.describe_user(), permissions=wanted)


def _store_cumulative(node: BlockDriverState, pair: PermissionPair) -> None:
    node.perm, node.shared = pair


def _settle(node: BlockDriverState) -> None:
    """Tell the driver that the change is final; the permissions are those at the end of the whole transaction."""
    node.driver.set_permissions(node.perm, node.shared)
