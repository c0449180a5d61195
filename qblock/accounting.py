"""What query-blockstats tells of a device: counters, latency histograms.

Models QEMU's block accounting (semantics.md section 14.2): only requests of guests and of qemu-io's aio commands are counted,
failed and refused ones apart.
Times are nanoseconds.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import attrs

from qblock.clock import Clock
from qblock.errors import CommandError
from qblock.timed_stats import Kind, TimedStats

Operation = Literal["read", "write", "zero", "discard", "flush"]
HistogramKind = Kind

_PREFIXES: Final = {"read": "rd", "write": "wr", "zero": "wr", "discard": "unmap", "flush": "flush"}
_TIMED: Final[Mapping[str, HistogramKind]] = {"read": "rd", "write": "wr", "zero": "wr", "flush": "flush"}
"""The operations that have a histogram, and its name."""


@attrs.define(eq=False)
class LatencyHistogram:
    """How many requests took how long: ``bins`` counts those below the first of ``boundaries``, between each two, and above."""

    boundaries: tuple[int, ...]
    bins: list[int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        if any(a >= b for a, b in itertools.pairwise((0, *self.boundaries))):
            raise CommandError("The boundaries of a histogram must be above 0 and in ascending order")
        self.bins = [0] * (len(self.boundaries) + 1)

    def count(self, ns: int) -> None:
        """Enter one request."""
        self.bins[bisect_right(self.boundaries, ns)] += 1


@attrs.define(eq=False)
class DeviceAccounting:
    """Counts a device's requests.

    ``account_failed``: failed ones add to the times; ``account_invalid``: refused ones end idling. ``intervals`` are lengths in
    seconds over which times are told apart.
    """

    clock: Clock
    account_failed: bool = True
    account_invalid: bool = True
    intervals: Sequence[int] = ()
    timed: list[TimedStats] = attrs.field(init=False)
    counters: dict[str, int] = attrs.field(factory=dict, init=False)
    histograms: dict[HistogramKind, LatencyHistogram] = attrs.field(factory=dict, init=False)
    last_access_ns: int | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.timed = [TimedStats(seconds, self.clock.now_ns()) for seconds in self.intervals]

    def start(self) -> int:
        """A request begins; the result is for `done` and `failed`."""
        return self.clock.now_ns()

    def done(self, operation: Operation, length: int, started: int) -> None:
        """A request of ``length`` bytes has ended well, or its error was ignored."""
        prefix = _PREFIXES[operation]
        self._add(f"{prefix}_operations", 1)
        if prefix != "flush":
            self._add(f"{prefix}_bytes", length)
        self._took(operation, started)

    def failed(self, operation: Operation, started: int) -> None:
        """A request has failed, and the guest was told so."""
        self._add(f"failed_{_PREFIXES[operation]}_operations", 1)
        if self.account_failed:
            self._took(operation, started)

    def refused(self, operation: Operation) -> None:
        """A request was invalid (outside of the disk, a change of a read-only one) and never started."""
        self._add(f"invalid_{_PREFIXES[operation]}_operations", 1)
        if self.account_invalid:
            self.last_access_ns = self.clock.now_ns()

    def snapshot(self) -> dict[str, int]:
        """The counters now, with ``idle_time_ns`` once there was a request."""
        idle = {} if self.last_access_ns is None else {"idle_time_ns": self.clock.now_ns() - self.last_access_ns}
        return {**self.counters, **idle}

    def timed_stats(self) -> list[dict[str, int | float]]:
        """What each of the intervals shows now."""
        now = self.clock.now_ns()
        return [timed.shown(now) for timed in self.timed]

    def set_histogram(self, kind: HistogramKind, boundaries: Sequence[int]) -> None:
        """Begin a new histogram; raises `CommandError`."""
        self.histograms[kind] = LatencyHistogram(tuple(boundaries))

    def _took(self, operation: Operation, started: int) -> None:
        now = self.last_access_ns = self.clock.now_ns()
        self._add(f"{_PREFIXES[operation]}_total_time_ns", now - started)
        kind = _TIMED.get(operation)
        if kind is None:
            return
        if kind in self.histograms:
            self.histograms[kind].count(now - started)
        for timed in self.timed:
            timed.count(kind, now - started, now)

    def _add(self, name: str, count: int) -> None:
        self.counters[name] = self.counters.get(name, 0) + count
