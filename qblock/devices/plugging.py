"""Plugging a device in and pulling it out: ``-device``, ``device_add``, ``device_del``.

Models how QEMU realizes a device (semantics.md section 18): the model and its properties are checked, a bus with a free place is
found, the disk's backend is found or made, and its permissions are taken. When anything is refused, nothing has changed.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs

from qblock import homes
from qblock.accounting import DeviceAccounting
from qblock.backend import BlockBackend
from qblock.devices.device import GuestDevice
from qblock.devices.models import BUS_KINDS, DeviceModel, DiskTraits, find_model
from qblock.devices.properties import Value, parse_values
from qblock.devices.property_sets import PCI
from qblock.devices.tree import Bus, Device
from qblock.devices.value_limits import check_limits
from qblock.drain import drained
from qblock.errors import CommandError, DeviceNotFound, InvalidParameter
from qblock.graph import check_identifier
from qblock.permissions import Perm
from qblock.transaction import Transaction

if TYPE_CHECKING:
    from qblock.devices.tree import DeviceTree
    from qblock.driver import Json
    from qblock.iothreads import IOThread
    from qblock.system import BlockSystem

SCSI_TARGETS: Final = 256
PCI_SLOTS: Final = 32
PCI_FUNCTIONS: Final = 8
MAX_BLOCK_SIZE: Final = 2 << 20
MAX_SIZE: Final = (1 << 32) - 1
MAX_MIN_IO: Final = (1 << 16) - 1


@attrs.frozen
class Request:
    """A device as it was asked for: its model, its id or "", the bus it wants, its properties."""

    model: DeviceModel
    id: str
    bus: str | None
    values: Mapping[str, Value]


def read_request(
    options: Mapping[str, Json], *, strings: bool, defaults: Iterable[tuple[str, str, str]] = ()
) -> Request:
    """The request in the arguments of device_add, or (``strings``) of ``-device``.

    ``defaults`` are those of ``-global``: driver, property, value. Raises `CommandError` and `InvalidParameter`.
    """
    given = dict(options)
    driver, device_id, bus = (given.pop(key, None) for key in ("driver", "id", "bus"))
    for name, value in (("driver", driver), ("id", device_id), ("bus", bus)):
        if value is not None and not isinstance(value, str):
            raise InvalidParameter(name, "must be a string")
    if driver is None:
        raise InvalidParameter("driver", "is missing: it names the device model")
    model = find_model(driver)
    if model is None:
        raise CommandError(f"There is no device model '{driver}'; see '-device help'")
    if device_id is not None:
        check_identifier(device_id, parameter="id")
    if model.properties is None:
        places = {name: value for name, value in given.items() if model.bus == "PCI" and name in ("addr", "multifunction")}
        return Request(model, device_id or "", bus, parse_values(PCI, places, owner=model.name, strings=strings))
    wanted = {prop: value for name, prop, value in defaults if name == model.name and prop not in given}
    values = parse_values(model.properties, wanted, owner=model.name, strings=True)
    values |= parse_values(model.properties, given, owner=model.name, strings=strings)
    check_limits(model.name, values)
    if values.get("drive") == "":
        del values["drive"]
    return Request(model, device_id or "", bus, values)


def plug(system: BlockSystem, request: Request, *, hot: bool, path: str | None = None) -> Device:
    """Make the device and put it on its bus; ``hot``: the machine has been started. ``path`` is for what the board brings.

    Raises `CommandError`, `DuplicateName`, `PermissionConflict`, and nothing has changed then.
    """
    tree, model = system.devices, request.model
    if request.id:
        tree.check_id(request.id)
    bus = _find_bus(tree, request)
    if hot and bus is not None and not bus.hotplug:
        raise CommandError(f"Nothing can be plugged into the bus '{bus.name}' of a machine that has been started")
    _check_boot_index(tree, request)
    thread = _thread_named(system, request.values.get("iothread"))
    address = () if bus is None else _PLACES.get(bus.kind, _anywhere)(bus, request)
    device = Device(
        request.id, model, path or tree.path_for(request.id), bus, request.values, address, thread, hotplugged=hot
    )
    if model.disk is not None and not (model.name == "nvme" and "drive" not in request.values):
        # Buses are named now: the path of the part that has the disk may begin with the name of one.
        tree.add(device)
        try:
            _connect_disk(system, device, model.disk)
        except BaseException:
            tree.remove(device, tell=False)
            raise
    else:
        _check_serial(request.values, model)
        tree.add(device)
    return device


def unplug(system: BlockSystem, name: str) -> None:
    """Pull out the device of that id or path, with DEVICE_DELETED when it is gone: soon, or on a bus that asks the guest, as soon
    as the guest runs (or the machine is reset).

    Raises `DeviceNotFound`, and `CommandError` when its bus holds it, or it is on its way out already.
    """
    device = system.devices.find(name)
    if device.bus is None or not device.bus.hotplug:
        where = "has no bus" if device.bus is None else f"is on the bus '{device.bus.name}'"
        raise CommandError(f"Device '{name}' {where}, from which nothing can be taken while the machine is on")
    if device.leaving:
        raise CommandError(f"Device '{name}' is leaving already; it goes when the guest lets it")
    device.leaving = True
    if not BUS_KINDS[device.bus.kind].asks_guest or system.run.running:
        system.later(_remove(system, [device]), f"device_del of '{name}'")


async def take_requests_back(system: BlockSystem) -> None:
    """A reset begins: devices on buses on which they come and go wait for the end of their requests, leaving ones for good."""
    for device in system.devices.devices.copy():
        if device.bus is not None and BUS_KINDS[device.bus.kind].hotplug:
            await _settle(device)
    for device in system.devices.leaving:
        for part in _with_all_behind(device):
            await _settle(part)


async def let_go(system: BlockSystem, *, idle: bool = False) -> None:
    """The guest lets go of the devices that were told to leave, or a reset takes them from it: then they are ``idle`` already."""
    await _remove(system, system.devices.leaving, idle=idle)


async def _remove(system: BlockSystem, leaving: list[Device], *, idle: bool = False) -> None:
    """In drained sections as in QEMU, where ready jobs show each: requests end, the drive is released, its medium taken out.

    What was made by ``-drive`` goes with its device, and so the jobs on it are cancelled.
    """
    for device in leaving:
        for part in _with_all_behind(device):
            if not idle:
                await _settle(part)
            if part.disk is not None and part.disk.backend.name and part.disk.backend.root is not None:
                await system.jobs.cancel_users(part.disk.backend.node)
            for _ in range(2):
                await _settle(part)
        if device in system.devices.devices:  # it may have gone with the device that it was plugged into
            system.devices.remove(device)
    await system.opener.close_orphans()


def _with_all_behind(device: Device) -> list[Device]:
    """The device and all that is on its buses."""
    behind = [child for bus in device.buses for child in bus.children]
    return [device, *(part for child in behind for part in _with_all_behind(child))]


async def _settle(device: Device) -> None:
    """Wait for the end of all requests to the device's disk, if there is one."""
    if device.disk is not None and device.disk.backend.root is not None:
        async with drained(device.disk.backend.node):
            pass
        await asyncio.sleep(0)  # so that jobs that go on say so before anything else happens


# ------------------------------------------------------------------------------------------------------------------ places


def _find_bus(tree: DeviceTree, request: Request) -> Bus | None:
    kind = request.model.bus
    if kind is None or kind not in BUS_KINDS:
        return None
    bus = tree.find_bus(kind, request.bus)
    if bus is None and request.bus is not None:
        raise CommandError(f"There is no bus '{request.bus}'")
    if bus is None:
        raise CommandError(f"There is no bus of the kind '{kind}' for '{request.model.name}'; add a controller first")
    if bus.kind != kind:
        raise CommandError(f"'{request.model.name}' belongs on a bus of the kind '{kind}', and '{bus.name}' is '{bus.kind}'")
    return bus


def _check_boot_index(tree: DeviceTree, request: Request) -> None:
    index = request.values.get("bootindex")
    if isinstance(index, int) and index >= 0:
        for device in tree.devices:
            if device.values.get("bootindex") == index:
                raise CommandError(f"The bootindex {index} is that of '{device.id or device.path}' already")


def _number(request: Request, name: str) -> int | None:
    """A number given for a property; None when it was left out, or is the default that stands for "any"."""
    value = request.values.get(name)
    return value if isinstance(value, int) and value not in (-1, MAX_SIZE) else None


def _anywhere(bus: Bus, request: Request) -> tuple[int, ...]:
    del bus, request
    return ()


def _unit(bus: Bus, request: Request) -> tuple[int, ...]:
    """The next unit of an IDE or floppy bus, or the one that is asked for."""
    assert bus.units is not None
    taken = {child.address[0] for child in bus.children}
    wanted = _number(request, "unit")
    unit = wanted if wanted is not None else next((n for n in range(bus.units) if n not in taken), bus.units - 1)
    if unit >= bus.units:
        raise CommandError(f"The bus '{bus.name}' has {bus.units} units; there is no unit {unit}")
    if unit in taken:
        raise CommandError(f"Unit {unit} of the bus '{bus.name}' is in use")
    return (unit,)


def _scsi_place(bus: Bus, request: Request) -> tuple[int, ...]:
    """Channel, target and logical unit."""
    channel, target, lun = (_number(request, name) for name in ("channel", "scsi-id", "lun"))
    taken = {child.address: child for child in bus.children}
    targets = bus.units or SCSI_TARGETS
    if channel is None:
        channel = 0
    if channel:
        raise CommandError(f"The bus '{bus.name}' has no channel {channel}: there is channel 0")
    if lun is not None and lun >= bus.luns:
        raise CommandError(f"A target of the bus '{bus.name}' has no logical unit {lun}: there are {bus.luns}")
    if target is not None and target >= targets:
        raise CommandError(f"The bus '{bus.name}' has no target {target}: there are {targets}")
    if target is None:
        target = next((n for n in range(targets) if (channel, n, lun or 0) not in taken), None)
        if target is None:
            raise CommandError(f"No target of the bus '{bus.name}' is free")
    if lun is None:
        lun = next(n for n in range(len(taken) + 1) if (channel, target, n) not in taken)
    place = (channel, target, lun)
    if place in taken:
        other = taken[place]
        raise CommandError(f"Logical unit {lun} of target {target} is '{other.id or other.path}' already")
    return place


def _pci_slot(bus: Bus, request: Request) -> tuple[int, ...]:
    """Slot and function; a slot can be shared by the functions of one device, whose first one has to say so."""
    wanted = _number(request, "addr")
    slots = bus.units or PCI_SLOTS
    taken = {**bus.reserved} | {child.address: child.values.get("multifunction") is True for child in bus.children}
    if wanted is None:
        used = {address[0] for address in taken}
        slot = next((n for n in range(slots) if n not in used), None)
        if slot is None:
            raise CommandError(f"No slot of the bus '{bus.name}' is free")
        return (slot, 0)
    place = (wanted // PCI_FUNCTIONS, wanted % PCI_FUNCTIONS)
    if place[0] >= slots:
        raise CommandError(f"The bus '{bus.name}' has no slot {place[0]}: there are {slots}")
    if place in taken:
        other = next((child for child in bus.children if child.address == place), None)
        owner = "the board" if other is None else f"'{other.id or other.model.name}'"
        raise CommandError(f"Slot {place[0]} of the bus '{bus.name}' is taken by {owner} (function {place[1]})")
    shared = taken.get((place[0], 0), True) if place[1] else request.values.get("multifunction") is True
    if not shared and any(address[0] == place[0] for address in taken):
        raise CommandError(f"Slot {place[0]} of the bus '{bus.name}' has one function only; give its function 0 multifunction=on")
    return place


_PLACES: Final = {
    "IDE": _unit,
    "floppy-bus": _unit,
    "SCSI": _scsi_place,
    "PCI": _pci_slot,
}


# ------------------------------------------------------------------------------------------------------------------- disks


def _check_serial(values: Mapping[str, Value], model: DeviceModel) -> None:
    if model.name == "nvme" and "serial" not in values:
        raise CommandError("An nvme device needs a 'serial'")


def _connect_disk(system: BlockSystem, device: Device, traits: DiskTraits) -> None:
    """Find the backend of the device's disk, or make one, and take what the device takes."""
    values, name = device.values, device.model.name
    _check_serial(values, device.model)
    _check_sizes(values)
    _check_geometry(values, model=name)
    backend, made = _backend_for(system, device, traits)
    settings = (backend.writethrough, backend.on_read_error, backend.on_write_error, backend.description)
    before = backend.perm, backend.shared
    try:
        backend.description = None if backend.name else f"block device '{device.disk_name}'"
        _apply(backend, values, traits, model=name)
        disk = GuestDevice(
            device.id, name, device.disk_name, traits, backend, _accounting(system, backend, values), system.run, system.emit,
            removable=traits.removable or values.get("removable") is True,
            has_tray=traits.tray or values.get("removable") is True,
            share_rw=values.get("share-rw") is True,
        )  # fmt: skip
        with Transaction() as change:
            _take(system, disk, values.get("drive"), change)
            _settle_home(backend, device, change)
    except BaseException:
        backend.writethrough, backend.on_read_error, backend.on_write_error, backend.description = settings
        if made:
            backend.close()
        elif (backend.perm, backend.shared) != before:
            backend.set_permissions(*before)
        raise
    backend.device = device.disk = disk
    backend.accounting = disk.accounting


def _settle_home(backend: BlockBackend, device: Device, change: Transaction) -> None:
    """A disk lives on the I/O thread of its controller. One that has a thread of its own lives on the main loop until its guest's
    driver starts it, which no guest does here. Raises `CommandError`: other devices keep the nodes elsewhere.
    """
    controller = None if device.bus is None else device.bus.owner
    thread = None if controller is None else controller.iothread
    if backend.root is not None:
        homes.assign(backend.root.node, thread, change)
    change.add(abort=partial(setattr, backend, "iothread", backend.iothread))
    backend.iothread = thread


def _thread_named(system: BlockSystem, name: Value | None) -> IOThread | None:
    if not name:
        return None
    thread = system.objects.iothread(str(name))
    if thread is None:
        raise DeviceNotFound(str(name))
    return thread


def _accounting(system: BlockSystem, backend: BlockBackend, values: Mapping[str, Value]) -> DeviceAccounting:
    """What goes on counting for the drive, or begins to: as the device says, or else the drive."""
    accounting = DeviceAccounting(system.clock) if backend.accounting is None else copy.copy(backend.accounting)
    if (failed := values.get("account-failed", "auto")) != "auto":
        accounting.account_failed = failed == "on"
    if (invalid := values.get("account-invalid", "auto")) != "auto":
        accounting.account_invalid = invalid == "on"
    return accounting


def _backend_for(system: BlockSystem, device: Device, traits: DiskTraits) -> tuple[BlockBackend, bool]:
    """The drive that ``drive=`` names, or a new backend; and whether it is new."""
    wanted = device.values.get("drive")
    if wanted is None and not traits.optional:
        raise CommandError(f"A device '{device.model.name}' needs a disk: give 'drive', the id of a drive or the name of a node")
    drive = next((backend for backend in system.graph.backends if wanted and backend.name == wanted), None)
    if drive is None:
        if wanted is not None and wanted not in system.graph.nodes:
            raise CommandError(f"There is neither a drive nor a node '{wanted}' for the property '{device.model.name}.drive'")
        return BlockBackend(system.graph, perm=Perm.NONE, shared=Perm.ALL), True
    if drive.device is not None:
        raise CommandError(f"The drive '{wanted}' is in use by another device")
    if drive.root is None and not traits.optional:
        raise CommandError(f"A device '{device.model.name}' needs a medium, and the drive '{wanted}' is empty")
    return drive, False


def _take(system: BlockSystem, disk: GuestDevice, drive: Value | None, change: Transaction) -> None:
    """Take permissions on the drive's node, or put the node in."""
    backend = disk.backend
    node = backend.root.node if backend.root is not None else system.graph.nodes.get(str(drive)) if not backend.name else None
    if node is not None and node.read_only and disk.traits.needs_writable:
        raise CommandError(f"Node '{node.node_name}' is read-only, and a device '{disk.model}' writes to its disk")
    if backend.root is not None or node is None:
        backend.set_permissions(*disk.permissions_on(node), change)
    else:
        disk.insert(node, change)


def _apply(backend: BlockBackend, values: Mapping[str, Value], traits: DiskTraits, *, model: str) -> None:
    """What the properties say of the backend: write cache and error policies."""
    if (cache := values.get("write-cache", "auto")) != "auto":
        backend.writethrough = cache == "off"
    if model == "floppy" and (backend.on_read_error, backend.on_write_error) != ("report", "enospc"):
        raise CommandError("A floppy drive has no error policies; leave rerror and werror out of its drive")
    if traits.error_actions:
        if (policy := values.get("rerror", "auto")) != "auto":
            backend.on_read_error = str(policy)
        if (policy := values.get("werror", "auto")) != "auto":
            backend.on_write_error = str(policy)


def _check_sizes(values: Mapping[str, Value]) -> None:
    sizes = {name: int(values.get(name, 0)) or 512 for name in ("logical_block_size", "physical_block_size")}
    for name, size in sizes.items():
        if not 512 <= size <= MAX_BLOCK_SIZE or size & (size - 1):
            raise InvalidParameter(name, f"must be a power of two from 512 to {MAX_BLOCK_SIZE}, not {size}")
    logical = sizes["logical_block_size"]
    if logical > sizes["physical_block_size"]:
        raise InvalidParameter("logical_block_size", "must not be larger than 'physical_block_size'")
    for name in ("min_io_size", "opt_io_size", "discard_granularity"):
        size = int(values.get(name, 0))
        if not 0 <= size <= MAX_SIZE:
            raise InvalidParameter(name, f"must be at most {MAX_SIZE}, not {size}")
        if size != MAX_SIZE and size % logical:
            raise InvalidParameter(name, f"must be a multiple of the logical block size of {logical} bytes, not {size}")
    if int(values.get("min_io_size", 0)) // logical > MAX_MIN_IO:
        raise InvalidParameter("min_io_size", f"must be at most {MAX_MIN_IO} logical blocks")


def _check_geometry(values: Mapping[str, Value], *, model: str) -> None:
    """Cylinders, heads and sectors: none, or all three."""
    limits = {"cyls": 65535, "heads": 16 if model == "ide-hd" else 255, "secs": 255}
    given = {name: int(values.get(name, 0)) for name in limits}
    if any(given.values()):
        for name, limit in limits.items():
            if not 1 <= given[name] <= limit:
                raise InvalidParameter(name, f"must be from 1 to {limit} when a geometry is given, not {given[name]}")
