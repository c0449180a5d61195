"""A mirror loses no guest write, whatever the interleaving: many seeds, both copy modes, pauses and drains in between."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from random import Random
from typing import Any

import pytest

from qblock.drain import drained
from qblock.jobs.mirror import CopyMode, MirrorRequest, start_blockdev_mirror
from qblock.jobs.mirror_job import MirrorJob
from qblock.jobs.new_copy import SyncMode
from qblock.jobs.state import VERBS, JobStatus, JobVerb
from qblock.testing.jobbench import BusyGuest, JobBench, driver_of
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SEEDS = range(40)


async def meddle(bench: JobBench, job: MirrorJob, random: Random) -> None:
    """What people do meanwhile: pause and resume, change the speed, drain."""
    for _ in range(random.randrange(6)):
        await asyncio.sleep(random.choice((0, 0.0003, 0.02)))
        if job.status not in VERBS[JobVerb.PAUSE]:
            return
        match random.randrange(3):
            case 0:
                await bench.jobs.pause(job)
                await asyncio.sleep(random.choice((0, 0.001)))
                if job.user_paused:
                    await bench.jobs.resume(job)
            case 1:
                async with drained(bench.graph.find_node(random.choice("st"))):
                    await asyncio.sleep(0.001)
            case _:
                bench.jobs.set_speed(job, random.choice((0, 10_000_000)))


def request(random: Random, mode: CopyMode) -> MirrorRequest:
    return MirrorRequest(
        job_id="j", sync=SyncMode.FULL, copy_mode=mode,
        granularity=random.choice((512, 4 * KiB, 64 * KiB)),
        buf_size=random.choice((0, 16 * KiB, 256 * KiB)),
    )  # fmt: skip


@pytest.mark.parametrize("mode", CopyMode)
@pytest.mark.parametrize("seed", SEEDS)
def test_both_sides_are_equal_when_the_mirror_lets_go(seed: int, mode: CopyMode) -> None:
    """Guests write throughout; at the moment of the switch the sides are equal, and afterwards nothing is lost."""

    async def main() -> None:
        bench, random = JobBench(seed), Random(seed)
        size = 384 * KiB + 512 * random.randrange(200)
        source = await bench.node("s", size)
        target = await bench.node("t", size, **random.choice(({}, {"discard": "unmap"})))
        await bench.disk(target).write(4096, b"old content")
        for backend in list(bench.graph.backends):
            backend.close()
        if random.random() < 0.3:  # storage that shares blocks, perhaps not to the end
            driver_of(target).prefers_copy_range = True
            driver_of(target).offloads_left = random.choice((3, 1000))
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
            job = await start_blockdev_mirror(bench.system, device="d", target="t", request=request(random, mode))
            meddling = group.create_task(meddle(bench, job, random))
            await bench.until(job, JobStatus.READY)
            await meddling
            if seed % 3:
                bench.jobs.complete(job)
            else:
                await bench.jobs.cancel(job, force=False)
            await bench.jobs.wait(job)
        assert job.error is None
        assert equal == [True]
        assert disk.node is (target if seed % 3 else source)
        assert await disk.read(0, size) == bytes(guest.model)
        assert source.dirty_bitmaps == []
        assert len(bench.graph.nodes) == 2
        await bench.close()

    run(main, Seeded(seed))
