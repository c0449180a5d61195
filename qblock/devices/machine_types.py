"""The machine types that can be asked for, as ``-machine help`` and query-machines tell of them.

Models the names and limits of the types of qemu-system-x86_64 7.2. Its versions of a type are all the same here: they differ in
what a processor would see. Differs from QEMU: no type has a default processor or a place for memory, as there are neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import attrs

from qblock.errors import CommandError

_VERSIONS: Final = ("7.2", "7.1", "7.0", "6.2", "6.1", "6.0", "5.2", "5.1", "5.0", "4.2", "4.1", "4.0", "3.1", "3.0", "2.12")
DEFAULT_MEMORY: Final = 128 << 20
NO_UUID: Final = "00000000-0000-0000-0000-000000000000"


@attrs.frozen
class MachineType:
    """One machine type.

    ``board`` is its kind of board, a key of `board.BOARDS`. ``max_cpus`` is how many processors ``-smp`` may ask for.
    """

    name: str
    summary: str
    board: str
    max_cpus: int
    alias: str | None = None
    is_default: bool = False

    def help_lines(self) -> Iterator[str]:
        """As ``-machine help`` shows it: a line for the alias, if there is one, and a line for the type."""
        if self.alias is not None:
            yield f"{self.alias:<20} {self.summary} (alias of {self.name})"
        yield f"{self.name:<20} {self.summary}{' (default)' if self.is_default else ''}"


def _family(prefix: str, summary: str, board: str, max_cpus: int) -> list[MachineType]:
    """A type in all its versions; the newest one has the alias."""
    return [
        MachineType(
            f"{prefix}-{version}", summary, board, max_cpus,
            alias=board if version == _VERSIONS[0] else None,
            is_default=board == "pc" and version == _VERSIONS[0],
        )
        for version in _VERSIONS
    ]  # fmt: skip


MACHINE_TYPES: Final[Mapping[str, MachineType]] = {
    kind.name: kind
    for kind in (
        *_family("pc-i440fx", "Standard PC (i440FX + PIIX, 1996)", "pc", 255),
        *_family("pc-q35", "Standard PC (Q35 + ICH9, 2009)", "q35", 288),
        MachineType("none", "empty machine", "none", 1),
    )
}
"""All types by name, in the order of ``-machine help``."""
_ALIASES: Final = {kind.alias: kind for kind in MACHINE_TYPES.values() if kind.alias is not None}


def machine_type(name: str) -> MachineType:
    """The type of that name or alias; raises `CommandError`."""
    found = MACHINE_TYPES.get(name) or _ALIASES.get(name)
    if found is None:
        raise CommandError(f"There is no machine type '{name}'; see '-machine help'")
    return found


@attrs.frozen
class Identity:
    """What a machine was told about itself: its type, a number that no other has, and the bytes of memory of its guest."""

    type: MachineType = MACHINE_TYPES["none"]
    uuid: str = NO_UUID
    memory: int = DEFAULT_MEMORY
