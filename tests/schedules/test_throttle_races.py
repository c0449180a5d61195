"""Throttled requests under every kind of interruption: drains, new limits, members that come and go, cancelled requests."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from qblock.clock import LoopClock
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.throttle_limits import NO_LIMITS, ThrottleLimits
from qblock.throttling import ThrottleGroups, ThrottleMember
from qblock.units import MILLISECOND_NS, SECOND_NS

LIMITS = (
    NO_LIMITS, ThrottleLimits(iops_total=50), ThrottleLimits(bps_read=1 << 20, iops_write=20),
    ThrottleLimits(iops_total=20, iops_total_max=60, iops_total_max_length=3, iops_size=4096),
)  # fmt: skip


class Crowd:
    """Members of one group and what they have asked for."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.clock = LoopClock()
        self.groups = ThrottleGroups(self.clock)
        self.group = self.groups.create("g")
        self.members: list[ThrottleMember] = [self.group.join() for _ in range(3)]
        self.requests: list[asyncio.Task[None]] = []

    async def disturb(self) -> None:
        """One thing that can happen, and then a little time."""
        member = self.random.choice(self.members)
        match self.random.randrange(8):
            case 0:
                self.group.set_limits(self.random.choice(LIMITS))
            case 1:
                member.set_drained(True)
                assert not any(member.queues.values())
            case 2:
                member.set_drained(False)
            case 3 if len(self.members) > 1:
                member.leave()
                self.members.remove(member)
            case 4:
                self.members.append(self.group.join())
            case 5 if self.requests:
                self.random.choice(self.requests).cancel()
            case _:
                work = member.admit(self.random.choice((512, 64 << 10)), is_write=self.random.random() < 0.5)
                self.requests += [asyncio.create_task(work)]
        await self.clock.sleep_ns(self.random.randrange(30) * MILLISECOND_NS)

    async def end(self) -> None:
        """Whatever waits is let go by the limits in force alone, within the time that they allow."""
        for member in self.members:
            member.set_drained(False)
        waiting = sum(len(queue) for member in self.members for queue in member.queues.values())
        before = self.clock.now_ns()
        await asyncio.gather(*self.requests, return_exceptions=True)
        assert self.clock.now_ns() - before <= (waiting + 40) * SECOND_NS
        for member in self.members:
            assert not any(member.queues.values())
            member.leave()
        self.groups.delete("g")


@pytest.mark.parametrize("seed", range(20))
def test_no_request_is_lost_whatever_happens_to_its_group(seed: int) -> None:
    """A request that nobody wakes would hang its guest; the loop would say `Deadlock`."""

    async def main() -> None:
        crowd = Crowd(seed)
        for _ in range(60):
            await crowd.disturb()
        await crowd.end()

    run(main, Seeded(seed))
