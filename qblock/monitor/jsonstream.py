"""JSON values out of a stream of bytes, as QMP reads them: no lines, no lengths, values may be split anywhere.

Models the input side of QEMU's monitor: single-quoted strings, one error per lexical mistake, and after a mistake all that
was collected is dropped and reading goes on at the next structural character (so a 0xFF byte is a dependable reset).
Differs from QEMU: a message larger than `MAX_MESSAGE` (QEMU: 64 MiB per string), of more than `MAX_TOKENS` tokens or nested
deeper than `MAX_NESTING` (QEMU: 1024) is reported once and skipped to its end, where QEMU reports each bracket of the rest;
numbers that no double can hold are refused, where QEMU would answer ``inf``, which is no JSON.

The work is linear in what is fed: every byte is looked at once to find the end of a value, and once more to decode it.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Final

import attrs

from qblock.errors import CommandError
from qblock.options import double_quoted

if TYPE_CHECKING:
    from qblock.driver import Json

MAX_MESSAGE: Final = 16 << 20
"""Bytes in one value."""
MAX_TOKENS: Final = 1 << 19
"""Strings, numbers, words and punctuation marks in one value."""
MAX_NESTING: Final = 512
"""Brackets and braces open at once."""

_SPACE: Final = re.compile(rb"[ \t\r\n]+")
_STRING_RUN: Final = {
    0x22: re.compile(rb'[^"\\\x00-\x1f\xfe\xff]+'),
    0x27: re.compile(rb"[^'\\\x00-\x1f\xfe\xff]+"),
}
_WORD: Final = re.compile(rb"[^ {}\[\],:\"'\x00-\x1f\xfe\xff]+")
_LITERAL: Final = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|[a-z]+")
_SKIPPED: Final = re.compile(rb"[^{}\[\]\"'\x00-\x08\x0b\x0c\x0e-\x1f\xfe\xff]+")
_RECOVERED: Final = re.compile(rb"[ \t\r\n{}\[\],:]")
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_DEPTH: Final = {0x7B: (1, 0), 0x7D: (-1, 0), 0x5B: (0, 1), 0x5D: (0, -1), 0x2C: (0, 0), 0x3A: (0, 0)}


class JsonError(CommandError):
    """What was read is not a JSON value, or one too large to take."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"The input is not JSON that can be read: {detail}")


def decode(frame: bytes) -> Json:
    """The JSON value in ``frame`` (UTF-8; strings may be single-quoted); raises `JsonError`."""
    try:
        text = frame.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"invalid UTF-8 at byte {error.start} of the value") from None
    try:
        value = _DECODER.decode(double_quoted(text))
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos} of the value") from None
    except RecursionError:
        raise JsonError("nested too deeply") from None
    if _SURROGATE.search(frame) and not _is_unicode(value):
        raise JsonError("an escape names half of a surrogate pair, which is no character")
    return value


def _is_unicode(value: Json) -> bool:
    """True when no string in ``value`` holds a lone surrogate."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    members = dict(pairs)
    if len(members) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key, again in zip(sorted(keys), sorted(keys)[1:], strict=False) if key == again)
        raise JsonError(f"the member '{twice}' is given twice in one object")
    return members


def _integer(text: str) -> int | float:
    """As QEMU: what fits 64 bits (signed or unsigned) is an integer, the rest is a floating-point number."""
    if len(text) <= 20:
        value = int(text)
        if -(1 << 63) <= value < 1 << 64:
            return value
    return _float(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError("a number is too large for a double")
    return value


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float)


@attrs.define(eq=False)
class JsonStream:
    """Cuts a stream into values. Feed bytes with `feed`; it returns the values and mistakes that became complete.

    ``_buffer[_start:_pos]`` is the part of the current value that was scanned; when ``_skipping`` nothing is kept.
    """

    max_message: int = MAX_MESSAGE
    max_tokens: int = MAX_TOKENS
    max_nesting: int = MAX_NESTING
    _buffer: bytearray = attrs.field(factory=bytearray, init=False, repr=False)
    _pos: int = attrs.field(default=0, init=False)
    _start: int = attrs.field(default=0, init=False)
    _word: int = attrs.field(default=-1, init=False)
    _braces: int = attrs.field(default=0, init=False)
    _brackets: int = attrs.field(default=0, init=False)
    _tokens: int = attrs.field(default=0, init=False)
    _quote: int = attrs.field(default=0, init=False)
    _recovering: bool = attrs.field(default=False, init=False)
    _skipping: bool = attrs.field(default=False, init=False)
    _out: list[Json | JsonError] = attrs.field(factory=list, init=False, repr=False)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Json | JsonError]:
        """Take more bytes; the result holds, in order, each value or the `JsonError` that stands in its place."""
        self._buffer += data
        out = self._out = []
        while self._pos < len(self._buffer) and self._step():
            pass
        self._trim()
        return out

    @property
    def pending(self) -> int:
        """Bytes held for a value that is not complete yet."""
        return len(self._buffer)

    def _step(self) -> bool:
        """Take one token or a part of one; False when more bytes are needed."""
        if self._recovering:
            return self._recover()
        if self._quote:
            return self._string()
        if self._word >= 0:
            return self._literal()
        buffer, pos = self._buffer, self._pos
        if self._skipping and (skipped := _SKIPPED.match(buffer, pos)):
            self._pos = skipped.end()
            return True
        byte = buffer[pos]
        if byte in _DEPTH:
            braces, brackets = _DEPTH[byte]
            self._braces += braces
            self._brackets += brackets
            self._pos = pos + 1
            self._end_token()
        elif byte in _STRING_RUN:
            self._quote = byte
            self._pos = pos + 1
        elif space := _SPACE.match(buffer, pos):
            self._pos = space.end()
            if not self._tokens:
                self._start = self._pos
        elif byte < 0x20 or byte >= 0xFE:
            self._mistake(f"the byte {byte:#04x} has no place there")
        else:
            self._word = pos
        return True

    def _string(self) -> bool:
        buffer = self._buffer
        run = _STRING_RUN[self._quote].match(buffer, self._pos)
        if run:
            self._pos = run.end()
            if self._pos == len(buffer):
                return False
        byte = buffer[self._pos]
        if byte == self._quote:
            self._quote = 0
            self._pos += 1
            self._end_token()
        elif byte == 0x5C:
            if self._pos + 1 == len(buffer):
                return False
            if buffer[self._pos + 1] < 0x20 or buffer[self._pos + 1] >= 0xFE:
                self._pos += 1
                self._mistake("a control character in a string must be written as an escape")
            else:
                self._pos += 2
        else:
            self._mistake("a control character in a string must be written as an escape")
        return True

    def _literal(self) -> bool:
        """A number or a keyword ends where something else begins, which may not have arrived yet."""
        found = _WORD.match(self._buffer, self._pos)
        if found:
            self._pos = found.end()
        if self._pos == len(self._buffer):
            return False
        word = bytes(self._buffer[self._word : self._pos])
        if not self._skipping and not _LITERAL.fullmatch(word):
            self._pos -= 1
            self._mistake(f"'{word[:20].decode('ascii', 'replace')}' is neither a number nor a keyword")
        else:
            self._word = -1
            self._end_token()
        return True

    def _recover(self) -> bool:
        found = _RECOVERED.search(self._buffer, self._pos)
        self._pos = self._start = found.start() if found else len(self._buffer)
        self._recovering = found is None
        return found is not None

    def _end_token(self) -> None:
        self._tokens += 1
        if self._braces >= 0 and self._brackets >= 0 and (self._braces or self._brackets):
            if not self._skipping and (reason := self._excess()):
                self._skip(reason)
            return
        if not self._skipping:
            try:
                self._out.append(decode(bytes(self._buffer[self._start : self._pos])))
            except JsonError as error:
                self._out.append(error)
        self._reset()

    def _excess(self) -> str:
        if self._braces + self._brackets > self.max_nesting:
            return f"nested deeper than {self.max_nesting} levels"
        if self._tokens > self.max_tokens:
            return f"one message has more than {self.max_tokens} parts"
        return ""

    def _skip(self, reason: str) -> None:
        """Report, keep nothing, and follow the structure to the end of the value."""
        self._out.append(JsonError(f"{reason}; the message is skipped"))
        self._skipping = True

    def _mistake(self, reason: str) -> None:
        """A character that no value can hold at ``_pos``: drop what was collected and look for a new beginning."""
        if not self._skipping:
            self._out.append(JsonError(reason))
        self._pos += 1
        self._reset()
        self._recovering = True

    def _reset(self) -> None:
        self._start = self._pos
        self._word = -1
        self._braces = self._brackets = self._tokens = self._quote = 0
        self._skipping = self._recovering = False

    def _trim(self) -> None:
        """Let go of the bytes that are done with."""
        if not self._skipping and self._pos - self._start > self.max_message:
            self._skip(f"one message is larger than {self.max_message} bytes")
        keep = self._pos if self._skipping else self._start
        del self._buffer[:keep]
        self._pos -= keep
        self._start = 0
        if self._word >= 0:
            self._word = max(self._word - keep, 0)
