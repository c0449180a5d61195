"""Numbers from a history: how long it took, what it cost the disks, and how long the guest waited.

A request counts to the phase in which it came. Percentiles are by nearest rank, and are left out where there are too few
requests for them to mean something. Times are virtual nanoseconds, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import attrs

from qblock.lab.compare.history import NO_BYTES, Answered, Flushed, Issued, Read, Record, Wrote
from qblock.lab.compare.storage import SOURCE, TARGET

PERCENTILES: Final[Mapping[str, tuple[float, int]]] = {
    # name: (share, how many requests there must be)
    "p50": (0.5, 1),
    "p90": (0.9, 10),
    "p99": (0.99, 100),
    "p99.9": (0.999, 1000),
}
CURVE_POINTS: Final = 160


@attrs.frozen(kw_only=True)
class Latency:
    """A distribution. ``percentiles`` by name; ``curve`` has (share, latency) at up to `CURVE_POINTS` steps, for drawing."""

    count: int
    percentiles: Mapping[str, int]
    longest_ns: int
    curve: Sequence[tuple[float, int]] = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Traffic:
    """What was asked of one disk."""

    read: int = 0
    written: int = 0
    reads: int = 0
    writes: int = 0
    flushes: int = 0

    def minus(self, other: Traffic) -> Traffic:
        """What is left when ``other`` is taken away; a member may become negative."""
        mine, its = attrs.asdict(self), attrs.asdict(other)
        return Traffic(**{name: mine[name] - its[name] for name in mine})


@attrs.frozen
class Waited:
    """One request of the guest: when it came, what it was, how long it took in all."""

    arrival_ns: int
    op: str
    latency_ns: int


def rank(ordered: Sequence[int], share: float) -> int:
    """The smallest of the ordered values that at least ``share`` of them do not exceed."""
    index = -int(-share * len(ordered) // 1) - 1
    return ordered[max(0, min(index, len(ordered) - 1))]


def distribution(latencies: Iterable[int]) -> Latency:
    """The distribution of some latencies."""
    ordered = sorted(latencies)
    if not ordered:
        return Latency(count=0, percentiles={}, longest_ns=0, curve=())
    found = {name: rank(ordered, share) for name, (share, least) in PERCENTILES.items() if len(ordered) >= least}
    steps = min(CURVE_POINTS, len(ordered))
    # Finer and finer towards the end: it is the slow ones that matter.
    shares = sorted({1 - len(ordered) ** (-step / steps) for step in range(steps)} | {1.0})
    curve = [(round(share, 6), rank(ordered, share)) for share in shares]
    return Latency(count=len(ordered), percentiles=found, longest_ns=ordered[-1], curve=curve)


def waits(records: Iterable[Record]) -> list[Waited]:
    """All requests of the guest that were answered, in the order of their answers."""
    sent: dict[int, Issued] = {}
    done = []
    for record in records:
        if isinstance(record, Issued):
            sent[record.number] = record
        elif isinstance(record, Answered):
            request = sent.pop(record.number)
            done.append(Waited(request.arrival_ns, request.op, record.ns - request.arrival_ns))
    return done


def longest_pause(all_waits: Iterable[Waited], begin_ns: int, end_ns: int) -> int:
    """The longest time, ending between the two moments, in which the guest waited and got no answer at all."""
    steps = []
    for wait in all_waits:
        steps.append((wait.arrival_ns, 1))
        steps.append((wait.arrival_ns + wait.latency_ns, -1))
    waiting, since, longest = 0, 0, 0
    for ns, step in sorted(steps):
        if step > 0:
            since = since if waiting else ns
        else:
            if begin_ns <= ns <= end_ns:
                longest = max(longest, ns - since)
            since = ns
        waiting += step
    return longest


def traffic(records: Iterable[Record], until_ns: int) -> dict[str, Traffic]:
    """What was asked of each disk up to a moment."""
    counts = {name: dict.fromkeys(attrs.asdict(Traffic()), 0) for name in (SOURCE, TARGET)}
    for record in records:
        if not isinstance(record, (Read, Wrote, Flushed)) or record.ns > until_ns:
            continue
        count = counts[TARGET if record.file.startswith(f"{TARGET}/") else SOURCE]
        if isinstance(record, Flushed):
            count["flushes"] += 1
        elif isinstance(record, Read):
            count["reads"] += 1
            count["read"] += record.length
        elif record.place != NO_BYTES:
            count["writes"] += 1
            count["written"] += record.length
    return {name: Traffic(**members) for name, members in counts.items()}
