"""Semi-synchronous mirroring keeps its promise at whatever moment everything is killed, and never makes anybody wait for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from random import Random
from typing import Any

import attrs
import pytest

from qblock.backend import BlockBackend
from qblock.drain import drain_all, drained
from qblock.errors import QBlockError
from qblock.jobs.mirror import CopyMode, MirrorRequest, start_blockdev_mirror
from qblock.jobs.mirror_job import MirrorJob
from qblock.jobs.new_copy import SyncMode
from qblock.jobs.state import VERBS, JobStatus, JobVerb, OnError
from qblock.node import BlockDriverState
from qblock.requests import refresh_length
from qblock.testing.crash import CrashStorage, Effect
from qblock.testing.jobbench import BusyGuest, Faults, JobBench, driver_of, eventually
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SEEDS = range(24)
BLOCK = 1536
BLOCKS = 40
SIZE = BLOCK * BLOCKS
REQUEST = MirrorRequest(job_id="j", sync=SyncMode.FULL, copy_mode=CopyMode.SEMI_SYNC, granularity=4 * KiB)


@attrs.define
class Promise:
    """A flush that was answered when the target had done ``effects``: ``version`` of each block was answered before it."""

    effects: int
    version: list[int]


class Journal:
    """A guest that writes a new version of a block each time, and notes what it was promised."""

    def __init__(self, disk: BlockBackend, storage: CrashStorage, seed: int) -> None:
        self.disk = disk
        self.storage = storage
        self.random = Random(seed)
        self.versions = [[bytes(BLOCK)] for _ in range(BLOCKS)]
        self.answered = [0] * BLOCKS
        self.promises: list[Promise] = []

    async def run(self, steps: int) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(self._work(number, steps, Random(self.random.random())))

    async def _work(self, number: int, steps: int, random: Random) -> None:
        for _ in range(steps):
            kind = random.random()
            if kind < 0.7:
                await self._write(random.randrange(number, BLOCKS, 3), random, fua=kind < 0.1)
            else:
                await self._flush(self.disk.flush())
            await asyncio.sleep(random.choice((0, 0, 0.0001, 0.01)))

    async def _write(self, block: int, random: Random, *, fua: bool) -> None:
        data = random.randbytes(BLOCK)
        self.versions[block].append(data)
        version = len(self.versions[block]) - 1
        write = self.disk.write_from(block * BLOCK, memoryview(data), fua=fua)
        if fua:
            await self._flush(write)
        else:
            await write
        self.answered[block] = version

    async def _flush(self, request: Any) -> None:
        before = self.answered.copy()
        await request
        self.promises.append(Promise(len(self.storage.effects), before))

    def kept(self, image: bytes, moment: int) -> bool:
        """Whether the image that was left at a moment has all that was promised before: these versions or younger ones."""
        needed = [0] * BLOCKS
        for promise in self.promises:
            if promise.effects <= moment:
                needed = [max(pair) for pair in zip(needed, promise.version, strict=True)]
        return all(
            byte in {version[at] for version in versions[least:]}  # a copy may meet a write half-way
            for start, versions, least in zip(range(0, SIZE, BLOCK), self.versions, needed, strict=True)
            for at, byte in enumerate(image[start : start + BLOCK])
        )


class LazyStorage(CrashStorage):
    """Its flushes take a while, and cover what had happened when they began. ``random`` None: they do not."""

    random: Random | None = None

    async def flush(self) -> None:
        at = len(self.effects)
        if self.random is not None:
            await asyncio.sleep(self.random.choice((0, 0.0003, 0.002)))
        await self._turn(writes=True)
        self.effects.append(Effect("flush", at))


async def crash_node(bench: JobBench) -> BlockDriverState:
    """The target t, which remembers all that was done to it."""
    bench.system.registry.register(LazyStorage)
    node = await bench.system.opener.open_blockdev({"driver": LazyStorage.name, "node-name": "t"})
    node.monitor_owned = True
    assert isinstance(node.driver, LazyStorage)
    node.driver.fill(bytes(SIZE))
    node.driver.restless = True
    refresh_length(node)
    return node


async def meddle(bench: JobBench, job: MirrorJob, random: Random) -> None:
    """What people do meanwhile. Sections and pauses overlap with flushes that wait."""
    for _ in range(8):
        await asyncio.sleep(random.choice((0, 0.0003, 0.02)))
        if job.status not in VERBS[JobVerb.PAUSE]:
            return
        match random.randrange(4):
            case 0:
                await bench.jobs.pause(job)
                await asyncio.sleep(random.choice((0, 0.001, 0.1)))
                if random.random() < 0.5:
                    await drain_all(bench.graph)
                await bench.jobs.resume(job)
            case 1:
                async with drained(bench.graph.find_node(random.choice("st"))):
                    await asyncio.sleep(0.001)
            case 2:
                await drain_all(bench.graph)
            case _:
                bench.jobs.set_speed(job, random.choice((0, 1, 10_000_000)))


def broken(seed: int, mode: CopyMode, *, power_cut: bool) -> int:
    """How many of 40 crashes after READY leave a target that lacks something which the guest had flushed."""

    async def main() -> int:
        bench, random = JobBench(seed), Random(seed)
        source, target = await bench.node("s", SIZE), await crash_node(bench)
        storage = target.driver
        assert isinstance(storage, LazyStorage)
        storage.random = Random(seed)
        guest = Journal(bench.disk(source, "d"), storage, seed)
        ready: list[int] = []

        def watch(event: str, data: Mapping[str, Any]) -> None:
            if event == "BLOCK_JOB_READY":
                ready.append(len(storage.effects))

        bench.listeners.append(watch)
        granularity, buf_size = random.choice((512, 4 * KiB, 64 * KiB)), random.choice((0, 8 * KiB, 64 * KiB))
        request = attrs.evolve(REQUEST, copy_mode=mode, granularity=granularity, buf_size=buf_size)
        async with asyncio.TaskGroup() as group:
            group.create_task(guest.run(60))
            job = await start_blockdev_mirror(bench.system, device="d", target="t", request=request)
            await bench.until(job, JobStatus.READY)
            await meddle(bench, job, random)
        last = len(storage.effects)
        await bench.jobs.cancel(job)
        await bench.jobs.wait(job)
        await bench.close()
        moments = [ready[0], *(random.randint(ready[0], last) for _ in range(39))]
        images = [storage.after_power_cut(m, random) if power_cut else storage.after_kill(m) for m in moments]
        return sum(not guest.kept(image, moment) for image, moment in zip(images, moments, strict=True))

    return run(main, Seeded(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_the_guest_has_flushed_is_durable_in_the_target(seed: int) -> None:
    """The promise: at any moment after READY, whatever is paused, drained or slowed down, even if the power fails."""
    assert broken(seed, CopyMode.SEMI_SYNC, power_cut=True) == 0


def test_the_other_modes_do_not_promise_that() -> None:
    """Background: the target lags behind. Write-blocking: it has every answered write, but a power cut may take them back."""
    assert sum(broken(seed, CopyMode.BACKGROUND, power_cut=False) for seed in range(2)) > 0
    assert sum(broken(seed, CopyMode.WRITE_BLOCKING, power_cut=False) for seed in range(2)) == 0
    assert sum(broken(seed, CopyMode.WRITE_BLOCKING, power_cut=True) for seed in range(2)) > 0


# ------------------------------------------------------------------------------------------------------ nobody is stuck


@pytest.mark.parametrize("policy", OnError)
@pytest.mark.parametrize("seed", range(15))
def test_no_flush_and_no_section_waits_for_ever(seed: int, policy: OnError) -> None:
    """Pauses, sections, failing targets, cancels, all at once: the guest's flushes end, and so do the sections, without
    anybody resuming the job.
    """

    async def main() -> None:
        bench, random = JobBench(seed), Random(seed)
        source, target = await bench.node("s", SIZE), await bench.node("t", SIZE)
        disk = bench.disk(source, "d")
        guest = BusyGuest(disk, seed)
        await guest.fill()
        request = attrs.evolve(REQUEST, on_target_error=policy, on_source_error=policy, buf_size=8 * KiB)
        job = await start_blockdev_mirror(bench.system, device="d", target="t", request=request)
        await bench.until(job, JobStatus.READY)

        async def flush() -> None:
            for _ in range(12):
                await disk.flush()
                await asyncio.sleep(random.choice((0, 0, 0.0003)))

        async def people() -> None:
            for _ in range(6):
                await asyncio.sleep(random.choice((0, 0.0002, 0.01)))
                match random.randrange(6):
                    case 0 if job.status in VERBS[JobVerb.PAUSE] and not job.user_paused:
                        await bench.jobs.pause(job)
                    case 1:
                        operation, first = random.choice(("write", "flush")), random.randrange(1, 4)
                        driver_of(target).faults = Faults(operation, first, first + random.randrange(3))
                    case 2:
                        await drain_all(bench.graph)
                    case _:
                        async with drained(random.choice((source, target))):
                            await asyncio.sleep(0)

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(guest.run(10))
            group.create_task(flush())
            group.create_task(flush())
            group.create_task(people())
        async with asyncio.timeout(60):
            if job.status in VERBS[JobVerb.CANCEL]:
                await bench.jobs.cancel(job, force=True)
            await bench.jobs.wait(job)
        assert disk.node is source
        assert await disk.read(0, SIZE) == bytes(guest.model)
        assert not source.quiesce_counter and not target.quiesce_counter and not target.parents
        await bench.close()

    run(main, Seeded(seed))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ending", ["complete", "soft", "force", "quit"])
def test_the_end_of_the_job_answers_flushes(seed: int, ending: str) -> None:
    """Whichever way it ends, and at whatever moment of a round; the guest's disk is whole on the side it is on."""

    async def main() -> None:
        bench, random = JobBench(seed), Random(seed)
        source, target = await bench.node("s", SIZE), await bench.node("t", SIZE)
        disk = bench.disk(source, "d")
        guest = BusyGuest(disk, seed)
        job = await start_blockdev_mirror(bench.system, device="d", target="t", request=REQUEST)
        await bench.until(job, JobStatus.READY)

        async def flush() -> None:
            for _ in range(20):
                await disk.flush()
                await asyncio.sleep(random.choice((0, 0.0002)))

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(guest.run(10))
            group.create_task(flush())
            group.create_task(flush())
            await asyncio.sleep(random.choice((0, 0.0001, 0.0005, 0.002)))
            match ending:
                case "complete":
                    bench.jobs.complete(job)
                case "soft" | "force":
                    await bench.jobs.cancel(job, force=ending == "force")
                case _:
                    await bench.jobs.cancel_all()
            await bench.jobs.wait(job)
        assert disk.node is (target if ending == "complete" else source)
        assert await disk.read(0, SIZE) == bytes(guest.model)
        await bench.close()

    run(main, Seeded(seed))


# -------------------------------------------------------------------------------------------------------- one at a time


@attrs.define
class Stage:
    """A ready mirror from a node that takes no time to a target whose requests can be made slow, and the guest's disk."""

    bench: JobBench
    disk: BlockBackend
    job: MirrorJob
    target: BlockDriverState
    storage: CrashStorage

    @classmethod
    async def make(cls, **changes: Any) -> Stage:
        bench = JobBench()
        source, target = await bench.node("s", SIZE), await crash_node(bench)
        storage = target.driver
        assert isinstance(storage, CrashStorage)
        storage.restless = False
        disk = bench.disk(source, "d")
        await disk.write(0, b"a" * SIZE)
        job = await start_blockdev_mirror(
            bench.system, device="d", target="t", request=attrs.evolve(REQUEST, **changes)
        )
        if not changes.get("speed"):
            await bench.until(job, JobStatus.READY)
        return cls(bench, disk, job, target, storage)

    def slow_down(self, monkeypatch: pytest.MonkeyPatch, *, write: float = 0, flush: float = 0) -> None:
        """Let the target's requests take so many seconds."""
        plain_write, plain_flush = self.storage.write_from, self.storage.flush

        async def slow_write(offset: int, buffer: memoryview, *, fua: bool = False) -> None:
            await asyncio.sleep(write)
            await plain_write(offset, buffer, fua=fua)

        async def slow_flush() -> None:
            await asyncio.sleep(flush)
            await plain_flush()

        monkeypatch.setattr(self.storage, "write_from", slow_write)
        monkeypatch.setattr(self.storage, "flush", slow_flush)

    @property
    def flushes(self) -> int:
        return sum(effect.kind == "flush" for effect in self.storage.effects)

    @property
    def durable(self) -> bytes:
        """What the target has for certain."""
        return self.storage.after_kill(self.storage.last_flush(len(self.storage.effects)))

    async def timed(self, request: Any) -> float:
        """How many virtual seconds the request takes."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        await request
        return round(loop.time() - began, 6)


def test_a_flush_takes_the_copying_and_the_flush_of_the_target_and_a_write_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the latency goes: to flushes alone. One that has nothing new to bring over costs nothing either."""

    async def main() -> None:
        stage = await Stage.make()
        stage.slow_down(monkeypatch, write=0.003, flush=0.005)
        assert await stage.timed(stage.disk.write(0, b"b" * 512)) == 0
        assert await stage.timed(stage.disk.flush()) == 0.008
        assert stage.durable[:513] == b"b" * 512 + b"a"
        before = stage.flushes
        assert await stage.timed(stage.disk.flush()) == 0
        assert stage.flushes == before
        await stage.bench.close()

    run(main)


def test_many_flushes_cost_the_target_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come at once share a round; those that come during it share the next."""

    async def main() -> None:
        stage = await Stage.make()
        stage.slow_down(monkeypatch, write=0.003, flush=0.005)

        async def write_and_flush(number: int) -> None:
            await stage.disk.write(number * 512, b"b" * 512)
            await stage.disk.flush()

        before = stage.flushes
        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(write_and_flush(number))
            await asyncio.sleep(0.002)
            for number in range(20, 50):
                group.create_task(write_and_flush(number))
        assert stage.flushes - before == 2
        assert stage.durable[: 50 * 512] == b"b" * 512 * 50
        await stage.bench.close()

    run(main)


@pytest.mark.parametrize("kind", ["fua", "writethrough"])
def test_a_write_that_must_be_durable_is_so_in_the_target(kind: str) -> None:
    """A write with a flush in it promises as much as the two."""

    async def main() -> None:
        stage = await Stage.make()
        stage.disk.writethrough = kind == "writethrough"
        await stage.disk.write_from(512, memoryview(b"f" * 512), fua=kind == "fua")
        assert stage.durable[512:1024] == b"f" * 512
        await stage.bench.close()

    run(main)


def test_no_flush_waits_for_the_bulk_of_the_copy() -> None:
    """Before READY it would take as long as all of it: half a minute here."""

    async def main() -> None:
        stage = await Stage.make(speed=2 * KiB, buf_size=4 * KiB)
        assert await stage.timed(stage.disk.flush()) == 0
        assert not stage.job.is_ready
        await stage.bench.until(stage.job, JobStatus.READY)
        assert asyncio.get_running_loop().time() > 20
        await stage.disk.write(0, b"b" * SIZE)
        assert await stage.timed(stage.disk.flush()) == 0  # the limit is for what nobody waits for
        assert stage.durable == b"b" * SIZE
        await stage.bench.close()

    run(main)


def test_a_paused_job_keeps_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause stops the copying in the background; and a drained section waits for the flush only, not for a resume."""

    async def main() -> None:
        stage = await Stage.make()
        stage.slow_down(monkeypatch, write=0.003, flush=0.005)
        await stage.bench.jobs.pause(stage.job)
        await stage.disk.write(0, b"b" * 512)
        await asyncio.sleep(10)
        assert stage.job.status is JobStatus.STANDBY
        assert stage.storage.live[:1] == b"a"
        flush = asyncio.ensure_future(stage.disk.flush())
        await asyncio.sleep(0.001)
        async with drained(stage.target):
            assert stage.durable[:1] == b"b"
            effects = len(stage.storage.effects)
            await asyncio.sleep(1)
            assert len(stage.storage.effects) == effects
        await stage.disk.write(0, b"c" * 512)
        again = asyncio.ensure_future(stage.disk.flush())
        await asyncio.sleep(0.001)
        async with drained(stage.disk.node):
            assert flush.done() and again.done()
            assert stage.durable[:1] == b"c"
        assert stage.job.status is JobStatus.STANDBY
        await stage.bench.close()

    run(main)


def test_a_flush_that_fails_at_the_target_is_answered_after_the_event() -> None:
    """report: the job ends. The guest is not told, management is, and first."""

    async def main() -> None:
        stage = await Stage.make()
        stage.storage.fail_writes = 0
        await stage.disk.write(0, b"b" * 512)
        seen: list[list[str]] = []
        await stage.disk.flush()
        seen.append([event for event, _ in stage.bench.events])
        assert "BLOCK_JOB_ERROR" in seen[0]
        await stage.bench.jobs.wait(stage.job)
        assert isinstance(stage.job.error, QBlockError)
        await stage.disk.flush()
        await stage.bench.close()

    run(main)


def test_a_target_without_space_voids_the_promise_until_the_job_goes_on() -> None:
    """stop: flushes do not wait while the job's io-status is not ok, and wait again after it was resumed."""

    async def main() -> None:
        stage = await Stage.make(on_target_error=OnError.STOP)
        jobs = stage.bench.jobs
        stage.storage.fail_writes = 0
        await stage.disk.write(0, b"b" * 512)
        await stage.disk.flush()
        await eventually(lambda: stage.job.paused)
        assert jobs.query_block_jobs()[0]["io-status"] == "failed"
        await drain_all(stage.bench.graph)
        await stage.disk.flush()
        assert stage.durable[:1] == b"a"
        stage.storage.fail_writes = None
        await jobs.resume(stage.job)
        await stage.disk.flush()
        assert stage.durable[:1] == b"b"
        await stage.bench.close()

    run(main)


def test_an_ignored_failure_voids_the_promise_until_a_round_succeeds() -> None:
    """ignore: the flush after the event brings everything over, though nothing was written since."""

    async def main() -> None:
        stage = await Stage.make(on_target_error=OnError.IGNORE)
        stage.storage.fail_writes = 0
        await stage.disk.write(0, b"b" * 512)
        await stage.disk.flush()
        assert stage.durable[:1] == b"a"
        stage.storage.fail_writes = None
        await stage.disk.flush()
        assert stage.durable[:1] == b"b"
        await stage.bench.close()

    run(main)


def test_a_forced_cancel_does_not_wait_for_a_slow_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way ends; the rest of the round does not begin."""

    async def main() -> None:
        stage = await Stage.make(buf_size=4 * KiB)
        stage.slow_down(monkeypatch, write=1)
        await stage.disk.write(0, b"b" * SIZE)
        flush = asyncio.ensure_future(stage.timed(stage.disk.flush()))
        await asyncio.sleep(0.5)
        await stage.bench.jobs.cancel(stage.job)
        assert await flush < 3
        await stage.bench.jobs.wait(stage.job)
        assert stage.bench.story[-3:] == ["CANCELLED", "concluded", "null"]
        await stage.bench.close()

    run(main)
