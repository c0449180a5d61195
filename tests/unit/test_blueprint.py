"""A blueprint brings a tree of nodes back as it was, whatever its images' headers say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from qblock.backend import BlockBackend
from qblock.blueprint import Blueprint, own_nodes
from qblock.driver import Json
from qblock.errors import QBlockError
from qblock.image import create
from qblock.node import BlockDriverState
from qblock.nodespec import MAX_NESTING, NodeFlags
from qblock.opening import OpenPolicy
from qblock.permissions import Perm
from qblock.system import BlockSystem
from qblock.testing.images import make_chain, make_image
from qblock.testing.simloop import run
from qblock.transaction import Transaction


def with_system(body: Callable[[BlockSystem], Awaitable[None]]) -> None:
    async def main() -> None:
        async with BlockSystem.create(policy=OpenPolicy.follow()) as system:
            await body(system)

    run(main)


def picture(node: BlockDriverState) -> dict[str, Any]:
    """All that is to come back, but for automatic names."""
    return {
        "driver": node.driver.name,
        "name": None if node.node_name.startswith("#") else node.node_name,
        "flags": attrs.asdict(NodeFlags.of(node)),
        "options": dict(node.options_given),
        "marks": (node.detect_zeroes, node.implicit, node.probed, node.copy_on_read),
        "children": {name: (edge.role, picture(edge.node)) for name, edge in node.children.items()},
    }


async def close_and_open(system: BlockSystem, backend: BlockBackend) -> BlockDriverState:
    """What drive-reopen does with an old image when it comes back."""
    root = backend.node
    closing = own_nodes(root)
    blueprint = Blueprint.of(root, closing)
    backend.remove()
    await system.opener.close_orphans()
    assert all(node.closed for node in closing)
    again = await blueprint.build(system.opener)
    backend.insert(again)
    return again


DRIVES: dict[str, dict[str, Json]] = {
    "by its name": {"file": "top"},
    "probed": {"file": "raw"},
    "read-only": {"file": "top", "format": "qcow2", "readonly": "on"},
    "with flags": {"file": "top", "cache": "unsafe", "discard": "unmap", "detect-zeroes": "unmap"},
    "copying on read": {"file": "top", "copy-on-read": "on"},
    "with names": {"file.filename": "top", "file.node-name": "f", "node-name": "n", "driver": "qcow2"},
    "with options": {"file": "top", "lazy-refcounts": "on", "l2-cache-size": "1M", "overlap-check.template": "all"},
    "with another backing": {"file": "top", "backing.file.filename": "other", "backing.driver": "qcow2"},
    "by a json: name": {"file": 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "top"}}'},
    "with filters": {"driver": "copy-on-read", "file.driver": "qcow2", "file.file.filename": "top"},
    "in a part of a file": {"driver": "raw", "file.filename": "raw", "offset": "65536", "size": "65536"},
}


@pytest.mark.parametrize("drive", DRIVES)
def test_what_was_open_is_open_again_in_the_same_way(
    drive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed drive-reopen must leave no trace in what its drive does."""
    monkeypatch.chdir(tmp_path)
    make_chain(".", "1M", [("base", {0: b"base"}), ("mid", {65536: b"mid"}), ("top", {131072: b"top"})])
    make_image("other", "1M", {0: b"other"})
    make_image("raw", "1M", {65536: b"raw"}, fmt="raw")

    async def body(system: BlockSystem) -> None:
        backend = await system.drive_add({"if": "virtio", "id": "d", **DRIVES[drive]})
        before, content = picture(backend.node), await backend.read(0, backend.length)
        names = set(system.graph.nodes)
        after = await close_and_open(system, backend)
        assert picture(after) == before
        assert {name for name in names if not name.startswith("#")} <= set(system.graph.nodes)
        assert len(names) == len(system.graph.nodes)
        assert not any(node.monitor_owned for node in system.graph.nodes.values())
        assert await backend.read(0, backend.length) == content

    with_system(body)


def test_the_graph_counts_where_it_differs_from_the_headers(tmp_path: Path) -> None:
    """A backing link that somebody has changed at run time is not in the header yet."""
    make_chain(tmp_path, "1M", [("base", {0: b"base"}), ("top", {65536: b"top"})])
    make_image(tmp_path / "other", "1M", {0: b"other"})

    async def body(system: BlockSystem) -> None:
        backend = await system.drive_add(f"if=virtio,id=d,file={tmp_path}/top")
        other = await system.opener.open_image(str(tmp_path / "other"))
        other.copy_on_read = 0
        with Transaction() as change:
            system.graph.set_backing(backend.node, other, change)
        await system.opener.close_orphans()
        assert await backend.read(0, 5) == b"other"
        await close_and_open(system, backend)
        assert await backend.read(0, 5) == b"other"
        with Transaction() as change:
            system.graph.set_backing(backend.node, None, change)
        await close_and_open(system, backend)
        assert await backend.read(0, 5) == bytes(5)

    with_system(body)


def test_nodes_that_others_use_stay_open_and_are_used_again(tmp_path: Path) -> None:
    """Two drives may share a base; one of them leaving it must not take it from the other."""
    make_chain(tmp_path, "1M", [("base", {0: b"base"}), ("top", {65536: b"top"})])

    async def body(system: BlockSystem) -> None:
        base = await system.opener.open_blockdev(
            {"driver": "qcow2", "node-name": "b", "read-only": True,
             "file": {"driver": "file", "filename": str(tmp_path / "base")}}
        )  # fmt: skip
        base.monitor_owned = True
        backend = await system.drive_add(f"if=virtio,id=d,driver=qcow2,file.filename={tmp_path}/top,backing=b")
        again = await close_and_open(system, backend)
        assert not base.closed
        assert again.backing is not None
        assert again.backing.node is base
        assert base.monitor_owned

    with_system(body)


def test_a_chain_deeper_than_options_may_be_nested_comes_back(tmp_path: Path) -> None:
    """Snapshots pile up, and no command line was needed for them."""
    depth = MAX_NESTING + 20
    create(tmp_path / "0", "64k", fmt="qcow2")
    for number in range(1, depth):
        create(tmp_path / f"{number}", "64k", fmt="qcow2", backing=f"{number - 1}", backing_fmt="qcow2")

    async def body(system: BlockSystem) -> None:
        backend = await system.drive_add(f"if=virtio,id=d,file={tmp_path}/{depth - 1}")
        await close_and_open(system, backend)
        assert len(list(system.graph.whole_chain(backend.node))) == depth

    with_system(body)


def test_nothing_stays_open_when_a_part_is_gone(tmp_path: Path) -> None:
    """The drive is empty then, and nothing must hold its other images."""
    _, top = make_chain(tmp_path, "1M", [("base", {}), ("top", {})])

    async def body(system: BlockSystem) -> None:
        backend = await system.drive_add(f"if=virtio,id=d,file={top}")
        blueprint = Blueprint.of(backend.node, own_nodes(backend.node))
        backend.remove()
        await system.opener.close_orphans()
        top.unlink()
        with pytest.raises(QBlockError, match="top"):
            await blueprint.build(system.opener)
        assert not system.graph.nodes
        assert blueprint.name == str(top)

    with_system(body)


def test_what_is_below_a_node_and_used_by_nobody_else_is_its_own(tmp_path: Path) -> None:
    """What is closed with a node, and no more."""
    make_chain(tmp_path, "1M", [("base", {}), ("mid", {}), ("top", {})])

    async def body(system: BlockSystem) -> None:
        backend = await system.drive_add(f"if=virtio,id=d,file={tmp_path}/top")
        root = backend.node
        assert root.backing is not None
        mid = root.backing.node
        assert len(own_nodes(root)) == len(system.graph.nodes) == 6
        other = BlockBackend(system.graph, "reader", perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
        other.insert(mid)
        assert own_nodes(root) == [root, root.children["file"].node]
        assert len(own_nodes(root, ignoring=BlockBackend)) == 6
        mid.monitor_owned = True
        assert mid not in own_nodes(root, ignoring=BlockBackend)
        mid.monitor_owned = False
        other.close()

    with_system(body)
