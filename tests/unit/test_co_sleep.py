"""The sleep that anybody may end: patch 1 of the 2012 series. Each test runs on virtual and on real time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

import qblock
from qblock.clock import Clock, CoSleep, LoopClock, RealClock
from qblock.testing.simloop import run

SECOND = 1_000_000_000
HOUR = 3600 * SECOND
T = TypeVar("T")
Story = Callable[[Clock], Awaitable[T]]


def on_virtual_time(story: Story[T]) -> T:
    async def main() -> T:
        return await story(LoopClock())

    return run(main)


def on_real_time(story: Story[T]) -> T:
    async def main() -> T:
        return await story(RealClock())

    return asyncio.run(main())


both_times = pytest.mark.parametrize("perform", [on_virtual_time, on_real_time], ids=["virtual", "real"])


def timers() -> int:
    """How many timers of the running loop are still to come."""
    scheduled: list[asyncio.TimerHandle] = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    return sum(not timer.cancelled() for timer in scheduled)


async def started(sleep: CoSleep, ns: int) -> asyncio.Task[bool]:
    """A task that has got as far as sleeping."""
    task = asyncio.ensure_future(sleep.sleep_ns(ns))
    for _ in range(3):
        await asyncio.sleep(0)
    assert sleep.is_sleeping
    return task


@both_times
def test_a_sleeper_woken_early_knows_it_and_leaves_no_timer(perform: Callable[[Story[Any]], Any]) -> None:
    """An hour's sleep, ended at once: nothing of the hour is left in the loop."""

    async def story(clock: Clock) -> None:
        sleep, before = CoSleep(clock), timers()
        task = await started(sleep, HOUR)
        assert timers() == before + 1
        sleep.wake()
        assert not sleep.is_sleeping
        assert await task is True
        assert timers() == before

    perform(story)


@both_times
def test_a_sleep_that_runs_its_time_is_not_woken(perform: Callable[[Story[Any]], Any]) -> None:
    """One microsecond, also where it is real."""

    async def story(clock: Clock) -> None:
        before, began = timers(), clock.now_ns()
        assert await CoSleep(clock).sleep_ns(1000) is False
        assert clock.now_ns() - began >= 1000
        assert timers() == before

    perform(story)


@both_times
def test_a_wake_before_the_sleep_is_not_remembered(perform: Callable[[Story[Any]], Any]) -> None:
    """Else a job that was kicked while it worked would skip a sleep that it needs."""

    async def story(clock: Clock) -> None:
        sleep = CoSleep(clock)
        sleep.wake()
        assert await sleep.sleep_ns(10) is False

    perform(story)


@both_times
def test_a_wake_after_the_sleep_is_not_remembered_either(perform: Callable[[Story[Any]], Any]) -> None:
    """The next sleep takes its time, too."""

    async def story(clock: Clock) -> None:
        sleep = CoSleep(clock)
        assert await sleep.sleep_ns(10) is False
        sleep.wake()
        assert await sleep.sleep_ns(10) is False

    perform(story)


@both_times
def test_waking_twice_is_waking_once(perform: Callable[[Story[Any]], Any]) -> None:
    """Two who want something at the same moment; the second wake comes before the sleeper has run."""

    async def story(clock: Clock) -> None:
        sleep = CoSleep(clock)
        task = await started(sleep, HOUR)
        sleep.wake()
        sleep.wake()
        assert await task is True
        assert await sleep.sleep_ns(10) is False

    perform(story)


@both_times
def test_a_sleep_of_nothing_can_still_be_ended_and_lets_others_run(perform: Callable[[Story[Any]], Any]) -> None:
    """Zero and less: once around the loop, with a timer like any other."""

    async def story(clock: Clock) -> None:
        sleep, order = CoSleep(clock), list[str]()
        asyncio.get_running_loop().call_soon(order.append, "other")
        assert await sleep.sleep_ns(0) is False
        order.append("me")
        assert await sleep.sleep_ns(-5) is False
        assert order == ["other", "me"]

    perform(story)


@both_times
def test_a_sleeper_whose_task_is_cancelled_leaves_no_timer(perform: Callable[[Story[Any]], Any]) -> None:
    """The program ends while somebody sleeps; whoever sleeps next is not disturbed by it."""

    async def story(clock: Clock) -> None:
        sleep, before = CoSleep(clock), timers()
        task = await started(sleep, HOUR)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert timers() == before
        assert not sleep.is_sleeping
        sleep.wake()
        assert await sleep.sleep_ns(10) is False

    perform(story)


@both_times
def test_woken_and_cancelled_in_one_moment_it_is_cancelled(perform: Callable[[Story[Any]], Any]) -> None:
    """A wake does not swallow the cancellation of a task."""

    async def story(clock: Clock) -> None:
        sleep, before = CoSleep(clock), timers()
        task = await started(sleep, HOUR)
        sleep.wake()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert timers() == before

    perform(story)


@both_times
def test_only_one_sleeps_at_a_time(perform: Callable[[Story[Any]], Any]) -> None:
    """A second sleeper would take the first one's wake; that is a bug of the caller, and the first is not harmed."""

    async def story(clock: Clock) -> None:
        sleep = CoSleep(clock)
        task = await started(sleep, HOUR)
        with pytest.raises(AssertionError, match="one sleeper"):
            await sleep.sleep_ns(10)
        sleep.wake()
        assert await task is True

    perform(story)


def test_many_sleeps_cut_short_do_not_pile_up() -> None:
    """A job that is woken for every request sleeps a million times a day."""

    async def story(clock: Clock) -> None:
        sleep, before = CoSleep(clock), timers()
        for _ in range(1000):
            task = await started(sleep, HOUR)
            sleep.wake()
            assert await task is True
        assert timers() == before
        assert clock.now_ns() == 0, "no time has passed"

    on_virtual_time(story)


def test_the_timer_and_the_wake_in_one_moment_end_one_sleep() -> None:
    """Whichever comes first tells the outcome; the other one does nothing, and hits no later sleep."""

    async def story(clock: Clock) -> None:
        sleep = CoSleep(clock)
        outcomes = []
        clock.call_after(10, sleep.wake)
        outcomes.append(await sleep.sleep_ns(10))
        outcomes.append(await sleep.sleep_ns(10))
        assert outcomes == [True, False]
        assert clock.now_ns() == 20

    on_virtual_time(story)


def test_the_names_are_the_librarys() -> None:
    """What the documentation imports from the top."""
    assert qblock.CoSleep is CoSleep
    assert qblock.RealClock is RealClock
    assert qblock.LoopClock is LoopClock
