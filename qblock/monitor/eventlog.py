"""The events of a machine, remembered until somebody has taken note of them.

A person (or a script) says ``run until READY`` after the job was started, and the event may have come in between. So
events are kept, the last `KEPT` of them, and each is taken at most once. QEMU keeps none: who was not connected has
missed them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from qblock.driver import Json

KEPT: Final = 1000


@attrs.frozen
class MachineEvent:
    """One QMP event; ``when`` is wall clock (seconds, microseconds) on the machine's clock."""

    name: str
    data: Mapping[str, Json]
    when: tuple[int, int]

    @property
    def subject(self) -> str:
        """Whom it is about: the id of a job, or the name of a device or node; empty if nobody."""
        return str(self.data.get("device") or self.data.get("id") or self.data.get("node-name") or "")

    def describe(self) -> str:
        """One line: the name, whom it is about, and the members that matter to people."""
        about = f" {self.subject}" if self.subject else ""
        details = [str(self.data["status"])] if "status" in self.data else []
        if "error" in self.data:
            details.append(f"error: {self.data['error']}")
        return f"{self.name}{about}{': ' if details else ''}{', '.join(details)}"


Fits = Callable[[MachineEvent], bool]


@attrs.define(eq=False)
class EventLog:
    """Subscribe `record` to an event bus. ``listener`` sees each event as it comes."""

    listener: Callable[[MachineEvent], None] | None = None
    _events: deque[MachineEvent] = attrs.field(init=False, factory=lambda: deque(maxlen=KEPT))
    _news: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)

    def record(self, name: str, data: Mapping[str, Json], when: tuple[int, int]) -> None:
        """An event has happened."""
        event = MachineEvent(name, data, when)
        self._events.append(event)
        self._news.set()
        if self.listener is not None:
            self.listener(event)

    def take(self, fits: Fits) -> MachineEvent | None:
        """The oldest event kept that fits; it and those before it are not kept any longer. None: there is none."""
        for index, event in enumerate(self._events):
            if fits(event):
                for _ in range(index + 1):
                    self._events.popleft()
                return event
        return None

    async def wait(self, fits: Fits) -> MachineEvent:
        """The first event that fits, of those kept and those to come; it is taken as `take` does."""
        while (event := self.take(fits)) is None:
            self._news.clear()
            await self._news.wait()
        return event
