"""Events that QEMU limits to one per second: the first and the last of a flood are seen, the others are not."""

from __future__ import annotations

from typing import Any

from qblock.clock import LoopClock
from qblock.monitor.throttle import EventThrottle
from qblock.testing.simloop import run

SECOND = 1_000_000_000


def test_of_a_flood_the_first_and_then_the_last_per_second_are_passed_on() -> None:
    """Kinds are told apart by the members that the table names."""

    async def main() -> None:
        seen: list[tuple[float, str, Any]] = []
        clock = LoopClock()
        start = clock.now_ns()
        throttle = EventThrottle(
            clock,
            lambda name, data, when: seen.append(((clock.now_ns() - start) / SECOND, data["node-name"], data["n"])),
        )
        for n in range(5):
            for node in ("a", "b"):
                throttle.event("QUORUM_REPORT_BAD", {"type": "read", "node-name": node, "n": n}, (0, 0))
        await clock.sleep_ns(3 * SECOND)
        throttle.event("QUORUM_REPORT_BAD", {"type": "read", "node-name": "a", "n": 9}, (0, 0))
        assert seen == [(0, "a", 0), (0, "b", 0), (1, "a", 4), (1, "b", 4), (3, "a", 9)]
        await throttle.close()

    run(main)


def test_job_events_are_never_held_back() -> None:
    """Clients count on every one of them."""

    async def main() -> None:
        seen: list[str] = []
        throttle = EventThrottle(LoopClock(), lambda name, data, when: seen.append(name))
        for _ in range(5):
            throttle.event("JOB_STATUS_CHANGE", {}, (0, 0))
        assert len(seen) == 5
        await throttle.close()

    run(main)
