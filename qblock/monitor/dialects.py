"""Dialects: which commands and events a monitor has, and what its errors are called.

The default is QEMU 7.2, as its machine and as its storage daemon have it. The others are proposals of 2011 and 2012
(rfc-2012.md). A dialect is data: it takes over the commands of 7.2 that were there in its time (by their ``since``), replaces
some by its own, shows the events and their members that its time knew, and calls errors by the names of its time. Which job
runs behind a command is the command's affair.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import attrs

from qblock import errors
from qblock.errors import CommandError, QBlockError

if TYPE_CHECKING:
    from qblock.driver import Json


class Dialect(enum.Enum):
    """Whose set of commands a monitor has. The value is what ``--dialect`` calls it."""

    SYSTEM = "7.2"
    STORAGE_DAEMON = "7.2-storage-daemon"
    RFC_2012 = "rfc-2012"
    BLKMIRROR_2012 = "blkmirror-2012"
    BLOCK_COPY_2011 = "block-copy-2011"

    @property
    def traits(self) -> Traits:
        """What is special about it."""
        return TRAITS[self]

    def error_class(self, error: QBlockError) -> str:
        """The ``class`` of the reply that tells of ``error``."""
        for kind in type(error).__mro__:
            if kind in self.traits.error_classes:
                return self.traits.error_classes[kind]
        return error.qmp_class

    def has_event(self, name: str, senders: frozenset[Dialect]) -> bool:
        """Whether a monitor of this dialect may send the event ``name``, which belongs to ``senders``."""
        return self in senders if self.traits.events is None else name in self.traits.events

    def event_data(self, name: str, data: Mapping[str, Json]) -> Mapping[str, Json] | None:
        """What this dialect shows of an event's ``data``; None when it has no such event."""
        shown = self.traits.events
        if shown is None:
            return data
        if name not in shown:
            return None
        return {key: value for key, value in data.items() if key in shown[name]}


@attrs.frozen
class Traits:
    """What distinguishes a dialect.

    ``inherits`` names the dialect of whose commands it has those that came with ``newest`` (major, minor) or before.
    ``capabilities`` are what qmp_capabilities can enable. ``events`` gives for each event the members that are shown; None:
    everything. ``error_classes`` are the classes of errors, where they differ from today's.
    """

    summary: str
    inherits: Dialect | None = None
    newest: tuple[int, int] = (0, 0)
    capabilities: tuple[str, ...] = ("oob",)
    events: Mapping[str, tuple[str, ...]] | None = None
    error_classes: Mapping[type[BaseException], str] = attrs.field(factory=dict)


_JOB_END: Final = ("type", "device", "len", "offset", "speed", "error")
_EVENTS_OF_1_1: Final[Mapping[str, tuple[str, ...]]] = {
    "SHUTDOWN": (),
    "STOP": (),
    "RESUME": (),
    "BLOCK_IO_ERROR": ("device", "operation", "action"),
    "BLOCK_JOB_COMPLETED": _JOB_END,
    "BLOCK_JOB_CANCELLED": _JOB_END,
}
_ERRORS_OF_1_1: Final[Mapping[type[BaseException], str]] = {
    errors.NodeBusy: "DeviceInUse",
    errors.DuplicateName: "DeviceInUse",
    errors.NodeNotFound: "DeviceNotFound",
    errors.UnknownFd: "FdNotFound",
    errors.InvalidParameter: "InvalidParameter",
    errors.BlockIOError: "IOError",
}


def _of_1_1(summary: str) -> Traits:
    return Traits(
        summary,
        inherits=Dialect.SYSTEM,
        newest=(1, 1),
        capabilities=(),
        events=_EVENTS_OF_1_1,
        error_classes=_ERRORS_OF_1_1,
    )


TRAITS: Final[Mapping[Dialect, Traits]] = {
    Dialect.SYSTEM: Traits("QEMU 7.2"),
    Dialect.STORAGE_DAEMON: Traits("QEMU 7.2's storage daemon"),
    Dialect.RFC_2012: _of_1_1("the proposal of April 2012: mirroring as a job, drive-reopen with a witness"),
    Dialect.BLKMIRROR_2012: _of_1_1("the proposal of March 2012: mirroring as a driver"),
    Dialect.BLOCK_COPY_2011: _of_1_1("the proposal of June 2011: live block copy"),
}
MACHINE_DIALECTS: Final = tuple(d for d in Dialect if d is not Dialect.STORAGE_DAEMON)
"""Those that a machine with devices can have."""

BOTH: Final = frozenset({Dialect.SYSTEM, Dialect.STORAGE_DAEMON})
SYSTEM_ONLY: Final = frozenset({Dialect.SYSTEM})
HISTORIC: Final = frozenset(MACHINE_DIALECTS) - SYSTEM_ONLY


def dialect_named(name: str) -> Dialect:
    """The dialect that ``--dialect name`` means; raises `CommandError`."""
    for dialect in MACHINE_DIALECTS:
        if dialect.value == name:
            return dialect
    known = ", ".join(dialect.value for dialect in MACHINE_DIALECTS)
    raise CommandError(f"There is no dialect '{name}'; there are {known}")


class Dated(Protocol):
    """Something that came with a version and belongs to dialects: a command."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def since(self) -> str:
        """The version that brought it, as ``1.3``."""

    @property
    def dialects(self) -> frozenset[Dialect]:
        """Those that it was written for."""


_DatedT = TypeVar("_DatedT", bound=Dated)


def belonging_to(dialect: Dialect, candidates: Iterable[_DatedT]) -> list[_DatedT]:
    """Those of ``candidates`` that ``dialect`` has: its own, and what it inherits and does not replace; sorted by name."""
    everything, traits = list(candidates), dialect.traits
    chosen = {one.name: one for one in everything if dialect in one.dialects}
    for one in everything:
        if one.name not in chosen and traits.inherits in one.dialects and _version(one.since) <= traits.newest:
            chosen[one.name] = one
    return sorted(chosen.values(), key=lambda one: one.name)


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)
