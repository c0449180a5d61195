"""Drained sections: what is under way ends, nothing new starts, and nobody is left waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qblock.drain import (
    drain_all,
    drained,
    drained_all,
    drained_begin,
    drained_end,
    enter,
    kick,
    leave,
    wait_idle,
    wake,
)
from qblock.graph import Graph
from qblock.node import BdrvChild, BlockDriverState
from qblock.permissions import ChildRole, Perm
from qblock.testing.graphs import CountingUser, PassiveDriver, PassiveFilter, assert_consistent, passive_node
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import Deadlock, every_schedule, run
from qblock.transaction import Transaction


class Source:
    """A user that sends requests down its edge: they wait while it is quiesced, and are in flight while they run."""

    def __init__(self, graph: Graph, node: BlockDriverState, name: str = "s") -> None:
        self.name = name
        self.sections = 0
        self.in_flight = 0
        self.done = 0
        self.resumed = asyncio.Event()
        self.resumed.set()
        with Transaction() as change:
            self.edge: BdrvChild = graph.attach(
                self, node, name="root", role=ChildRole.ROOT, perm=Perm.CONSISTENT_READ, change=change
            )

    iothread = None
    is_pinned = False

    def child_edges(self) -> Iterable[BdrvChild]:
        return ()

    def describe_user(self) -> str:
        return f"source '{self.name}'"

    def quiesce(self) -> None:
        self.sections += 1
        self.resumed.clear()

    def resume(self) -> None:
        self.sections -= 1
        if not self.sections:
            self.resumed.set()

    def is_busy(self) -> bool:
        return self.in_flight > 0

    def below(self) -> list[BdrvChild]:
        return [self.edge]

    async def request(self, steps: int = 2) -> None:
        while self.sections:
            await self.resumed.wait()
        self.in_flight += 1
        try:
            await descend(self.edge.node, steps)
            self.done += 1
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                kick(self.edge.node)


async def descend(node: BlockDriverState, steps: int) -> None:
    """A request inside ``node``, which takes some steps here and as many in each of its children."""
    enter(node)
    try:
        for _ in range(steps):
            await asyncio.sleep(0)
        for edge in list(node.children.values()):
            await descend(edge.node, steps)
    finally:
        leave(node)


def stacked(graph: Graph, *names: str) -> list[BlockDriverState]:
    """Filters on top of one protocol node, the first name on top."""
    nodes = [passive_node(graph, name, PassiveFilter) for name in names[:-1]]
    nodes.append(passive_node(graph, names[-1], PassiveDriver))
    with Transaction() as change:
        for above, below in pairwise(nodes):
            graph.attach(above, below, name="file", role=ChildRole.FILTERED, change=change)
    return nodes


async def let_others_run() -> None:
    """Enough steps for every other task to reach its next real wait, in whichever order they are taken."""
    for _ in range(5):
        await asyncio.sleep(0)


def all_orders(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run ``main`` under every order of task steps; `Deadlock` in any of them fails."""
    assert every_schedule(main)


def test_an_idle_node_is_drained_without_suspending() -> None:
    """The common case of a graph change costs nothing."""
    graph = Graph()
    top, bottom = stacked(graph, "t", "b")
    user = CountingUser("d")
    with Transaction() as change:
        graph.attach(user, top, name="root", role=ChildRole.ROOT, change=change)
    begin = drained_begin([bottom])
    with pytest.raises(StopIteration):
        begin.send(None)
    assert user.sections == 1 and top.quiesce_counter == bottom.quiesce_counter == 1
    drained_end([bottom])
    assert user.sections == 0 and top.quiesce_counter == bottom.quiesce_counter == 0


def test_a_section_waits_for_what_is_under_way_and_lets_nothing_start() -> None:
    """Under every order of steps: in the section nothing is in flight, and all requests are served in the end."""

    async def main() -> None:
        graph = Graph()
        top, bottom = stacked(graph, "t", "b")
        source = Source(graph, top)
        async with asyncio.TaskGroup() as group:
            group.create_task(source.request(1))
            group.create_task(source.request(1))
            async with drained(bottom):
                done = source.done
                for _ in range(2):
                    assert not (source.in_flight or top.in_flight or bottom.in_flight)
                    await asyncio.sleep(0)
                assert source.done == done
        assert source.done == 2
        assert not source.sections and not bottom.quiesce_counter and not bottom.idle_waiters and not top.idle_waiters

    all_orders(main)


def test_overlapping_sections_count() -> None:
    """Requests go on only when the last section has ended."""

    async def main() -> None:
        graph = Graph()
        top, bottom = stacked(graph, "t", "b")
        source = Source(graph, top)

        async def hold(*nodes: BlockDriverState) -> None:
            async with drained(*nodes):
                assert not source.in_flight
                await asyncio.sleep(0)
                assert not source.in_flight and not bottom.in_flight

        async with asyncio.TaskGroup() as group:
            group.create_task(hold(top, bottom))
            group.create_task(source.request(1))
            group.create_task(hold(bottom))
        assert source.done == 1 and not source.sections

    all_orders(main)


def test_a_user_that_stops_by_itself_says_so_with_a_kick() -> None:
    """A job has no request in the node when it reaches its pause point; the section waits for its word."""

    async def main() -> None:
        graph = Graph()
        _, middle, bottom = stacked(graph, "t", "m", "b")
        job = CountingUser("j", busy=True)
        with Transaction() as change:
            graph.attach(job, middle, name="source", role=ChildRole.JOB, change=change)

        async def run_job() -> None:
            await let_others_run()
            assert job.sections == 1
            job.busy = False
            kick(middle)

        async with asyncio.TaskGroup() as group:
            group.create_task(run_job())
            async with drained(bottom):
                assert not job.busy

    run(main)


def test_a_busy_user_that_never_kicks_is_a_deadlock_that_the_loop_reports() -> None:
    """Nothing polls: forgetting the kick shows at once."""

    async def main() -> None:
        graph = Graph()
        (node,) = stacked(graph, "n")
        with Transaction() as change:
            graph.attach(CountingUser("j", busy=True), node, name="x", role=ChildRole.JOB, change=change)
        async with drained(node):
            pass

    with pytest.raises(Deadlock):
        run(main)


def test_a_spurious_wake_does_not_end_the_wait() -> None:
    """Who is woken looks again."""

    async def main() -> None:
        graph = Graph()
        (node,) = stacked(graph, "n")
        enter(node)
        waiting = asyncio.create_task(wait_idle(node))
        for _ in range(3):
            await let_others_run()
            assert len(node.idle_waiters) == 1
            wake(node)
        await let_others_run()
        assert not waiting.done() and len(node.idle_waiters) == 1
        leave(node)
        await waiting
        assert not node.idle_waiters

    run(main)


def test_a_cancelled_wait_leaves_no_section_behind() -> None:
    """The guest goes on as if nobody had asked."""

    async def main() -> None:
        graph = Graph()
        top, bottom = stacked(graph, "t", "b")
        source = Source(graph, top)
        enter(bottom)
        waiting = asyncio.create_task(drained_begin([top, bottom]))
        await let_others_run()
        assert source.sections == 2
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not source.sections and not top.quiesce_counter and not bottom.quiesce_counter
        assert not top.idle_waiters and not bottom.idle_waiters
        leave(bottom)

    run(main)


def test_nodes_that_become_busy_by_turns_are_waited_for_together() -> None:
    """One is idle when the other is looked at: only when both are at once has the section begun."""

    async def main() -> None:
        graph = Graph()
        (one,), (two,) = stacked(graph, "one"), stacked(graph, "two")
        enter(one)

        async def hand_over() -> None:
            """A request copies from one node to the other."""
            for _ in range(3):
                await asyncio.sleep(0)
            enter(two)
            leave(one)
            for _ in range(3):
                await asyncio.sleep(0)
            leave(two)

        async with asyncio.TaskGroup() as group:
            group.create_task(hand_over())
            async with drained(two, one):
                assert not one.in_flight and not two.in_flight

    run(main)


def test_a_user_that_comes_to_a_drained_node_is_quiesced_and_resumes_when_it_leaves() -> None:
    """A section holds for everybody who is above, from whenever; also when the change is undone."""

    async def main() -> None:
        graph = Graph()
        top, bottom = stacked(graph, "t", "b")
        other = passive_node(graph, "o", PassiveDriver)
        await drained_begin([bottom])
        await drained_begin([bottom])
        source = Source(graph, other)
        assert source.sections == 0
        change = Transaction()
        graph.replace_child(source.edge, top, change)
        assert source.sections == 2
        drained_end([bottom])
        assert source.sections == 1
        change.abort()
        assert source.sections == 0
        late = Source(graph, bottom, "late")
        assert late.sections == 1
        drained_end([bottom])
        assert late.sections == 0
        assert_consistent(graph)

    run(main)


def test_a_filter_inserted_in_a_section_joins_it() -> None:
    """Jobs insert their filter while the node is drained; when the section ends, requests come through the filter."""

    async def main() -> None:
        graph = Graph()
        (node,) = stacked(graph, "n")
        source = Source(graph, node)
        between = passive_node(graph, "F", PassiveFilter)
        async with asyncio.TaskGroup() as group:
            group.create_task(source.request(1))
            async with drained(node):
                with Transaction() as change:
                    graph.append(between, onto=node, change=change)
                assert between.quiesce_counter == 1 and source.sections == 1
        assert source.sections == 0 and between.quiesce_counter == 0 and source.done == 1
        assert source.edge.node is between
        assert_consistent(graph)

    all_orders(main)


@pytest.mark.parametrize("moved", [True, False])
def test_a_wait_notices_that_its_busy_user_went_away(moved: bool) -> None:
    """The node is idle as soon as the busy one is no longer above it, be it moved or detached."""

    async def main() -> None:
        graph = Graph()
        top, bottom = stacked(graph, "t", "b")
        other = passive_node(graph, "o", PassiveDriver)
        job = CountingUser("j", busy=True)
        with Transaction() as change:
            edge = graph.attach(job, top, name="x", role=ChildRole.JOB, change=change)
        waiting = asyncio.create_task(drained_begin([bottom]))
        await let_others_run()
        assert not waiting.done()
        with Transaction() as change:
            if moved:
                graph.replace_child(edge, other, change)
            else:
                graph.detach(edge, change)
        await waiting
        assert job.sections == 0
        drained_end([bottom])

    run(main)


def test_a_wait_notices_busy_nodes_that_come_above_while_it_waits() -> None:
    """Their becoming idle must reach the waiter, although they were not there when it began to wait."""

    async def main() -> None:
        graph = Graph()
        (node,) = stacked(graph, "n")
        late = passive_node(graph, "late", PassiveFilter)
        enter(node)
        waiting = asyncio.create_task(drained_begin([node]))
        await let_others_run()
        enter(late)
        with Transaction() as change:
            graph.append(late, onto=node, change=change)
        leave(node)
        await let_others_run()
        assert not waiting.done()
        leave(late)
        await waiting
        drained_end([node])
        assert_consistent(graph)

    run(main)


def test_draining_everything() -> None:
    """All nodes, those without users too."""

    async def main() -> None:
        graph = Graph()
        one, two = Source(graph, stacked(graph, "a", "b")[0], "1"), Source(graph, stacked(graph, "c")[0], "2")
        async with asyncio.TaskGroup() as group:
            for source in (one, two):
                group.create_task(source.request(9))
            await let_others_run()
            assert one.in_flight and two.in_flight
            await drain_all(graph)
            assert not any(node.in_flight for node in graph.nodes.values())
            async with drained_all(graph):
                assert all(node.quiesce_counter for node in graph.nodes.values())
        assert (one.done, two.done) == (1, 1)
        assert_consistent(graph)

    run(main)


@given(
    requests=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=8),
    sections=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4),
    seed=st.integers(0, 2**16),
)
def test_random_requests_sections_and_changes_end_balanced(
    requests: list[tuple[int, int]], sections: list[tuple[int, int]], seed: int
) -> None:
    """Three sources, a diamond of nodes, sections with a filter inserted or removed in them, any order of steps."""

    async def main() -> None:
        graph = Graph()
        left, bottom = stacked(graph, "l", "b")
        right = passive_node(graph, "r", PassiveFilter)
        with Transaction() as change:
            graph.attach(right, bottom, name="file", role=ChildRole.FILTERED, change=change)
        nodes = [left, right, bottom, right]
        sources = [Source(graph, node, node.node_name) for node in (left, right, bottom)]
        filters: list[BlockDriverState] = []

        async def section(node: BlockDriverState, steps: int) -> None:
            async with drained(node):
                assert not node.is_busy()
                with Transaction() as change:
                    if steps % 2 and filters:
                        graph.drop(filters.pop(), change)
                    else:
                        filters.append(passive_node(graph, "", PassiveFilter))
                        graph.append(filters[-1], onto=node, change=change)
                for _ in range(steps):
                    await asyncio.sleep(0)
                    assert not node.is_busy()

        async with asyncio.TaskGroup() as group:
            for index, steps in requests:
                group.create_task(sources[index].request(steps))
            for index, steps in sections:
                group.create_task(section(nodes[index], steps))
        assert sum(source.done for source in sources) == len(requests)
        assert not any(node.quiesce_counter or node.in_flight or node.idle_waiters for node in graph.nodes.values())
        assert not any(source.sections for source in sources)

    run(main, Seeded(seed))
