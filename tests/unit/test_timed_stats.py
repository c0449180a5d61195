"""Statistics over the last seconds: what has just been is in them, what is long gone is not, and they do not grow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qblock.timed_stats import TimedStats

SECOND = 1_000_000_000


def test_the_shortest_the_longest_and_the_mean_of_the_last_seconds_are_shown() -> None:
    """Reads, writes and flushes apart; the depth is the time spent in requests for each second that has passed."""
    stats = TimedStats(10, 0)
    for took in (100, 300, 200):
        stats.count("rd", took, SECOND)
    stats.count("flush", 7, SECOND)
    shown = stats.shown(2 * SECOND)
    assert [shown[f"{what}_rd_latency_ns"] for what in ("min", "max", "avg")] == [100, 300, 200]
    assert [shown[f"{what}_wr_latency_ns"] for what in ("min", "max", "avg")] == [0, 0, 0]
    assert shown["max_flush_latency_ns"] == 7
    assert shown["avg_rd_queue_depth"] == 600 / (2 * SECOND)
    assert shown["interval_length"] == 10


def test_what_is_older_than_the_interval_is_forgotten() -> None:
    """A slow request of an hour ago says nothing of now."""
    stats = TimedStats(4, 0)
    stats.count("wr", 900, SECOND)
    stats.count("wr", 100, 4 * SECOND)
    assert stats.shown(4 * SECOND)["max_wr_latency_ns"] == 900
    assert stats.shown(6 * SECOND)["max_wr_latency_ns"] == 100
    assert stats.shown(60 * SECOND)["max_wr_latency_ns"] == 0


@given(st.lists(st.tuples(st.integers(0, SECOND), st.integers(1, 1000)), max_size=60), st.integers(1, 5))
def test_the_interval_is_what_was_asked_for_but_for_a_sixteenth(events: list[tuple[int, int]], seconds: int) -> None:
    """Everything younger is in it, nothing older."""
    stats, now, done = TimedStats(seconds, 0), 0, list[tuple[int, int]]()
    for pause, took in events:
        now += pause
        stats.count("rd", took, now)
        done.append((now, took))
    longest = stats.shown(now)["max_rd_latency_ns"]
    certain = [took for when, took in done if now - when <= seconds * SECOND * 15 // 16]
    possible = [took for when, took in done if now - when <= seconds * SECOND]
    assert max(certain, default=0) <= longest <= max(possible, default=0)
