"""The comparison as a picture: how long the guest waits, how long each way takes, what it moves, what a crash leaves.

Above, for each kind of request, the share of requests against their latency, with more and more room towards the slowest.
Below, a row for each strategy: its phases in time, what it reads and writes, and the images at the moments looked at.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from qblock.lab.compare.crashes import UNKNOWN, CrashPoint
from qblock.lab.compare.judging import Verdict
from qblock.lab.compare.load import OPERATIONS
from qblock.lab.compare.measuring import Latency
from qblock.lab.compare.report import OPERATION, Report, RunReport
from qblock.lab.compare.running import AFTER, COPYING, GAVE_UP, IN_STEP, SWITCHING
from qblock.lab.compare.storage import SOURCE, TARGET
from qblock.lab.compare.svg import FAINT, Sheet
from qblock.lab.compare.table import GUEST_ALONE, mebibytes, milliseconds
from qblock.units import MILLISECOND_NS, SECOND_NS, format_size

WIDTH: Final = 1280
MARGIN: Final = 32
_CURVES_TOP, _CURVES_HEIGHT = 118, 250
_ROW: Final = 74
_ROWS_TOP: Final = _CURVES_TOP + _CURVES_HEIGHT + 128
_COLOURS: Final = ("#D55E00", "#009E73", "#CC79A7", "#0072B2", "#E69F00", "#56B4E9")
_GREY: Final = "#9aa1ab"
_GOOD, _HALF, _BAD = "#2a9d5c", "#f2b53c", "#ffffff"
_BAD_EDGE: Final = "#c0392b"
_PHASES: Final[Mapping[str, str]] = {
    COPYING: "#9dbfe0", IN_STEP: "#d9e6f2", SWITCHING: "#1f3a5f", AFTER: "#c9e7d3", GAVE_UP: "#f3c6c0",
}  # fmt: skip
_NINES: Final = {"50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999}
_TOP_NINES: Final = 3.3
_FASTEST_NS: Final = MILLISECOND_NS / 10
"""Where the axis of latencies begins: what is answered from memory is drawn at its foot."""


def draw(report: Report) -> str:
    """The text of an SVG file."""
    height = _ROWS_TOP + _ROW * len(report.runs) + 64
    sheet = Sheet(WIDTH, height, title="Ways of moving a disk, compared")
    settings = report.settings
    sheet.text(MARGIN, 40, "Moving a disk under its guest", size=22, bold=True)
    load = f"seed {settings.seed}" + (", without pauses" if settings.steady else "")
    sheet.text(
        MARGIN, 62,
        f"The same load on a disk of {format_size(settings.size)}, {load}, on modelled disks ({settings.disk}: "
        f"{settings.model.summary})",
        size=12.5, colour=FAINT,
    )  # fmt: skip
    colours = {run.name: _COLOURS[number % len(_COLOURS)] for number, run in enumerate(report.runs)}
    _draw_curves(sheet, report, colours)
    _draw_rows(sheet, report, colours)
    return sheet.svg()


# ---------------------------------------------------------------------------------------------------------------- latency


@attrs.frozen
class _Axes:
    """Where latencies and shares are on the sheet."""

    left: float
    width: float
    low: float
    high: float

    def x(self, ns: float) -> float:
        """Where a latency is, on a logarithmic scale."""
        low, high = math.log10(self.low), math.log10(self.high)
        return self.left + self.width * (math.log10(max(ns, self.low)) - low) / (high - low)

    @staticmethod
    def y(share: float) -> float:
        """Where a share of the requests is: each nine takes as much room as the one before."""
        nines = min(_TOP_NINES, -math.log10(1 - share)) if share < 1 else _TOP_NINES
        return _CURVES_TOP + _CURVES_HEIGHT * (1 - nines / _TOP_NINES)


def _draw_curves(sheet: Sheet, report: Report, colours: Mapping[str, str]) -> None:
    everything = [report.control[op] for op in OPERATIONS]
    everything += [run.latency[OPERATION][op] for run in report.runs for op in OPERATIONS]
    slowest = max(latency.longest_ns for latency in everything)
    low, high = _FASTEST_NS, 10.0 ** math.ceil(math.log10(max(slowest, 10 * _FASTEST_NS)))
    gap = 56
    width = (WIDTH - 2 * MARGIN - 40 - 2 * gap) / 3
    for number, op in enumerate(OPERATIONS):
        axes = _Axes(MARGIN + 40 + number * (width + gap), width, low, high)
        heading = {"read": "Reads", "write": "Writes", "flush": "Flushes"}[op]
        sheet.text(axes.left, _CURVES_TOP - 22, heading, size=14, bold=True)
        where = axes.left + 62 if op != "flush" else axes.left + 72
        sheet.text(where, _CURVES_TOP - 22, "share that was answered within…", size=11, colour=FAINT)
        _draw_axes(sheet, axes)
        _draw_curve(sheet, axes, report.control[op], _GREY, dashes="5 3")
        for run in report.runs:
            _draw_curve(sheet, axes, run.latency[OPERATION][op], colours[run.name])
    x = MARGIN + 40.0
    for name, colour in [(GUEST_ALONE, _GREY), *colours.items()]:
        sheet.box(x, _CURVES_TOP + _CURVES_HEIGHT + 40, 22, 4, fill=colour)
        sheet.text(x + 29, _CURVES_TOP + _CURVES_HEIGHT + 46, name, size=12)
        x += 29 + 7.2 * len(name) + 34


def _draw_axes(sheet: Sheet, axes: _Axes) -> None:
    bottom = _CURVES_TOP + _CURVES_HEIGHT
    decade = axes.low
    while decade <= axes.high:
        x = axes.x(decade)
        sheet.line((x, _CURVES_TOP), (x, bottom))
        label = f"{decade / MILLISECOND_NS:g} ms" if decade < SECOND_NS else f"{decade / SECOND_NS:g} s"
        sheet.text(x, bottom + 17, label, size=10.5, colour=FAINT, anchor="middle")
        decade *= 10
    for label, share in _NINES.items():
        y = axes.y(share)
        sheet.line((axes.left, y), (axes.left + axes.width, y))
        sheet.text(axes.left - 6, y + 4, label, size=10.5, colour=FAINT, anchor="end")
    sheet.line((axes.left, bottom), (axes.left + axes.width, bottom), colour=FAINT)


def _draw_curve(sheet: Sheet, axes: _Axes, latency: Latency, colour: str, *, dashes: str = "") -> None:
    if not latency.curve:
        return
    # One request of n is no share of 100 %, as far as anybody can tell: the last step ends at 1 - 1/(2n).
    top = 1 - 0.5 / latency.count
    steps = {round(axes.x(ns), 1): axes.y(min(share, top)) for share, ns in latency.curve}
    sheet.stairs(list(steps.items()), foot=axes.y(0), colour=colour, dashes=dashes)
    x, y = list(steps.items())[-1]
    sheet.dot(x, y, radius=2.6, fill=colour, edge=colour)


# ---------------------------------------------------------------------------------------------------------------- the rows

_NAME_X: Final = MARGIN
_TIME_X, _TIME_WIDTH = 222, 318
_BYTES_X, _BYTES_WIDTH = 578, 80
_CRASH_X: Final = 800
_CRASH_PHASES: Final = (COPYING, IN_STEP, SWITCHING, AFTER)
_CRASH_WIDTH: Final = (WIDTH - MARGIN - _CRASH_X - 22) / len(_CRASH_PHASES)


def _draw_rows(sheet: Sheet, report: Report, colours: Mapping[str, str]) -> None:
    top = _ROWS_TOP
    _draw_heads(sheet, top)
    longest = max((_operation(run) for run in report.runs), default=1)
    most = max((max(cost.read, cost.written) for run in report.runs for cost in run.cost.values()), default=1)
    for number, run in enumerate(report.runs):
        y = top + number * _ROW
        sheet.line((MARGIN, y), (WIDTH - MARGIN, y))
        sheet.box(_NAME_X, y + 14, 5, _ROW - 28, fill=colours[run.name])
        sheet.text(_NAME_X + 14, y + 25, run.name, size=13.5, bold=True)
        sheet.lines(_NAME_X + 14, y + 41, textwrap.wrap(run.title, 30)[:3], size=10.5)
        _draw_time(sheet, run, y, _TIME_WIDTH / longest)
        _draw_bytes(sheet, run, y, _BYTES_WIDTH / max(most, 1))
        _draw_crashes(sheet, run, y)
    y = top + len(report.runs) * _ROW
    sheet.line((MARGIN, y), (WIDTH - MARGIN, y))
    _draw_key(sheet, y + 30)


def _draw_heads(sheet: Sheet, top: float) -> None:
    sheet.text(_TIME_X, top - 34, "Time", size=14, bold=True)
    x = float(_TIME_X)
    for phase in (COPYING, IN_STEP, SWITCHING):
        sheet.box(x, top - 20, 11, 11, fill=_PHASES[phase])
        sheet.text(x + 16, top - 10, phase, size=10.5, colour=FAINT)
        x += 30 + 6 * len(phase)
    sheet.text(_BYTES_X, top - 34, "Moved for the operation", size=14, bold=True)
    sheet.text(_BYTES_X, top - 10, "beyond the guest's own", size=10.5, colour=FAINT)
    sheet.text(_CRASH_X, top - 34, "Images after a crash (S source, T target)", size=14, bold=True)
    for number, phase in enumerate(_CRASH_PHASES):
        sheet.text(_CRASH_X + 22 + number * _CRASH_WIDTH, top - 10, phase, size=10.5, colour=FAINT)


def _operation(run: RunReport) -> int:
    """How long a run is drawn: from the command to the switch, or to the giving up."""
    begin = run.phases[COPYING][0]
    return max(bounds[1] for phase, bounds in run.phases.items() if phase in (COPYING, IN_STEP, SWITCHING)) - begin


def _draw_time(sheet: Sheet, run: RunReport, y: float, scale: float) -> None:
    begin = run.phases[COPYING][0]
    for phase in (COPYING, IN_STEP, SWITCHING):
        if phase not in run.phases:
            continue
        start, end = run.phases[phase]
        x, width = _TIME_X + (start - begin) * scale, (end - start) * scale
        hint = f"{phase}: {milliseconds(end - start)}"
        sheet.box(x, y + 16, max(width, 2.5 if phase == SWITCHING else 0), 20, fill=_PHASES[phase], hint=hint)
    if not run.switched:
        sheet.text(_TIME_X, y + 52, run.outcome, size=11, colour=_BAD_EDGE)
        return
    copying = f"copy {(run.copy_ns or 0) / SECOND_NS:.2f} s"
    switch = f", switch {milliseconds(run.switch_ns)}" if SWITCHING in run.phases else ", switches by itself"
    pause = f"longest pause of the guest {milliseconds(run.pause_ns[OPERATION])}"
    sheet.text(_TIME_X, y + 51, copying + switch, size=11)
    sheet.text(_TIME_X, y + 65, pause, size=10.5, colour=FAINT)


def _draw_bytes(sheet: Sheet, run: RunReport, y: float, scale: float) -> None:
    source, target = run.cost[SOURCE], run.cost[TARGET]
    bars = (("read", source.read, "#b8c4d2"), ("source", source.written, "#c0392b"), ("target", target.written, "#4a6fa5"))
    for number, (name, count, colour) in enumerate(bars):
        top = y + 13 + number * 18
        count = max(0, count)
        label = "source read" if name == "read" else f"{name} written"
        width = max(1.5, count * scale)
        sheet.box(_BYTES_X, top, width, 10, fill=colour)
        sheet.text(_BYTES_X + width + 6, top + 9, f"{mebibytes(count)} {label}", size=9.5, colour=FAINT)


def _draw_crashes(sheet: Sheet, run: RunReport, y: float) -> None:
    for letter, row in (("S", 24), ("T", 44)):
        sheet.text(_CRASH_X, y + row + 4, letter, size=11, bold=True)
    for number, phase in enumerate(_CRASH_PHASES):
        points = [point for point in run.crashes if point.phase == phase]
        x = _CRASH_X + 28 + number * _CRASH_WIDTH
        step = min(13.0, (_CRASH_WIDTH - 20) / max(len(points), 1))
        for place, point in enumerate(points):
            _draw_verdicts(sheet, point, x + place * step, y)
        if guesses := [place for place, point in enumerate(points) if point.pick == UNKNOWN]:
            left, right = x + guesses[0] * step - 5, x + guesses[-1] * step + 5
            risky = not all(points[place].kill.safe and points[place].power.safe for place in guesses)
            colour = _BAD_EDGE if risky else FAINT
            sheet.line((left, y + 55), (right, y + 55), colour=colour, width=1.6)
            sheet.text(left, y + 66, "must guess" if risky else "either will do", size=9.5, colour=colour)


def _draw_verdicts(sheet: Sheet, point: CrashPoint, x: float, y: float) -> None:
    pairs: Sequence[tuple[Verdict, Verdict, int]] = (
        (point.kill.source, point.power.source, 24), (point.kill.target, point.power.target, 44),
    )  # fmt: skip
    for kill, power, row in pairs:
        hint = f"moment {point.moment}, {textwrap.shorten(point.last, 40)}: killed {_said(kill)}; power cut {_said(power)}"
        if kill.good and power.good:
            sheet.dot(x, y + row, radius=4, fill=_GOOD, edge=_GOOD, hint=hint)
        elif kill.good:
            sheet.dot(x, y + row, radius=4, fill=_HALF, edge=_HALF, hint=hint)
        else:
            sheet.dot(x, y + row, radius=3.6, fill=_BAD, edge=_BAD_EDGE, hint=hint)


def _said(verdict: Verdict) -> str:
    return f"{verdict.state.value}, {verdict.lost} blocks lost" if verdict.lost else verdict.state.value


def _draw_key(sheet: Sheet, y: float) -> None:
    x = float(_CRASH_X)
    for fill, edge, words in (
        (_GOOD, _GOOD, "good"),
        (_HALF, _HALF, "good unless the power goes"),
        (_BAD, _BAD_EDGE, "lacks flushed writes"),
    ):
        sheet.dot(x + 4, y - 4, radius=4, fill=fill, edge=edge)
        sheet.text(x + 14, y, words, size=11)
        x += 34 + 6 * len(words)
    sheet.text(
        MARGIN, y, "Good: opens, checks clean, and holds every write that was flushed. "
        "Must guess: management cannot know which image is the disk.", size=11, colour=FAINT,
    )  # fmt: skip
