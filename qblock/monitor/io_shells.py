"""HMP's ``qemu-io``: commands of qemu-io on the disks of a running machine.

Models hmp-block.md section 1. What it prints goes to the program's standard output, what is refused to the monitor. Requests
of aio commands on a drive or a device are still under way when the command is done, until they have been answered or are let
go from a breakpoint. A node gets a backend for the one command, at whose end everything on the node comes to rest: jobs pause
there, as they do in QEMU. An aio request that could not begin by then, because somebody holds the node at rest (a job that
waits for job-finalize), finds no medium any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from qblock.backend import BlockBackend
from qblock.drain import pause_above
from qblock.errors import NodeNotFound
from qblock.iocmd.commands import COMMANDS
from qblock.iocmd.shell import IoShell
from qblock.permissions import ANY_WRITE, Perm

if TYPE_CHECKING:
    from qblock.system import BlockSystem


@attrs.define(eq=False)
class _Visit:
    """A shell on a backend that is somebody else's; ``commands`` are being executed."""

    shell: IoShell
    commands: int = 0


class IoShells:
    """A shell for each backend on which commands are executed, or have left requests under way. ``out`` gets what they print."""

    def __init__(self, system: BlockSystem, out: Callable[[str], None]) -> None:
        self._system = system
        self._out = out
        self._visits: dict[BlockBackend, _Visit] = {}

    async def run(self, name: str, line: str, *, is_qdev: bool, complain: Callable[[str], None]) -> bool:
        """Execute ``line`` on the drive or node ``name``, or (``is_qdev``) on the guest device of that id or path.

        Returns whether it has done what it says; ``complain`` says what was refused. Raises `CommandError` when there is
        nothing of that name.
        """
        backend = self._find_backend(name, is_qdev=is_qdev)
        if backend is None:
            return await self._run_on_node(name, line, complain)
        visit = self._visits.get(backend)
        if visit is None:
            shell = self._shell(backend, lambda: self._look_after(backend))
            visit = self._visits[backend] = _Visit(shell)
        visit.commands += 1
        try:
            return await visit.shell.execute(line, complain=complain) == 0
        finally:
            visit.commands -= 1
            self._look_after(backend)

    async def _run_on_node(self, name: str, line: str, complain: Callable[[str], None]) -> bool:
        system = self._system
        node = system.graph.find_node(name)
        backend = BlockBackend(system.graph, perm=Perm.NONE, shared=Perm.ALL, description="the qemu-io command")
        try:
            backend.insert(node)
            shell = self._shell(backend, lambda: None)
            done = await shell.execute(line, complain=complain)
            if backend.quiesce_counter:
                backend.remove()
            await shell.finish_all()
            await pause_above(node, times=2)
        finally:
            backend.close()
        return done == 0

    def _shell(self, backend: BlockBackend, on_answer: Callable[[], None]) -> IoShell:
        def start(request: Any) -> asyncio.Task[None]:
            task = system.later(request, "an aio request of qemu-io")
            task.add_done_callback(lambda _: on_answer())
            return task

        system = self._system
        return IoShell(
            backend, system.clock, self._out, self._out, start, COMMANDS, "qemu-io", system.opener, elsewhere=self._jobs
        )

    def _jobs(self) -> list[asyncio.Future[Any]]:
        """The ends of all jobs."""
        return [job.concluded for job in self._system.jobs.jobs if not job.concluded.done()]

    def _look_after(self, backend: BlockBackend) -> None:
        """When nothing is left to do on ``backend``, forget the shell."""
        visit = self._visits.get(backend)
        if visit is None or visit.commands or visit.shell.pending:
            return
        del self._visits[backend]
        _keep_permissions(backend)

    def _find_backend(self, name: str, *, is_qdev: bool) -> BlockBackend | None:
        """The backend of a drive or of a guest device; None when ``name`` is a node."""
        if is_qdev:
            return self._system.devices.find_disk(name).backend
        for backend in self._system.graph.backends:
            if name and backend.name == name:
                return backend
        if name not in self._system.graph.nodes:
            raise NodeNotFound(name, detail="There is neither a device nor a block node named")
        return None


def _keep_permissions(backend: BlockBackend) -> None:
    """What a command has taken stays taken, as in QEMU; but its ``reopen`` may have taken writing away, or brought it back."""
    node = backend.root.node if backend.root is not None else None
    perm, shared = backend.perm, backend.shared
    if backend.device is not None:
        takes, shares = backend.device.permissions_on(node)
        perm, shared = perm | takes, shared & shares
    if node is not None and node.read_only:
        perm &= ~(ANY_WRITE | Perm.RESIZE)
    if (backend.perm, backend.shared) != (perm, shared):
        backend.set_permissions(perm, shared)
