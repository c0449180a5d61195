"""What random histories have in common: how one is lived from its seed, how its jobs come to an end, how many are run."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import Protocol

from qblock.errors import QBlockError
from qblock.jobs.job import BlockJob
from qblock.jobs.state import VERBS, JobStatus, JobVerb
from qblock.testing.jobbench import JobBench
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run

PATIENCE_MS = 60_000
"""How long, in virtual time, a job may take to end once everything works and nobody holds it."""


class Told(Protocol):
    """A history; ``log`` has the steps that it has taken."""

    log: list[str]

    async def run(self) -> None:
        """Live it, and judge what has become of everything."""


def live_one(make: Callable[[int], Told], seed: int) -> list[str]:
    """Live the history of ``seed``; returns its steps. A failure says which one it is."""
    history: list[Told] = []

    async def main() -> None:
        history.append(make(seed))
        await history[0].run()

    try:
        run(main, Seeded(seed))
    except BaseException as error:
        steps = "\n  ".join(history[0].log) if history else ""
        error.add_note(f"history {seed}:\n  {steps}")
        raise
    return history[0].log


async def bring_jobs_to_their_ends(bench: JobBench, random: Random, *, endless: Collection[str | None] = ()) -> None:
    """Tell every job to come to its end, now that everything works; those called ``endless`` only end when they are cancelled.

    Where a failed flush has spoilt an image, a job may be told to try for ever: then all are cancelled.
    """
    jobs = bench.jobs
    spoilt = any(node.poisoned is not None for node in bench.system.graph.nodes.values())
    for _ in range(PATIENCE_MS):
        for job in jobs.jobs.copy():
            if spoilt and isinstance(job, BlockJob) and job.status in VERBS[JobVerb.CANCEL]:
                await jobs.cancel(job, force=True)
            if isinstance(job, BlockJob) and job.speed:
                job.set_speed(0)  # or the guest is faster than a mirror for ever
            with contextlib.suppress(QBlockError):
                await jobs.resume(job)
            with contextlib.suppress(QBlockError):
                await jobs.finalize(job)
            waits_to_be_told = job.is_ready and not job.ends_by_itself
            with contextlib.suppress(QBlockError):
                if job.status is JobStatus.CONCLUDED:
                    await jobs.dismiss(job)
                elif waits_to_be_told and random.random() < 0.5:
                    jobs.complete(job)
                elif waits_to_be_told or job.id in endless:
                    await jobs.cancel(job)
        if not jobs.jobs:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"jobs that do not end: {jobs.jobs}")


def live_many(live: Callable[[int], Sequence[str]]) -> None:
    """Live the histories from the first to the second number of the command line; tell which failed, and what was done."""
    failed, steps = 0, Counter[str]()
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            steps.update(live(seed))
        except Exception as error:
            failed += 1
            causes = error.exceptions if isinstance(error, ExceptionGroup) else [error]
            print(f"seed {seed}: {causes!r}", *getattr(error, "__notes__", ()), flush=True)  # noqa: T201
    done = " ".join(f"{name}:{count}" for name, count in sorted(steps.items()) if ":" not in name)
    print(f"{done}\n{failed} failed")  # noqa: T201
