"""External snapshots: blockdev-snapshot and blockdev-snapshot-sync, each a transaction of one action as in QEMU.

Both first let the requests of the whole system come to an end, also when they are refused then: jobs, of other chains too,
show it as a pause.
"""

from __future__ import annotations

from functools import partial

import attrs

from qblock.actions.action import perform
from qblock.actions.snapshots import Snapshot, SnapshotFile, SnapshotToFile
from qblock.jobs.mirror import NewImageMode
from qblock.monitor.command import CommandContext, command
from qblock.monitor.lookup import device_or_node
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


@command("blockdev-snapshot", since="2.5", features=("allow-write-only-overlay",))
async def blockdev_snapshot(ctx: CommandContext, args: BlockdevSnapshotArguments) -> None:
    """Put an overlay that has been opened before on top of a node."""
    await perform(ctx.system, [snapshot_action(ctx.system, args)])


@command("blockdev-snapshot-sync", since="0.14")
async def blockdev_snapshot_sync(ctx: CommandContext, args: BlockdevSnapshotSyncArguments) -> None:
    """Make a new overlay (or take an existing file) and put it on top of a node."""
    await perform(ctx.system, [snapshot_sync_action(ctx.system, args)])
