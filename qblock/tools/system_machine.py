"""Carrying out a command line of ``qblock-system``: the machine in its order of making, its monitors, its end.

Models the order of qemu-system-x86_64 7.2: objects, character devices, nodes, drives, the board with what goes on it,
devices in the order given (a drive with ``if=virtio`` is one of them), the guest begins, unless ``-S`` holds it; monitors.
"""

from __future__ import annotations

import asyncio
import fcntl
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import attrs

from qblock.clock import Clock, LoopClock, RealClock, VirtualTime
from qblock.devices.board import Board, connect_flash
from qblock.devices.drives import parse_drive
from qblock.devices.plugging import plug, read_request
from qblock.errors import CommandError, InvalidParameter
from qblock.jobs.machine_snapshots import load_all
from qblock.monitor.chardev import ChardevOptions, PlainAddress, chardev_from, parse_short
from qblock.monitor.lines import DeafSession, HumanSession, QtestSession
from qblock.monitor.machine import Machine, MachineOptions
from qblock.monitor.repl_commands import install
from qblock.monitor.reports import Report, Reports
from qblock.monitor.server import MonitorServer
from qblock.monitor.session import MonitorSession
from qblock.options import parse_options, parse_opts, split_keyval, split_opts
from qblock.streams import tell
from qblock.tools.background import Ready, remove_file, write_pid
from qblock.tools.console import end_program
from qblock.tools.machine_run import first_of
from qblock.tools.system_options import DISKS, About, Given
from qblock.tools.system_plan import Plan

if TYPE_CHECKING:
    from qblock.monitor.server import Session
    from qblock.tools.tracing import Tracer

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


async def serve(plan: Plan, tracer: Tracer, ready: Ready) -> None:
    """Make the machine, call ``ready``, and serve its monitors until it is told to quit; raises `QBlockError`."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in _SIGNALS:
        loop.add_signal_handler(number, told.set)
    virtual = loop if isinstance(loop, VirtualTime) else None
    clock: Clock = LoopClock() if virtual is not None else RealClock()
    seed = plan.last("seed")
    options = MachineOptions(
        seed=None if seed is None else _seed(seed),
        paused=True,
        watch=lambda system: tracer.attach(system.env.trace, system.env.clock),
        fatal=end_program,
    )
    reports = Reports(partial(_print, talks_on_stdio=_talks_on_stdio(plan)))
    machine = await Machine.open(options, clock=clock, virtual_time=virtual, reports=reports)
    pidfile = plan.last("pidfile")
    try:
        if pidfile is not None:
            write_pid(pidfile)
        if await first_of(_Setup(machine, plan).carry_out(), told) is None:
            return
        ready()
        if await first_of(_until_quit(machine), told) is None:
            await machine.hub.quit("host-signal")
    finally:
        await machine.close()
        if pidfile is not None:
            remove_file(pidfile)
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def _until_quit(machine: Machine) -> bool:
    await machine.hub.wait_quit()
    return True


def _seed(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise CommandError(f"-seed {text}: this is no number") from None


def _talks_on_stdio(plan: Plan) -> bool:
    """Whether a QMP monitor has standard output for itself."""
    return "stdio" in plan.values("qmp") + plan.values("qmp-pretty") or any(
        text.startswith("stdio") for text in plan.values("chardev")
    )


def _print(report: Report, *, talks_on_stdio: bool) -> None:
    aside = report.is_complaint or talks_on_stdio
    tell(report.text, sys.stderr if aside else sys.stdout)


@attrs.define(eq=False)
class _Chardev:
    """A character device that the command line names; ``user`` makes its sessions, None while nobody is attached."""

    options: ChardevOptions
    user: Callable[..., Session] | None = None


@attrs.define(eq=False)
class _Setup:
    """Makes the machine of a plan."""

    machine: Machine
    plan: Plan
    chardevs: dict[str, _Chardev] = attrs.field(factory=dict)
    _virtio: list[str] = attrs.field(factory=list)
    _monitors: set[str] = attrs.field(factory=set)

    async def carry_out(self) -> bool:
        """Do all of it; True at the end. Errors begin with the option that they are about."""
        system, hub = self.machine.system, self.machine.hub
        system.objects.takes_idle = True
        system.board = Board(self.plan.board, self.plan.identity)
        install(self.machine)
        self._prepare()
        await self._each("object", self._object)
        await self._each("blockdev", lambda option: self.machine.add_blockdev(option.value))
        await self._drives()
        system.board.build(system, self.plan.fittings)
        for number, node in sorted(self.plan.flash.items()):
            connect_flash(system, number, node)
        if self.plan.usb:
            self._plug_usb()
        await self._devices()
        system.board.started = True
        for option in self.plan.given:
            with About(option):
                self._attach(option)
        self._attach_defaults()
        await self._each("loadvm", lambda option: load_all(system, option.value))
        if not self.plan.has("S"):
            system.run.resume()
        for chardev in self.chardevs.values():
            await self._start(chardev)
        hub.name = self._name()
        return True

    async def _each(self, name: str, act: Callable[[Given], Any]) -> None:
        for option in self.plan.given:
            if option.name == name:
                with About(option):
                    await act(option)

    def _prepare(self) -> None:
        """What needs no order: actions, defaults of -global, character devices, descriptors."""
        for option in self.plan.given:
            with About(option):
                match option.name:
                    case "no-reboot":
                        self.machine.hub.actions.reboot = "shutdown"
                    case "no-shutdown":
                        self.machine.hub.actions.shutdown = "pause"
                    case "action":
                        self._action(option.members())
                    case "global":
                        self.machine.system.board.defaults.append(_global(option.value))
                    case "add-fd":
                        self._add_fd(option.members())
                    case "chardev":
                        self._chardev(chardev_from(option.members()))

    def _action(self, members: Mapping[str, str]) -> None:
        actions = self.machine.hub.actions
        for key, value in members.items():
            match key, value:
                case "reboot", "reset" | "shutdown":
                    actions.reboot = value
                case "shutdown", "poweroff" | "pause":
                    actions.shutdown = value
                case "panic", "pause" | "shutdown" | "exit-failure" | "none":
                    pass  # no guest panics
                case "watchdog", "reset" | "shutdown" | "poweroff" | "inject-nmi" | "pause" | "debug" | "none":
                    pass  # nor is there one that could bite
                case _:
                    raise InvalidParameter(key, f"does not take '{value}'; see -help")

    def _add_fd(self, members: Mapping[str, str]) -> None:
        """A descriptor that the program was started with, for a set; ours is a duplicate."""
        if members.keys() - {"opaque"} != {"fd", "set"}:
            raise CommandError("it takes fd=FD,set=SET[,opaque=TEXT]")
        numbers = [str(members[key]) for key in ("fd", "set")]
        if not all(number.isascii() and number.isdigit() for number in numbers):
            raise CommandError("fd and set are numbers")
        fd, number = map(int, numbers)
        if fd <= 2:
            raise CommandError("the standard streams are the program's own")
        try:
            duplicate = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError as error:
            raise CommandError(f"the program was started without a descriptor {fd}: {error.strerror}") from None
        opaque = members.get("opaque")
        self.machine.system.env.fdsets.add(duplicate, number, None if opaque is None else str(opaque))

    def _name(self) -> str | None:
        """What the last -name that gives one says."""
        given = [option.members() for option in self.plan.given if option.name == "name"]
        names = [members["guest"] for members in given if "guest" in members]
        return names[-1] or None if names else None

    async def _object(self, option: Given) -> None:
        options, strings = parse_options(option.value, implied_key="qom-type")
        await self.machine.system.add_object(options, strings=strings)

    # -------------------------------------------------------------------------------------------------------------- drives

    async def _drives(self) -> None:
        for option in self.plan.given:
            if option.name == "drive":
                with About(option):
                    await self._drive(split_opts(option.value))
            elif option.name in DISKS:
                with About(option):
                    await self._drive({"file": option.value, **DISKS[option.name]})
        for kind in self.plan.default_drives:
            await self._default_drive(kind)

    async def _drive(self, members: Mapping[str, Any]) -> None:
        """One drive; a virtio disk for it is made when the devices' turn comes."""
        if self.plan.has("snapshot"):
            members = {"snapshot": "on", **members}
        interface = self.plan.board.default_interface
        parsed = parse_drive(members, default_interface=interface)
        backend = await self.machine.system.drive_add(members, default_interface=interface, connect=False)
        if parsed.interface == "virtio":
            self._virtio.append(backend.name)

    async def _default_drive(self, kind: str) -> None:
        """An empty drive that there is without anybody asking, unless its place is taken."""
        system = self.machine.system
        members: dict[str, str] = {
            "cdrom": {"if": "ide", "index": "2", "media": "cdrom"},
            "floppy": {"if": "floppy", "index": "0"},
            "sdcard": {"if": "none", "id": "sd0"},
        }[kind]
        if kind == "sdcard" or divmod(int(members["index"]), self._units(members["if"])) not in system.board.taken(
            members["if"]
        ):
            await system.drive_add(members, connect=False)

    def _units(self, interface: str) -> int:
        return self.plan.board.interface(interface).units

    # ------------------------------------------------------------------------------------------------------------- devices

    def _plug_usb(self) -> None:
        request = read_request({"driver": "piix3-usb-uhci"}, strings=True)
        plug(self.machine.system, request, hot=False, path="/machine/unattached/usb")

    async def _devices(self) -> None:
        """Devices and the virtio disks of drives, in the order of the command line."""
        virtio = iter(self._virtio)
        for option in self.plan.given:
            with About(option):
                if option.name == "device":
                    self._device(*parse_opts(option.value, implied_key="driver"))
                elif option.name == "drive" and self._is_virtio(option):
                    self._device({"driver": "virtio-blk-pci", "drive": next(virtio)}, strings=True)

    def _is_virtio(self, option: Given) -> bool:
        return split_opts(option.value).get("if") == "virtio"

    def _device(self, options: Mapping[str, Any], strings: bool) -> None:
        system = self.machine.system
        plug(system, read_request(options, strings=strings, defaults=system.board.defaults), hot=False)

    # ------------------------------------------------------------------------------------------------------------ monitors

    def _chardev(self, options: ChardevOptions) -> _Chardev:
        if options.label in self.chardevs:
            raise CommandError(f"there are two character devices called '{options.label}'")
        made = self.chardevs[options.label] = _Chardev(options)
        return made

    def _short(self, text: str, kind: str) -> _Chardev:
        """The character device of an option that describes it itself."""
        number = sum(label.startswith(kind) for label in self.chardevs)
        return self._chardev(parse_short(text, f"{kind}{number}"))

    def _attach(self, option: Given) -> None:
        """Monitors and other users of character devices."""
        match option.name:
            case "mon":
                self._mon(option.members())
            case "qmp":
                self._short(option.value, "compat_monitor").user = MonitorSession
            case "qmp-pretty":
                self._short(option.value, "compat_monitor").user = partial(MonitorSession, pretty=True)
            case "monitor" if option.value != "none":
                self._human(self._short(option.value, "compat_monitor"))
            case "qtest" if option.value != "none":
                user = partial(QtestSession, time=self.machine.virtual_time)
                self._short(option.value, "qtest").user = user
            case "serial" | "parallel" if option.value != "none":
                self._port(option.name, option.value)

    def _port(self, kind: str, text: str) -> None:
        """A serial or parallel port: nobody is there, but for the monitor that may share it."""
        label, found, _ = text.partition(":")
        if text in self.chardevs or (label == "chardev" and found):
            self._claim(text.removeprefix("chardev:")).user = DeafSession
        elif label == "mon" and found:
            self._human(self._short(text.removeprefix("mon:"), kind))
        else:
            self._short(text, kind).user = DeafSession

    def _claim(self, label: str) -> _Chardev:
        """The character device of that name, which nobody may use yet."""
        chardev = self.chardevs.get(label)
        if chardev is None:
            raise CommandError(f"there is no character device '{label}'; give its -chardev, too")
        if chardev.user is not None:
            raise CommandError(f"the character device '{label}' is in use already")
        return chardev

    def _mon(self, members: Mapping[str, str]) -> None:
        given = dict(members)
        chardev = self._claim(str(given.pop("chardev", "")))
        if (name := given.pop("id", None)) is not None:
            if name in self._monitors:
                raise CommandError(f"there are two monitors called '{name}'")
            self._monitors.add(name)
        mode, pretty = given.pop("mode", "readline"), given.pop("pretty", "off")
        if mode not in ("readline", "control"):
            raise InvalidParameter("mode", f"takes readline or control, not '{mode}'")
        if mode == "control":
            chardev.user = partial(MonitorSession, pretty=pretty == "on")
        elif pretty == "on":
            raise InvalidParameter("pretty", "is for mode=control")
        else:
            self._human(chardev)

    def _human(self, chardev: _Chardev) -> None:
        shown_already = chardev.options.address is None and sys.stdin.isatty()
        chardev.user = partial(HumanSession, echo=not shown_already)

    def _attach_defaults(self) -> None:
        """What is there without anybody asking: ports, and a monitor on the display, where nobody is."""
        plan = self.plan
        if plan.has("nodefaults") or not plan.board.has_defaults:
            return
        if plan.has("nographic"):
            if not plan.has("serial") and not plan.has("monitor"):
                self._human(self._short("stdio", "serial"))
        elif not any(plan.has(name) for name in ("monitor", "qmp", "qmp-pretty", "mon")):
            self._short("vc", "compat_monitor").user = DeafSession
        for kind in ("serial", "parallel"):
            if not plan.has(kind) and f"{kind}0" not in self.chardevs:
                self._short("null" if plan.has("nographic") else "vc", kind).user = DeafSession

    async def _start(self, chardev: _Chardev) -> None:
        address = chardev.options.address
        server = MonitorServer(
            self.machine.hub, chardev.options, chardev.user or DeafSession, used=chardev.user is not None
        )
        if isinstance(address, PlainAddress) and address.kind != "pty":
            self.machine.hub.chardevs.insert(0, server)
            return
        await self.machine.attach(server)


def _global(text: str) -> tuple[str, str, str]:
    """``DRIVER.PROPERTY=VALUE`` or ``driver=D,property=P,value=V``."""
    members = split_keyval(text, implied_key="driver") if text.startswith("driver=") else {}
    if members.keys() == {"driver", "property", "value"}:
        return str(members["driver"]), str(members["property"]), str(members["value"])
    name, equals, value = text.partition("=")
    driver, dot, prop = name.partition(".")
    if not (equals and dot and driver and prop):
        raise CommandError("it takes DRIVER.PROPERTY=VALUE")
    return driver, prop, value
