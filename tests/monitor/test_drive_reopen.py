"""drive-reopen as a client of the monitor sees it: the order of steps, what the guest notices, what becomes of a job."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from qblock.drive_reopen import drive_reopen
from qblock.errors import BlockIOError
from qblock.image import create, open_image
from qblock.monitor.dialects import Dialect
from qblock.testing.images import make_chain, make_image
from qblock.units import MiB
from reopen_desk import MACHINES, NEW, OLD, SIZE, desk, error_of, no_descriptor_is_left, on_step, prove

# ------------------------------------------------------------------------------------------------------- the way forward


@pytest.mark.parametrize("dialect", MACHINES)
def test_a_drive_gets_its_new_image_and_a_witness_is_left(dialect: Dialect, tmp_path: Path) -> None:
    """The whole protocol: the byte is there, durable and closed before the reply."""
    with desk(tmp_path, dialect) as table:
        table.name_witness()
        lengths: dict[str, int] = {}
        for step in ("opened", "witness_written", "done"):
            on_step(table, step, partial(lambda at: lengths.update({at: (tmp_path / "witness").stat().st_size}), step))
        assert table.reopen(witness="w") == {}
        assert lengths == {"opened": 0, "witness_written": 1, "done": 1}
        assert table.steps == [
            "begin", "drained", "flushed", "closed", "opened", "witness_written", "witness_synced", "done"
        ]  # fmt: skip
        assert table.local.guest_read("virtio0", 0, 512) == NEW[:512]
        assert error_of(table.reopen, witness="w").error_class == "FdNotFound"
        assert table.medium() == "new"


def test_without_a_witness_the_steps_are_the_same(tmp_path: Path) -> None:
    """It is optional, and the format is probed."""
    with desk(tmp_path) as table:
        table.reopen()
        assert table.steps == ["begin", "drained", "flushed", "closed", "opened", "done"]


@pytest.mark.parametrize("dialect", MACHINES)
def test_a_guest_that_writes_throughout_loses_nothing_when_it_moves_to_a_mirrors_target(
    dialect: Dialect, tmp_path: Path
) -> None:
    """What it was made for: the job completes, and every write is on the copy."""
    with desk(tmp_path, dialect) as table:
        table.start_guest()
        table.local.advance("200ms")
        table.mirror_until_in_sync()
        table.local.advance("200ms")
        table.name_witness()
        table.reopen("copy", witness="w")
        assert table.steps[:3] == ["begin", "job_cancelled", "drained"]
        assert table.local.qmp.execute("query-block-jobs") == []
        assert table.local.qmp.wait_event("BLOCK_JOB_COMPLETED", within="1ms").data["device"] == "virtio0"
        old = (tmp_path / "old").read_bytes()
        table.local.advance("500ms")
        table.stop_guest()
        assert table.guest.counters.failed == 0
        assert table.medium() == "copy"
        assert (tmp_path / "old").read_bytes() == old
        table.local.qmp.hmp("drive_del virtio0")
        assert prove(table.guest.content, tmp_path / "copy") > MiB


def test_requests_of_the_guest_wait_until_the_witness_is_durable(tmp_path: Path) -> None:
    """Byte absent: nothing has gone to the new image. Not even while the old one is there already no more."""
    with desk(tmp_path) as table:
        table.name_witness()
        pending: dict[str, asyncio.Task[None]] = {}
        for number, step in enumerate(("begin", "flushed", "closed", "opened", "witness_written", "witness_synced")):

            def write(step: str = step, offset: int = MiB + number * 4096) -> None:
                pending[step] = asyncio.ensure_future(table.guest.write(offset, 4096, 0x77))

            on_step(table, step, write)
        ends: list[bool] = []
        on_step(table, "done", lambda: ends.extend(task.done() for task in pending.values()))
        table.reopen(witness="w")
        assert ends == [False] * 6
        table.local.advance("1ms")
        assert all(task.done() and task.exception() is None for task in pending.values())
        table.local.run(table.guest.flush())
        for number in range(6):
            assert table.local.guest_read("virtio0", MiB + number * 4096, 512) == b"\x77" * 512
    with open_image(tmp_path / "old") as image:
        assert image.read(MiB, 6 * 4096) == bytes(6 * 4096)


def test_a_write_under_way_ends_in_the_old_image(tmp_path: Path) -> None:
    """It was acknowledged there, and a copy that is complete has it."""
    with desk(tmp_path) as table:
        node = table.backend.node
        write = table.guest.write(4096, 4096, 0x55)

        async def both() -> None:
            started = asyncio.ensure_future(write)
            node.in_flight += 1  # somebody's request that ends only later
            reopening = asyncio.ensure_future(
                drive_reopen(
                    table.local.machine.system, device="virtio0", filename=f"{tmp_path}/new", fmt=None, witness=None
                )
            )
            await asyncio.sleep(1)
            assert started.done()
            assert table.steps == ["begin"]
            node.in_flight -= 1
            node.wake_idle_waiters()
            await reopening

        table.local.run(both())
    with open_image(tmp_path / "old") as image:
        assert image.read(4096, 4096) == b"\x55" * 4096


def test_a_chain_is_opened_as_a_drive_opens_it(tmp_path: Path) -> None:
    """The old image may well be the backing file of the new one, which needs it closed or at least not written to."""
    with desk(tmp_path) as table:
        create(tmp_path / "overlay", SIZE, backing="old", backing_fmt="qcow2")
        table.reopen("overlay")
        assert "chain depth: 1" in table.local.qmp.hmp("info block")
        assert table.local.guest_read("virtio0", 0, 512) == OLD[:512]


def test_relative_and_json_names_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They mean what they mean for -drive."""
    with desk(tmp_path) as table:
        monkeypatch.chdir(tmp_path)
        table.local.qmp.execute("drive-reopen", device="virtio0", new_image_file="new")
        assert table.medium() == "new"
        name = 'json:{"driver": "qcow2", "node-name": "named", "file": {"driver": "file", "filename": "old"}}'
        table.local.qmp.execute("drive-reopen", device="virtio0", new_image_file=name)
        assert table.local.machine.system.graph.find_backend("virtio0").node.node_name == "named"


@pytest.mark.parametrize("fmt", [None, "raw"])
def test_a_new_image_without_a_format_is_probed(fmt: str | None, tmp_path: Path) -> None:
    """One that is guessed to be raw has its restriction."""
    with desk(tmp_path) as table:
        make_image(tmp_path / "raw", SIZE, {0: NEW}, fmt="raw")
        table.reopen("raw", **({} if fmt is None else {"format": fmt}))
        node = table.local.machine.system.graph.find_backend("virtio0").node
        assert (node.driver.name, node.probed) == ("raw", fmt is None)


@pytest.mark.parametrize(
    ("drive", "flags"),
    [
        ("cache=none", {"cache_direct": True}),
        ("cache=unsafe,discard=unmap", {"cache_no_flush": True, "discard_unmap": True}),
        ("discard=unmap,detect-zeroes=unmap", {"detect_zeroes": "unmap"}),
        ("readonly=on", {"read_only": True}),
        ("copy-on-read=on", {"copy_on_read": 1}),
    ],
)
def test_the_new_image_is_opened_by_the_flags_of_the_old_one(
    drive: str, flags: Mapping[str, object], tmp_path: Path
) -> None:
    """The drive is the same drive. A second time, too."""
    with desk(tmp_path, drive=f"format=qcow2,{drive}") as table:
        for name in ("new", "old"):
            table.reopen(name)
            node = table.local.machine.system.graph.find_backend("virtio0").node
            assert {flag: getattr(node, flag) for flag in flags} == flags


@pytest.mark.parametrize("size", [SIZE // 2, SIZE * 2])
def test_a_guest_is_told_of_another_size(size: int, tmp_path: Path) -> None:
    """As with block_resize: its requests are measured by the new size from then on."""
    with desk(tmp_path) as table:
        make_image(tmp_path / "other", size)
        guest = table.guest
        assert guest.content.size == SIZE
        table.reopen("other")
        assert guest.content.size == size
        table.local.guest_write("virtio0", size - 4096, 4096, 1)
        with pytest.raises(BlockIOError):
            table.local.guest_write("virtio0", size, 4096, 1)


# --------------------------------------------------------------------------------------------------------------- the job


@pytest.mark.parametrize("dialect", MACHINES)
def test_a_mirror_that_is_not_in_sync_is_killed_and_the_drive_stays(dialect: Dialect, tmp_path: Path) -> None:
    """Its target is not complete, so there is nothing to go to."""
    with desk(tmp_path, dialect) as table:
        table.mirror(speed=1)
        table.name_witness()
        node = table.backend
        with no_descriptor_is_left(table, kept=-1):
            error = error_of(table.reopen, "copy", witness="w")
        assert error.error_class == "DeviceInUse"
        assert "mirror job 'virtio0'" in str(error)
        assert table.steps == ["begin", "job_cancelled"]
        assert table.medium() == "old"
        assert table.local.qmp.execute("query-block-jobs") == []
        assert table.local.qmp.wait_event("BLOCK_JOB_CANCELLED", within="1ms")
        assert (tmp_path / "witness").read_bytes() == b""
        table.local.guest_write("virtio0", 0, 4096, 1)
        assert node.quiesce_counter == 0


def test_a_stream_that_is_cancelled_refuses_too(tmp_path: Path) -> None:
    """Any job on the drive counts."""
    make_chain(tmp_path, SIZE, [("base", {0: OLD * 256}), ("old", {})])
    make_image(tmp_path / "new", SIZE)
    with desk(tmp_path) as table:
        table.local.qmp.execute("block-stream", device="virtio0", speed=1)
        error = error_of(table.reopen)
        assert (error.error_class, table.medium()) == ("DeviceInUse", "old")
        assert "target" not in str(error)
        table.reopen()


def test_a_job_that_waits_to_be_finalized_is_finalized(tmp_path: Path) -> None:
    """Nobody else can answer while the guest is held up."""
    with desk(tmp_path) as table:
        table.mirror(auto_finalize=False)
        table.local.qmp.wait_event("BLOCK_JOB_READY")
        table.reopen("copy")
        assert table.medium() == "copy"


def test_a_job_that_is_to_stay_concluded_can_be_looked_at_afterwards(tmp_path: Path) -> None:
    """Whoever asked for that with ``auto-dismiss`` false wants its numbers."""
    with desk(tmp_path) as table:
        table.mirror(auto_dismiss=False)
        table.local.qmp.wait_event("BLOCK_JOB_READY")
        table.reopen("copy")
        (job,) = table.local.qmp.execute("query-jobs")
        assert (job["status"], "error" in job) == ("concluded", False)
        table.local.qmp.execute("job-dismiss", id=job["id"])
        table.reopen("old")


def test_a_ready_mirror_that_is_stopped_by_an_error_is_killed(tmp_path: Path) -> None:
    """Its policy says stop, and waits for a person; the guest must not."""
    rule = '"inject-error": [{"event": "none", "iotype": "write", "errno": 28}]'
    with desk(tmp_path) as table:
        make_image(tmp_path / "copy", SIZE, fmt="raw")
        target = f'json:{{"driver": "blkdebug", {rule}, "image": {{"driver": "file", "filename": "{tmp_path}/copy"}}}}'
        table.local.qmp.execute(
            "drive-mirror", device="virtio0", target=target, sync="none", mode="existing", on_target_error="stop"
        )
        table.local.qmp.wait_event("BLOCK_JOB_READY")
        table.local.guest_write("virtio0", 0, 4096, 9)
        error = error_of(table.reopen)
        assert (error.error_class, table.medium()) == ("DeviceInUse", "old")
        assert table.local.guest_read("virtio0", 0, 512) == b"\x09" * 512


def test_a_job_of_another_drive_is_left_alone(tmp_path: Path) -> None:
    """It is only held up while the requests of all drives come to an end, as in 2012."""
    with desk(tmp_path) as table:
        make_image(tmp_path / "second", SIZE, {0: OLD * 1024})
        table.local.add_drive(tmp_path / "second", device="virtio1")
        target = str(tmp_path / "copy")
        table.local.qmp.execute("drive-mirror", device="virtio1", target=target, sync="full", speed=1, buf_size=65536)
        table.reopen()
        (job,) = table.local.qmp.execute("query-block-jobs")
        assert (job["device"], job["status"], table.medium()) == ("virtio1", "running", "new")


def test_what_it_became_works_beside_it(tmp_path: Path) -> None:
    """block-job-complete swaps nodes, and closes nothing."""
    with desk(tmp_path) as table:
        table.start_guest()
        table.mirror_until_in_sync()
        table.local.qmp.execute("block-job-complete", device="virtio0")
        table.local.qmp.wait_event("BLOCK_JOB_COMPLETED")
        assert table.medium() == "copy"
        assert table.steps == []
        table.reopen("new")
        table.stop_guest()
        assert table.medium() == "new"


# ------------------------------------------------------------------------------------------------------------------- HMP


@pytest.mark.parametrize("dialect", [*MACHINES, Dialect.BLKMIRROR_2012])
def test_a_person_has_it_without_a_witness(dialect: Dialect, tmp_path: Path) -> None:
    """``drive_reopen device new-image-file [format]``."""
    with desk(tmp_path, dialect) as table:
        assert table.local.qmp.hmp(f"drive_reopen virtio0 {tmp_path}/new") == ""
        assert table.medium() == "new"
        assert table.local.qmp.hmp(f"drive_reopen virtio0 {tmp_path}/old qcow2") == ""
        assert table.local.qmp.hmp(f"drive_reopen virtio0 {tmp_path}/nosuch").startswith("Error: Device 'virtio0'")
        assert table.local.qmp.hmp("drive_reopen nosuch x") == "Error: There is no device 'nosuch'\n"
        assert "drive_reopen device new-image-file [format]" in table.local.qmp.hmp("help drive_reopen")
        assert table.medium() == "old"


def test_in_march_the_format_was_qcow2_and_there_was_no_witness(tmp_path: Path) -> None:
    """The form of the blkmirror proposal."""
    with desk(tmp_path, Dialect.BLKMIRROR_2012) as table:
        make_image(tmp_path / "raw", SIZE, fmt="raw")
        assert error_of(table.reopen, "raw").error_class == "OpenFileFailed"
        table.reopen("raw", format="raw")
        assert "witness" in str(error_of(table.reopen, witness="w"))


@pytest.mark.parametrize("dialect", [Dialect.STORAGE_DAEMON, Dialect.BLOCK_COPY_2011])
def test_other_dialects_do_not_have_it(dialect: Dialect, tmp_path: Path) -> None:
    """It came in 2012, for machines."""
    with desk(tmp_path, dialect) as table:
        assert error_of(table.reopen).error_class == "CommandNotFound"
        assert table.local.machine.hub.hmp.find("drive_reopen") is None or dialect is Dialect.STORAGE_DAEMON
