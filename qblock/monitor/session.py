"""One client of the monitor: its requests are executed in order, replies and events go out in the order they happened.

Models a QMP monitor on a character device of QEMU: a bounded queue of requests (reading stops while it is full), ``exec-oob``
requests that overtake it, events that precede the reply of the command that caused them. Differs from QEMU: a client that
lets more than `MAX_BACKLOG` bytes of output wait is disconnected (QEMU keeps all of it); jobs do not notice.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qblock.errors import CommandError, QBlockError
from qblock.monitor import tracing
from qblock.monitor.command import CommandContext
from qblock.monitor.descriptors import FdBatch, ReceivedFds
from qblock.monitor.qmp import Phase, QmpFault, QmpRequest, QmpSession

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.monitor.hub import MonitorHub
    from qblock.monitor.link import Link

MAX_QUEUE: Final = 8
"""Requests that may wait before reading is held up, as in QEMU."""
MAX_BACKLOG: Final = 16 << 20
"""Bytes of output that may wait for the client before it is disconnected."""


class MonitorSession:
    """Executes the requests of one client over ``link``, which the server sets before `run`. Is its link's receiver."""

    link: Link

    def __init__(self, hub: MonitorHub, *, pretty: bool = False) -> None:
        self.hub = hub
        self.qmp = QmpSession(hub.package, hub.dialect, pretty)
        self.fds = ReceivedFds()
        self._queue: deque[tuple[QmpRequest | QmpFault, FdBatch]] = deque()
        self._wakeup = asyncio.Event()
        self._ended = False
        self._stopping = False
        self._overtaking: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------------------ called by the link

    def received(self, data: bytes, fds: Sequence[int]) -> None:
        """See `link.Receiver`."""
        self.fds.arrive(fds)
        for item in self.qmp.receive(data):
            batch = self.fds.join()
            if isinstance(item, QmpRequest) and item.oob and "oob" in self.qmp.enabled:
                task = asyncio.create_task(self._serve(item, batch), name=f"exec-oob {item.command}")
                self._overtaking.add(task)
                task.add_done_callback(self._overtaking.discard)
            else:
                self._queue.append((item, batch))
        if len(self._queue) >= MAX_QUEUE:
            self.link.pause_reading()
        self._wakeup.set()

    def ended(self) -> None:
        """See `link.Receiver`: what was asked is still executed, and answered if anybody listens."""
        self._ended = True
        self._wakeup.set()

    # ------------------------------------------------------------------------------------------------- called by the hub

    def event(self, name: str, data: Mapping[str, Json], when: tuple[int, int]) -> None:
        """Tell the client of an event; ``when`` is wall clock (seconds, microseconds)."""
        self._send(self.qmp.event(name, data, when))

    async def run(self) -> None:
        """Greet, and serve until the client is gone or the program quits."""
        self._send(self.qmp.greeting())
        self.hub.sessions.append(self)
        try:
            while await self._next():
                item, batch = self._queue.popleft()
                if len(self._queue) == MAX_QUEUE - 1:
                    self.link.resume_reading()
                await self._serve(item, batch)
                if not self._stopping:
                    await self.link.drain()
        finally:
            self.hub.sessions.remove(self)
            self._close()

    # ----------------------------------------------------------------------------------------------------------- inside

    async def _next(self) -> bool:
        """Wait for a request; False when there will be none."""
        while not self._queue:
            if self._ended or self.hub.quitting:
                return False
            self._wakeup.clear()
            await self._wakeup.wait()
        return not self.hub.quitting

    def stop(self) -> None:
        """End after the command that is executed; nobody waits for a client that does not read."""
        self._stopping = True
        self._forget_queue()
        if self.link.backlog:
            self.link.close()
        self.ended()

    def _forget_queue(self) -> None:
        """Forget the requests that wait."""
        for _, batch in self._queue:
            self.fds.leave(batch)
        self._queue.clear()

    def wake(self) -> None:
        """Look again whether the program quits."""
        self._wakeup.set()

    async def _serve(self, item: QmpRequest | QmpFault, batch: FdBatch) -> None:
        try:
            self._send(await self._answer(item, batch))
        except QBlockError as error:
            self._send(self.qmp.failure(item, error))
        except RecursionError:
            self._send(self.qmp.failure(item, CommandError("The arguments are nested too deeply")))
        except (
            Exception
        ) as error:  # a bug: the client must not wait for ever, and the person at the console must see it
            self.hub.report(traceback.format_exc())
            self._send(self.qmp.failure(item, CommandError(f"Internal error: {error!r}; this is a bug in qblock")))
        finally:
            self.fds.leave(batch)

    async def _answer(self, item: QmpRequest | QmpFault, batch: FdBatch) -> bytes:
        if isinstance(item, QmpFault):
            raise item.error
        self.qmp.check_available(item)
        command = self.hub.commands.find(item.command, oob=item.oob)
        context = CommandContext(self.hub, self, batch)
        if self.hub.system.env.trace.extra:
            result = await tracing.run_traced(command, context, item.arguments)
        else:
            result = await command.run(context, item.arguments)
        return self.qmp.reply(item, result)

    def _send(self, data: bytes) -> None:
        if not data:
            return
        waiting = self.link.backlog  # without this message, which may be as large as it likes
        self.link.send(data)
        if waiting > MAX_BACKLOG:
            self.hub.report(
                f"A monitor client does not read: {waiting} bytes wait for it; it is disconnected"
            )
            self.link.close()

    def _close(self) -> None:
        self.qmp.enter(Phase.CLOSED)
        for task in self._overtaking:
            task.cancel()
        self._forget_queue()
        self.fds.close()
