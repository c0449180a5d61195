"""Breakpoints of ``blkdebug``: requests that are held at a step of the work until somebody lets them go on.

Models the ``break``, ``wait_break``, ``resume`` and ``remove_break`` commands of qemu-io. A breakpoint holds one request and is
gone then; several on one event hold it together, the newest first, until each has been resumed.

Differs from QEMU in where a request stops: some steps of a format driver are told while its state changes, which must not be
interrupted; the request stops then before it next reads or writes below. It differs also in what ends a hold. In QEMU
everything that waits for a held request hangs, and the monitor with it. Here a drained section lets requests go on and none
is held while it lasts, and neither is that of a command which all later commands wait for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import attrs


@attrs.define(eq=False)
class Caller:
    """Who makes requests: all that begin in the block of `calling`, and in tasks that are started there.

    ``hurry`` is told a tag that holds one of them, if nobody would be there to let it go on: it is resumed at once then.
    ``held`` are the tags that hold some of them now.
    """

    hurry: Callable[[str], None] | None = None
    held: list[str] = attrs.field(factory=list, init=False)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Requests that begin in the block are this caller's, whoever is around it."""
        token = _CALLER.set(self)
        try:
            yield
        finally:
            _CALLER.reset(token)


_CALLER: Final[ContextVar[Caller | None]] = ContextVar("_CALLER", default=None)


@attrs.define(eq=False)
class _Held:
    """A breakpoint at which a request stands still."""

    tag: str
    tell: Callable[[str], None]
    caller: Caller
    released: asyncio.Future[None]


@attrs.frozen
class _Breakpoint:
    """A breakpoint that nothing has come to yet."""

    event: str
    tag: str
    tell: Callable[[str], None]


class Breakpoints:
    """The breakpoints of one node, and the requests that they hold. ``may_hold`` is asked whether one may be held now."""

    def __init__(self, may_hold: Callable[[], bool]) -> None:
        self._may_hold = may_hold
        self._set: list[_Breakpoint] = []
        self._due: dict[asyncio.Task[object] | None, list[_Breakpoint]] = {}
        self._held: list[_Held] = []
        self._listeners: list[asyncio.Future[None]] = []

    def add(self, event: str, tag: str, tell: Callable[[str], None]) -> None:
        """Hold the next request that comes to ``event``, under the name ``tag``; ``tell`` hears when it stops."""
        self._set.insert(0, _Breakpoint(event, tag, tell))

    def remove(self, tag: str) -> bool:
        """Forget the breakpoints called ``tag`` and let their requests go on; False when there was no such breakpoint."""
        found = any(one.tag == tag for one in self._set)
        self._set = [one for one in self._set if one.tag != tag]
        while self.resume(tag):
            pass
        self._tell_news()
        return found

    def clear(self) -> None:
        """Forget all breakpoints and let all requests go on."""
        self._set.clear()
        self._due.clear()
        self.resume_all()
        self._tell_news()

    def resume(self, tag: str) -> bool:
        """Let a request go on that is held as ``tag``; False when there is none."""
        found = next((held for held in self._held if held.tag == tag), None)
        if found is not None:
            self._release(found)
        return found is not None

    def _release(self, held: _Held) -> None:
        self._held.remove(held)
        held.caller.held.remove(held.tag)
        held.tell(f"blkdebug: Resuming request '{held.tag}'")
        if not held.released.done():
            held.released.set_result(None)

    def resume_all(self) -> None:
        """Let all requests go on that are held."""
        for held in self._held.copy():
            self._release(held)

    def is_set(self, tag: str) -> bool:
        """Whether there is a breakpoint called ``tag`` at which no request has stopped yet."""
        due = [one for task, ones in self._due.items() if task is None or not task.done() for one in ones]
        return any(one.tag == tag for one in (*self._set, *due))

    def holds(self, tag: str) -> bool:
        """Whether a request is held as ``tag``."""
        return any(held.tag == tag for held in self._held)

    def listen(self, listener: asyncio.Future[None]) -> None:
        """Set ``listener`` when the next request is held, or when breakpoints are removed."""
        self._listeners = [one for one in self._listeners if not one.done()]
        self._listeners.append(listener)

    def _tell_news(self) -> None:
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            if not listener.done():
                listener.set_result(None)

    def come_to(self, event: str) -> None:
        """The task that runs has come to a step of its work; it is to stop at the next `pause`, at all breakpoints there."""
        met = [one for one in self._set if one.event == event]
        if met and self._may_hold():
            self._set = [one for one in self._set if one.event != event]
            self._due = {task: due for task, due in self._due.items() if task is None or not task.done()}
            self._due.setdefault(asyncio.current_task(), []).extend(met)

    async def pause(self) -> None:
        """Stand still if breakpoints were met, until all of them have been resumed."""
        due = self._due.pop(asyncio.current_task(), None) if self._due else None
        if due is None or not self._may_hold():
            return
        caller = _CALLER.get() or Caller()
        loop = asyncio.get_running_loop()
        holding = [_Held(one.tag, one.tell, caller, loop.create_future()) for one in due]
        for held in holding:
            held.tell(f"blkdebug: Suspended request '{held.tag}'")
            self._held.append(held)
            caller.held.append(held.tag)
        self._tell_news()
        try:
            for held in holding:
                if caller.hurry is not None:
                    caller.hurry(held.tag)
                    self._release(held)
            for held in holding:
                await held.released
        finally:  # cancelled
            for held in holding:
                if held in self._held:
                    self._held.remove(held)
                    caller.held.remove(held.tag)
