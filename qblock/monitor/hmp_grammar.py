"""How a line of the human monitor is taken apart: arguments by declared type, flags at declared positions.

Models the grammar of HMP (hmp-block.md section 0). A signature such as ``"reuse:-n,device:B,speed:o?"`` lists arguments as
``name:TYPE``, ``?`` for those that may be left out. Types: B device or job name, F file name, s string, S rest of the line,
i and l integer expressions of 32 and 64 bits, o a size (a plain number counts MiB), b ``on`` or ``off``, ``-x`` the flag
``-x``. Differs from QEMU: expressions know no CPU registers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import attrs

from qblock.units import parse_size

Value: TypeAlias = str | int | bool


class HmpSyntaxError(Exception):
    """The line does not fit the signature; the text is what the person is told."""


@attrs.frozen
class Argument:
    """One argument of a signature; ``kind`` is its type letter, or ``-x`` for a flag."""

    name: str
    kind: str
    optional: bool

    @property
    def is_flag(self) -> bool:
        """Whether it is a flag such as ``-n``, which is true or absent."""
        return self.kind.startswith("-")


def parse_signature(text: str) -> tuple[Argument, ...]:
    """The arguments of a signature."""
    result = []
    for part in filter(None, text.split(",")):
        name, _, kind = part.partition(":")
        optional = kind.endswith("?") or kind.startswith("-")
        result.append(Argument(name, kind.rstrip("?"), optional))
    return tuple(result)


_EXPECTED: Final[Mapping[str, str]] = {
    "B": "block device name expected",
    "F": "filename expected",
    "s": "string expected",
}
_BITS: Final[Mapping[str, int]] = {"i": 32, "l": 64}
_ESCAPES: Final[Mapping[str, str]] = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_SIZE: Final = re.compile(r"0[xX][0-9a-fA-F]+|(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[bBkKmMgGtTpPeE])?")
_WORD: Final = re.compile(r"\S+")
_NUMBER: Final = re.compile(r"0[xX][0-9a-fA-F]+|[0-9]+")


def _divide(a: int, b: int) -> int:
    """Division towards zero, as C has it."""
    if b == 0:
        raise HmpSyntaxError("division by zero")
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


_OPERATORS: Final[Mapping[str, tuple[int, Callable[[int, int], int]]]] = {
    "|": (1, lambda a, b: a | b),
    "^": (1, lambda a, b: a ^ b),
    "&": (1, lambda a, b: a & b),
    "+": (2, lambda a, b: a + b),
    "-": (2, lambda a, b: a - b),
    "*": (3, lambda a, b: a * b),
    "/": (3, _divide),
    "%": (3, lambda a, b: a - b * _divide(a, b)),
}

_SIGNS: Final[Mapping[str, Callable[[int], int]]] = {"+": lambda a: a, "-": lambda a: -a, "~": lambda a: ~a}


def parse_arguments(signature: tuple[Argument, ...], text: str, *, name: str) -> dict[str, Value]:
    """The values of the arguments that ``text`` gives; raises `HmpSyntaxError`. ``name`` stands before complaints."""
    cursor = Cursor(text)
    values: dict[str, Value] = {}
    flags = {argument.kind[1] for argument in signature if argument.is_flag}
    for argument in signature:
        cursor.skip_blanks()
        if argument.is_flag:
            if cursor.flag(argument.kind[1], flags, name):
                values[argument.name] = True
        elif not cursor.at_end or not argument.optional:
            values[argument.name] = cursor.value(argument.kind, name)
    cursor.skip_blanks()
    if not cursor.at_end:
        raise HmpSyntaxError(f"{name}: extraneous characters at the end of line")
    return values


class Cursor:
    """A place in a line."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._pos = 0

    @property
    def at_end(self) -> bool:
        """Whether nothing is left."""
        return self._pos >= len(self._text)

    @property
    def rest(self) -> str:
        """What is left."""
        return self._text[self._pos :]

    def skip_blanks(self) -> None:
        """Go to the next word."""
        while not self.at_end and self._text[self._pos].isspace():
            self._pos += 1

    def flag(self, letter: str, known: set[str], name: str) -> bool:
        """Take ``-letter`` if it stands here; another known flag is left for its own turn."""
        if self.at_end or self._text[self._pos] != "-":
            return False
        found = self._text[self._pos + 1 : self._pos + 2]
        if found == letter:
            self._pos += 2
            return True
        if found not in known:
            raise HmpSyntaxError(f"{name}: unsupported option -{found}")
        return False

    def value(self, kind: str, name: str) -> Value:
        """Take a value of a type."""
        if kind in _EXPECTED:
            word = self.word()
            if word is None:
                raise HmpSyntaxError(f"{name}: {_EXPECTED[kind]}")
            return word
        if kind == "S":
            rest, self._pos = self.rest, len(self._text)
            if not rest:
                raise HmpSyntaxError(f"{name}: string expected")
            return rest
        if kind == "o":
            return self._size()
        if kind == "b":
            return self._switch(name)
        number = self._expression(1)
        if _BITS[kind] == 32 and not -(1 << 31) <= number < 1 << 32:
            raise HmpSyntaxError(f"'{name}' has failed: integer is for 32-bit values")
        return number

    def word(self) -> str | None:
        """The next word, which may be quoted; None when there is none or its quoting is wrong."""
        if self.at_end:
            return None
        if self._text[self._pos] == '"':
            return self._quoted()
        found = _WORD.match(self._text, self._pos)
        if found is None:
            return None
        self._pos = found.end()
        return found[0]

    def _quoted(self) -> str | None:
        result = []
        position = self._pos + 1
        while position < len(self._text) and self._text[position] != '"':
            letter = self._text[position]
            if letter == "\\":
                position += 1
                letter = _ESCAPES.get(self._text[position : position + 1], "")
                if not letter:
                    return None
            result.append(letter)
            position += 1
        if position >= len(self._text):
            return None
        self._pos = position + 1
        return "".join(result)

    def _size(self) -> int:
        found = _SIZE.match(self._text, self._pos)
        if found is None:
            raise HmpSyntaxError("invalid size")
        self._pos = found.end()
        try:
            size = parse_size(found[0], default_unit="M")
        except ValueError:
            raise HmpSyntaxError("invalid size") from None
        if size >= 1 << 63:
            raise HmpSyntaxError("invalid size")
        return size

    def _switch(self, name: str) -> bool:
        word = self.word()
        if word not in ("on", "off"):
            raise HmpSyntaxError(f"{name}: Expected 'on' or 'off'")
        return word == "on"

    # ------------------------------------------------------------------------------------------------- integer expressions

    def _expression(self, level: int) -> int:
        """Operators of ``level`` and stronger ones, from left to right."""
        value = self._operand() if level > 3 else self._expression(level + 1)
        while True:
            mark = self._text[self._pos : self._pos + 1]
            if mark not in _OPERATORS or _OPERATORS[mark][0] != level:
                return value
            self._pos += 1
            right = self._operand() if level == 3 else self._expression(level + 1)
            value = _wrap(_OPERATORS[mark][1](value, right))

    def _operand(self) -> int:
        mark = self._text[self._pos : self._pos + 1]
        if mark == "(":
            return self._parenthesised()
        if mark in _SIGNS:
            self._pos += 1
            return _SIGNS[mark](self._operand())
        found = _NUMBER.match(self._text, self._pos)
        if found is None:
            raise HmpSyntaxError("unexpected end of expression" if self.at_end else "invalid char in expression")
        self._pos = found.end()
        text = found[0]
        octal = len(text) > 1 and text[0] == "0" and text[1] not in "xX"
        try:
            return _wrap(int(text, 8 if octal else 0))
        except ValueError:
            raise HmpSyntaxError("invalid char in expression") from None

    def _parenthesised(self) -> int:
        self._pos += 1
        value = self._expression(1)
        if self._text[self._pos : self._pos + 1] != ")":
            raise HmpSyntaxError("')' expected")
        self._pos += 1
        return value


def _wrap(value: int) -> int:
    """The value in 64 bits, signed."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
