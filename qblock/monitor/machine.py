"""A machine around a block system: its monitor, its sockets, its disks, and a guest on each of them.

What `qblock` runs, and what its replay, demo and pytest fixtures stand on. Models as much of a QEMU process as the block layer's
users see: ``-drive``, ``-blockdev``, ``-qmp``. Differs from QEMU in that the guest is a program of ours that can be told what
to write, and in that a drive is a virtio disk unless its ``if`` says otherwise. Sizes are bytes, times nanoseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import random as random_module
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from qblock.clock import Clock, VirtualTime
from qblock.errors import CommandError
from qblock.guest import Guest, GuestDisk, GuestMismatch, Workload
from qblock.monitor.chardev import ChardevOptions, UnixAddress, parse_short
from qblock.monitor.dialects import Dialect
from qblock.monitor.eventlog import EventLog
from qblock.monitor.events import EVENTS
from qblock.monitor.hub import MonitorHub
from qblock.monitor.lines import DeafSession
from qblock.monitor.reports import Reports
from qblock.monitor.server import MonitorServer
from qblock.options import parse_options
from qblock.policy import OpenPolicy
from qblock.runstate import RunState
from qblock.system import BlockSystem
from qblock.units import SECOND_NS, format_size

if TYPE_CHECKING:
    from qblock.monitor.replay import Execute
    from qblock.monitor.script import GuestIO

DEFAULT_INTERFACE: Final = "virtio"


@attrs.frozen
class MachineOptions:
    """What a machine starts with, as on the command line: values of -drive, -blockdev and -qmp, and a seed for its chances.

    ``paused`` is -S: the guest begins with the command cont. ``dialect`` is what all its monitors speak. ``watch``
    gets the block system before anything is opened in it, to listen to its trace events. ``fatal`` ends the program.
    """

    drives: Sequence[str] = ()
    blockdevs: Sequence[str] = ()
    qmp: Sequence[str | ChardevOptions] = ()
    seed: int | None = None
    paused: bool = False
    dialect: Dialect = Dialect.SYSTEM
    watch: Callable[[BlockSystem], object] | None = None
    fatal: Callable[[str], None] | None = None


def qmp_socket(path: str | Path) -> ChardevOptions:
    """A QMP server on the unix socket at ``path``, whatever characters it has."""
    return ChardevOptions("qmp", UnixAddress(str(path)), server=True, wait=False)


@attrs.define(eq=False)
class Machine:
    """A running machine. Make one with `open`, end it with `close`; all its methods belong to its loop.

    ``virtual_time`` is the loop when its time is moved by hand, None otherwise. ``watching``: events are shown as they come.
    """

    system: BlockSystem
    hub: MonitorHub
    clock: Clock
    random: random_module.Random
    reports: Reports
    virtual_time: VirtualTime | None = None
    watching: bool = False
    started_ns: int = attrs.field(init=False)
    events: EventLog = attrs.field(init=False, factory=EventLog)
    _servers: list[MonitorServer] = attrs.field(init=False, factory=list)
    _guests: dict[str, Guest] = attrs.field(init=False, factory=dict)
    _workloads: dict[str, Workload] = attrs.field(init=False, factory=dict)
    _held: set[asyncio.Task[Any]] = attrs.field(init=False, factory=set)
    _run_state_change: asyncio.Task[None] | None = attrs.field(init=False, default=None)

    @classmethod
    async def open(
        cls,
        options: MachineOptions,
        *,
        clock: Clock,
        virtual_time: VirtualTime | None = None,
        reports: Reports | None = None,
    ) -> Machine:
        """Start a machine; raises `QBlockError` or `OSError` with nothing left open."""
        random = random_module.Random(options.seed)
        reports = reports or Reports()
        system = BlockSystem.create(
            clock=clock, policy=OpenPolicy.follow(), random=random, warn=reports.warn, announce=reports.say,
            fatal=options.fatal,
        )  # fmt: skip
        hub = MonitorHub(system, options.dialect, report=reports.complain, output=reports.say)
        if options.watch is not None:
            options.watch(system)
        system.run.state = RunState.PRELAUNCH if options.paused else RunState.RUNNING
        machine = cls(system, hub, clock, random, reports, virtual_time)
        machine.started_ns = clock.now_ns()
        hub.subscribe(machine.events.record)
        system.run.on_change.append(machine._follow_run_state)
        hub.on_resize.append(machine._tell_guests_their_size)
        hub.before_quit.append(machine._stop_guests)
        hub.make_chardev = partial(MonitorServer, hub, make_session=DeafSession, used=False)
        hub.open()
        try:
            for text in options.blockdevs:
                await machine.add_blockdev(text)
            for text in options.drives:
                await machine.add_drive(text)
            for number, where in enumerate(options.qmp):
                await machine.serve(where, label=f"qmp{number}")
        except BaseException:
            await machine.close()
            raise
        return machine

    async def close(self) -> None:
        """Stop the guests, end the monitors, cancel the jobs, flush and close all images.

        All of it is done also when a step of it fails; `GuestMismatch` when a guest has seen a wrong answer.
        """
        self.system.run.end()
        if self._held:
            await asyncio.wait(self._held)
        async with contextlib.AsyncExitStack() as steps:  # the last one pushed comes first
            steps.push_async_callback(self.system.close)
            steps.push_async_callback(self.hub.close)
            for server in self._servers:
                steps.push_async_callback(server.close)
            if not self.hub.quitting:
                steps.push_async_callback(self.hub.quit)
            for guest in self._guests.values():
                steps.push_async_callback(guest.stop)
            if self._run_state_change is not None:
                await self._run_state_change

    async def add_drive(self, text: str) -> None:
        """As -drive."""
        await self.system.drive_add(text, default_interface=DEFAULT_INTERFACE)

    async def add_blockdev(self, text: str) -> None:
        """As -blockdev: options as ``key=value`` text or as JSON."""
        options, strings = parse_options(text, implied_key="driver")
        node = await self.system.opener.open_blockdev(options, strings=strings)
        node.monitor_owned = True

    async def serve(self, where: str | ChardevOptions, *, label: str) -> None:
        """As -qmp: ``unix:PATH,server=on,wait=off`` and the like; the label is for text only."""
        options = parse_short(where, label) if isinstance(where, str) else where
        await self.attach(MonitorServer(self.hub, options))

    async def attach(self, server: MonitorServer) -> None:
        """Start a server, and close it with the machine."""
        self._servers.append(server)
        await server.start()

    async def settle(self) -> None:
        """On virtual time: wait until everything has happened that takes no time. On real time this returns at once."""
        if self.virtual_time is not None:
            await self.virtual_time.settle()

    def hold(self, request: asyncio.Task[Any]) -> None:
        """Keep a guest's request that waits for the machine to go on; what comes of it nobody asks any more."""
        self._held.add(request)
        request.add_done_callback(self._let_go)

    def _let_go(self, request: asyncio.Task[Any]) -> None:
        self._held.discard(request)
        if not request.cancelled() and request.exception() is not None:
            self.reports.complain(f"a request of the guest has failed: {request.exception()}")

    # ----------------------------------------------------------------------------------------------------------- names

    def device_names(self) -> list[str]:
        """The names of the machine's disks."""
        return [backend.name for backend in self.system.graph.backends if backend.name]

    @property
    def events_known(self) -> frozenset[str]:
        """The QMP events that the machine's monitors may send."""
        return frozenset(name for name, kind in EVENTS.items() if self.hub.dialect.has_event(name, kind.dialects))

    def event_names(self, word: str) -> frozenset[str]:
        """The QMP events that ``word`` means: the one of that name, or all whose name ends in it."""
        upper = word.upper().replace("-", "_")
        return frozenset(name for name in self.events_known if name == upper or name.endswith(f"_{upper}"))

    def event_words(self) -> list[str]:
        """What a person may call events: full names and their last words."""
        return sorted({name.rpartition("_")[2] for name in self.events_known} | self.events_known)

    # ----------------------------------------------------------------------------------------------------------- guest

    def guest(self, device: str) -> Guest:
        """The guest on a disk; raises `DeviceNotFound`, and `CommandError` for a drive that the guest has no device for."""
        disk = self._disk(device)
        guest = self._guests.get(device)
        if guest is None or guest.disk is not disk:
            guest = self._guests[device] = Guest(disk, self.clock, random_module.Random(self.random.getrandbits(64)))
        return guest

    def _disk(self, name: str) -> GuestDisk:
        """The disk of that drive or device. Raises `DeviceNotFound`, and `CommandError` for a drive that no device has."""
        for disk in self.system.devices:
            if name and name in (disk.backend.name, disk.name, disk.id):
                return disk
        drive = self.system.graph.find_backend(name)
        raise CommandError(f"The guest does not see the drive '{drive.name}': no device has it; see device_add")

    def start_guest(self, device: str, *, writes_per_second: int) -> None:
        """Let the guest on a disk work at this pace; raises `CommandError` if it does already."""
        if writes_per_second < 1:
            raise CommandError("the guest's pace is at least one request a second")
        guest = self.guest(device)
        if device in self._workloads:
            raise CommandError(f"the guest is at work on {device} already")
        workload = self._workloads[device] = Workload(interval_ns=max(1, SECOND_NS // writes_per_second))
        if self.system.run.running:
            guest.start(workload)

    async def stop_guest(self, device: str) -> int:
        """Stop the guest on a disk; returns how many bytes it has written. Raises `CommandError` when it was not at work."""
        guest = self.guest(device)
        if self._workloads.pop(device, None) is None:
            raise CommandError(f"the guest does nothing on {device}")
        await guest.stop()
        return guest.counters.bytes_written

    def _follow_run_state(self, running: bool) -> None:
        """A stopped machine's guest does nothing until the machine goes on."""
        change = self._change_run_state(running=running, before=self._run_state_change)
        self._run_state_change = asyncio.get_running_loop().create_task(change, name="guests follow the run state")

    async def _change_run_state(self, *, running: bool, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        for device, workload in list(self._workloads.items()):
            guest = self.guest(device)
            if running and not guest.running:
                guest.start(workload)
            elif not running:
                with contextlib.suppress(GuestMismatch):  # `close` raises it, and `stop_guest`
                    await guest.stop()

    def _tell_guests_their_size(self) -> None:
        for guest in self._guests.values():
            guest.notice_size()

    async def _stop_guests(self) -> None:
        """What jobs leave behind when the machine quits is not to be outdated by a last write."""
        for guest in self._guests.values():
            with contextlib.suppress(GuestMismatch):  # `close` raises it
                await guest.stop()

    def guest_activity(self, device: str) -> str:
        """What the guest does on a disk, in a few words."""
        guest = self._guests.get(device)
        if guest is None:
            return "nothing yet"
        done = guest.counters
        total = f"{done.writes} writes ({format_size(done.bytes_written)}), {done.reads} reads, {done.flushes} flushes"
        failed = f", {done.failed} failed" if done.failed else ""
        state = "at work" if guest.running else "held up" if device in self._workloads else "idle"
        return f"{state}: {total}{failed}"

    async def guest_write(self, device: str, offset: int, length: int, pattern: int) -> None:
        """One write of the byte ``pattern``; offset and length are multiples of 512. Raises `BlockIOError`."""
        await self.guest(device).write(offset, length, pattern)

    async def guest_read(self, device: str, offset: int, length: int) -> bytes:
        """One read; raises `BlockIOError`, or `GuestMismatch` when it is not what the guest has written."""
        return await self.guest(device).read(offset, length)

    async def guest_flush(self, device: str) -> None:
        """One flush; raises `BlockIOError`."""
        await self.guest(device).flush()

    async def perform(self, request: GuestIO, execute: Execute) -> str:
        """A request of a replayed script's guest; see `replay.GuestPort`."""
        del execute  # the guest reaches its disk without the monitor
        match request.verb:
            case "write":
                await self.guest_write(request.device, request.offset, request.length, request.pattern or 0)
            case "flush":
                await self.guest_flush(request.device)
            case "read":
                data = await self.guest_read(request.device, request.offset, request.length)
                wrong = next((i for i, byte in enumerate(data) if byte != request.pattern), None)
                if request.pattern is not None and wrong is not None:
                    raise CommandError(
                        f"the byte at {request.offset + wrong} is {data[wrong]:#04x}, not {request.pattern:#04x}"
                    )
        return "done"
