"""Commands that move trays and change media."""

from __future__ import annotations

import attrs

from qblock.devices import media
from qblock.devices.media import ReadOnlyMode
from qblock.monitor.command import CommandContext, command
from qblock.monitor.dialects import SYSTEM_ONLY
from qblock.options import option, required


@attrs.frozen
class TrayArguments:
    """Names a drive, by its name or by its guest device."""

    device: str | None = option(None, doc="name of the drive")
    id: str | None = option(None, doc="id or path of the guest device")


@attrs.frozen
class OpenTrayArguments(TrayArguments):
    """Arguments of blockdev-open-tray and eject."""

    force: bool = option(False, doc="also when the guest has locked the tray")


@attrs.frozen
class DeviceIdArguments:
    """Names a guest device."""

    id: str = required(doc="id or path of the guest device")


@attrs.frozen
class InsertMediumArguments(DeviceIdArguments):
    """Arguments of blockdev-insert-medium."""

    node_name: str = required(doc="node that becomes the medium")


@attrs.frozen
class ChangeMediumArguments(OpenTrayArguments):
    """Arguments of blockdev-change-medium."""

    filename: str = required(doc="the new image")
    format: str | None = option(None, doc="its format; probed when absent")
    read_only_mode: ReadOnlyMode = option("retain", doc="whether it may be written to: as the last one, or not, or yes")


@command("blockdev-open-tray", since="2.5", dialects=SYSTEM_ONLY)
async def blockdev_open_tray(ctx: CommandContext, args: OpenTrayArguments) -> None:
    """Open a tray; a guest that has locked it is asked to let go."""
    media.open_tray(media.find_drive(ctx.system, args.device, args.id), force=args.force)


@command("blockdev-close-tray", since="2.5", dialects=SYSTEM_ONLY)
async def blockdev_close_tray(ctx: CommandContext, args: TrayArguments) -> None:
    """Close a tray."""
    media.close_tray(media.find_drive(ctx.system, args.device, args.id))


@command("blockdev-remove-medium", since="2.12", dialects=SYSTEM_ONLY)
async def blockdev_remove_medium(ctx: CommandContext, args: DeviceIdArguments) -> None:
    """Take the medium out of an open tray; a node of the monitor's stays."""
    await media.remove_medium(ctx.system, media.find_drive(ctx.system, None, args.id))


@command("blockdev-insert-medium", since="2.12", dialects=SYSTEM_ONLY)
async def blockdev_insert_medium(ctx: CommandContext, args: InsertMediumArguments) -> None:
    """Put a node into an open, empty tray."""
    media.insert_node(ctx.system, media.find_drive(ctx.system, None, args.id), args.node_name)


@command("blockdev-change-medium", since="2.5", dialects=SYSTEM_ONLY)
async def blockdev_change_medium(ctx: CommandContext, args: ChangeMediumArguments) -> None:
    """Open an image, and put it in the place of the medium."""
    drive = media.find_drive(ctx.system, args.device, args.id)
    await media.change_medium(
        ctx.system, drive, args.filename, fmt=args.format, mode=args.read_only_mode, force=args.force
    )


@command("eject", since="0.14", dialects=SYSTEM_ONLY)
async def eject(ctx: CommandContext, args: OpenTrayArguments) -> None:
    """Open the tray and take the medium out."""
    await media.eject(ctx.system, media.find_drive(ctx.system, args.device, args.id), force=args.force)
