"""One QMP conversation, without any I/O: bytes in, requests out; results in, bytes out.

Models QEMU's monitor protocol (semantics.md section 1): greeting, capabilities negotiation, envelopes and their mistakes, ids
of any JSON type, error classes, events. Who carries the bytes and who executes the requests is `session.py`'s business. Differs
from QEMU in the message texts, and in not sending ``inf`` or ``nan``, which are no JSON.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs

from qblock.errors import CommandError, CommandNotFound, InvalidParameter, QBlockError
from qblock.monitor.dialects import Dialect
from qblock.monitor.jsonstream import JsonError, JsonStream

if TYPE_CHECKING:
    from qblock.driver import Json

QEMU_VERSION: Final = (7, 2, 22)
"""The QEMU whose behaviour is modelled, as clients see it in the greeting and in query-version."""
_ENVELOPE: Final = frozenset({"execute", "exec-oob", "arguments", "id"})


class Phase(enum.Enum):
    """The states of a conversation."""

    NEGOTIATION = "only qmp_capabilities is understood, no events are sent"
    COMMANDS = "commands and events"
    CLOSED = "the other side is gone"


TRANSITIONS: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.NEGOTIATION: frozenset({Phase.COMMANDS, Phase.CLOSED}),
    Phase.COMMANDS: frozenset({Phase.CLOSED}),
    Phase.CLOSED: frozenset(),
}


class _NoId(enum.Enum):
    NO_ID = "the request has no id"


NO_ID: Final = _NoId.NO_ID
"""Stands for the id of a request that has none; an id of null is another thing."""


@attrs.frozen
class QmpRequest:
    """A well-formed envelope: ``arguments`` is {} when the member is absent."""

    command: str
    arguments: Mapping[str, Json] = attrs.field(factory=dict)
    id: Json | _NoId = NO_ID
    oob: bool = False


@attrs.frozen
class QmpFault:
    """Something that is no request, to be answered with ``error`` in its turn."""

    error: QBlockError
    id: Json | _NoId = NO_ID


def encode(message: Mapping[str, Json], *, pretty: bool = False) -> bytes:
    """One message as it goes over the wire: ASCII JSON on one line or (``pretty``) on many, ended by CR LF as QEMU does."""
    try:
        text = json.dumps(message, allow_nan=False, indent=4 if pretty else None)
    except RecursionError:
        text = _nested(message)
    return text.replace("\n", "\r\n").encode("ascii") + b"\r\n"


class _Piece(str):
    """Text that is JSON already."""

    __slots__ = ()


def _nested(message: Mapping[str, Json]) -> str:
    """JSON of any depth: the images of a long chain lie one in the other in what query-block answers."""
    pieces: list[str] = []
    pending: list[Any] = [message]
    while pending:
        item = pending.pop()
        if isinstance(item, _Piece):
            pieces.append(item)
            continue
        if isinstance(item, Mapping):
            members = [(f"{json.dumps(key)}: ", value) for key, value in item.items()]
            start, end = "{", "}"
        elif isinstance(item, (list, tuple)):
            members = [("", value) for value in item]
            start, end = "[", "]"
        else:
            pieces.append(json.dumps(item, allow_nan=False))
            continue
        pieces.append(start)
        pending.append(_Piece(end))
        for index in reversed(range(len(members))):
            lead, value = members[index]
            pending += [value, _Piece((", " if index else "") + lead)]
    return "".join(pieces)


def error_body(error: QBlockError, error_class: str) -> dict[str, str]:
    """The ``error`` member of a reply."""
    return {"class": error_class, "desc": str(error)}


def event_body(name: str, data: Mapping[str, Json], when: tuple[int, int]) -> dict[str, Json]:
    """An event message; ``when`` is wall clock (seconds, microseconds). Without members there is no ``data``."""
    body: dict[str, Json] = {"timestamp": {"seconds": when[0], "microseconds": when[1]}, "event": name}
    if data:
        body["data"] = data
    return body


@attrs.define(eq=False)
class QmpSession:
    """The state of one conversation. ``package`` names the program in the greeting, ``dialect`` tells the classes of errors,
    ``pretty`` whether messages are spread over lines.
    """

    package: str
    dialect: Dialect = Dialect.SYSTEM
    pretty: bool = False
    phase: Phase = Phase.NEGOTIATION
    enabled: frozenset[str] = frozenset()
    _stream: JsonStream = attrs.field(factory=JsonStream, repr=False)

    def greeting(self) -> bytes:
        """The first message, sent by the server."""
        offered = list(self.dialect.traits.capabilities)
        return self._encode({"QMP": {"version": version_body(self.package), "capabilities": offered}})

    def receive(self, data: bytes) -> list[QmpRequest | QmpFault]:
        """What became complete with ``data``, in order. Never raises: mistakes come as `QmpFault`."""
        return [
            QmpFault(value) if isinstance(value, JsonError) else self._envelope(value)
            for value in self._stream.feed(data)
        ]

    def negotiate(self, wanted: Iterable[str]) -> None:
        """Carry out qmp_capabilities. Raises `CommandNotFound` when it was done before, as QEMU answers."""
        if self.phase is not Phase.NEGOTIATION:
            raise CommandNotFound("qmp_capabilities", "was given already: the capabilities of this session are settled")
        asked = frozenset(wanted)
        if unknown := asked.difference(self.dialect.traits.capabilities):
            raise InvalidParameter("enable", f"names '{min(unknown)}', which this monitor does not offer")
        self.enabled = asked
        self.enter(Phase.COMMANDS)

    def enter(self, phase: Phase) -> None:
        """Go to ``phase`` along the table."""
        assert phase in TRANSITIONS[self.phase] or phase is self.phase, (self.phase, phase)
        self.phase = phase

    def check_available(self, request: QmpRequest) -> None:
        """Raise unless the request may be made in this phase, with the capabilities that are on."""
        if request.oob and "oob" not in self.enabled:
            raise CommandError("The member 'exec-oob' is unexpected in a request: the capability 'oob' is not on")
        if self.phase is Phase.NEGOTIATION and request.command != "qmp_capabilities":
            raise CommandNotFound(request.command, "cannot be used yet: the session begins with 'qmp_capabilities'")

    def reply(self, request: QmpRequest, value: Json) -> bytes:
        """The message that a request succeeded; raises `CommandError` when ``value`` cannot be expressed in JSON."""
        body: dict[str, Json] = {"return": value}
        if request.id is not NO_ID:
            body["id"] = request.id
        return self._encode(body)

    def failure(self, request: QmpRequest | QmpFault, error: QBlockError) -> bytes:
        """The message that a request failed."""
        body: dict[str, Json] = {} if request.id is NO_ID else {"id": request.id}
        return self._encode(body | {"error": error_body(error, self.dialect.error_class(error))})

    def event(self, name: str, data: Mapping[str, Json], when: tuple[int, int]) -> bytes:
        """An event as bytes; empty while events are not sent yet."""
        return self._encode(event_body(name, data, when)) if self.phase is Phase.COMMANDS else b""

    def _encode(self, message: Mapping[str, Json]) -> bytes:
        return encode(message, pretty=self.pretty)

    def _envelope(self, value: Json) -> QmpRequest | QmpFault:
        if not isinstance(value, dict):
            return QmpFault(CommandError("A request must be a JSON object with a member 'execute'"))
        request_id = value.get("id", NO_ID)
        try:
            return self._request(value, request_id)
        except CommandError as error:
            return QmpFault(error, request_id)

    @staticmethod
    def _request(value: Mapping[str, Json], request_id: Json | _NoId) -> QmpRequest:
        for key in value:
            if key not in _ENVELOPE:
                raise CommandError(f"The member '{key}' is unexpected in a request")
        if "execute" in value and "exec-oob" in value:
            raise CommandError("A request has either 'execute' or 'exec-oob', not both")
        verb = "exec-oob" if "exec-oob" in value else "execute"
        if verb not in value:
            raise CommandError("A request needs a member 'execute'")
        if not isinstance(value[verb], str):
            raise CommandError(f"The member '{verb}' of a request must be a string")
        arguments = value.get("arguments", {})
        if not isinstance(arguments, dict):
            raise CommandError("The member 'arguments' of a request must be an object")
        return QmpRequest(value[verb], arguments, request_id, oob=verb == "exec-oob")


def version_body(package: str) -> dict[str, Json]:
    """``VersionInfo`` as QMP shows it."""
    major, minor, micro = QEMU_VERSION
    return {"qemu": {"micro": micro, "minor": minor, "major": major}, "package": package}
