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
_WIDTH: Final = 100
"""How long lines of text get; the widest table is a little wider."""
_BOLD: Final = "1"
_DIM: Final = "2"
_RED: Final = "31"
_CRASH_PHASES: Final = (COPYING, IN_STEP, SWITCHING, AFTER)
_CRASH_WORDS: Final[Mapping[str, str]] = {KILL: "killed", POWER: "power cut"}

Row = Sequence[str]


@attrs.frozen
class Painter:
    """Colours, where there is somebody to see them."""

    colours: bool

    def paint(self, text: str, code: str) -> str:
        """``text`` in a colour or weight (an SGR code)."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours and text.strip() else text


def render(report: Report, painter: Painter) -> str:
    """All tables."""
    settings = report.settings
    head = (
        f"A disk of {format_size(settings.size)} is moved while the same guest uses it (seed {settings.seed}, virtual time"
        f"{', no pauses in its writing' if settings.steady else ''}).\n"
        f"Disks ({settings.disk}): {settings.model.summary}."
    )
    parts = [head, _legend(report, painter), _costs(report, painter)]
    parts += [_latencies(report, op, painter) for op in OPERATIONS]
    parts += [_allowed(report, painter), _crashes(report, painter)]
    return "\n\n".join(parts) + "\n"


def aligned(rows: Sequence[Row], *, left: int = 1) -> list[str]:
    """Lines of columns: the first ``left`` begin at the left, the others end at the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _titled(title: str, lines: Sequence[str], painter: Painter, *, heads: int = 1) -> str:
    dimmed = [painter.paint(line, _DIM) for line in lines[:heads]]
    return "\n".join([painter.paint(title, _BOLD), *dimmed, *lines[heads:]])


def _legend(report: Report, painter: Painter) -> str:
    lines = aligned([(run.name, run.title) for run in report.runs], left=2)
    troubles = [f"{run.name}: {run.outcome}" for run in report.runs if not run.switched]
    return "\n".join(lines + [painter.paint(trouble, _RED) for trouble in troubles])


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
    return _titled(title, aligned(rows), painter)


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
    return _titled(f"WHAT THE GUEST'S {plural.upper()} TAKE, from the command to the switch", aligned(rows), painter)


def _latency_cells(latency: Latency) -> Row:
    found = latency.percentiles
    longest = milliseconds(latency.longest_ns) if latency.count else "-"
    return (str(latency.count), *(milliseconds(found.get(name)) for name in PERCENTILES), longest)


# ----------------------------------------------------------------------------------------------------------- what is allowed


def _allowed(report: Report, painter: Painter) -> str:
    rows: list[Row] = [("", *QUESTIONS)]
    for run in report.runs:
        rows.append((run.name, *(_allowed_cell([p for p in run.probes if p.name == name]) for name in QUESTIONS)))
    lines = aligned(rows, left=len(rows[0]))
    texts: dict[str, list[str]] = {}
    for run in report.runs:
        for probe in run.probes:
            said = probe.text or (probe.then if "fails" in probe.then else "")
            if said and run.name not in texts.setdefault(said, []):
                texts[said].append(run.name)
    said_by = [f"{', '.join(names)}: {text}" for text, names in texts.items()]
    wrapped = [textwrap.fill(note, _WIDTH, initial_indent="  ", subsequent_indent="    ") for note in said_by]
    notes = [painter.paint(note, _DIM) for note in wrapped]
    title = "WHAT IS ALLOWED MEANWHILE (while copying / in step; one word: the same in both)"
    return _titled(title, lines + notes, painter)


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
    lines = aligned(rows, left=len(heads))
    coloured = [painter.paint(line, _RED) if "LOSES" in line else line for line in lines]
    title = (
        "WHAT SURVIVES A CRASH (at how many of the moments looked at the source and the target are good: the\n"
        "image opens, checks clean, and holds every write that was flushed; killed: the process dies; power\n"
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
