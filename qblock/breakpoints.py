"""Breakpoints of ``blkdebug``: requests that are held at a step of the work until somebody lets them go on.

Models the ``break``, ``wait_break``, ``resume`` and ``remove_break`` commands of qemu-io. A breakpoint holds one request and is
gone then; of several on one event the newest holds first. Differs from QEMU in where a request stops: steps of a format driver
are told while its state changes, which must not be interrupted, so the request stops before it next reads or writes below.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import attrs


@attrs.define(eq=False)
class _Held:
    """A request that stands still."""

    tag: str
    released: asyncio.Future[None]


class Breakpoints:
    """The breakpoints of one node, and the requests that they hold."""

    def __init__(self) -> None:
        self._set: list[tuple[str, str, Callable[[str], None]]] = []
        self._due: dict[asyncio.Task[object] | None, tuple[str, Callable[[str], None]]] = {}
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
        """The task that runs has come to a step of its work; it is to stop at the next `pause`."""
        for one in self._set:
            if one[0] == event:
                self._set.remove(one)
                self._due[asyncio.current_task()] = one[1:]
                return

    async def pause(self) -> None:
        """Stand still if a breakpoint was met."""
        due = self._due.pop(asyncio.current_task(), None) if self._due else None
        if due is None:
            return
        tag, tell = due
        held = _Held(tag, asyncio.get_running_loop().create_future())
        self._held.append(held)
        tell(f"blkdebug: Suspended request '{tag}'")
        arrivals, self._arrivals = self._arrivals, []
        for arrival in arrivals:
            if not arrival.done():
                arrival.set_result(None)
        try:
            await held.released
        finally:
            if held in self._held:
                self._held.remove(held)
        tell(f"blkdebug: Resuming request '{tag}'")
