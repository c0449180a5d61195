"""What all monitors of one program share: the commands, the sessions, and the events for everyone.

Models the monitor core of QEMU with what it knows of the machine around the block layer (name, character
devices). Events that QEMU limits to one per second are limited here.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import attrs

from qblock.monitor.command import CommandTable
from qblock.monitor.commands import table
from qblock.monitor.dialects import Dialect
from qblock.monitor.events import EVENTS
from qblock.monitor.hmp import HmpMonitor
from qblock.monitor.throttle import EventThrottle
from qblock.monitor.tracing import declare_events, trace_event
from qblock.monitor.turns import Turns

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.monitor.session import MonitorSession
    from qblock.system import BlockSystem, EventListener


class Chardev(Protocol):
    """A character device as query-chardev shows it."""

    @property
    def label(self) -> str:
        """Its id."""

    @property
    def filename(self) -> str:
        """Where it leads, in QEMU's notation."""

    @property
    def frontend_open(self) -> bool:
        """True while a monitor uses it."""


def _to_stderr(text: str) -> None:
    print(text.rstrip("\n"), file=sys.stderr)  # noqa: T201 - the default for programs


def _to_stdout(text: str) -> None:
    print(text.rstrip("\n"), flush=True)  # noqa: T201 - the default for programs


@attrs.define(eq=False)
class MonitorHub:
    """The monitor side of a running program.

    ``name`` is the machine's name if it has one, ``package`` names the program in the greeting. ``report`` tells the person at
    the console what went wrong, ``output`` is the program's standard output (HMP's qemu-io prints there). ``on_resize`` are
    told when a disk may have got another size, ``before_quit`` are awaited before the jobs are cancelled. Call `open` before
    use and `close` at the end.
    """

    system: BlockSystem
    dialect: Dialect = Dialect.SYSTEM
    name: str | None = None
    report: Callable[[str], None] = _to_stderr
    output: Callable[[str], None] = _to_stdout
    package: str = "qblock"
    on_resize: list[Callable[[], None]] = attrs.field(factory=list, init=False, repr=False)
    before_quit: list[Callable[[], Awaitable[None]]] = attrs.field(factory=list, init=False, repr=False)
    turns: Turns = attrs.field(factory=Turns, init=False, repr=False)
    commands: CommandTable = attrs.field(init=False, repr=False)
    hmp: HmpMonitor = attrs.field(init=False, repr=False)
    sessions: list[MonitorSession] = attrs.field(factory=list, init=False)
    chardevs: list[Chardev] = attrs.field(factory=list, init=False)
    quitting: bool = attrs.field(default=False, init=False)
    _quit: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    _throttle: EventThrottle = attrs.field(init=False, repr=False)
    _unsubscribe: Callable[[], None] | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.commands = table(self.dialect)
        self.hmp = HmpMonitor(self.commands)
        declare_events(self.system.env.trace, self.commands, EVENTS)
        self._throttle = EventThrottle(self.system.env.clock, self._tell)

    def open(self) -> None:
        """Begin to pass events on."""
        self._unsubscribe = self.subscribe(self._event)

    async def close(self) -> None:
        """Let go of the system; sessions are ended by their servers."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        await self._throttle.close()

    def subscribe(self, listener: EventListener) -> Callable[[], None]:
        """Call ``listener`` for every event as the dialect shows it; call the result to end that."""

        def pass_on(name: str, data: Mapping[str, Json], when: tuple[int, int]) -> None:
            shown = self.dialect.event_data(name, data)
            if shown is not None:
                listener(name, shown, when)

        return self.system.events.subscribe(pass_on)

    def _event(self, name: str, data: Mapping[str, Json], when: tuple[int, int]) -> None:
        trace_event(self.system.env.trace, name, data)
        self._throttle.event(name, data, when)

    def _tell(self, name: str, data: Mapping[str, Json], when: tuple[int, int]) -> None:
        for session in tuple(self.sessions):
            session.event(name, data, when)

    # ------------------------------------------------------------------------------------------------------------- quit

    async def quit(self) -> None:
        """Stop the guest, cancel all jobs, then let `wait_quit` return; the events of the jobs precede the reply."""
        if self.dialect is not Dialect.STORAGE_DAEMON:
            self.system.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        for step in self.before_quit:
            await step()
        await self.system.jobs.cancel_all()
        self.quitting = True
        self._quit.set()
        for session in self.sessions:
            session.wake()

    async def wait_quit(self) -> None:
        """Return when somebody told the program to quit."""
        await self._quit.wait()
