"""Whatever request fails, whenever somebody cancels: a mirror obeys its policy, and nothing hangs."""

from __future__ import annotations

import asyncio
import errno
from random import Random

import attrs
import pytest

from qblock.errors import QBlockError
from qblock.jobs.mirror import CopyMode, MirrorRequest, start_blockdev_mirror
from qblock.jobs.mirror_job import MirrorJob
from qblock.jobs.new_copy import SyncMode
from qblock.jobs.state import VERBS, JobStatus, JobVerb, OnError
from qblock.node import BlockDriverState
from qblock.testing.jobbench import BusyGuest, Faults, JobBench, driver_of
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SIZE = 200 * KiB
REQUEST = MirrorRequest(job_id="j", sync=SyncMode.FULL, granularity=4 * KiB, buf_size=16 * KiB)
SIDES = (("s", "read"), ("t", "write"), ("t", "flush"))


@attrs.define
class Stage:
    """A source with content, a target, and a guest that has a model."""

    bench: JobBench
    source: BlockDriverState
    target: BlockDriverState
    guest: BusyGuest

    @classmethod
    async def make(cls, seed: int) -> Stage:
        bench = JobBench(seed)
        source, target = await bench.node("s", SIZE), await bench.node("t", SIZE)
        guest = BusyGuest(bench.disk(source, "d"), seed)
        await guest.fill()
        return cls(bench, source, target, guest)

    async def mirror(self, **changes: object) -> MirrorJob:
        return await start_blockdev_mirror(
            self.bench.system, device="d", target="t", request=attrs.evolve(REQUEST, **changes)  # type: ignore[arg-type]
        )

    async def assert_pristine(self) -> None:
        """The source is where it was, the guest lost nothing, the job left nothing behind."""
        driver_of(self.source).faults = Faults()
        assert self.guest.disk.node is self.source
        assert await self.guest.disk.read(0, SIZE) == bytes(self.guest.model)
        assert set(self.bench.graph.nodes) == {"s", "t"}
        assert not self.source.blockers
        assert not self.source.dirty_bitmaps
        assert not self.target.parents
        assert not self.source.quiesce_counter
        assert not self.target.quiesce_counter
        assert self.bench.jobs.jobs == []
        await self.bench.close()


@pytest.mark.parametrize("mode", CopyMode)
@pytest.mark.parametrize("side", SIDES, ids="-".join)
@pytest.mark.parametrize("nth", [*range(1, 14), 30])
def test_reported_errors_fail_the_job_and_spare_the_guest(nth: int, side: tuple[str, str], mode: CopyMode) -> None:
    """The n-th request fails: the job says so and ends; the guest's requests all succeed (unless its own one failed)."""

    async def main() -> None:
        stage = await Stage.make(nth)
        node, operation = side
        job = await stage.mirror(copy_mode=mode)
        driver_of(stage.bench.graph.find_node(node)).faults = Faults(operation, nth, nth)
        try:
            await stage.guest.run(8)
        finally:
            await stage.bench.until(job, JobStatus.READY)
            if job.is_ready:  # the n-th request of that kind was not needed before
                await stage.bench.jobs.cancel(job)
        await stage.bench.jobs.wait(job)
        assert isinstance(job.error, QBlockError)
        story = stage.bench.story
        assert story[-3:] in (["COMPLETED", "concluded", "null"], ["CANCELLED", "concluded", "null"])
        assert ("ERROR" in story) == (story[-3] == "COMPLETED")
        await stage.assert_pristine()

    run(main, Seeded(nth))


@pytest.mark.parametrize("mode", CopyMode)
@pytest.mark.parametrize("side", SIDES, ids="-".join)
@pytest.mark.parametrize("nth", [1, 2, 3, 5, 8, 13])
def test_ignored_errors_are_tried_again(nth: int, side: tuple[str, str], mode: CopyMode) -> None:
    """A target that is unwell for a while: the mirror keeps at it, and what it switches to is complete."""

    async def main() -> None:
        stage = await Stage.make(nth)
        node, operation = side
        driver_of(stage.bench.graph.find_node(node)).faults = Faults(operation, nth, nth + 5)
        job = await stage.mirror(copy_mode=mode, on_source_error=OnError.IGNORE, on_target_error=OnError.IGNORE)
        await stage.guest.run(8)
        await stage.bench.until(job, JobStatus.READY)
        stage.bench.jobs.complete(job)
        await stage.bench.jobs.wait(job)
        assert job.error is None
        assert stage.guest.disk.node is stage.target
        assert await stage.guest.disk.read(0, SIZE) == bytes(stage.guest.model)
        await stage.bench.close()

    run(main, Seeded(nth))


@pytest.mark.parametrize("ending", ["resume", "cancel", "quit"])
@pytest.mark.parametrize("side", SIDES, ids="-".join)
@pytest.mark.parametrize("nth", [1, 2, 7])
def test_stopping_errors_pause_until_somebody_decides(nth: int, side: tuple[str, str], ending: str) -> None:
    """on-error=stop: the job waits in paused, keeps its io-status, and goes on, or goes away, as told."""

    async def main() -> None:
        stage = await Stage.make(nth)
        node, operation = side
        faults = Faults(operation, nth, nth + 1, errno.ENOSPC)
        driver_of(stage.bench.graph.find_node(node)).faults = faults
        job = await stage.mirror(on_source_error=OnError.ENOSPC, on_target_error=OnError.STOP)
        for _ in range(6):
            await stage.bench.until(job, JobStatus.PAUSED, JobStatus.STANDBY, JobStatus.READY)
            if not job.paused:
                break
            info = stage.bench.jobs.query_block_jobs()[0]
            assert (info["paused"], info["io-status"]) == (True, "nospace")
            await asyncio.sleep(5)
            assert job.paused
            if ending != "resume":
                break
            await stage.bench.jobs.resume(job)
        if ending == "resume":
            assert job.is_ready
        if ending == "quit":
            await stage.bench.jobs.cancel_all()
        else:
            await stage.bench.jobs.cancel(job)
        await stage.bench.jobs.wait(job)
        await stage.assert_pristine()

    run(main, Seeded(nth))


@pytest.mark.parametrize("mode", CopyMode)
@pytest.mark.parametrize("seed", range(40))
def test_a_cancel_at_any_moment_leaves_the_source_alone(seed: int, mode: CopyMode) -> None:
    """Forced cancel, quit, or both at once, before, while or after it gets ready, paused or not."""

    async def main() -> None:
        stage, random = await Stage.make(seed), Random(seed)
        job = await stage.mirror(copy_mode=mode, auto_finalize=random.random() < 0.5)
        async with asyncio.TaskGroup() as group:
            group.create_task(stage.guest.run(10))
            await asyncio.sleep(random.choice((0, 0.0005, 0.005, 0.3)))
            if random.random() < 0.3:
                await stage.bench.jobs.pause(job)
            if job.is_ready and not job.auto_finalize and random.random() < 0.5:
                stage.bench.jobs.complete(job)
                if job.user_paused:
                    await stage.bench.jobs.resume(job)
                await stage.bench.until(job, JobStatus.PENDING)
            if random.random() < 0.5:
                group.create_task(stage.bench.jobs.cancel_all())
            await stage.bench.jobs.cancel(job)
            await stage.bench.jobs.wait(job)
        assert stage.bench.story[-3:] == ["CANCELLED", "concluded", "null"]
        await stage.assert_pristine()

    run(main, Seeded(seed))


@pytest.mark.parametrize("seed", range(30))
def test_complete_pause_and_cancel_race_without_harm(seed: int) -> None:
    """Everything at once on a ready job: it ends, and the disk is whole on whichever side it ended up."""

    async def main() -> None:
        stage, random = await Stage.make(seed), Random(seed)
        jobs = stage.bench.jobs
        job = await stage.mirror()
        await stage.bench.until(job, JobStatus.READY)

        async def attempt(action: str) -> None:
            await asyncio.sleep(random.choice((0, 0, 0.0001)))
            try:
                match action:
                    case "complete":
                        jobs.complete(job)
                    case "pause":
                        await jobs.pause(job)
                        await asyncio.sleep(0.0002)
                        await jobs.resume(job)
                    case "soft":
                        await jobs.cancel(job, force=False)
                    case _:
                        await jobs.cancel(job)
            except QBlockError:
                return  # refused, as a user would see it

        async with asyncio.TaskGroup() as group:
            group.create_task(stage.guest.run(5))
            for action in random.choices(("complete", "pause", "soft", "force"), (4, 3, 2, 1), k=5):
                group.create_task(attempt(action))
        if job.user_paused and job.status in VERBS[JobVerb.RESUME]:
            await jobs.resume(job)
        if job.status not in (JobStatus.CONCLUDED, JobStatus.NULL):
            await attempt("soft")
        await jobs.wait(job)
        side = stage.guest.disk.node
        assert side in (stage.source, stage.target)
        assert await stage.guest.disk.read(0, SIZE) == bytes(stage.guest.model)
        await stage.bench.close()

    run(main, Seeded(seed))
