"""What HMP does with drives and QMP has no command for: ``drive_add``, ``drive_del``, ``qemu-io``.

Models hmp-block.md section 1. A ``drive_add -n`` is blockdev-add with key=value options, whose values are strings.
"""

from __future__ import annotations

from qblock.backend import BlockBackend
from qblock.chain import chain_next
from qblock.committing import commit_in_use
from qblock.errors import CommandError, DeviceNotFound, NodeNotFound, QBlockError
from qblock.iocmd.commands import run_command
from qblock.monitor.command import CommandContext
from qblock.monitor.commands.blockdev import NodeNameArguments, delete_node
from qblock.options import parse_keyval
from qblock.permissions import ANY_WRITE, Perm


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


async def run_io(context: CommandContext, name: str, line: str, *, is_qdev: bool) -> bool:
    """Run a qemu-io command on a device or a node; what it prints goes to the program's standard output.

    Returns whether it has done what it says. A node gets a backend for as long as the command takes. Raises `CommandError`
    when there is nothing of that name.
    """
    system = context.system
    backend = find_backend(context, name, is_qdev=is_qdev)
    temporary = None
    if backend is None:
        node = system.graph.find_node(name)
        backend = temporary = BlockBackend(
            system.graph, perm=Perm.NONE, shared=Perm.ALL, description="the qemu-io command"
        )
        try:
            temporary.insert(node)
        except BaseException:
            temporary.close()
            raise
    perm, shared = backend.perm, backend.shared
    try:
        return await run_command(backend, line, context.hub.output, clock=system.env.clock, opener=system.opener) == 0
    finally:
        if temporary is not None:
            temporary.close()
        else:
            _give_back(backend, perm, shared)


def _give_back(backend: BlockBackend, perm: Perm, shared: Perm) -> None:
    """Hold what was held before the command; but its ``reopen`` may have taken writing away for good, or have brought it back."""
    node = backend.root.node if backend.root is not None else None
    if backend.device is not None:
        perm, shared = backend.device.permissions_on(node)
    if node is not None and node.read_only:
        perm &= ~(ANY_WRITE | Perm.RESIZE)
    if (backend.perm, backend.shared) != (perm, shared):
        backend.set_permissions(perm, shared)


def find_backend(context: CommandContext, name: str, *, is_qdev: bool) -> BlockBackend | None:
    """The backend of the drive or (``is_qdev``) of the guest device ``name``; None when ``name`` is a node."""
    system = context.system
    if is_qdev:
        return system.devices.find_disk(name).backend
    for backend in system.graph.backends:
        if name and backend.name == name:
            return backend
    if name not in system.graph.nodes:
        raise NodeNotFound(name, detail="There is neither a device nor a block node named")
    return None
