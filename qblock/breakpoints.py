"""Breakpoints of ``blkdebug``: requests that are held at a step of the work until somebody lets them go on.

Models the ``break``, ``wait_break``, ``resume`` and ``remove_break`` commands of qemu-io. A breakpoint holds one request and is
gone then; several on one event hold it together, the newest first, until each has been resumed. Differs from QEMU in where a
request stops: steps of a format driver are told while its state changes, which must not be interrupted, so the request stops
before it next reads or writes below.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import attrs


@attrs.define(eq=False)
class _Held:
    """A breakpoint at which a request stands still."""

    tag: str
    tell: Callable[[str], None]
    released: asyncio.Future[None]


class Breakpoints:
    """The breakpoints of one node, and the requests that they hold, which are ``requests`` in number."""

    def __init__(self) -> None:
        self.requests = 0
        self._set: list[tuple[str, str, Callable[[str], None]]] = []
        self._due: dict[asyncio.Task[object] | None, list[tuple[str, Callable[[str], None]]]] = {}
        self._held: list[_Held] = []
        self._arrivals: list[asyncio.Future[None]] = []

    def add(self, event: str, tag: str, tell: Callable[[str], None]) -> None:
        """Hold the next request that comes to ``event``, under the name ``tag``; ``tell`` hears when it stops."""
        self._set.insert(0, (event, tag, tell))

    def remove(self, tag: str) -> bool:
        """Forget the breakpoints called ``tag`` and let their requests go on; False when there was no such breakpoint."""
        found = any(name == tag for _, name, _ in self._set)
        self._set = [one for one in self._set if one[1] != tag]
        while self.resume(tag):
            pass
        return found

    def resume(self, tag: str) -> bool:
        """Let a request go on that is held as ``tag``; False when there is none."""
        for held in self._held:
            if held.tag == tag:
                self._held.remove(held)
                held.tell(f"blkdebug: Resuming request '{tag}'")
                if not held.released.done():
                    held.released.set_result(None)
                return True
        return False

    def holds(self, tag: str) -> bool:
        """Whether a request is held as ``tag``."""
        return any(held.tag == tag for held in self._held)

    @property
    def held(self) -> list[str]:
        """The tags of all requests that are held."""
        return [held.tag for held in self._held]

    def arrival(self) -> asyncio.Future[None]:
        """Done when the next request is held."""
        arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals.append(arrival)
        return arrival

    def come_to(self, event: str) -> None:
        """The task that runs has come to a step of its work; it is to stop at the next `pause`, at all breakpoints there."""
        met = [(tag, tell) for name, tag, tell in self._set if name == event]
        if met:
            self._set = [one for one in self._set if one[0] != event]
            self._due = {task: due for task, due in self._due.items() if task is None or not task.done()}
            self._due.setdefault(asyncio.current_task(), []).extend(met)

    async def pause(self) -> None:
        """Stand still if breakpoints were met, until all of them have been resumed."""
        due = self._due.pop(asyncio.current_task(), None) if self._due else None
        if due is None:
            return
        loop = asyncio.get_running_loop()
        holding = [_Held(tag, tell, loop.create_future()) for tag, tell in due]
        for held in holding:
            held.tell(f"blkdebug: Suspended request '{held.tag}'")
        self._held += holding
        self.requests += 1
        arrivals, self._arrivals = self._arrivals, []
        for arrival in arrivals:
            if not arrival.done():
                arrival.set_result(None)
        try:
            for held in holding:
                await held.released
        finally:
            self.requests -= 1
            self._held = [held for held in self._held if held not in holding]
