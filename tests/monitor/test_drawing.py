"""Pictures of graphs and progress, pinned as people see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qblock.backend import BlockBackend
from qblock.clock import LoopClock
from qblock.monitor.client import QmpClient
from qblock.monitor.drawing import ASCII, GraphDrawing, columns, describe_permissions, progress_bar
from qblock.permissions import Perm
from qblock.system import BlockSystem
from qblock.testing.simloop import run


def drawn(*nodes: Mapping[str, object], full: bool = False) -> Sequence[str]:
    """The picture of a graph made of these blockdev-add arguments."""

    async def main() -> list[str]:
        async with BlockSystem.create(clock=LoopClock()) as system, await QmpClient.in_process(system) as qmp:
            for node in nodes:
                await qmp.execute("blockdev-add", node)
            return GraphDrawing(tuple(system.graph.nodes.values()), ASCII, full=full).lines()

    return run(main)


def test_nodes_of_the_monitor_stand_below_it() -> None:
    """A node that is used twice is drawn once."""
    memory = {"driver": "memory", "node-name": "disk", "size": 1 << 20}
    assert drawn() == ["(there are no block nodes)"]
    assert drawn(
        memory, {"driver": "raw", "node-name": "a", "file": "disk", "read-only": True},
        {"driver": "raw", "node-name": "b", "file": "disk", "read-only": True},
    ) == [
        "monitor",
        "`- a: raw, 1 MiB, read-only",
        "   `- disk: memory, 1 MiB",
        "monitor",
        "`- b: raw, 1 MiB, read-only",
        "   `- disk (drawn above)",
    ]  # fmt: skip


def test_a_format_and_its_file_share_a_line_unless_all_is_asked_for() -> None:
    """What people draw on a blackboard; the full picture is for those who look for something."""
    node = {"driver": "raw", "node-name": "a", "file": {"driver": "memory", "node-name": "m", "size": 512}}
    assert drawn(node) == ["monitor", "`- a: raw, 512 B"]
    assert drawn(node, full=True) == ["monitor", "`- a: raw, 512 B", "   `- m: memory, 512 B"]


def test_a_job_is_one_user_with_all_the_handles_it_has() -> None:
    """Jobs work through edges of their own and through backends; a person wants to see one job."""

    async def main() -> list[str]:
        async with BlockSystem.create(clock=LoopClock()) as system, await QmpClient.in_process(system) as qmp:
            for name in ("a", "b"):
                await qmp.execute("blockdev-add", driver="memory", node_name=name, size=1 << 20)
            await qmp.execute("blockdev-mirror", job_id="j", device="a", target="b", sync="full", filter_node_name="f")
            handle = BlockBackend(system.graph, perm=Perm.NONE, shared=Perm.ALL, description="mirror job 'j'")
            handle.insert(system.graph.find_node("f"))
            shown = GraphDrawing(tuple(system.graph.nodes.values()), ASCII).lines()
            handle.close()
            return shown

    assert run(main) == [
        "mirror job 'j'",
        "+- main node f: mirror_top",
        "|  `- a: memory, 1 MiB",
        "+- target b: memory, 1 MiB",
        "`- source a (drawn above)",
    ]


def test_progress_bars_are_full_only_at_the_end() -> None:
    """And when there is nothing to do."""
    shown = [progress_bar(*pair, width=4, strokes=ASCII) for pair in ((0, 8), (4, 8), (7, 8), (8, 8), (0, 0), (9, 8))]
    assert shown == ["[....]   0.0 %", "[##..]  50.0 %", "[###.]  87.5 %", *["[####] 100.0 %"] * 3]


def test_permissions_are_letters() -> None:
    """As `graph -p` explains them."""
    assert describe_permissions(Perm.ALL) == "cwur"
    assert describe_permissions(Perm.WRITE | Perm.RESIZE) == "wr"
    assert describe_permissions(Perm.NONE) == "-"


def test_columns_line_up() -> None:
    """The last one is not padded, so lines have no blanks at their ends."""
    assert columns([("a", "1"), ("long", "2")]) == ["  a     1", "  long  2"]
    assert columns([]) == []
