"""A chain has as many layers as a user likes: nothing may descend as deep, nor cost the square of it where it need not."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from qblock import chain
from qblock.drain import drained_all
from qblock.drivers.memory import MemoryOptions
from qblock.jobs.active_commit import start_commit
from qblock.jobs.commit_plan import CommitRequest
from qblock.monitor.nodeinfo import NodeReports
from qblock.monitor.qmp import encode
from qblock.naming import MAX_NAME, filename_of
from qblock.node import BlockDriverState
from qblock.options import dump
from qblock.permissions import ChildRole
from qblock.testing.jobbench import JobBench
from qblock.testing.nodes import LayerDriver, NodeBench
from qblock.testing.simloop import run

LAYERS = 1500


def with_chain(work: Callable[[NodeBench, list[BlockDriverState]], Coroutine[Any, Any, None]]) -> None:
    """Run ``work`` on a chain of memory layers, base first, each on storage of its own."""

    async def main() -> None:
        bench = NodeBench()
        nodes: list[BlockDriverState] = []
        for number in range(LAYERS):
            children = {"backing": (nodes[-1], ChildRole.BACKING)} if nodes else {}
            options = MemoryOptions(size=512)
            nodes.append(await bench.add(LayerDriver, options, children=children, node_name=f"layer{number}"))
        await work(bench, nodes)
        await bench.close()

    run(main)


def test_what_is_told_of_the_top_lies_as_deep_as_the_chain() -> None:
    """query-block and query-named-block-nodes put the images one into the other; JSON of that depth must come out."""

    async def work(bench: NodeBench, nodes: list[BlockDriverState]) -> None:
        del bench
        info = NodeReports().device(nodes[-1], backend=None, flat=False)
        assert info.backing_file_depth == LAYERS - 1
        text = encode({"return": dump(info)})
        assert text.count(b'"backing-image"') == LAYERS - 1
        assert text.endswith(b"}\r\n") and text.count(b'"virtual-size": 512') == LAYERS

    with_chain(work)


def test_a_name_of_all_layers_is_cut_where_qemu_cuts_it() -> None:
    """Else the names of a long chain would be as long together as the square of its length."""

    async def work(bench: NodeBench, nodes: list[BlockDriverState]) -> None:
        del bench
        name = filename_of(nodes[-1])
        assert len(name) == MAX_NAME and name.endswith("...")
        short = json.loads(filename_of(nodes[2]).removeprefix("json:"))
        assert short["backing"]["backing"] == json.loads(filename_of(nodes[0]).removeprefix("json:"))

    with_chain(work)


def test_draining_a_chain_looks_at_each_edge_a_few_times() -> None:
    """A section on every node would otherwise be passed on from each to all above it."""
    looks = 0

    class Counting(list[Any]):
        def __iter__(self) -> Any:
            nonlocal looks
            looks += 1
            return super().__iter__()

    async def work(bench: NodeBench, nodes: list[BlockDriverState]) -> None:
        for node in nodes:
            node.parents = Counting(node.parents)
        async with drained_all(bench.graph):
            assert nodes[-1].quiesce_counter == LAYERS
        assert looks < 20 * LAYERS
        assert not nodes[-1].quiesce_counter
        for node in nodes:
            node.parents = list(node.parents)

    with_chain(work)


def test_a_commit_looks_a_few_times_at_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes every layer, and would otherwise have the permissions of all below worked out for each."""
    layers, looks = 100, 0

    def counting(node: BlockDriverState) -> list[BlockDriverState]:
        nonlocal looks
        looks += 1
        return [edge.node for edge in node.children.values()]

    async def life() -> None:
        bench = JobBench()
        name = None
        for number in range(layers):
            storage = await bench.node(f"storage{number}", 0)
            await bench.system.opener.create_image("qcow2", {"file": storage.node_name, "size": 1 << 16})
            options = {"driver": "qcow2", "node-name": f"layer{number}", "file": storage.node_name, "backing": name}
            (await bench.system.opener.open_blockdev(options)).monitor_owned = True
            name = f"layer{number}"
        monkeypatch.setattr(chain, "children_of", counting)
        request = CommitRequest(job_id="j", top_node=f"layer{layers - 2}", base_node="layer0")
        job = await start_commit(bench.system, device=f"layer{layers - 1}", request=request)
        await bench.system.jobs.wait(job)
        assert job.error is None
        await bench.close()

    run(life)
    assert looks < 20 * layers


def test_json_of_ordinary_depth_and_of_great_depth_is_the_same() -> None:
    """The two ways to write it must not differ."""
    value: dict[str, Any] = {"a": [1, "ü\n", None, True, {}, [], {"b": [{}]}], "c": 1.5}
    deep: Any = value
    for _ in range(2000):
        deep = {"x": [deep, 1]}
    inner = encode(value).removesuffix(b"\r\n")
    assert encode({"v": deep}) == b'{"v": ' + b'{"x": [' * 2000 + inner + b", 1]}" * 2000 + b"}\r\n"
