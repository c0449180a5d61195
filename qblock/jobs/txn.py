"""Jobs that finish together, or fail together.

Models QEMU's job transactions (semantics.md section 5, completion-mode grouped): a job that succeeded waits until all of
its group have, then all are finalized; one failure cancels the others. Every job has a transaction, usually its own.
"""

from __future__ import annotations

import attrs

from qblock.jobs.job import Job
from qblock.jobs.state import JobStatus


@attrs.define(eq=False)
class JobTransaction:
    """The group; ``jobs`` in the order of their creation. ``aborting`` once a member has failed or been cancelled."""

    jobs: list[Job] = attrs.field(factory=list)
    aborting: bool = False

    def add(self, job: Job) -> None:
        """Make ``job`` a member; before it runs."""
        assert job.txn is None
        self.jobs.append(job)
        job.txn = self

    def newest_first(self) -> list[Job]:
        """The members in the order in which they are finished."""
        return self.jobs[::-1]

    @property
    def all_done(self) -> bool:
        """Whether every member has finished its run successfully."""
        return all(job.status in (JobStatus.WAITING, JobStatus.PENDING) for job in self.jobs)

    @property
    def finalizes_itself(self) -> bool:
        """Whether no member waits to be told to finalize."""
        return all(job.auto_finalize for job in self.jobs)
