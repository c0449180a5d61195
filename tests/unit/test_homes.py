"""On which I/O thread nodes live."""

from __future__ import annotations

from random import Random

import pytest

from qblock import homes
from qblock.errors import CommandError
from qblock.graph import Graph
from qblock.iothreads import IOThread
from qblock.permissions import ChildRole
from qblock.testing.graphs import CountingUser, passive_node
from qblock.transaction import Transaction

THREAD = IOThread("t0")
OTHER = IOThread("t1")


def _graph() -> tuple[Graph, list[str]]:
    """An overlay on a base that another overlay has, too."""
    graph = Graph(random=Random(0))
    for name in ("base", "left", "right", "alone"):
        passive_node(graph, name)
    with Transaction() as change:
        for name in ("left", "right"):
            graph.attach(
                graph.nodes[name], graph.nodes["base"], name="backing", role=ChildRole.BACKING, change=change
            )
    return graph, ["base", "left", "right"]


def _device(graph: Graph, node: str, thread: IOThread | None) -> CountingUser:
    user = CountingUser(f"disk on {node}", iothread=thread, is_pinned=True)
    with Transaction() as change:
        user.root = graph.attach(user, graph.nodes[node], name="root", role=ChildRole.ROOT, change=change)
    return user


def test_what_is_connected_moves_together_and_back_when_the_change_is_undone() -> None:
    """A node on one thread with a child on another would be a bug."""
    graph, connected = _graph()
    change = Transaction()
    homes.assign(graph.nodes["left"], THREAD, change)
    assert [name for name, node in graph.nodes.items() if node.iothread is THREAD] == connected
    change.abort()
    assert not any(node.iothread for node in graph.nodes.values())


def test_a_device_keeps_all_below_it_where_it_lives_itself() -> None:
    """So two overlays of one base cannot be disks of two threads."""
    graph, connected = _graph()
    _device(graph, "left", THREAD)
    assert all(graph.nodes[name].iothread is THREAD for name in connected)
    with pytest.raises(CommandError, match="disk on left"):
        _device(graph, "right", OTHER)
    with pytest.raises(CommandError, match="main loop"), Transaction() as change:
        homes.assign(graph.nodes["base"], None, change)
    assert all(graph.nodes[name].iothread is THREAD for name in connected)
    assert len(graph.nodes["right"].parents) == 0


def test_the_side_without_a_device_moves_when_nodes_are_connected() -> None:
    """Whichever of the two it is."""
    graph, _ = _graph()
    _device(graph, "alone", OTHER)
    with Transaction() as change:
        graph.attach(graph.nodes["left"], graph.nodes["alone"], name="file", role=ChildRole.STORAGE, change=change)
    assert all(node.iothread is OTHER for node in graph.nodes.values())
