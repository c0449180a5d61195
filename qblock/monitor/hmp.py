"""The human monitor: lines in, text out, by way of the QMP commands.

Models HMP of qemu-system (hmp-block.md): its commands, its grammar (`hmp_grammar.py`) and its output (`hmp_render.py`). An
`HmpMonitor` can be given more commands (the REPL has some for learning); each object tells its name, arguments and help.
Differs from QEMU in that only commands of the block layer exist.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import attrs

from qblock.errors import QBlockError
from qblock.monitor.command import CommandContext, CommandTable
from qblock.monitor.hmp_grammar import Argument, Cursor, HmpSyntaxError, Value, parse_arguments, parse_signature

if TYPE_CHECKING:
    from qblock.driver import Json


class PlainError(Exception):
    """What a few commands print without the word ``Error:`` before it."""


@attrs.define(eq=False)
class HmpCall:
    """One execution of a command: its context, its arguments, and the output so far."""

    context: CommandContext
    monitor: HmpMonitor
    values: Mapping[str, Value]
    lines: list[str] = attrs.field(factory=list)

    def say(self, text: str = "") -> None:
        """Print a line (or several)."""
        self.lines.append(text)

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
    the grammar reads, ``parameters`` what help shows of it.
    """

    name: str
    arguments: tuple[Argument, ...]
    parameters: str
    help: str
    handler: HmpHandler

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which it can be called."""
        return tuple(self.name.split("|"))

    @property
    def synopsis(self) -> str:
        """The line that help shows."""
        return f"{self.name} {self.parameters} -- {self.help}"


def hmp_command(name: str, signature: str, parameters: str, text: str) -> Callable[[HmpHandler], HmpCommand]:
    """Make an `HmpCommand` of an async function; ``text`` is the help."""

    def decorate(function: HmpHandler) -> HmpCommand:
        return HmpCommand(name, parse_signature(signature), parameters, text, function)

    return decorate


class HmpMonitor:
    """The human monitor of one program; `run` executes lines."""

    def __init__(self, commands: CommandTable, extra: Iterable[HmpCommand] = ()) -> None:
        from qblock.monitor.hmp_commands import all_commands  # noqa: PLC0415 - they are written against this module

        self.commands = commands
        self._table: dict[str, HmpCommand] = {}
        for command in (*all_commands(), *extra):
            self.register(command)

    def register(self, command: HmpCommand) -> None:
        """Add a command; one of the same name is replaced."""
        self._table.update(dict.fromkeys(command.names, command))

    def __iter__(self) -> Iterator[HmpCommand]:
        """All commands, in alphabetical order."""
        return iter(sorted(set(self._table.values()), key=lambda command: command.name))

    def find(self, name: str) -> HmpCommand | None:
        """The command of that name (``info block``), or None."""
        return self._table.get(name)

    def info_commands(self) -> list[HmpCommand]:
        """The subcommands of ``info``."""
        return [command for command in self if command.name.startswith("info ")]

    def split(self, line: str) -> tuple[str, str]:
        """The name of the command in ``line`` (both words of an ``info`` command) and what follows it."""
        cursor = Cursor(line)
        cursor.skip_blanks()
        name = cursor.word() or ""
        if name == "info":
            cursor.skip_blanks()
            if not cursor.at_end:
                name = f"info {cursor.word() or ''}"
        return name, cursor.rest

    async def run(self, context: CommandContext, line: str) -> str:
        """Execute a line; gives the output, lines ended by a newline. Mistakes and failures are part of the output."""
        name, rest = self.split(line)
        if not name:
            return ""
        command = self.find(name)
        if command is None:
            return f"unknown command: '{name}'\n"
        try:
            values = parse_arguments(command.arguments, rest, name=command.name.removeprefix("info "))
        except HmpSyntaxError as error:
            return f'{error}\nTry "help {name}" for more information\n'
        call = HmpCall(context, self, values)
        try:
            await command.handler(call)
        except PlainError as error:
            call.say(str(error))
        except QBlockError as error:
            call.say(f"Error: {error}")
        return "".join(f"{line}\n" for line in call.lines)
