"""External snapshots: blockdev-snapshot and blockdev-snapshot-sync.

Models semantics.md section 10.5 with QEMU's order of checks. Afterwards the old image is read-only, the overlay has taken its
place above it, and only blockdev-snapshot-sync has written a header. Both first let the requests of the whole system come to an
end, also when they are refused then: jobs, of other chains too, show it as a pause.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import attrs

from qblock.blockers import OpType
from qblock.creating import create_image_file
from qblock.drain import drain_all, drained
from qblock.driver import BackingLink, SupportsBacking
from qblock.errors import CommandError, DuplicateName, InvalidParameter, QBlockError
from qblock.jobs.mirror import NewImageMode
from qblock.monitor.command import CommandContext, command
from qblock.monitor.lookup import device_or_node
from qblock.node import BlockDriverState
from qblock.options import option, required
from qblock.requests import flush
from qblock.system import BlockSystem
from qblock.transaction import Transaction


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


@command("blockdev-snapshot", since="2.5", features=("allow-write-only-overlay",))
async def blockdev_snapshot(ctx: CommandContext, args: BlockdevSnapshotArguments) -> None:
    """Put an overlay that has been opened before on top of a node."""
    graph = ctx.system.graph
    await _drain_all(ctx.system)
    node = graph.lookup(args.node)
    async with _at_rest(ctx.system, node):
        graph.check_op(node, OpType.EXTERNAL_SNAPSHOT)
        await _flush(node)
        overlay = graph.lookup(args.overlay)
        await put_on_top(ctx.system, node, overlay)


@command("blockdev-snapshot-sync", since="0.14")
async def blockdev_snapshot_sync(ctx: CommandContext, args: BlockdevSnapshotSyncArguments) -> None:
    """Make a new overlay (or take an existing file) and put it on top of a node."""
    system = ctx.system
    await _drain_all(system)
    node = device_or_node(system.graph, args.device, args.node_name)
    async with _at_rest(system, node):
        await _snapshot_to_file(system, node, args)


async def _snapshot_to_file(system: BlockSystem, node: BlockDriverState, args: BlockdevSnapshotSyncArguments) -> None:
    graph = system.graph
    graph.check_op(node, OpType.EXTERNAL_SNAPSHOT)
    await _flush(node)
    if args.node_name is not None and args.snapshot_node_name is None:
        raise InvalidParameter("snapshot-node-name", "is needed when a node is named, since it will be below")
    if args.snapshot_node_name is not None and args.snapshot_node_name in graph.nodes:
        raise DuplicateName("node", args.snapshot_node_name)
    fmt = args.format or "qcow2"
    if args.mode is not NewImageMode.EXISTING:
        await _create_overlay(system, args.snapshot_file, fmt, node)
    overlay = await system.opener.open_image(
        args.snapshot_file, fmt=fmt, read_only=node.read_only, backing=False, node_name=args.snapshot_node_name
    )
    overlay.monitor_owned = True  # until it has users of its own
    try:
        await put_on_top(system, node, overlay)
    finally:
        overlay.monitor_owned = False
        await system.opener.close_orphans()


async def _drain_all(system: BlockSystem) -> None:
    await drain_all(system.graph)
    await system.jobs.resumed()


@contextlib.asynccontextmanager
async def _at_rest(system: BlockSystem, node: BlockDriverState) -> AsyncIterator[None]:
    """A drained section; when it has ended, the jobs go on before the command is answered."""
    try:
        async with drained(node):
            yield
    finally:
        await system.jobs.resumed()


async def _flush(node: BlockDriverState) -> None:
    if not node.read_only:
        await flush(node)


async def put_on_top(system: BlockSystem, node: BlockDriverState, overlay: BlockDriverState) -> None:
    """Make ``overlay`` take the place of ``node``, which becomes its read-only backing image."""
    if overlay.parents:
        raise CommandError(f"The overlay '{overlay.node_name}' is in use: {overlay.parents[0].parent.describe_user()}")
    if overlay.backing is not None:
        raise CommandError(f"The overlay '{overlay.node_name}' has a backing image already; open it with backing null")
    if not overlay.driver.supports_backing:
        raise CommandError(f"The overlay '{overlay.node_name}' ({overlay.driver.name}) cannot have a backing image")
    async with drained(node, overlay):
        system.graph.check_op(node, OpType.EXTERNAL_SNAPSHOT)
        with Transaction() as change:
            system.graph.append(overlay, onto=node, change=change)
    if not node.read_only:
        with contextlib.suppress(QBlockError):  # somebody else may still write to it, which is that one's affair
            await system.opener.reopen(node, read_only=True)


async def _create_overlay(system: BlockSystem, filename: str, fmt: str, node: BlockDriverState) -> None:
    """An image whose header names ``node``'s image as its backing file."""
    image = system.graph.skip_filters(node)
    name = image.driver.filename()
    if name is None:
        raise CommandError(
            f"Node '{image.node_name}' has no plain file name for the overlay's header; use blockdev-snapshot"
        )
    driver = system.registry.get(fmt)
    if not driver.supports_backing or not issubclass(driver, SupportsBacking):
        raise CommandError(f"Images of format '{fmt}' cannot have a backing file")
    link = BackingLink(name, image.driver.name)
    await create_image_file(system.opener, filename, fmt, size=node.length, backing=link, announce=system.announce)
