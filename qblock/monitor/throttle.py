"""Events that would come in floods, held down to one per second.

Models QEMU's monitor event throttling: the first event of a kind goes out at once; of those that follow within the interval
only the last one is kept, and sent when the interval is over. Which events: `LIMITED`. Job and I/O error events are not limited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

if TYPE_CHECKING:
    from qblock.clock import Clock
    from qblock.driver import Json

Deliver: TypeAlias = "Callable[[str, Mapping[str, Json], tuple[int, int]], None]"

INTERVAL_NS: Final = 1_000_000_000
LIMITED: Final[Mapping[str, tuple[str, ...]]] = {
    "QUORUM_REPORT_BAD": ("node-name",),
    "QUORUM_FAILURE": (),
}
"""The limited events, and the members that tell separately limited kinds of one event apart."""


@attrs.define(eq=False)
class EventThrottle:
    """Passes events on to ``deliver``."""

    _clock: Clock
    _deliver: Deliver
    _held: dict[tuple[Json, ...], tuple[str, Mapping[str, Json], tuple[int, int]] | None] = attrs.field(
        factory=dict, init=False
    )
    _timers: set[asyncio.Task[None]] = attrs.field(factory=set, init=False)

    def event(self, name: str, data: Mapping[str, Json], when: tuple[int, int]) -> None:
        """Pass on, or keep until the interval is over."""
        if name not in LIMITED:
            self._deliver(name, data, when)
            return
        key = (name, *(data.get(member) for member in LIMITED[name]))
        if key in self._held:
            self._held[key] = (name, data, when)
            return
        self._deliver(name, data, when)
        self._held[key] = None
        timer = asyncio.create_task(self._pass(key), name=f"event interval of {name}")
        self._timers.add(timer)
        timer.add_done_callback(self._timers.discard)

    async def _pass(self, key: tuple[Json, ...]) -> None:
        while True:
            await self._clock.sleep_ns(INTERVAL_NS)
            held = self._held[key]
            if held is None:
                del self._held[key]
                return
            self._held[key] = None
            self._deliver(*held)

    async def close(self) -> None:
        """Drop what is held."""
        for timer in tuple(self._timers):
            timer.cancel()
        await asyncio.gather(*self._timers, return_exceptions=True)
        self._held.clear()
