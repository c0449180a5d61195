"""Tracing for programs: lines about what happens, chosen by name patterns.

Takes the options of QEMU's --trace (``[enable=]PATTERN``, ``events=FILE``, ``file=FILE``, also as JSON). Differs from QEMU: the
events are our own, one for each QMP event (``qmp_event_block_job_ready``) and a few of the program's life; there is one
backend, which writes lines ``PID@SECONDS.MICROSECONDS:NAME DATA``.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, Final

import attrs

from qblock.errors import CommandError, InvalidParameter
from qblock.options import parse_keyval

PREFIX: Final = "qmp_event_"
QMP_EVENTS: Final = (
    "BLOCK_IO_ERROR", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR", "BLOCK_JOB_PENDING",
    "BLOCK_JOB_READY", "BLOCK_WRITE_THRESHOLD", "BLOCK_IMAGE_CORRUPTED", "JOB_STATUS_CHANGE",
)  # fmt: skip
PROGRAM_EVENTS: Final = ("program_ready", "program_exit", "blockdev_opened", "monitor_listening")
EVENTS: Final = (*PROGRAM_EVENTS, *(PREFIX + name.lower() for name in QMP_EVENTS))


@attrs.define(eq=False)
class Tracer:
    """Which events are on, and where their lines go. Later patterns win; a pattern after ``-`` switches off."""

    patterns: list[str] = attrs.field(factory=list)
    output: IO[str] | None = None

    def enabled(self, name: str) -> bool:
        """Whether an event of that name is written."""
        state = False
        for pattern in self.patterns:
            if fnmatch.fnmatchcase(name, pattern.removeprefix("-")):
                state = not pattern.startswith("-")
        return state

    def trace(self, name: str, when: tuple[int, int], **data: object) -> None:
        """Write one line, if the event is on; ``when`` is wall-clock seconds and microseconds."""
        if self.patterns and self.enabled(name):
            text = " ".join(f"{key}={_text(value)}" for key, value in data.items())
            print(f"{os.getpid()}@{when[0]}.{when[1]:06}:{name} {text}".rstrip(), file=self.output or sys.stderr, flush=True)

    def qmp_event(self, name: str, data: Mapping[str, Any], when: tuple[int, int]) -> None:
        """A subscriber for a BlockSystem's event bus."""
        self.trace(PREFIX + name.lower(), when, **{key.replace("-", "_"): value for key, value in data.items()})

    def close(self) -> None:
        """Close the file that was opened for ``file=``."""
        if self.output is not None:
            self.output.close()
            self.output = None


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def print_events(names: Iterable[str] = EVENTS, write: Callable[[str], None] = print) -> None:
    """What --trace help prints."""
    for name in sorted(names):
        write(name)


def configure(tracer: Tracer, text: str) -> None:
    """Take one --trace option; raises `CommandError`."""
    options = _parse(text)
    if "enable" in options:
        _enable(tracer, options.pop("enable"))
    if "events" in options:
        path = options.pop("events")
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line.strip() for line in file]
        except OSError as error:
            raise CommandError(f"--trace: cannot read '{path}': {error.strerror}") from error
        for line in lines:
            if line and not line.startswith("#"):
                _enable(tracer, line)
    if "file" in options:
        path = options.pop("file")
        tracer.close()
        try:
            tracer.output = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by Tracer.close
        except OSError as error:
            raise CommandError(f"--trace: cannot write '{path}': {error.strerror}") from error
    for name in options:
        raise InvalidParameter(name, "is unexpected: --trace takes enable, events and file")


def _parse(text: str) -> dict[str, Any]:
    if not text.startswith("{"):
        return parse_keyval(text, implied_key="enable")
    try:
        options = json.loads(text)
    except ValueError as error:
        raise CommandError(f"--trace: this is not JSON: {error}") from error
    for name, value in options.items():
        if not isinstance(value, str):
            raise InvalidParameter(name, "must be a string")
    return dict(options)


def _enable(tracer: Tracer, pattern: str) -> None:
    if not fnmatch.filter(EVENTS, pattern.removeprefix("-")):
        raise CommandError(f"--trace: no event is called '{pattern.removeprefix('-')}'; --trace help lists them")
    tracer.patterns.append(pattern)
