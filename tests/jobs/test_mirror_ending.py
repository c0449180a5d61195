"""A mirror that is told to end does end, however busy the guest and however slow the disk."""

from __future__ import annotations

import asyncio
from typing import Any

import attrs
import pytest

from qblock.backend import BlockBackend
from qblock.clock import LoopClock
from qblock.jobs.mirror import CopyMode, MirrorRequest, start_blockdev_mirror
from qblock.jobs.mirror_job import MirrorJob
from qblock.jobs.new_copy import SyncMode
from qblock.jobs.state import JobStatus, OnError
from qblock.node import BlockDriverState
from qblock.testing.jobbench import Faults, JobBench, driver_of
from qblock.testing.simloop import run
from qblock.units import KiB

SIZE = 256 * KiB
GRANULE = 4 * KiB
FLUSH = 0.1
WRITE = 0.001


@attrs.define
class Rush:
    """A ready mirror to a target whose flushes take a tenth of a second and whose writes a millisecond, and a guest that
    writes every 5 ms all the time. ``longest`` is the longest of its writes, in seconds.
    """

    bench: JobBench
    disk: BlockBackend
    source: BlockDriverState
    target: BlockDriverState
    job: MirrorJob
    writes: int = 0
    longest: float = 0
    over: bool = False

    @classmethod
    async def make(cls, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Rush:
        bench = JobBench()
        source, target = await bench.node("s", SIZE), await bench.node("t", SIZE)
        driver = driver_of(target)
        flush, write = driver.flush, driver.write_from

        async def slow_flush() -> None:
            await LoopClock().sleep_ns(int(FLUSH * 1e9))
            await flush()

        async def slow_write(offset: int, buffer: memoryview, *, fua: bool = False) -> None:
            await LoopClock().sleep_ns(int(WRITE * 1e9))
            await write(offset, buffer, fua=fua)

        monkeypatch.setattr(driver, "flush", slow_flush)
        monkeypatch.setattr(driver, "write_from", slow_write)
        disk = bench.disk(source, "d")
        request = MirrorRequest(job_id="j", sync=SyncMode.FULL, granularity=GRANULE, buf_size=GRANULE)
        job = await start_blockdev_mirror(
            bench.system, device="d", target="t", request=attrs.evolve(request, **changes)
        )
        await bench.until(job, JobStatus.READY)
        return cls(bench, disk, source, target, job)

    async def guest(self) -> None:
        loop = asyncio.get_running_loop()
        while not self.over:
            began = loop.time()
            await self.disk.write(self.writes * 7 * GRANULE % SIZE, self.writes.to_bytes(8, "little"))
            self.longest = max(self.longest, loop.time() - began)
            self.writes += 1
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        self.over = True
        assert not self.source.quiesce_counter and not self.target.quiesce_counter
        await self.bench.close()


@pytest.mark.parametrize("mode", [CopyMode.BACKGROUND, CopyMode.SEMI_SYNC])
@pytest.mark.parametrize("ending", ["complete", "cancel"])
def test_a_guest_that_writes_all_the_time_does_not_put_the_end_off(
    ending: str, mode: CopyMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No flush passes without a write. After a few the guest is held: for two flushes and the little that is left to copy."""

    async def main() -> None:
        rush = await Rush.make(monkeypatch, copy_mode=mode)
        loop = asyncio.get_running_loop()
        guest = loop.create_task(rush.guest())
        await asyncio.sleep(1)
        assert rush.longest == 0
        began = loop.time()
        if ending == "complete":
            rush.bench.jobs.complete(rush.job)
        else:
            await rush.bench.jobs.cancel(rush.job, force=False)
        await rush.bench.jobs.wait(rush.job)
        assert rush.job.error is None
        assert loop.time() - began < 1
        await asyncio.sleep(0.1)
        assert FLUSH < rush.longest < 2.5 * FLUSH
        rush.over = True
        await guest
        assert rush.disk.node is (rush.target if ending == "complete" else rush.source)
        if ending == "complete":
            for number in range(max(0, rush.writes - 64), rush.writes):
                assert await rush.disk.read(number * 7 * GRANULE % SIZE, 8) == number.to_bytes(8, "little")
        await rush.close()

    run(main)


def test_a_slow_guest_is_not_held_longer_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """One write now and then: the job waits for a flush without any, and holds the guest for the last flush only."""

    async def main() -> None:
        rush = await Rush.make(monkeypatch)
        await rush.disk.write(0, b"x")
        rush.bench.jobs.complete(rush.job)
        await asyncio.sleep(FLUSH / 2)
        await rush.disk.write(GRANULE, b"y")
        assert not rush.source.quiesce_counter
        await rush.bench.jobs.wait(rush.job)
        assert (await rush.disk.read(0, 1), await rush.disk.read(GRANULE, 1)) == (b"x", b"y")
        await rush.close()

    run(main)


@pytest.mark.parametrize("trouble", ["stop", "ignore", "pause", "force"])
def test_trouble_while_the_guest_is_held_lets_it_go_on(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that fails then, a person who pauses or cancels: nobody's requests stay held for that."""

    async def main() -> None:
        policy = OnError.IGNORE if trouble == "ignore" else OnError.STOP
        rush = await Rush.make(monkeypatch, on_target_error=policy)
        jobs, job = rush.bench.jobs, rush.job
        guest = asyncio.get_running_loop().create_task(rush.guest())
        await asyncio.sleep(0.5)
        jobs.complete(job)
        while not rush.source.quiesce_counter:
            assert not job.run_ended
            await asyncio.sleep(0.0001)
        match trouble:
            case "stop" | "ignore":
                driver_of(rush.target).faults = Faults("write", 1, 1)
            case "pause":
                await jobs.pause(job)
            case _:
                await jobs.cancel(job)
        if trouble in ("stop", "pause"):
            while not job.paused:
                assert not job.run_ended
                await asyncio.sleep(0.001)
            before = rush.writes
            await asyncio.sleep(1)
            assert rush.writes > before + 100
            assert job.status is JobStatus.STANDBY
            await jobs.resume(job)
        await jobs.wait(job)
        rush.over = True
        await guest
        assert rush.disk.node is (rush.source if trouble == "force" else rush.target)
        await rush.close()

    run(main)
