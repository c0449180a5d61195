"""What happened, in order: every effect on a file, every request of the guest, every word between management and machine.

One list of records; a *moment* is a number of records, those that had happened by then. The list is kept as
``history.jsonl`` beside ``writes.bin``, which holds the bytes that were written. All that the lab tells is computed from these
two and from the images that it began with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, TypeAlias

import attrs

from qblock.clock import Clock

HISTORY: Final = "history.jsonl"
WRITES: Final = "writes.bin"
NO_BYTES: Final = -1


@attrs.frozen
class Made:
    """A new, empty file (or an existing one, emptied). ``file`` is relative to the directory of the run."""

    ns: int
    file: str


@attrs.frozen
class Wrote:
    """Bytes changed. They are in ``writes.bin`` from ``place`` on, or zeroes when that is `NO_BYTES`."""

    ns: int
    file: str
    offset: int
    length: int
    place: int


@attrs.frozen
class Resized:
    """A file got another length."""

    ns: int
    file: str
    length: int


@attrs.frozen
class Flushed:
    """A file's writes before the moment ``began`` survive a power cut from now on."""

    ns: int
    file: str
    began: int


@attrs.frozen
class Read:
    """Bytes were read."""

    ns: int
    file: str
    offset: int
    length: int


@attrs.frozen
class Issued:
    """The guest sent a request (read, write, flush) that it had wanted to send since ``arrival_ns``."""

    ns: int
    number: int
    arrival_ns: int
    op: str
    offset: int
    length: int


@attrs.frozen
class Answered:
    """A request of the guest ended; ``error`` is empty when it was done."""

    ns: int
    number: int
    error: str


@attrs.frozen
class Told:
    """Something passed between management and monitor: it was ``sent``, or is a ``reply``, an ``error``, an ``event``."""

    ns: int
    direction: str
    text: str


@attrs.frozen
class Entered:
    """A phase of the run began, as management sees it."""

    ns: int
    phase: str


@attrs.frozen
class Witnessed:
    """The witness file has its byte."""

    ns: int


Record: TypeAlias = (
    Made | Wrote | Resized | Flushed | Read | Issued | Answered | Told | Entered | Witnessed
)
Effect: TypeAlias = Made | Wrote | Resized | Flushed
_KINDS: Final[Mapping[str, Callable[..., Record]]] = {
    kind.__name__.lower(): kind
    for kind in (Made, Wrote, Resized, Flushed, Read, Issued, Answered, Told, Entered, Witnessed)
}


class Recorder:
    """Takes the history of a run down. ``witness``: a file whose first byte is noticed before the next record."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.records: list[Record] = []
        self.clock = clock
        self.witness: Path | None = None
        self._directory = directory
        self._bytes = (directory / WRITES).open("wb")
        self._place = 0

    def add(self, record: Record) -> None:
        """Note what has just happened."""
        if self.witness is not None and self.witness.stat().st_size:
            self.witness = None
            self.records.append(Witnessed(self.clock.now_ns()))
        self.records.append(record)

    def keep(self, data: memoryview) -> int:
        """Keep the bytes of a write; returns their place."""
        self._bytes.write(data)
        self._place += len(data)
        return self._place - len(data)

    def close(self) -> None:
        """Write everything to the directory."""
        self._bytes.close()
        with (self._directory / HISTORY).open("w") as file:
            file.writelines(json.dumps(_packed(record)) + "\n" for record in self.records)


def _packed(record: Record) -> list[object]:
    """The kind and the members: a list, for there are many of them."""
    return [type(record).__name__.lower(), *attrs.astuple(record)]


def read_history(directory: Path) -> list[Record]:
    """The history that a `Recorder` has left; raises `OSError` and `ValueError`."""
    with (directory / HISTORY).open() as file:
        return [_unpacked(json.loads(line)) for line in file]


def _unpacked(packed: list[object]) -> Record:
    kind, *members = packed
    return _KINDS[str(kind)](*members)


def phases(records: Iterable[Record]) -> dict[str, tuple[int, int]]:
    """Begin and end of each phase in nanoseconds, in their order; the last record ends the last phase."""
    found: dict[str, tuple[int, int]] = {}
    current, began, last = "", 0, 0
    for record in records:
        last = record.ns
        if isinstance(record, Entered):
            if current:
                found[current] = (began, last)
            current, began = record.phase, last
    if current:
        found[current] = (began, last)
    return found
