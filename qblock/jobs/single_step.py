"""What jobs share that do one thing which cannot be stopped half-way, without being block jobs: create, amend.

Models QEMU's create and amend jobs (semantics.md section 4.6): they finalize themselves and stay concluded until dismissed,
send only JOB_STATUS_CHANGE, and show progress 0/1 and then 1/1 (after a failure too).
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, TypeVar

from qblock.jobs.job import Job

if TYPE_CHECKING:
    from qblock.jobs.runner import JobRunner


class SingleStepJob(Job):
    """See the module. A subclass writes `act`."""

    def __init__(self, runner: JobRunner, job_id: str) -> None:
        super().__init__(runner, job_id, auto_finalize=True, auto_dismiss=False)

    @abc.abstractmethod
    async def act(self) -> None:
        """Do it; raises what the job is to fail with."""

    async def run(self) -> None:
        """See `Job`."""
        self.progress_remaining = 1
        try:
            await self.act()
        finally:
            self.advance(1)


_AnyJob = TypeVar("_AnyJob", bound=SingleStepJob)


async def started(job: _AnyJob) -> _AnyJob:
    """List the job and let it run up to where it first waits; raises when its id will not do."""
    job.runner.create(job)
    job.runner.start(job)
    await job.noticed()
    return job
