"""Clocks, the sleep that can be woken, and rate limiting."""

from __future__ import annotations

import asyncio
import time

import pytest

from qblock.clock import VIRTUAL_EPOCH, Clock, CoSleep, LoopClock, RateLimit, RealClock, VirtualTime
from qblock.testing.simloop import SimLoop, run
from qblock.units import MiB

SECOND = 1_000_000_000


def test_virtual_time_passes_only_in_sleeps_and_to_the_nanosecond() -> None:
    """A test that waits three days ends at once, and no rounding creeps in."""

    async def main() -> list[int]:
        clock = LoopClock()
        seen = [clock.now_ns()]
        for ns in (1, 7, 3 * 86400 * SECOND, 100_000_001):
            await clock.sleep_ns(ns)
            seen.append(clock.now_ns())
        return seen

    days = 3 * 86400 * SECOND
    assert run(main) == [0, 1, 8, 8 + days, 8 + days + 100_000_001]


def test_virtual_wall_clock_starts_on_the_day_of_the_seed() -> None:
    """Event time stamps of two runs must be equal."""

    async def main() -> tuple[tuple[int, int], tuple[int, int]]:
        before = LoopClock().wall()
        await LoopClock().sleep_ns(1_000_002_000)
        return before, LoopClock().wall()

    assert run(main) == ((VIRTUAL_EPOCH, 0), (VIRTUAL_EPOCH + 1, 2))


def test_a_loop_clock_works_on_any_loop() -> None:
    """Third parties may bring their own loop; then its seconds are what there is."""

    async def main() -> tuple[int, int]:
        return LoopClock().now_ns(), round(asyncio.get_running_loop().time() * SECOND)

    ours, loops = asyncio.run(main())
    assert abs(ours - loops) < SECOND


def test_the_real_clock_is_the_machines() -> None:
    """Durations come from the monotonic clock, time stamps from the wall clock."""
    before = time.monotonic_ns()
    assert before <= RealClock().now_ns() <= time.monotonic_ns()
    seconds, microseconds = RealClock().wall()
    assert abs(seconds - time.time()) < 5
    assert 0 <= microseconds < 1_000_000
    assert (RealClock.kind, LoopClock.kind) == ("real", "virtual")
    assert repr(RealClock()) + repr(LoopClock()) == "<RealClock><LoopClock>"


@pytest.mark.parametrize("clock", [RealClock(), LoopClock()])
def test_a_sleep_of_nothing_lets_others_run_once(clock: Clock) -> None:
    """A busy job that asks for no delay must not keep the loop to itself."""

    async def main() -> list[str]:
        order: list[str] = []
        asyncio.get_running_loop().call_soon(order.append, "other")
        await clock.sleep_ns(0)
        order.append("me")
        await clock.sleep_ns(10)
        return order

    assert run(main) == ["other", "me"]


def test_a_sleeper_can_be_woken_and_leaves_no_timer() -> None:
    """Patch 1 of the 2012 series: whoever wakes a sleeper early, its timer is dropped (time does not run on to it)."""

    async def main() -> tuple[bool, int]:
        clock = LoopClock()
        sleep = CoSleep(clock)
        sleeper = asyncio.ensure_future(sleep.sleep_ns(3600 * SECOND))
        await clock.sleep_ns(SECOND)
        assert sleep.is_sleeping
        sleep.wake()
        assert not sleep.is_sleeping
        sleep.wake()  # waking twice is harmless
        woken = await sleeper
        timer = asyncio.get_running_loop().create_future()
        clock.call_after(10 * SECOND, lambda: timer.set_result(None))
        await timer
        return woken, clock.now_ns()

    assert run(main) == (True, 11 * SECOND)


def test_a_sleep_that_nobody_wakes_ends_by_itself() -> None:
    """The return value tells the two ends apart, and a wake without a sleeper is not remembered."""

    async def main() -> tuple[bool, int]:
        sleep = CoSleep(LoopClock())
        sleep.wake()
        return await sleep.sleep_ns(5 * SECOND), LoopClock().now_ns()

    assert run(main) == (False, 5 * SECOND)


def test_a_cancelled_sleep_leaves_the_door_usable() -> None:
    """After an asyncio cancellation (program exit) neither timer nor sleeper remains."""

    async def main() -> int:
        sleep = CoSleep(LoopClock())
        task = asyncio.ensure_future(sleep.sleep_ns(3600 * SECOND))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not sleep.is_sleeping
        await sleep.sleep_ns(SECOND)
        return LoopClock().now_ns()

    assert run(main) == SECOND


def test_rate_limit_spreads_whole_chunks_over_slices() -> None:
    """16 MiB at 4 MiB/s take 4.0 s in steps of 1 MiB, as measured on the real program (semantics.md section 6)."""

    async def main() -> list[int]:
        clock = LoopClock()
        limit = RateLimit(clock)
        limit.set_speed(4 * MiB)
        moments = []
        for _ in range(16):
            await clock.sleep_ns(limit.delay_ns(MiB))
            moments.append(clock.now_ns())
        return moments

    moments = run(main)
    assert moments[-1] / SECOND == pytest.approx(4.0, rel=1e-4)
    assert moments[0] / SECOND == pytest.approx(0.25, rel=1e-4)


def test_rate_limit_is_free_below_the_quota_of_a_slice() -> None:
    """Small pieces are not slept for one by one."""

    async def main() -> list[int]:
        limit = RateLimit(LoopClock())
        limit.set_speed(1000)
        return [limit.delay_ns(count) for count in (50, 49, 1, 100)]

    assert run(main) == [0, 0, 100_000_000, 200_000_000]


def test_no_speed_means_no_limit_and_what_was_done_counts_at_a_new_speed() -> None:
    """set-speed takes effect at once, also after a huge chunk under a tiny limit, and gives nothing for free."""

    async def main() -> list[int]:
        limit = RateLimit(LoopClock())
        delays = [limit.delay_ns(1 << 60)]
        limit.set_speed(1)
        delays.append(limit.delay_ns(1000))
        limit.set_speed(1000)
        delays.append(limit.delay_ns(99))
        return delays

    assert run(main) == [0, 100_000_000_000, 1_099_000_000]


def test_a_speed_below_one_byte_per_slice_still_moves() -> None:
    """The quota is at least 1, so nothing divides by zero."""

    async def main() -> int:
        limit = RateLimit(LoopClock())
        limit.set_speed(3)
        return limit.delay_ns(2)

    assert run(main) == 200_000_000


def test_simloop_is_the_virtual_time_that_front_ends_ask_for() -> None:
    """The REPL and the fixtures know the loop only by this protocol."""
    loop = SimLoop(manual=True)
    assert isinstance(loop, VirtualTime)
    loop.close()
