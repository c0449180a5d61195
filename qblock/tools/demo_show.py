"""How the demo tells its story: headings, pictures, a progress bar and proofs in a terminal, or JSON lines for programs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from qblock.monitor.drawing import ASCII, UNICODE, Strokes, progress_bar
from qblock.units import SECOND_NS, format_size

if TYPE_CHECKING:
    from qblock.driver import Json

_BOLD: Final = "1"
_DIM: Final = "2"
_GREEN: Final = "32"
_RED: Final = "31"
_CYAN: Final = "36"
_SHORTEST_BAR: Final = 10


@attrs.frozen
class Proof:
    """Something that the demo has verified: ``claim`` in words, whether it ``holds``, and what was seen."""

    claim: str
    holds: bool
    seen: str
    extra: bool = False
    """True for a check by a program that not everybody has."""


class Presenter(Protocol):
    """Who shows the demo. Times are nanoseconds since its start."""

    @property
    def strokes(self) -> Strokes:
        """What pictures are drawn with."""

    def heading(self, ns: int, title: str, text: str) -> None:
        """A new chapter."""

    def graph(self, ns: int, when: str, lines: Sequence[str]) -> None:
        """The block graph ``before``, ``during`` or ``after``."""

    def message(self, ns: int, direction: str, value: Json) -> None:
        """What went over the monitor socket: ``sent``, ``received`` or ``event``."""

    def progress(self, ns: int, offset: int, length: int) -> None:
        """How far the job is, in bytes."""

    def proofs(self, ns: int, proofs: Sequence[Proof]) -> None:
        """The end: what was verified."""

    def note(self, ns: int, text: str) -> None:
        """A remark."""


@attrs.define(eq=False)
class TextPresenter:
    """For people. On a ``terminal`` a bar moves; elsewhere there is one line for each tenth of the way. ``width`` in columns."""

    write: Callable[[str], object]
    terminal: bool = False
    colours: bool = False
    unicode: bool = True
    width: int = 100
    _bar_shown: bool = attrs.field(init=False, default=False)
    _last_tenth: int = attrs.field(init=False, default=-1)

    @property
    def strokes(self) -> Strokes:
        """What pictures are drawn with."""
        return UNICODE if self.unicode else ASCII

    def _paint(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colours else text

    def _line(self, text: str = "") -> None:
        if self._bar_shown:
            self.write("\n")
            self._bar_shown = False
        self.write(text + "\n")

    def heading(self, ns: int, title: str, text: str) -> None:
        """See `Presenter`."""
        self._line()
        self._line(self._paint(f"== {title} ==", _BOLD))
        for line in textwrap.wrap(text, self.width - 2):
            self._line(line)

    def graph(self, ns: int, when: str, lines: Sequence[str]) -> None:
        """See `Presenter`."""
        self._line()
        self._line(self._paint(f"   the block graph {when}:", _DIM))
        for line in lines:
            self._line(f"     {self._paint(line, _CYAN)}")

    def message(self, ns: int, direction: str, value: Json) -> None:
        """See `Presenter`."""
        arrow = {"sent": "->", "received": "<-", "event": "<*"}[direction]
        shown = value if isinstance(value, str) else json.dumps(value)
        stamp = f"[{ns / SECOND_NS:8.3f} s]"
        lines = [part for line in shown.splitlines() for part in textwrap.wrap(line, self.width - len(stamp) - 4)]
        self._line(f"{self._paint(stamp, _DIM)} {arrow} {lines[0] if lines else ''}")
        for line in lines[1:]:
            self._line(" " * (len(stamp) + 4) + line)

    def progress(self, ns: int, offset: int, length: int) -> None:
        """See `Presenter`."""
        before, after = f"[{ns / SECOND_NS:8.3f} s]    ", f"  {format_size(offset)} of {format_size(length)}"
        room = self.width - len(before) - len(progress_bar(0, 1, width=0)) - 1
        if room - len(after) < _SHORTEST_BAR:
            after = ""
        bar = progress_bar(offset, length, width=min(room - len(after), 40), strokes=self.strokes)
        text = before + bar + after
        if self.terminal:
            self.write(f"\r\x1b[K{text}")
            self._bar_shown = True
            return
        tenth = offset * 10 // length if length else 10
        if tenth != self._last_tenth:
            self._last_tenth = tenth
            self._line(text)

    def proofs(self, ns: int, proofs: Sequence[Proof]) -> None:
        """See `Presenter`."""
        marks = ("✓", "✗") if self.unicode else ("ok", "FAILED")
        self._line()
        for proof in proofs:
            mark = self._paint(marks[0], _GREEN) if proof.holds else self._paint(marks[1], _RED)
            for number, line in enumerate(textwrap.wrap(proof.claim, self.width - 6)):
                self._line(f"      {line}" if number else f"  {mark} {line}")
            for line in textwrap.wrap(proof.seen, self.width - 6):
                self._line(self._paint(f"      {line}", _DIM))
        self._line()
        failed = sum(not proof.holds for proof in proofs)
        verdict = f"{failed} of {len(proofs)} proofs FAILED" if failed else f"all {len(proofs)} proofs hold"
        self._line(self._paint(verdict, _RED if failed else _GREEN))

    def note(self, ns: int, text: str) -> None:
        """See `Presenter`."""
        self._line(text)


@attrs.frozen
class JsonPresenter:
    """For programs: one JSON object for each thing that is told, with ``time`` in seconds and ``kind``."""

    write: Callable[[str], object]
    strokes: Strokes = ASCII

    def _tell(self, ns: int, kind: str, **members: Any) -> None:
        self.write(json.dumps({"time": round(ns / SECOND_NS, 6), "kind": kind, **members}) + "\n")

    def heading(self, ns: int, title: str, text: str) -> None:
        """See `Presenter`."""
        self._tell(ns, "chapter", title=title, text=text)

    def graph(self, ns: int, when: str, lines: Sequence[str]) -> None:
        """See `Presenter`."""
        self._tell(ns, "graph", when=when, lines=list(lines))

    def message(self, ns: int, direction: str, value: Json) -> None:
        """See `Presenter`."""
        self._tell(ns, direction, value=value)

    def progress(self, ns: int, offset: int, length: int) -> None:
        """See `Presenter`."""
        self._tell(ns, "progress", offset=offset, len=length)

    def proofs(self, ns: int, proofs: Sequence[Proof]) -> None:
        """See `Presenter`."""
        members: list[Mapping[str, Any]] = [attrs.asdict(proof) for proof in proofs]
        self._tell(ns, "proofs", hold=all(proof.holds for proof in proofs), proofs=members)

    def note(self, ns: int, text: str) -> None:
        """See `Presenter`."""
        self._tell(ns, "note", text=text)
