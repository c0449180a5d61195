"""The human monitor: lines in, text out, by way of the QMP commands.

Models HMP of qemu-system (hmp-block.md): its commands, its grammar (`hmp_grammar.py`) and its output (`hmp_render.py`). An
`HmpMonitor` can be given more commands (the REPL has some for learning); each object tells its name, arguments and help.
Differs from QEMU in that only commands of the block layer exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import attrs

from qblock.errors import QBlockError
from qblock.monitor import (
    hmp_2012,
    hmp_blkmirror,
    hmp_block_copy,
    hmp_commands,
    hmp_machine,
    hmp_snapshots,
    hmp_tracing,
)
from qblock.monitor.command import CommandContext, CommandTable
from qblock.monitor.dialects import BOTH, Dialect, belonging_to
from qblock.monitor.hmp_command import HmpCall, HmpCommand, PlainError, hmp_command
from qblock.monitor.hmp_grammar import Cursor, HmpSyntaxError, parse_arguments

MODULES: Final = (hmp_commands, hmp_machine, hmp_snapshots, hmp_2012, hmp_blkmirror, hmp_block_copy, hmp_tracing)
"""Where the commands are written."""

__all__ = ["HmpCall", "HmpCommand", "HmpMonitor", "HmpOutput", "hmp_command"]


@attrs.frozen
class HmpOutput:
    """What came of a line: the ``text``, each of its lines ended by a newline, and whether the command ``failed``.

    QEMU only prints; that a line was a mistake or has failed is known nowhere else.
    """

    text: str
    failed: bool = False


class HmpMonitor:
    """The human monitor of one program; `run` executes lines."""

    def __init__(self, commands: CommandTable, extra: Iterable[HmpCommand] = ()) -> None:
        self.commands = commands
        self._table: dict[str, HmpCommand] = {}
        written = (value for module in MODULES for value in vars(module).values() if isinstance(value, HmpCommand))
        dialect = Dialect.SYSTEM if commands.dialect in BOTH else commands.dialect
        for command in (*belonging_to(dialect, written), *extra):
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

    async def run(self, context: CommandContext, line: str) -> HmpOutput:
        """Execute a line. Mistakes and failures are part of the output."""
        if (hit := context.system.env.trace.handle_hmp_command) is not None:
            hit(line=line)
        name, rest = self.split(line)
        if not name:
            return HmpOutput("")
        command = self.find(name)
        if command is None:
            return HmpOutput(f"unknown command: '{name}'\n", failed=True)
        try:
            values = parse_arguments(command.arguments, rest, name=command.name.removeprefix("info "))
        except HmpSyntaxError as error:
            return HmpOutput(f'{error}\nTry "help {name}" for more information\n', failed=True)
        call = HmpCall(context, self, values)
        try:
            async with context.hub.executing():
                await command.handler(call)
        except PlainError as error:
            call.fail(str(error))
        except QBlockError as error:
            call.fail(f"Error: {error}")
        return HmpOutput("".join(f"{line}\n" for line in call.lines), call.failed)
