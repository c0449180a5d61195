"""Executing the lines of a REPL: HMP's commands and those for learning, one answer for each line.

Also answers what a prompt wants to know while a line is typed: which words could come next, and how the command is used. No
terminal is touched here; `repl.py` does that.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import attrs

from qblock.monitor.command import CommandContext
from qblock.monitor.hmp import HmpCommand, HmpMonitor
from qblock.monitor.machine import Machine
from qblock.monitor.repl_commands import LEARNING_COMMANDS, install

_FILE_ARGUMENTS: Final = frozenset({"target", "file", "filename", "snapshot-file", "base"})
"""Arguments that QEMU's grammar calls strings and that are file names."""


@attrs.frozen
class Answer:
    """What came of a line: the text to print, whether it ``failed``, and whether the machine is to ``quit``."""

    text: str
    failed: bool = False
    quit: bool = False


@attrs.frozen
class Suggestion:
    """A word that could stand where the person is typing, with a remark."""

    word: str
    remark: str = ""


@attrs.define(eq=False)
class Console:
    """The commands of one machine, for one person. All methods belong to the machine's loop."""

    machine: Machine
    _monitor: HmpMonitor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        install(self.machine)
        self._monitor = self.machine.hub.hmp

    async def execute(self, line: str) -> Answer:
        """Execute one line; an empty one and a comment (``#``) do nothing."""
        line = line.strip()
        if not line or line.startswith("#"):
            return Answer("")
        words = line.split()
        if words[0] in ("help", "?") and len(words) == 2 and words[1] in LEARNING_COMMANDS:
            command = LEARNING_COMMANDS[words[1]]
            return Answer(f"{command.name} {command.usage} -- {command.summary}\n{command.details}")
        output = await self._monitor.run(CommandContext(self.machine.hub), line)
        await self.machine.settle()
        text = "".join(report.text for report in self.machine.reports.take()) + output.text
        return Answer(text, failed=output.failed, quit=self.machine.hub.quitting)

    # --------------------------------------------------------------------------------------------------- while typing

    def usage(self, typed: str) -> str:
        """How the command that ``typed`` begins with is used; empty while it is none."""
        name, _ = self._monitor.split(typed)
        command = self._monitor.find(name) if name else None
        return command.synopsis.partition("\n")[0] if command is not None else ""

    def suggestions(self, typed: str) -> list[Suggestion]:
        """The words that could complete ``typed``, whose last word may be empty or unfinished."""
        words = typed.split()
        beginning = "" if not words or typed[-1:].isspace() else words[-1]
        before = words if not beginning else words[:-1]
        found = self._candidates(before, beginning)
        return [item for item in found if item.word.startswith(beginning)]

    def _candidates(self, before: list[str], beginning: str) -> Iterable[Suggestion]:
        if not before:
            return self._commands()
        if before == ["info"]:
            return [Suggestion(c.name.partition(" ")[2], _first_line(c)) for c in self._monitor.info_commands()]
        if before[0] in ("help", "?"):
            return self._commands() if len(before) == 1 else []
        if before[0] in LEARNING_COMMANDS:
            return self._for_learning_command(before)
        return self._for_argument(before, beginning)

    def _commands(self) -> list[Suggestion]:
        found = [
            Suggestion(name, _first_line(command))
            for command in self._monitor
            for name in command.names
            if not name.startswith("info ")
        ]
        return sorted({*found, Suggestion("info", "show what there is")}, key=lambda item: item.word)

    def _for_learning_command(self, before: list[str]) -> list[Suggestion]:
        command = LEARNING_COMMANDS[before[0]]
        if len(before) == 1:
            return [Suggestion(word) for word in command.words]
        if command.name == "guest" and len(before) == 2:
            return [Suggestion(name, "disk") for name in self.machine.device_names()]
        if command.name == "run" and len(before) == 2:
            return [Suggestion(name, "event") for name in self.machine.event_words()]
        if command.name == "run" and len(before) == 3:
            return [Suggestion("within", "at most so long"), *self._jobs()]
        return []

    def _for_argument(self, before: list[str], beginning: str) -> list[Suggestion]:
        """What fits the type of the HMP argument whose turn it is; a flag does not take a turn."""
        name = " ".join(before[:2]) if before[0] == "info" else before[0]
        command = self._monitor.find(name)
        if command is None:
            return []
        given = [word for word in before[len(name.split()) :] if not word.startswith("-")]
        places = [argument for argument in command.arguments if not argument.is_flag]
        flags = [Suggestion(a.kind, a.name) for a in command.arguments if a.is_flag] if beginning == "-" else []
        if len(given) >= len(places):
            return flags
        place = places[len(given)]
        if place.kind == "B":
            return [*flags, *(self._jobs() if command.name.startswith("block_job_") else self._names())]
        if place.kind == "F" or place.name in _FILE_ARGUMENTS:
            return [*flags, *_files(beginning)]
        return flags

    def _names(self) -> list[Suggestion]:
        devices = [Suggestion(name, "disk") for name in self.machine.device_names()]
        nodes = [Suggestion(name, "node") for name in self.machine.system.graph.nodes if not name.startswith("#")]
        return [*devices, *nodes]

    def _jobs(self) -> list[Suggestion]:
        jobs = self.machine.system.jobs.query_jobs()
        return [Suggestion(job["id"], f"{job['type']} job, {job['status']}") for job in jobs]


def _first_line(command: HmpCommand) -> str:
    return command.help.partition("\n")[0]


def _files(beginning: str) -> list[Suggestion]:
    """Files whose path begins so; directories end in a slash."""
    head, slash, tail = beginning.rpartition("/")
    try:
        entries = sorted(Path(head + slash or ".").iterdir())
    except OSError:
        return []
    shown = [entry for entry in entries if entry.name.startswith(tail) and (tail or not entry.name.startswith("."))]
    return [Suggestion(f"{head}{slash}{e.name}{'/' if e.is_dir() else ''}", "file") for e in shown]
