"""Throttle groups: requests of several users wait so that together they keep to one set of limits.

Models QEMU's throttle groups (semantics.md section 13): leaky buckets, one per limit, and members (throttle filters, drives with
limits) that take turns. Everything a group's name means is here; who may make and delete groups by command is `objects.py`.

A bucket's *level* is what was admitted and has not leaked away yet, at the average rate. A request is admitted when no bucket
that it concerns is over its capacity, and is counted only then, so a bucket may be over by one request. Without bursts the
capacity is a tenth of a second at the average; with them, all of a burst. A burst of more than a second has a second level,
which leaks at the rate of the burst and has a tenth of a second of room.

Requests of one direction (reads, or writes) wait in one queue per member. Whoever is next is the next member, in turn, that has
one waiting; a timer per direction wakes it. A drained member waits for nothing: its requests are counted all the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs

from qblock.errors import CommandError, DuplicateName
from qblock.throttle_limits import NO_LIMITS, RATES, Rate, ThrottleLimits
from qblock.units import SECOND_NS

if TYPE_CHECKING:
    from qblock.clock import Clock

_DIRECTIONS: Final = (False, True)
"""Reads, writes: as ``is_write``."""
_ROOM: Final = 10
"""What fits into a bucket without a burst is this part of a second's worth."""


@attrs.define(eq=False)
class _Bucket:
    """One limit in force; levels are bytes or requests."""

    rate: Rate
    level: float = 0.0
    burst_level: float = 0.0

    def leak(self, elapsed_ns: int) -> None:
        self.level = max(0.0, self.level - self.rate.average * elapsed_ns / SECOND_NS)
        self.burst_level = max(0.0, self.burst_level - self.rate.burst * elapsed_ns / SECOND_NS)

    def fill(self, units: float) -> None:
        self.level += units
        if self.rate.seconds > 1:
            self.burst_level += units

    def wait_ns(self) -> int:
        """How long until a request may pass, if nothing else does."""
        average, burst, seconds = self.rate
        room = burst * seconds or average / _ROOM
        if self.level > room:
            return _duration(self.level - room, average)
        if seconds > 1 and self.burst_level > burst / _ROOM:
            return _duration(self.burst_level - burst / _ROOM, burst)
        return 0


def _duration(units: float, per_second: int) -> int:
    return int(units * SECOND_NS / per_second) + 1


class ThrottleState:
    """The buckets of one set of limits; computation only, times are handed in. Which buckets a request concerns is told by
    its direction: those of all requests, and those of reads or of writes.
    """

    def __init__(self, limits: ThrottleLimits, now_ns: int) -> None:
        self.limits = limits
        self._leaked_ns = now_ns
        rates = {name: limits.rate(name) for name in RATES}
        self._buckets = {name: _Bucket(rate) for name, rate in rates.items() if rate.average}

    def wait_ns(self, now_ns: int, *, is_write: bool) -> int:
        """How long a request that comes now has to wait; 0 when it may pass."""
        elapsed, self._leaked_ns = now_ns - self._leaked_ns, now_ns
        for bucket in self._buckets.values():
            bucket.leak(elapsed)
        return max((bucket.wait_ns() for bucket, _ in self._concerned(is_write)), default=0)

    def admit(self, length: int, *, is_write: bool) -> None:
        """Count a request of ``length`` bytes that passes now."""
        size = self.limits.iops_size
        requests = length / size if size and length > size else 1.0
        for bucket, counts_bytes in self._concerned(is_write):
            bucket.fill(length if counts_bytes else requests)

    def _concerned(self, is_write: bool) -> list[tuple[_Bucket, bool]]:
        kinds = ("total", "write" if is_write else "read")
        names = (f"{unit}_{kind}" for unit in ("bps", "iops") for kind in kinds)
        return [(self._buckets[name], name.startswith("bps")) for name in names if name in self._buckets]


@attrs.frozen(eq=False)
class _Waiting:
    """A request in a queue."""

    length: int
    admitted: asyncio.Future[None]


class ThrottleMember:
    """One user of a group: its requests go through `admit`. Ended by `leave`."""

    def __init__(self, group: ThrottleGroup) -> None:
        self.group = group
        self.drained = False
        self.queues: dict[bool, deque[_Waiting]] = {direction: deque() for direction in _DIRECTIONS}

    async def admit(self, length: int, *, is_write: bool) -> None:
        """Return when a request of ``length`` bytes may pass."""
        group = self.group
        if self.drained:
            group.state.admit(length, is_write=is_write)
            return
        if group.passes(length, is_write=is_write):
            return
        waiting = _Waiting(length, asyncio.get_running_loop().create_future())
        self.queues[is_write].append(waiting)
        group.pump(is_write=is_write)
        try:
            await waiting.admitted
        except asyncio.CancelledError:
            if waiting in self.queues[is_write]:
                self.queues[is_write].remove(waiting)
            raise

    def set_drained(self, drained: bool) -> None:
        """While drained, what waits and what comes passes at once."""
        self.drained = drained
        if drained:
            self._release()

    def leave(self) -> None:
        """Let go of the group; what waits passes. The group goes with its last member unless somebody keeps it."""
        self.drained = True
        self._release()
        self.group.remove(self)

    def _release(self) -> None:
        for is_write, queue in self.queues.items():
            while queue:
                self.group.let_pass(queue.popleft(), is_write=is_write)


class ThrottleGroup:
    """Members that share limits."""

    def __init__(self, name: str, clock: Clock, on_empty: Callable[[], None]) -> None:
        self.name = name
        self.members: list[ThrottleMember] = []
        self.state = ThrottleState(NO_LIMITS, clock.now_ns())
        self._clock = clock
        self._timers: dict[bool, asyncio.TimerHandle] = {}
        self._served: dict[bool, ThrottleMember] = {}
        self._on_empty = on_empty

    @property
    def limits(self) -> ThrottleLimits:
        """The limits in force."""
        return self.state.limits

    def join(self) -> ThrottleMember:
        """A new member."""
        member = ThrottleMember(self)
        self.members.append(member)
        return member

    def set_limits(self, limits: ThrottleLimits) -> None:
        """Put checked limits into force; what was counted so far is forgotten."""
        self.state = ThrottleState(limits, self._clock.now_ns())
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for direction in _DIRECTIONS:
            self.pump(is_write=direction)

    def passes(self, length: int, *, is_write: bool) -> bool:
        """Whether a request that comes now need not wait; it is counted then."""
        if is_write in self._timers or self.state.wait_ns(self._clock.now_ns(), is_write=is_write):
            return False
        self.state.admit(length, is_write=is_write)
        return True

    def pump(self, *, is_write: bool) -> None:
        """Let requests of a direction pass that may; for the others a timer runs."""
        while is_write not in self._timers and (member := self._next(is_write)) is not None:
            wait = self.state.wait_ns(self._clock.now_ns(), is_write=is_write)
            if wait:
                self._timers[is_write] = self._clock.call_after(wait, lambda: self._wake(is_write))
                return
            self._served[is_write] = member
            self.let_pass(member.queues[is_write].popleft(), is_write=is_write)

    def let_pass(self, waiting: _Waiting, *, is_write: bool) -> None:
        """Count a request that has left its queue, and wake its task."""
        if not waiting.admitted.done():
            self.state.admit(waiting.length, is_write=is_write)
            waiting.admitted.set_result(None)

    def remove(self, member: ThrottleMember) -> None:
        """A member leaves."""
        for direction, served in list(self._served.items()):
            if served is member:
                self._served[direction] = self._before(member)
        self.members.remove(member)
        if not self.members:
            self._served.clear()
            self._on_empty()

    def _wake(self, is_write: bool) -> None:
        del self._timers[is_write]
        self.pump(is_write=is_write)

    def _before(self, member: ThrottleMember) -> ThrottleMember:
        return self.members[self.members.index(member) - 1]

    def _next(self, is_write: bool) -> ThrottleMember | None:
        """The member whose turn it is: the first after the one served last that has a request waiting."""
        served = self._served.get(is_write)
        start = self.members.index(served) + 1 if served is not None else 0
        in_turn = self.members[start:] + self.members[:start]
        return next((member for member in in_turn if member.queues[is_write]), None)

    def __repr__(self) -> str:
        return f"<ThrottleGroup {self.name!r} {len(self.members)} members>"


class ThrottleGroups:
    """The groups of one block system, by name."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._groups: dict[str, ThrottleGroup] = {}
        self._kept: set[str] = set()

    def create(self, name: str) -> ThrottleGroup:
        """A new group that stays until it is deleted; raises `DuplicateName`."""
        if name in self._groups:
            raise DuplicateName("throttle group", name)
        self._kept.add(name)
        return self._make(name)

    def delete(self, name: str) -> None:
        """Delete a group that `create` has made; raises `CommandError` while it has members."""
        group = self._groups[name]
        if group.members:
            raise CommandError(f"The throttle group '{name}' has {len(group.members)} users, which must let go of it first")
        self._kept.remove(name)
        del self._groups[name]

    def find(self, name: str) -> ThrottleGroup:
        """The group of that name; raises `CommandError`."""
        group = self._groups.get(name)
        if group is None:
            raise CommandError(f"There is no throttle group '{name}'")
        return group

    def join(self, name: str) -> ThrottleMember:
        """A new member of the group of that name, which is made when there is none, and goes with its last member then."""
        return (self._groups.get(name) or self._make(name)).join()

    def _make(self, name: str) -> ThrottleGroup:
        group = self._groups[name] = ThrottleGroup(name, self._clock, lambda: self._forget(name))
        return group

    def _forget(self, name: str) -> None:
        if name not in self._kept:
            del self._groups[name]
