"""The properties of a device as they are once it is plugged in: what was given, what its place has decided, and defaults.

Models what ``qom-get`` and ``info qtree`` of QEMU 7.2 show of disks. Differs from QEMU: the geometry of a disk for which none was
given follows from its size alone; a partition table is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qblock.devices.models import BACKEND, PORTS
from qblock.devices.properties import INTEGERS, Property, Value
from qblock.devices.property_sets import PCI, VIRTIO_PCI
from qblock.errors import QBlockError

if TYPE_CHECKING:
    from qblock.devices.tree import Device, DeviceTree

_SECTOR: Final = 512
_HEADS: Final = 16
_SECTORS: Final = 63
_CYLINDERS: Final = range(2, 16383 + 1)
_BIOS_CYLINDERS: Final = 1024
"""As many a BIOS can address without a translation."""
_DISCARD: Final = {"scsi-hd": 4096, "scsi-cd": 4096, "ide-hd": 512, "ide-cd": 512}
_WORDS: Final[Mapping[str, Mapping[str, Value]]] = {
    "scsi-hd": {"vendor": "QEMU", "product": "QEMU HARDDISK", "ver": "2.5+"},
    "scsi-cd": {"vendor": "QEMU", "product": "QEMU CD-ROM", "ver": "2.5+"},
    "ide-hd": {"ver": "2.5+"},
    "ide-cd": {"ver": "2.5+"},
}
"""What a disk tells of itself unless it is told otherwise."""

_FLOPPIES: Final[Mapping[str, frozenset[int]]] = {
    "144": frozenset({720, 800, 820, 830, 1040, 1120, 1440, 1600, 1680, 1722, 1743, 1760, 1840, 1920}),
    "120": frozenset({160, 180, 320, 360, 410, 1200, 1476}),
}
"""Sizes in KiB of the disks that go into the smaller kinds of floppy drives."""
_VIRTIO: Final = frozenset(
    {
        "any_layout", "event_idx", "indirect_desc", "iommu_platform", "iothread", "notify_on_empty", "packed", "queue_reset",
        "use-disabled-flag", "use-started", "x-disable-legacy-check",
    }
)  # fmt: skip
"""Properties of a virtio device that belong to the part behind its PCI card."""
CARD: Final = frozenset({"class", *(prop.name for prop in (*PCI, *VIRTIO_PCI))}) - _VIRTIO
"""Properties of that card."""


def settled_values(tree: DeviceTree, device: Device) -> dict[str, Value]:
    """All properties of a device of ``tree``, by name."""
    name = device.model.name
    values = {prop.name: _default(prop) for prop in device.model.properties or () if not prop.kind.startswith("child<")}
    values |= {key: value for key, value in _WORDS.get(name, {}).items() if key in values}
    values |= device.values
    if device.iothread is not None:
        values["iothread"] = f"/objects/{device.iothread.name}"
    values |= {key: value for key, value in _place(device).items() if key in values}
    for size in ("logical_block_size", "physical_block_size"):
        if size in values:
            values[size] = values[size] or _SECTOR
    if device.model.inner == BACKEND:
        values |= _virtio_values(tree, device, values)
    if values.get("drive-type") == "auto":
        values["drive-type"] = _floppy_type(device)
    if name in _DISCARD and "discard_granularity" not in device.values:
        values["discard_granularity"] = _DISCARD[name]
    if values.get("cyls") == values.get("heads") == values.get("secs") == 0:
        values |= _geometry(device)
    if values.get("bios-chs-trans") == "auto":
        values["bios-chs-trans"] = "none" if int(values["cyls"]) <= _BIOS_CYLINDERS else "lba"
    if name.startswith("ide-") and not values["serial"]:
        values["serial"] = f"QM{tree.ide_number(device) + 1:05}"
    if "device_id" in values and "device_id" not in device.values and device.disk is not None:
        values["device_id"] = values["serial"] or device.disk.backend.name
    return values


def _virtio_values(tree: DeviceTree, device: Device, values: Mapping[str, Value]) -> dict[str, Value]:
    """How many queues and interrupts a virtio device has: a queue for each processor; and whether it speaks the old version."""
    settled: dict[str, Value] = {}
    name, others = ("num-queues", 1) if "num-queues" in values else ("num_queues", 3)
    queues = device.values.get(name, tree.processors)
    settled[name] = queues
    if "vectors" not in device.values:
        settled["vectors"] = int(queues) + others
    if values.get("disable-legacy") == "auto":
        is_port = device.bus is not None and device.bus.owner is not None and device.bus.owner.model.name in PORTS
        settled["disable-legacy"] = "on" if is_port else "off"
    return settled


def _floppy_type(device: Device) -> Value:
    """The kind of drive that a medium of that size goes into; the largest for what is no floppy disk."""
    size = 0 if device.disk is None or device.disk.root is None else device.disk.length
    return next((kind for kind, sizes in _FLOPPIES.items() if size >> 10 in sizes), "288")


def _default(prop: Property) -> Value:
    if prop.default is not None:
        return prop.default
    if prop.kind in INTEGERS:
        return -1 if prop.name == "bootindex" else 0
    return False if prop.kind == "bool" else ""


def _place(device: Device) -> dict[str, Value]:
    """The place that a device has on its bus, in the terms of its properties."""
    match device.bus and device.bus.kind, device.address:
        case "SCSI", (channel, target, lun):
            return {"channel": channel, "scsi-id": target, "lun": lun}
        case "PCI", (slot, function):
            return {"addr": slot * 8 + function}
        case _, (unit,):
            return {"unit": unit}
        case _:
            return {}


def _geometry(device: Device) -> dict[str, Value]:
    try:
        sectors = 0 if device.disk is None else device.disk.length // _SECTOR
    except QBlockError:  # there is no medium
        sectors = 0
    cylinders = min(max(sectors // (_HEADS * _SECTORS), _CYLINDERS[0]), _CYLINDERS[-1])
    return {"cyls": cylinders, "heads": _HEADS, "secs": _SECTORS}
