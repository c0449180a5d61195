"""Commands at odd moments and with odd arguments, as random sequences found them: each is answered, nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from qblock.monitor.client import QmpClient, QmpError
from qblock.monitor.hub import MonitorHub
from qblock.monitor.io_shells import IoShells
from qblock.testing.images import make_chain, make_image
from qblock.testing.machines import LocalMachine
from qblock.testing.schedules import Seeded
from qblock.units import KiB
from reopen_desk import SlowFileDriver

SIZE = 256 * KiB
QUERIES = ("query-named-block-nodes", "query-block", "query-blockstats", "query-block-jobs", "x-debug-query-block-graph")


async def ask_until(done: asyncio.Future[None], hub: MonitorHub, query: str) -> None:
    """Ask again and again."""
    async with await QmpClient.in_process(hub) as client:
        while not done.done():
            await client.execute(query)
            await asyncio.sleep(0.0001)


@pytest.mark.parametrize("seed", range(6))
def test_nodes_that_are_going_away_are_not_shown(tmp_path: Path, seed: int) -> None:
    """A job's filter that has been taken out has nothing below it, and is there until what it has begun is at an end."""

    async def mirror(client: QmpClient, device: str) -> None:
        target = {"target": str(tmp_path / "target" / device), "format": "qcow2"}
        for _ in range(3):
            await client.execute("drive-mirror", job_id=device, device=device, sync="full", **target)
            await client.wait_event("BLOCK_JOB_READY", device=device)
            await client.execute("block-job-cancel", device=device)
            await client.wait_event("JOB_STATUS_CHANGE", status="null", id=device)

    async def life(machine: LocalMachine, client: QmpClient) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        askers = [asyncio.ensure_future(ask_until(done, machine.machine.hub, query)) for query in QUERIES]
        await asyncio.gather(mirror(client, "d0"), mirror(client, "d1"))
        done.set_result(None)
        await asyncio.gather(*askers)

    (tmp_path / "target").mkdir()
    with LocalMachine(Seeded(seed)) as machine:
        machine.machine.system.registry.register(SlowFileDriver)
        for device in ("d0", "d1"):
            machine.add_drive(make_image(tmp_path / device, SIZE, {0: b"x" * 512}), device=device)
        machine.run(life(machine, machine.qmp.client))
        assert not any(node["drv"] == "mirror_top" for node in machine.qmp.execute("query-named-block-nodes"))


def test_a_node_cannot_have_itself_below_it_while_it_is_opened() -> None:
    """Such a description is refused, and nothing of it stays."""
    child = {"driver": "copy-before-write", "file": "disk", "target": "x"}
    with LocalMachine() as machine:
        machine.qmp.execute("blockdev-add", driver="memory", node_name="disk", size=SIZE)
        for driver, name in (("compress", "file"), ("raw", "file"), ("blkdebug", "image")):
            with pytest.raises(QmpError, match="no block node named 'x'"):
                machine.qmp.execute("blockdev-add", {"driver": driver, "node-name": "x", name: child})
        assert list(machine.machine.system.graph.nodes) == ["disk"]


@pytest.mark.parametrize("hint", [-1, 1 << 32, (1 << 63) - 1])
def test_a_hint_that_no_file_system_could_take_is_refused(tmp_path: Path, hint: int) -> None:
    """The job ends with an error that names the option, and no file is made."""
    options = {"driver": "file", "filename": str(tmp_path / "new"), "size": 512, "extent-size-hint": hint}
    with LocalMachine() as machine:
        machine.qmp.execute("blockdev-create", job_id="j", options=options)
        machine.qmp.wait_event("JOB_STATUS_CHANGE", status="concluded")
        [job] = machine.qmp.execute("query-jobs")
        assert "extent-size-hint" in job["error"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("delay_ms", range(8))
def test_a_node_that_is_reopened_stays_open_until_it_has_been(tmp_path: Path, delay_ms: int) -> None:
    """Its last user may leave meanwhile; then it goes afterwards. A node that is being closed already is not there any more."""

    async def life(machine: LocalMachine, first: QmpClient, device: str) -> None:
        base = machine.machine.system.graph.lookup("virtio0").children["backing"].node
        storage = base.children["file"].node.node_name
        options = [
            {"driver": "qcow2", "node-name": "other", "file": "other-file", "read-only": True},  # which is flushed first
            {"driver": "qcow2", "node-name": base.node_name, "file": storage, "read-only": True},
        ]
        async with await QmpClient.in_process(machine.machine.hub) as second:
            leaving = asyncio.ensure_future(first.execute("device_del", id=device))
            await asyncio.sleep(delay_ms / 1000)
            with contextlib.suppress(QmpError):
                await second.execute("blockdev-reopen", options=options)
            await leaving

    complaints: list[str] = []
    make_chain(tmp_path, SIZE, [("base", {0: b"x" * 512}), ("top", {})])
    other = {"driver": "file", "node-name": "other-file", "filename": str(make_image(tmp_path / "other", SIZE))}
    with LocalMachine() as machine:
        machine.machine.hub.report = complaints.append
        machine.machine.system.registry.register(SlowFileDriver)
        machine.add_drive(tmp_path / "top", device="virtio0")
        machine.qmp.execute("blockdev-add", driver="qcow2", node_name="other", file=other)
        assert not machine.qmp.hmp('qemu-io other "write 0 4k"')
        [device] = machine.machine.system.devices.devices
        machine.run(life(machine, machine.qmp.client, device.path))
        machine.advance("1s")
        assert list(machine.machine.system.graph.nodes) == ["other-file", "other"]
    assert not complaints


def test_a_request_on_a_node_that_a_pending_job_holds_finds_no_medium(tmp_path: Path) -> None:
    """The monitor does not wait for the guest's side to go on, which it is the one to say; the other side can be read."""
    said: list[str] = []
    with LocalMachine() as local:
        local.machine.hub.io = IoShells(local.machine.system, said.append)
        for name in ("a", "b"):
            make_image(tmp_path / name, SIZE)
            storage = {"driver": "file", "filename": str(tmp_path / name)}
            local.qmp.execute("blockdev-add", driver="qcow2", node_name=name, file=storage)
        local.qmp.execute("blockdev-mirror", job_id="j", device="a", target="b", sync="full", auto_finalize=False)
        local.qmp.wait_event("BLOCK_JOB_READY")
        local.qmp.execute("job-complete", id="j")
        local.qmp.wait_event("JOB_STATUS_CHANGE", status="pending")
        for line in ('a "aio_write -P 1 0 4k"', 'a "aio_write -z 0 4k"', 'a "aio_read 0 4k"', 'b "read -q 0 4k"', 'b "flush"'):
            assert local.qmp.hmp(f"qemu-io {line}") == ""
        texts = [text for text in said if not text.startswith("qemu-io: ")]
        assert texts == [f"{verb} failed: No medium found" for verb in ("aio_write", "aio_write", "readv")]
        local.qmp.execute("job-finalize", id="j")
        local.qmp.wait_event("JOB_STATUS_CHANGE", status="null")
        assert local.qmp.hmp('qemu-io b "read -q -P 0 0 4k"') == ""


@pytest.mark.parametrize("device", [True, False])
def test_aio_requests_are_in_the_statistics_of_their_drive(tmp_path: Path, device: bool) -> None:
    """As a guest's are, also where no device has the drive; what else qemu-io does, zeroes among it, is not."""
    make_image(tmp_path / "disk", SIZE)
    with LocalMachine() as local:
        interface = "virtio" if device else "none"
        local.run(local.machine.add_drive(f"if={interface},id=d,file={tmp_path}/disk,format=qcow2"))
        for line in (
            "aio_write 0 4k", "aio_write 0 512 512", "aio_write -z 0 64k", "aio_write 1M 4k", "aio_read 0 8k",
            "aio_read -P 9 0 4k", "aio_read 1M 4k", "aio_read -i 0 4k", "aio_write -i 0 4k",
            "aio_flush", "write 0 4k", "read 0 4k", "flush",
        ):  # fmt: skip
            local.qmp.hmp(f'qemu-io d "{line}"')
            local.advance("1ms")
        (shown,) = local.qmp.execute("query-blockstats")
    kinds = ("wr", "rd", "flush")
    counts = [[shown["stats"].get(f"{state}{kind}_operations") for kind in kinds] for state in ("", "failed_", "invalid_")]
    assert counts == [[2, 2, 1], [1, 1, 0], [1, 1, 0]]
    assert (shown["stats"]["wr_bytes"], shown["stats"]["rd_bytes"]) == (4096 + 1024, 8192 + 4096)
    assert shown["stats"]["idle_time_ns"] == 4_000_000
