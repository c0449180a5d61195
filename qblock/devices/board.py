"""What a machine type brings: buses, places for drives, and the numbers under which its own devices are known.

Models the machine types of qemu-system-x86_64 7.2 as query-block shows them: the path of a drive that the board connects is
``/machine/unattached/device[N]``, where N counts everything that the board has made before it, disks or not. The lists below are
that order. ``BARE`` is ours: a PCI bus and nothing else, for a block system without a board.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

import attrs

from qblock.devices.machine_types import Identity
from qblock.devices.models import FLASH, MODELS, BusSpec
from qblock.devices.plugging import Request, plug
from qblock.devices.tree import UNATTACHED
from qblock.errors import CommandError, InvalidParameter

if TYPE_CHECKING:
    from qblock.backend import BlockBackend
    from qblock.devices.properties import Value
    from qblock.system import BlockSystem


@attrs.frozen
class Interface:
    """Where drives of an interface go: ``buses`` with ``units`` places each; 0 units: one bus without an end."""

    buses: int = 1
    units: int = 0


NOWHERE: Final = Interface(buses=0)
ANYWHERE: Final = Interface()
UNPOLICED: Final = frozenset({"floppy", "pflash", "mtd", "sd", "xen"})
"""Interfaces that rerror and werror are not for."""


@attrs.frozen
class BoardType:
    """A kind of board: its PCI bus, places for drives, its own devices in their order (``*`` marks a varying number).

    ``pci_root`` is the path of what has that bus. ``pci_places`` (slot and function) are taken by the board itself; its display
    and network cards come after the first of them.
    """

    default_interface: str = "none"
    interfaces: Mapping[str, Interface] = attrs.field(factory=dict)
    unattached: tuple[str, ...] = ()
    pci_bus: bool = True
    pci_hotplug: bool = True
    pci_express: bool = False
    pci_root: str = "/machine"
    pci_places: frozenset[tuple[int, int]] = frozenset()
    has_defaults: bool = True
    default_drives: tuple[str, ...] = ("cdrom", "floppy", "sdcard")

    def interface(self, name: str) -> Interface:
        """The places for drives of an interface."""
        return ANYWHERE if name == "none" else self.interfaces.get(name, NOWHERE)


_LEGACY: Final = ("i8257", "i8257", "isa-i8259", "isa-i8259")
_TIMERS: Final = ("hpet", "mc146818rtc", "isa-pit", "isa-pcspk")
_KEYBOARD: Final = ("i8042", "vmport", "vmmouse", "port92")

BOARDS: Final[Mapping[str, BoardType]] = {
    "bare": BoardType("none", {"virtio": ANYWHERE}),
    "none": BoardType(pci_bus=False, has_defaults=False),
    "pc": BoardType(
        "ide",
        {
            "ide": Interface(2, 2), "floppy": Interface(1, 2), "pflash": Interface(1, 2), "virtio": ANYWHERE,
        },
        (
            "*cpu", "kvmvapic", "i440FX", "PIIX3", *_LEGACY, "*vga", *_TIMERS, "*serial", "*parallel", "isa-fdc",
            "*floppy", *_KEYBOARD, "*nic", "piix3-ide", "*ide",
        ),
        pci_root="/machine/i440fx", pci_places=frozenset({(0, 0), (1, 0), (1, 1), (1, 3)}),
    ),
    "q35": BoardType(
        "ide",
        {
            "ide": Interface(6, 1), "floppy": Interface(1, 2), "pflash": Interface(1, 2), "virtio": ANYWHERE,
        },
        (
            "*cpu", "kvmvapic", "ICH9-LPC", *_LEGACY, *_TIMERS, "*serial", "*parallel", "*isa-fdc", "*floppy",
            *_KEYBOARD, "ich9-ahci", "*ide", "*vga", "*nic",
        ),
        pci_hotplug=False, pci_express=True, pci_root="/machine/q35", pci_places=frozenset({(0, 0), (31, 0), (31, 2), (31, 3)}),
        default_drives=("cdrom", "sdcard"),
    ),
}  # fmt: skip


@attrs.frozen
class Fittings:
    """How many of its varying devices a board has."""

    cpu: int = 1
    vga: int = 1
    serial: int = 1
    parallel: int = 1
    nic: int = 1


@attrs.define(eq=False)
class Place:
    """A place for a drive, and the drive that has it."""

    interface: str
    bus: int
    unit: int
    is_cdrom: bool
    backend: BlockBackend


@attrs.define(eq=False)
class Board:
    """The board of one machine, and the drives that have places on it. Call `build` once.

    ``defaults`` are those of ``-global``: driver, property, value. ``started``: from now on devices come and go while the machine
    is on, which not every bus allows.
    """

    kind: BoardType = attrs.field(default=BOARDS["bare"])
    identity: Identity = Identity()
    drives: list[Place] = attrs.field(factory=list, init=False)
    defaults: list[tuple[str, str, str]] = attrs.field(factory=list, init=False)
    built: bool = attrs.field(default=False, init=False)
    started: bool = attrs.field(default=False, init=False)

    # ------------------------------------------------------------------------------------------------------ places for drives

    def taken(self, interface: str) -> dict[tuple[int, int], Place]:
        """The places that have a drive; the place of a drive that is gone, or has lost its name, is free again."""
        return {(p.bus, p.unit): p for p in self.drives if p.interface == interface and p.backend.name and not p.backend.closed}

    def place_for(self, interface: str, index: int | None, bus: int | None, unit: int | None) -> tuple[int, int]:
        """Bus and unit of a new drive: by its index, by both, or the first that is free. Raises `CommandError`."""
        places = self.kind.interface(interface)
        if not places.buses:
            raise CommandError(f"This machine has no place for a drive with if={interface}")
        taken = self.taken(interface)
        unit = None if unit is not None and unit < 0 else unit
        if index is not None and index >= 0:
            if bus or unit is not None:
                raise InvalidParameter("index", "stands for 'bus' and 'unit' together; give it, or them")
            place = divmod(index, places.units) if places.units else (0, index)
        elif unit is not None:
            place = (bus or 0, unit)
        else:
            place = next(place for place in _places(places, bus or 0) if place not in taken)
        if places.units and place[1] >= places.units:
            raise CommandError(f"A bus of if={interface} has {places.units} units; there is no unit {place[1]}")
        if places.units and place[0] >= places.buses:
            raise CommandError(f"This machine has {places.buses} buses of if={interface}; there is no bus {place[0]}")
        if place in taken:
            raise CommandError(f"The place of bus {place[0]}, unit {place[1]} of if={interface} has a drive already")
        return place

    def forget(self, backend: BlockBackend) -> None:
        """The drive is gone."""
        self.drives = [place for place in self.drives if place.backend is not backend]

    def name_for(self, interface: str, place: tuple[int, int], *, is_cdrom: bool) -> str:
        """The name of a drive without an id: ``ide0-hd1``, ``virtio0``."""
        units = self.kind.interface(interface).units
        if units and interface in ("ide", "scsi"):
            return f"{interface}{place[0]}-{'cd' if is_cdrom else 'hd'}{place[1]}"
        return f"{interface}{place[0] * units + place[1]}"

    # ------------------------------------------------------------------------------------------------------------ the board

    def build(self, system: BlockSystem, fittings: Fittings | None = None) -> None:
        """Make the buses, and connect the drives that have places; raises `CommandError` for one that does not fit.

        Without ``fittings`` the board has no devices of its own.
        """
        self.built = True
        self._make_pci_bus(system, fittings)
        if fittings is None:
            return
        system.devices.processors = fittings.cpu
        for step in self.kind.unattached:
            self._make(system, step, fittings)
        for place in self.taken("pflash").values():
            connect_flash(system, place.unit, str(place.backend.name))

    def _make_pci_bus(self, system: BlockSystem, fittings: Fittings | None) -> None:
        if not self.kind.pci_bus:
            return
        pci = system.devices.add_bus(BusSpec("PCI"), None, hotplug=self.kind.pci_hotplug, below=self.kind.pci_root)
        first = 2
        if self.kind.pci_express:
            pci.name, pci.path, first = "pcie.0", f"{self.kind.pci_root}/pcie.0", 1
        if fittings is not None:
            own = self.kind.pci_places
            cards = {(first + number, 0) for number in range(bool(fittings.vga) + fittings.nic)}
            pci.reserved = {place: (place[0], 3) in own for place in own | cards}

    def _make(self, system: BlockSystem, step: str, fittings: Fittings) -> None:
        """One of the board's devices, or the varying number of one kind."""
        tree = system.devices
        match step:
            case "*ide" | "*floppy":
                self._connect_drives(system, step[1:])
            case "*isa-fdc" if not self.taken("floppy"):
                return
            case "isa-fdc" | "*isa-fdc":
                tree.add_bus(BusSpec("floppy-bus"), None, below=_unattached(system))
            case "PIIX3" | "ICH9-LPC":
                tree.add_bus(BusSpec("ISA"), None, below=_unattached(system))
            case "piix3-ide" | "ich9-ahci":
                controller = _unattached(system)
                places = self.kind.interface("ide")
                for _ in range(places.buses):
                    tree.add_bus(BusSpec("IDE", units=places.units), None, below=controller)
            case _:
                for _ in range(getattr(fittings, step[1:]) if step.startswith("*") else 1):
                    tree.next_number(UNATTACHED)

    def _connect_drives(self, system: BlockSystem, interface: str) -> None:
        for (bus, unit), place in sorted(self.taken(interface).items()):
            path = _unattached(system)
            model = MODELS["floppy" if interface == "floppy" else "ide-cd" if place.is_cdrom else "ide-hd"]
            where = f"{model.bus.lower() if model.bus else ''}.{bus}"
            values: dict[str, Value] = {"drive": place.backend.name, "unit": unit}
            plug(system, Request(model, "", where, values), hot=False, path=path)


def _unattached(system: BlockSystem) -> str:
    """The path of the next device that the board makes."""
    return f"{UNATTACHED}/device[{system.devices.next_number(UNATTACHED)}]"


def _places(interface: Interface, first: int) -> Iterator[tuple[int, int]]:
    """All places from a bus on, in their order; there is always one more."""
    bus, unit = first, 0
    while True:
        yield bus, unit
        bus, unit = (bus + 1, 0) if interface.units and unit + 1 == interface.units else (bus, unit + 1)


def connect_flash(system: BlockSystem, number: int, drive: str) -> None:
    """Flash memory of the firmware on a drive or a node, as ``-machine pflashN=NODE`` makes it.

    Raises `CommandError` and `PermissionConflict`.
    """
    plug(system, Request(FLASH, "", None, {"drive": drive}), hot=False, path=f"/machine/system.flash{number}")
