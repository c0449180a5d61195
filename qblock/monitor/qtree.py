"""``info qtree``: buses, the devices on them and their properties, as lines.

Models the layout of QEMU 7.2's human monitor. Differs from QEMU: what a board has of its own is not shown, so that its buses come
one after the other; properties are in alphabetical order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from qblock.devices.models import BACKEND
from qblock.devices.properties import INTEGERS, Value
from qblock.devices.settled import CARD, settled_values
from qblock.units import format_size

if TYPE_CHECKING:
    from qblock.devices.tree import Bus, Device, DeviceTree

def qtree_lines(tree: DeviceTree) -> Iterator[str]:
    """The lines, without ends."""
    yield from ("bus: main-system-bus", "  type System")
    for device in tree.devices:
        if device.bus is None:
            yield from _indented(_device_lines(tree, device))
    for bus in tree.roots:
        yield from _bus_lines(tree, bus)


def _indented(lines: Iterator[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)


def _bus_lines(tree: DeviceTree, bus: Bus) -> Iterator[str]:
    yield from (f"bus: {bus.name}", f"  type {bus.kind}")
    for device in reversed(bus.children):
        yield from _indented(_device_lines(tree, device))


def _device_lines(tree: DeviceTree, device: Device) -> Iterator[str]:
    kinds = {prop.name: prop.kind for prop in device.model.properties or ()}
    shown = {
        name: _shown(name, kinds.get(name, "str"), value)
        for name, value in sorted(settled_values(tree, device).items())
        if name != "bootindex" and not kinds.get(name, "str").startswith("link<")
    }
    buses = [line for bus in device.buses for line in _indented(_bus_lines(tree, bus))]
    yield f'dev: {device.model.name}, id "{device.id}"'
    if device.model.inner != BACKEND:
        yield from _properties(shown)
        yield from buses
        return
    yield from _properties({name: text for name, text in shown.items() if name in CARD})
    yield from ("  bus: virtio-bus", "    type virtio-pci-bus", f'    dev: {device.inner_kind}, id ""')
    yield from _indented(_indented(_properties({name: text for name, text in shown.items() if name not in CARD})))
    yield from (f"    {line}" for line in buses)


def _properties(shown: Mapping[str, str]) -> Iterator[str]:
    return (f"  {name} = {text}" for name, text in shown.items())


def _shown(name: str, kind: str, value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if name == "addr":
        return f"{value // 8:02x}.{value % 8}"
    if kind in INTEGERS:
        return f"{value} ({value & (1 << 64) - 1:#x})"
    return f"{value} ({format_size(value)})"
