"""How long a disk takes: seeks, latency, bandwidth, a queue, and flushes that cost.

A model for comparing strategies, not for predicting a product: up to ``depth`` requests are worked on at once, each waits
its latency (and a seek, when it does not begin where the one before ended), then all share one channel to move their bytes.
A flush waits for everything before it and holds up everything after it. Times are virtual nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from qblock.clock import Clock
from qblock.lab.compare.load import Pace
from qblock.units import MILLISECOND_NS, SECOND_NS, MiB

MICROSECOND_NS: Final = 1000


@attrs.frozen(kw_only=True)
class DiskModel:
    """A kind of disk. Times in nanoseconds; ``bandwidth`` in bytes per second.

    ``flush_ns`` is what a flush takes when something was written since the last one. ``pace`` is the load of a guest that
    such a disk can carry beside a copy, ``size`` the bytes of a virtual disk that fits.
    """

    name: str
    summary: str
    depth: int
    latency_ns: int
    seek_ns: int
    bandwidth: int
    flush_ns: int
    pace: Pace
    size: int


class Disk:
    """One disk at work. Requests are served in the order in which they come."""

    def __init__(self, model: DiskModel, clock: Clock) -> None:
        self.model = model
        self._clock = clock
        self._free_ns = [0] * model.depth
        self._channel_free_ns = 0
        self._head: tuple[str, int] | None = None
        self._unflushed = False

    def end_of_transfer(self, file: str, offset: int, length: int) -> int:
        """Take in a request for ``length`` bytes of ``file``; returns when it will be done."""
        model, now = self.model, self._clock.now_ns()
        slot = min(range(model.depth), key=self._free_ns.__getitem__)
        seek = 0 if self._head == (file, offset) else model.seek_ns
        self._head = (file, offset + length)
        ready = max(now, self._free_ns[slot]) + model.latency_ns + seek
        end = max(ready, self._channel_free_ns) + length * SECOND_NS // model.bandwidth
        self._free_ns[slot] = self._channel_free_ns = end
        return end

    def end_of_flush(self) -> int:
        """Take in a flush; returns when it will be done."""
        started = max(self._clock.now_ns(), *self._free_ns)
        end = started + (self.model.flush_ns if self._unflushed else self.model.latency_ns)
        self._free_ns = [end] * self.model.depth
        self._channel_free_ns = end
        self._unflushed = False
        return end

    async def read(self, file: str, offset: int, length: int) -> None:
        """Take as long as a read does."""
        await self._until(self.end_of_transfer(file, offset, length))

    async def write(self, file: str, offset: int, length: int) -> None:
        """Take as long as a write does; a change of the file's metadata is a write of length 0."""
        end = self.end_of_transfer(file, offset, length)
        self._unflushed = True
        await self._until(end)

    async def flush(self) -> None:
        """Take as long as a flush does."""
        await self._until(self.end_of_flush())

    async def _until(self, end_ns: int) -> None:
        if (rest := end_ns - self._clock.now_ns()) > 0:
            await self._clock.sleep_ns(rest)


_SSD: Final = DiskModel(
    name="ssd",
    summary="4 requests at a time, 150 us each, 40 MiB/s, 3 ms a flush: a small share of a storage box",
    depth=4,
    latency_ns=150 * MICROSECOND_NS,
    seek_ns=0,
    bandwidth=40 * MiB,
    flush_ns=3 * MILLISECOND_NS,
    pace=Pace(
        reads_per_second=500,
        burst_every_ns=300 * MILLISECOND_NS,
        burst_lasts_ns=80 * MILLISECOND_NS,
        flushes=4,
        writes_per_flush=8,
        phase_ns=1200 * MILLISECOND_NS,
    ),
    size=32 * MiB,
)
_HDD: Final = DiskModel(
    name="hdd",
    summary="one request at a time, 8 ms to seek, 90 MiB/s, 8 ms a flush: a disk of 2012",
    depth=1,
    latency_ns=100 * MICROSECOND_NS,
    seek_ns=8 * MILLISECOND_NS,
    bandwidth=90 * MiB,
    flush_ns=8 * MILLISECOND_NS,
    pace=Pace(
        reads_per_second=20,
        burst_every_ns=2 * SECOND_NS,
        burst_lasts_ns=300 * MILLISECOND_NS,
        flushes=2,
        writes_per_flush=4,
        phase_ns=6 * SECOND_NS,
    ),
    size=64 * MiB,
)
DISKS: Final[Mapping[str, DiskModel]] = {model.name: model for model in (_SSD, _HDD)}
"""The kinds of disks that ``--disk`` knows; the first is the default."""
