"""What a crash leaves, moment by moment: which images are good, which one management would take, and whether it can know.

Management knows the source to be the disk until it has asked for the switch, and the target from when it has been told of
success. In between it cannot tell which of the two the guest has written to last, unless there is a witness. A strategy that
switches by itself leaves it in the dark from the start. Where it does not know, it is safe only if either image would do.
"""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from qblock.lab.compare.history import Answered, Entered, Issued, Read, Record, Told, Witnessed, read_history
from qblock.lab.compare.judging import Promise, Verdict, judge
from qblock.lab.compare.load import FLUSH, initial_tags
from qblock.lab.compare.replaying import CRASHES, KILL, Replay
from qblock.lab.compare.running import (
    AFTER,
    BEFORE,
    COPYING,
    GAVE_UP,
    IN_STEP,
    LAYERS,
    START,
    SWITCHING,
    Settings,
    lay_out,
)
from qblock.lab.compare.storage import SOURCE, TARGET
from qblock.lab.compare.strategies import TARGET_NAME
from qblock.lab.ending import scratch_directory

UNKNOWN: Final = "unknown"
_SAMPLES: Final[Mapping[str, int]] = {COPYING: 4, IN_STEP: 8, SWITCHING: 8, AFTER: 3, GAVE_UP: 1}
"""How many moments of each phase are looked at, its first and last ones among them."""
SOURCE_NAME: Final = f"{SOURCE}/{LAYERS[-1]}"


@attrs.frozen(kw_only=True)
class Leftover:
    """What one kind of crash leaves at a moment. ``safe``: whatever management does then, nothing promised is lost."""

    source: Verdict
    target: Verdict
    safe: bool


@attrs.frozen(kw_only=True)
class CrashPoint:
    """A moment at which the machine might die: what happened last, which image management takes (``unknown``: it must guess).

    ``moment`` counts records of the history; ``ns`` is virtual time.
    """

    moment: int
    ns: int
    phase: str
    last: str
    pick: str
    kill: Leftover
    power: Leftover


def choose_moments(records: Sequence[Record]) -> list[tuple[int, str]]:
    """Moments to look at, with their phases: the first and the last of each, and others where most may be wrong.

    While a copy is in step these are the moments right after a flush of the guest was answered: what it covers must not be
    lost any more. While copying, and during the switch, they are spread evenly over what happened.
    """
    chosen = []
    bounds = _bounds(records)
    for number, (phase, begin) in enumerate(bounds):
        end = bounds[number + 1][1] if number + 1 < len(bounds) else len(records)
        if phase == BEFORE or end == begin:
            continue
        inside = [index for index in range(begin + 2, end) if not isinstance(records[index - 1], (Read, Entered))]
        if phase in (IN_STEP, AFTER):
            inside = _after_flushes(records, begin, end) or inside
        wanted = _SAMPLES[phase]
        spread = {end} | {inside[len(inside) * part // wanted] for part in range(wanted) if inside}
        chosen += [(moment, phase) for moment in sorted(spread)]
    return chosen


def _bounds(records: Sequence[Record]) -> list[tuple[str, int]]:
    """The phases and the moments at which they begin."""
    return [(record.phase, index) for index, record in enumerate(records) if isinstance(record, Entered)]


def _after_flushes(records: Sequence[Record], begin: int, end: int) -> list[int]:
    """The moments inside a stretch at which a flush has just been answered."""
    flushes = {record.number for record in records[:end] if isinstance(record, Issued) and record.op == FLUSH}
    return [
        index + 1
        for index in range(begin, end)
        if isinstance(record := records[index], Answered) and record.number in flushes
    ]


def make_left_files(run: Path, records: Sequence[Record], scratch: Path, moment: int = 0) -> Replay:
    """Make the files that crashes at ``moment`` of a run leave: ``scratch/kill/…`` and ``scratch/power/…``."""
    directories = {crash: scratch / crash for crash in CRASHES}
    for directory in directories.values():
        lay_out(run.parent / START, directory)
    replay = Replay(run, records, directories)
    replay.advance(moment)
    return replay


def images_unlike_history(run: Path) -> list[str]:
    """The images at the end of ``run``, by their names in it, that are not what its history makes of those at the beginning."""
    with scratch_directory("qblock-crash-") as scratch:
        records = read_history(run)
        make_left_files(run, records, scratch, len(records))
        made = scratch / KILL
        names = [str(path.relative_to(made)) for path in sorted(made.rglob("*")) if path.is_file()]
        same, _, _ = filecmp.cmpfiles(made, run, names, shallow=False)
        return [name for name in names if name not in same]


def look_at_crashes(
    settings: Settings, run: Path, records: Sequence[Record], scratch: Path, *, by_itself: bool
) -> list[CrashPoint]:
    """Judge what is left at each of the chosen moments; ``by_itself``: the strategy switches without being told.

    The images are made again in the directory ``scratch``, and left there as of the last moment.
    """
    replay = make_left_files(run, records, scratch)
    base, top = initial_tags(settings.seed, settings.size)
    promise = Promise.of(settings.size, base | top)
    judging = _Judging(replay, promise, scratch)
    points = []
    for moment, phase in choose_moments(records):
        replay.advance(moment)
        promise.advance(records, moment)
        pick = _pick(records, moment, phase, by_itself=by_itself)
        kill, power = (judging.leftover(crash, pick) for crash in CRASHES)
        last = records[moment - 1]
        points.append(
            CrashPoint(moment=moment, ns=last.ns, phase=phase, last=_told(last), pick=pick, kill=kill, power=power)
        )
    return points


def _pick(records: Sequence[Record], moment: int, phase: str, *, by_itself: bool) -> str:
    """Which image management would take."""
    if phase == AFTER or (moment < len(records) and records[moment] == Entered(records[moment].ns, AFTER)):
        return TARGET
    if any(isinstance(record, Witnessed) for record in records[:moment]):
        return TARGET
    if by_itself and phase == COPYING:
        return UNKNOWN
    if phase == SWITCHING and not any(isinstance(record, Told) and "witness" in record.text for record in records):
        return UNKNOWN
    return SOURCE


@attrs.define(eq=False)
class _Judging:
    """Judges images anew only when they or the promise have changed."""

    replay: Replay
    promise: Promise
    scratch: Path
    _known: dict[tuple[str, str, int, int], Verdict] = attrs.field(init=False, factory=dict)

    def leftover(self, crash: str, pick: str) -> Leftover:
        """What a kind of crash leaves now."""
        source, target = self._verdict(crash, SOURCE, SOURCE_NAME), self._verdict(crash, TARGET, TARGET_NAME)
        good = {SOURCE: source.good, TARGET: target.good, UNKNOWN: source.good and target.good}
        return Leftover(source=source, target=target, safe=good[pick])

    def _verdict(self, crash: str, disk: str, name: str) -> Verdict:
        key = (crash, disk, self.replay.versions[crash, disk], self.promise.version)
        if key not in self._known:
            self._known[key] = judge(self.scratch / crash / name, self.promise)
        return self._known[key]


def _told(record: Record) -> str:
    """What happened, in a few words."""
    match record:
        case Told(direction=direction, text=text):
            return f"{direction}: {text}"
        case Entered(phase=phase):
            return f"phase: {phase}"
        case Answered():
            return "the guest got an answer"
        case _:
            return type(record).__name__.lower()


