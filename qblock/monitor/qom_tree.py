"""The tree of objects, as qom-list, qom-get and qom-set see it: the machine with its devices, objects, character devices.

Models QEMU 7.2's tree as far as there is something behind it: ``/machine/peripheral``, ``peripheral-anon`` and ``unattached``
with the devices, their buses and inner parts; ``/objects``; ``/chardevs``. A path is absolute, or the end of one that no other
path has. Differs from QEMU: what a board has besides disks, and interrupts and memory regions, are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs

from qblock.devices.settled import CARD, settled_values
from qblock.devices.tree import ANONYMOUS, PERIPHERAL, UNATTACHED, Bus, Device
from qblock.errors import CommandError, DeviceNotFound
from qblock.monitor.dialects import Dialect

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.monitor.hub import MonitorHub
    from qblock.objects import UserObject

_CONTAINER: Final = "container"


@attrs.frozen
class Value:
    """A property: its type, and how to read it."""

    type: str
    read: Callable[[], Json]


def _constant(kind: str, value: Json) -> Value:
    return Value(kind, lambda: value)


Write = Callable[[str, "Json"], None]
Children = Callable[[], Mapping[str, "QomNode"]]


def _nothing() -> Mapping[str, QomNode]:
    return {}


def _fixed(name: str, value: Json) -> None:
    del value
    raise CommandError(f"The property '{name}' cannot be changed")


@attrs.frozen(eq=False)
class QomNode:
    """An object of the tree: its type, where it is, its properties, what is below it, and how a property is changed."""

    kind: str
    path: str
    values: Mapping[str, Value] = attrs.field(factory=dict)
    children: Children = _nothing
    write: Write = _fixed

    def properties(self) -> dict[str, str]:
        """The types of all properties by name, ``type`` first."""
        shown = {name: value.type for name, value in self.values.items()}
        return {"type": "string", **shown, **{name: f"child<{node.kind}>" for name, node in self.children().items()}}

    def get(self, name: str) -> Json:
        """The value of a property; of an object below, its path. Raises `CommandError`."""
        if name == "type":
            return self.kind
        if name in self.values:
            return self.values[name].read()
        if (below := self.children().get(name)) is not None:
            return below.path
        raise CommandError(f"'{self.path}' has no property '{name}'")

    def set(self, name: str, value: Json) -> None:
        """Change a property; raises `CommandError`."""
        if name not in self.properties():
            raise CommandError(f"'{self.path}' has no property '{name}'")
        if name not in self.values:
            raise CommandError(f"'{name}' of '{self.path}' cannot be changed")
        self.write(name, value)


def find_object(hub: MonitorHub, path: str) -> QomNode:
    """What ``path`` names; raises `DeviceNotFound`, and `CommandError` for the end of several paths."""
    parts = [part for part in path.split("/") if part]
    root = _root(hub)
    if path.startswith("/"):
        node: QomNode | None = root
        for part in parts:
            node = None if node is None else node.children().get(part)
        found = [] if node is None else [node]
    else:
        found = [node for node in _walk(root) if parts and node.path.split("/")[1:][-len(parts) :] == parts]
    if not found:
        raise DeviceNotFound(path)
    if len(found) > 1:
        raise CommandError(f"'{path}' is the end of several paths: " + ", ".join(node.path for node in found))
    return found[0]


def _walk(node: QomNode) -> Iterator[QomNode]:
    yield node
    for below in node.children().values():
        yield from _walk(below)


# ------------------------------------------------------------------------------------------------------- parts of the tree


def _root(hub: MonitorHub) -> QomNode:
    objects = hub.system.objects.objects
    trunk = {
        "objects": _container("/objects", lambda: {name: _object(name, found) for name, found in objects.items()}),
        "chardevs": _container("/chardevs", partial(_chardevs, hub)),
    }
    if hub.dialect is not Dialect.STORAGE_DAEMON:
        trunk = {"machine": _machine(hub), **trunk}
    return QomNode(_CONTAINER, "/", children=lambda: trunk)


def _container(path: str, children: Children) -> QomNode:
    return QomNode(_CONTAINER, path, children=children)


def _object(name: str, found: UserObject) -> QomNode:
    values = {prop: Value(kind, partial(found.get, prop)) for prop, kind in found.properties.items()}
    return QomNode(found.kind, f"/objects/{name}", values, write=found.set)


def _chardevs(hub: MonitorHub) -> dict[str, QomNode]:
    return {device.label: QomNode("chardev", f"/chardevs/{device.label}") for device in hub.chardevs}


def _machine(hub: MonitorHub) -> QomNode:
    parts = {path.rpartition("/")[2]: _container(path, partial(_devices, hub, path)) for path in _PARTS}
    return QomNode(f"{hub.system.board.identity.type.name}-machine", "/machine", children=lambda: parts)


_PARTS: Final = (PERIPHERAL, ANONYMOUS, UNATTACHED)


def _devices(hub: MonitorHub, below: str) -> dict[str, QomNode]:
    """The devices of a container by name, the newest first, as QEMU has them."""
    found = [device for device in hub.system.devices.devices if device.path.rpartition("/")[0] == below]
    return {device.path.rpartition("/")[2]: _device(hub, device) for device in reversed(found)}


def _device(hub: MonitorHub, device: Device) -> QomNode:
    system, kinds = hub.system, {prop.name: prop.kind for prop in device.model.properties or ()}
    values = {
        **_placement(device),
        **{
            name: _constant(kinds.get(name, "str"), value)
            for name, value in settled_values(system.devices, device).items()
        },
    }

    def parts() -> dict[str, QomNode]:
        inner = device.inner_path
        own = {bus.name: _bus(bus) for bus in device.buses if bus.path.rpartition("/")[0] == device.path}
        if inner is None or not inner.startswith(f"{device.path}/{device.model.inner}"):
            return own
        return {device.model.inner: _inner(device, inner, values), **own}

    return QomNode(device.model.name, device.path, values, children=parts)


def _inner(device: Device, path: str, values: Mapping[str, Value]) -> QomNode:
    """The part of a virtio device behind its card."""
    own = {
        **{name: value for name, value in values.items() if name not in CARD},
        "parent_bus": Value("link<bus>", lambda: f"{device.path}/virtio-bus"),
        "hotpluggable": Value("bool", lambda: False),
    }
    below = {bus.name: _bus(bus) for bus in device.buses}
    return QomNode(device.inner_kind, path, own, children=lambda: below)


def _placement(device: Device) -> dict[str, Value]:
    bus = device.bus
    return {
        "parent_bus": Value("link<bus>", lambda: "" if bus is None else bus.path),
        "realized": Value("bool", lambda: True),
        "hotplugged": Value("bool", lambda: device.hotplugged),
        "hotpluggable": Value("bool", lambda: bus is not None and bus.hotplug),
    }


def _bus(bus: Bus) -> QomNode:
    links = {
        f"child[{number}]": _constant(f"link<{child.model.name}>", child.path)
        for number, child in enumerate(bus.children)
    }
    return QomNode(bus.kind, bus.path, {"realized": Value("bool", lambda: True), **links})
