"""Throttle groups: rates, bursts, turns among members, drained members, changes of the limits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qblock.clock import LoopClock
from qblock.errors import CommandError, DuplicateName, InvalidParameter
from qblock.testing.simloop import run
from qblock.throttle_limits import NO_LIMITS, ThrottleLimits, changed_limits
from qblock.throttling import ThrottleGroup, ThrottleGroups, ThrottleMember
from qblock.units import SECOND_NS


def group_of(**limits: int) -> ThrottleGroup:
    group = ThrottleGroups(LoopClock()).create("g")
    group.set_limits(ThrottleLimits(**limits))
    return group


async def started() -> None:
    """Let the tasks that were made just now come to their first wait."""
    for _ in range(3):
        await asyncio.sleep(0)


async def seconds_of(member: ThrottleMember, requests: int, length: int = 512, *, is_write: bool = False) -> float:
    """How long that many requests take, one after the other."""
    start = LoopClock().now_ns()
    for _ in range(requests):
        await member.admit(length, is_write=is_write)
    return (LoopClock().now_ns() - start) / SECOND_NS


@pytest.mark.parametrize(
    ("limits", "requests", "length", "measured"),
    [
        ({"iops_total": 20}, 40, 512, 1.86),
        ({"iops_total": 20, "iops_total_max": 20}, 40, 512, 0.96),
        ({"iops_total": 20, "iops_total_max": 40}, 60, 512, 0.96),
        ({"iops_total": 20, "iops_total_max": 40, "iops_total_max_length": 2}, 100, 512, 2.39),
        ({"iops_total": 20, "iops_size": 4096}, 20, 8192, 1.83),
        ({"bps_total": 65536}, 4, 65536, 2.91),
        ({"iops_read": 20}, 40, 512, 1.86),
        ({"iops_write": 20}, 40, 512, 0.0),
        ({}, 40, 1 << 30, 0.0),
    ],
)
def test_requests_take_as_long_as_in_qemu(limits: dict[str, int], requests: int, length: int, measured: float) -> None:
    """Times of reads, measured on the real program (semantics.md section 13); its timers are a little late."""

    async def main() -> None:
        took = await seconds_of(group_of(**limits).join(), requests, length)
        assert measured - 0.06 <= took <= measured

    run(main)


def test_the_strictest_limit_decides() -> None:
    """Bytes and requests, of all and of writes, are counted side by side."""

    async def main() -> None:
        member = group_of(iops_total=1000, bps_write=5120).join()
        assert await seconds_of(member, 11, 512, is_write=True) == pytest.approx(0.9, abs=0.001)
        assert await seconds_of(member, 11, 512) < 0.1

    run(main)


def test_members_take_turns_whatever_they_have_waiting() -> None:
    """A member with a long queue gets no more than one with a short one; a member's own requests stay in order."""

    async def main() -> None:
        group = group_of(iops_total=10)
        busy, calm = group.join(), group.join()
        order: list[str] = []

        async def ask(member: ThrottleMember, name: str) -> None:
            await member.admit(512, is_write=True)
            order.append(name)

        async with asyncio.TaskGroup() as tasks:
            for number in range(8):
                tasks.create_task(ask(busy, f"b{number}"))
            for number in range(3):
                tasks.create_task(ask(calm, f"c{number}"))
        assert order == ["b0", "b1", "b2", "c0", "b3", "c1", "b4", "c2", "b5", "b6", "b7"]

    run(main)


def test_reads_do_not_wait_behind_writes_of_their_own_limit() -> None:
    """Each direction has a queue of its own; the total limit holds for both."""

    async def main() -> None:
        group = group_of(iops_write=1)
        member = group.join()
        writes = [asyncio.create_task(member.admit(512, is_write=True)) for _ in range(3)]
        assert await seconds_of(member, 100) == 0.0
        await asyncio.gather(*writes)
        assert LoopClock().now_ns() == pytest.approx(1.9 * SECOND_NS, rel=0.001)

    run(main)


def test_a_drained_member_waits_for_nothing() -> None:
    """What waits passes, and is counted: whoever comes afterwards pays for it."""

    async def main() -> None:
        group = group_of(iops_total=1)
        member, other = group.join(), group.join()
        waiting = [asyncio.create_task(member.admit(512, is_write=False)) for _ in range(5)]
        await started()
        member.set_drained(True)
        await asyncio.gather(*waiting)
        assert await seconds_of(member, 5) == 0.0
        member.set_drained(False)
        assert await seconds_of(other, 1) == pytest.approx(9.9, abs=0.001)

    run(main)


def test_new_limits_forget_what_was_counted_and_let_pass_what_they_allow() -> None:
    """Nobody waits on for a limit that is gone."""

    async def main() -> None:
        group = group_of(iops_total=1)
        member = group.join()
        waiting = [asyncio.create_task(member.admit(512, is_write=False)) for _ in range(30)]
        await started()
        group.set_limits(ThrottleLimits(iops_total=100))
        await asyncio.gather(*waiting)
        assert 0.1 < LoopClock().now_ns() / SECOND_NS < 0.3
        group.set_limits(NO_LIMITS)
        assert await seconds_of(member, 1000) == 0.0

    run(main)


def test_a_member_that_leaves_takes_its_requests_and_its_turn_along() -> None:
    """The others go on; a group that nobody keeps goes with its last member."""

    async def main() -> None:
        groups = ThrottleGroups(LoopClock())
        first, second = groups.join("g"), groups.join("g")
        first.group.set_limits(ThrottleLimits(iops_total=1))
        requests = [asyncio.create_task(m.admit(512, is_write=False)) for m in (first, second, first, second)]
        await started()
        first.leave()
        await asyncio.gather(*requests)
        second.leave()
        with pytest.raises(CommandError):
            groups.find("g")

    run(main)


def test_a_cancelled_request_leaves_the_queue() -> None:
    """The timer that was meant for it serves the next one."""

    async def main() -> None:
        member = group_of(iops_total=10).join()
        assert await seconds_of(member, 2) == 0.0
        given_up = asyncio.create_task(member.admit(512, is_write=False))
        patient = asyncio.create_task(member.admit(512, is_write=False))
        await started()
        given_up.cancel()
        await asyncio.gather(given_up, patient, return_exceptions=True)
        assert given_up.cancelled() and LoopClock().now_ns() == pytest.approx(0.1 * SECOND_NS, rel=0.01)

    run(main)


def test_kept_groups_stay_until_they_are_deleted_and_only_without_members() -> None:
    """An object's group is there for whoever comes."""

    async def main() -> None:
        groups = ThrottleGroups(LoopClock())
        member = groups.create("g").join()
        with pytest.raises(DuplicateName):
            groups.create("g")
        with pytest.raises(CommandError):
            groups.delete("g")
        member.leave()
        groups.find("g")
        groups.delete("g")
        with pytest.raises(CommandError):
            groups.find("g")

    run(main)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"iops-total": 1, "iops-read": 1}, None),
        ({"bps-total": 1, "bps-write": 1}, None),
        ({"iops-total": 10, "iops-read": 0, "iops-total-max": 5}, "iops-total-max"),
        ({"iops-total-max": 5}, "iops-total-max"),
        ({"iops-total": 1, "iops-total-max-length": 0}, "iops-total-max-length"),
        ({"iops-total": 1, "iops-total-max-length": 2}, "iops-total-max-length"),
        ({"iops-total": 1, "iops-total-max": 2, "iops-total-max-length": 1 << 32}, "iops-total-max-length"),
        ({"iops-total": 10**14, "iops-total-max": 10**15, "iops-total-max-length": 2}, "iops-total-max-length"),
        ({"iops-total": -1}, "iops-total"),
        ({"bps-write": 10**15 + 1}, "bps-write"),
        ({"iops-size": 2}, "iops-size"),
        ({"iops-size": -2, "iops-read": 1}, "iops-size"),
        ({"iops": 1}, "limits.iops"),
        ({"iops-total": "1"}, "limits.iops-total"),
        (7, "limits"),
    ],
)
def test_limits_that_make_no_sense_are_refused(given: Any, named: str | None) -> None:
    """The error names the member, unless two contradict each other."""
    with pytest.raises(CommandError) as caught:
        changed_limits(NO_LIMITS, given)
    assert getattr(caught.value, "name", None) == named


def test_only_members_given_change() -> None:
    """And they must fit to those that stay."""
    limits = changed_limits(NO_LIMITS, {"iops-total": 5, "iops-total-max": 10})
    assert changed_limits(limits, {"iops-total": 7}) == ThrottleLimits(iops_total=7, iops_total_max=10)
    with pytest.raises(InvalidParameter):
        changed_limits(limits, {"iops-total": 11})
