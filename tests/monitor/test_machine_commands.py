"""Commands about the machine without the real program beside it: locked trays, reset, thresholds, descriptors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from qblock.clock import LoopClock
from qblock.devices.board import BOARDS, Board
from qblock.devices.plugging import plug, read_request
from qblock.errors import QBlockError
from qblock.monitor.client import QmpClient, QmpError
from qblock.monitor.hub import MonitorHub
from qblock.runstate import RunState
from qblock.system import BlockSystem
from qblock.testing.simloop import run

Body = Callable[[QmpClient, BlockSystem], Awaitable[None]]


def with_cd(body: Body) -> list[str]:
    """Run ``body`` with a monitor of a machine that has a CD drive ``cd`` with a medium; gives the names of the events."""
    events: list[str] = []

    async def main() -> None:
        async with BlockSystem.create() as system:
            system.board = Board(BOARDS["pc"])
            system.board.build(system)
            system.events.subscribe(lambda name, data, when: events.append(name))
            hub = MonitorHub(system)
            hub.open()
            async with await QmpClient.in_process(hub) as client:
                await client.execute("blockdev-add", driver="null-co", node_name="n", size=1 << 20)
                plug(system, read_request({"driver": "virtio-scsi-pci", "id": "s"}, strings=True), hot=False)
                await client.execute("device_add", driver="scsi-cd", id="cd", drive="n")
                await body(client, system)
            await hub.close()

    run(main)
    return events


def test_a_locked_tray_opens_by_force_or_when_the_machine_is_reset() -> None:
    """Asked politely, blockdev-open-tray succeeds and nothing moves, as in QEMU; eject is refused."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        disk = system.devices.find_disk("cd")
        disk.lock_tray(locked=True)
        assert (await client.execute("query-block"))[0]["locked"]
        await client.execute("blockdev-open-tray", id="cd")
        assert not disk.tray_open
        with pytest.raises(QmpError, match="locked"):
            await client.execute("eject", id="cd")
        await client.execute("eject", id="cd", force=True)
        assert disk.tray_open and disk.root is None
        await client.execute("system_reset")
        assert not disk.tray_open and not disk.locked
        assert not (await client.execute("query-block"))[0]["tray_open"]

    assert with_cd(body) == ["DEVICE_TRAY_MOVED", "RESET"]


def test_a_threshold_tells_once_that_a_write_was_above_it() -> None:
    """Then it is not in force any more."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        await client.execute("blockdev-add", driver="null-co", node_name="m", size=1 << 20)
        await client.execute("block-set-write-threshold", node_name="m", write_threshold=4096)
        for _ in range(2):
            await client.execute("human-monitor-command", command_line='qemu-io m "write -q 4096 512"')
        (node,) = [n for n in await client.execute("query-named-block-nodes") if n["node-name"] == "m"]
        assert node["write_threshold"] == 0
        await client.execute("block-set-write-threshold", node_name="m", write_threshold=-1)  # as high as can be
        await client.execute("human-monitor-command", command_line='qemu-io m "write -q 4096 512"')
        (node,) = [n for n in await client.execute("query-named-block-nodes") if n["node-name"] == "m"]
        assert node["write_threshold"] == -1

    assert with_cd(body) == ["BLOCK_WRITE_THRESHOLD"]


def test_the_guest_lets_pci_devices_go_as_soon_as_it_runs() -> None:
    """Ours does; the monitor hears of it after cont."""

    async def body(client: QmpClient, system: BlockSystem) -> None:
        system.run.state = RunState.PAUSED
        await client.execute("device_del", id="s")
        assert system.devices.find("s").leaving
        await client.execute("cont")
        while len(system.devices.devices):
            await system.clock.sleep_ns(1)
        assert "n" in system.graph.nodes

    assert with_cd(body) == ["RESUME", "DEVICE_DELETED", "DEVICE_DELETED", "DEVICE_DELETED"]


def test_times_are_told_apart_by_the_intervals_of_the_drive() -> None:
    """`stats-intervals`: what the guest has waited lately, beside the totals; what the device does not say, its drive says."""

    async def main() -> None:
        async with BlockSystem.create(clock=LoopClock()) as system:
            system.board.build(system)
            hub = MonitorHub(system)
            await system.drive_add(
                "if=none,id=d,driver=null-co,latency-ns=5000000,stats-intervals.0=2,stats-intervals.1=60,stats-account-failed=off"
            )
            async with await QmpClient.in_process(hub) as client:
                (idle,) = await client.execute("query-blockstats")
                assert [timed["interval_length"] for timed in idle["stats"]["timed_stats"]] == [2, 60]
                await client.execute("device_add", driver="virtio-blk-pci", id="v", drive="d", **{"account-invalid": "off"})
                disk = system.devices.find_disk("/machine/peripheral/v/virtio-backend")
                await disk.read_into(0, memoryview(bytearray(512)))
                for seconds, lately in ((1, 5_000_000), (4, 0)):
                    await system.clock.sleep_ns(seconds * 10**9)
                    (shown,) = await client.execute("query-blockstats")
                    recent, longer = shown["stats"]["timed_stats"]
                    assert (recent["avg_rd_latency_ns"], longer["max_rd_latency_ns"]) == (lately, 5_000_000)
                    assert longer["avg_wr_latency_ns"] == 0
                assert not shown["stats"]["account_failed"] and not shown["stats"]["account_invalid"]

    run(main)


@pytest.mark.parametrize("wrong", ["stats-intervals.0=0", "stats-intervals.0=x", "stats-intervals.1=5", "stats-intervals=5"])
def test_an_interval_that_is_none_is_refused(wrong: str) -> None:
    """A length in seconds, at least one, numbered from 0."""

    async def main() -> None:
        async with BlockSystem.create() as system:
            with pytest.raises(QBlockError, match="stats-intervals"):
                await system.drive_add(f"if=none,id=d,driver=null-co,{wrong}")

    run(main)
