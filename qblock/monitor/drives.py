"""What HMP does with drives and QMP has no command for: ``drive_add``, ``drive_del``, ``commit``.

Models hmp-block.md section 1. A ``drive_add -n`` is blockdev-add with key=value options, whose values are strings.
"""

from __future__ import annotations

from qblock.chain import chain_next
from qblock.committing import commit_in_use
from qblock.errors import CommandError, DeviceNotFound, QBlockError
from qblock.monitor.command import CommandContext
from qblock.monitor.commands.blockdev import NodeNameArguments, delete_node
from qblock.options import parse_keyval


class NodeNameMissing(CommandError):
    """``drive_add -n`` without a node-name."""

    def __init__(self) -> None:
        super().__init__("'node-name' needs to be specified")


class CommitFailed(CommandError):
    """HMP's ``commit`` of ``name`` did not work."""

    def __init__(self, name: str, reason: QBlockError) -> None:
        super().__init__(f"'commit' error for '{name}': {reason}")


async def add_node(context: CommandContext, text: str) -> None:
    """Open a node that the monitor owns from key=value options; raises `CommandError` and what opening raises."""
    options = parse_keyval(text)
    if "node-name" not in options:
        raise NodeNameMissing
    node = await context.system.opener.open_blockdev(options, strings=True)
    node.monitor_owned = True


async def delete(context: CommandContext, name: str) -> None:
    """Take a drive away by name, otherwise delete the node of that name; raises `DeviceNotFound` when there is neither."""
    system = context.system
    if any(backend.name == name for backend in system.graph.backends):
        await system.drive_del(name)
    elif name in system.graph.nodes:
        await delete_node(context, NodeNameArguments(node_name=name))
    else:
        raise DeviceNotFound(name)


async def commit(context: CommandContext, name: str) -> None:
    """Commit the active layer of the drive ``name`` into its backing file, or of ``all`` drives that have one.

    Raises `DeviceNotFound`, and `CommitFailed` for whatever stands against it.
    """
    graph = context.system.graph
    if name == "all":
        chosen = [backend for backend in graph.backends if backend.root is not None and chain_next(backend.root.node)]
    else:
        chosen = [graph.find_backend(name)]
    try:
        for backend in chosen:
            if backend.root is None:
                raise CommandError(f"Device '{name}' has no medium")
            await commit_in_use(context.system.opener, backend)
    except QBlockError as error:
        raise CommitFailed(name, error) from error


async def delete_with_jobs(context: CommandContext, name: str) -> None:
    """As `delete` for a drive, whose jobs are cancelled first (rfc-2012.md); returns when all of it is done.

    What the guest asks for meanwhile waits, and then finds no medium: a mirror in sync leaves two equal images behind.
    Raises `DeviceNotFound` and `NodeBusy`.
    """
    system = context.system
    backend = system.graph.find_backend(name)
    backend.quiesce()
    try:
        for job in system.jobs.jobs.copy():
            if job.id == name:
                await system.jobs.cancel_sync(job)
        await system.drive_del(name)
    finally:
        backend.resume()
