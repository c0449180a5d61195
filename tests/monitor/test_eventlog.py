"""Events are kept until somebody takes note of them."""

from __future__ import annotations

import asyncio

from qblock.monitor.eventlog import KEPT, EventLog, MachineEvent
from qblock.testing.simloop import run


def ready(device: str) -> tuple[str, dict[str, str], tuple[int, int]]:
    return "BLOCK_JOB_READY", {"device": device}, (1, 0)


def test_an_event_that_came_before_the_question_counts_once() -> None:
    """`run until READY` typed a second too late must not wait for ever, and must not count the same event twice."""

    async def main() -> list[str]:
        log = EventLog()
        log.record("STOP", {}, (0, 0))
        log.record(*ready("a"))
        first = await log.wait(lambda event: event.name.endswith("READY"))
        assert log.take(lambda event: True) is None  # what came before it is not kept either
        asyncio.get_running_loop().call_soon(lambda: log.record(*ready("b")))
        second = await log.wait(lambda event: event.subject == "b")
        return [first.subject, second.subject]

    assert run(main) == ["a", "b"]


def test_events_are_told_in_one_line() -> None:
    """With what people look for: about whom, what status, what error."""
    shown = [
        MachineEvent("JOB_STATUS_CHANGE", {"id": "j", "status": "ready"}, (0, 0)).describe(),
        MachineEvent("BLOCK_JOB_COMPLETED", {"device": "j", "error": "No space"}, (0, 0)).describe(),
        MachineEvent("STOP", {}, (0, 0)).describe(),
    ]
    assert shown == ["JOB_STATUS_CHANGE j: ready", "BLOCK_JOB_COMPLETED j: error: No space", "STOP"]


def test_only_so_many_events_are_kept_and_listeners_see_all() -> None:
    """A machine that runs for weeks does not fill the memory with events nobody asks for."""

    async def main() -> tuple[int, str]:
        seen: list[MachineEvent] = []
        log = EventLog(seen.append)
        for number in range(KEPT + 5):
            log.record(*ready(str(number)))
        oldest = log.take(lambda event: True)
        assert oldest is not None
        return len(seen), oldest.subject

    assert run(main) == (KEPT + 5, "5")
