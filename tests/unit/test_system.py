"""BlockSystem: what it owns, that it ends well, and the drives and devices that are added to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qblock.clock import LoopClock
from qblock.devices.device import GuestDevice
from qblock.errors import BlockIOError, CommandError, DeviceNotFound, DuplicateName, InvalidParameter
from qblock.guest import Guest, Workload
from qblock.opening import OpenPolicy
from qblock.permissions import Perm
from qblock.system import BlockSystem
from qblock.testing.simloop import run

MEMORY = "driver=raw,file.driver=memory,file.size=1M"


def with_system(work: Callable[[BlockSystem], Awaitable[None]]) -> BlockSystem:
    """Run ``work`` on a system of its own, on virtual time; gives the closed system."""

    async def main() -> BlockSystem:
        async with BlockSystem.create(clock=LoopClock(), policy=OpenPolicy.follow(), random=Random(1)) as system:
            await work(system)
        return system

    return run(main)


# ---------------------------------------------------------------------------------------------------------- the system


def test_two_systems_do_not_know_each_other() -> None:
    """Names, jobs and events belong to a system; there is nothing that belongs to the process."""
    heard: list[str] = []

    async def main() -> None:
        async with BlockSystem.create() as one, BlockSystem.create() as other:
            one.events.subscribe(lambda name, data, when: heard.append(name))
            for system in (one, other):
                node = await system.opener.open_blockdev({"driver": "null-co", "node-name": "n"})
                node.monitor_owned = True
            other.emit("STOP", {})
            one.emit("RESUME", {})
            assert one.graph.nodes["n"] is not other.graph.nodes["n"]

    run(main)
    assert heard == ["RESUME"]


def test_an_event_carries_the_time_of_the_clock_until_one_unsubscribes() -> None:
    """Timestamps of transcripts are the same in every run on virtual time."""
    heard: list[tuple[str, Mapping[str, Any], tuple[int, int]]] = []

    async def work(system: BlockSystem) -> None:
        cancel = system.events.subscribe(lambda name, data, when: heard.append((name, data, when)))
        expected = system.clock.wall()
        system.emit("STOP", {"a": 1})
        cancel()
        system.emit("STOP", {"a": 2})
        assert heard == [("STOP", {"a": 1}, expected)]

    with_system(work)


def test_closing_flushes_and_closes_everything_and_may_be_repeated(tmp_path: Path) -> None:
    """What a guest wrote is on disk after the system has ended, without a flush of its own."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))

    async def work(system: BlockSystem) -> None:
        disk = await system.drive_add(f"if=virtio,id=d0,format=raw,file={path}")
        await disk.write(4096, b"kept" * 128)

    system = with_system(work)
    assert path.read_bytes()[4096:4608] == b"kept" * 128
    assert not system.graph.nodes and not system.graph.backends
    asyncio.run(system.close())


@pytest.mark.parametrize("steps", range(6))
def test_closing_that_was_interrupted_can_be_repeated(steps: int, tmp_path: Path) -> None:
    """Ctrl-C while a system ends: what is left open then is closed by the next try, with its locks."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(64 * 1024))

    async def main() -> None:
        system = BlockSystem.create()
        backend = await system.drive_add(f"format=raw,if=virtio,file={image}")
        await backend.write(0, b"x" * 512)
        closing = asyncio.create_task(system.close())
        for _ in range(steps):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await system.close()
        assert not system.graph.nodes
        async with BlockSystem.create() as other:
            await other.drive_add(f"format=raw,if=virtio,file={image}")

    run(main)


def test_closing_waits_for_a_guest_that_is_still_working() -> None:
    """Requests under way end well, those that come later find no medium; nothing hangs."""

    async def work(system: BlockSystem) -> None:
        slow = "driver=raw,file.driver=null-co,file.size=1M,file.latency-ns=50000000,file.read-zeroes=on"
        guest = Guest(await system.drive_add(f"if=virtio,id=d0,{slow}"), system.clock, Random(1))
        guest.start(Workload(interval_ns=1_000_000, reads=0))
        await system.clock.sleep_ns(200_000_000)
        assert guest.disk.in_flight
        await system.close()
        assert not system.graph.nodes
        await guest.stop()

    with_system(work)


def test_an_executor_that_was_given_is_not_shut_down() -> None:
    """Whoever made it ends it."""
    with ThreadPoolExecutor(1) as executor:

        async def main() -> None:
            async with BlockSystem.create(executor=executor):
                pass

        run(main)
        assert executor.submit(int).result() == 0


# -------------------------------------------------------------------------------------------------------------- drives


def test_a_virtio_drive_is_a_backend_with_a_device_on_it() -> None:
    """As the real program shows it: the path in query-block, and what the device takes and shares."""

    async def work(system: BlockSystem) -> None:
        first = await system.drive_add(f"if=virtio,id=d0,{MEMORY}")
        second = await system.drive_add(f"if=virtio,index=3,{MEMORY}")
        assert first.root is not None
        assert first.root.perm == Perm.CONSISTENT_READ | Perm.WRITE
        assert first.root.shared == Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED | Perm.RESIZE
        assert isinstance(first.device, GuestDevice)
        assert first.device.name == "/machine/peripheral-anon/device[0]/virtio-backend"
        assert second.name == "virtio3" and second.device.name.startswith("/machine/peripheral-anon/device[1]/")
        with pytest.raises(DuplicateName):
            await system.drive_add(f"if=virtio,id=d0,{MEMORY}")

    with_system(work)


def test_a_drive_without_interface_has_no_device_and_shares_all() -> None:
    """if=none: a name for the monitor to use."""

    async def work(system: BlockSystem) -> None:
        drive = await system.drive_add(f"id=n0,{MEMORY}")
        assert drive.device is None and drive.root is not None
        assert (drive.root.perm, drive.root.shared) == (Perm.CONSISTENT_READ, Perm.ALL)
        empty = await system.drive_add("if=none,id=empty")
        with pytest.raises(BlockIOError):
            await empty.read(0, 512)

    with_system(work)


@pytest.mark.parametrize(
    ("cache", "flags"),
    [
        ("writeback", (False, False, False)),
        ("none", (True, False, False)),
        ("writethrough", (False, False, True)),
        ("directsync", (True, False, True)),
        ("unsafe", (False, True, False)),
    ],
)
def test_cache_modes_set_the_three_flags_that_they_stand_for(cache: str, flags: tuple[bool, bool, bool]) -> None:
    """Direct and no-flush are the nodes', write-through is the device's."""

    async def work(system: BlockSystem) -> None:
        drive = await system.drive_add(f"if=virtio,id=d0,cache={cache},{MEMORY}")
        node = drive.node
        assert (node.cache_direct, node.cache_no_flush, drive.writethrough) == flags
        below = node.children["file"].node
        assert (below.cache_direct, below.cache_no_flush) == flags[:2]

    with_system(work)


def test_a_drive_follows_its_chain_and_takes_its_options(tmp_path: Path) -> None:
    """file=, format by probing, discard, detect-zeroes, copy-on-read and read-only reach the top node."""

    async def work(system: BlockSystem) -> None:
        path = str(tmp_path / "disk,with,commas")
        await system.opener.create_image("file", {"filename": path, "size": 0})
        await system.opener.create_image("qcow2", {"file": {"driver": "file", "filename": path}, "size": 1 << 20})
        name = path.replace(",", ",,")
        drive = await system.drive_add(f"file={name},if=virtio,id=d,discard=on,detect-zeroes=unmap,copy-on-read=on")
        node = drive.node
        assert (node.driver.name, node.discard_unmap, node.detect_zeroes) == ("qcow2", True, "unmap")
        assert node.copy_on_read == 1 and not node.read_only
        await system.drive_del("d")
        drive = await system.drive_add({"file": path, "id": "e", "read-only": True, "if": "virtio"})
        assert drive.node.read_only and drive.root is not None and drive.root.perm == Perm.CONSISTENT_READ

    with_system(work)


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("if=nosuch,file=x", "if"),
        ("if=virtio,id=d,werror=some," + MEMORY, "werror"),
        ("if=virtio,id=d,rerror=enospc," + MEMORY, "rerror"),
        ("if=virtio,id=d,media=tape," + MEMORY, "media"),
        ("if=virtio,id=d,cache=some," + MEMORY, "cache"),
        ("if=virtio,id=d,serial=x," + MEMORY, "serial"),
        ("if=none,id=d,index=1,bus=1", "index"),
    ],
)
def test_what_a_drive_does_not_support_is_refused_by_name(text: str, culprit: str) -> None:
    """Nothing is accepted and ignored, and nothing stays behind."""

    async def work(system: BlockSystem) -> None:
        with pytest.raises(InvalidParameter) as refused:
            await system.drive_add(text)
        assert refused.value.name == culprit
        assert not system.graph.nodes and not system.graph.backends and not system.devices

    with_system(work)


@pytest.mark.parametrize("text", ["if=virtio,id=d", "format=raw,driver=raw,file.driver=memory,id=d", "if=virtio,id=9d"])
def test_a_drive_that_makes_no_sense_is_refused(text: str) -> None:
    """A disk needs a medium, a format is given once, a name is well-formed."""

    async def work(system: BlockSystem) -> None:
        with pytest.raises(CommandError):
            await system.drive_add(text)
        assert not system.graph.nodes and not system.graph.backends

    with_system(work)


@pytest.mark.parametrize("text", ["id=x,node-name=x", "id=9x", "id=x,node-name=x,if=virtio"])
def test_a_drive_whose_name_cannot_be_had_leaves_nothing_open(text: str) -> None:
    """The name is needed only when the image is open already."""

    async def work(system: BlockSystem) -> None:
        with pytest.raises(CommandError):
            await system.drive_add(f"{MEMORY},{text}")
        assert not system.graph.nodes and not system.graph.backends and not system.devices

    with_system(work)


def test_a_drive_whose_format_is_probed_has_its_file_opened_as_it_says(tmp_path: Path) -> None:
    """The file is open before the format is known; cache modes must reach it all the same."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(64 * 1024))
    warnings: list[str] = []

    async def main() -> None:
        async with BlockSystem.create(policy=OpenPolicy.follow(), warn=warnings.append) as system:
            backend = await system.drive_add(f"file.filename={image},cache=unsafe,cache.writeback=off")
            assert backend.writethrough
            storage = backend.node.children["file"].node
            assert backend.node.probed and storage.cache_no_flush and storage.auto_read_only and not storage.read_only
            other = await system.drive_add(f"file={image},file.locking=off,readonly=on,copy-on-read=on")
            assert other.node.children["file"].node.driver.options.locking == "off"
            storage = other.node.children["file"].node
            assert storage.read_only and not other.node.copy_on_read

    run(main)
    assert ["guessed to be raw" in text for text in warnings] == [True, False]


def test_a_format_overrules_the_driver_of_a_json_name() -> None:
    """An option that was given is not passed over in silence."""

    async def work(system: BlockSystem) -> None:
        name = 'json:{"driver":"qcow2",,"file":{"driver":"memory",,"size":4096}}'
        backend = await system.drive_add(f"file={name},format=raw")
        assert backend.node.driver.name == "raw"

    with_system(work)


def test_removing_a_drive_closes_its_image_and_leaves_its_device_empty() -> None:
    """drive_del: the guest gets errors from then on; the name is free again."""

    async def work(system: BlockSystem) -> None:
        drive = await system.drive_add(f"if=virtio,id=d0,{MEMORY}")
        await system.drive_del("d0")
        assert not system.graph.nodes
        with pytest.raises(BlockIOError):
            await drive.read(0, 512)
        with pytest.raises(DeviceNotFound):
            await system.drive_del("d0")
        await system.drive_add(f"if=none,id=d0,{MEMORY}")

    with_system(work)


def test_a_drive_with_snapshot_on_throws_away_what_was_written(tmp_path: Path) -> None:
    """The guest writes into a temporary image that has no name any more; the image itself is only read."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(64 * 1024))

    async def work(system: BlockSystem) -> None:
        drive = await system.drive_add(f"if=virtio,format=raw,file={image},snapshot=on")
        await drive.write(0, b"written")
        assert await drive.read(0, 7) == b"written"
        assert not Path(drive.node.driver.filename() or "").exists()

    with_system(work)
    assert image.read_bytes() == bytes(64 * 1024)


def test_a_device_counts_what_the_guest_does_by_its_clock() -> None:
    """As query-blockstats shows it; refused requests count apart."""

    async def work(system: BlockSystem) -> None:
        slow = "driver=raw,file.driver=null-co,file.size=1M,file.latency-ns=1000000"
        drive = await system.drive_add(f"if=virtio,id=d0,{slow}")
        disk = drive.device
        await disk.write_from(0, memoryview(bytes(4096)))
        await disk.read_into(0, memoryview(bytearray(512)))
        await disk.flush()
        with pytest.raises(BlockIOError):
            await disk.read_into(1 << 20, memoryview(bytearray(512)))
        await drive.read(0, 512)  # past the device, as qemu-io does
        counts = disk.accounting.snapshot()
        assert (counts["wr_operations"], counts["wr_bytes"], counts["rd_operations"]) == (1, 4096, 1)
        assert counts["wr_total_time_ns"] >= 1_000_000
        assert (counts["flush_operations"], counts["invalid_rd_operations"]) == (1, 1)

    with_system(work)
