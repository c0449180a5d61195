"""The comparison as text: tables for a terminal, aligned, with the legend that they need."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs

from qblock.lab.compare.crashes import UNKNOWN, CrashPoint, Leftover
from qblock.lab.compare.load import OPERATIONS
from qblock.lab.compare.measuring import PERCENTILES, Latency
from qblock.lab.compare.probing import QUESTIONS, Probe
from qblock.lab.compare.replaying import CRASHES, KILL, POWER
from qblock.lab.compare.report import OPERATION, Report, RunReport
from qblock.lab.compare.running import AFTER, COPYING, IN_STEP, SWITCHING
from qblock.lab.compare.storage import SOURCE, TARGET
from qblock.units import MILLISECOND_NS, SECOND_NS, MiB, format_size

GUEST_ALONE: Final = "guest alone"
WIDTH: Final = 100
"""How long lines get, except on a narrower terminal."""
NARROWEST: Final = 30
"""Nothing is made narrower than so many columns."""
_GAP: Final = 2
_BOLD: Final = "1"
_DIM: Final = "2"
_RED: Final = "31"
_CRASH_PHASES: Final = (COPYING, IN_STEP, SWITCHING, AFTER)
_CRASH_WORDS: Final[Mapping[str, str]] = {KILL: "killed", POWER: "power cut"}

Row = Sequence[str]


@attrs.frozen
class Painter:
    """Colours, where there is somebody to see them, and the columns that there are."""

    colours: bool
    width: int = WIDTH

    def paint(self, text: str, code: str) -> str:
        """``text`` in a colour or weight (an SGR code)."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours and text.strip() else text

    def wrap(self, text: str, code: str = "", *, first: str = "", rest: str = "") -> list[str]:
        """The lines of a text, broken between words; ``first`` and ``rest`` are what they begin with."""
        lines = textwrap.wrap(
            text,
            max(self.width, NARROWEST),
            initial_indent=first,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return [self.paint(line, code) for line in lines] if code else lines


def render(report: Report, painter: Painter) -> str:
    """All tables."""
    settings = report.settings
    head = painter.wrap(
        f"A disk of {format_size(settings.size)} is moved while the same guest uses it (seed {settings.seed}, virtual time"
        f"{', no pauses in its writing' if settings.steady else ''})."
    )
    head += painter.wrap(f"Disks ({settings.disk}): {settings.model.summary}.")
    parts = ["\n".join(head), _legend(report, painter), _costs(report, painter)]
    parts += [_latencies(report, op, painter) for op in OPERATIONS]
    parts += [_allowed(report, painter), _crashes(report, painter)]
    return "\n\n".join(parts) + "\n"


def aligned(rows: Sequence[Row], *, width: int = WIDTH, left: int = 1, keys: int = 1) -> list[list[str]]:
    """Lines of columns: the first ``left`` begin at the left, the others end at the right.

    A table that is wider than ``width`` comes in several parts, of much the same width, each a list of lines; each part begins
    with the first ``keys`` columns.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [_lines(rows, widths, [*range(keys), *columns], left) for columns in _parts(widths, width, keys)]


def _lines(rows: Sequence[Row], widths: Sequence[int], columns: Sequence[int], left: int) -> list[str]:
    gap = " " * _GAP
    return [
        gap.join(
            row[column].ljust(widths[column]) if column < left else row[column].rjust(widths[column])
            for column in columns
        ).rstrip()
        for row in rows
    ]


def _parts(widths: Sequence[int], width: int, keys: int) -> list[list[int]]:
    """Which columns besides the keys come together: in as few parts as possible, the widest as narrow as possible."""
    least = best = _filled(widths, width, keys)
    while len(best) == len(least) > 1 and width > 0:
        least, width = best, width - 1
        best = _filled(widths, width, keys)
    return least


def _filled(widths: Sequence[int], width: int, keys: int) -> list[list[int]]:
    head = sum(width + _GAP for width in widths[:keys]) - _GAP
    parts: list[list[int]] = [[]]
    used = head
    for column in range(keys, len(widths)):
        needed = widths[column] + _GAP
        if parts[-1] and used + needed > width:
            parts.append([])
            used = head
        parts[-1].append(column)
        used += needed
    return parts


def _titled(title: str, parts: Sequence[Sequence[str]], painter: Painter) -> str:
    """A table, in all its parts, below its title; the first line of each part has the heads of the columns."""
    bodies = ["\n".join([painter.paint(lines[0], _DIM), *lines[1:]]) for lines in parts]
    return "\n".join([*painter.wrap(title, _BOLD), "\n\n".join(bodies)])


def _legend(report: Report, painter: Painter) -> str:
    width = max(len(run.name) for run in report.runs) + _GAP
    lines = [
        line
        for run in report.runs
        for line in painter.wrap(run.title, first=f"{run.name:{width}}", rest=" " * width)
    ]
    for run in report.runs:
        if not run.switched:
            lines += painter.wrap(f"{run.name}: {run.outcome}", _RED, rest="  ")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- time and cost


def _costs(report: Report, painter: Painter) -> str:
    rows: list[Row] = [
        ("", "copy", "switch", "longest pause", "S read", "S written", "T written", "T flushes")
    ]
    for run in report.runs:
        source, target = run.cost[SOURCE], run.cost[TARGET]
        rows.append(
            (
                run.name,
                seconds(run.copy_ns),
                "itself" if run.switched and run.switch_ns is None else milliseconds(run.switch_ns),
                milliseconds(run.pause_ns[OPERATION]),
                mebibytes(source.read),
                mebibytes(source.written),
                mebibytes(target.written),
                str(target.flushes),
            )
        )
    title = "TIME AND COST (S source, T target: what the operation asks of the disks, beyond what the guest does)"
    return _titled(title, aligned(rows, width=painter.width), painter)


def seconds(ns: int | None) -> str:
    """A time for people; a dash when there is none."""
    return "-" if ns is None else f"{ns / SECOND_NS:.2f} s"


def milliseconds(ns: int | None) -> str:
    """A time for people, three digits or so; a dash when there is none."""
    if ns is None:
        return "-"
    value = ns / MILLISECOND_NS
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def mebibytes(count: int) -> str:
    """A number of bytes in MiB."""
    return f"{round(count / MiB, 1) + 0.0:.1f} MiB"  # the sum makes of a negative zero a positive one


# ----------------------------------------------------------------------------------------------------------------- latency


def _latencies(report: Report, op: str, painter: Painter) -> str:
    rows: list[Row] = [("", "requests", *PERCENTILES, "longest")]
    rows.append((GUEST_ALONE, *_latency_cells(report.control[op])))
    rows += [(run.name, *_latency_cells(run.latency[OPERATION][op])) for run in report.runs]
    plural = {"flush": "flushes"}.get(op, f"{op}s")
    title = f"WHAT THE GUEST'S {plural.upper()} TAKE, from the command to the switch"
    return _titled(title, aligned(rows, width=painter.width), painter)


def _latency_cells(latency: Latency) -> Row:
    found = latency.percentiles
    longest = milliseconds(latency.longest_ns) if latency.count else "-"
    return (str(latency.count), *(milliseconds(found.get(name)) for name in PERCENTILES), longest)


# ----------------------------------------------------------------------------------------------------------- what is allowed


def _allowed(report: Report, painter: Painter) -> str:
    rows: list[Row] = [("", *QUESTIONS)]
    for run in report.runs:
        rows.append((run.name, *(_allowed_cell([p for p in run.probes if p.name == name]) for name in QUESTIONS)))
    parts = aligned(rows, width=painter.width, left=len(rows[0]))
    texts: dict[str, list[str]] = {}
    for run in report.runs:
        for probe in run.probes:
            said = probe.text or (probe.then if "fails" in probe.then else "")
            if said and run.name not in texts.setdefault(said, []):
                texts[said].append(run.name)
    said_by = [f"{', '.join(names)}: {text}" for text, names in texts.items()]
    notes = [line for note in said_by for line in painter.wrap(note, _DIM, first="  ", rest="    ")]
    title = "WHAT IS ALLOWED MEANWHILE (while copying / in step; one word: the same in both)"
    return "\n".join([_titled(title, parts, painter), *notes])


def _allowed_cell(probes: Sequence[Probe]) -> str:
    words = [_allowed_word(probe) for probe in probes]
    return words[0] if len(set(words)) == 1 else " / ".join(words)


def _allowed_word(probe: Probe) -> str:
    if not probe.allowed:
        return "no"
    return "yes" if probe.then == "the operation ends well" else "ends it"


# ----------------------------------------------------------------------------------------------------------------- crashes


def _crashes(report: Report, painter: Painter) -> str:
    heads: Row = ("", "", *_CRASH_PHASES, "management")
    rows = [heads]
    for run in report.runs:
        for number, crash in enumerate(CRASHES):
            cells = [_crash_cell([p for p in run.crashes if p.phase == phase], crash) for phase in _CRASH_PHASES]
            rows.append((run.name if not number else "", _CRASH_WORDS[crash], *cells, knowledge(run, crash)))
    parts = aligned(rows, width=painter.width, left=len(heads), keys=2)
    coloured = [[painter.paint(line, _RED) if "LOSES" in line else line for line in lines] for lines in parts]
    title = (
        "WHAT SURVIVES A CRASH (at how many of the moments looked at the source and the target are good: the "
        "image opens, checks clean, and holds every write that was flushed; killed: the process dies; power "
        "cut: nothing unflushed is left; risky: management cannot know which is the disk, and one is not good)"
    )
    return _titled(title, coloured, painter)


def left_by(point: CrashPoint, crash: str) -> Leftover:
    """What that kind of crash leaves."""
    return point.kill if crash == KILL else point.power


def _crash_cell(points: Sequence[CrashPoint], crash: str) -> str:
    if not points:
        return "-"

    def share(good: Callable[[Leftover], bool]) -> str:
        return f"{sum(good(left_by(point, crash)) for point in points)}/{len(points)}"

    return f"{share(lambda left: left.source.good)}  {share(lambda left: left.target.good)}"


def knowledge(run: RunReport, crash: str) -> str:
    """Whether management can know which image to take after a crash, in words."""
    lost = [point for point in run.crashes if point.pick != UNKNOWN and not left_by(point, crash).safe]
    if lost:
        return f"LOSES data at {len(lost)} moments"
    guesses = [point for point in run.crashes if point.pick == UNKNOWN]
    if not guesses:
        return "always knows"
    phases = " and ".join(dict.fromkeys(point.phase for point in guesses))
    risky = sum(not left_by(point, crash).safe for point in guesses)
    return f"{risky}/{len(guesses)} risky while {phases}"
