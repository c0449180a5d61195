"""blockdev-reopen of a disk that a guest uses: all or nothing, and the guest sees what it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qblock.backend import BlockBackend
from qblock.errors import BlockIOError
from qblock.monitor.client import QmpError
from qblock.monitor.machine import MachineOptions
from qblock.permissions import Perm
from qblock.testing.graphs import assert_consistent, describe_graph
from qblock.testing.images import make_image
from qblock.testing.machines import LocalMachine
from qblock.units import KiB, MiB

SIZE = 1 * MiB
DISK: dict[str, Any] = {"driver": "qcow2", "node-name": "disk", "file": "disk-file"}
AHEAD = 64 * KiB


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalMachine]:
    """A guest's disk d on the nodes disk and disk-file, and two read-only images, base and other, beside it."""
    disk = make_image(tmp_path / "disk", SIZE)
    drive = f"file={disk},format=qcow2,if=virtio,id=d,node-name=disk,file.node-name=disk-file"
    with LocalMachine(options=MachineOptions(drives=[drive], seed=0)) as machine:
        for name in ("base", "other"):
            path = make_image(tmp_path / name, SIZE, {at: name.encode() for at in range(0, SIZE, AHEAD)})
            storage = {"driver": "file", "node-name": f"{name}-file", "filename": str(path)}
            machine.qmp.execute("blockdev-add", driver="qcow2", node_name=name, read_only=True, file=storage)
        yield machine


def reopen(local: LocalMachine, *descriptions: dict[str, Any]) -> None:
    """Execute blockdev-reopen."""
    local.qmp.execute("blockdev-reopen", {"options": list(descriptions)})


def seen(local: LocalMachine, offset: int, length: int) -> bytes:
    """What the guest reads there; up to a sector."""
    return local.guest_read("d", offset, 512)[:length]


def test_the_guest_sees_the_backing_node_that_its_disk_has_now(local: LocalMachine) -> None:
    """What it has written itself stays; the rest is the new backing node's, and nothing's once it has gone."""
    local.guest_write("d", AHEAD, 4 * KiB, 7)
    for name in ("base", "other"):
        reopen(local, {**DISK, "backing": name})
        assert seen(local, 0, len(name)) == name.encode()
    reopen(local, {**DISK, "backing": None})
    assert seen(local, 0, 8) == bytes(8)
    assert local.guest_read("d", AHEAD, 4 * KiB) == b"\x07" * 4 * KiB


def test_a_filter_can_be_put_between_the_image_and_its_file_and_taken_out_again(local: LocalMachine) -> None:
    """The known use of another file node: throttling, fault injection or encryption for a disk that is in use."""
    local.guest_write("d", 0, 4 * KiB, 1)
    local.qmp.execute("blockdev-add", driver="blkdebug", node_name="faults", image="disk-file")
    reopen(local, {**DISK, "file": "faults"})
    local.guest_write("d", AHEAD, 4 * KiB, 2)
    assert local.machine.system.graph.find_node("disk").children["file"].node.node_name == "faults"
    reopen(local, DISK)
    local.qmp.execute("blockdev-del", node_name="faults")
    assert seen(local, 0, 1) + seen(local, AHEAD, 1) == b"\1\2"


@pytest.mark.parametrize(
    "wrong",
    [
        {**DISK, "backing": "base", "nope": 1},
        {**DISK, "backing": "disk"},
        {**DISK, "backing": "base", "read-only": True},
        {**DISK, "backing": "base", "file": "base-file"},
        {"driver": "qcow2", "node-name": "base", "file": "base-file"},
        {**DISK, "backing": "other"},
    ],
    ids=["unknown member", "a loop", "the guest writes", "somebody else's file", "a writable node on it", "named twice"],
)
def test_one_node_that_cannot_be_changed_leaves_all_as_they_were(local: LocalMachine, wrong: dict[str, Any]) -> None:
    """The first description alone is in order, and must not take effect."""
    system = local.machine.system
    reopen(local, {**DISK, "backing": "base"})
    before = describe_graph(system.graph)
    flags = {name: (node.read_only, node.detect_zeroes) for name, node in system.graph.nodes.items()}
    with pytest.raises(QmpError):
        reopen(local, {**DISK, "backing": "other", "detect-zeroes": "on"}, wrong)
    assert describe_graph(system.graph) == before
    assert {name: (node.read_only, node.detect_zeroes) for name, node in system.graph.nodes.items()} == flags
    assert seen(local, 0, 4) == b"base"
    local.guest_write("d", AHEAD, 512, 3)


def test_links_under_a_job_stay(local: LocalMachine) -> None:
    """A stream reads through the link that it is going to remove; nobody else may change it meanwhile."""
    reopen(local, {**DISK, "backing": "base"})
    local.qmp.execute("block-stream", job_id="j", device="d", speed=1)
    local.qmp.execute("block-job-pause", device="j")
    reopen(local, {**DISK, "backing": "base", "detect-zeroes": "on"})
    with pytest.raises(QmpError, match="backing"):
        reopen(local, {**DISK, "backing": "other"})
    local.qmp.execute("block-job-cancel", device="j", force=True)
    local.qmp.wait_event("BLOCK_JOB_CANCELLED")
    reopen(local, {**DISK, "backing": "other"})
    assert seen(local, SIZE - AHEAD, 5) == b"other"


def test_nothing_to_do_is_done(local: LocalMachine) -> None:
    """An empty list, which ends QEMU 7.2."""
    reopen(local)


def test_permissions_follow_the_options_of_the_same_moment(local: LocalMachine) -> None:
    """Nobody may cut off the storage of a window, and a window that would forbid what others do already is refused whole."""
    graph = local.machine.system.graph
    local.qmp.execute("blockdev-add", driver="memory", node_name="storage", size=SIZE)
    local.qmp.execute("blockdev-add", driver="raw", node_name="window", file="storage")
    whole = {"driver": "raw", "node-name": "window", "file": "storage"}
    reopen(local, {**whole, "offset": 512})
    assert_consistent(graph)
    assert Perm.RESIZE not in graph.find_node("window").children["file"].shared
    reopen(local, whole)
    assert_consistent(graph)
    resizer = BlockBackend(graph, perm=Perm.RESIZE, shared=Perm.ALL)
    resizer.insert(graph.find_node("storage"))
    with pytest.raises(QmpError, match="resize"):
        reopen(local, {**whole, "offset": 512})
    assert_consistent(graph)
    assert graph.find_node("window").length == SIZE
    resizer.close()


def test_a_disk_that_a_person_makes_read_only_is_so_for_the_guest_until_it_is_writable_again(local: LocalMachine) -> None:
    """``reopen`` of qemu-io may do that under a device, which must answer each write with an error meanwhile."""
    assert local.qmp.hmp('qemu-io d "reopen -r"') == ""
    assert local.machine.system.graph.find_node("disk").read_only
    with pytest.raises(BlockIOError):
        local.guest_write("d", 0, 512, 1)
    assert local.qmp.hmp('qemu-io d "reopen -w"') == ""
    local.guest_write("d", 0, 512, 2)
    assert local.guest_read("d", 0, 512) == b"\x02" * 512


def test_a_guest_does_not_write_to_what_it_took_as_read_only(local: LocalMachine) -> None:
    """Its node can be made writable or get a writable overlay afterwards; the device has not asked for that."""
    local.qmp.hmp('qemu-io d "reopen -r"')
    local.qmp.execute("blockdev-reopen", {"options": [{**DISK, "read-only": False, "backing": None}]})
    for change in (local.machine.guest("d").discard, local.machine.guest("d").write_zeroes):
        with pytest.raises(BlockIOError, match="read-only"):
            local.run(change(0, 512))
    with pytest.raises(BlockIOError, match="read-only"):
        local.guest_write("d", 0, 512, 1)


def test_a_child_that_is_not_there_cannot_be_given(local: LocalMachine) -> None:
    """A blkmirror without a source gets one when it is put over a disk, not by a description."""
    local.qmp.execute("blockdev-add", driver="blkmirror", node_name="copy", target={"driver": "memory", "node-name": "target"})
    with pytest.raises(QmpError, match="leave it out"):
        reopen(local, {"driver": "blkmirror", "node-name": "copy", "file": "base", "target": "target"})
    assert_consistent(local.machine.system.graph)
