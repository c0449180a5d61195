"""The device models that concern disks: the bus each goes on, the buses it brings, its properties, what it does with its disk.

One table of literals, read off qemu-system-x86_64 7.2 (``-device help``, query-block, x-debug-query-block-graph). Devices that
have nothing to do with disks are in `inert`. Code only walks the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from qblock.devices import property_sets as sets
from qblock.devices.inert import INERT
from qblock.devices.properties import Property

CONTROLLERS: Final = "Controller/Bridge/Hub"
USB: Final = "USB"
STORAGE: Final = "Storage"
CATEGORIES: Final = (
    CONTROLLERS, USB, STORAGE, "Network", "Input", "Display", "Sound", "Misc", "CPU", "Watchdog", "Uncategorized",
)  # fmt: skip
"""The headings of ``-device help``, in its order."""


@attrs.frozen
class BusKind:
    """A kind of bus. ``hotplug``: devices come and go while the machine runs; ``asks_guest``: they go when the guest lets them.

    ``units`` is how many devices there is room for, None for as many as one likes.
    """

    hotplug: bool = False
    asks_guest: bool = False
    units: int | None = None


BUS_KINDS: Final[Mapping[str, BusKind]] = {
    "PCI": BusKind(hotplug=True, asks_guest=True),
    "SCSI": BusKind(hotplug=True),
    "usb-bus": BusKind(hotplug=True),
    "nvme-bus": BusKind(),
    "IDE": BusKind(units=2),
    "floppy-bus": BusKind(units=2),
    "ISA": BusKind(),
}


@attrs.frozen
class BusSpec:
    """Buses that a device brings: ``count`` of a kind.

    They are named after the device's id (``scsi0.0``), with ``named_as_device`` like it (``rp``), or by kind and number.
    ``units`` is how many devices (targets of a SCSI bus) there is room for, ``luns`` how many logical units a target can have.
    """

    kind: str
    count: int = 1
    named_as_device: bool = False
    units: int | None = None
    luns: int = 256


@attrs.frozen
class DiskTraits:
    """What a device does with its disk.

    ``optional``: it may be empty; ``removable``: its medium can be changed, ``tray``: through a tray that the guest can lock.
    ``writes``: it takes the write permission when its node can be written; ``needs_writable``: it refuses a node that cannot.
    ``follows_size``: it lets others resize its node. ``io_status``: query-block shows one; ``error_actions``: it can
    stop the machine on an error.
    """

    optional: bool = False
    removable: bool = False
    tray: bool = False
    writes: bool = True
    needs_writable: bool = False
    follows_size: bool = True
    io_status: bool = True
    error_actions: bool = True


@attrs.frozen
class DeviceModel:
    """A device model. ``inner`` is the path, below the device's own, of the part that has the disk (virtio and USB devices)."""

    name: str
    category: str
    bus: str | None
    desc: str = ""
    alias: str = ""
    properties: tuple[Property, ...] | None = ()
    buses: tuple[BusSpec, ...] = ()
    inner: str = ""
    disk: DiskTraits | None = None

    @property
    def help_line(self) -> str:
        """As ``-device help`` shows it."""
        parts = [f'name "{self.name}"']
        parts += [f"bus {self.bus}"] if self.bus is not None else []
        parts += [f'alias "{self.alias}"'] if self.alias else []
        parts += [f'desc "{self.desc}"'] if self.desc else []
        return ", ".join(parts)


_DISK: Final = DiskTraits()
_CD: Final = DiskTraits(optional=True, removable=True, tray=True, writes=False, follows_size=False)
_FLOPPY: Final = DiskTraits(optional=True, removable=True, follows_size=False, io_status=False, error_actions=False)
_NVME: Final = DiskTraits(follows_size=False, io_status=False, error_actions=False, needs_writable=True)
BACKEND: Final = "virtio-backend"
"""The part of a virtio device that has its disk, or its buses."""
_FIXED_VIRTIO: Final = frozenset({"disable-legacy", "disable-modern"})


def _virtio(
    name: str, alias: str, properties: tuple[Property, ...], *, buses: tuple[BusSpec, ...] = (), disk: DiskTraits | None = None
) -> list[DeviceModel]:
    """A virtio device on PCI, and its two variants that say which version of virtio they speak."""
    fixed = tuple(prop for prop in properties if prop.name not in _FIXED_VIRTIO)
    return [
        DeviceModel(name + suffix, STORAGE, "PCI", "", "" if suffix else alias, own, buses, BACKEND, disk)
        for suffix, own in (("", properties), ("-non-transitional", fixed), ("-transitional", fixed))
    ]


def _scsi_controller(
    name: str, properties: tuple[Property, ...], desc: str = "", alias: str = "", *, targets: int, luns: int
) -> DeviceModel:
    return DeviceModel(name, STORAGE, "PCI", desc, alias, properties, (BusSpec("SCSI", units=targets, luns=luns),))


def _usb_controller(name: str, properties: tuple[Property, ...], desc: str = "") -> DeviceModel:
    return DeviceModel(name, USB, "PCI", desc, "", properties, (BusSpec("usb-bus"),))


_DISKS: Final = (
    *_virtio("virtio-blk-pci", "virtio-blk", sets.VIRTIO_BLK_PCI, disk=_DISK),
    DeviceModel("scsi-hd", STORAGE, "SCSI", "virtual SCSI disk", "", sets.SCSI_HD, disk=_DISK),
    DeviceModel("scsi-cd", STORAGE, "SCSI", "virtual SCSI CD-ROM", "", sets.SCSI_CD, disk=_CD),
    DeviceModel(
        "ide-hd", STORAGE, "IDE", "virtual IDE disk", "", sets.IDE_HD, disk=attrs.evolve(_DISK, needs_writable=True)
    ),
    DeviceModel("ide-cd", STORAGE, "IDE", "virtual IDE CD-ROM", "", sets.IDE_CD, disk=_CD),
    DeviceModel("floppy", STORAGE, "floppy-bus", "virtual floppy drive", "", sets.FLOPPY, disk=_FLOPPY),
    DeviceModel(
        "nvme", STORAGE, "PCI", "Non-Volatile Memory Express", "", sets.NVME,
        (BusSpec("nvme-bus", named_as_device=True),), disk=_NVME,
    ),
    DeviceModel("nvme-ns", STORAGE, "nvme-bus", "Virtual NVMe namespace", "", sets.NVME_NS, disk=_NVME),
    DeviceModel(
        "usb-storage", STORAGE, "usb-bus", "", "", sets.USB_STORAGE, (BusSpec("SCSI", units=1, luns=1),), "{bus}/legacy[0]",
        _DISK,
    ),
)  # fmt: skip

_CONTROLLERS: Final = (
    *_virtio("virtio-scsi-pci", "virtio-scsi", sets.VIRTIO_SCSI_PCI, buses=(BusSpec("SCSI", units=256, luns=16384),)),
    _scsi_controller("am53c974", sets.AM53C974, "AMD Am53c974 PCscsi-PCI SCSI adapter", targets=8, luns=8),
    _scsi_controller("dc390", sets.AM53C974, "Tekram DC-390 SCSI adapter", targets=8, luns=8),
    _scsi_controller("lsi53c810", sets.PCI, targets=8, luns=1),
    _scsi_controller("lsi53c895a", sets.PCI, alias="lsi", targets=8, luns=1),
    _scsi_controller("megasas", sets.MEGASAS, "LSI MegaRAID SAS 1078", targets=65, luns=256),
    _scsi_controller("megasas-gen2", sets.MEGASAS_GEN2, "LSI MegaRAID SAS 2108", targets=65, luns=256),
    _scsi_controller("mptsas1068", sets.MPTSAS1068, "LSI SAS 1068", targets=9, luns=2),
    _scsi_controller("pvscsi", sets.PVSCSI, targets=65, luns=1),
    DeviceModel("usb-bot", STORAGE, "usb-bus", "", "", sets.USB, (BusSpec("SCSI", units=1, luns=16),)),
    DeviceModel("usb-uas", STORAGE, "usb-bus", "", "", sets.USB_UAS, (BusSpec("SCSI", units=1, luns=256),)),
    DeviceModel("nvme-subsys", STORAGE, None, "Virtual NVMe subsystem", "", sets.NVME_SUBSYS),
    DeviceModel("ich9-ahci", STORAGE, "PCI", "", "ahci", sets.ICH9_AHCI, (BusSpec("IDE", 6, units=1),)),
    DeviceModel("piix3-ide", STORAGE, "PCI", "", "", sets.PCI, (BusSpec("IDE", 2),)),
    DeviceModel("piix4-ide", STORAGE, "PCI", "", "", sets.PCI, (BusSpec("IDE", 2),)),
    DeviceModel("isa-fdc", STORAGE, "ISA", "virtual floppy controller", "", sets.ISA_FDC, (BusSpec("floppy-bus"),)),
    _usb_controller("ich9-usb-ehci1", sets.ICH9_USB_EHCI1),
    _usb_controller("ich9-usb-ehci2", sets.ICH9_USB_EHCI1),
    *(_usb_controller(f"ich9-usb-uhci{number}", sets.ICH9_USB_UHCI1) for number in range(1, 7)),
    _usb_controller("nec-usb-xhci", sets.NEC_USB_XHCI),
    _usb_controller("pci-ohci", sets.PCI_OHCI, "Apple USB Controller"),
    _usb_controller("piix3-usb-uhci", sets.PIIX3_USB_UHCI),
    _usb_controller("piix4-usb-uhci", sets.PIIX3_USB_UHCI),
    _usb_controller("qemu-xhci", sets.QEMU_XHCI),
    _usb_controller("usb-ehci", sets.USB_EHCI),
    DeviceModel("usb-hub", CONTROLLERS, "usb-bus", "", "", sets.USB_HUB),
    DeviceModel(
        "pcie-root-port", CONTROLLERS, "PCI", "PCI Express Root Port", "", sets.PCIE_ROOT_PORT,
        (BusSpec("PCI", named_as_device=True, units=1),),
    ),
    DeviceModel(
        "pci-bridge", CONTROLLERS, "PCI", "Standard PCI Bridge", "", sets.PCI_BRIDGE,
        (BusSpec("PCI", named_as_device=True),),
    ),
)  # fmt: skip

_BRIDGES: Final = frozenset(
    {"i82801b11-bridge", "ioh3420", "pcie-pci-bridge", "pxb-pcie", "x3130-upstream", "xio3130-downstream"}
)
"""Inert ones that bring a PCI bus all the same, so that disks can be behind them."""


PORTS: Final = frozenset({"ioh3420", "pcie-root-port", "xio3130-downstream"})
"""Ports of PCI Express, which have room for one device; a virtio device there speaks the new version only."""


def _inert() -> list[DeviceModel]:
    return [
        DeviceModel(
            name, category, bus, desc, alias, None,
            (BusSpec("PCI", named_as_device=True),) if name in _BRIDGES else (),
        )
        for category, bus, models in INERT
        for name, alias, desc in models
    ]  # fmt: skip


FLASH: Final = DeviceModel(
    "cfi.pflash01", STORAGE, None, properties=sets.BLOCK,
    disk=attrs.evolve(_FLOPPY, optional=False, removable=False),
)  # fmt: skip
"""The memory that firmware is in, which only a board brings."""

MODELS: Final[Mapping[str, DeviceModel]] = {
    model.name: model for model in sorted((*_DISKS, *_CONTROLLERS, *_inert()), key=lambda model: model.name.lower())
}
"""All models by name, in the order of ``-device help``."""
ALIASES: Final[Mapping[str, str]] = {model.alias: model.name for model in MODELS.values() if model.alias}


_SLEEP: Final = (Property("disable_s3", "uint8", 0), Property("disable_s4", "uint8", 0))
BOARD_MODELS: Final[Mapping[str, DeviceModel]] = {
    name: DeviceModel(name, CONTROLLERS, "PCI", properties=(*sets.PCI, *_SLEEP)) for name in ("ICH9-LPC", "PIIX4_PM")
}
"""Parts of boards that are told by ``-global`` how the guest may sleep, which none does here."""


def find_model(name: str) -> DeviceModel | None:
    """The model of that name or alias."""
    return MODELS.get(ALIASES.get(name, name))


def help_lines() -> list[str]:
    """The answer to ``-device help``: what can be plugged in, by category."""
    lines: list[str] = []
    for category in CATEGORIES:
        shown = [model.help_line for model in MODELS.values() if model.category == category]
        if shown:
            lines += ([""] if lines else []) + [f"{category} devices:", *shown]
    return lines
