"""The types of objects: device models, machine types and user-creatable objects, with their parents and properties.

Models qom-list-types and qom-list-properties of QEMU 7.2. Differs from QEMU in that only types are listed of which something can
be made, with the nearest of their parents that several of them share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import attrs

from qblock.devices.board import BOARDS
from qblock.devices.machine_types import MACHINE_TYPES
from qblock.devices.models import BOARD_MODELS, MODELS
from qblock.devices.properties import Property
from qblock.monitor.dialects import Dialect
from qblock.objects import OBJECT_PROPERTIES, object_kinds

CPU_TYPE: Final = "max-x86_64-cpu"
"""The only processor that can be asked for; it is never made."""
_OF_BUS: Final = {
    "HDA": "hda-codec-device",
    "IDE": "ide-device",
    "ISA": "isa-device",
    "PCI": "pci-device",
    "SCSI": "scsi-device",
    "System": "sys-bus-device",
    "usb-bus": "usb-device",
    "virtio-serial-bus": "virtio-serial-port",
}
"""The type of all devices of a bus."""
_ABSTRACT: Final = {
    "object": "",
    **dict.fromkeys(("accel", "device", "machine"), "object"),
    **dict.fromkeys(_OF_BUS.values(), "device"),
}
DEVICE_PROPERTIES: Final = (
    Property("parent_bus", "link<bus>"),
    Property("realized", "bool"),
    Property("hotplugged", "bool"),
    Property("hotpluggable", "bool"),
)
"""What all devices have."""
MACHINE_PROPERTIES: Final = (
    Property("peripheral", "child<container>"),
    Property("peripheral-anon", "child<container>"),
    Property("unattached", "child<container>"),
)
"""What all machines have."""
_OF_ALL: Final = {"device": DEVICE_PROPERTIES, "machine": MACHINE_PROPERTIES}


@attrs.frozen
class ObjectType:
    """A type with its parent (empty for the root of all) and the properties of its objects beside ``type``."""

    name: str
    parent: str
    properties: tuple[Property, ...] = ()
    is_abstract: bool = False


def object_types(dialect: Dialect) -> dict[str, ObjectType]:
    """All types that a program of this dialect has, by name."""
    return {found.name: found for found in _types(dialect)}


def _types(dialect: Dialect) -> Iterator[ObjectType]:
    is_machine = dialect is not Dialect.STORAGE_DAEMON
    for kind in object_kinds(idle=is_machine):
        properties = tuple(Property(name, shown) for name, shown in OBJECT_PROPERTIES.get(kind, {}).items())
        yield ObjectType(kind, "object", properties)
    yield ObjectType("object", "", is_abstract=True)
    if not is_machine:
        return
    for model in (*MODELS.values(), *BOARD_MODELS.values()):
        parent = _OF_BUS.get(model.bus or "", "device")
        yield ObjectType(model.name, parent, (*DEVICE_PROPERTIES, *(model.properties or ())))
    for machine in MACHINE_TYPES.values():
        yield ObjectType(f"{machine.name}-machine", "machine", MACHINE_PROPERTIES)
    for name in (CPU_TYPE, *_board_parts()):
        yield ObjectType(name, "device", DEVICE_PROPERTIES)
    yield from (ObjectType(f"{name}-accel", "accel") for name in ("qtest", "tcg"))
    for name, parent in _ABSTRACT.items():
        if parent:
            yield ObjectType(name, parent, _OF_ALL.get(name) or _OF_ALL.get(parent, ()), is_abstract=True)


def _board_parts() -> list[str]:
    """What boards have of their own, and cannot be plugged in."""
    steps = {step for board in BOARDS.values() for step in board.unattached if not step.startswith("*")}
    return sorted(steps - {*MODELS, *BOARD_MODELS})


def descends(types: Mapping[str, ObjectType], name: str, ancestor: str) -> bool:
    """Whether ``name`` is of the type ``ancestor``, itself or by a parent."""
    while name:
        if name == ancestor:
            return True
        name = types[name].parent
    return False
