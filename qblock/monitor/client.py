"""A small QMP client: over sockets to any QMP server, or straight to a hub of this process.

Replies are matched by id, so several commands may be under way; events are kept until somebody takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from qblock.errors import QBlockError
from qblock.monitor.chardev import TcpAddress, UnixAddress
from qblock.monitor.connecting import connect_socket
from qblock.monitor.dialects import Dialect
from qblock.monitor.hub import MonitorHub
from qblock.monitor.jsonstream import JsonError, JsonStream
from qblock.monitor.link import Link, MemoryLink, SocketLink
from qblock.monitor.qmp import encode
from qblock.monitor.session import MonitorSession

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.system import BlockSystem

_MAX_REPLY = 256 << 20


class QmpError(QBlockError):
    """The server refused a command; ``error_class`` is QMP's class, the message is the server's text."""

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(desc)
        self.command = command
        self.error_class = error_class


class QmpConnectionLost(QBlockError):
    """The server has closed the connection, or answers what is no QMP."""


@attrs.frozen
class QmpEvent:
    """An event; ``when`` is the server's wall clock (seconds, microseconds)."""

    name: str
    data: Mapping[str, Json]
    when: tuple[int, int]


class QmpClient:
    """One connection. Make it with `connect` or `in_process`; use as an async context manager, or `close` it."""

    def __init__(self) -> None:
        self.greeting: Mapping[str, Json] = {}
        self.events: deque[QmpEvent] = deque()
        self._link: Link
        self._server: asyncio.Task[None] | None = None
        self._own_hub: MonitorHub | None = None
        self._stream = JsonStream(max_message=_MAX_REPLY, max_tokens=_MAX_REPLY)
        self._line = bytearray()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Mapping[str, Json]]] = {}
        self._news: set[asyncio.Future[None]] = set()
        self._lost: QmpConnectionLost | None = None

    @classmethod
    async def connect(cls, address: UnixAddress | TcpAddress | str, *, enable: Sequence[str] = ()) -> QmpClient:
        """Connect (a string is the path of a unix socket) and negotiate; raises `OSError` or `QmpConnectionLost`."""
        client = cls()
        where = UnixAddress(address) if isinstance(address, str) else address
        client._link = SocketLink(await connect_socket(where), client)
        return await client._negotiate(enable)

    @classmethod
    async def in_process(
        cls, where: MonitorHub | BlockSystem, *, enable: Sequence[str] = (), dialect: Dialect = Dialect.SYSTEM
    ) -> QmpClient:
        """A client of this process, without a socket: of a hub, or of a system, which gets a hub for as long as it lasts.

        ``dialect`` is what that hub speaks; one that is given has its own.
        """
        own_hub = None if isinstance(where, MonitorHub) else MonitorHub(where, dialect)
        hub = where if isinstance(where, MonitorHub) else own_hub
        assert hub is not None
        client, session = cls(), MonitorSession(hub)
        if own_hub is not None:
            client._own_hub = own_hub
            own_hub.open()
        client._link, session.link = MemoryLink.pair(client, session)
        client._server = asyncio.create_task(client._serve(session), name="in-process monitor")
        return await client._negotiate(enable)

    @staticmethod
    async def _serve(session: MonitorSession) -> None:
        try:
            await session.run()
        finally:
            session.link.close()

    async def _negotiate(self, enable: Sequence[str]) -> QmpClient:
        try:
            while not self.greeting:
                await self._next_news()
            await self.execute("qmp_capabilities", {"enable": list(enable)} if enable else None)
        except BaseException:
            await self.close()
            raise
        return self

    # ----------------------------------------------------------------------------------------------------------- commands

    async def execute(
        self, command: str, arguments: Mapping[str, Json] | None = None, *, fds: Sequence[int] = (), **members: Json
    ) -> Json:
        """Execute ``command`` and give its result; raises `QmpError` or `QmpConnectionLost`.

        Arguments are given as a mapping, or as keywords, whose ``_`` stand for ``-``; both may be mixed. ``fds`` are passed
        along and stay the caller's.
        """
        return await self._ask("execute", command, _merge(arguments, members), fds)

    async def execute_oob(self, command: str, arguments: Mapping[str, Json] | None = None, **members: Json) -> Json:
        """The same out of band; the capability ``oob`` must have been enabled."""
        return await self._ask("exec-oob", command, _merge(arguments, members), ())

    async def hmp(self, line: str) -> str:
        """The output of an HMP command, lines ended by a plain newline."""
        answer = await self.execute("human-monitor-command", {"command-line": line})
        return str(answer).replace("\r\n", "\n")

    async def _ask(self, verb: str, command: str, arguments: Mapping[str, Json], fds: Sequence[int]) -> Json:
        if self._lost is not None:
            raise self._lost
        number = next(self._ids)
        request = {verb: command, "id": number} | ({"arguments": arguments} if arguments else {})
        reply = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._link.send(encode(request), fds)
            answer = await reply
        finally:
            del self._waiting[number]
        if "error" in answer:
            raise QmpError(command, answer["error"]["class"], answer["error"]["desc"])
        return answer["return"]

    # ------------------------------------------------------------------------------------------------------------- events

    async def wait_event(
        self, *names: str, matching: Callable[[QmpEvent], bool] | None = None, **members: Json
    ) -> QmpEvent:
        """The next event called one of ``names`` (any, if none is given) with these data ``members`` (``_`` for ``-``).

        It is taken out of `events`; others stay there. Raises `QmpConnectionLost` when it can no longer come.
        """
        wanted = _merge(None, members)
        while True:
            for event in self.events:
                if (
                    (not names or event.name in names)
                    and all(event.data.get(key) == value for key, value in wanted.items())
                    and (matching is None or matching(event))
                ):
                    self.events.remove(event)
                    return event
            await self._next_news()

    # -------------------------------------------------------------------------------------------------------- connection

    async def close(self) -> None:
        """Leave; commands under way are lost to us, not to the server."""
        self._link.close()
        if self._server is not None:
            await asyncio.wait({self._server})
        if self._own_hub is not None:
            hub, self._own_hub = self._own_hub, None
            await hub.close()

    async def __aenter__(self) -> QmpClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _next_news(self) -> None:
        if self._lost is not None:
            raise self._lost
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._news.add(news)
        try:
            await news
        finally:
            self._news.discard(news)

    def received(self, data: bytes, fds: Sequence[int]) -> None:
        """See `link.Receiver`; a server sends no descriptors that anybody asked for."""
        del fds
        for message in self._messages(data):
            if isinstance(message, JsonError) or not isinstance(message, dict):
                self._lose(QmpConnectionLost(f"The server does not speak QMP: {message}"))
                return
            self._take(message)
        self._tell()

    def _messages(self, data: bytes) -> list[Json | JsonError]:
        """What is complete now. Servers end messages by a line break, most of them have no other: those are decoded at once."""
        self._line += data
        if b"\n" not in data:
            return []
        *lines, rest = self._line.split(b"\n")
        self._line = rest
        messages: list[Json | JsonError] = []
        for line in lines:
            if not self._stream.pending:
                try:
                    messages.append(json.loads(line))
                    continue
                except (ValueError, RecursionError):
                    pass  # a part of a message printed over several lines, or none
            messages += self._stream.feed(line + b"\n")
        return messages

    def ended(self) -> None:
        """See `link.Receiver`."""
        self._lose(QmpConnectionLost("The server has closed the connection"))

    def _take(self, message: Mapping[str, Json]) -> None:
        if "QMP" in message:
            self.greeting = message["QMP"]
        elif "event" in message:
            stamp = message["timestamp"]
            when = (stamp["seconds"], stamp["microseconds"])
            self.events.append(QmpEvent(message["event"], message.get("data", {}), when))
        elif (reply := self._waiting.get(message.get("id", 0))) is not None and not reply.done():
            reply.set_result(message)

    def _lose(self, reason: QmpConnectionLost) -> None:
        self._lost = self._lost or reason
        for reply in self._waiting.values():
            with contextlib.suppress(asyncio.InvalidStateError):
                reply.set_exception(reason)
        self._tell()

    def _tell(self) -> None:
        for news in self._news:
            if not news.done():
                news.set_result(None)


def _merge(arguments: Mapping[str, Json] | None, members: Mapping[str, Json]) -> dict[str, Json]:
    return dict(arguments or {}) | {key.replace("_", "-"): value for key, value in members.items()}
