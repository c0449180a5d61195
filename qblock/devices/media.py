"""Media of drives: trays that open and close, media that are taken out, put in and changed.

Models semantics.md section 15: devices with a tray (CD drives, removable SCSI and USB disks), floppy drives without one, and
drives without a device, in which a medium can always be changed. A tray that the guest has locked stays closed, unless it is
forced; then the guest is asked to let the medium go, which our guest does not answer to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import attrs

from qblock.backend import BlockBackend
from qblock.blockers import OpType
from qblock.devices.device import GuestDevice
from qblock.devices.drives import prepare_medium
from qblock.errors import CommandError, DeviceInUse, NodeBusy, NodeNotFound
from qblock.nodespec import MediumFlags, NodeFlags

if TYPE_CHECKING:
    from qblock.node import BlockDriverState
    from qblock.system import BlockSystem

ReadOnlyMode = Literal["retain", "read-only", "read-write"]
NO_MEDIUM_YET: Final = MediumFlags(NodeFlags(read_only=True))
"""How a drive opens its first medium, when nothing has told."""


def find_drive(system: BlockSystem, device: str | None, device_id: str | None) -> BlockBackend:
    """The drive that a command names by ``device`` (a backend's name) or ``id`` (a guest device's).

    Raises `CommandError` unless it is one of the two, and `DeviceNotFound`.
    """
    if (device is None) == (device_id is None):
        raise CommandError("Exactly one of 'device' and 'id' must be given")
    if device is not None:
        return system.graph.find_backend(device)
    return system.devices.find_disk(device_id or "").backend


def open_tray(drive: BlockBackend, *, force: bool) -> bool:
    """Open the tray, if there is one; False when the guest has locked it. Raises `CommandError` for a fixed disk."""
    disk = _removable(drive)
    if disk is None or not disk.has_tray or disk.tray_open:
        return True
    if disk.locked and not force:
        return False
    disk.move_tray(is_open=True)
    return True


def close_tray(drive: BlockBackend) -> None:
    """Close the tray, if there is one; raises `CommandError` for a fixed disk."""
    disk = _removable(drive)
    if disk is not None:
        disk.move_tray(is_open=False)


async def remove_medium(system: BlockSystem, drive: BlockBackend) -> None:
    """Take the medium out; nothing happens when there is none.

    Raises `CommandError` for a fixed disk and a closed tray, `NodeBusy` when a job is at the medium.
    """
    _refuse_closed(drive)
    if drive.root is None:
        return
    if drive.changing_medium:
        raise DeviceInUse(_name(drive), "its medium is being changed")
    node = drive.root.node
    system.graph.check_op(node, OpType.EJECT)
    drive.last_medium = MediumFlags.of(system.graph.skip_filters(node))
    drive.remove()
    await system.opener.close_orphans()


def insert_medium(system: BlockSystem, drive: BlockBackend, node: BlockDriverState) -> None:
    """Put ``node`` in; raises `CommandError` for a fixed disk, a closed tray and a full drive, `PermissionConflict`."""
    _refuse_closed(drive)
    if drive.root is not None or drive.changing_medium:
        raise CommandError(f"There is a medium in '{_name(drive)}' already; take it out first")
    if drive.device is None:
        drive.insert(node)
    else:
        drive.device.insert(node)


def insert_node(system: BlockSystem, drive: BlockBackend, node_name: str) -> None:
    """Put the node of that name in, which no other drive may have; see `insert_medium`."""
    node = system.graph.nodes.get(node_name)
    if node is None:
        raise NodeNotFound(node_name)
    for edge in node.parents:
        if isinstance(edge.parent, BlockBackend):
            raise NodeBusy(node_name, f"it is the medium of {edge.parent.describe_user()}")
    insert_medium(system, drive, node)


async def change_medium(
    system: BlockSystem, drive: BlockBackend, filename: str, *, fmt: str | None, mode: ReadOnlyMode, force: bool
) -> None:
    """Open an image, and let it take the place of the medium. When it cannot be opened, nothing has changed.

    Raises `CommandError` for a fixed disk and a locked tray, and whatever opening raises.
    """
    before = drive.last_medium or NO_MEDIUM_YET
    if drive.root is not None:
        before = MediumFlags.of(system.graph.skip_filters(drive.root.node))
    if mode != "retain":
        before = attrs.evolve(before, flags=attrs.evolve(before.flags, read_only=mode == "read-only"))
    read_only = before.flags.read_only
    node = await system.opener.open_image(
        filename, fmt=fmt, read_only=read_only, options=before.options(), inherited=before.flags
    )
    node.monitor_owned = True  # until the drive has it
    try:
        if not open_tray(drive, force=force):
            raise locked(drive)
        await remove_medium(system, drive)
        insert_medium(system, drive, node)
        prepare_medium(system, node, filename=filename, copy_on_read=before.copy_on_read)
        close_tray(drive)
    finally:
        node.monitor_owned = False
        await system.opener.close_orphans()


async def eject(system: BlockSystem, drive: BlockBackend, *, force: bool) -> None:
    """Open the tray and take the medium out; raises as these do, and `CommandError` for a locked tray."""
    if not open_tray(drive, force=force):
        raise locked(drive)
    await remove_medium(system, drive)


def locked(drive: BlockBackend) -> CommandError:
    """The error that the guest holds the medium."""
    return CommandError(f"The guest has locked the tray of '{_name(drive)}'; try again when it is open, or use force")


def _name(drive: BlockBackend) -> str:
    return drive.device.shown_name if drive.device is not None else drive.name


def _removable(drive: BlockBackend) -> GuestDevice | None:
    """The device whose medium can be changed, None for a drive without one; raises `CommandError` for a fixed disk."""
    disk: GuestDevice | None = drive.device
    if disk is not None and not disk.removable:
        raise CommandError(f"The medium of '{disk.shown_name}' cannot be changed: it is a fixed disk")
    return disk


def _refuse_closed(drive: BlockBackend) -> None:
    disk = _removable(drive)
    if disk is not None and disk.has_tray and not disk.tray_open:
        raise CommandError(f"The tray of '{disk.shown_name}' is closed; open it first")
