"""Guest devices: buses and places, what is refused, error actions, coming and going."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from typing import Any

import pytest

from qblock.clock import LoopClock
from qblock.devices.board import BOARDS, Board, Fittings
from qblock.devices.device import GuestDevice
from qblock.devices.models import MODELS, find_model, help_lines
from qblock.devices.plugging import let_go, plug, read_request, unplug
from qblock.devices.tree import Device
from qblock.errors import BlockIOError, CommandError, DeviceNotFound, InvalidParameter, PermissionConflict
from qblock.jobs.mirror import MirrorRequest, start_blockdev_mirror
from qblock.jobs.new_copy import SyncMode
from qblock.runstate import TRANSITIONS, RunState
from qblock.system import BlockSystem
from qblock.testing.jobbench import eventually
from qblock.testing.simloop import run

Work = Callable[[BlockSystem], Awaitable[None]]


def with_board(kind: str, work: Work) -> list[tuple[str, Mapping[str, Any]]]:
    """Run ``work`` on a board with nothing but what it cannot be without; gives the events."""
    events: list[tuple[str, Mapping[str, Any]]] = []

    async def main() -> None:
        async with BlockSystem.create(clock=LoopClock(), random=Random(0)) as system:
            system.events.subscribe(lambda name, data, when: events.append((name, data)))
            system.board = Board(BOARDS[kind])
            system.board.build(system, Fittings(vga=0, serial=0, parallel=0, nic=0))
            await work(system)

    run(main)
    return events


async def add_node(system: BlockSystem, name: str, **options: Any) -> None:
    described = options if "driver" in options else {"driver": "null-co", "size": 1 << 20} | options
    node = await system.opener.open_blockdev({"node-name": name, **described})
    node.monitor_owned = True


def add(system: BlockSystem, driver: str, *, hot: bool = False, **values: Any) -> Device:
    options = {key.replace("_", "-"): value for key, value in values.items()}
    return plug(system, read_request({"driver": driver, **options}, strings=False), hot=hot)


# ---------------------------------------------------------------------------------------------------------- models and buses


@pytest.mark.parametrize(
    ("controller", "places"),
    [
        ("lsi", {"scsi-id": 8, "lun": 1}), ("am53c974", {"scsi-id": 8, "lun": 8}), ("mptsas1068", {"scsi-id": 9, "lun": 2}),
        ("megasas", {"scsi-id": 65, "lun": 256}), ("pvscsi", {"scsi-id": 65, "lun": 1}),
        ("virtio-scsi-pci", {"scsi-id": 256, "lun": 16384}),
    ],
)  # fmt: skip
def test_a_scsi_controller_has_as_many_places_as_the_real_one(controller: str, places: Mapping[str, int]) -> None:
    """The first place that there is not is refused, the one before it is there."""

    async def work(system: BlockSystem) -> None:
        add(system, controller)
        for name, end in places.items():
            with pytest.raises(CommandError, match=f" {end}: there are"):
                plug(system, read_request({"driver": "scsi-cd", name: end}, strings=False), hot=True)
            plug(system, read_request({"driver": "scsi-cd", name: end - 1, "channel": 0}, strings=False), hot=True)
        with pytest.raises(CommandError, match="channel 1"):
            add(system, "scsi-cd", channel=1)

    with_board("pc", work)


def test_a_scsi_disk_goes_where_its_logical_unit_is_free_first() -> None:
    """Without a target it takes the first one that has no such unit; with one, the first unit that the target has not."""

    async def work(system: BlockSystem) -> None:
        add(system, "virtio-scsi-pci")
        asked: list[dict[str, int]] = [{}, {"lun": 1}, {}, {"lun": 1}, {"lun": 0}, {"lun": 5}, {"scsi-id": 0}, {"scsi-id": 1}]
        devices = [plug(system, read_request({"driver": "scsi-cd", **place}, strings=False), hot=True) for place in asked]
        places = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 5), (0, 2), (1, 2)]
        assert [device.address[1:] for device in devices] == places

    with_board("pc", work)


@pytest.mark.parametrize(
    "values",
    [
        {"cyls": 5}, {"cyls": 5, "heads": 17, "secs": 1}, {"cyls": 65536, "heads": 1, "secs": 1}, {"min_io_size": 1000},
        {"min_io_size": 65536 * 512}, {"opt_io_size": 1 << 32}, {"discard_granularity": 1},
    ],
)  # fmt: skip
def test_sizes_that_no_disk_has_are_refused(values: Mapping[str, int]) -> None:
    """A geometry is complete and within its limits; sizes are multiples of a block."""

    async def work(system: BlockSystem) -> None:
        await add_node(system, "n")
        with pytest.raises(InvalidParameter):
            plug(system, read_request({"driver": "ide-hd", "drive": "n", **values}, strings=False), hot=False)

    with_board("pc", work)


def test_every_model_can_be_found_by_its_alias_and_is_in_the_help() -> None:
    """Nothing is offered that help does not show."""
    lines = help_lines()
    for model in MODELS.values():
        assert model.help_line in lines
        assert find_model(model.alias or model.name) is model
    assert find_model("nosuch") is None


def test_devices_fill_the_newest_bus_of_their_kind_place_by_place() -> None:
    """As the real program does, which has no look at the other bus when one is full."""

    async def work(system: BlockSystem) -> None:
        first, second = add(system, "ide-cd"), add(system, "ide-cd", id="b")
        assert first.bus is second.bus and first.bus is not None and first.bus.name == "ide.1"
        assert (first.address, second.address) == ((0,), (1,))
        assert (first.disk_name, second.disk_name) == ("/machine/peripheral-anon/device[0]", "b")
        with pytest.raises(CommandError, match="in use"):
            add(system, "ide-cd")
        third = add(system, "ide-cd", bus="ide.0", unit=1)
        assert third.address == (1,)

    with_board("pc", work)


def test_buses_are_named_after_their_device_or_numbered() -> None:
    """What -device bus= refers to."""

    async def work(system: BlockSystem) -> None:
        add(system, "virtio-scsi-pci", id="s")
        add(system, "lsi")
        add(system, "pcie-root-port", id="rp")
        add(system, "ahci", id="sata")
        names = {bus.name for device in system.devices.devices for bus in device.buses}
        assert names == {"s.0", "scsi.0", "rp", *(f"sata.{n}" for n in range(6))}

    with_board("pc", work)


@pytest.mark.parametrize(
    ("driver", "values"),
    [
        ("nosuch", {}),
        ("scsi-cd", {}),
        ("ide-cd", {"bus": "ide.7"}),
        ("ide-cd", {"bus": "pci.0"}),
        ("ide-cd", {"unit": 2}),
        ("ide-cd", {"unit": "0"}),
        ("ide-cd", {"nosuch": 1}),
        ("ide-cd", {"id": "9"}),
        ("ide-cd", {"id": 1}),
        ("ide-cd", {"drive": "nosuch"}),
        ("ide-hd", {}),
        ("ide-hd", {"drive": "ro"}),
        ("virtio-blk-pci", {"drive": "disk", "logical_block_size": 1000}),
        ("virtio-blk-pci", {"drive": "disk", "logical_block_size": 4096}),
        ("virtio-blk-pci", {"drive": "disk", "rerror": "nosuch"}),
        ("virtio-blk-pci", {"drive": "disk", "addr": "1"}),
        ("virtio-blk-pci", {"drive": "disk", "addr": "40"}),
        ("virtio-blk-pci", {"drive": "disk", "virtio-backend": "x"}),
        ("nvme", {"drive": "disk"}),
        ("usb-storage", {"drive": "disk"}),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_stays(driver: str, values: dict[str, Any]) -> None:
    """No device, no backend, no permission."""

    async def work(system: BlockSystem) -> None:
        await add_node(system, "disk")
        await add_node(system, "ro", **{"read-only": True})
        with pytest.raises(CommandError):
            plug(system, read_request({"driver": driver, **values}, strings=False), hot=False)
        assert not system.devices.devices and not system.graph.backends
        assert not system.graph.nodes["disk"].parents

    with_board("pc", work)


def test_two_devices_share_a_node_only_when_both_say_so() -> None:
    """share-rw."""

    async def work(system: BlockSystem) -> None:
        await add_node(system, "n")
        add(system, "virtio-blk-pci", drive="n", share_rw=True)
        with pytest.raises(PermissionConflict, match="device"):
            add(system, "virtio-blk-pci", drive="n")
        add(system, "virtio-blk-pci", drive="n", share_rw=True)
        assert len(system.devices) == 2

    with_board("pc", work)


def test_a_bootindex_and_an_id_are_given_once() -> None:
    """Two devices that claim the same are a mistake in the command line."""

    async def work(system: BlockSystem) -> None:
        add(system, "ide-cd", bootindex=1, id="c")
        for other in ({"bootindex": 1}, {"id": "c"}):
            with pytest.raises(CommandError):
                add(system, "ide-cd", **other)

    with_board("pc", work)


def test_defaults_of_global_are_overruled_by_the_device_itself() -> None:
    """-global virtio-blk-pci.share-rw=on."""
    defaults = [("virtio-blk-pci", "share-rw", "on"), ("virtio-blk-pci", "serial", "all"), ("ide-cd", "serial", "x")]
    options = {"driver": "virtio-blk-pci", "serial": "own"}
    assert read_request(options, strings=True, defaults=defaults).values == {"share-rw": True, "serial": "own"}


# ------------------------------------------------------------------------------------------------------------ coming and going


def test_scsi_devices_go_at_once_and_their_node_stays() -> None:
    """After the reply of device_del, and blockdev-del works then."""

    async def work(system: BlockSystem) -> None:
        system.run.state = RunState.PRELAUNCH
        await add_node(system, "n")
        add(system, "virtio-scsi-pci", id="s", hot=True)
        add(system, "scsi-hd", id="d", drive="n", hot=True)
        unplug(system, "d")
        assert system.devices.find("d").leaving
        await settled()
        with pytest.raises(DeviceNotFound):
            system.devices.find("d")
        assert not system.graph.nodes["n"].parents

    assert with_board("pc", work) == [("DEVICE_DELETED", {"device": "d", "path": "/machine/peripheral/d"})]


def test_pci_devices_wait_for_the_guest_and_take_what_is_plugged_into_them_along() -> None:
    """A reset takes them from a guest that does not run; the order of the events is the real program's."""

    async def work(system: BlockSystem) -> None:
        system.run.state = RunState.PRELAUNCH
        await add_node(system, "n")
        await add_node(system, "m")
        add(system, "virtio-scsi-pci", id="s", hot=True)
        add(system, "scsi-hd", id="d", drive="n", hot=True)
        add(system, "virtio-blk-pci", id="v", drive="m", hot=True)
        unplug(system, "s")
        unplug(system, "v")
        await settled()
        assert len(system.devices) == 2
        with pytest.raises(CommandError, match="leaving"):
            unplug(system, "v")
        await let_go(system)
        assert not system.devices.devices

    root = "/machine/peripheral"
    assert with_board("pc", work) == [
        ("DEVICE_DELETED", {"device": "d", "path": f"{root}/d"}),
        ("DEVICE_DELETED", {"path": f"{root}/s/virtio-backend"}),
        ("DEVICE_DELETED", {"device": "s", "path": f"{root}/s"}),
        ("DEVICE_DELETED", {"path": f"{root}/v/virtio-backend"}),
        ("DEVICE_DELETED", {"device": "v", "path": f"{root}/v"}),
    ]


async def settled() -> None:
    """Let everything run that needs no time."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_nothing_is_plugged_into_an_ide_bus_of_a_running_machine() -> None:
    """Nor pulled out of it."""

    async def work(system: BlockSystem) -> None:
        add(system, "ide-cd", id="c")
        with pytest.raises(CommandError):
            add(system, "ide-cd", hot=True)
        with pytest.raises(CommandError):
            unplug(system, "c")

    with_board("pc", work)


# ----------------------------------------------------------------------------------------------------------------- error actions


async def failing(system: BlockSystem, driver: str, code: int, **values: Any) -> GuestDevice:
    """A disk whose first read and first write fail."""
    rules = [{"event": "none", "iotype": kind, "errno": code, "once": True} for kind in ("read", "write")]
    image = {"driver": "memory", "size": 1 << 20}
    await add_node(system, "bad", driver="blkdebug", image=image, **{"inject-error": rules})
    device = add(system, driver, drive="bad", id="d", **values)
    assert device.disk is not None
    return device.disk


@pytest.mark.parametrize(
    ("policy", "code", "action"),
    [
        ({}, errno.EIO, "report"),
        ({}, errno.ENOSPC, "report"),
        ({"rerror": "ignore"}, errno.EIO, "ignore"),
        ({"rerror": "stop"}, errno.EIO, "stop"),
        ({"rerror": "enospc"}, errno.ENOSPC, "stop"),
        ({"rerror": "stop"}, errno.ENOMEDIUM, "stop"),
        ({"rerror": "enospc"}, errno.EIO, "report"),
    ],
)
def test_a_failed_read_is_reported_ignored_or_stops_the_machine(policy: dict[str, str], code: int, action: str) -> None:
    """And each time the event tells what was done."""
    statuses: list[str] = []

    async def work(system: BlockSystem) -> None:
        disk = await failing(system, "virtio-blk-pci", code, **policy)
        request = asyncio.ensure_future(disk.read_into(0, memoryview(bytearray(512))))
        await settled()
        statuses.append(disk.backend.io_status)
        if action == "stop":
            assert system.run.state is RunState.IO_ERROR and not request.done()
            system.run.resume()
        if action == "report":
            with pytest.raises(BlockIOError):
                await request
        else:
            await request
        statuses.append(disk.backend.io_status)

    events = with_board("pc", work)
    assert events[0][0] == "BLOCK_IO_ERROR"
    assert {key: events[0][1][key] for key in ("action", "operation", "nospace", "node-name")} == {
        "action": action, "operation": "read", "nospace": code == errno.ENOSPC, "node-name": "bad",
    }  # fmt: skip
    assert [name for name, _ in events[1:]] == (["STOP", "RESUME"] if action == "stop" else [])
    stopped = "nospace" if code == errno.ENOSPC else "failed"
    assert statuses == [stopped if action == "stop" else "ok"] * 2  # cont forgives drives only


def test_only_a_disk_whose_errors_may_stop_the_machine_has_an_io_status() -> None:
    """Nor does its BLOCK_IO_ERROR tell whether the storage was full. A drive that is taken away stops nothing any more."""

    async def work(system: BlockSystem) -> None:
        disk = await failing(system, "virtio-blk-pci", errno.ENOSPC, werror="ignore")
        await disk.write_from(0, memoryview(bytes(512)))
        assert disk.io_status is None
        await system.drive_add("if=none,id=drive,file.driver=null-co,format=raw")
        other = add(system, "virtio-blk-pci", drive="drive", id="e").disk
        assert other is not None and other.io_status == "ok"
        other.backend.io_status = "failed"
        system.run.resume()
        assert other.io_status == "ok"
        await system.drive_del("drive")
        assert other.io_status is None
        with pytest.raises(BlockIOError):
            await other.write_from(0, memoryview(bytes(512)))

    events = with_board("pc", work)
    assert [(name, data.get("nospace")) for name, data in events if name == "BLOCK_IO_ERROR"] == [("BLOCK_IO_ERROR", None)]


def test_a_machine_that_an_error_stops_comes_to_rest() -> None:
    """As after the command stop: a ready job shows that no request is under way, and all images are durable."""

    async def work(system: BlockSystem) -> None:
        disk = await failing(system, "virtio-blk-pci", errno.EIO, werror="stop")
        for name in ("s", "t"):
            await add_node(system, name, driver="memory", size=1 << 20)
        request = MirrorRequest(job_id="j", sync=SyncMode.FULL)
        job = await start_blockdev_mirror(system, device="s", target="t", request=request)
        await eventually(lambda: job.is_ready)
        write = asyncio.ensure_future(disk.write_from(0, memoryview(bytes(512))))
        await eventually(lambda: system.run.state is RunState.IO_ERROR)
        await settled()
        system.run.resume()
        await write

    names = [data.get("status", name) for name, data in with_board("pc", work)]
    assert names[names.index("BLOCK_IO_ERROR") :][:5] == ["BLOCK_IO_ERROR", "STOP", "standby", "ready", "RESUME"]


def test_a_full_storage_stops_the_guest_that_writes_and_other_errors_do_not() -> None:
    """werror=enospc, which is the default."""

    async def work(system: BlockSystem) -> None:
        disk = await failing(system, "virtio-blk-pci", errno.ENOSPC)
        request = asyncio.ensure_future(disk.write_from(0, memoryview(bytes(512))))
        await settled()
        assert system.run.state is RunState.IO_ERROR
        system.run.reset()
        with pytest.raises(BlockIOError) as told:
            await request
        assert told.value.errno == errno.ECANCELED and system.run.state is RunState.PRELAUNCH

    with_board("pc", work)


def test_what_an_ignored_error_hides_is_counted_as_done() -> None:
    """account_failed: the time of a failed one counts as well."""

    async def work(system: BlockSystem) -> None:
        disk = await failing(system, "virtio-blk-pci", errno.EIO, werror="ignore", rerror="report")
        await disk.write_from(0, memoryview(bytes(512)))
        with pytest.raises(BlockIOError):
            await disk.read_into(0, memoryview(bytearray(512)))
        counts = disk.accounting.snapshot()
        assert (counts["wr_operations"], counts["wr_bytes"]) == (1, 512)
        assert counts["failed_rd_operations"] == 1 and "rd_total_time_ns" in counts and "rd_operations" not in counts

    with_board("pc", work)


# --------------------------------------------------------------------------------------------------------------------- run state


def test_every_run_state_can_be_reached_and_left() -> None:
    """A state without a way out would be a machine that is lost."""
    reachable = {state for following in TRANSITIONS.values() for state in following}
    assert reachable == set(TRANSITIONS) == set(RunState)
    assert all(TRANSITIONS.values())


def test_a_machine_that_was_shut_down_must_be_reset_before_it_goes_on() -> None:
    """cont alone does not start it."""

    async def work(system: BlockSystem) -> None:
        system.run.stop(RunState.SHUTDOWN)
        with pytest.raises(CommandError):
            system.run.resume()
        system.run.reset()
        system.run.resume()
        assert system.run.running

    assert [name for name, _ in with_board("none", work)] == ["STOP", "RESUME"]


def test_properties_of_the_wrong_type_are_refused_by_name() -> None:
    """JSON has types; text has none."""
    with pytest.raises(InvalidParameter, match="unit"):
        read_request({"driver": "ide-cd", "unit": "1"}, strings=False)
    assert read_request({"driver": "ide-cd", "unit": "0x1"}, strings=True).values == {"unit": 1}
