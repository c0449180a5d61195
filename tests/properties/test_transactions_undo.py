"""A transaction that fails leaves everything as it was, whichever action fails, and wherever it stands."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qblock.monitor.client import QmpError
from qblock.monitor.command import CommandContext
from qblock.monitor.machine import MachineOptions
from qblock.testing.graphs import assert_consistent, describe_graph
from qblock.testing.images import make_chain, make_image
from qblock.testing.machines import LocalMachine, drive_text
from qblock.units import KiB, MiB

Action = tuple[str, Mapping[str, Any]]
SIZE = 2 * MiB


def bitmap(verb: str, node: str, name: str, **members: Any) -> Action:
    return f"block-dirty-bitmap-{verb}", {"node": node, "name": name, **members}


GOOD: Mapping[str, Action] = {
    "a new bitmap": bitmap("add", "a", "new"),
    "a new bitmap on b": bitmap("add", "b", "new", granularity=4096, disabled=True),
    "cleared": bitmap("clear", "a", "b0"),
    "removed": bitmap("remove", "a", "b1"),
    "enabled": bitmap("enable", "a", "b1"),
    "disabled": bitmap("disable", "a", "b0"),
    "disabled on b": bitmap("disable", "b", "b2"),
    "merged": ("block-dirty-bitmap-merge", {"node": "a", "target": "b1", "bitmaps": ["b0"]}),
    "merged from b": (
        "block-dirty-bitmap-merge", {"node": "a", "target": "b1", "bitmaps": [{"node": "b", "name": "b2"}]}
    ),
    "snapshot of a": ("blockdev-snapshot-sync", {"device": "a", "snapshot-file": "a.snap"}),
    "second snapshot of a": ("blockdev-snapshot-sync", {"device": "a", "snapshot-file": "a.snap2"}),
    "snapshot of b": ("blockdev-snapshot-sync", {"device": "b", "snapshot-file": "b.snap", "snapshot-node-name": "top"}),
    "overlay on a": ("blockdev-snapshot", {"node": "a", "overlay": "ov"}),
    "full mirror of a": ("drive-mirror", {"device": "a", "target": "a.copy", "sync": "full"}),
    "mirror of a's top": ("drive-mirror", {"device": "a", "target": "a.top", "sync": "top", "job-id": "j"}),
    "mirror of b's writes": ("drive-mirror", {"device": "b", "target": "b.copy", "sync": "none", "node-name": "copy"}),
    "write-blocking mirror": (
        "blockdev-mirror",
        {"device": "b", "target": "t", "sync": "full", "job-id": "k", "copy-mode": "write-blocking",
         "filter-node-name": "f"},
    ),
}  # fmt: skip
PART_OF_A = 'json:{"file": {"driver": "raw", "read-only": true, "file": "a-n"}}'
"""A name that has to be probed, through a disk that may be drained by the action before."""
WRONG: Mapping[str, Action] = {
    "abort": ("abort", {}),
    "snapshot of an unknown device": ("blockdev-snapshot-sync", {"device": "nope", "snapshot-file": "x"}),
    "snapshot of a busy device": ("blockdev-snapshot-sync", {"device": "c", "snapshot-file": "x"}),
    "snapshot to nowhere": ("blockdev-snapshot-sync", {"device": "b", "snapshot-file": "none/x"}),
    "snapshot to a directory": ("blockdev-snapshot-sync", {"device": "b", "snapshot-file": "."}),
    "snapshot to no image": ("blockdev-snapshot-sync", {"device": "b", "snapshot-file": "junk", "mode": "existing"}),
    "snapshot to a used image": ("blockdev-snapshot-sync", {"device": "b", "snapshot-file": "c", "mode": "existing"}),
    "overlay in use": ("blockdev-snapshot", {"node": "b", "overlay": "c"}),
    "unknown overlay": ("blockdev-snapshot", {"node": "b", "overlay": "nope"}),
    "unknown bitmap": bitmap("clear", "a", "nope"),
    "bitmap of an unknown node": bitmap("enable", "nope", "b0"),
    "bitmap that is there": bitmap("add", "t", "bt"),
    "bitmap without a name": bitmap("add", "a", ""),
    "merge of another size": ("block-dirty-bitmap-merge", {"node": "a", "target": "b0", "bitmaps": [
        {"node": "t", "name": "bt"}, {"node": "small", "name": "bs"}]}),
    "mirror of an unknown device": ("drive-mirror", {"device": "nope", "target": "x", "sync": "full"}),
    "mirror of a busy device": ("drive-mirror", {"device": "c", "target": "x", "sync": "full"}),
    "mirror to nowhere": ("drive-mirror", {"device": "b", "target": "none/x", "sync": "full"}),
    "mirror to a directory": ("drive-mirror", {"device": "b", "target": ".", "sync": "full"}),
    "mirror to no image": ("drive-mirror", {"device": "b", "target": "junk", "sync": "full", "mode": "existing",
                                            "format": "qcow2"}),
    "mirror to a used image": ("drive-mirror", {"device": "b", "target": "c", "sync": "full", "mode": "existing"}),
    "mirror to a part of another disk": (
        "drive-mirror", {"device": "b", "target": PART_OF_A, "sync": "full", "mode": "existing"}
    ),
    "mirror of negative speed": ("drive-mirror", {"device": "b", "target": "x", "sync": "full", "speed": -1}),
    "mirror with a bad job id": ("drive-mirror", {"device": "b", "target": "x", "sync": "full", "job-id": "9"}),
    "mirror with a used job id": ("drive-mirror", {"device": "b", "target": "x", "sync": "full", "job-id": "busy"}),
    "mirror to itself": ("blockdev-mirror", {"device": "b", "target": "b", "sync": "full"}),
    "mirror to a busy node": ("blockdev-mirror", {"device": "b", "target": "ct", "sync": "full"}),
    "mirror that takes a name": ("blockdev-mirror", {"device": "b", "target": "t", "sync": "full", "job-id": "k",
                                                     "filter-node-name": "ov"}),
}  # fmt: skip


@contextmanager
def machine() -> Iterator[LocalMachine]:
    """Disks a, b and c, of which c is being mirrored, an overlay, a target, and bitmaps; working in a directory of its own."""
    with tempfile.TemporaryDirectory() as place:
        before = os.getcwd()
        os.chdir(place)
        try:
            make_chain(".", SIZE, [("base", {0: b"base"}), ("a", {64 * KiB: b"top"})])
            for name in ("b", "c", "ct", "ov", "t"):
                make_image(name, SIZE)
            make_image("small", MiB, fmt="raw")
            Path("junk").write_text("no image")
            blockdevs = [
                f"driver=qcow2,node-name={name},file.driver=file,file.filename={name}" for name in ("ct", "t")
            ]
            options = MachineOptions(
                drives=[f"{drive_text(name, name, 'qcow2')},node-name={name}-n" for name in "abc"], blockdevs=blockdevs, seed=0
            )
            with LocalMachine(options=options) as local:
                prepare(local)
                yield local
        finally:
            os.chdir(before)


def prepare(local: LocalMachine) -> None:
    execute = local.qmp.execute
    for name, options in (("ov", {"driver": "qcow2", "backing": None}), ("small", {"driver": "raw"})):
        execute("blockdev-add", {"node-name": name, "file": {"driver": "file", "filename": name}, **options})
    for node, name in (("a", "b0"), ("a", "b1"), ("b", "b2"), ("t", "bt"), ("small", "bs")):
        execute("block-dirty-bitmap-add", node=node, name=name)
    local.guest_write("a", 0, 64 * KiB, 1)
    local.guest_write("b", 256 * KiB, 64 * KiB, 2)
    execute("block-dirty-bitmap-disable", node="a", name="b1")
    local.guest_write("a", MiB, 64 * KiB, 3)
    execute("blockdev-mirror", device="c", target="ct", sync="full", job_id="busy")
    local.qmp.wait_event("BLOCK_JOB_READY")
    local.qmp.events()


def picture(local: LocalMachine) -> dict[str, Any]:
    """All that can be seen from outside, and what is behind it."""
    system = local.machine.system
    assert_consistent(system.graph)
    queries = (
        "x-debug-query-block-graph", "query-named-block-nodes", "query-block", "query-jobs", "query-block-jobs"
    )  # fmt: skip
    bitmaps = {
        (node.node_name, bitmap.name): (bitmap.sha256(), bitmap.count, bitmap.enabled, bitmap.busy)
        for node in system.graph.nodes.values()
        for bitmap in node.dirty_bitmaps
    }
    locks = {
        name: sorted(node.driver._locks._locked)
        for name, node in system.graph.nodes.items()
        if getattr(node.driver, "_locks", None) is not None
    }
    return {
        **{query: local.qmp.execute(query) for query in queries},
        "bitmaps": bitmaps,
        "locks": locks,
        "graph": describe_graph(system.graph),
        "backends": [(id(backend), backend.quiesce_counter) for backend in system.graph.backends],
        "blocked": {name: len(node.blockers) for name, node in system.graph.nodes.items()},
        "open files": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors()),
    }


def _descriptors() -> list[str]:
    place = f"{os.getcwd()}/"
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith(place):
                found.append(fd)
        except OSError:
            continue
    return found


def together(local: LocalMachine, actions: list[Action], **properties: Any) -> None:
    local.qmp.execute(
        "transaction",
        {"actions": [{"type": kind, "data": data} for kind, data in actions], "properties": properties},
    )


def check_undone(local: LocalMachine, actions: list[Action], *, grouped: bool) -> None:
    """The transaction fails, and nobody can tell that it was tried but by events of jobs and by files."""
    before = picture(local)
    mode = {"completion-mode": "grouped"} if grouped else {}
    with pytest.raises(QmpError):
        together(local, actions, **mode)
    assert picture(local) == before
    assert not [event for event in local.qmp.events() if event.name != "JOB_STATUS_CHANGE"]
    for device in "abc":
        local.guest_write(device, 512 * KiB, 4 * KiB, 9)
        assert local.guest_read(device, 512 * KiB, 4 * KiB) == bytes([9]) * 4 * KiB
    local.advance("1s")  # the mirror of c copies that


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_nothing_is_left_of_a_transaction_in_which_one_action_fails(place: str) -> None:
    """Whoever automates snapshots of several disks need not know how to clean up after a failure."""
    good = [GOOD[name] for name in ("a new bitmap", "snapshot of a", "disabled on b", "mirror of b's writes")]
    with machine() as local:
        for action in WRONG.values():
            orders = {"first": [action, *good], "middle": [*good[:2], action, *good[2:]], "last": [*good, action]}
            check_undone(local, orders[place], grouped=False)


@pytest.mark.parametrize("steps", range(9))
@pytest.mark.parametrize("fails", [False, True])
def test_a_transaction_whose_caller_is_cancelled_is_done_or_undone(steps: int, fails: bool) -> None:
    """A program that ends while its monitor executes a transaction must not leave half of it."""
    kinds = ("a new bitmap", "snapshot of a", "mirror of a's top", "snapshot of b", "mirror of b's writes")
    actions = [*(GOOD[name] for name in kinds), *([WRONG["abort"]] if fails else [])]
    with machine() as local:
        before = picture(local)
        hub = local.machine.hub
        given = {"actions": [{"type": kind, "data": data} for kind, data in actions]}

        async def interrupted() -> None:
            task = asyncio.ensure_future(hub.commands.find("transaction").run(CommandContext(hub), given))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

        local.run(interrupted())
        not_begun = steps < 2
        if fails or not_begun:
            assert picture(local) == before
            return
        assert_consistent(local.machine.system.graph)
        assert {job["device"] for job in local.qmp.execute("query-block-jobs")} == {"busy", "b", "j"}
        assert [disk["inserted"]["backing_file_depth"] for disk in local.qmp.execute("query-block")] == [2, 1, 0]


@settings(max_examples=25)
@given(
    before=st.lists(st.sampled_from(sorted(GOOD)), max_size=4),
    wrong=st.sampled_from(sorted(WRONG)),
    after=st.lists(st.sampled_from(sorted(GOOD)), max_size=2),
    grouped=st.booleans(),
)
def test_any_transaction_with_an_action_that_fails_is_undone(
    before: list[str], wrong: str, after: list[str], grouped: bool
) -> None:
    """In any company, and where an earlier action is what makes a later one fail."""
    with machine() as local:
        check_undone(local, [*(GOOD[name] for name in before), WRONG[wrong], *(GOOD[name] for name in after)], grouped=grouped)
        together(local, [GOOD["snapshot of a"], GOOD["full mirror of a"], GOOD["write-blocking mirror"]])
        local.qmp.wait_event("BLOCK_JOB_READY", device="a")
        local.qmp.execute("block-job-complete", device="a")
        local.qmp.wait_event("BLOCK_JOB_COMPLETED", device="a")
        assert_consistent(local.machine.system.graph)
