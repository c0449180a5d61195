"""--trace of the programs: which trace events are logged, and where the lines go.

Takes the options of QEMU's --trace (``[enable=]PATTERN``, ``events=FILE``, ``file=FILE``, also as JSON); ``help`` lists them.
Lines are those of QEMU's log backend: the event's name and what it has to tell, on standard error unless ``file`` is given.
Differs from QEMU: ``timestamp=on`` is an option of --trace (QEMU has it in -msg), and stamps are those of the machine's own
clock; of several ``file`` options the last one counts, whatever follows it. A line that cannot be written is lost: what is traced
must not fail for that.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Final

import attrs

from qblock.errors import CommandError, InvalidParameter
from qblock.options import parse_options
from qblock.tools.console import complain
from qblock.tracing import Trace

if TYPE_CHECKING:
    from qblock.clock import Clock
    from qblock.monitor.dialects import Dialect
    from qblock.system import BlockSystem

HELP_WORDS: Final = frozenset({"help", "?", "list"})
"""What asks for the list of events instead of naming some."""
SWITCHES: Final = {"on": True, "off": False}


@attrs.frozen
class _Wish:
    """A pattern, and where it was given if that was in a file; a pattern after ``-`` switches off."""

    pattern: str
    place: str = ""

    def apply(self, trace: Trace, program: str) -> None:
        """Do it; an event that does not exist is worth a warning, as in QEMU."""
        name = self.pattern.removeprefix("-")
        if "*" not in name and trace.find(name) is None:
            complain(program, f"{self.place}warning: trace event '{name}' does not exist")
        trace.switch(name, on=name == self.pattern)


@attrs.define(eq=False)
class Tracer:
    """What the --trace options of one command line ask for, in their order; `attach` does it, `close` at the end."""

    program: str
    timestamps: bool = False
    output: IO[str] | None = None
    _wishes: list[_Wish] = attrs.field(factory=list, init=False)
    _warned: bool = attrs.field(default=False, init=False)

    @classmethod
    def of(cls, program: str, texts: Sequence[str]) -> Tracer:
        """A tracer for these values of --trace; raises `CommandError`."""
        tracer = cls(program)
        try:
            for text in texts:
                tracer.configure(text)
        except BaseException:
            tracer.close()
            raise
        return tracer

    def configure(self, text: str) -> None:
        """Take one value of --trace; raises `CommandError`."""
        options = _parse(text)
        if "enable" in options:
            self._wishes.append(_Wish(options.pop("enable")))
        if "events" in options:
            self._read_events(options.pop("events"))
        if "timestamp" in options:
            value = options.pop("timestamp")
            if value not in SWITCHES:
                raise InvalidParameter("timestamp", f"must be 'on' or 'off', not '{value}'")
            self.timestamps = SWITCHES[value]
        if "file" in options:
            self._open(options.pop("file"))
        for name in options:
            raise InvalidParameter(name, "is unexpected: --trace takes enable, events, file and timestamp")

    def attach(self, trace: Trace, clock: Clock) -> None:
        """Switch the events of ``trace`` as asked for; time stamps are of ``clock``. Warns of events that do not exist."""
        trace.log = partial(self._write, trace, clock)
        for wish in self._wishes:
            wish.apply(trace, self.program)

    def watch(self, system: BlockSystem) -> None:
        """Attach this to a system that has just been made."""
        self.attach(system.env.trace, system.env.clock)

    def close(self) -> None:
        """Close the file that was opened for ``file=``."""
        if self.output is not None:
            try:
                self.output.close()
            except OSError as error:
                self._warn(error)
            self.output = None

    def _write(self, trace: Trace, clock: Clock, name: str, members: Mapping[str, object]) -> None:
        stamp = ""
        if self.timestamps:
            seconds, microseconds = clock.wall()
            stamp = f"{os.getpid()}@{seconds}.{microseconds:06}:"
        output = self.output if self.output is not None else sys.stderr
        try:
            output.write(f"{stamp}{trace.line(name, members)}\n")
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        """Tell once that lines are lost; on standard error, which may be what cannot be written."""
        if not self._warned:
            self._warned = True
            with contextlib.suppress(OSError):
                complain(self.program, f"warning: not all of the trace could be written: {error.strerror}")

    def _read_events(self, path: str) -> None:
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line.strip() for line in file]
        except OSError as error:
            raise CommandError(f"--trace: cannot read '{path}': {error.strerror}") from error
        for number, line in enumerate(lines, 1):
            if line and not line.startswith("#"):
                self._wishes.append(_Wish(line, f"{path}:{number}: "))

    def _open(self, path: str) -> None:
        self.close()
        try:
            self.output = open(path, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise CommandError(f"--trace: cannot write '{path}': {error.strerror}") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        options, _ = parse_options(text, implied_key="enable")
    except CommandError as error:
        raise CommandError(f"--trace: {error}") from error
    for name, value in options.items():
        if not isinstance(value, str):
            raise InvalidParameter(name, "must be a string")
    return options


def asks_for_list(texts: Sequence[str]) -> bool:
    """Whether one of these values of --trace asks what events there are."""
    return not HELP_WORDS.isdisjoint(texts)


def print_events(trace: Trace, write: Callable[[str], None] = print) -> None:
    """What ``--trace help`` prints: the name of every event, in alphabetical order."""
    for name in sorted(event.name for event in trace.matching()):
        write(name)


def monitor_trace(dialect: Dialect) -> Trace:
    """The events of a program whose monitors have the commands of ``dialect``, all of them off."""
    from qblock.monitor.commands import table
    from qblock.monitor.events import EVENTS
    from qblock.monitor.tracing import declare_events

    trace = Trace()
    declare_events(trace, table(dialect), EVENTS)
    return trace
