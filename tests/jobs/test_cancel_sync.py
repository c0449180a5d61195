"""Cancelling and waiting for the end: patch 2 of the 2012 series. What comes back is how the job has really ended."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from qblock.clock import LoopClock, RealClock
from qblock.errors import BlockIOError, CommandError, JobCancelled
from qblock.jobs.job import Job
from qblock.jobs.runner import JobRunner
from qblock.jobs.state import JobStatus
from qblock.system import BlockSystem
from qblock.testing.simloop import run

SECOND = 1_000_000_000
HOUR = 3600 * SECOND


class Errand(Job):
    """Sleeps hour by hour until told to end, then does ``last`` requests of a second each, and fails if so told.

    One that is ``willing`` goes on to its real end after a cancel that is not forced.
    """

    type = "create"

    def __init__(
        self, runner: JobRunner, name: str = "errand", *, willing: bool = False, last: int = 0, fails: bool = False, **how: bool
    ) -> None:
        super().__init__(runner, name, **how)
        self.willing, self.last, self.fails = willing, last, fails
        self.requests = 0

    def cancelling(self, *, force: bool) -> bool:
        return force or not self.willing

    async def run(self) -> None:
        try:
            while not self.cancel_requested:
                await self.sleep_ns(HOUR)
        finally:
            while self.requests < self.last:
                await self.runner.clock.sleep_ns(SECOND)  # stands for a request: nobody can cut it short
                self.requests += 1
            if self.fails:
                raise BlockIOError(errno.EIO)


async def begun(job: Job) -> None:
    """Let the job start and come to its first sleep."""
    job.runner.create(job)
    job.runner.start(job)
    await job.noticed()
    assert job.is_resting


def on_virtual_time(story: Callable[[BlockSystem], Awaitable[None]]) -> None:
    async def main() -> None:
        async with BlockSystem.create(clock=LoopClock()) as system:
            await story(system)

    run(main)


def on_real_time(story: Callable[[BlockSystem], Awaitable[None]]) -> None:
    async def main() -> None:
        async with BlockSystem.create(clock=RealClock()) as system:
            await story(system)

    asyncio.run(main())


@pytest.mark.parametrize("perform", [on_virtual_time, on_real_time], ids=["virtual", "real"])
@pytest.mark.parametrize(
    ("how", "outcome"),
    [
        ({"willing": True}, type(None)),
        ({}, JobCancelled),
        ({"fails": True}, BlockIOError),
        ({"willing": True, "fails": True}, BlockIOError),
    ],
    ids=["completes", "cancelled", "fails after a forced cancel", "fails on its way"],
)
def test_the_result_is_the_jobs_own(
    perform: Callable[[Callable[[BlockSystem], Awaitable[None]]], None], how: dict[str, Any], outcome: type[object]
) -> None:
    """Completed, failed or cancelled: three answers; the sleeping hour is cut short, and the job is gone."""

    async def story(system: BlockSystem) -> None:
        job = Errand(system.jobs, **how)
        await begun(job)
        result = await system.jobs.cancel_sync(job)
        assert type(result) is outcome
        assert job.status is JobStatus.NULL
        assert system.jobs.jobs == []
        assert job.cancelled == (outcome is JobCancelled)

    perform(story)


@pytest.mark.parametrize("willing", [True, False])
def test_a_job_may_do_requests_after_it_was_told_to_cancel(willing: bool) -> None:
    """Not busy does not mean ended: the wait is for the end, three seconds of requests later."""

    async def story(system: BlockSystem) -> None:
        job = Errand(system.jobs, willing=willing, last=3)
        await begun(job)
        before = system.clock.now_ns()
        result = await system.jobs.cancel_sync(job)
        assert (result is None) == willing
        assert job.requests == 3
        assert system.clock.now_ns() - before == 3 * SECOND

    on_virtual_time(story)


def test_all_who_wait_get_the_same_result() -> None:
    """Two cancel it, a third one comes while it ends, a fourth when all is over; the job stays until it is dismissed."""

    async def story(system: BlockSystem) -> None:
        job = Errand(system.jobs, willing=True, last=2, auto_dismiss=False)
        await begun(job)
        cancel = system.jobs.cancel_sync
        early = [asyncio.ensure_future(cancel(job)) for _ in range(2)]
        await system.clock.sleep_ns(SECOND // 2)
        late = asyncio.ensure_future(cancel(job))
        assert [await task for task in (*early, late)] == [None, None, None]
        assert await cancel(job) is None
        assert system.clock.now_ns() == 2 * SECOND
        assert job.status is JobStatus.CONCLUDED

    on_virtual_time(story)


def test_a_waiter_that_gives_up_does_not_disturb_the_job_nor_the_others() -> None:
    """The caller's own task is cancelled: the job goes on to its end, and who still waits learns how it was."""

    async def story(system: BlockSystem) -> None:
        job = Errand(system.jobs, last=3)
        await begun(job)
        tired, patient = (asyncio.ensure_future(system.jobs.cancel_sync(job)) for _ in range(2))
        await system.clock.sleep_ns(SECOND // 2)
        tired.cancel()
        with pytest.raises(asyncio.CancelledError):
            await tired
        assert job.requests < 3
        assert isinstance(await patient, JobCancelled)
        assert job.requests == 3

    on_virtual_time(story)


def test_a_second_cancel_can_be_forced() -> None:
    """A willing job that is on its way to its real end is told to give up; both callers learn that it was cancelled."""

    class Undecided(Errand):
        async def run(self) -> None:
            while True:
                await self.sleep_ns(HOUR)

    async def story(system: BlockSystem) -> None:
        job = Undecided(system.jobs, willing=True)
        await begun(job)
        soft = asyncio.ensure_future(system.jobs.cancel_sync(job))
        await system.clock.sleep_ns(SECOND)
        assert not soft.done()
        assert isinstance(await system.jobs.cancel_sync(job, force=True), JobCancelled)
        assert isinstance(await soft, JobCancelled)
        assert system.clock.now_ns() == SECOND

    on_virtual_time(story)


@pytest.mark.parametrize("force", [False, True])
def test_a_paused_job_is_let_go_to_its_end(force: bool) -> None:
    """Whoever waits for the end cannot wait for the person who paused it."""

    async def story(system: BlockSystem) -> None:
        job = Errand(system.jobs, willing=True)
        await begun(job)
        await system.jobs.pause(job)
        assert job.paused
        assert (await system.jobs.cancel_sync(job, force=force) is None) == (not force)
        assert system.clock.now_ns() == 0

    on_virtual_time(story)


def test_a_job_that_never_began_is_cancelled_too() -> None:
    """Created, not started: its ending is called all the same."""

    async def story(system: BlockSystem) -> None:
        job = Errand(system.jobs)
        system.jobs.create(job)
        assert isinstance(await system.jobs.cancel_sync(job), JobCancelled)
        assert system.jobs.jobs == []

    on_virtual_time(story)


def test_a_job_that_was_over_gives_its_result() -> None:
    """It failed an hour ago and was kept for whoever asks: its own error is what comes back, not 'cancelled'."""

    class Fails(Errand):
        async def run(self) -> None:
            raise CommandError("no luck")

    async def story(system: BlockSystem) -> None:
        job = Fails(system.jobs, auto_dismiss=False)
        system.jobs.create(job)
        system.jobs.start(job)
        await system.jobs.wait(job)
        await system.clock.sleep_ns(HOUR)
        assert str(await system.jobs.cancel_sync(job)) == "no luck"
        assert job.status is JobStatus.CONCLUDED

    on_virtual_time(story)


def test_once_cancelled_it_never_sleeps_again() -> None:
    """Each sleep after that raises at once, also the one in its clean-up: no time passes."""

    class Sleepy(Errand):
        refused = 0

        async def run(self) -> None:
            for _ in range(3):
                try:
                    await self.sleep_ns(HOUR)
                except JobCancelled:
                    self.refused += 1
            await self.sleep_ns(HOUR)

    async def story(system: BlockSystem) -> None:
        job = Sleepy(system.jobs)
        await begun(job)
        assert isinstance(await system.jobs.cancel_sync(job), JobCancelled)
        assert job.refused == 3
        assert system.clock.now_ns() == 0

    on_virtual_time(story)


def test_both_ends_can_be_traced() -> None:
    """job_cancel_sync_begin and _end, and the sleep that was cut short between them."""

    async def story(system: BlockSystem) -> None:
        lines: list[str] = []
        trace = system.env.trace
        for pattern in ("job_cancel_sync_*", "co_sleep_*"):
            trace.listen(pattern, lambda name, members: lines.append(trace.line(name, members)))
        job = Errand(system.jobs, willing=True)
        await begun(job)
        await system.jobs.cancel_sync(job)
        assert lines == [
            f"co_sleep_begin job errand delay {HOUR}ns",
            "job_cancel_sync_begin job errand force False",
            "co_sleep_woken job errand",
            "job_cancel_sync_end job errand outcome completed",
        ]

    on_virtual_time(story)
