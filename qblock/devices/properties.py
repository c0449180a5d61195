"""Properties of devices: what they are called, what values they take, how help shows them.

Models QEMU's qdev properties: from text (``-device``) every value is parsed, from JSON (``device_add``) it must have the right
type already. Differs from QEMU in the texts of errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from qblock.errors import CommandError, InvalidParameter
from qblock.units import parse_size

if TYPE_CHECKING:
    from qblock.driver import Json

Value: TypeAlias = str | int | bool

INTEGERS: Final[Mapping[str, tuple[int, int]]] = {
    "uint8": (0, (1 << 8) - 1),
    "uint16": (0, (1 << 16) - 1),
    "uint32": (0, (1 << 32) - 1),
    "uint64": (0, (1 << 64) - 1),
    "int32": (-(1 << 31), (1 << 31) - 1),
}
ENUMS: Final[Mapping[str, tuple[str, ...]]] = {
    "OnOffAuto": ("auto", "on", "off"),
    "BlockdevOnError": ("report", "ignore", "enospc", "stop", "auto"),
    "BiosAtaTranslation": ("auto", "none", "lba", "large", "rechs"),
    "FdcDriveType": ("144", "288", "120", "none", "auto"),
}
"""Kinds whose values are words."""
_TRUE, _FALSE = frozenset({"on", "yes", "true", "y"}), frozenset({"off", "no", "false", "n"})


@attrs.frozen
class Property:
    """One property: ``kind`` is its type as help shows it, ``default`` is None when help shows none."""

    name: str
    kind: str
    default: Value | None = None
    doc: str = ""

    def parse(self, given: Json, *, owner: str, strings: bool) -> Value:
        """The value given on a command line (``strings``) or in JSON; raises `InvalidParameter`."""
        where = f"{owner}.{self.name}"
        if self.kind in INTEGERS:
            return self._integer(given, where, strings)
        if self.kind == "size":
            return self._size(given, where, strings)
        if self.kind == "bool":
            return self._bool(given, where, strings)
        if not isinstance(given, str):
            raise InvalidParameter(where, "must be a string")
        if self.kind in ENUMS and given not in ENUMS[self.kind]:
            raise InvalidParameter(where, f"does not accept '{given:.100}'; it takes {', '.join(ENUMS[self.kind])}")
        return given

    def _integer(self, given: Json, where: str, strings: bool) -> int:
        low, high = INTEGERS[self.kind]
        if self.name == "addr" and isinstance(given, str):
            return pci_address(given, where)
        if strings and isinstance(given, str):
            try:
                given = int(given, 0)
            except ValueError:
                raise InvalidParameter(where, f"must be a number, not '{given:.100}'") from None
        if isinstance(given, bool) or not isinstance(given, int):
            raise InvalidParameter(where, "must be an integer")
        if self.kind == "uint64" and -(high + 1) // 2 <= given < 0:
            return int(given) + high + 1
        if not low <= given <= high:
            raise InvalidParameter(where, f"must be from {low} to {high}, not {given}")
        return given

    def _size(self, given: Json, where: str, strings: bool) -> int:
        if strings and isinstance(given, str):
            try:
                given = parse_size(given)
            except ValueError as error:
                raise InvalidParameter(where, f"is no size: {error}") from None
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            raise InvalidParameter(where, "must be a number of bytes")
        return given

    def _bool(self, given: Json, where: str, strings: bool) -> bool:
        if isinstance(given, bool):
            return given
        if strings and given in _TRUE | _FALSE:
            return given in _TRUE
        raise InvalidParameter(where, "must be on or off" if strings else "must be true or false")

    def help_line(self) -> str:
        """As ``-device NAME,help`` shows it."""
        head = f"  {self.name}=<{self.kind}>"
        if not self.doc and self.default is None:
            return head
        shown = "" if self.default is None else f" (default: {_shown(self.default)})"
        return f"{head:<24} - {self.doc}{shown}"


def _shown(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def pci_address(text: str, where: str) -> int:
    """``SLOT[.FUNCTION]`` in hexadecimal, as one number: 8 times the slot and the function. Raises `InvalidParameter`."""
    slot, dot, function = text.partition(".")
    try:
        numbers = int(slot, 16), int(function, 16) if dot else 0
    except ValueError:
        numbers = (-1, -1)
    if not (0 <= numbers[0] < 32 and 0 <= numbers[1] < 8):
        raise InvalidParameter(where, f"must be a slot from 0 to 1f, and maybe a function from 0 to 7: '{text:.100}'")
    return numbers[0] * 8 + numbers[1]


def parse_values(
    properties: Iterable[Property], given: Mapping[str, Json], *, owner: str, strings: bool
) -> dict[str, Value]:
    """The properties given, parsed; raises `InvalidParameter`, and `CommandError` for one that ``owner`` has not."""
    known = {prop.name: prop for prop in properties}
    values = {}
    for name, value in given.items():
        if name not in known or known[name].kind.startswith("child<"):
            raise CommandError(f"The device '{owner}' has no property '{name}'; see '-device {owner},help'")
        values[name] = known[name].parse(value, owner=owner, strings=strings)
    return values


def help_lines(owner: str, properties: Iterable[Property]) -> list[str]:
    """The answer to ``-device OWNER,help``."""
    return [f"{owner} options:", *sorted(prop.help_line() for prop in properties)]
