"""What all monitors of one program share: the commands, the sessions, and the events for everyone.

Models the monitor core of QEMU with what it knows of the machine around the block layer (name, character
devices). Events that QEMU limits to one per second are limited here.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal, Protocol

import attrs

from qblock.breakpoints import Caller
from qblock.devices.plugging import let_go, take_requests_back
from qblock.monitor.command import CommandTable
from qblock.monitor.commands import table
from qblock.monitor.dialects import Dialect
from qblock.monitor.events import EVENTS
from qblock.monitor.hmp import HmpMonitor
from qblock.monitor.io_shells import IoShells
from qblock.monitor.throttle import EventThrottle
from qblock.monitor.tracing import declare_events, trace_event
from qblock.monitor.turns import Turns
from qblock.runstate import RunState
from qblock.streams import tell

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.monitor.chardev import ChardevOptions
    from qblock.system import BlockSystem, EventListener


@attrs.define
class Actions:
    """What the machine does instead of a reboot (``-no-reboot``), and at its end (``-no-shutdown``)."""

    reboot: Literal["reset", "shutdown"] = "reset"
    shutdown: Literal["poweroff", "pause"] = "poweroff"


class Listener(Protocol):
    """A session that hears of events, and of the end."""

    def event(self, name: str, data: Mapping[str, Json], when: tuple[int, int]) -> None:
        """An event for everyone; ``when`` is wall clock (seconds, microseconds)."""

    def wake(self) -> None:
        """Look again whether the program quits."""


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

    @property
    def options(self) -> ChardevOptions:
        """What it was made of."""

    async def start(self) -> None:
        """Be there, and in `MonitorHub.chardevs`; raises `CommandError`."""

    async def close(self) -> None:
        """Be there no longer."""


ShutdownReason = Literal["host-qmp-quit", "host-signal", "host-qmp-system-reset"]


def _to_stderr(text: str) -> None:
    tell(text.rstrip("\n") + "\n", sys.stderr)


def _to_stdout(text: str) -> None:
    tell(text.rstrip("\n") + "\n", sys.stdout)


@attrs.define(eq=False)
class MonitorHub:
    """The monitor side of a running program.

    ``name`` is the machine's name if it has one, ``package`` names the program in the greeting. ``report`` tells the person at
    the console what went wrong, ``output`` is the program's standard output (HMP's qemu-io prints there). ``on_resize`` are
    told when a disk may have got another size, ``before_quit`` are awaited before the jobs are cancelled. ``migration_switches``
    are the migration capabilities that were switched on, ``migration_parameters`` what was set besides. ``make_chardev`` makes
    character devices for commands that plug them in, which are ``plugged`` then. Call `open` before use and `close` at the end.
    """

    system: BlockSystem
    dialect: Dialect = Dialect.SYSTEM
    name: str | None = None
    report: Callable[[str], None] = _to_stderr
    output: Callable[[str], None] = _to_stdout
    package: str = "qblock"
    actions: Actions = attrs.field(factory=Actions)
    migration_switches: set[str] = attrs.field(factory=set)
    migration_parameters: dict[str, Json] = attrs.field(factory=dict)
    on_resize: list[Callable[[], None]] = attrs.field(factory=list, init=False, repr=False)
    before_quit: list[Callable[[], Awaitable[None]]] = attrs.field(factory=list, init=False, repr=False)
    turns: Turns = attrs.field(factory=Turns, init=False, repr=False)
    commands: CommandTable = attrs.field(init=False, repr=False)
    hmp: HmpMonitor = attrs.field(init=False, repr=False)
    io: IoShells = attrs.field(init=False, repr=False)
    sessions: list[Listener] = attrs.field(factory=list, init=False)
    chardevs: list[Chardev] = attrs.field(factory=list, init=False)
    make_chardev: Callable[[ChardevOptions], Chardev] | None = attrs.field(default=None, init=False, repr=False)
    plugged: list[Chardev] = attrs.field(factory=list, init=False)
    quitting: bool = attrs.field(default=False, init=False)
    _quit: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    _throttle: EventThrottle = attrs.field(init=False, repr=False)
    _unsubscribe: Callable[[], None] | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self.commands = table(self.dialect)
        self.hmp = HmpMonitor(self.commands)
        self.io = IoShells(self.system, self.output)
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
        for device in self.plugged:
            await device.close()

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

    # --------------------------------------------------------------------------------------------------------- commands

    @asynccontextmanager
    async def executing(self, *, alone: bool = False) -> AsyncIterator[None]:
        """Around the execution of a command; ``alone``: no other command runs meanwhile.

        No breakpoint holds the requests of the command itself, for which its monitor would wait.
        """
        async with self.turns.taken(alone=alone):
            with Caller(hurry=self._hurry).calling():
                yield

    def _hurry(self, tag: str) -> None:
        self.report(f"'{tag}' holds a request of a monitor command, which is resumed")

    # ------------------------------------------------------------------------------------------------------------- quit

    async def reset(self) -> None:
        """Reset the machine; or end it, or stop it, as `actions` says of a reboot. The events precede the reply."""
        reason = {"guest": False, "reason": "host-qmp-system-reset"}
        if self.actions.reboot == "reset":
            self.system.run.reset()
            await take_requests_back(self.system)
            self.system.emit("RESET", reason)
            await let_go(self.system, idle=True)
            return
        self.system.emit("SHUTDOWN", reason)
        if self.actions.shutdown == "pause":
            self.system.run.stop(RunState.SHUTDOWN)
        else:
            self.system.later(self._end(), "the machine ends instead of a reset")

    async def quit(self, reason: ShutdownReason = "host-qmp-quit") -> None:
        """Stop the guest, cancel all jobs, then let `wait_quit` return; the events of the jobs precede the reply."""
        if self.dialect is not Dialect.STORAGE_DAEMON:
            self.system.emit("SHUTDOWN", {"guest": False, "reason": reason})
        await self._end()

    async def _end(self) -> None:
        self.system.run.end()
        self.system.forget_breakpoints()
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
