"""Machines for tests: on virtual time, told by plain function calls, in the test's own thread or behind a real socket.

`LocalMachine` runs only inside its methods: nothing happens between two lines of a test, and the same test takes the
same course every time. `ServedMachine` runs in a thread of its own and serves QMP on a unix socket, for synchronous
code that wants to connect; its time, too, passes only when the test says so. Durations are nanoseconds, or text such
as ``"10s"``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs

from qblock.clock import LoopClock
from qblock.errors import QBlockError
from qblock.monitor.client import QmpClient, QmpEvent
from qblock.monitor.eventlog import MachineEvent
from qblock.monitor.loopthread import LoopThread
from qblock.monitor.machine import Machine, MachineOptions, qmp_socket
from qblock.testing.simloop import SimLoop
from qblock.units import SECOND_NS, format_duration, parse_duration

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.testing.schedules import Schedule

T = TypeVar("T")
Duration = int | str

_ENOUGH_NS: Final = 3600 * SECOND_NS
_REAL_SECONDS: Final = 20.0
"""How long a served machine waits in real time for what the code under test should do."""


class TestMachineError(QBlockError, AssertionError):
    """What a test waited for did not happen."""

    __test__ = False  # pytest should not take this for a test


def as_ns(duration: Duration) -> int:
    """Nanoseconds from nanoseconds or text."""
    return parse_duration(duration) if isinstance(duration, str) else duration


async def _open(options: MachineOptions, *, loop: SimLoop) -> Machine:
    return await Machine.open(options, clock=LoopClock(), virtual_time=loop)


class LocalMachine:
    """A machine on virtual time that runs only while one of its methods does. A context manager.

    ``options`` may be given (disks and the like); otherwise disks come by `add_drive` or QMP.
    """

    def __init__(self, schedule: Schedule | None = None, options: MachineOptions | None = None) -> None:
        self._loop = SimLoop(schedule)
        self._runner = asyncio.Runner(loop_factory=lambda: self._loop)
        self._options = options or MachineOptions(seed=0)
        self.machine: Machine
        self.qmp: LocalQmp

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the machine's loop; time passes as far as it waits."""
        try:
            return self._runner.run(work)
        except BaseException as error:
            error.add_note(
                f"schedule: {self._loop.schedule.token()} (virtual time {format_duration(self._loop.now_ns)})"
            )
            raise

    @property
    def now_ns(self) -> int:
        """Virtual nanoseconds since the machine was made."""
        return self._loop.now_ns

    def advance(self, duration: Duration) -> None:
        """Let so much time pass, with all that falls due in it."""
        self.run(self._loop.advance(as_ns(duration)))

    def add_drive(self, path: str | Path, *, device: str = "virtio0", fmt: str = "qcow2") -> None:
        """Attach the image at ``path`` to the machine as the disk ``device``, as -drive does."""
        self.run(self.machine.add_drive(drive_text(path, device, fmt)))

    def guest_write(self, device: str, offset: int, length: int, pattern: int) -> None:
        """The guest writes ``length`` bytes of ``pattern``."""
        self.run(self.machine.guest_write(device, offset, length, pattern))

    def guest_read(self, device: str, offset: int, length: int) -> bytes:
        """The guest reads."""
        return self.run(self.machine.guest_read(device, offset, length))

    def __enter__(self) -> LocalMachine:
        self.machine = self.run(_open(self._options, loop=self._loop))
        self.qmp = LocalQmp(self, self.run(QmpClient.in_process(self.machine.hub)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.run(self.qmp.client.close())
            self.run(self.machine.close())
        finally:
            self._runner.close()


@attrs.frozen
class LocalQmp:
    """The QMP client of a `LocalMachine`, as plain functions. ``client`` is the asyncio one beneath."""

    local: LocalMachine
    client: QmpClient

    def execute(self, command: str, arguments: Mapping[str, Json] | None = None, **members: Json) -> Json:
        """Execute a command (keywords' ``_`` stand for ``-``); raises `QmpError`. What follows at once has happened
        then.
        """
        return self.local.run(self._settled(self.client.execute(command, arguments, **members)))

    async def _settled(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        finally:
            await self.local.machine.settle()

    def hmp(self, line: str) -> str:
        """The output of an HMP command."""
        return self.local.run(self._settled(self.client.hmp(line)))

    def wait_event(self, *names: str, within: Duration = _ENOUGH_NS, **members: Json) -> QmpEvent:
        """Let time pass until an event called one of ``names`` with these data ``members`` comes; it is taken.

        Raises `TestMachineError` when it has not come ``within`` so much virtual time.
        """
        return self.local.run(self._wait_event(names, as_ns(within), members))

    async def _wait_event(self, names: tuple[str, ...], within_ns: int, members: Mapping[str, Json]) -> QmpEvent:
        waiting = asyncio.ensure_future(self.client.wait_event(*names, **members))
        virtual_time = self.local.machine.virtual_time
        assert virtual_time is not None
        if await virtual_time.advance_until(waiting, limit_ns=within_ns):
            return waiting.result()
        waiting.cancel()
        raise TestMachineError(f"{' or '.join(names)} {members or ''} did not come within {format_duration(within_ns)}")

    def events(self) -> list[QmpEvent]:
        """All events that came and were not taken yet; they are taken now."""
        taken = list(self.client.events)
        self.client.events.clear()
        return taken


class ServedMachine:
    """A machine on virtual time in a thread, which serves QMP at ``socket_path``. A context manager.

    Methods are called from the test's thread (or any other), while the code under test talks to the socket.
    """

    def __init__(self, socket_path: str | Path, options: MachineOptions | None = None) -> None:
        self.socket_path = str(socket_path)
        self._options = attrs.evolve(options or MachineOptions(seed=0), qmp=(qmp_socket(socket_path),))
        self._thread = LoopThread(lambda: SimLoop(manual=True))
        self.machine: Machine
        self._qmp: QmpClient

    @property
    def _time(self) -> SimLoop:
        loop = self._thread.loop
        assert isinstance(loop, SimLoop)
        return loop

    @property
    def now_ns(self) -> int:
        """Virtual nanoseconds since the machine was made."""
        return self._time.now_ns

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the machine's loop, and wait for it in real time."""
        return self._thread.call(work)

    def advance(self, duration: Duration) -> None:
        """Let so much virtual time pass, with all that falls due in it."""
        self.call(self._time.advance(as_ns(duration)))

    def add_drive(self, path: str | Path, *, device: str = "virtio0", fmt: str = "qcow2") -> None:
        """Attach the image at ``path`` to the machine as the disk ``device``, as -drive does."""
        self.call(self.machine.add_drive(drive_text(path, device, fmt)))

    def guest_write(self, device: str, offset: int, length: int, pattern: int) -> None:
        """The guest writes ``length`` bytes of ``pattern``."""
        self.call(self.machine.guest_write(device, offset, length, pattern))

    def qmp(self, command: str, arguments: Mapping[str, Json] | None = None, **members: Json) -> Json:
        """Execute a QMP command by a way of the test's own, beside the socket; raises `QmpError`."""
        return self.call(self._qmp.execute(command, arguments, **members))

    def await_event(self, name: str, **members: Json) -> MachineEvent:
        """Wait, in real time, until the code under test has made ``name`` happen; virtual time stands still meanwhile.

        An event that came before counts, once. Raises `TestMachineError` after 20 real seconds.
        """
        try:
            return self._thread.call(self.machine.events.wait(_fitting(name, members)), timeout=_REAL_SECONDS)
        except TimeoutError:
            raise TestMachineError(f"{name} did not come within {_REAL_SECONDS:.0f} real seconds") from None

    def advance_until(self, name: str, *, within: Duration = _ENOUGH_NS, **members: Json) -> MachineEvent:
        """Let virtual time pass until an event called ``name`` with these data ``members`` comes; it is taken.

        Raises `TestMachineError` when it has not come ``within`` so much virtual time.
        """
        return self.call(self._advance_until(_fitting(name, members), name, as_ns(within)))

    async def _advance_until(self, fits: Callable[[MachineEvent], bool], name: str, within_ns: int) -> MachineEvent:
        waiting = asyncio.ensure_future(self.machine.events.wait(fits))
        if await self._time.advance_until(waiting, limit_ns=within_ns):
            return waiting.result()
        waiting.cancel()
        raise TestMachineError(f"{name} did not come within {format_duration(within_ns)}")

    def __enter__(self) -> ServedMachine:
        self._thread.start()
        try:
            self.machine = self.call(_open(self._options, loop=self._time))
            self._qmp = self.call(QmpClient.in_process(self.machine.hub))
        except BaseException:
            self._thread.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.call(self._qmp.close())
            self.call(self.machine.close())
        finally:
            self._thread.stop()


def _fitting(name: str, members: Mapping[str, Json]) -> Callable[[MachineEvent], bool]:
    wanted = {key.replace("_", "-"): value for key, value in members.items()}
    return lambda event: event.name == name and all(event.data.get(key) == value for key, value in wanted.items())


def drive_text(path: str | Path, device: str, fmt: str) -> str:
    """The value of a -drive option for a disk."""
    escaped = str(path).replace(",", ",,")
    return f"if=virtio,id={device},file={escaped},format={fmt}"
