"""Backups beside writing guests, on storage that takes its time and fails: the copy is the disk of one moment, or is no copy."""

from __future__ import annotations

import asyncio
from random import Random
from typing import ClassVar

import pytest

from qblock.actions.action import Action, perform
from qblock.actions.backups import StartBlockdevBackup
from qblock.actions.bitmaps import AddBitmap, BitmapName
from qblock.backend import BlockBackend
from qblock.dirty import DirtyBitmap
from qblock.errors import QBlockError
from qblock.jobs.backup import BackupRequest, Performance
from qblock.jobs.backup_job import BackupJob
from qblock.jobs.backup_plan import BitmapMode
from qblock.jobs.new_copy import SyncMode
from qblock.jobs.state import OnError
from qblock.node import BlockDriverState
from qblock.permissions import Perm
from qblock.testing.jobbench import BusyGuest, Faults, JobBench, driver_of
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SIZE = 17 * 64 * KiB - 512
GRAIN = 4 * KiB


class TakePicture(Action):
    """Keeps the content of a memory node at the moment of the transaction."""

    kind: ClassVar[str] = "picture"
    joins_groups: ClassVar[bool] = True

    def __init__(self, bench: JobBench, node: BlockDriverState) -> None:
        super().__init__(bench.system)
        self.node = node
        self.picture = b""

    async def prepare(self) -> None:
        await self.drain(self.node)
        self.picture = driver_of(self.node).content()

    def commit(self) -> None:
        pass

    async def abort(self) -> None:
        pass


class PatientGuest(BusyGuest):
    """A guest that notes failed writes and goes on; what it wanted to write there is not on the disk."""

    failed = 0

    async def _write(self, index: int, random: Random) -> None:
        try:
            await super()._write(index, random)
        except OSError:
            self.failed += 1


async def start(bench: JobBench, node: BlockDriverState, **members: object) -> tuple[BackupJob, bytes]:
    """Begin a backup of the disk ``d``, and take the picture that it should be."""
    request = BackupRequest(**({"sync": SyncMode.FULL, "job_id": "j"} | members))  # type: ignore[arg-type]
    action, picture = StartBlockdevBackup(bench.system, device="d", target="target", request=request), TakePicture(bench, node)
    await perform(bench.system, [picture, action])
    return action.job, picture.picture


async def disturb(bench: JobBench, job: BackupJob, random: Random, *, cancels: bool) -> None:
    """Pause, resume, hurry and perhaps cancel the job, and let it go on when an error has stopped it."""
    for _ in range(random.randrange(4)):
        await asyncio.sleep(random.choice((0, 0.0005, 0.002)))
        try:
            await bench.jobs.pause(job)
            await asyncio.sleep(random.choice((0, 0.001)))
            await bench.jobs.resume(job)
            if cancels and random.random() < 0.3:
                await bench.jobs.cancel(job)
        except QBlockError:
            break  # it is over already
    while not job.concluded.done():
        if job.user_paused and job.paused:
            await bench.jobs.resume(job)
        await bench.system.clock.sleep_ns(1_000_000)


@pytest.mark.parametrize("seed", range(25))
def test_a_backup_is_the_disk_at_its_start(seed: int) -> None:
    """Whatever the guest writes meanwhile, however the job copies: the target is the disk when the command was given."""

    async def main() -> None:
        bench, random = JobBench(seed), Random(seed)
        source, target = await bench.node("source", SIZE), await bench.node("target", SIZE)
        driver_of(target).offloads_left = random.choice((0, 3, 100))
        disk = bench.disk(source, "d")
        guest = PatientGuest(disk, seed)
        await guest.fill()
        how = Performance(
            use_copy_range=random.random() < 0.3,
            max_workers=random.choice((1, 2, 64)),
            max_chunk=random.choice((0, 64 * KiB, 200 * KiB)),
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(guest.run(40))
            await asyncio.sleep(random.choice((0, 0.001)))
            job, picture = await start(bench, source, performance=how)
            await disturb(bench, job, random, cancels=random.random() < 0.3)
        if job.error is None:
            assert driver_of(target).content() == picture
        else:
            assert job.force_cancelled
        assert not guest.failed
        assert driver_of(source).content() == bytes(guest.model)
        assert disk.node is source and not source.dirty_bitmaps and set(bench.graph.nodes) == {"source", "target"}
        assert not target.perm
        await bench.close()

    run(main, Seeded(seed))


@pytest.mark.parametrize("seed", range(40))
def test_faults_cost_a_guests_write_or_the_backup_but_never_data(seed: int) -> None:
    """A request of either side fails: the disk is what the guest's successful writes made it; a backup that ends well is one."""

    async def main() -> None:
        bench, random = JobBench(seed), Random(seed)
        source, target = await bench.node("source", SIZE), await bench.node("target", SIZE)
        disk = bench.disk(source, "d")
        guest = PatientGuest(disk, seed)
        await guest.fill()
        first = random.randrange(1, 14)
        faults = Faults(random.choice(("read", "write", "flush")), first, first + random.randrange(6))
        broken = random.choice((source, target)) if faults.operation == "read" else target
        policy = random.choice((OnError.REPORT, OnError.STOP, OnError.IGNORE, OnError.ENOSPC))
        async with asyncio.TaskGroup() as group:
            group.create_task(guest.run(40))
            job, picture = await start(bench, source, on_source_error=policy, on_target_error=policy)
            driver_of(broken).faults = faults
            await disturb(bench, job, random, cancels=False)
        told = [event for event in bench.story if event == "ERROR"]
        driver_of(broken).faults = Faults()
        assert (job.error is not None) <= bool(told) and (not told or policy is not OnError.REPORT or job.error is not None)
        if policy in (OnError.STOP, OnError.IGNORE):
            assert job.error is None
        if job.error is None:
            assert driver_of(target).content() == picture
        assert driver_of(source).content() == bytes(guest.model)
        await bench.close()

    run(main, Seeded(seed))


@pytest.mark.parametrize("mode", BitmapMode)
@pytest.mark.parametrize("sync", [SyncMode.FULL, SyncMode.BITMAP])
@pytest.mark.parametrize("seed", range(8))
def test_a_bitmap_says_what_the_target_lacks(seed: int, sync: SyncMode, mode: BitmapMode) -> None:
    """After any end: where the disk differs from the copy, or from the disk at the last good copy, the bitmap is dirty."""
    if sync is SyncMode.FULL and mode is BitmapMode.NEVER:
        return  # refused

    async def main() -> None:
        bench, random = JobBench(seed), Random(seed)
        source, target = await bench.node("source", SIZE), await bench.node("target", SIZE)
        disk = bench.disk(source, "d")
        guest = PatientGuest(disk, seed)
        await guest.fill()
        await perform(bench.system, [AddBitmap(bench.system, BitmapName("d", "b"), granularity=GRAIN)])
        (bitmap,) = source.dirty_bitmaps
        before = driver_of(source).content()
        driver_of(target)._pages.clear()
        await copy_plainly(bench, before, target)
        await guest.run(5)
        dirty_then = dirty(bitmap)
        async with asyncio.TaskGroup() as group:
            group.create_task(guest.run(20))
            job, picture = await start(bench, source, sync=sync, bitmap="b", bitmap_mode=mode)
            if random.random() < 0.5:
                driver_of(target).faults = Faults("write", random.randrange(1, 9), 1 << 30)
            await disturb(bench, job, random, cancels=random.random() < 0.5)
        now, copy = driver_of(source).content(), driver_of(target).content()
        assert not bitmap.busy and bitmap.enabled and source.dirty_bitmaps == [bitmap]
        differs_since_start = different(now, picture)
        if job.error is None:
            assert copy == picture
            kept = dirty_then if mode is BitmapMode.NEVER else set()
            assert dirty(bitmap) >= kept | differs_since_start
        elif mode is BitmapMode.ALWAYS:
            assert dirty(bitmap) >= different(now, copy) | differs_since_start
        else:
            assert dirty(bitmap) >= dirty_then | differs_since_start
        assert now == bytes(guest.model)
        await bench.close()

    run(main, Seeded(seed))


async def copy_plainly(bench: JobBench, content: bytes, target: BlockDriverState) -> None:
    """Write ``content`` to a node: the copy that an increment goes by."""
    writer = BlockBackend(bench.graph, perm=Perm.WRITE, shared=Perm.ALL)
    writer.insert(target)
    await writer.write(0, content)
    writer.close()


def dirty(bitmap: DirtyBitmap) -> set[int]:
    """The dirty granules."""
    return {granule for run in bitmap.iterate() for granule in range(run.offset // GRAIN, -(-run.end // GRAIN))}


def different(one: bytes, other: bytes) -> set[int]:
    """The granules in which two disks differ."""
    return {
        start // GRAIN for start in range(0, len(one), GRAIN) if one[start : start + GRAIN] != other[start : start + GRAIN]
    }
