"""Drained sections: nothing new is started on a node, and what was under way has ended.

Models QEMU's ``bdrv_drained_begin``/``end``. A section on a node quiesces everything that is above it (nodes pass it on,
backends queue new requests, jobs stop at their next pause point) and then waits until none of these is busy. Requests that
are under way go on meanwhile, down through the nodes; only their sources have dried up.

Waiting is without polling. Who waits puts one future into ``idle_waiters`` of the drained node *and of every node above
it*; whoever becomes idle says so with `kick` on its own node (requests do it in line: ``if not node.in_flight and
node.idle_waiters``), which wakes the waiters, and these look again. So the news reaches drained nodes below without a walk
on the request path. An edge that leaves a node wakes its waiters too (`graph.py`), for the busy one may be gone with it; one
that comes need not: the waiter looks again, and finds it, when what it waits for now has ended.

Differs from QEMU in that a section does not make the nodes *below* quiesce: these have no requests of their own. And who waits
lets requests go on that blkdebug holds at breakpoints, for which QEMU would wait for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qblock.chain import children_of, in_order
from qblock.driver import SupportsBreakpoints
from qblock.node import BlockDriverState

if TYPE_CHECKING:
    from qblock.graph import Graph


def enter(node: BlockDriverState) -> None:
    """One more request is inside ``node``."""
    node.in_flight += 1


def leave(node: BlockDriverState) -> None:
    """A request has left ``node``; the last one wakes who waits for that."""
    assert node.in_flight > 0, f"{node!r} has no request in flight"
    node.in_flight -= 1
    if not node.in_flight and node.idle_waiters:
        node.wake_idle_waiters()


def wake(node: BlockDriverState) -> None:
    """Wake who waits for ``node`` or for a node below it; they look for themselves whether it is idle."""
    node.wake_idle_waiters()


def kick(node: BlockDriverState) -> None:
    """Something that uses ``node`` (a backend, a job, a request) has become idle: who drains it or a node below looks again.

    A job says so on every node that it has an edge to.
    """
    if node.idle_waiters:
        node.wake_idle_waiters()


async def wait_idle(*nodes: BlockDriverState) -> None:
    """Wait until no request is in any of ``nodes`` nor in anything above them; on return that is still so.

    Without a drained section new requests may keep it from ending.
    """
    while is_busy(nodes):
        watched = _from_below(nodes)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for keeper in _keepers(watched):
            keeper.breakpoints.resume_all()
            keeper.breakpoints.listen(waiter)
        for watch in watched:
            watch.idle_waiters.append(waiter)
        try:
            await waiter
        finally:
            for watch in watched:
                if waiter in watch.idle_waiters:
                    watch.idle_waiters.remove(waiter)


def is_busy(nodes: Iterable[BlockDriverState]) -> bool:
    """Whether a request is in one of ``nodes`` or in anything above them."""
    return any(
        node.in_flight or any(not isinstance(edge.parent, BlockDriverState) and edge.parent.is_busy() for edge in node.parents)
        for node in _from_below(nodes)
    )


def may_hold(node: BlockDriverState) -> bool:
    """Whether a breakpoint of ``node`` may hold requests: nobody waits for those of a node that they may have come through."""
    return not any(above.quiesce_counter or above.closed for above in _from_below((node,)))


def _keepers(nodes: Iterable[BlockDriverState]) -> list[SupportsBreakpoints]:
    """Where requests may be held for which ``nodes`` and their users are busy: below these nodes, and wherever the users go."""
    users = {edge.parent for node in nodes for edge in node.parents}
    starts = [*nodes, *(edge.node for user in users for edge in user.child_edges())]
    return [node.driver for node in in_order(starts, children_of) if isinstance(node.driver, SupportsBreakpoints)]


def _from_below(nodes: Iterable[BlockDriverState]) -> list[BlockDriverState]:
    """``nodes`` and all nodes above them, each once, children before their parents."""
    return in_order(
        nodes, lambda node: [edge.parent for edge in node.parents if isinstance(edge.parent, BlockDriverState)]
    )


def _sections(nodes: Sequence[BlockDriverState]) -> dict[BlockDriverState, int]:
    """In how many more sections each node is when one begins on each of ``nodes``; children before their parents.

    A section counts once for each way up, as if every node passed it on by itself; but this is one walk, however many nodes.
    """
    counts = dict.fromkeys(_from_below(nodes), 0)
    for node in nodes:
        counts[node] += 1
    for node, count in counts.items():
        for edge in node.parents:
            if isinstance(edge.parent, BlockDriverState):
                counts[edge.parent] += count
    return counts


def quiesce(nodes: Sequence[BlockDriverState]) -> None:
    """Begin a section on each of ``nodes``, without waiting; `resume` ends it."""
    for node, count in _sections(nodes).items():
        node.enter_sections(count)
        for edge in node.parents:
            if not isinstance(edge.parent, BlockDriverState):
                for _ in range(count):
                    edge.parent.quiesce()


def resume(nodes: Sequence[BlockDriverState]) -> None:
    """End the section on each of ``nodes``, whatever their edges are now."""
    for node, count in _sections(nodes).items():
        node.leave_sections(count)
        for edge in node.parents:
            if not isinstance(edge.parent, BlockDriverState):
                for _ in range(count):
                    edge.parent.resume()


async def drained_begin(nodes: Iterable[BlockDriverState]) -> None:
    """Begin a section on each of ``nodes`` and wait until all are idle; when this raises, no section has begun."""
    begun = tuple(nodes)
    quiesce(begun)
    try:
        await wait_idle(*begun)
    except BaseException:
        resume(begun)
        raise


def drained_end(nodes: Iterable[BlockDriverState]) -> None:
    """End the section on each of ``nodes``: the same ones as were given to `drained_begin`, whatever their edges now."""
    resume(tuple(nodes))


@asynccontextmanager
async def drained(*nodes: BlockDriverState) -> AsyncIterator[None]:
    """A drained section on all of ``nodes`` around the block; sections may be nested and may overlap."""
    await drained_begin(nodes)
    try:
        yield
    finally:
        drained_end(nodes)


async def pause_above(node: BlockDriverState, *, times: int) -> None:
    """Have ``times`` drained sections on ``node``, one after the other, in which nothing is done: QEMU makes some changes of the
    graph in more steps than we do, and jobs above show every section as a pause.
    """
    for _ in range(times):
        async with drained(node):
            pass


@asynccontextmanager
async def drained_all(graph: Graph) -> AsyncIterator[None]:
    """A drained section on all nodes that ``graph`` has at the start of the block; jobs show it oldest first, as in QEMU."""
    async with drained(*reversed(graph.nodes.values())):
        yield


async def drain_all(graph: Graph) -> None:
    """Wait until no request is anywhere in ``graph``; new ones may start right afterwards."""
    async with drained_all(graph):
        pass
