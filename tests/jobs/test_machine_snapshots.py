"""Snapshots of several disks: all or none, and disks that something follows are left alone."""

from __future__ import annotations

import asyncio

import pytest

from qblock.bitmaps import new_bitmap
from qblock.errors import BlockIOError, CommandError, NodeBusy
from qblock.jobs.machine_snapshots import SnapshottedDisk, disks_named, keeper_among, load_machine, save_machine
from qblock.node import BlockDriverState
from qblock.runstate import RunState
from qblock.testing.jobbench import JobBench
from qblock.testing.simloop import run
from qblock.units import MiB


async def disk(bench: JobBench, name: str, **options: int) -> BlockDriverState:
    """A qcow2 node over memory; ``options`` of its creation."""
    storage = await bench.node(f"{name}-file", 0)
    await bench.system.opener.create_image(
        "qcow2", {"file": storage.node_name, "size": MiB} | {key.replace("_", "-"): value for key, value in options.items()}
    )
    node = await bench.system.opener.open_blockdev({"driver": "qcow2", "node-name": name, "file": storage.node_name})
    node.monitor_owned = True
    return node


async def content(bench: JobBench, node: BlockDriverState) -> bytes:
    """The first KiB of the disk."""
    reader = bench.disk(node)
    try:
        return bytes(await reader.read(0, 1024))
    finally:
        reader.close()


async def write(bench: JobBench, node: BlockDriverState, value: bytes) -> None:
    """Fill the first KiB."""
    writer = bench.disk(node)
    await writer.write(0, value * 1024)
    writer.close()


def of(disks: list[SnapshottedDisk]) -> list[list[str]]:
    """The names of the snapshots of each disk."""
    return [[one.name for one in disk.driver.snapshots()] for disk in disks]


def test_where_one_disk_cannot_none_is_kept() -> None:
    """A snapshot needs refcounts of more than one bit; those of the other disks are deleted again, and the guest goes on."""

    async def life() -> None:
        bench = JobBench()
        await disk(bench, "a")
        await write(bench, await disk(bench, "b", refcount_bits=1), b"1")
        disks = disks_named(bench.system, ["a", "b"])
        with pytest.raises(BlockIOError):
            await save_machine(bench.system, "t", disks, keeper_among(disks, "a"))
        assert of(disks) == [[], []]
        assert bench.system.run.state is RunState.RUNNING
        await bench.close()

    run(life)


def test_a_disk_that_its_last_user_leaves_meanwhile_is_closed_afterwards() -> None:
    """Not before the end, and then also when it failed."""

    async def life() -> None:
        bench = JobBench(seed=1)
        node = await disk(bench, "a", refcount_bits=1)
        await write(bench, node, b"1")
        disks = disks_named(bench.system, ["a"])
        saving = asyncio.ensure_future(save_machine(bench.system, "t", disks, disks[0]))
        await asyncio.sleep(0)
        node.monitor_owned = False
        with pytest.raises(BlockIOError):
            await saving
        assert "a" not in bench.graph.nodes
        await bench.close()

    run(life)


def test_disks_stay_as_they_are_where_one_cannot_go_back() -> None:
    """Because it has no such snapshot, or because a bitmap or a job follows what is written to it."""

    async def life() -> None:
        bench = JobBench()
        nodes = [await disk(bench, name) for name in ("a", "b")]
        disks = disks_named(bench.system, ["a", "b"])
        for node in nodes:
            await write(bench, node, b"1")
        await save_machine(bench.system, "t", disks, disks[0])
        await save_machine(bench.system, "u", disks[:1], disks[0])
        for node in nodes:
            await write(bench, node, b"2")
        with pytest.raises(CommandError, match="no snapshot 'u' of the device 'b'"):
            await load_machine(bench.system, "u", disks, disks[0])
        bitmap = new_bitmap(nodes[1], "m")
        nodes[1].dirty_bitmaps.append(bitmap)
        with pytest.raises(NodeBusy, match="bitmaps"):
            await load_machine(bench.system, "t", disks, disks[0])
        nodes[1].dirty_bitmaps.remove(bitmap)
        above = await bench.system.opener.open_blockdev({"driver": "copy-on-read", "node-name": "above", "file": "b"})
        above.dirty_bitmaps.append(bitmap)  # as that of a job on a filter
        with pytest.raises(NodeBusy, match="bitmaps"):
            await load_machine(bench.system, "t", disks, disks[0])
        above.dirty_bitmaps.remove(bitmap)
        assert [await content(bench, node) for node in nodes] == [b"2" * 1024] * 2
        await load_machine(bench.system, "t", disks, disks[0])
        assert [await content(bench, node) for node in nodes] == [b"1" * 1024] * 2
        assert of(disks) == [["t", "u"], ["t"]]
        await bench.close()

    run(life)
