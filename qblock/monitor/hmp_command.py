"""What a command of the human monitor is: a handler with a signature, and one execution of it.

Models an entry of HMP's command table in QEMU; the handlers are in `hmp_commands.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

import attrs

from qblock.monitor.command import CommandContext
from qblock.monitor.dialects import SYSTEM_ONLY, Dialect
from qblock.monitor.hmp_grammar import Argument, Value, parse_signature

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.monitor.hmp import HmpMonitor


class PlainError(Exception):
    """What a few commands print without the word ``Error:`` before it."""


@attrs.define(eq=False)
class HmpCall:
    """One execution of a command: its context, its arguments, the output so far, and whether it has ``failed``."""

    context: CommandContext
    monitor: HmpMonitor
    values: Mapping[str, Value]
    lines: list[str] = attrs.field(factory=list)
    failed: bool = False

    def say(self, text: str = "") -> None:
        """Print a line (or several)."""
        self.lines.append(text)

    def fail(self, text: str | None = None) -> None:
        """The command has not done what it was to do; ``text`` says why, unless that has been said elsewhere."""
        self.failed = True
        if text is not None:
            self.say(text)

    def text(self, name: str) -> str | None:
        """A string argument, or None when it was left out."""
        value = self.values.get(name)
        return None if value is None else str(value)

    def number(self, name: str) -> int | None:
        """An integer or size argument, or None."""
        value = self.values.get(name)
        return None if value is None else int(value)

    def flag(self, name: str) -> bool:
        """Whether a flag was given."""
        return bool(self.values.get(name))

    async def qmp(self, command: str, arguments: Mapping[str, Json] | None = None, **members: Json) -> Json:
        """Execute a QMP command; keywords' ``_`` stand for ``-``, and members that are None are left out."""
        given = dict(arguments or {}) | {key.replace("_", "-"): value for key, value in members.items()}
        present = {key: value for key, value in given.items() if value is not None}
        return await self.monitor.commands.find(command).run(self.context, present)


HmpHandler = Callable[[HmpCall], Awaitable[None]]


@attrs.frozen
class HmpCommand:
    """A command of the human monitor.

    ``name`` may list aliases (``stop|s``); the commands of ``info`` are called ``info block`` and so on. ``arguments`` is what
    the grammar reads, ``parameters`` what help shows of it. ``since`` is the QEMU version that brought it.
    """

    name: str
    arguments: tuple[Argument, ...]
    parameters: str
    help: str
    handler: HmpHandler
    since: str = "0.14"
    dialects: frozenset[Dialect] = SYSTEM_ONLY

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which it can be called."""
        return tuple(self.name.split("|"))

    @property
    def synopsis(self) -> str:
        """The line that help shows."""
        return f"{self.name} {self.parameters} -- {self.help}"


def hmp_command(
    name: str,
    signature: str,
    parameters: str,
    text: str,
    *,
    since: str = "0.14",
    dialects: frozenset[Dialect] = SYSTEM_ONLY,
) -> Callable[[HmpHandler], HmpCommand]:
    """Make an `HmpCommand` of an async function; ``text`` is the help, ``since`` the QEMU version that brought it."""

    def decorate(function: HmpHandler) -> HmpCommand:
        return HmpCommand(name, parse_signature(signature), parameters, text, function, since, dialects)

    return decorate
