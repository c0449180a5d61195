"""Snapshots, external and internal; each command that makes one is a transaction of one action, as in QEMU.

They first let the requests of the whole system come to an end, also when they are refused then: jobs, of other chains too,
show it as a pause.
"""

from __future__ import annotations

from functools import partial

import attrs

from qblock.actions.action import perform
from qblock.actions.internal_snapshots import InternalSnapshot, delete_internal_snapshot
from qblock.actions.snapshots import Snapshot, SnapshotFile, SnapshotToFile
from qblock.jobs.machine_snapshots import start_snapshot_delete, start_snapshot_load, start_snapshot_save
from qblock.jobs.mirror import root_node
from qblock.jobs.new_copy import NewImageMode
from qblock.monitor.command import CommandContext, command
from qblock.monitor.dialects import SYSTEM_ONLY
from qblock.monitor.lookup import device_or_node
from qblock.monitor.replies import SnapshotInfo, snapshot_info
from qblock.options import option, required
from qblock.system import BlockSystem


@attrs.frozen
class BlockdevSnapshotArguments:
    """Arguments of blockdev-snapshot."""

    node: str = required(doc="device or node to be snapshotted")
    overlay: str = required(doc="node that takes its place, opened with backing null")


@attrs.frozen
class BlockdevSnapshotSyncArguments:
    """Arguments of blockdev-snapshot-sync."""

    device: str | None = option(None, doc="device to be snapshotted")
    node_name: str | None = option(None, doc="node to be snapshotted")
    snapshot_file: str = required(doc="file of the new overlay")
    snapshot_node_name: str | None = option(None, doc="name for the overlay's node")
    format: str | None = option(None, doc="format of the overlay, qcow2 if absent")
    mode: NewImageMode | None = option(None, doc="whether the file is to be created, which is the default")


@attrs.frozen
class InternalSnapshotArguments:
    """Arguments of blockdev-snapshot-internal-sync."""

    device: str = required(doc="device or root node to be snapshotted")
    name: str = required(doc="name of the snapshot")


@attrs.frozen
class SnapshotDeleteArguments:
    """Arguments of snapshot-delete."""

    job_id: str = required(doc="id of the job")
    tag: str = required(doc="name of the snapshots")
    devices: list[str] = required(doc="node names of the disks")


@attrs.frozen
class SnapshotSaveArguments:
    """Arguments of snapshot-save and snapshot-load."""

    job_id: str = required(doc="id of the job")
    tag: str = required(doc="name of the snapshots")
    vmstate: str = required(doc="node name of the disk beside which the state of the machine is kept")
    devices: list[str] = required(doc="node names of the disks")


@attrs.frozen
class DeleteInternalSnapshotArguments:
    """Arguments of blockdev-snapshot-delete-internal-sync."""

    device: str = required(doc="device or root node that has the snapshot")
    id: str | None = option(None, doc="id of the snapshot")
    name: str | None = option(None, doc="name of the snapshot")


def snapshot_action(system: BlockSystem, args: BlockdevSnapshotArguments) -> Snapshot:
    """The action of blockdev-snapshot."""
    return Snapshot(system, node=args.node, overlay=args.overlay)


def snapshot_sync_action(system: BlockSystem, args: BlockdevSnapshotSyncArguments) -> SnapshotToFile:
    """The action of blockdev-snapshot-sync."""
    target = SnapshotFile(
        filename=args.snapshot_file,
        format=args.format or system.opener.driver_in_name(args.snapshot_file) or "qcow2",
        node_name=args.snapshot_node_name,
        create=args.mode is not NewImageMode.EXISTING,
        names_node=args.node_name is not None,
    )
    return SnapshotToFile(system, partial(device_or_node, system.graph, args.device, args.node_name), target)


def internal_snapshot_action(system: BlockSystem, args: InternalSnapshotArguments) -> InternalSnapshot:
    """The action of blockdev-snapshot-internal-sync."""
    return InternalSnapshot(system, partial(root_node, system, args.device), device=args.device, name=args.name)


@command("blockdev-snapshot", since="2.5", features=("allow-write-only-overlay",))
async def blockdev_snapshot(ctx: CommandContext, args: BlockdevSnapshotArguments) -> None:
    """Put an overlay that has been opened before on top of a node."""
    await perform(ctx.system, [snapshot_action(ctx.system, args)])


@command("blockdev-snapshot-sync", since="0.14")
async def blockdev_snapshot_sync(ctx: CommandContext, args: BlockdevSnapshotSyncArguments) -> None:
    """Make a new overlay (or take an existing file) and put it on top of a node."""
    await perform(ctx.system, [snapshot_sync_action(ctx.system, args)])


@command("blockdev-snapshot-internal-sync", since="1.7")
async def blockdev_snapshot_internal_sync(ctx: CommandContext, args: InternalSnapshotArguments) -> None:
    """Keep the disk as it is now in the image itself, as an internal snapshot."""
    await perform(ctx.system, [internal_snapshot_action(ctx.system, args)])


@command("blockdev-snapshot-delete-internal-sync", since="1.7", returns=SnapshotInfo)
async def blockdev_snapshot_delete_internal_sync(
    ctx: CommandContext, args: DeleteInternalSnapshotArguments
) -> SnapshotInfo:
    """Delete an internal snapshot by its id, its name or both, and tell what it was."""
    node = root_node(ctx.system, args.device)
    deleted = await delete_internal_snapshot(ctx.system, node, device=args.device, id=args.id, name=args.name)
    return snapshot_info(deleted)


@command("snapshot-save", since="6.0", dialects=SYSTEM_ONLY)
async def snapshot_save(ctx: CommandContext, args: SnapshotSaveArguments) -> None:
    """Start a job that keeps disks and the machine in internal snapshots; the guest is stopped meanwhile."""
    await start_snapshot_save(
        ctx.system, job_id=args.job_id, tag=args.tag, vmstate=args.vmstate, devices=args.devices
    )


@command("snapshot-load", since="6.0", dialects=SYSTEM_ONLY)
async def snapshot_load(ctx: CommandContext, args: SnapshotSaveArguments) -> None:
    """Start a job that puts disks and the machine back; when it fails, the guest stays stopped."""
    await start_snapshot_load(
        ctx.system, job_id=args.job_id, tag=args.tag, vmstate=args.vmstate, devices=args.devices
    )


@command("snapshot-delete", since="6.0", dialects=SYSTEM_ONLY)
async def snapshot_delete(ctx: CommandContext, args: SnapshotDeleteArguments) -> None:
    """Start a job that deletes the snapshots of that name; disks that have none are passed over."""
    await start_snapshot_delete(ctx.system, job_id=args.job_id, tag=args.tag, devices=args.devices)
