"""Homes: on which I/O thread nodes live, and how they move with all that they are connected to.

Models what QEMU 7.2 lets and does not let one do with I/O threads (semantics.md section 10.8). All nodes that are connected by
edges, jobs or backends live on one thread. Nodes move together, when a user asks or since they are connected to others; but a
guest device does not move, so what two devices of different threads use cannot be connected. Differs from QEMU in that nobody
runs there (see `iothreads`), and in that homes outlive the object of the thread, where 7.2 crashes at their next use.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from qblock.errors import CommandError
from qblock.iothreads import describe
from qblock.node import BdrvChild, BlockDriverState, EdgeParent

if TYPE_CHECKING:
    from qblock.iothreads import IOThread
    from qblock.transaction import Transaction


def assign(node: BlockDriverState, thread: IOThread | None, change: Transaction) -> None:
    """Move ``node``, and all that it is connected to, to ``thread``; raises `CommandError` when a device is among it."""
    if node.iothread is not thread:
        _move([node], thread, change)


def join(parent: EdgeParent, node: BlockDriverState, change: Transaction, *, instead: BdrvChild | None = None) -> None:
    """Let ``node``, which ``parent`` is about to use, live where its other nodes do: either side may move.

    ``instead``: this edge of the parent will lead to ``node``. Raises `CommandError` when devices keep both sides from moving.
    """
    if isinstance(parent, BlockDriverState) or parent.is_pinned:
        home, beside = parent.iothread, [parent] if isinstance(parent, BlockDriverState) else []
    else:
        beside = [edge.node for edge in parent.child_edges() if edge is not instead]
        if not beside:
            return
        home = beside[0].iothread
    if home is node.iothread:
        return
    try:
        _move([node], home, change, without=instead)
    except CommandError:
        if parent.is_pinned:
            raise
        _move(beside, node.iothread, change, without=instead)


def _move(
    nodes: Iterable[BlockDriverState], thread: IOThread | None, change: Transaction, *, without: BdrvChild | None = None
) -> None:
    """Move ``nodes`` with all that is connected to them, but by the edge ``without``; nothing has moved when this raises."""
    moving = _connected(nodes, thread, without)
    for node in moving:
        change.add(abort=partial(setattr, node, "iothread", node.iothread))
        node.iothread = thread


def _connected(
    nodes: Iterable[BlockDriverState], thread: IOThread | None, without: BdrvChild | None
) -> list[BlockDriverState]:
    found = dict.fromkeys(nodes)
    pending: list[EdgeParent] = list(found)
    users: set[EdgeParent] = set()
    while pending:
        vertex = pending.pop()
        edges = [edge for edge in vertex.child_edges() if edge is not without]
        below = [edge.node for edge in edges if edge.node not in found]
        found.update(dict.fromkeys(below))
        pending += below
        if not isinstance(vertex, BlockDriverState):
            continue
        for edge in vertex.parents:
            parent = edge.parent
            if edge is without or parent in found or parent in users:
                continue
            if parent.is_pinned:
                raise CommandError(
                    f"Node '{vertex.node_name}' cannot move to {describe(thread)}: {parent.describe_user()} uses it on "
                    f"{describe(parent.iothread)}"
                )
            if isinstance(parent, BlockDriverState):
                found[parent] = None
            else:
                users.add(parent)
            pending.append(parent)
    return list(found)
