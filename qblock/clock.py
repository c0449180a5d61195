"""Time: clocks, the sleep that can be woken, and rate limiting in slices.

The only importer of the loop's timers. Models QEMU's ``QEMU_CLOCK_REALTIME`` and ``QEMU_CLOCK_VIRTUAL`` as two clocks
of one interface, the interruptible ``co_sleep_ns`` of the 2012 series (rfc-2012.md, patch 1: the timer belongs to the
sleeper, and whoever wakes it early leaves no timer behind), and ``ratelimit`` (semantics.md section 6). Time is
integer nanoseconds. Differs from QEMU in that virtual time is the event loop's own time: it passes as the loop says
(see ``qblock.testing.simloop``), and product code cannot tell the two clocks apart.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, Literal, Protocol, TypeVar, runtime_checkable

import attrs

from qblock.units import SECOND_NS

T = TypeVar("T")

VIRTUAL_EPOCH: Final = 1_334_275_200
"""Wall-clock seconds (13 April 2012, 00:00 UTC, the day of the seed) at which virtual time starts."""


class Clock(Protocol):
    """What tells the time to a block system. All methods belong to the loop's thread."""

    @property
    def kind(self) -> Literal["real", "virtual"]:
        """Whether time passes by itself or only as the loop says."""

    def now_ns(self) -> int:
        """Monotonic nanoseconds since some fixed moment."""

    def wall(self) -> tuple[int, int]:
        """Seconds since 1970 UTC, and microseconds: what event time stamps show."""

    def call_after(self, ns: int, callback: Callable[[], object]) -> asyncio.TimerHandle:
        """Call ``callback`` on the running loop in ``ns`` nanoseconds, unless the handle is cancelled before."""

    async def sleep_ns(self, ns: int) -> None:
        """Suspend the caller for ``ns`` nanoseconds, once around the loop when it is 0 or less."""


@runtime_checkable
class VirtualTime(Protocol):
    """A loop whose time is moved by somebody: ``SimLoop`` in manual mode, as the REPL and the pytest fixtures hold
    it.
    """

    @property
    def now_ns(self) -> int:
        """Virtual nanoseconds since the loop was made."""

    async def advance(self, ns: int) -> None:
        """Let ``ns`` nanoseconds pass, and return when everything that fell due in them has run."""

    async def settle(self) -> None:
        """Return when everything has run that needs no time to pass."""

    async def next_timer_ns(self) -> int | None:
        """When the next timer falls due, in virtual nanoseconds, after `settle`; None when none is armed."""

    async def advance_until(self, done: asyncio.Future[Any], *, limit_ns: int) -> bool:
        """Let time pass until ``done`` is done (True) or ``limit_ns`` have passed (False)."""


def _settle(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


class _LoopTimerClock:
    """What both clocks share: a sleep is one loop timer and one future."""

    def call_after(self, ns: int, callback: Callable[[], object]) -> asyncio.TimerHandle:
        """See `Clock`."""
        return asyncio.get_running_loop().call_later(ns / SECOND_NS, callback)

    async def sleep_ns(self, ns: int) -> None:
        """See `Clock`."""
        if ns <= 0:
            await asyncio.sleep(0)
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.call_after(ns, lambda: _settle(done, None))
        try:
            await done
        finally:
            timer.cancel()


class RealClock(_LoopTimerClock):
    """The machine's own monotonic and wall clocks."""

    kind: Final = "real"

    def now_ns(self) -> int:
        """See `Clock`."""
        return time.monotonic_ns()

    def wall(self) -> tuple[int, int]:
        """See `Clock`."""
        seconds, ns = divmod(time.time_ns(), SECOND_NS)
        return seconds, ns // 1000

    def __repr__(self) -> str:
        return "<RealClock>"


class LoopClock(_LoopTimerClock):
    """Virtual time: the running loop's own. Its wall clock starts at `VIRTUAL_EPOCH`."""

    kind: Final = "virtual"

    def now_ns(self) -> int:
        """See `Clock`; exact when the loop counts nanoseconds (``SimLoop``), else rounded from its seconds."""
        loop = asyncio.get_running_loop()
        now = getattr(loop, "now_ns", None)
        return now if isinstance(now, int) else round(loop.time() * SECOND_NS)

    def wall(self) -> tuple[int, int]:
        """See `Clock`."""
        seconds, ns = divmod(self.now_ns(), SECOND_NS)
        return VIRTUAL_EPOCH + seconds, ns // 1000

    def call_after(self, ns: int, callback: Callable[[], object]) -> asyncio.TimerHandle:
        """See `Clock`."""
        return asyncio.get_running_loop().call_at((self.now_ns() + ns) / SECOND_NS, callback)

    def __repr__(self) -> str:
        return "<LoopClock>"


@attrs.define(eq=False, slots=True)
class CoSleep:
    """One sleeper that anybody may wake early. The timer is the sleeper's own and is dropped however the sleep ends."""

    clock: Clock
    _sleeper: asyncio.Future[bool] | None = attrs.field(init=False, default=None)

    @property
    def is_sleeping(self) -> bool:
        """True while a caller is inside `sleep_ns` and has not been woken."""
        return self._sleeper is not None and not self._sleeper.done()

    async def sleep_ns(self, ns: int) -> bool:
        """Sleep for ``ns`` nanoseconds (at least once around the loop); True when `wake` ended it early."""
        sleeper = self._lie_down()
        timer = self.clock.call_after(max(ns, 0), lambda: _settle(sleeper, False))
        try:
            return await sleeper
        finally:
            timer.cancel()
            self._sleeper = None

    async def until_woken(self) -> None:
        """Sleep until `wake`."""
        sleeper = self._lie_down()
        try:
            await sleeper
        finally:
            self._sleeper = None

    def _lie_down(self) -> asyncio.Future[bool]:
        assert self._sleeper is None, "one sleeper at a time"
        self._sleeper = asyncio.get_running_loop().create_future()
        return self._sleeper

    def wake(self) -> None:
        """End the sleep now; without a sleeper this does nothing, and nothing is remembered."""
        if self._sleeper is not None:
            _settle(self._sleeper, True)


@attrs.define(eq=False, slots=True)
class RateLimit:
    """Spreads ``count`` units per call over slices of time; a call larger than a slice's quota stretches the slice."""

    clock: Clock
    slice_ns: int = 100_000_000
    speed: int = attrs.field(init=False, default=0)
    _start_ns: int = attrs.field(init=False, default=0)
    _end_ns: int = attrs.field(init=False, default=0)
    _dispatched: int = attrs.field(init=False, default=0)

    def set_speed(self, speed: int) -> None:
        """``speed`` in units (bytes) per second, 0 for no limit. What was done in the current slice counts at the new speed."""
        assert speed >= 0
        self.speed = speed

    def delay_ns(self, count: int) -> int:
        """Account ``count`` units as done now; returns for how many nanoseconds the caller should sleep before the
        next ones.
        """
        if not self.speed:
            return 0
        now = self.clock.now_ns()
        if self._end_ns <= now:
            self._start_ns, self._end_ns, self._dispatched = now, now + self.slice_ns, 0
        quota = max(1, self.speed * self.slice_ns // SECOND_NS)
        self._dispatched += count
        if self._dispatched < quota:
            return 0
        self._end_ns = self._start_ns + self._dispatched * self.slice_ns // quota
        return max(0, self._end_ns - now)
