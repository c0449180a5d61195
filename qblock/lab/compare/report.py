"""All that a comparison tells, computed from the files it has left: the settings, the histories, and the answers to probes.

Whoever has the files can compute it again, and gets the same.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from qblock.lab.compare.crashes import CrashPoint, images_unlike_history, look_at_crashes
from qblock.lab.compare.history import Record, Told, phases, read_history
from qblock.lab.compare.load import OPERATIONS
from qblock.lab.compare.measuring import Latency, Traffic, distribution, longest_pause, traffic, waits
from qblock.lab.compare.probing import Probe
from qblock.lab.compare.running import AFTER, BEFORE, CONTROL, COPYING, GAVE_UP, START, SWITCHING, Settings
from qblock.lab.compare.storage import SOURCE, TARGET
from qblock.lab.compare.strategies import STRATEGIES, Strategy
from qblock.lab.digests import changed, digests
from qblock.lab.ending import scratch_directory

SETTINGS: Final = "settings.json"
PROBES: Final = "probes.json"
VERDICTS: Final = "verdicts.json"
OPERATION: Final = "operation"
"""From the command to the guest's being switched over: the phases copying, in step and switching."""


@attrs.frozen(kw_only=True)
class RunReport:
    """One strategy. Times in virtual nanoseconds; None where the run did not come to that.

    ``phases`` has begin and end of each. ``cost`` is what the operation asked of each disk until it was over, without what the
    guest asks of it by itself. ``latency`` has a distribution for each stage (`OPERATION` and phases) and kind of request,
    ``pause_ns`` the longest time without any answer.
    """

    name: str
    title: str
    outcome: str
    phases: Mapping[str, tuple[int, int]]
    copy_ns: int | None
    switch_ns: int | None
    cost: Mapping[str, Traffic]
    latency: Mapping[str, Mapping[str, Latency]]
    pause_ns: Mapping[str, int]
    probes: Sequence[Probe]
    crashes: Sequence[CrashPoint]

    @property
    def switched(self) -> bool:
        """Whether the guest came to its new image."""
        return AFTER in self.phases


@attrs.frozen(kw_only=True)
class Report:
    """The whole comparison. ``control`` has the guest's latencies when nothing is moved."""

    settings: Settings
    control: Mapping[str, Latency]
    runs: Sequence[RunReport]


def save_settings(directory: Path, settings: Settings, names: Sequence[str]) -> None:
    """Leave what the comparison was made with, and of what."""
    (directory / SETTINGS).write_text(json.dumps({**attrs.asdict(settings), "runs": list(names)}) + "\n")


def save_probes(directory: Path, probes: Sequence[Probe]) -> None:
    """Leave the answers to the probes of one strategy."""
    (directory / PROBES).write_text(json.dumps([attrs.asdict(probe) for probe in probes], indent=1) + "\n")


def load_settings(directory: Path) -> tuple[Settings, list[Strategy]]:
    """What `save_settings` has left. Raises `OSError`, `ValueError` and `KeyError`."""
    members: dict[str, Any] = json.loads((directory / SETTINGS).read_text())
    names = members.pop("runs")
    return Settings(**members), [strategy for strategy in STRATEGIES if strategy.name in names]


def save_verdicts(directory: Path, report: Report) -> None:
    """Leave what was told of the files in ``directory``, for whoever computes it again."""
    files = digests(directory, _kept_files(directory, report))
    (directory / VERDICTS).write_text(json.dumps({**as_json(report), "files": files}, indent=1) + "\n")


def _kept_files(directory: Path, report: Report) -> list[str]:
    """All that a report on ``directory`` rests on, by their names in it."""
    places = [START, CONTROL, *(f"{run.name}/{disk}" for run in report.runs for disk in (SOURCE, TARGET))]
    found = [path for place in places for path in (directory / place).rglob("*") if path.is_file()]
    found += [path for run in report.runs for path in (directory / run.name).iterdir() if path.is_file()]
    return [SETTINGS, *sorted(str(path.relative_to(directory)) for path in found)]


def differences(directory: Path, report: Report) -> list[str]:
    """In what the files in ``directory`` differ from what `save_verdicts` has left there: a text for each, empty if in nothing.

    Also the images are compared with those that the history gives, byte by byte. Raises `OSError`, `ValueError` and `KeyError`.
    """
    kept: dict[str, Any] = json.loads((directory / VERDICTS).read_text())
    found = json.loads(json.dumps(as_json(report)))
    names = [name for name in ("settings", "control") if kept[name] != found[name]]
    before = {run["name"]: run for run in kept["runs"]}
    now = {run["name"]: run for run in found["runs"]}
    names += [name for name in {**before, **now} if before.get(name) != now.get(name)]
    told = [f"{name}: the files say something else than the verdicts that were kept with them" for name in names]
    files = dict.fromkeys([*kept["files"], *_kept_files(directory, report)])
    names = changed(kept["files"], digests(directory, files))
    told += [f"{name}: this is not the file that was kept" for name in names]
    for run in report.runs:
        told += [
            f"{run.name}/{image}: this is not the image that the history leads to"
            for image in images_unlike_history(directory / run.name)
        ]
    return told


def examine(directory: Path) -> Report:
    """Compute everything from the files of a comparison. Raises `OSError`, `ValueError`, `KeyError` if they are not all there."""
    settings, strategies = load_settings(directory)
    control = read_history(directory / CONTROL)
    waited = waits(control)
    quiet = {op: distribution(wait.latency_ns for wait in waited if wait.op == op) for op in OPERATIONS}
    runs = [_examine_run(strategy, settings, directory / strategy.name, control) for strategy in strategies]
    return Report(settings=settings, control=quiet, runs=runs)


def _examine_run(strategy: Strategy, settings: Settings, run: Path, control: Sequence[Record]) -> RunReport:
    records = read_history(run)
    found = phases(records)
    over_ns = found.get(AFTER, found.get(GAVE_UP, (0, 0)))[0]
    stages = {OPERATION: (found[COPYING][0], over_ns)} | {
        name: bounds for name, bounds in found.items() if name != BEFORE
    }
    waited = waits(records)
    spent, anyway = traffic(records, over_ns), traffic(control, over_ns)
    with scratch_directory("qblock-crash-") as scratch:
        crashes = look_at_crashes(settings, run, records, scratch, by_itself=strategy.switch is None)
    return RunReport(
        name=strategy.name,
        title=strategy.title,
        outcome=_outcome(records),
        phases=found,
        copy_ns=_length(found, COPYING) if GAVE_UP not in found else None,
        switch_ns=_length(found, SWITCHING) if AFTER in found else None,
        cost={disk: spent[disk].minus(anyway[disk]) for disk in spent},
        latency={
            stage: {
                op: distribution(w.latency_ns for w in waited if w.op == op and begin <= w.arrival_ns < end)
                for op in OPERATIONS
            }
            for stage, (begin, end) in stages.items()
        },
        pause_ns={stage: longest_pause(waited, *bounds) for stage, bounds in stages.items()},
        probes=[Probe(**members) for members in json.loads((run / PROBES).read_text())],
        crashes=crashes,
    )


def _outcome(records: Sequence[Record]) -> str:
    reasons = [record.text for record in records if isinstance(record, Told) and record.direction == "gave up"]
    return f"given up: {reasons[0]}" if reasons else "switched"


def _length(found: Mapping[str, tuple[int, int]], phase: str) -> int | None:
    if phase not in found:
        return None
    begin, end = found[phase]
    return end - begin


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON values; the same report gives the same text."""
    return attrs.asdict(report, value_serializer=lambda _, __, value: value.value if isinstance(value, enum.Enum) else value)
