"""The commands themselves, through a client without a socket, on virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qblock.actions.bitmaps import find_bitmap
from qblock.bitmaps import ALLOWED, BitmapState, BitmapUse
from qblock.clock import LoopClock
from qblock.monitor.client import QmpClient, QmpError
from qblock.monitor.hub import MonitorHub
from qblock.policy import OpenPolicy
from qblock.system import BlockSystem
from qblock.testing.simloop import run

Body = Callable[[QmpClient, BlockSystem], Awaitable[None]]
MIB = 1 << 20


def with_client(body: Body) -> None:
    """Run ``body`` on virtual time with an in-process client."""

    async def main() -> None:
        async with BlockSystem.create(policy=OpenPolicy.follow(), clock=LoopClock()) as system:
            hub = MonitorHub(system)
            hub.open()
            async with await QmpClient.in_process(hub) as client:
                await body(client, system)
            await hub.close()

    run(main)


async def refused(client: QmpClient, command: str, arguments: dict[str, Any] | None = None, **members: Any) -> QmpError:
    """The error that a command is answered with."""
    with pytest.raises(QmpError) as error:
        await client.execute(command, arguments, **members)
    return error.value


async def add_null(client: QmpClient, name: str, size: int = 8 * MIB) -> None:
    """A node that reads as zeroes."""
    await client.execute("blockdev-add", driver="null-co", node_name=name, size=size)


async def make_qcow2(client: QmpClient, path: Path, size: int = 8 * MIB) -> None:
    """A new image, made by two create jobs."""
    for number, options in enumerate(
        [
            {"driver": "file", "filename": str(path), "size": 0},
            {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "size": size},
        ]
    ):
        await client.execute("blockdev-create", job_id=f"c{number}", options=options)
        await client.wait_event("JOB_STATUS_CHANGE", id=f"c{number}", status="concluded")
        (job,) = await client.execute("query-jobs")
        assert "error" not in job
        await client.execute("job-dismiss", id=f"c{number}")


@pytest.mark.parametrize("use", BitmapUse)
@pytest.mark.parametrize("state", BitmapState)
def test_a_bitmap_allows_what_the_table_says(use: BitmapUse, state: BitmapState) -> None:
    """Busy bitmaps belong to their job, read-only ones to their image, inconsistent ones say nothing."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        await add_null(client, "n")
        await client.execute("block-dirty-bitmap-add", node="n", name="b")
        await client.execute("block-dirty-bitmap-add", node="n", name="target")
        _, bitmap = find_bitmap(system.graph, "n", "b")
        setattr(bitmap, state.name.lower(), True)
        command, arguments = {
            BitmapUse.CHANGE: ("block-dirty-bitmap-clear", {"name": "b"}),
            BitmapUse.SWITCH: ("block-dirty-bitmap-disable", {"name": "b"}),
            BitmapUse.READ: ("block-dirty-bitmap-merge", {"target": "target", "bitmaps": ["b"]}),
            BitmapUse.REMOVE: ("block-dirty-bitmap-remove", {"name": "b"}),
        }[use]
        if state in ALLOWED[use]:
            await client.execute(command, arguments, node="n")
        else:
            assert state.value in str(await refused(client, command, arguments, node="n"))

    with_client(body)


def test_bitmaps_are_listed_newest_first_and_hashed_as_qemu_hashes_them() -> None:
    """The hash is that of 128 clear granules: 16 zero bytes."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        await add_null(client, "n")
        await client.execute("block-dirty-bitmap-add", node="n", name="b0")
        await client.execute("block-dirty-bitmap-add", node="n", name="b1", disabled=True, granularity=512)
        (node,) = await client.execute("query-named-block-nodes")
        common = {"count": 0, "busy": False, "persistent": False}
        assert node["dirty-bitmaps"] == [
            {"name": "b1", "recording": False, "granularity": 512, **common},
            {"name": "b0", "recording": True, "granularity": 65536, **common},
        ]
        reply = await client.execute("x-debug-block-dirty-bitmap-sha256", node="n", name="b0")
        assert reply == {"sha256": "374708fff7719dd5979ec875d56cd2286f6d3cf7ec317a3b25632aab28ec37bb"}

    with_client(body)


def test_merging_bitmaps_of_different_sizes_changes_nothing() -> None:
    """All sources or none."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        await add_null(client, "n")
        await add_null(client, "other", MIB)
        for node, name in (("n", "target"), ("n", "good"), ("other", "bad")):
            await client.execute("block-dirty-bitmap-add", node=node, name=name)
        find_bitmap(system.graph, "n", "good")[1].mark(0, 1)
        sources = ["good", {"node": "other", "name": "bad"}]
        await refused(client, "block-dirty-bitmap-merge", node="n", target="target", bitmaps=sources)
        assert find_bitmap(system.graph, "n", "target")[1].count == 0
        await client.execute("block-dirty-bitmap-merge", node="n", target="target", bitmaps=sources[:1])
        assert find_bitmap(system.graph, "n", "target")[1].count == 65536

    with_client(body)


@pytest.mark.parametrize(
    "arguments",
    [
        {"driver": "null-co"},
        {"driver": "null-co", "node-name": "n", "bogus": 1},
        {"driver": "null-co", "node-name": "n", "size": "1"},
        {"driver": "null-co", "node-name": "9n"},
        {"driver": "null-co", "node-name": "x" * 32},
        {"driver": "nosuch", "node-name": "n"},
        {"driver": None},
        {},
        {"driver": "raw", "node-name": "n", "file": 5},
        {"driver": "raw", "node-name": "n", "file": "nosuch"},
        {"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": "/nosuch/x"}},
    ],
)
def test_a_refused_blockdev_add_leaves_nothing(arguments: dict[str, Any]) -> None:
    """Options are checked before anything is opened, and what was opened is closed again."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        assert (await refused(client, "blockdev-add", arguments)).error_class == "GenericError"
        assert not system.graph.nodes

    with_client(body)


def test_blockdev_del_takes_only_what_is_free_and_the_monitors() -> None:
    """A node below another one, or opened along with it, stays."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        await add_null(client, "below")
        await client.execute("blockdev-add", driver="raw", node_name="above", file="below")
        await client.execute(
            "blockdev-add", driver="raw", node_name="tree", file={"driver": "null-co", "node-name": "inner"}
        )
        await refused(client, "blockdev-del", node_name="below")
        await refused(client, "blockdev-del", node_name="inner")
        await refused(client, "blockdev-del", node_name="nosuch")
        for name in ("above", "below", "tree"):
            await client.execute("blockdev-del", node_name=name)
        assert not system.graph.nodes

    with_client(body)


def test_a_snapshot_puts_the_overlay_above_and_makes_the_old_image_read_only(tmp_path: Path) -> None:
    """The device keeps its name, and writes go to the new file."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        await make_qcow2(client, tmp_path / "base.qcow2")
        await client.hmp(f"drive_add 0 if=virtio,id=d,file={tmp_path}/base.qcow2,format=qcow2")
        await client.execute(
            "blockdev-snapshot-sync", device="d", snapshot_file=f"{tmp_path}/top.qcow2", snapshot_node_name="top"
        )
        (device,) = await client.execute("query-block")
        inserted = device["inserted"]
        assert (inserted["node-name"], inserted["backing_file_depth"]) == ("top", 1)
        assert inserted["backing_file"] == inserted["image"]["backing-filename"] == f"{tmp_path}/base.qcow2"
        nodes = {node["file"]: node for node in await client.execute("query-named-block-nodes", flat=True)}
        assert nodes[f"{tmp_path}/base.qcow2"]["ro"]
        assert not nodes[f"{tmp_path}/top.qcow2"]["ro"]
        assert (await refused(client, "blockdev-snapshot", node="d", overlay="top")).error_class == "GenericError"

    with_client(body)


def test_a_snapshot_by_node_name_needs_a_name_for_the_overlay(tmp_path: Path) -> None:
    """Otherwise nobody could address what is on top afterwards."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        await add_null(client, "n")
        await refused(client, "blockdev-snapshot-sync", node_name="n", snapshot_file=f"{tmp_path}/s")
        await refused(client, "blockdev-snapshot-sync", snapshot_file=f"{tmp_path}/s")
        assert not (tmp_path / "s").exists()

    with_client(body)


def test_sizes_are_changed_by_node_or_device_and_never_below_zero() -> None:
    """``device`` is a device's name; nodes have their own member."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        await client.execute("blockdev-add", driver="memory", node_name="m", size=MIB)
        await client.execute("block_resize", {"node-name": "m", "size": 2 * MIB})
        await client.execute("block_resize", {"device": "nosuch", "node-name": "m", "size": 3 * MIB})
        (node,) = await client.execute("query-named-block-nodes")
        assert node["image"]["virtual-size"] == 3 * MIB
        for arguments in ({"node-name": "m", "size": -1}, {"device": "m", "size": MIB}, {"size": MIB}):
            assert (await refused(client, "block_resize", arguments)).error_class == "GenericError"
        assert not system.graph.backends

    with_client(body)


def test_a_mirror_can_be_watched_and_completed_by_commands_alone(tmp_path: Path) -> None:
    """The spine of the project, at its smallest."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        await make_qcow2(client, tmp_path / "base.qcow2")
        await client.hmp(f"drive_add 0 if=virtio,id=d,file={tmp_path}/base.qcow2,format=qcow2")
        await client.execute("drive-mirror", device="d", target=f"{tmp_path}/copy.qcow2", sync="full")
        created = await client.wait_event("JOB_STATUS_CHANGE", id="d")
        assert created.data == {"id": "d", "status": "created"}
        await client.wait_event("BLOCK_JOB_READY", device="d")
        (job,) = await client.execute("query-block-jobs")
        assert (job["type"], job["ready"], job["status"], job["io-status"]) == ("mirror", True, "ready", "ok")
        assert "Type mirror, device d: Completed" in await client.hmp("info block-jobs")
        await client.execute("block-job-complete", device="d")
        await client.wait_event("BLOCK_JOB_COMPLETED", device="d")
        (device,) = await client.execute("query-block")
        assert device["inserted"]["file"] == f"{tmp_path}/copy.qcow2"
        assert await client.execute("query-jobs") == []

    with_client(body)


@pytest.mark.parametrize(
    ("command", "error_class"),
    [
        ("block-job-cancel", "DeviceNotActive"), ("block-job-complete", "DeviceNotActive"),
        ("block-job-pause", "DeviceNotActive"), ("block-job-resume", "DeviceNotActive"), ("job-cancel", "GenericError"),
        ("job-complete", "GenericError"), ("job-dismiss", "GenericError"), ("job-finalize", "GenericError"),
        ("job-pause", "GenericError"), ("job-resume", "GenericError"), ("block-job-dismiss", "DeviceNotActive"),
        ("block-job-finalize", "DeviceNotActive"), ("nosuch", "CommandNotFound"),
    ],
)  # fmt: skip
def test_unknown_jobs_and_commands_have_the_class_that_clients_know(command: str, error_class: str) -> None:
    """Decisions of clients look at the class."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        by_device = command.startswith("block-job") and command.rpartition("-")[2] not in ("dismiss", "finalize")
        error = await refused(client, command, {"device" if by_device else "id": "nosuch"})
        assert error.error_class == error_class

    with_client(body)


def test_objects_are_made_and_removed() -> None:
    """What has no use in a storage daemon is refused."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        await client.execute("object-add", qom_type="secret", id="s", data="x")
        await refused(client, "object-add", qom_type="secret", id="s", data="x")
        await refused(client, "object-add", qom_type="rng-builtin", id="i")
        await client.execute("object-del", id="s")
        await refused(client, "object-del", id="s")

    with_client(body)
