"""Live block copy of 2011: what is copied, when it switches, what it refuses; on real qcow2 files and virtual time."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from qblock.backend import BlockBackend
from qblock.clock import LoopClock
from qblock.drain import drained
from qblock.driver import BackingLink, SupportsBacking
from qblock.errors import BlockIOError, CommandError, DeviceNotFound, ImageLocked
from qblock.jobs.block_copy import MAX_PASSES, PAUSE_NS, BlockCopyJob, start_block_copy
from qblock.monitor.dialects import MACHINE_DIALECTS, Dialect
from qblock.monitor.machine import MachineOptions
from qblock.node import BlockDriverState
from qblock.opening import OpenPolicy
from qblock.permissions import Perm
from qblock.system import BlockSystem
from qblock.testing.images import make_chain
from qblock.testing.jobbench import BusyGuest, Faults, JobBench, driver_of, eventually
from qblock.testing.machines import LocalMachine, drive_text
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB, MiB

SIZE = 8 * MiB


@attrs.define
class Desk:
    """A system with the drive ``disk``: a qcow2 image with 1 MiB of data over a qcow2 base with 3 MiB."""

    system: BlockSystem
    directory: Path
    events: list[tuple[str, Mapping[str, Any]]]

    @property
    def disk(self) -> BlockBackend:
        return self.system.graph.find_backend("disk")

    def path(self, name: str) -> str:
        return str(self.directory / name)

    async def create(self, name: str, **options: Any) -> None:
        await self.system.opener.create_image("file", {"filename": self.path(name), "size": 0})
        file = {"driver": "file", "filename": self.path(name)}
        await self.system.opener.create_image("qcow2", {"file": file, "size": SIZE, **options})

    async def write(self, name: str, offset: int, length: int, byte: int) -> None:
        writer = BlockBackend(self.system.graph, perm=Perm.WRITE, shared=Perm.ALL)
        writer.insert(await self.system.opener.open_image(self.path(name), fmt="qcow2", read_only=False, backing=False))
        if byte:
            await writer.write(offset, bytes([byte]) * length)
        else:
            await writer.write_zeroes(offset, length)
        writer.close()
        await self.system.opener.close_orphans()

    async def copy(self, name: str = "new", **options: Any) -> BlockCopyJob:
        return await start_block_copy(self.system, device="disk", filename=self.path(name), **options)

    async def finished(self, job: BlockCopyJob) -> BlockDriverState:
        await self.system.jobs.wait(job)
        assert job.error is None
        return self.disk.node

    @property
    def story(self) -> list[str]:
        return [data["status"] if name == "JOB_STATUS_CHANGE" else name for name, data in self.events]


@asynccontextmanager
async def desk(directory: Path) -> AsyncIterator[Desk]:
    async with BlockSystem.create(clock=LoopClock(), policy=OpenPolicy.follow()) as system:
        events: list[tuple[str, Mapping[str, Any]]] = []
        system.events.subscribe(lambda name, data, when: events.append((name, data)))
        made = Desk(system, directory, events)
        await made.create("base")
        await made.write("base", 0, 2 * MiB, 1)
        await made.write("base", 4 * MiB, MiB, 3)
        await made.create("top", **{"backing-file": "base", "backing-fmt": "qcow2"})
        await made.write("top", MiB + 512, MiB, 2)
        await made.write("top", 256 * KiB, 64 * KiB, 0)
        await system.drive_add({"if": "none", "id": "disk", "file": made.path("top"), "format": "qcow2"})
        yield made


def link(node: BlockDriverState) -> BackingLink | None:
    assert isinstance(node.driver, SupportsBacking)
    return node.driver.backing_link()


# ------------------------------------------------------------------------------------------------------------- copying


@pytest.mark.parametrize("incremental", [False, True])
def test_the_device_continues_on_the_target_by_itself(tmp_path: Path, incremental: bool) -> None:
    """Nobody says complete; with -i the new image has the old one's backing file, and the node below is the same."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            base = made.disk.node.backing
            assert base is not None
            job = await made.copy(incremental=incremental)
            node = await made.finished(job)
            assert node.driver.filename() == made.path("new")
            assert await made.disk.read(0, SIZE) == before
            below = node.backing
            assert (below is not None) is incremental
            assert link(node) == (BackingLink(made.path("base"), "qcow2") if incremental else None)
            assert below is None or below.node is base.node
            assert "ready" not in made.story
            assert made.story[-3:] == ["BLOCK_JOB_COMPLETED", "concluded", "null"]
            assert made.path("top") not in {n.driver.filename() for n in made.system.graph.nodes.values()}

    run(main)


def test_the_backing_file_is_found_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names: as it was given beside the base, absolute elsewhere."""
    monkeypatch.chdir(tmp_path)
    Path("elsewhere").mkdir()

    async def main() -> None:
        async with desk(Path()) as made:
            job = await start_block_copy(made.system, device="disk", filename="beside", incremental=True)
            assert link(await made.finished(job)) == BackingLink("base", "qcow2")
        async with desk(Path()) as made:
            before = await made.disk.read(0, SIZE)
            job = await start_block_copy(made.system, device="disk", filename="elsewhere/new", incremental=True)
            assert link(await made.finished(job)) == BackingLink(str(tmp_path / "base"), "qcow2")
            await made.system.drive_del("disk")
            again = await made.system.drive_add({"if": "none", "id": "again", "file": "elsewhere/new"})
            assert await again.read(0, SIZE) == before

    run(main)


def test_an_incremental_copy_copies_the_top_image_only(tmp_path: Path) -> None:
    """The chunks in which the top image holds something: 0 to 3 MiB here; the rest of the base is not read."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            whole = await made.copy("full")
            await made.system.jobs.wait(whole)
            assert whole.progress_done == 4 * MiB

        async with desk(tmp_path) as made:
            top = await made.copy("thin", incremental=True)
            await made.system.jobs.wait(top)
            assert top.progress_done == top.progress_total == 3 * MiB

    run(main)


@pytest.mark.parametrize("cluster", [64 * KiB, 2 * MiB])
@pytest.mark.parametrize("incremental", [False, True])
def test_an_existing_image_is_used(tmp_path: Path, incremental: bool, cluster: int) -> None:
    """Made by management beforehand: what format, clusters and directory it likes; parts of clusters are not lost."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            made.disk.set_permissions(made.disk.perm | Perm.WRITE, made.disk.shared)
            await made.disk.write(5 * MiB, b"beside a MiB of the base")
            before = await made.disk.read(0, SIZE)
            backing = {"backing-file": "base", "backing-fmt": "qcow2"} if incremental else {}
            await made.create("new", **{"cluster-size": cluster}, **backing)
            node = await made.finished(await made.copy(incremental=incremental))
            assert node.driver.info().cluster_size == cluster
            assert await made.disk.read(0, SIZE) == before

    run(main)


def test_old_content_of_an_existing_image_does_not_show(tmp_path: Path) -> None:
    """A full copy to an image that is not blank writes zeroes too."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            await made.create("new")
            await made.write("new", 5 * MiB, MiB, 9)
            await made.finished(await made.copy())
            assert await made.disk.read(0, SIZE) == before

    run(main)


REFUSED: Mapping[str, tuple[dict[str, Any], bool, str]] = {
    "other size": ({"size": SIZE + MiB}, False, "same size"),
    "backing of its own": ({"backing-file": "base", "backing-fmt": "qcow2"}, False, "backing file"),
    "no backing": ({}, True, "backing file of the device"),
    "another backing": ({"backing-file": "other", "backing-fmt": "qcow2"}, True, "backing file of the device"),
}


@pytest.mark.parametrize(("options", "incremental", "text"), REFUSED.values(), ids=REFUSED)
def test_an_image_that_does_not_fit_is_left_alone(
    tmp_path: Path, options: dict[str, Any], incremental: bool, text: str
) -> None:
    """It may be somebody's: the copy is refused, the file unchanged, the device free."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.create("other")
            await made.create("new", **options)
            content = Path(made.path("new")).read_bytes()
            with pytest.raises(CommandError, match=text):
                await made.copy(incremental=incremental)
            assert Path(made.path("new")).read_bytes() == content
            await made.finished(await made.copy("another"))

    run(main)


def test_an_incremental_copy_takes_no_image_with_data(tmp_path: Path) -> None:
    """They would show where the source shows its base."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.create("new", **{"backing-file": "base", "backing-fmt": "qcow2"})
            await made.write("new", 6 * MiB, 512, 9)
            with pytest.raises(CommandError, match="data of its own"):
                await made.copy(incremental=True)

    run(main)


@pytest.mark.parametrize("name", ["top", "base", "nowhere/new"])
def test_files_in_use_and_missing_directories_are_refused(tmp_path: Path, name: str) -> None:
    """The device's own image is no target."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            with pytest.raises(ImageLocked if name != "nowhere/new" else BlockIOError):
                await made.copy(name)
            with pytest.raises(DeviceNotFound):
                await start_block_copy(made.system, device="disc", filename=made.path("new"))
            assert list(made.system.jobs.jobs) == []
            assert len(made.system.graph.nodes) == 4

    run(main)


def test_one_job_at_a_time(tmp_path: Path) -> None:
    """The device is busy meanwhile, for a second copy too."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.copy("one", speed=MiB)
            with pytest.raises(CommandError):
                await made.copy("two")
            assert not Path(made.path("two")).exists()

    run(main)


def test_the_speed_limit_is_that_of_block_jobs(tmp_path: Path) -> None:
    """4 MiB at 1 MiB/s; the progress is told meanwhile."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            job = await made.copy(speed=MiB)
            await asyncio.sleep(1.5)
            (shown,) = made.system.jobs.query_block_jobs()
            assert (shown["type"], shown["device"], shown["len"], shown["offset"], shown["speed"]) == (
                "block-copy", "disk", 4 * MiB, 2 * MiB, MiB,
            )  # fmt: skip
            await made.finished(job)
            assert 3.9 < asyncio.get_running_loop().time() < 4.2

    run(main)


def test_a_speed_can_be_set_before_the_first_byte_is_copied(tmp_path: Path) -> None:
    """The command of the proposal has no argument for it."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            job = await made.copy()
            (shown,) = made.system.jobs.query_block_jobs()
            assert (shown["offset"], shown["len"]) == (0, SIZE), "it does not look as if it were done"
            made.system.jobs.set_speed(job, MiB)
            await asyncio.sleep(3.5)
            assert job.progress_done == 4 * MiB and not job.run_ended
            await made.finished(job)

    run(main)


@pytest.mark.parametrize("after", [0, 0.5, 2.5])
def test_a_cancel_leaves_the_device_where_it_is(tmp_path: Path, after: float) -> None:
    """Until the switch nothing has happened to the source."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            before, node = await made.disk.read(0, SIZE), made.disk.node
            job = await made.copy(speed=MiB)
            await asyncio.sleep(after)
            await made.system.jobs.cancel(job, force=False)
            await made.system.jobs.wait(job)
            assert job.cancelled
            assert made.story[-3:] == ["BLOCK_JOB_CANCELLED", "concluded", "null"]
            assert made.disk.node is node
            assert not node.dirty_bitmaps
            assert await made.disk.read(0, SIZE) == before

    run(main)


# ------------------------------------------------------------------------------------------------- while the guest writes


async def bench_copy(bench: JobBench, monkeypatch: pytest.MonkeyPatch, target: BlockDriverState) -> BlockCopyJob:
    """A copy from the device d to a node in memory, which stands for the file."""

    async def open_image(filename: str, **options: Any) -> BlockDriverState:
        assert filename == "file of t"
        return target

    monkeypatch.setattr(bench.system.opener, "open_image", open_image)
    return await start_block_copy(bench.system, device="d", filename="file of t")


@pytest.mark.parametrize("seed", range(30))
def test_no_guest_write_is_lost_whatever_the_interleaving(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests write throughout; the sides are equal at the switch, and afterwards the disk holds what was written."""

    async def main() -> None:
        bench = JobBench(seed)
        size = 3 * MiB + 512 * bench.random.randrange(200)
        source, target = await bench.node("s", size), await bench.node("t", size)
        disk = bench.disk(source, "d")
        guest = BusyGuest(disk, seed)
        await guest.fill()
        equal = []

        def watch(event: str, data: Mapping[str, Any]) -> None:
            if data.get("status") == "pending":
                equal.append(driver_of(source).content() == driver_of(target).content())

        bench.listeners.append(watch)
        async with asyncio.TaskGroup() as group:
            group.create_task(guest.run(40))
            job = await bench_copy(bench, monkeypatch, target)
            await bench.jobs.wait(job)
        assert job.error is None
        assert equal == [True]
        assert disk.node is target
        assert await disk.read(0, size) == bytes(guest.model)
        await bench.close()

    run(main, Seeded(seed))


@pytest.mark.parametrize("operation", ["read", "write", "flush"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 7])
def test_a_failed_request_fails_the_copy_and_spares_the_guest(
    operation: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever request it is, also in the pause: the device stays on the source, and requests go on."""

    async def main() -> None:
        bench = JobBench(nth)
        source, target = await bench.node("s", 2 * MiB), await bench.node("t", 2 * MiB)
        disk = bench.disk(source, "d")
        guest = BusyGuest(disk, nth)
        await guest.fill()
        faulty = driver_of(source if operation == "read" else target)
        faulty.faults = Faults(operation, nth, 1000)

        def repair(event: str, data: Mapping[str, Any]) -> None:
            if data.get("status") in ("pending", "aborting"):
                faulty.faults = Faults()  # from here on it would be the guest's own trouble

        bench.listeners.append(repair)
        async with asyncio.TaskGroup() as group:
            group.create_task(guest.run(30))
            job = await bench_copy(bench, monkeypatch, target)
            await bench.jobs.wait(job)
        if job.error is None:  # there were fewer requests of that kind
            assert nth > 1
            assert disk.node is target
        else:
            assert bench.story[-3:] == ["COMPLETED", "concluded", "null"]
            assert "ERROR" in bench.story
            assert disk.node is source
        assert await disk.read(0, 2 * MiB) == bytes(guest.model)
        assert not source.quiesce_counter and not target.quiesce_counter
        await bench.close()

    run(main, Seeded(nth))


class SlowWrites:
    """Makes a node's writes take their time: ``ns_per_mib`` nanoseconds for a MiB."""

    def __init__(self, node: BlockDriverState, ns_per_mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns_per_mib = ns_per_mib
        write = node.driver.write_from

        async def slow(offset: int, buffer: memoryview, *, fua: bool = False) -> None:
            await LoopClock().sleep_ns(self.ns_per_mib * len(buffer) // MiB)
            await write(offset, buffer, fua=fua)

        monkeypatch.setattr(node.driver, "write_from", slow)


async def race(monkeypatch: pytest.MonkeyPatch, *, every: float) -> tuple[BlockCopyJob, float]:
    """A copy of 16 MiB at 10 ms per MiB to a guest that dirties a random MiB ``every`` seconds; the longest write, in s."""
    bench = JobBench()
    source, target = await bench.node("s", 16 * MiB), await bench.node("t", 16 * MiB)
    SlowWrites(target, 10_000_000, monkeypatch)
    disk = bench.disk(source, "d")
    await disk.write(0, b"x" * (16 * MiB))
    loop, worst, over = asyncio.get_running_loop(), 0.0, False

    async def guest() -> None:
        nonlocal worst
        number = 0
        while not over:
            began = loop.time()
            await disk.write(number % 16 * MiB, b"y" * 512)
            worst = max(worst, loop.time() - began)
            number += 7
            await asyncio.sleep(every)

    async with asyncio.TaskGroup() as group:
        job = await bench_copy(bench, monkeypatch, target)
        group.create_task(guest())
        await bench.jobs.wait(job)
        over = True
    assert job.error is None and disk.node is target
    await bench.close()
    return job, worst


def test_the_switch_waits_until_the_pause_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A MiB every 15 ms against one every 10 ms: the passes get shorter, and the guest is held for 30 ms at most."""

    async def main() -> None:
        job, worst = await race(monkeypatch, every=0.015)
        assert 0 < job.passes < MAX_PASSES
        assert job.held_ns is not None and job.held_ns <= PAUSE_NS
        assert worst <= 0.031

    run(main)


def test_the_pause_is_foreseen_from_the_last_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that was slow in the beginning and is fast now is no reason for more passes."""

    async def main() -> None:
        bench = JobBench()
        source, target = await bench.node("s", 16 * MiB), await bench.node("t", 16 * MiB)
        slow = SlowWrites(target, 100_000_000, monkeypatch)
        disk = bench.disk(source, "d")
        await disk.write(0, b"x" * (16 * MiB))
        job = await bench_copy(bench, monkeypatch, target)
        await asyncio.sleep(1.65)  # the last of 16 chunks is being copied
        slow.ns_per_mib = 1_000_000
        for moment in (0, 0.0575):  # now, and while the last of 8 chunks is being copied again
            await asyncio.sleep(moment)
            await disk.write(0, b"y" * (8 * MiB))
        await bench.jobs.wait(job)
        assert job.passes == 1 and job.held_ns == 8_000_000
        await bench.close()

    run(main)


def test_a_guest_that_writes_too_fast_is_held_for_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A MiB each millisecond: no pass gets shorter, so after ten the rest, all of it, is copied in one long pause."""

    async def main() -> None:
        job, worst = await race(monkeypatch, every=0.001)
        assert job.passes == MAX_PASSES
        assert job.held_ns is not None and job.held_ns >= 15 * 10_000_000
        assert worst > 0.14

    run(main)


def test_a_write_that_is_under_way_at_the_beginning_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passed the place where bitmaps are looked at before there was one, so nothing would tell the job of it."""

    async def main() -> None:
        bench = JobBench()
        source, target = await bench.node("s", 2 * MiB), await bench.node("t", 2 * MiB)
        disk = bench.disk(source, "d")
        await disk.write(0, b"x" * (2 * MiB))
        SlowWrites(source, 1_000_000_000, monkeypatch)
        write = asyncio.ensure_future(disk.write(0, b"y" * MiB))
        await bench.system.clock.sleep_ns(1)
        assert source.in_flight
        job = await bench_copy(bench, monkeypatch, target)
        assert write.done()
        await bench.jobs.wait(job)
        assert disk.node is target and await disk.read(0, MiB) == b"y" * MiB
        await bench.close()

    run(main)


async def in_the_pause(
    bench: JobBench, monkeypatch: pytest.MonkeyPatch
) -> tuple[BlockBackend, BlockDriverState, BlockCopyJob]:
    """A disk full of ``y``, a target of which everything is to be copied once more, and a job that holds the guest for that."""
    source, target = await bench.node("s", 16 * MiB), await bench.node("t", 16 * MiB)
    SlowWrites(target, 10_000_000, monkeypatch)
    monkeypatch.setattr("qblock.jobs.block_copy.MAX_PASSES", 0)
    disk = bench.disk(source, "d")
    await disk.write(0, b"x" * (16 * MiB))
    job = await bench_copy(bench, monkeypatch, target)
    await asyncio.sleep(0.255)  # the last of 16 chunks is being copied: now all are dirty again
    await disk.write(0, b"y" * (16 * MiB))
    await eventually(lambda: source.quiesce_counter)
    return disk, target, job


def test_in_the_pause_it_makes_room_for_somebody_elses_drained_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who drains the target relies on it that nobody writes there, the job that holds the guest included."""

    async def main() -> None:
        bench = JobBench()
        disk, target, job = await in_the_pause(bench, monkeypatch)
        async with drained(target):
            copied = driver_of(target).content()
            assert b"x" in copied, "it has not been waited for the end"
            await asyncio.sleep(1)
            assert driver_of(target).content() == copied
        await bench.jobs.wait(job)
        assert disk.node is target and driver_of(target).content() == b"y" * (16 * MiB)
        await bench.close()

    run(main)


def test_the_target_is_durable_before_the_guest_goes_on_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guest had flushed at the source has to survive at the target too."""

    async def main() -> None:
        bench = JobBench()
        source, target = await bench.node("s", 2 * MiB), await bench.node("t", 2 * MiB)
        disk = bench.disk(source, "d")
        await disk.write(0, b"x" * (2 * MiB))
        SlowWrites(target, 10_000_000, monkeypatch)
        monkeypatch.setattr("qblock.jobs.block_copy.MAX_PASSES", 0)
        requests: list[str] = []
        for name in ("write_from", "flush"):
            monkeypatch.setattr(driver_of(target), name, noting(name, requests, getattr(driver_of(target), name)))
        job = await bench_copy(bench, monkeypatch, target)
        await asyncio.sleep(0.115)  # the second chunk is being copied: now the first one is dirty again
        await disk.write(0, b"y" * 512)
        await bench.jobs.wait(job)
        assert job.error is None
        assert requests == ["write_from", "write_from", "flush", "write_from", "flush"]
        await bench.close()

    run(main)


def noting(name: str, into: list[str], request: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """The request, which appends ``name`` when it is made."""

    async def noted(*args: Any, **options: Any) -> None:
        into.append(name)
        await request(*args, **options)

    return noted


def test_a_disk_that_nobody_may_write_stays_so(tmp_path: Path) -> None:
    """The target is written by the job alone, and is read-only when it has taken the source's place."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.system.drive_del("disk")
            await made.system.drive_add(
                {"if": "none", "id": "disk", "file": made.path("top"), "format": "qcow2", "read-only": True}
            )
            node = await made.finished(await made.copy())
            assert node.read_only and node.driver.filename() == made.path("new")

    run(main)


def test_a_cancel_in_the_pause_comes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last chunk is copied there is a way back."""

    async def main() -> None:
        bench = JobBench()
        disk, _, job = await in_the_pause(bench, monkeypatch)
        write = asyncio.ensure_future(disk.write(0, b"held"))
        await asyncio.sleep(0.025)
        assert not write.done()
        await bench.jobs.cancel(job)
        cancelled_at = asyncio.get_running_loop().time()
        await bench.jobs.wait(job)
        assert asyncio.get_running_loop().time() - cancelled_at <= 0.01, "not all of the rest is copied first"
        await write
        assert job.cancelled and disk.node is job.source
        assert await disk.read(0, 5) == b"heldy"
        await bench.close()

    run(main)


# ------------------------------------------------------------------------------------------------- in the human monitor


def machine(directory: Path) -> LocalMachine:
    *_, top = make_chain(directory, 4 * MiB, [("base", {0: b"base"}), ("top", {})])
    return LocalMachine(
        options=MachineOptions(
            drives=(drive_text(top, "virtio0", "qcow2"),), seed=0, dialect=Dialect.BLOCK_COPY_2011
        )
    )


def test_a_session_of_2011(tmp_path: Path) -> None:
    """The command line of the proposal, and the commands of one year later that show and steer the copy."""
    with machine(tmp_path) as local:
        local.guest_write("virtio0", 0, 64 * KiB, 7)
        new = tmp_path / "new.qcow2"
        assert local.qmp.hmp("block_copy virtio1 x") == "Error: There is no device 'virtio1'\n"
        assert "unsupported option -x" in local.qmp.hmp("block_copy virtio0 x -x")
        assert "file name comes first" in local.qmp.hmp("block_copy virtio0 -i")
        assert local.qmp.hmp(f"block_copy virtio0 {new} -i") == ""
        local.guest_write("virtio0", MiB, 512, 8)
        event = local.qmp.wait_event("BLOCK_JOB_COMPLETED")
        assert (event.data["type"], event.data["device"]) == ("block-copy", "virtio0")
        assert local.qmp.hmp("info block-jobs") == "No active jobs\n"
        assert str(new) in local.qmp.hmp("info block")
        assert local.guest_read("virtio0", 0, 512) == bytes([7]) * 512
        assert local.guest_read("virtio0", MiB, 512) == bytes([8]) * 512


def after_a_kill(directory: Path, seconds: float) -> tuple[str, bytes, bytes]:
    """What management has seen when it and the machine are killed ``seconds`` after the start of a copy that takes 4 s; the
    guest wrote, and was answered, a tenth before. Then what source and target hold in that place.

    Management looks every 0.7 seconds. A killed process leaves its files as they are: the kill is a copy of them.
    """
    directory.mkdir()
    source, target = make_chain(directory, 4 * MiB, [("base", {0: bytes([1]) * (4 * MiB)}), ("top", {})])[1], directory / "new"
    options = MachineOptions(drives=(drive_text(source, "virtio0", "qcow2"),), seed=0, dialect=Dialect.BLOCK_COPY_2011)
    with LocalMachine(options=options) as local:
        local.run(start_block_copy(local.machine.system, device="virtio0", filename=str(target), speed=MiB))
        seen = ""
        for look in range(5):
            local.advance("700ms")
            seen += f"{look}: {local.qmp.hmp('info block-jobs')}"
            seen += "".join(event.name for event in local.qmp.events())
        local.advance(round((seconds - 3.6) * 1e9))
        local.guest_write("virtio0", 0, 512, 2)
        local.run(local.machine.system.graph.find_backend("virtio0").flush())
        local.advance("100ms")
        left = directory / "left"
        left.mkdir()
        for path in (source, target, directory / "base"):
            shutil.copy(path, left)
    return seen, content(left / "top"), content(left / "new")


def content(path: Path) -> bytes:
    """The first sector of an image."""

    async def main() -> bytes:
        async with BlockSystem.create(clock=LoopClock(), policy=OpenPolicy.follow()) as system:
            backend = await system.drive_add({"if": "none", "id": "d", "file": str(path), "read-only": "on"})
            return await backend.read(0, 512)

    return run(main)


def test_nobody_knows_from_the_outside_on_which_side_of_the_switch_it_died(tmp_path: Path) -> None:
    """The reason for drive-reopen and its witness. Two accidents, before and after the switch; management has seen the same
    in both, both files exist and open in both. In one the guest's last write is in the source alone, in the other in the target.
    """
    old, new = bytes([1]) * 512, bytes([2]) * 512
    seen_before, *before = after_a_kill(tmp_path / "before", 3.9)
    seen_after, *after = after_a_kill(tmp_path / "after", 4.19)
    assert (before, after) == ([new, old], [old, new])
    assert seen_before == seen_after


@pytest.mark.parametrize("dialect", [d for d in MACHINE_DIALECTS if d is not Dialect.BLOCK_COPY_2011])
def test_block_copy_is_of_its_time_only(dialect: Dialect) -> None:
    """No other dialect has it."""
    with LocalMachine(options=MachineOptions(seed=0, dialect=dialect)) as local:
        assert "unknown command" in local.qmp.hmp("block_copy a b")
