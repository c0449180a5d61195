"""drive-reopen as a client of the monitor sees it: order of steps, errors by class, the way back, and what the guest notices."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from qblock.drive_reopen import Witness, drive_reopen
from qblock.drivers.file import FileDriver
from qblock.errors import BlockIOError, DeviceInUse, QBlockError
from qblock.guest import Guest
from qblock.image import create, open_image
from qblock.monitor.client import QmpError
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import MachineOptions
from qblock.testing.images import make_chain, make_image
from qblock.testing.machines import LocalMachine
from qblock.units import MiB

SIZE = 8 * MiB
OLD, NEW = b"o" * 4096, b"n" * 4096
MACHINES = (Dialect.SYSTEM, Dialect.RFC_2012)


class SlowFileDriver(FileDriver):
    """A file of which nothing is had at once, so that others get their turn between the steps."""

    async def open(self) -> None:
        await self.env.clock.sleep_ns(1_000_000)
        await super().open()

    async def flush(self) -> None:
        await self.env.clock.sleep_ns(1_000_000)
        await super().flush()

    async def close(self) -> None:
        await self.env.clock.sleep_ns(1_000_000)
        await super().close()


@attrs.define(eq=False)
class Desk:
    """A machine with the drive ``virtio0`` on ``old``, beside which there is ``new``; ``steps`` are the trace events."""

    local: LocalMachine
    path: Path
    steps: list[str] = attrs.field(factory=list)
    guest: Guest = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.guest = self.local.machine.guest("virtio0")

    def reopen(self, filename: str | Path = "new", **members: Any) -> Any:
        return self.local.qmp.execute(
            "drive-reopen", device="virtio0", new_image_file=str(self.path / filename), **members
        )

    def name_witness(self, name: str = "w", file: str = "witness") -> None:
        """As management does: open the file, pass it with getfd, close it here."""

        async def pass_on() -> None:
            fd = os.open(self.path / file, os.O_WRONLY | os.O_CREAT)
            await self.local.qmp.client.execute("getfd", fdname=name, fds=[fd])
            os.close(fd)

        self.local.run(pass_on())

    def start_guest(self, writes_per_second: int = 1000) -> None:
        async def start() -> None:
            self.local.machine.start_guest("virtio0", writes_per_second=writes_per_second)

        self.local.run(start())

    def stop_guest(self) -> None:
        self.local.run(self.local.machine.stop_guest("virtio0"))

    def mirror(self, **members: Any) -> None:
        """Start the mirror of the dialect, to ``copy``."""
        how = {"full": True} if self.local.machine.hub.dialect is Dialect.RFC_2012 else {"sync": "full"}
        target = str(self.path / "copy")
        self.local.qmp.execute("drive-mirror", device="virtio0", target=target, format="qcow2", **how, **members)

    def mirror_until_in_sync(self) -> None:
        self.mirror()
        for _ in range(200):
            (job,) = self.local.qmp.execute("query-block-jobs")
            if job["offset"] == job["len"] and job.get("ready", True):
                return
            self.local.advance("10ms")
        raise AssertionError("the mirror did not come into sync")

    def medium(self) -> str | None:
        """The file that the drive has now."""
        root = self.local.machine.system.graph.find_backend("virtio0").root
        if root is None:
            return None
        name = root.node.driver.filename()
        return None if name is None else os.path.relpath(name, self.path)

    def proves_equal(self, filename: str) -> int:
        """Compare an image that is closed with all that the guest has written; returns how many bytes were known."""
        known = 0
        with open_image(self.path / filename) as image:
            for run, tag in self.guest.content.runs():
                for offset in range(run.offset, run.end, MiB):
                    length = min(MiB, run.end - offset)
                    self.guest.content.check(offset, memoryview(image.read(offset, length)), filename)
                known += run.length if tag >= 0 else 0
        return known


@contextmanager
def desk(path: Path, dialect: Dialect = Dialect.SYSTEM, drive: str = "format=qcow2") -> Iterator[Desk]:
    if not (path / "old").exists():
        make_image(path / "old", SIZE, {0: OLD})
        make_image(path / "new", SIZE, {0: NEW})
    with LocalMachine(options=MachineOptions(seed=0, dialect=dialect)) as local:
        local.machine.system.registry.register(SlowFileDriver)
        local.run(local.machine.add_drive(f"if=virtio,id=virtio0,file={path}/old,{drive}"))
        result = Desk(local, path)
        local.machine.system.env.trace.listen(
            "drive_reopen_*", lambda name, members: result.steps.append(name.removeprefix("drive_reopen_"))
        )
        yield result


def on_step(table: Desk, step: str, action: Callable[[], None]) -> None:
    table.local.machine.system.env.trace.listen(f"drive_reopen_{step}", lambda name, members: action())


@contextmanager
def no_descriptor_is_left(table: Desk, *, kept: int = 0) -> Iterator[None]:
    """Images may be exchanged meanwhile, so what counts is that nothing but images is open in the end."""

    def held() -> int:
        names = os.listdir("/proc/self/fd")
        links = [os.readlink(f"/proc/self/fd/{n}") for n in names if os.path.exists(f"/proc/self/fd/{n}")]
        return sum(link.endswith(("/witness", "/dev/full")) or link.startswith("pipe:") for link in links)

    before = held()
    yield
    assert held() == before + kept


def error_of(action: Callable[..., Any], *args: Any, **members: Any) -> QmpError:
    with pytest.raises(QmpError) as caught:
        action(*args, **members)
    return caught.value


# ------------------------------------------------------------------------------------------------------- the way forward


@pytest.mark.parametrize("dialect", MACHINES)
def test_a_drive_gets_its_new_image_and_a_witness_is_left(dialect: Dialect, tmp_path: Path) -> None:
    """The whole protocol: the byte is there, durable and closed before the reply."""
    with desk(tmp_path, dialect) as table:
        table.name_witness()
        lengths: dict[str, int] = {}
        for step in ("opened", "witness_written", "done"):
            on_step(
                table,
                step,
                lambda step=step: lengths.update({step: (tmp_path / "witness").stat().st_size}),  # type: ignore[misc]
            )
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
        assert table.proves_equal("copy") > MiB


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
        node = table.guest.backend.node
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
        node = table.guest.backend
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
        table.reopen()


def test_a_job_that_waits_to_be_finalized_is_finalized(tmp_path: Path) -> None:
    """Nobody else can answer while the guest is held up."""
    with desk(tmp_path) as table:
        table.mirror(auto_finalize=False, auto_dismiss=False)
        table.local.qmp.wait_event("BLOCK_JOB_READY")
        table.reopen("copy")
        assert table.medium() == "copy"
        assert table.local.qmp.execute("query-jobs") == []


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
        node = table.guest.backend.node.node_name
        error = error_of(table.local.qmp.execute, "drive-reopen", device=node, new_image_file="x")
        assert error.error_class == "DeviceNotFound"


def monitors_own(table: Desk) -> str:
    table.guest.backend.node.monitor_owned = True
    return "monitor"


def overlay(table: Desk) -> str:
    make_image(table.path / "above", SIZE)
    table.local.qmp.execute(
        "blockdev-add", driver="qcow2", node_name="above", backing=table.guest.backend.node.node_name, read_only=True,
        file={"driver": "file", "filename": str(table.path / "above")},
    )  # fmt: skip
    return "node 'above'"


def targeted(table: Desk) -> str:
    make_image(table.path / "second", SIZE, {0: OLD})
    table.local.add_drive(table.path / "second", device="virtio1")
    table.guest.backend.set_permissions(
        table.guest.backend.perm & ~table.guest.backend.perm, table.guest.backend.shared
    )
    table.local.qmp.execute("blockdev-mirror", job_id="j", device="virtio1", target="virtio0", sync="full", speed=1)
    return "job 'j'"


@pytest.mark.parametrize("holder", [monitors_own, overlay])
def test_an_image_that_somebody_else_uses_is_not_left(holder: Callable[[Desk], str], tmp_path: Path) -> None:
    """It would stay open behind the guest's back; the error says who has it."""
    with desk(tmp_path) as table:
        named = holder(table)
        node = table.guest.backend.node
        error = error_of(table.reopen)
        assert error.error_class == "DeviceInUse"
        assert named in str(error)
        assert table.guest.backend.node is node
        assert table.steps == ["begin"]
        assert not node.blockers


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
        root = table.guest.backend.node
        on_step(table, "flushed", lambda: setattr(root, "monitor_owned", True))
        assert error_of(table.reopen).error_class == "DeviceInUse"
        assert table.guest.backend.node is root
        assert not root.blockers


def test_an_unknown_format_is_refused_before_anything_is_closed(tmp_path: Path) -> None:
    """The lookup is a step of its own."""
    with desk(tmp_path) as table:
        table.name_witness()
        node = table.guest.backend.node
        with no_descriptor_is_left(table, kept=-1):
            assert "'vhdx9'" in str(error_of(table.reopen, format="vhdx9", witness="w"))
        assert table.guest.backend.node is node
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
        node = table.guest.backend.node
        local.guest_write("virtio0", 0, 4096, 7)
        with no_descriptor_is_left(table, kept=-1):
            error = error_of(table.reopen, witness="w")
        assert error.error_class == "IOError"
        assert "virtio0" in str(error)
        assert table.guest.backend.node is node
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
        assert table.steps[-2:] == ["rollback", "done"][:1] or table.steps[-1] == "rollback"
        assert ("opened" in table.steps) is ("witness" in arguments)
        assert table.medium() == "old"
        assert table.guest.backend.node.node_name == "mine"
        assert without_automatic_names(table.local.qmp.hmp("info block -n -v")) == without_automatic_names(before)
        table.local.advance("100ms")
        table.stop_guest()
        assert table.guest.counters.failed == 0
        table.local.qmp.hmp("drive_del virtio0")
        table.local.qmp.hmp("drive_del virtio1")
        assert not table.local.machine.system.graph.nodes
        assert table.proves_equal("old")


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
        on_step(table, "closed", lambda: (tmp_path / "old").rename(name) and None)
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
        assert guest.backend.node.discard_unmap
        assert guest.backend.perm == guest.backend.node.perm


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
            on_step(table, step, lambda: task.cancel() and None)
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
        on_step(table, step, lambda: tasks.append(asyncio.ensure_future(meddle())) if not tasks else None)
        table.name_witness()
        table.reopen(witness="w")
        assert len(refused) == 2
        assert all("being changed" in text for text in refused)
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
