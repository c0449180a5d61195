"""How long requests took lately: the shortest, the longest, the mean over the last so many seconds, and how many were under way.

Models ``stats-intervals`` of drives and ``timed_stats`` of query-blockstats in QEMU 7.2. What is kept does not grow with the rate
of requests: an interval is kept in slices, of which the oldest one goes as a whole, so that it ends between 15/16 and all of its
length ago. Times are nanoseconds.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Literal

import attrs

Kind = Literal["rd", "wr", "flush"]
KINDS: Final[tuple[Kind, ...]] = ("rd", "wr", "flush")
_SLICES: Final = 16
_SECOND: Final = 1_000_000_000


@attrs.define
class _Tally:
    """What requests of one kind took."""

    count: int = 0
    total: int = 0
    shortest: int = 0
    longest: int = 0

    def add(self, other: _Tally) -> None:
        self.shortest = min(self.shortest, other.shortest) if self.count else other.shortest
        self.longest = max(self.longest, other.longest)
        self.count += other.count
        self.total += other.total


@attrs.define(eq=False)
class TimedStats:
    """The requests of the last ``seconds``; ``begun`` is when counting began. Give times that do not go backwards."""

    seconds: int
    begun: int
    _slices: deque[tuple[int, dict[Kind, _Tally]]] = attrs.field(factory=deque, init=False, repr=False)

    def count(self, kind: Kind, took: int, now: int) -> None:
        """Enter a request that has ended ``now``."""
        number = now // self._slice
        if not self._slices or self._slices[-1][0] != number:
            self._forget(number)
            self._slices.append((number, {}))
        self._slices[-1][1].setdefault(kind, _Tally()).add(_Tally(1, took, took, took))

    def shown(self, now: int) -> dict[str, int | float]:
        """As query-blockstats shows it."""
        self._forget(now // self._slice)
        shown: dict[str, int | float] = {"interval_length": self.seconds}
        elapsed = min(self.seconds * _SECOND, now - self.begun)
        for kind in KINDS:
            tally = _Tally()
            for _, tallies in self._slices:
                if kind in tallies:
                    tally.add(tallies[kind])
            shown[f"min_{kind}_latency_ns"] = tally.shortest
            shown[f"max_{kind}_latency_ns"] = tally.longest
            shown[f"avg_{kind}_latency_ns"] = tally.total // tally.count if tally.count else 0
            if kind != "flush":
                shown[f"avg_{kind}_queue_depth"] = tally.total / elapsed if elapsed > 0 else 0
        return shown

    @property
    def _slice(self) -> int:
        return self.seconds * _SECOND // _SLICES

    def _forget(self, number: int) -> None:
        """Drop what is too old when the slice ``number`` is the current one."""
        while self._slices and self._slices[0][0] <= number - _SLICES:
            self._slices.popleft()
