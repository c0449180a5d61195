"""The BlockSystem: one block layer, which owns everything that lives in it.

It stands where QEMU has process-wide variables: the graph, the drivers, the jobs, the event bus, the clock, the threads. Two
systems in one process do not know each other. Closing one cancels its jobs, flushes and closes its nodes and ends its
threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import random as random_module
import sys
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs

from qblock.backend import IO_OK
from qblock.blockers import OpType
from qblock.clock import Clock, RealClock
from qblock.devices.board import Board
from qblock.devices.drives import DriveOptions, attach_drive, parse_drive
from qblock.devices.plugging import let_go
from qblock.devices.tree import DeviceTree
from qblock.drain import drain_all
from qblock.driver import Json, SupportsBreakpoints
from qblock.environment import Environment
from qblock.errors import NodeBusy, QBlockError
from qblock.graph import Graph
from qblock.jobs.runner import JobRunner
from qblock.objects import ObjectTable
from qblock.opening import Opener, OpenPolicy
from qblock.registry import DriverRegistry
from qblock.requests import flush
from qblock.runstate import RunControl, RunState
from qblock.streams import tell

if TYPE_CHECKING:
    from qblock.backend import BlockBackend

IO_THREADS: Final = 16
"""Threads for work that the loop's thread must not wait for."""

EventListener: TypeAlias = Callable[[str, Mapping[str, Json], tuple[int, int]], None]
"""Gets an event's name, its data and its wall-clock time in seconds and microseconds."""


@attrs.define(eq=False)
class EventBus:
    """Passes events to all who listen, in the order in which they began to."""

    _clock: Clock
    _listeners: list[EventListener] = attrs.field(factory=list, init=False)

    def subscribe(self, listener: EventListener) -> Callable[[], None]:
        """Call ``listener`` for every event from now on; call the result to end that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def emit(self, name: str, data: Mapping[str, Json]) -> None:
        """Tell everybody now; listeners must not raise."""
        when = self._clock.wall()
        for listener in tuple(self._listeners):
            listener(name, data, when)


def _warn_on_stderr(text: str) -> None:
    tell(f"qblock: warning: {text}\n", sys.stderr)


def _keep_silent(text: str) -> None:
    """A library prints nothing of its own accord."""


@attrs.define(eq=False)
class BlockSystem:
    """See the module. Make one with `create`; use it as an async context manager, or call `close` at the end."""

    env: Environment
    events: EventBus
    graph: Graph
    registry: DriverRegistry
    opener: Opener
    jobs: JobRunner
    objects: ObjectTable
    announce: Callable[[str], None]
    """Told in a line which image file a command is making; QEMU prints that to its standard output."""
    run: RunControl
    devices: DeviceTree
    board: Board = attrs.field(factory=Board)
    _owns_executor: bool = False
    _changes: set[asyncio.Task[None]] = attrs.field(factory=set, init=False)

    @classmethod
    def create(
        cls,
        *,
        clock: Clock | None = None,
        policy: OpenPolicy | None = None,
        random: random_module.Random | None = None,
        executor: Executor | None = None,
        warn: Callable[[str], None] = _warn_on_stderr,
        announce: Callable[[str], None] = _keep_silent,
        fatal: Callable[[str], None] | None = None,
    ) -> BlockSystem:
        """A new, empty system: by default on real time, with threads of its own, opening nothing that images only mention.

        ``fatal`` ends the program, see `Environment`.
        """
        clock = clock if clock is not None else RealClock()
        events = EventBus(clock)
        threads = executor or ThreadPoolExecutor(max_workers=IO_THREADS, thread_name_prefix="qblock-io")
        random = random or random_module.Random()
        graph = Graph(random=random)
        env = Environment(
            clock=clock, executor=threads, random=random, emit=events.emit, warn=warn, find_node=graph.lookup
        )
        if fatal is not None:
            env = attrs.evolve(env, fatal=fatal)
        registry = DriverRegistry()
        opener = Opener(graph, registry, env, policy or OpenPolicy.deny())
        jobs = JobRunner(graph, clock, events.emit, opener, trace=env.trace)
        table = ObjectTable(env)
        run, devices = RunControl(events.emit), DeviceTree(events.emit)
        system = cls(
            env, events, graph, registry, opener, jobs, table, announce, run, devices, owns_executor=executor is None
        )  # fmt: skip
        run.before_resume.append(system._forget_errors)
        run.on_change.append(system._let_devices_go)
        run.on_change.append(system._rest_after_error)
        run.on_reset.append(devices.reset)
        return system

    @property
    def clock(self) -> Clock:
        """The clock that everything in the system goes by."""
        return self.env.clock

    def emit(self, name: str, data: Mapping[str, Json]) -> None:
        """Send an event to all listeners."""
        self.events.emit(name, data)

    # -------------------------------------------------------------------------------------------------------- devices

    async def drive_add(
        self, options: str | Mapping[str, Json], *, default_interface: str = "none", connect: bool = True
    ) -> BlockBackend:
        """Add a drive as ``-drive`` does; ``options`` is its ``key=value`` text or the same as a nested object.

        Gives the drive's backend; ``connect``: a virtio disk comes with it. Raises `CommandError` and whatever opening its file
        raises; nothing stays then.
        """
        if connect and not self.board.built:
            self.board.build(self)
        drive: DriveOptions = parse_drive(options, default_interface=default_interface)
        return await attach_drive(self, drive, connect=connect)

    async def drive_del(self, name: str) -> None:
        """Remove a drive: the medium goes away; a device that had it stays behind, empty. Raises `DeviceNotFound`
        and `NodeBusy`."""
        backend = self.graph.find_backend(name)
        if backend.changing_medium:
            raise NodeBusy(name, "its medium is being changed")
        if backend.root is not None:
            self.graph.check_op(backend.root.node, OpType.DRIVE_DEL)
        backend.remove()
        if backend.device is None:
            backend.close()
        else:
            backend.name = ""
            backend.on_read_error = backend.on_write_error = "report"
        await self.opener.close_orphans()

    def _forget_errors(self) -> None:
        """What has stopped the guest is tried again: the I/O status of all drives is ok. A disk without a drive keeps it."""
        for backend in self.graph.backends:
            if backend.name:
                backend.io_status = IO_OK

    def _rest_after_error(self, running: bool) -> None:
        """A machine that an error has stopped comes to rest as one that is stopped by a command."""
        if not running and self.run.state is RunState.IO_ERROR:
            self.later(self.come_to_rest(), "the machine comes to rest after an error")

    def _let_devices_go(self, running: bool) -> None:
        """A guest that runs lets go of what was told to leave."""
        if running and self.devices.leaving:
            self.later(let_go(self), "the guest lets devices go")

    # -------------------------------------------------------------------------------------------------------- objects

    async def add_object(self, options: Mapping[str, Json], *, strings: bool = False) -> None:
        """Make an object as ``object-add`` and ``--object`` do; see `objects.ObjectTable.add`."""
        self.objects.add(options, strings=strings)

    # ----------------------------------------------------------------------------------------------------------- the end

    async def uninterrupted(self, change: Coroutine[Any, Any, None], name: str) -> None:
        """Wait for ``change``, which must not stop half-way: it goes on if the caller is cancelled, and `close` waits for it."""
        await asyncio.shield(self.later(change, name))

    def later(self, change: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Have ``change`` happen soon: not before the caller lets the loop go on, and `close` waits for it."""
        task = self.jobs.spawn(change, name)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return task

    async def come_to_rest(self) -> None:
        """Let all requests under way end, which jobs show as a short pause, and make all nodes durable. A node that cannot be
        flushed is left so: who needs that flushes it, and is told.
        """
        await drain_all(self.graph)
        for node in list(self.graph.nodes.values()):
            if not node.closed:
                with contextlib.suppress(QBlockError, OSError):
                    await flush(node)

    def forget_breakpoints(self) -> None:
        """Let all requests go on that blkdebug holds, and hold no others: nobody is left who could."""
        for node in self.graph.nodes.values():
            if isinstance(node.driver, SupportsBreakpoints):
                node.driver.breakpoints.clear()

    async def close(self) -> None:
        """Cancel all jobs, flush and close all nodes, end the threads. May be called again."""
        self.run.end()
        self.forget_breakpoints()
        await self.jobs.cancel_all()
        while self._changes:
            await asyncio.wait(self._changes)
        for backend in list(self.graph.backends):
            backend.close()
        for node in self.graph.nodes.values():
            node.monitor_owned = False
        await self.opener.close_orphans()
        self.env.fdsets.close()
        if self._owns_executor:
            self.env.executor.shutdown(wait=True)

    async def __aenter__(self) -> BlockSystem:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<BlockSystem {len(self.graph.nodes)} nodes, {len(self.jobs.jobs)} jobs, {self.clock.kind} time>"
