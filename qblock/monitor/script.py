"""The scripts that `qblock replay` runs: reading them, and comparing replies with what a script expects.

A script is a stream of JSON values with comments (``#`` or ``//`` to the end of the line, outside strings);
docs/replay.md describes it for users. Everything here is plain computation: no I/O, no time. QEMU has no counterpart;
the nearest thing is the bag of ``qmp`` helpers in its iotests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import attrs

from qblock.errors import CommandError
from qblock.units import SECOND_NS, parse_duration, parse_size

if TYPE_CHECKING:
    from qblock.driver import Json

DEFAULT_TIMEOUT_NS: Final = 30 * SECOND_NS
"""How long a ``wait`` without ``timeout`` waits."""


class ScriptError(CommandError):
    """The script itself cannot be understood; ``line`` counts from 1."""

    def __init__(self, line: int, detail: str) -> None:
        super().__init__(f"line {line}: {detail}")
        self.line = line


@attrs.frozen
class Command:
    """Send ``message`` (a QMP command as it stands) and wait for its reply."""

    line: int
    message: Mapping[str, Json]

    @property
    def name(self) -> str:
        """The command's name."""
        return str(self.message.get("execute", self.message.get("exec-oob")))


@attrs.frozen
class Expect:
    """The last reply must match ``pattern``."""

    line: int
    pattern: Json


@attrs.frozen
class Wait:
    """Wait until an event called ``event`` whose data match ``data`` has come, at most ``timeout_ns``."""

    line: int
    event: str
    data: Json
    timeout_ns: int = DEFAULT_TIMEOUT_NS


@attrs.frozen
class Advance:
    """Let ``ns`` nanoseconds pass."""

    line: int
    ns: int


@attrs.frozen
class GuestIO:
    """The guest's device does one request; ``pattern`` is the byte (0 to 255) written, or expected by a read."""

    line: int
    device: str
    verb: Literal["write", "read", "flush"]
    offset: int = 0
    length: int = 0
    pattern: int | None = None


@attrs.frozen
class Comment:
    """A remark that is repeated in the transcript."""

    line: int
    text: str


Step: TypeAlias = Command | Expect | Wait | Advance | GuestIO | Comment

# ------------------------------------------------------------------------------------------------------------- reading

_COMMENT_OR_STRING: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"|(?:#|//)[^\n]*')
_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SPACE: Final = re.compile(r"\s*")


def parse_script(text: str, variables: Mapping[str, str] | None = None) -> list[Step]:
    """The steps of a script. ``${NAME}`` in a string stands for ``variables['NAME']``. Raises `ScriptError`."""
    blanked = _COMMENT_OR_STRING.sub(lambda found: found[0] if found[0][0] == '"' else " " * len(found[0]), text)
    decoder = json.JSONDecoder()
    steps: list[Step] = []
    position = _skip_space(blanked, 0)
    while position < len(blanked):
        line = blanked.count("\n", 0, position) + 1
        try:
            value, position = decoder.raw_decode(blanked, position)
        except json.JSONDecodeError as error:
            raise ScriptError(error.lineno, f"not JSON: {error.msg} at column {error.colno}") from None
        steps.append(_step(_substitute(value, variables or {}, line), line))
        position = _skip_space(blanked, position)
    return steps


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _substitute(value: Json, variables: Mapping[str, str], line: int) -> Json:
    """``value`` with the variables in all its strings filled in."""

    def fill(found: re.Match[str]) -> str:
        if found[1] not in variables:
            raise ScriptError(line, f"${{{found[1]}}} is not defined; give it with --define {found[1]}=VALUE")
        return variables[found[1]]

    if isinstance(value, str):
        return _VARIABLE.sub(fill, value)
    if isinstance(value, list):
        return [_substitute(item, variables, line) for item in value]
    if isinstance(value, dict):
        return {key: _substitute(item, variables, line) for key, item in value.items()}
    return value


def _step(value: Json, line: int) -> Step:
    if not isinstance(value, dict) or not value:
        raise ScriptError(line, 'a step is a JSON object such as {"execute": …} or {"wait": …}')
    if "execute" in value or "exec-oob" in value:
        return Command(line, value)
    if len(value) != 1:
        raise ScriptError(line, f"a step has one member, this one has {', '.join(value)}")
    (kind, body), *_ = value.items()
    if kind not in _STEPS:
        known = ", ".join(["execute", "exec-oob", *_STEPS])
        raise ScriptError(line, f"'{kind}' is not a step; there are {known}")
    return _STEPS[kind](body, line)


def _wait(body: Json, line: int) -> Step:
    if isinstance(body, str):
        body = {"event": body}
    members = _members(
        body, line, "wait", required={"event": str}, optional={"data": dict, "timeout": (str, int, float)}
    )
    timeout_ns = _duration(members.get("timeout", DEFAULT_TIMEOUT_NS // SECOND_NS), line)
    return Wait(line, members["event"], members.get("data", {}), timeout_ns)


def _guest(body: Json, line: int) -> Step:
    verbs = {"write": dict, "read": dict, "flush": dict}
    members = _members(body, line, "guest", required={"device": str}, optional=verbs)
    chosen = [verb for verb in ("write", "read", "flush") if verb in members]
    if len(chosen) != 1:
        raise ScriptError(line, "guest wants exactly one of write, read and flush")
    verb: Any = chosen[0]
    sizes = {} if verb == "flush" else {"offset": (int, str), "length": (int, str)}
    request = _members(members[verb], line, verb, required=sizes, optional={"pattern": int} if sizes else {})
    offset, length = (_size(request.get(name, 0), line) for name in ("offset", "length"))
    pattern = request.get("pattern", 0 if verb == "write" else None)
    if pattern is not None and not 0 <= pattern <= 255:
        raise ScriptError(line, "pattern is a byte, 0 to 255")
    return GuestIO(line, members["device"], verb, offset, length, pattern)


def _members(body: Json, line: int, where: str, *, required: Mapping[str, Any], optional: Mapping[str, Any]) -> Any:
    """``body`` as a dict whose members are all known and have the right types."""
    if not isinstance(body, dict):
        raise ScriptError(line, f"{where} wants an object")
    types = {**required, **optional}
    for name, item in body.items():
        if name not in types:
            raise ScriptError(line, f"{where} does not know '{name}'; its members are {', '.join(types) or 'none'}")
        if not isinstance(item, types[name]) or isinstance(item, bool):
            raise ScriptError(line, f"'{name}' of {where} has the wrong type ({json.dumps(item)})")
    for name in required:
        if name not in body:
            raise ScriptError(line, f"{where} needs '{name}'")
    return body


def _duration(value: Json, line: int) -> int:
    try:
        return parse_duration(str(value))
    except ValueError as error:
        raise ScriptError(line, str(error)) from None


def _size(value: Json, line: int) -> int:
    try:
        return parse_size(str(value))
    except ValueError as error:
        raise ScriptError(line, str(error)) from None


_STEPS: Final[Mapping[str, Callable[[Json, int], Step]]] = {
    "wait": _wait,
    "expect": lambda body, line: Expect(line, body),
    "advance": lambda body, line: Advance(line, _duration(body, line)),
    "guest": _guest,
    "comment": lambda body, line: Comment(line, str(body)),
}

# ---------------------------------------------------------------------------------------------------------- comparing


@attrs.frozen
class Difference:
    """Where a reply differs from the pattern: ``path`` such as ``return[0].status`` (empty: the reply as a whole)."""

    path: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"at {self.path or 'the top'}: expected {self.expected}, got {self.got}"


def differences(pattern: Json, actual: Json, path: str = "") -> Iterator[Difference]:
    """In what ``actual`` does not match ``pattern``.

    An object matches when each member of the pattern does (others do not matter), a list when it is as long as the
    pattern and its items match one by one, anything else when it is equal. ``true`` is not 1.
    """
    if isinstance(pattern, dict) and isinstance(actual, dict):
        for name, wanted in pattern.items():
            inner = f"{path}.{name}" if path else name
            if name in actual:
                yield from differences(wanted, actual[name], inner)
            else:
                there = f"no such member (there are: {', '.join(sorted(actual))})" if actual else "no such member"
                yield Difference(inner, json.dumps(wanted), there)
    elif isinstance(pattern, list) and isinstance(actual, list):
        if len(pattern) != len(actual):
            yield Difference(path, f"{len(pattern)} items", f"{len(actual)} items: {json.dumps(actual)}")
        else:
            for index, (wanted, item) in enumerate(zip(pattern, actual, strict=True)):
                yield from differences(wanted, item, f"{path}[{index}]")
    elif pattern != actual or isinstance(pattern, bool) != isinstance(actual, bool):
        yield Difference(path, json.dumps(pattern), json.dumps(actual))


def matches(pattern: Json, actual: Json) -> bool:
    """True when there are no `differences`."""
    return next(differences(pattern, actual), None) is None
