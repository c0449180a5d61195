"""Commands that add, remove, create and resize nodes."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from qblock import homes
from qblock.backend import BlockBackend
from qblock.blockers import OpType
from qblock.chain import whole_chain
from qblock.children import add_child, remove_child
from qblock.creating import check_create_options
from qblock.drain import drained
from qblock.driver import BackingLink, Json, SupportsBacking
from qblock.errors import CommandError, InvalidParameter, NodeBusy
from qblock.jobs.amend import start_amend
from qblock.jobs.create import start_create
from qblock.jobs.mirror import root_node
from qblock.monitor.command import CommandContext, command
from qblock.monitor.lookup import device_or_node
from qblock.nodespec import CommonOptions
from qblock.options import option, required
from qblock.permissions import Perm
from qblock.transaction import Transaction


@attrs.frozen
class NodeNameArguments:
    """Names a node."""

    node_name: str = required(doc="name of the node")


@attrs.frozen
class BlockdevReopenArguments:
    """Arguments of blockdev-reopen."""

    options: list[Mapping[str, Json]] = required(doc="complete descriptions, as of blockdev-add, of nodes by their names")


@attrs.frozen
class BlockdevChangeArguments:
    """Arguments of x-blockdev-change."""

    parent: str = required(doc="device or node whose children change")
    child: str | None = option(None, doc="name of the child that goes")
    node: str | None = option(None, doc="node that becomes a child")


@attrs.frozen
class SetIOThreadArguments(NodeNameArguments):
    """Arguments of x-blockdev-set-iothread."""

    iothread: str | None = required(doc="the I/O thread; null for the main loop", nullable=True)
    force: bool = option(False, doc="move also a node that a device, an export or a job uses directly")


@attrs.frozen
class BlockdevCreateArguments:
    """Arguments of blockdev-create."""

    job_id: str = required(doc="id of the job")
    options: Mapping[str, Json] = required(doc="the driver, and what it wants to know of the new image")


@attrs.frozen
class BlockdevAmendArguments:
    """Arguments of x-blockdev-amend."""

    job_id: str = required(doc="id of the job")
    node_name: str = required(doc="node of the image")
    options: Mapping[str, Json] = required(doc="the node's driver, and what is to change")
    force: bool = option(False, doc="allow to erase the last passphrase")


@attrs.frozen
class BlockResizeArguments:
    """Arguments of block_resize."""

    device: str | None = option(None, doc="device to resize")
    node_name: str | None = option(None, doc="node to resize")
    size: int = required(doc="new size in bytes")


@attrs.frozen
class WriteThresholdArguments:
    """Arguments of block-set-write-threshold."""

    node_name: str = required(doc="the node, usually that of an image's file")
    write_threshold: int = required(doc="threshold in bytes")


@attrs.frozen
class ChangeBackingFileArguments:
    """Arguments of change-backing-file."""

    device: str = required(doc="device or root node whose chain holds the image")
    image_node_name: str = required(doc="node of the image to be changed")
    backing_file: str = required(doc="text for the header")


@command("blockdev-add", since="2.9", open_arguments=CommonOptions)
async def blockdev_add(ctx: CommandContext, args: Mapping[str, Json]) -> None:
    """Open a node, with the nodes below it that are described along with it."""
    node = await ctx.system.opener.open_blockdev(args)
    node.monitor_owned = True


@command("blockdev-reopen", since="6.1")
async def blockdev_reopen(ctx: CommandContext, args: BlockdevReopenArguments) -> None:
    """Give open nodes new options, all of them or none: flags, what their drivers can change, other backing and file nodes."""
    await ctx.system.opener.reopen_described(args.options)


@command("blockdev-del", since="2.9")
async def blockdev_del(ctx: CommandContext, args: NodeNameArguments) -> None:
    """Close a node that blockdev-add has opened and that nothing uses."""
    await delete_node(ctx, args)


async def delete_node(ctx: CommandContext, args: NodeNameArguments) -> None:
    """What blockdev-del does; HMP's drive_del does it as well."""
    graph = ctx.system.graph
    node = graph.find_node(args.node_name)
    for edge in node.parents:
        if isinstance(edge.parent, BlockBackend):
            raise NodeBusy(node.node_name, f"{edge.parent.describe_user()} uses it")
    graph.check_op(node, OpType.DRIVE_DEL)
    if not node.monitor_owned:
        user = f", but that of {node.parents[0].parent.describe_user()}" if node.parents else ""
        raise CommandError(f"Node '{node.node_name}' is not the monitor's{user}: it goes when its last user does")
    if node.parents:
        raise NodeBusy(node.node_name, f"{node.parents[0].parent.describe_user()} uses it")
    node.monitor_owned = False
    await ctx.system.opener.close_orphans()


@command("x-blockdev-change", since="2.7", features=("unstable",))
async def blockdev_change(ctx: CommandContext, args: BlockdevChangeArguments) -> None:
    """Give a quorum one more child, or take one away."""
    graph = ctx.system.graph
    parent = graph.lookup(args.parent)
    if (args.child is None) is (args.node is None):
        raise CommandError("Either 'child' or 'node' must be given: which child goes, or which node becomes one")
    async with drained(parent):
        if args.node is not None:
            add_child(graph, parent, graph.find_node(args.node))
        else:
            assert args.child is not None
            remove_child(graph, parent, args.child)
    await ctx.system.opener.close_orphans()


@command("x-blockdev-set-iothread", since="2.12", features=("unstable",))
async def blockdev_set_iothread(ctx: CommandContext, args: SetIOThreadArguments) -> None:
    """Move a node, with all nodes that it is connected to, to an I/O thread; a guest device keeps them where they are."""
    system = ctx.system
    node = system.graph.find_node(args.node_name)
    for edge in node.parents:
        if isinstance(edge.parent, BlockBackend) and not args.force:
            raise NodeBusy(node.node_name, f"{edge.parent.describe_user()} uses it; 'force' moves it all the same")
    thread = None if args.iothread is None else system.objects.iothread(args.iothread)
    if thread is None and args.iothread is not None:
        raise CommandError(f"There is no I/O thread '{args.iothread}'")
    if node.iothread is not thread:
        async with drained(node):
            with Transaction() as change:
                homes.assign(node, thread, change)


@command("blockdev-create", since="3.0")
async def blockdev_create(ctx: CommandContext, args: BlockdevCreateArguments) -> None:
    """Start a job that makes a new image."""
    options = dict(args.options)
    driver = options.pop("driver", None)
    if not isinstance(driver, str):
        raise InvalidParameter("options.driver", "is missing" if driver is None else "must be a string")
    check_create_options(ctx.system.opener, driver, options)
    await start_create(ctx.system, job_id=args.job_id, options=args.options)


@command("x-blockdev-amend", since="5.1", features=("unstable",))
async def blockdev_amend(ctx: CommandContext, args: BlockdevAmendArguments) -> None:
    """Start a job that changes how an open image is stored: the key slots of its encryption."""
    await start_amend(
        ctx.system, job_id=args.job_id, node_name=args.node_name, options=args.options, force=args.force
    )


@command("block_resize", since="0.14")
async def block_resize(ctx: CommandContext, args: BlockResizeArguments) -> None:
    """Change the size of a node; shrinking cuts off without asking."""
    graph = ctx.system.graph
    node = device_or_node(graph, args.device, args.node_name)
    if args.size < 0:
        raise InvalidParameter("size", "must not be negative")
    graph.check_op(node, OpType.RESIZE)
    backend = BlockBackend(graph, perm=Perm.RESIZE, shared=Perm.ALL, description="block_resize")
    try:
        backend.insert(node)
        backend.disable_queuing = True
        async with drained(node):
            await backend.truncate(args.size)
    finally:
        backend.close()
        for listener in ctx.hub.on_resize:
            listener()


@command("block-set-write-threshold", since="2.3")
async def block_set_write_threshold(ctx: CommandContext, args: WriteThresholdArguments) -> None:
    """Have BLOCK_WRITE_THRESHOLD sent once when a write ends above a threshold; 0 takes the threshold away.

    A negative one is as much below 2**64, as in QEMU: no write gets there.
    """
    ctx.system.graph.find_node(args.node_name).write_threshold = args.write_threshold % (1 << 64)


@command("change-backing-file", since="2.1")
async def change_backing_file(ctx: CommandContext, args: ChangeBackingFileArguments) -> None:
    """Rewrite what an image's header names as its backing file; the graph stays as it is."""
    system = ctx.system
    top = root_node(system, args.device)
    image = system.graph.find_node(args.image_node_name)
    if not any(node is image for node in whole_chain(top)):
        raise CommandError(f"'{args.image_node_name}' is not in the chain of '{args.device}'")
    if not isinstance(image.driver, SupportsBacking) or image.backing is None:
        raise CommandError(f"'{args.image_node_name}' has no backing file that could be changed")
    system.graph.check_op(top, OpType.CHANGE)
    was_read_only = image.read_only
    if was_read_only:
        await system.opener.reopen(image, read_only=False)
    try:
        async with drained(image):
            link = BackingLink(args.backing_file, image.driver.name) if args.backing_file else None
            await image.driver.change_backing_link(link)
    finally:
        if was_read_only:
            await system.opener.reopen(image, read_only=True)
