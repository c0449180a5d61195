"""drive-reopen when it cannot: errors by class, the way back to the old image, and others who come in between."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qblock.drive_reopen import Witness, drive_reopen
from qblock.errors import BlockIOError, DeviceInUse, QBlockError
from qblock.monitor.client import QmpClient, QmpError
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import MachineOptions
from qblock.testing.images import make_image
from qblock.testing.machines import LocalMachine
from reopen_desk import MACHINES, NEW, OLD, SIZE, Desk, desk, error_of, no_descriptor_is_left, on_step, prove

# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("dialect", MACHINES)
def test_the_witness_is_looked_up_first_and_then_the_device(dialect: Dialect, tmp_path: Path) -> None:
    """Errors come in the order of the steps; a witness that was named is used up by an error behind it."""
    with desk(tmp_path, dialect) as table:
        ask = table.local.qmp.execute
        arguments = {"device": "nosuch", "new-image-file": str(tmp_path / "new"), "witness": "w"}
        assert error_of(ask, "drive-reopen", arguments).error_class == "FdNotFound"
        table.name_witness()
        with no_descriptor_is_left(table, kept=-1):
            assert error_of(ask, "drive-reopen", arguments).error_class == "DeviceNotFound"
        assert error_of(ask, "drive-reopen", arguments).error_class == "FdNotFound"
        assert table.steps == []


def test_the_name_of_a_node_is_no_device(tmp_path: Path) -> None:
    """The medium of a drive is exchanged, and a node has none."""
    with desk(tmp_path) as table:
        node = table.backend.node.node_name
        error = error_of(table.local.qmp.execute, "drive-reopen", device=node, new_image_file="x")
        assert error.error_class == "DeviceNotFound"


def monitors_own(table: Desk) -> str:
    table.backend.node.monitor_owned = True
    return "monitor"


def overlay(table: Desk) -> str:
    make_image(table.path / "above", SIZE)
    table.local.qmp.execute(
        "blockdev-add", driver="qcow2", node_name="above", backing=table.backend.node.node_name, read_only=True,
        file={"driver": "file", "filename": str(table.path / "above")},
    )  # fmt: skip
    return "node 'above'"


def targeted(table: Desk) -> str:
    make_image(table.path / "second", SIZE, {0: OLD})
    table.local.add_drive(table.path / "second", device="virtio1")
    table.backend.set_permissions(
        table.backend.perm & ~table.backend.perm, table.backend.shared
    )
    table.local.qmp.execute("blockdev-mirror", job_id="j", device="virtio1", target="virtio0", sync="full", speed=1)
    return "job 'j'"


def concluded(table: Desk) -> str:
    for name in ("middle", "top"):
        table.local.qmp.execute("blockdev-snapshot-sync", device="virtio0", snapshot_file=str(table.path / name))
    middle = str(table.path / "middle")
    table.local.qmp.execute("block-commit", job_id="j", device="virtio0", top=middle, auto_dismiss=False)
    table.local.qmp.wait_event("JOB_STATUS_CHANGE", status="concluded")
    return "job 'j'"


@pytest.mark.parametrize("holder", [monitors_own, overlay, concluded])
def test_an_image_that_somebody_else_uses_is_not_left(holder: Callable[[Desk], str], tmp_path: Path) -> None:
    """It would stay open behind the guest's back; the error says who has it."""
    with desk(tmp_path) as table:
        named = holder(table)
        node = table.backend.node
        blockers = node.blockers.copy()
        error = error_of(table.reopen)
        assert error.error_class == "DeviceInUse"
        assert named in str(error)
        assert table.backend.node is node
        assert table.steps == ["begin"]
        assert node.blockers == blockers


def test_the_target_of_anothers_mirror_is_not_left_and_the_job_goes_on(tmp_path: Path) -> None:
    """The job is not this drive's, so it is not cancelled."""
    with desk(tmp_path, drive="format=qcow2,if=none") as table:
        named = targeted(table)
        error = error_of(table.reopen)
        assert error.error_class == "DeviceInUse"
        assert named in str(error)
        assert len(table.local.qmp.execute("query-block-jobs")) == 1


def test_somebody_who_comes_while_requests_end_is_noticed(tmp_path: Path) -> None:
    """What was checked before a wait is checked again after it."""
    with desk(tmp_path) as table:
        root = table.backend.node
        on_step(table, "flushed", lambda: setattr(root, "monitor_owned", True))
        assert error_of(table.reopen).error_class == "DeviceInUse"
        assert table.backend.node is root
        assert not root.blockers


def test_an_unknown_format_is_refused_before_anything_is_closed(tmp_path: Path) -> None:
    """The lookup is a step of its own."""
    with desk(tmp_path) as table:
        table.name_witness()
        node = table.backend.node
        with no_descriptor_is_left(table, kept=-1):
            assert "'vhdx9'" in str(error_of(table.reopen, format="vhdx9", witness="w"))
        assert table.backend.node is node
        assert table.steps == ["begin"]


@pytest.mark.parametrize("dialect", MACHINES)
def test_a_flush_that_fails_closes_nothing(dialect: Dialect, tmp_path: Path) -> None:
    """Class IOError; the guest goes on with what it has."""
    rule = "file.inject-error.0.event=none,file.inject-error.0.iotype=flush,file.inject-error.0.errno=5"
    make_image(tmp_path / "old", SIZE, {0: OLD})
    make_image(tmp_path / "new", SIZE, {0: NEW})
    options = f"format=qcow2,file.driver=blkdebug,file.image.driver=file,file.image.filename={tmp_path}/old,{rule}"
    with LocalMachine(
        options=MachineOptions(seed=0, dialect=dialect, drives=(f"if=virtio,id=virtio0,{options}",))
    ) as local:
        table = Desk(local, tmp_path)
        table.name_witness()
        node = table.backend.node
        local.guest_write("virtio0", 0, 4096, 7)
        with no_descriptor_is_left(table, kept=-1):
            error = error_of(table.reopen, witness="w")
        assert error.error_class == "IOError"
        assert "virtio0" in str(error)
        assert table.backend.node is node
        assert local.guest_read("virtio0", 0, 512) == b"\x07" * 512


# ---------------------------------------------------------------------------------------------------------- the way back


def bad_witness(table: Desk) -> dict[str, str]:
    async def pass_on() -> None:
        fd = os.open("/dev/full", os.O_WRONLY)
        await table.local.qmp.client.execute("getfd", fdname="w", fds=[fd])
        os.close(fd)

    table.local.run(pass_on())
    return {"filename": "new", "witness": "w"}


def closed_pipe(table: Desk) -> dict[str, str]:
    async def pass_on() -> None:
        reader, writer = os.pipe()
        await table.local.qmp.client.execute("getfd", fdname="w", fds=[writer])
        os.close(reader)
        os.close(writer)

    table.local.run(pass_on())
    return {"filename": "new", "witness": "w"}


def missing(table: Desk) -> dict[str, str]:
    return {"filename": "nosuch"}


def wrong_format(table: Desk) -> dict[str, str]:
    make_image(table.path / "raw", SIZE, {0: NEW}, fmt="raw")
    return {"filename": "raw", "format": "qcow2"}


def missing_backing(table: Desk) -> dict[str, str]:
    make_image(table.path / "gone", SIZE)
    make_image(table.path / "above", SIZE, backing=table.path / "gone")
    (table.path / "gone").unlink()
    return {"filename": "above"}


def in_use(table: Desk) -> dict[str, str]:
    table.local.add_drive(table.path / "new", device="virtio1")
    return {"filename": "new"}


@pytest.mark.parametrize("failure", [missing, wrong_format, missing_backing, in_use, bad_witness, closed_pipe])
@pytest.mark.parametrize("dialect", MACHINES)
def test_a_failure_behind_the_closing_brings_the_old_image_back(
    failure: Callable[[Desk], dict[str, str]], dialect: Dialect, tmp_path: Path
) -> None:
    """A guest that writes does not notice; the error names the new image; nothing of the new one stays."""
    drive = "format=qcow2,node-name=mine,cache=none,discard=unmap,detect-zeroes=on"
    with desk(tmp_path, dialect, drive) as table:
        table.start_guest()
        table.local.advance("100ms")
        arguments = failure(table)
        before = table.local.qmp.hmp("info block -n -v")
        with no_descriptor_is_left(table, kept=-1 if "witness" in arguments else 0):
            error = error_of(table.reopen, **arguments)
        assert error.error_class == "OpenFileFailed"
        assert str(tmp_path / arguments["filename"]) in str(error)
        assert table.steps[-1] == "rollback"
        assert ("opened" in table.steps) is ("witness" in arguments)
        assert table.medium() == "old"
        assert table.backend.node.node_name == "mine"
        assert without_automatic_names(table.local.qmp.hmp("info block -n -v")) == without_automatic_names(before)
        table.local.advance("100ms")
        table.stop_guest()
        assert table.guest.counters.failed == 0
        table.local.qmp.hmp("drive_del virtio0")
        table.local.qmp.hmp("drive_del virtio1")
        assert not table.local.machine.system.graph.nodes
        assert prove(table.guest.content, tmp_path / "old")


def without_automatic_names(text: str) -> str:
    lines = (line for line in text.splitlines() if " size" not in line)
    return "\n".join(sorted("#:" + line.partition(":")[2] if line.startswith("#") else line for line in lines))


def test_a_failure_that_is_a_bug_brings_the_old_image_back_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The person sees the bug, the guest does not."""
    with desk(tmp_path) as table:
        monkeypatch.setattr(Witness, "write", lambda self, executor: 1 // 0)
        complaints: list[str] = []
        monkeypatch.setattr(table.local.machine.hub, "report", complaints.append)
        table.name_witness()
        with no_descriptor_is_left(table, kept=-1):
            assert "ZeroDivisionError" in str(error_of(table.reopen, witness="w"))
        assert len(complaints) == 1
        assert table.medium() == "old"
        table.local.guest_write("virtio0", 0, 4096, 1)


@pytest.mark.parametrize("dialect", MACHINES)
def test_a_drive_whose_old_image_cannot_come_back_is_empty_until_it_gets_another(
    dialect: Dialect, tmp_path: Path
) -> None:
    """The error names the old image; the guest gets ENOMEDIUM; drive-reopen works from there, by the flags it had."""
    with desk(tmp_path, dialect, "format=qcow2,discard=unmap") as table:
        guest, name = table.guest, tmp_path / "elsewhere"
        on_step(table, "closed", partial((tmp_path / "old").rename, name))
        table.name_witness()
        with no_descriptor_is_left(table, kept=-1):
            error = error_of(table.reopen, "nosuch", witness="w")
        assert error.error_class == "OpenFileFailed"
        assert f"'{tmp_path}/old'" in str(error).partition(";")[0]
        assert table.steps == ["begin", "drained", "flushed", "closed", "rollback", "lost"]
        assert table.medium() is None
        (drive,) = table.local.qmp.execute("query-block")
        assert "inserted" not in drive
        with pytest.raises(BlockIOError, match="no medium"):
            table.local.guest_write("virtio0", 0, 4096, 1)
        table.start_guest()
        table.local.advance("10ms")
        assert guest.counters.failed > 1
        table.steps.clear()

        assert error_of(table.reopen, "nosuch").error_class == "OpenFileFailed"
        assert table.steps == ["begin"]
        table.name_witness()
        table.reopen("elsewhere", witness="w")
        assert (tmp_path / "witness").stat().st_size == 1
        failed = guest.counters.failed
        table.local.advance("100ms")
        table.stop_guest()
        assert guest.counters.failed == failed
        assert guest.disk.backend.node.discard_unmap
        assert guest.disk.backend.perm == guest.disk.backend.node.perm


# ---------------------------------------------------------------------------------------------------- others meanwhile

STEPS = ("begin", "drained", "flushed", "closed", "opened", "witness_written", "witness_synced", "done")


@pytest.mark.parametrize("step", STEPS)
def test_a_caller_that_is_cancelled_does_not_stop_it_half_way(step: str, tmp_path: Path) -> None:
    """A drive is on one image or on the other, never on none; the witness is closed."""
    with desk(tmp_path) as table:

        async def body() -> None:
            witness = Witness(os.open(tmp_path / "witness", os.O_WRONLY | os.O_CREAT), "w")
            system = table.local.machine.system
            task = asyncio.create_task(
                drive_reopen(system, device="virtio0", filename=f"{tmp_path}/new", fmt=None, witness=witness)
            )
            on_step(table, step, task.cancel)
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(1)
            assert witness.closed

        with no_descriptor_is_left(table):
            table.local.run(body())
        assert table.steps == list(STEPS)
        assert table.medium() == "new"
        table.local.guest_write("virtio0", 0, 4096, 1)


def test_a_system_that_is_closed_waits_for_it(tmp_path: Path) -> None:
    """Nothing may be opened behind the back of who thinks that all is closed."""
    with desk(tmp_path) as table:
        system = table.local.machine.system

        async def body() -> None:
            task = asyncio.create_task(
                drive_reopen(system, device="virtio0", filename=f"{tmp_path}/new", fmt=None, witness=None)
            )
            await asyncio.sleep(0.0005)
            task.cancel()
            assert table.steps
            assert "closed" not in table.steps
            await system.close()
            assert table.steps[-1] == "done"
            assert not system.graph.nodes

        table.local.run(body())


@pytest.mark.parametrize("step", ["begin", "drained", "flushed", "closed"])
def test_nobody_else_changes_the_medium_meanwhile(step: str, tmp_path: Path) -> None:
    """Two of them at once would open two images for one drive."""
    with desk(tmp_path) as table:
        system = table.local.machine.system
        refused: list[str] = []

        async def meddle() -> None:
            try:
                await drive_reopen(system, device="virtio0", filename=f"{tmp_path}/new", fmt=None, witness=None)
            except DeviceInUse as error:
                refused.append(str(error))
            try:
                await system.drive_del("virtio0")
            except QBlockError as error:
                refused.append(str(error))

        tasks: list[asyncio.Task[None]] = []
        on_step(table, step, lambda: tasks.append(asyncio.ensure_future(meddle())))
        table.name_witness()
        table.reopen(witness="w")
        assert len(refused) == 2
        assert all("being changed" in text for text in refused)
        assert table.medium() == "new"


@pytest.mark.parametrize("command", ["drive-mirror", "blockdev-snapshot-sync"])
@pytest.mark.parametrize("delay", range(0, 16_000, 2_000))
def test_who_had_looked_up_the_old_image_does_not_get_a_closed_one(command: str, delay: int, tmp_path: Path) -> None:
    """Another monitor's command may be under way while the image under it goes; it works, or it fails, at any moment."""
    with desk(tmp_path) as table:
        members = {
            "drive-mirror": {"target": f"{tmp_path}/copy", "format": "qcow2", "sync": "full", "job-id": "j"},
            "blockdev-snapshot-sync": {"snapshot-file": f"{tmp_path}/overlay", "format": "qcow2"},
        }[command]

        async def body() -> list[object]:
            async with await QmpClient.in_process(table.local.machine.hub) as other:
                theirs = asyncio.ensure_future(other.execute(command, {"device": "virtio0", **members}))
                await asyncio.sleep(delay / 1e6)
                ours = table.local.qmp.client.execute(
                    "drive-reopen", device="virtio0", new_image_file=f"{tmp_path}/new"
                )
                return await asyncio.gather(theirs, ours, return_exceptions=True)

        theirs, ours = table.local.run(body())
        assert {type(result) for result in (theirs, ours)} <= {dict, QmpError}
        assert not [text for text in map(str, (theirs, ours)) if "Internal error" in text]
        if ours == {}:
            assert table.medium() in ("new", "overlay")
        table.local.guest_write("virtio0", 0, 4096, 1)
        assert not [node for node in table.local.machine.system.graph.nodes.values() if node.closed]
