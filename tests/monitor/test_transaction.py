"""transaction as a client sees it: several disks at one moment, mirrors among the actions, jobs that end together."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qblock.monitor.client import QmpClient, QmpError
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import MachineOptions
from qblock.testing.images import make_chain, make_image
from qblock.testing.machines import LocalMachine, drive_text
from qblock.units import KiB, MiB

SIZE = 2 * MiB
BLOCK = 64 * KiB


def machine(directory: Path, dialect: Dialect = Dialect.SYSTEM) -> LocalMachine:
    """Disks a (a chain of two) and b."""
    *_, top = make_chain(directory, SIZE, [("base", {0: b"base"}), ("a", {BLOCK: b"top"})])
    drives = [drive_text(top, "a", "qcow2"), drive_text(make_image(directory / "b", SIZE), "b", "qcow2")]
    return LocalMachine(options=MachineOptions(drives=drives, seed=0, dialect=dialect))


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalMachine]:
    """A machine of today's dialect."""
    with machine(tmp_path) as opened:
        yield opened


def together(local: LocalMachine, *actions: tuple[str, Mapping[str, Any]], **properties: Any) -> None:
    """Execute a transaction; keywords of its properties have ``_`` for ``-``."""
    given: dict[str, Any] = {"actions": [{"type": kind, "data": data} for kind, data in actions]}
    if properties:
        given["properties"] = {key.replace("_", "-"): value for key, value in properties.items()}
    local.qmp.execute("transaction", given)


def mirror(device: str, target: Path, sync: str = "full", **members: Any) -> tuple[str, dict[str, Any]]:
    """drive-mirror in a transaction."""
    return "drive-mirror", {"device": device, "target": str(target), "sync": sync, **members}


def snapshot(device: str, target: Path, **members: Any) -> tuple[str, dict[str, Any]]:
    """blockdev-snapshot-sync in a transaction."""
    return "blockdev-snapshot-sync", {"device": device, "snapshot-file": str(target), **members}


def stories(local: LocalMachine) -> dict[str, list[str]]:
    """By job what the events have told since the last time."""
    told: dict[str, list[str]] = {}
    for event in local.qmp.events():
        name = str(event.data.get("id", event.data.get("device")))
        word = str(event.data["status"]) if event.name == "JOB_STATUS_CHANGE" else event.name.removeprefix("BLOCK_JOB_")
        told.setdefault(name, []).append(word)
    return told


def test_mirrors_of_two_disks_start_at_once_and_end_one_by_one(local: LocalMachine, tmp_path: Path) -> None:
    """Jobs of a transaction are independent unless they are grouped."""
    together(local, mirror("a", tmp_path / "a2"), mirror("b", tmp_path / "b2"), completion_mode="individual")
    local.qmp.wait_event("BLOCK_JOB_READY", device="a")
    local.advance("1s")
    start = ["created", "running", "paused", "running", "ready", "READY"]
    assert stories(local) == {"a": start[:-1], "b": start}
    local.qmp.execute("block-job-complete", device="a")
    local.qmp.wait_event("JOB_STATUS_CHANGE", id="a", status="null")
    (job,) = local.qmp.execute("query-block-jobs")
    assert (job["device"], job["ready"]) == ("b", True)
    local.qmp.execute("block-job-cancel", device="b", force=True)
    local.qmp.wait_event("BLOCK_JOB_CANCELLED", device="b")


def test_mirrors_of_a_group_end_together(local: LocalMachine, tmp_path: Path) -> None:
    """Both disks switch at one moment; until the second one is told to, the first one's guest goes on."""
    together(local, mirror("a", tmp_path / "a2"), mirror("b", tmp_path / "b2"), completion_mode="grouped")
    local.qmp.wait_event("BLOCK_JOB_READY", device="a")
    local.advance("1s")
    local.qmp.events()
    local.qmp.execute("block-job-complete", device="a")
    local.guest_write("a", 0, BLOCK, 7)
    local.advance("1s")
    assert [job["status"] for job in local.qmp.execute("query-block-jobs")] == ["ready", "ready"]
    local.qmp.execute("block-job-complete", device="b")
    local.qmp.wait_event("JOB_STATUS_CHANGE", id="a", status="null")
    assert stories(local) == {
        "b": ["waiting", "pending", "COMPLETED", "concluded", "null"],
        "a": ["waiting", "pending", "COMPLETED", "concluded"],
    }
    assert [disk["inserted"]["file"] for disk in local.qmp.execute("query-block")] == [
        str(tmp_path / name) for name in ("a2", "b2")
    ]
    assert local.guest_read("a", 0, BLOCK) == bytes([7]) * BLOCK


@pytest.mark.parametrize("reason", ["cancel", "error"])
def test_one_that_fails_takes_its_group_with_it(local: LocalMachine, tmp_path: Path, reason: str) -> None:
    """A copy of one disk is of no use without that of the other."""
    small = make_image(tmp_path / "small", MiB)
    bad = mirror("b", small, mode="existing") if reason == "error" else mirror("b", tmp_path / "b2")
    together(local, mirror("a", tmp_path / "a2", speed=KiB), bad, completion_mode="grouped")
    if reason == "cancel":
        local.qmp.execute("block-job-cancel", device="b", force=True)
    local.qmp.wait_event("BLOCK_JOB_CANCELLED", device="a")
    local.advance("1s")
    assert local.qmp.execute("query-jobs") == []
    end = "CANCELLED" if reason == "cancel" else "COMPLETED"
    names = [event.name for event in local.qmp.events() if event.data.get("device") == "b"]
    assert [name for name in names if name != "BLOCK_JOB_READY"] == [f"BLOCK_JOB_{end}"]
    assert [disk["inserted"]["file"] for disk in local.qmp.execute("query-block")] == [
        str(tmp_path / name) for name in "ab"
    ]


def test_a_snapshot_and_a_mirror_of_what_it_has_put_on_top(local: LocalMachine, tmp_path: Path) -> None:
    """What libvirt does with two commands, and a race between them: the mirror begins with an empty layer."""
    together(local, snapshot("a", tmp_path / "snap"), mirror("a", tmp_path / "copy", "top"))
    local.qmp.wait_event("BLOCK_JOB_READY", device="a", len=0)
    local.guest_write("a", MiB, BLOCK, 5)
    local.advance("1s")
    local.qmp.execute("block-job-complete", device="a")
    local.qmp.wait_event("JOB_STATUS_CHANGE", id="a", status="null")
    (disk, _) = local.qmp.execute("query-block")
    image = disk["inserted"]["image"]
    assert (image["filename"], image["backing-filename"]) == (str(tmp_path / "copy"), str(tmp_path / "a"))
    assert local.guest_read("a", MiB, BLOCK) == bytes([5]) * BLOCK
    assert local.guest_read("a", BLOCK, 512)[:3] == b"top"


def test_what_a_mirror_forbids_it_forbids_to_the_actions_after_it(local: LocalMachine, tmp_path: Path) -> None:
    """The order counts: a disk that is being mirrored gets no snapshot."""
    with pytest.raises(QmpError):
        together(local, mirror("a", tmp_path / "copy", "top"), snapshot("a", tmp_path / "snap"))
    assert stories(local) == {"a": ["created", "aborting", "concluded", "null"]}
    assert local.qmp.execute("query-jobs") == []
    assert (tmp_path / "copy").exists(), "files that were made stay"


def test_a_bitmap_that_is_added_with_a_snapshot_knows_what_came_after_it(local: LocalMachine, tmp_path: Path) -> None:
    """An incremental backup starts here: what is not in the snapshot is in the bitmap."""
    together(
        local,
        snapshot("a", tmp_path / "snap", **{"snapshot-node-name": "top"}),
        ("block-dirty-bitmap-add", {"node": "a", "name": "since"}),
    )
    local.guest_write("a", MiB, BLOCK, 5)
    (disk, _) = local.qmp.execute("query-block")
    ((bitmap,), node) = disk["inserted"]["dirty-bitmaps"], disk["inserted"]["node-name"]
    assert (bitmap["name"], bitmap["count"], node) == ("since", BLOCK, "top")


def test_no_other_command_sees_a_transaction_half_done(local: LocalMachine, tmp_path: Path) -> None:
    """Another client that looks at the disks sees both overlays or none."""
    qmp = local.qmp.client
    actions = [{"type": kind, "data": data} for kind, data in (
        snapshot("a", tmp_path / "s1"), snapshot("b", tmp_path / "s2"), snapshot("a", tmp_path / "s3"), ("abort", {}),
    )]  # fmt: skip
    seen = []

    async def main() -> None:
        other = await QmpClient.in_process(local.machine.hub)
        task = asyncio.ensure_future(qmp.execute("transaction", {"actions": actions}))
        while not task.done():
            await asyncio.sleep(0)
            disks = await other.execute("query-block")
            seen.append([disk["inserted"]["backing_file_depth"] for disk in disks])
        with pytest.raises(QmpError):
            await task
        await other.close()

    local.run(main())
    assert seen and all(depths == [1, 0] for depths in seen)


@pytest.mark.parametrize("actions", [[], [("abort", {})]])
def test_nothing_to_do_and_nothing_done(local: LocalMachine, actions: list[tuple[str, dict[str, Any]]]) -> None:
    """An empty transaction succeeds; one that only aborts does not."""
    if actions:
        with pytest.raises(QmpError) as raised:
            together(local, *actions)
        assert raised.value.error_class == "GenericError"
    else:
        together(local)


@pytest.mark.qemu
def test_the_images_of_a_transaction_are_sound_for_the_real_program(tmp_path: Path) -> None:
    """Overlays, what is below them, and copies of both disks of one moment, made while the guest wrote."""
    with machine(tmp_path) as local:
        together(
            local, snapshot("a", tmp_path / "a1"), snapshot("b", tmp_path / "b1"),
            mirror("a", tmp_path / "a2"), mirror("b", tmp_path / "b2"),
        )  # fmt: skip
        for number in range(8):
            local.guest_write("a", number * 3 * BLOCK, BLOCK, number + 1)
            local.guest_write("b", number * 3 * BLOCK, BLOCK, number + 1)
        for device in "ab":
            local.qmp.wait_event("BLOCK_JOB_READY", device=device)
            local.qmp.execute("block-job-cancel", device=device)
            local.qmp.wait_event("BLOCK_JOB_COMPLETED", device=device)
    for name in ("a", "a1", "a2", "b", "b1", "b2"):
        subprocess.run(["qemu-img", "check", "-q", str(tmp_path / name)], check=True)
    for name in "ab":
        subprocess.run(["qemu-img", "compare", "-q", str(tmp_path / f"{name}1"), str(tmp_path / f"{name}2")], check=True)
    info = subprocess.run(["qemu-img", "info", "--output=json", str(tmp_path / "b1")], check=True, capture_output=True)
    assert json.loads(info.stdout)["full-backing-filename"] == str(tmp_path / "b")


# ----------------------------------------------------------------------------------------------------------- the dialects


@pytest.mark.parametrize("dialect", [Dialect.RFC_2012, Dialect.BLKMIRROR_2012, Dialect.BLOCK_COPY_2011])
def test_transactions_of_2012_take_no_properties_and_few_actions(tmp_path: Path, dialect: Dialect) -> None:
    """As QEMU 1.1 had them."""
    with machine(tmp_path, dialect) as local:
        with pytest.raises(QmpError):
            together(local, completion_mode="individual")
        with pytest.raises(QmpError) as raised:
            together(local, ("abort", {}))
        assert raised.value.error_class == "InvalidParameter"
        together(local, snapshot("a", tmp_path / "s1"), snapshot("b", tmp_path / "s2"))
        disks = local.qmp.execute("query-block")
        assert [disk["inserted"]["file"] for disk in disks] == [str(tmp_path / "s1"), str(tmp_path / "s2")]


def test_the_mirror_of_april_2012_in_a_transaction(tmp_path: Path) -> None:
    """What the announcement leaves out for simplicity: two disks are mirrored from one moment on."""
    with machine(tmp_path, Dialect.RFC_2012) as local:
        copies = [("drive-mirror", {"device": d, "target": str(tmp_path / f"{d}2"), "full": True}) for d in "ab"]
        with pytest.raises(QmpError) as raised:
            together(local, *copies, snapshot("nope", tmp_path / "s"))
        assert raised.value.error_class == "DeviceNotFound"
        assert local.qmp.execute("query-block-jobs") == [] and local.qmp.events() == []
        with pytest.raises(QmpError) as raised:
            together(local, *copies, snapshot("a", tmp_path / "s"))
        assert raised.value.error_class == "DeviceInUse"
        together(local, *copies)
        local.advance("5s")
        jobs = local.qmp.execute("query-block-jobs")
        assert all(job["offset"] == job["len"] == SIZE for job in jobs)
        assert {job["device"] for job in jobs} == {"a", "b"}
        local.guest_write("a", 0, BLOCK, 7)
        for device in "ab":
            local.qmp.execute("block-job-cancel", device=device)
            local.qmp.wait_event("BLOCK_JOB_COMPLETED", device=device)


def test_the_mirror_of_march_2012_in_a_transaction(tmp_path: Path) -> None:
    """A snapshot and a mirror of it, as the proposal of blkmirror has it; a failure takes the mirror out again."""
    with machine(tmp_path, Dialect.BLKMIRROR_2012) as local:
        copy = ("drive-mirror", {"device": "a", "target": str(tmp_path / "a2"), "format": "qcow2"})
        with pytest.raises(QmpError):
            together(local, snapshot("a", tmp_path / "s1"), copy, snapshot("nope", tmp_path / "s2"))
        (disk, _) = local.qmp.execute("query-block")
        assert disk["inserted"]["file"] == str(tmp_path / "a")
        together(local, snapshot("a", tmp_path / "s1"), copy)
        local.guest_write("a", 0, BLOCK, 7)
        (disk, _) = local.qmp.execute("query-block")
        assert disk["inserted"]["drv"] == "blkmirror"
