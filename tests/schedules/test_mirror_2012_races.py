"""The mirror of 2012 loses no write and no race is forgotten: guests against copies, cancels against the end of copying."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest

from qblock.backend import BlockBackend
from qblock.clock import LoopClock
from qblock.drain import drained
from qblock.jobs.mirror_2012 import Mirror2012Job, Mode2012, Target2012, start_mirror_2012
from qblock.jobs.state import VERBS, JobStatus, JobVerb
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import MachineOptions
from qblock.permissions import Perm
from qblock.testing.images import make_image
from qblock.testing.jobbench import BusyGuest, JobBench, ShakyMemory, driver_of, eventually
from qblock.testing.machines import LocalMachine
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.tools.img import main as qblock_img
from qblock.units import KiB, MiB

ONTO_T = Target2012(filename='json:{"driver": "raw", "file": "t"}', mode=Mode2012.EXISTING)


def is_in_sync(job: Mirror2012Job) -> bool:
    """What management sees of it."""
    return job.progress_done == job.progress_total


async def meddle(bench: JobBench, job: Mirror2012Job, random: Random) -> None:
    """Drained sections and other speeds, at odd moments."""
    for _ in range(random.randrange(6)):
        await asyncio.sleep(random.choice((0, 0.0003, 0.02)))
        if job.status not in VERBS[JobVerb.SET_SPEED]:
            return
        if random.random() < 0.5:
            async with drained(bench.graph.find_node(random.choice("st"))):
                await asyncio.sleep(0.001)
        else:
            bench.jobs.set_speed(job, random.choice((0, 10_000_000)))


@pytest.mark.parametrize("seed", range(40))
def test_both_sides_are_equal_when_the_mirror_has_completed(seed: int) -> None:
    """Guests write throughout, before it is in sync, in sync, and while it ends."""

    async def main() -> None:
        bench, random = JobBench(seed), Random(seed)
        size = 4 * MiB + 512 * random.randrange(200)
        source, target = await bench.node("s", size), await bench.node("t", size)
        if seed % 2:
            await bench.disk(target).write(2 * MiB, b"old content")
            bench.graph.backends[-1].close()
        disk = bench.disk(source, "d")
        guest = BusyGuest(disk, seed, block=40 * KiB)
        await guest.fill()
        equal = []

        def watch(event: str, data: Mapping[str, Any]) -> None:
            if data.get("status") == "pending":  # the source is still drained
                equal.append(driver_of(source).content() == driver_of(target).content())

        bench.listeners.append(watch)
        async with asyncio.TaskGroup() as group:
            group.create_task(guest.run(60))
            job = await start_mirror_2012(bench.system, device="d", target=ONTO_T, full=True)
            meddling = group.create_task(meddle(bench, job, random))
            await eventually(lambda: is_in_sync(job))
            await asyncio.sleep(random.choice((0, 0.01, 0.3)))
            assert await bench.jobs.cancel_sync(job, force=seed % 3 == 0) is None
            await meddling
        assert equal == [True]
        assert bench.story[-3:] == ["pending", "COMPLETED", "concluded"] or bench.story[-2:] == ["concluded", "null"]
        assert await disk.read(0, size) == bytes(guest.model)
        assert source.dirty_bitmaps == []
        assert len(bench.graph.nodes) == 2
        await bench.close()

    run(main, Seeded(seed))


@pytest.mark.parametrize("seed", range(10))
def test_an_offset_that_equals_the_length_means_that_the_copy_is_there(seed: int) -> None:
    """Readiness has no other sign, so it must not show while the last chunk is still on its way."""

    async def main() -> None:
        bench = JobBench(seed)
        source, target = await bench.node("s", 3 * MiB), await bench.node("t", 3 * MiB)
        guest = BusyGuest(bench.disk(source, "d"), seed, block=40 * KiB)
        await guest.fill()
        job = await start_mirror_2012(bench.system, device="d", target=ONTO_T, full=True)
        while not is_in_sync(job):
            await LoopClock().sleep_ns(10_000)
        assert driver_of(source).content() == driver_of(target).content()
        await bench.close()

    run(main, Seeded(seed))


# ------------------------------------------------------------------------------------------- a write and a copy of one chunk


class Gated(ShakyMemory):
    """Memory whose next read or write stops half-way until told to go on."""

    name: ClassVar[str] = "gated-memory"

    def stop(self, operation: str) -> None:
        """The next ``operation`` is to stop."""
        self.stops, self.stopped, self.go_on = operation, asyncio.Event(), asyncio.Event()

    stops: str = ""

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `MemoryDriver`."""
        await self._in_halves("read", super().read_into, offset, buffer)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `MemoryDriver`."""
        await self._in_halves("write", super().write_from, offset, buffer)

    async def _in_halves(self, operation: str, request: Any, offset: int, buffer: memoryview) -> None:
        half = len(buffer) // 2
        await request(offset, buffer[:half])
        if self.stops == operation:
            self.stops = ""
            self.stopped.set()
            await self.go_on.wait()
        await request(offset + half, buffer[half:])


async def gated(bench: JobBench) -> tuple[Gated, ShakyMemory]:
    """A disk ``d`` of one chunk, full of ``a``, on gated memory, and the node ``t`` for its copy."""
    bench.system.registry.register(Gated)
    source = await bench.system.opener.open_blockdev({"driver": Gated.name, "node-name": "s", "size": MiB})
    target = await bench.node("t", MiB)
    await bench.disk(source, "d").write(0, b"a" * MiB)
    assert isinstance(source.driver, Gated)
    return source.driver, driver_of(target)


def test_a_write_that_is_done_during_the_copy_of_its_chunk_leaves_its_bit() -> None:
    """The bit is cleared before the read: the copy that is torn by the write is followed by another one."""

    async def main() -> None:
        bench = JobBench()
        source, target = await gated(bench)
        source.stop("read")
        job = await start_mirror_2012(bench.system, device="d", target=ONTO_T, full=True)
        await source.stopped.wait()
        assert job.dirty.count == 0, "cleared before the read"
        await bench.graph.find_backend("d").write(0, b"b" * MiB)
        assert job.dirty.count == MiB
        assert not is_in_sync(job)
        source.go_on.set()
        await eventually(lambda: is_in_sync(job))
        assert target.content() == source.content() == b"b" * MiB
        await bench.close()

    run(main)


@pytest.mark.parametrize("cancels", ["while it is written", "when it is done"])
def test_a_write_that_began_before_the_copy_and_ends_after_it_sets_its_bit_at_its_end(cancels: str) -> None:
    """A bit set when the write began would be cleared by the copy that reads the old half: the write would be lost."""

    async def main() -> None:
        bench = JobBench()
        source, target = await gated(bench)
        disk = bench.graph.find_backend("d")
        job = await start_mirror_2012(bench.system, device="d", target=ONTO_T, full=True)
        await eventually(lambda: is_in_sync(job))
        source.stop("write")
        write = asyncio.create_task(disk.write(0, b"b" * MiB))
        await source.stopped.wait()
        job.dirty.set(0, MiB)  # as if there had been another write just before
        await eventually(lambda: not job.dirty.count)
        assert target.content() == b"b" * (MiB // 2) + b"a" * (MiB // 2)
        if cancels == "while it is written":
            await bench.jobs.cancel(job, force=False)
            await asyncio.sleep(1)
            assert job.status is JobStatus.RUNNING, "it waits for the write"
        source.go_on.set()
        await write
        if cancels == "when it is done":
            assert job.dirty.count == MiB
            await bench.jobs.cancel(job, force=False)
        await bench.jobs.wait(job)
        assert job.error is None
        assert target.content() == source.content() == b"b" * MiB
        await bench.close()

    run(main)


def test_a_write_below_a_filter_is_waited_for_at_the_end() -> None:
    """Who writes beside the device's filters is drained too, or the copy would lack that one's last write."""

    async def main() -> None:
        bench = JobBench()
        source, target = await gated(bench)
        bench.graph.find_backend("d").close()
        await bench.system.opener.open_blockdev({"driver": "blkdebug", "node-name": "f", "image": "s"})
        bench.graph.find_node("f").monitor_owned = True
        beside = BlockBackend(bench.graph, perm=Perm.CONSISTENT_READ | Perm.WRITE, shared=Perm.ALL)
        beside.insert(source.node)
        job = await start_mirror_2012(bench.system, device="f", target=ONTO_T, full=True)
        await eventually(lambda: is_in_sync(job))
        source.stop("write")
        async with asyncio.TaskGroup() as group:
            group.create_task(beside.write(0, b"b" * MiB))
            await source.stopped.wait()
            await bench.jobs.cancel(job)
            await asyncio.sleep(1)
            assert job.status is JobStatus.RUNNING
            source.go_on.set()
        await bench.jobs.wait(job)
        assert target.content() == b"b" * MiB
        await bench.close()

    run(main)


async def copying_in_sync(bench: JobBench) -> tuple[Gated, ShakyMemory, Mirror2012Job]:
    """A mirror that was in sync, and is reading the ``b`` that was written since; it waits at ``source``."""
    source, target = await gated(bench)
    job = await start_mirror_2012(bench.system, device="d", target=ONTO_T, full=True)
    await eventually(lambda: is_in_sync(job))
    source.stop("read")
    await bench.graph.find_backend("d").write(0, b"b" * MiB)
    await source.stopped.wait()
    return source, target, job


def test_a_cancel_that_comes_during_a_copy_in_sync_is_followed_by_no_sleep() -> None:
    """Once cancelled the job never sleeps again, also when it notices only after a request of its own."""

    async def main() -> None:
        bench = JobBench()
        source, target, job = await copying_in_sync(bench)
        sleeps = []
        bench.system.env.trace.listen("co_sleep_begin", lambda name, members: sleeps.append(members))
        await bench.jobs.cancel(job)
        source.go_on.set()
        await bench.jobs.wait(job)
        assert sleeps == []
        assert target.content() == b"b" * MiB
        await bench.close()

    run(main)


def test_a_cancel_that_comes_with_somebody_elses_drained_section_waits_for_its_end() -> None:
    """Who drains the target relies on it that nobody writes there, a mirror that ends included."""

    async def main() -> None:
        bench = JobBench()
        source, target, job = await copying_in_sync(bench)
        asyncio.get_running_loop().call_later(1, source.go_on.set)
        await bench.jobs.cancel(job)
        async with drained(target.node):
            assert job.paused
            job.dirty.set(0, MiB)
            await asyncio.sleep(1)
            assert job.dirty.count == MiB and not job.run_ended
        await bench.jobs.wait(job)
        assert target.content() == b"b" * MiB
        await bench.close()

    run(main)


def test_a_write_that_is_under_way_when_the_job_begins_is_waited_for() -> None:
    """It passed the place where bitmaps are looked at before there was one, so nothing would tell the job of it."""

    async def main() -> None:
        bench = JobBench()
        source, target = await gated(bench)
        source.stop("write")
        async with asyncio.TaskGroup() as group:
            group.create_task(bench.graph.find_backend("d").write(0, b"b" * MiB))
            await source.stopped.wait()
            starting = group.create_task(start_mirror_2012(bench.system, device="d", target=ONTO_T, full=True))
            await asyncio.sleep(1)
            assert not starting.done()
            source.go_on.set()
        await eventually(lambda: is_in_sync(starting.result()))
        assert target.content() == source.content() == b"b" * MiB
        await bench.close()

    run(main)


# ------------------------------------------------------------------------------------- management against the end of copying


def outcome_of_a_race(directory: Path, seed: int) -> str:
    """Management sees that the job is not in sync, and asks to cancel. How does the job end?"""
    disk, copy = directory / f"{seed}.qcow2", directory / f"{seed}-copy.qcow2"
    make_image(disk, "2M", {0: b"x" * 4096, "1M": b"y" * 4096})
    with LocalMachine(Seeded(seed), MachineOptions(seed=0, dialect=Dialect.RFC_2012)) as machine:
        machine.add_drive(disk)
        client = machine.qmp.client

        async def race() -> str:
            await client.execute("drive-mirror", device="virtio0", target=str(copy), full=True)
            (job,) = await client.execute("query-block-jobs")
            assert job["offset"] < job["len"], "management does not take it for in sync"
            await client.execute("block-job-cancel", device="virtio0")
            event = await client.wait_event("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
            assert (event.data["offset"] == event.data["len"]) == (event.name == "BLOCK_JOB_COMPLETED")
            return event.name

        outcome = machine.run(race())
        machine.run(client.execute("query-status"))
        assert not client.events, "one end is all there is"
    if outcome == "BLOCK_JOB_COMPLETED":
        assert qblock_img(["compare", str(disk), str(copy)]) == 0
    return outcome


def test_a_cancel_may_lose_the_race_and_get_a_completion(tmp_path: Path) -> None:
    """Who comes first, the command or the end of the copying, is for the schedule to say; COMPLETED means there is a copy."""
    outcomes = {outcome_of_a_race(tmp_path, seed) for seed in range(30)}
    assert outcomes == {"BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"}


@pytest.mark.parametrize("ending", ["quit", "drive_del"])
@pytest.mark.parametrize("seed", range(8))
def test_a_busy_guest_does_not_part_the_two_sides_again(seed: int, ending: str) -> None:
    """Between the end of the copying and the end of the disk no write of the guest reaches the source any more."""
    size = 3 * MiB
    with LocalMachine(Seeded(seed), MachineOptions(seed=seed, dialect=Dialect.RFC_2012)) as local:
        machine = local.machine
        machine.system.registry.register(ShakyMemory)

        async def main() -> bool:
            for name in "st":
                await machine.add_blockdev(f"driver={ShakyMemory.name},node-name={name},size={size}")
                driver_of(machine.system.graph.find_node(name)).random = Random(seed)
            await machine.add_drive("if=virtio,id=d,file.driver=raw,file.file=s,format=raw")
            machine.start_guest("d", writes_per_second=2000)
            job = await start_mirror_2012(machine.system, device="d", target=ONTO_T, full=True)
            await eventually(lambda: is_in_sync(job))
            await asyncio.sleep(0.001 * seed)
            if ending == "quit":
                await machine.hub.quit()
            else:
                assert await local.qmp.client.hmp("drive_del d") == ""
            assert job.error is None
            await asyncio.sleep(0.01)
            source, target = (driver_of(machine.system.graph.find_node(name)).content() for name in "st")
            return source == target

        assert local.run(main())
