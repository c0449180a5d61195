"""The devices of one machine: which bus each is on, under which path it is known, coming and going.

Models QEMU's qdev tree (semantics.md section 18): a device without ``bus=`` goes on the first fitting bus, the newest first;
paths are ``/machine/peripheral/ID``, ``/machine/peripheral-anon/device[N]`` and, for what the board brings,
``/machine/unattached/device[N]``. SCSI and USB devices go at once; PCI devices when the guest lets them, which our guest does as
soon as it runs, or when the machine is reset. Differs from QEMU in that only what concerns disks has any effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import attrs

from qblock.devices.device import GuestDevice
from qblock.devices.models import BACKEND, BUS_KINDS, BusSpec, DeviceModel
from qblock.errors import CommandError, DeviceNotFound, DuplicateName

if TYPE_CHECKING:
    from qblock.devices.properties import Value
    from qblock.driver import Json
    from qblock.iothreads import IOThread

PERIPHERAL: Final = "/machine/peripheral"
ANONYMOUS: Final = "/machine/peripheral-anon"
UNATTACHED: Final = "/machine/unattached"


@attrs.define(eq=False)
class Bus:
    """A bus with what is on it.

    ``units`` is how many devices there is room for, ``luns`` how many logical units a target can have; ``owner`` is None for the
    board's own, whose ``path`` the board knows.
    ``reserved`` are the places that the board's devices have taken, and whether others may share their slots.
    """

    name: str
    kind: str
    owner: Device | None
    units: int | None
    hotplug: bool
    path: str
    luns: int = 1
    reserved: Mapping[tuple[int, ...], bool] = attrs.field(factory=dict)
    children: list[Device] = attrs.field(factory=list, init=False)

    def __repr__(self) -> str:
        return f"<Bus {self.name!r} {self.kind} with {len(self.children)} devices>"


@attrs.define(eq=False)
class Device:
    """A device of any kind.

    ``values`` are the properties given; ``address`` its place on its bus, as the bus counts; ``iothread`` the I/O thread that its
    property of that name means. ``hotplugged``: it came while the machine was on.
    """

    id: str
    model: DeviceModel
    path: str
    bus: Bus | None
    values: Mapping[str, Value]
    address: tuple[int, ...] = ()
    iothread: IOThread | None = None
    hotplugged: bool = False
    buses: list[Bus] = attrs.field(factory=list, init=False)
    disk: GuestDevice | None = attrs.field(default=None, init=False)
    leaving: bool = attrs.field(default=False, init=False)

    @property
    def inner_path(self) -> str | None:
        """The path of the part that has the disk, when that is not the device itself."""
        if not self.model.inner:
            return None
        return f"{self.path}/{self.model.inner.format(bus=self.buses[0].name if self.buses else '')}"

    @property
    def inner_kind(self) -> str:
        """The type of that part of a virtio device."""
        return f"{self.model.name.partition('-pci')[0]}-device"

    @property
    def disk_name(self) -> str:
        """What query-block shows as ``qdev``."""
        return self.inner_path or self.id or self.path

    def __repr__(self) -> str:
        return f"<Device {self.path} {self.model.name}>"


@attrs.define(eq=False)
class DeviceTree:
    """All devices of one machine. Iterating gives the disks. ``processors`` is how many it has, as far as devices are told."""

    _emit: Callable[[str, Mapping[str, Json]], None]
    devices: list[Device] = attrs.field(factory=list, init=False)
    roots: list[Bus] = attrs.field(factory=list, init=False)
    processors: int = attrs.field(default=1, init=False)
    _numbers: dict[str, int] = attrs.field(factory=dict, init=False)

    def __iter__(self) -> Iterator[GuestDevice]:
        return (device.disk for device in self.devices if device.disk is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def leaving(self) -> list[Device]:
        """The devices that were told to leave and are there still."""
        return [device for device in self.devices if device.leaving]

    def reset(self) -> None:
        """The machine is reset: what the guest has set of the devices is forgotten."""
        for disk in self:
            disk.reset()

    def state(self) -> dict[str, Json]:
        """What a snapshot of the machine keeps of the devices, by id or path."""
        return {disk.name: state for disk in self if (state := disk.state())}

    def restore(self, states: Json) -> None:
        """Let the devices be again as when `state` was asked; those that were not there then stay as they are."""
        for disk in self:
            state = states.get(disk.name) if isinstance(states, dict) else None
            if isinstance(state, dict):
                disk.restore(state)

    # --------------------------------------------------------------------------------------------------------------- looking

    def find(self, name: str) -> Device:
        """The device of that id or path; raises `DeviceNotFound`."""
        for device in self.devices:
            if name and name in (device.id, device.path):
                return device
        raise DeviceNotFound(name)

    def find_disk(self, name: str) -> GuestDevice:
        """The disk of the device of that id or path.

        Raises `DeviceNotFound`; and `CommandError` for a device that has none itself (the disk of a virtio device belongs to its
        ``virtio-backend``).
        """
        for device in self.devices:
            if device.disk is not None and name == device.inner_path:
                return device.disk
        found = self.find(name)
        if found.disk is None or found.inner_path is not None:
            raise CommandError(f"Device '{name}' has no disk" + (f"; its part '{found.inner_path}' has" if found.disk else ""))
        return found.disk

    def find_bus(self, kind: str, name: str | None = None) -> Bus | None:
        """The bus ``name``, or the first of that kind."""
        return next((bus for bus in self._buses(self.roots) if (bus.kind == kind if name is None else bus.name == name)), None)

    def _buses(self, buses: list[Bus]) -> Iterator[Bus]:
        """Depth first, what was made last first, as QEMU searches."""
        for bus in reversed(buses):
            yield bus
            for device in reversed(bus.children):
                yield from self._buses(device.buses)

    def ide_number(self, device: Device) -> int:
        """Which IDE disk of the machine it is, from 0: all units of all buses are counted, in the order in which they came."""
        buses = [bus for bus in (*self.roots, *(bus for other in self.devices for bus in other.buses)) if bus.kind == "IDE"]
        assert device.bus is not None
        return 2 * buses.index(device.bus) + device.address[0]

    # ---------------------------------------------------------------------------------------------------------------- growing

    def check_id(self, name: str) -> None:
        """Raise `DuplicateName` unless the id is free."""
        if any(device.id == name for device in self.devices):
            raise DuplicateName("device", name)

    def next_number(self, of: str) -> int:
        """The next number under a path or among the buses of a kind; numbers are not used again."""
        number = self._numbers.get(of, 0)
        self._numbers[of] = number + 1
        return number

    def add_bus(
        self, spec: BusSpec, owner: Device | None, *, index: int = 0, hotplug: bool | None = None, below: str = "/machine"
    ) -> Bus:
        """Add one of the buses that ``spec`` describes to its owner, or to the board: ``below`` is its controller's path."""
        kind = BUS_KINDS[spec.kind]
        if owner is not None and owner.id:
            name = owner.id if spec.named_as_device else f"{owner.id}.{index}"
        else:
            name = f"{spec.kind.lower()}.{self.next_number(f'bus {spec.kind}')}"
        units = spec.units if spec.units is not None else kind.units
        if owner is not None:
            below = (owner.model.inner == BACKEND and owner.inner_path) or owner.path
        bus = Bus(name, spec.kind, owner, units, kind.hotplug if hotplug is None else hotplug, f"{below}/{name}", spec.luns)
        (self.roots if owner is None else owner.buses).append(bus)
        return bus

    def add(self, device: Device) -> None:
        """Enter a device, with its buses."""
        self.devices.append(device)
        if device.bus is not None:
            device.bus.children.append(device)
        for spec in device.model.buses:
            for index in range(spec.count):
                self.add_bus(spec, device, index=index)

    def path_for(self, device_id: str) -> str:
        """The path of a new device that a person or management asked for."""
        return f"{PERIPHERAL}/{device_id}" if device_id else f"{ANONYMOUS}/device[{self.next_number(ANONYMOUS)}]"

    # --------------------------------------------------------------------------------------------------------------- shrinking

    def remove(self, device: Device, *, tell: bool = True) -> list[Device]:
        """Take a device out with all that is on its buses, and tell by DEVICE_DELETED; gives what has gone, in that order.

        The disks let go of their media; whoever called closes what nobody uses any more.
        """
        gone: list[Device] = []
        for bus in device.buses:
            for child in reversed(bus.children.copy()):
                gone += self.remove(child, tell=tell)
        self.devices.remove(device)
        if device.bus is not None:
            device.bus.children.remove(device)
        if device.disk is not None:
            device.disk.backend.device = None
            device.disk.backend.close()
        if tell:
            if device.inner_path is not None:
                self._emit("DEVICE_DELETED", {"path": device.inner_path})
            self._emit("DEVICE_DELETED", {**({"device": device.id} if device.id else {}), "path": device.path})
        return [*gone, device]
