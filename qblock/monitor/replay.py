"""Replaying a QMP script against a server, with a transcript of both directions.

The script's steps (`script.py`) are performed one after the other: a command waits for its reply, ``wait`` for an
event, and the first expectation that is not met ends the run with `ReplayFailure`. The server is whatever is at the
other end of a `Wire`: a machine of our own or any QMP server on a socket, so that one script can be tried on qblock
and on QEMU. Times are nanoseconds of the clock in use; the transcript shows seconds since the start.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from qblock.clock import Clock
from qblock.errors import CommandError
from qblock.monitor.jsonstream import JsonStream
from qblock.monitor.script import Advance, Command, Comment, Expect, GuestIO, Step, Wait, differences, matches
from qblock.units import SECOND_NS, format_duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qblock.driver import Json

_CHUNK: Final = 1 << 16


class ReplayFailure(CommandError):
    """The run ended at ``line`` of the script, because something that the script expects did not happen."""

    def __init__(self, line: int, detail: str) -> None:
        super().__init__(f"line {line}: {detail}")
        self.line = line


class Wire(Protocol):
    """A connection to a QMP server that carries whole JSON values."""

    async def send(self, value: Json) -> None:
        """Pass ``value`` to the server."""

    async def receive(self) -> Json | None:
        """The next value from the server; None when it has closed the connection."""


@attrs.define(eq=False)
class StreamWire:
    """A `Wire` over a pair of asyncio streams."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    _stream: JsonStream = attrs.field(init=False, factory=JsonStream)
    _waiting: list[Json] = attrs.field(init=False, factory=list)

    @classmethod
    async def connect(cls, address: str) -> StreamWire:
        """Connect to ``unix:PATH``, ``tcp:HOST:PORT``, or a path; raises `OSError`."""
        kind, _, rest = address.partition(":")
        if kind == "tcp":
            host, _, port = rest.rpartition(":")
            return cls(*await asyncio.open_connection(host, int(port)))
        return cls(*await asyncio.open_unix_connection(rest if kind == "unix" else address))

    async def send(self, value: Json) -> None:
        """See `Wire`."""
        self.writer.write(json.dumps(value).encode() + b"\n")
        await self.writer.drain()

    async def receive(self) -> Json | None:
        """See `Wire`."""
        while not self._waiting:
            data = await self.reader.read(_CHUNK)
            if not data:
                return None
            self._waiting += self._stream.feed(data)
        value = self._waiting.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    async def close(self) -> None:
        """End the connection."""
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass  # the server was faster


Execute = Callable[[str, "Mapping[str, Json]"], "Awaitable[Json]"]


class GuestPort(Protocol):
    """How the script's guest reaches its device."""

    async def perform(self, request: GuestIO, execute: Execute) -> str:
        """Do one request and say in a few words what came of it; raises `CommandError` or `BlockIOError`.

        ``execute`` sends a command to the server and gives its result.
        """


# ---------------------------------------------------------------------------------------------------------- transcripts


class Transcript(Protocol):
    """Where a run is written down. ``kind`` is ``sent``, ``received``, ``step``, ``ok`` or ``failed``."""

    def record(self, ns: int, kind: str, value: Json) -> None:
        """One entry, ``ns`` nanoseconds after the start."""


_ARROWS: Final = {"sent": "->", "received": "<-", "step": "--", "ok": "ok", "failed": "FAILED"}


@attrs.frozen
class TextTranscript:
    """One line for each entry: ``[    1.250000] <- {"event": …}``."""

    write: Callable[[str], object]

    def record(self, ns: int, kind: str, value: Json) -> None:
        """See `Transcript`."""
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        self.write(f"[{ns // SECOND_NS:5d}.{ns % SECOND_NS // 1000:06d}] {_ARROWS[kind]} {shown}\n")


@attrs.frozen
class JsonTranscript:
    """One JSON object for each entry: ``{"time": 1.25, "kind": "received", "value": {…}}``."""

    write: Callable[[str], object]

    def record(self, ns: int, kind: str, value: Json) -> None:
        """See `Transcript`."""
        self.write(json.dumps({"time": round(ns / SECOND_NS, 6), "kind": kind, "value": value}) + "\n")


# -------------------------------------------------------------------------------------------------------------- running


@attrs.define(eq=False)
class Replay:
    """One run of a script. Make one, then await `run` once."""

    wire: Wire
    clock: Clock
    transcript: Transcript
    guest: GuestPort
    _started_ns: int = attrs.field(init=False, default=0)
    _greeting: Json = attrs.field(init=False, default=None)
    _replies: list[Json] = attrs.field(init=False, factory=list)
    _events: list[Json] = attrs.field(init=False, factory=list)
    _last_reply: Json = attrs.field(init=False, default=None)
    _closed: str = attrs.field(init=False, default="")
    _news: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)

    async def run(self, steps: Iterable[Step]) -> None:
        """Perform ``steps``; raises `ReplayFailure` at the first that fails. Negotiates first unless the script does."""
        steps = list(steps)
        self._started_ns = self.clock.now_ns()
        listener = asyncio.get_running_loop().create_task(self._listen(), name="replay listener")
        try:
            await self._await_greeting()
            first = next((step for step in steps if isinstance(step, Command)), None)
            if first is None or first.name != "qmp_capabilities":
                await self._command(Command(0, {"execute": "qmp_capabilities"}))
            for step in steps:
                await self._perform(step)
        except ReplayFailure as failure:
            self._record("failed", str(failure))
            raise
        finally:
            listener.cancel()
            await asyncio.wait([listener])
        self._record("ok", "the script has run to its end")

    def _record(self, kind: str, value: Json) -> None:
        self.transcript.record(self.clock.now_ns() - self._started_ns, kind, value)

    async def _listen(self) -> None:
        """Sort what arrives into greeting, replies and events."""
        try:
            while (message := await self.wire.receive()) is not None:
                self._record("received", message)
                if isinstance(message, dict) and "event" in message:
                    self._events.append(message)
                elif isinstance(message, dict) and "QMP" in message:
                    self._greeting = message
                else:
                    self._replies.append(message)
                self._news.set()
            self._closed = "the server has closed the connection"
        except (OSError, CommandError) as error:
            self._closed = f"the connection broke: {error}"
        self._news.set()

    async def _await_greeting(self) -> None:
        await self._await(lambda: self._greeting is not None, Comment(0, "the greeting"))

    async def _await(self, arrived: Callable[[], bool], step: Step) -> None:
        while not arrived():
            if self._closed:
                raise ReplayFailure(step.line, self._closed)
            self._news.clear()
            await self._news.wait()

    async def _perform(self, step: Step) -> None:
        match step:
            case Command():
                await self._command(step)
            case Expect():
                self._expect(step)
            case Wait():
                await self._wait(step)
            case Advance():
                self._record("step", f"advance {format_duration(step.ns)}")
                await self.clock.sleep_ns(step.ns)
            case GuestIO():
                await self._guest_io(step)
            case Comment():
                self._record("step", step.text)

    async def _command(self, step: Command) -> None:
        reply = self._last_reply = await self._ask(step)
        wanted, got = step.message.get("id"), reply.get("id") if isinstance(reply, dict) else None
        if wanted != got:
            raise ReplayFailure(step.line, f"the reply has the id {json.dumps(got)}, not {json.dumps(wanted)}")

    async def _ask(self, step: Command) -> Json:
        self._record("sent", dict(step.message))
        try:
            await self.wire.send(dict(step.message))
        except OSError as error:
            raise ReplayFailure(step.line, f"the command could not be sent: {error}") from error
        await self._await(lambda: bool(self._replies), step)
        return self._replies.pop(0)

    async def _execute(self, command: str, arguments: Mapping[str, Json]) -> Json:
        """A command on behalf of the guest: its reply is not what ``expect`` looks at."""
        reply = await self._ask(Command(0, {"execute": command, "arguments": arguments}))
        if not isinstance(reply, dict) or "error" in reply:
            raise CommandError(f"{command}: {reply['error'].get('desc') if isinstance(reply, dict) else reply}")
        return reply.get("return")

    def _expect(self, step: Expect) -> None:
        found = list(differences(step.pattern, self._last_reply))
        if found:
            raise ReplayFailure(step.line, "the last reply is not as expected; " + "; ".join(map(str, found)))
        self._record("ok", "the last reply is as expected")

    async def _wait(self, step: Wait) -> None:
        about = f"{step.event} {json.dumps(step.data)}" if step.data else step.event
        self._record("step", f"wait for {about}, at most {format_duration(step.timeout_ns)}")
        late = asyncio.Event()

        def give_up() -> None:
            late.set()
            self._news.set()

        timer = self.clock.call_after(step.timeout_ns, give_up)
        try:
            while (index := self._find_event(step)) is None:
                if self._closed:
                    raise ReplayFailure(step.line, f"waiting for {about}: {self._closed}")
                if late.is_set():
                    raise ReplayFailure(step.line, self._missing(step, about))
                self._news.clear()
                await self._news.wait()
        finally:
            timer.cancel()
        del self._events[index]
        self._record("ok", f"{step.event} has come")

    def _find_event(self, step: Wait) -> int | None:
        """The oldest event that fits and that no earlier ``wait`` has taken."""
        for index, event in enumerate(self._events):
            if event["event"] == step.event and matches(step.data, event.get("data", {})):
                return index
        return None

    def _missing(self, step: Wait, about: str) -> str:
        same = [event.get("data", {}) for event in self._events if event["event"] == step.event]
        others = sorted({event["event"] for event in self._events})
        text = f"{about} did not come within {format_duration(step.timeout_ns)}"
        if same:
            last = "; ".join(str(item) for item in differences(step.data, same[-1]))
            return f"{text}; the last {step.event} differs {last}"
        return f"{text}; what came instead: {', '.join(others) or 'nothing'}"

    async def _guest_io(self, step: GuestIO) -> None:
        where = "" if step.verb == "flush" else f" {step.length} bytes at {step.offset}"
        fill = "" if step.pattern is None else f", pattern {step.pattern:#04x}"
        self._record("step", f"guest: {step.verb} {step.device}{where}{fill}")
        try:
            self._record("ok", f"guest: {await self.guest.perform(step, self._execute)}")
        except (CommandError, OSError) as error:
            raise ReplayFailure(step.line, f"the guest's {step.verb} failed: {error}") from error


class MonitorGuest:
    """A `GuestPort` for a server that is not ours: requests go through HMP's ``qemu-io``.

    QEMU prints the outcome on its own terminal, so a pattern that differs cannot be seen from here; what is said says so.
    """

    async def perform(self, request: GuestIO, execute: Execute) -> str:
        """See `GuestPort`."""
        line: str = request.verb
        if request.verb != "flush":
            fill = "" if request.pattern is None else f" -P {request.pattern}"
            line = f"{request.verb}{fill} {request.offset} {request.length}"
        output = await execute("human-monitor-command", {"command-line": f'qemu-io {request.device} "{line}"'})
        if any(word in str(output) for word in ("Error:", "failed", "unknown command")):
            raise CommandError(str(output).strip())
        return "done (what qemu-io found stays with the server)" if request.verb == "read" else "done"
