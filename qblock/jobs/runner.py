"""The one who starts jobs, walks them through their states, and tells the world.

Models the job core of QEMU (semantics.md section 3): verbs and transitions come from the tables in `state.py`; the order of
JOB_STATUS_CHANGE and BLOCK_JOB_* events is that of section 3.3. Differs from QEMU in being a part of one block system:
there is no global list of jobs.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Final

from qblock.breakpoints import Caller
from qblock.drain import drained_all
from qblock.errors import CommandError, DeviceNotActive, DuplicateName, JobCancelled, JobStateError, QBlockError
from qblock.jobs.job import BlockJob, Job
from qblock.jobs.state import ACTIVE, TRANSITIONS, VERBS, IoStatus, JobStatus, JobVerb
from qblock.jobs.txn import JobTransaction
from qblock.tracing import Trace

if TYPE_CHECKING:
    from qblock.clock import Clock
    from qblock.driver import Json
    from qblock.graph import Graph
    from qblock.node import BlockDriverState
    from qblock.opening import Opener

_WELL_FORMED: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
CANCELLED_TEXT: Final = "Operation canceled"
"""The ``error`` of a job that was cancelled, as QEMU's users know it."""


class JobRunner:
    """The jobs of one block system, and the only one who starts their tasks.

    ``emit(event, data)`` sends a QMP event. Verbs are named as the monitor's commands; they raise `JobStateError` when the
    table does not allow them.
    """

    def __init__(
        self,
        graph: Graph,
        clock: Clock,
        emit: Callable[[str, Mapping[str, Json]], None],
        opener: Opener,
        *,
        trace: Trace | None = None,
    ) -> None:
        self.graph = graph
        self.clock = clock
        self.emit = emit
        self.opener = opener
        self.trace = trace if trace is not None else Trace()
        self.jobs: list[Job] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    # -------------------------------------------------------------------------------------------------- start and end

    def check_id(self, job_id: str) -> None:
        """Raise unless ``job_id`` is well-formed and free."""
        if not _WELL_FORMED.fullmatch(job_id):
            raise CommandError(
                f"'{job_id}' cannot be a job ID: a letter is needed, followed by letters, digits, '-', '.' or '_'"
            )
        if any(job.id == job_id for job in self.jobs):
            raise DuplicateName("job", job_id)

    def create(self, job: Job, txn: JobTransaction | None = None) -> None:
        """List the job (status created). It must then be given to `start` or to `abandon`."""
        if job.id is not None:
            self.check_id(job.id)
        (txn or JobTransaction()).add(job)
        self.jobs.append(job)
        self.transition(job, JobStatus.CREATED)

    def abandon(self, job: Job, *, cancelled: bool = False) -> None:
        """The job could not be set up after all: it goes from created to null. ``cancelled``: it could, but something beside
        it has failed, so it takes the steps of a cancelled one (without an event of its own, as it has not run).
        """
        assert job.txn is not None
        if cancelled:
            job.error = CommandError(CANCELLED_TEXT)
            self.transition(job, JobStatus.ABORTING)
            self.transition(job, JobStatus.CONCLUDED)
        job.txn.jobs.remove(job)
        job.run_ended = True
        self._dismiss(job)
        job.concluded.set_result(None)

    def start(self, job: Job) -> None:
        """Let a created job run (status running, at once); its task takes its first step on the loop's next turn.

        In a drained section of its nodes it is paused at once, too.
        """
        self.transition(job, JobStatus.RUNNING)
        job.was_started = True
        if job.pause_count:
            job.rest()
        self.spawn(self._drive(job), job.describe_user())

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task of a job; a bug in it is reported to the loop's exception handler."""
        with Caller().calling():  # no longer whoever started it, such as a command
            task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait(self, job: Job) -> None:
        """Wait until the job is concluded; its outcome is in ``job.error``."""
        await asyncio.shield(job.concluded)

    # ---------------------------------------------------------------------------------------------------------- verbs

    def find(self, job_id: str) -> Job:
        """The job of that id, as ``job-*`` commands look it up."""
        for job in self.jobs:
            if job.id == job_id:
                return job
        raise CommandError(f"There is no job '{job_id}'")

    def find_block_job(self, job_id: str) -> BlockJob:
        """The block job of that id, as ``block-job-*`` commands look it up (`DeviceNotActive`)."""
        for job in self.jobs:
            if job.id == job_id and isinstance(job, BlockJob):
                return job
        raise DeviceNotActive(job_id)

    async def pause(self, job: Job) -> None:
        """A person pauses the job; returns when a sleeping job has noticed."""
        self._check(job, JobVerb.PAUSE)
        if job.user_paused:
            raise CommandError(f"Job '{job.id}' is already paused")
        job.user_paused = True
        resting = job.is_resting
        job.add_pause()
        if resting and not job.paused:
            await job.noticed()

    async def resume(self, job: Job) -> None:
        """A person lets the job go on after `pause`, or after an error stopped it."""
        if not job.user_paused:
            raise CommandError(f"Job '{job.id}' cannot be resumed: it was not paused")
        self._check(job, JobVerb.RESUME)
        resting = job.paused and job.pause_count == 1
        self._lift_user_pause(job)
        if resting:
            await job.noticed()

    async def cancel(self, job: Job, *, force: bool = True) -> None:
        """Tell the job to end. Unforced, a ready mirror finishes without switching over; and a user-paused job refuses."""
        if job.user_paused and not force:
            raise CommandError(f"Job '{job.id}' is paused; resume it first, or force the cancel")
        self._check(job, JobVerb.CANCEL)
        if job.finalizing:
            return  # too late: it ends with the outcome it has
        if job.status in (JobStatus.CREATED, JobStatus.WAITING, JobStatus.PENDING):
            self._intend_cancel(job, force=True)
            job.run_ended = True
            assert job.txn is not None
            job.txn.aborting = True  # at once: a member may fail before the task begins
            self._claim(job.txn)
            await self._in_own_task(self._abort_group(job, at_once=False))
        else:
            self._intend_cancel(job, force=force)

    async def cancel_sync(self, job: Job, *, force: bool = False) -> Exception | None:
        """Cancel and wait for the job's end, however it ends: its own result counts if it really completed.

        Returns None when the job has completed, its error when it has failed, `JobCancelled` when it has ended cancelled.
        A job may do I/O, and take time, after it was told to cancel (rfc-2012.md, patch 2). One that does not dismiss itself
        stays concluded.
        """
        if (hit := self.trace.job_cancel_sync_begin) is not None:
            hit(job=job.id, force=force)
        if job.status in VERBS[JobVerb.CANCEL]:
            if job.user_paused and not force:
                self._lift_user_pause(job)
            await self.cancel(job, force=force)
        await self.wait(job)
        if (hit := self.trace.job_cancel_sync_end) is not None:
            hit(job=job.id, outcome="cancelled" if job.cancelled else job.error or "completed")
        return JobCancelled() if job.cancelled else job.error

    async def cancel_users(self, node: BlockDriverState) -> None:
        """Cancel the block jobs at work that hold ``node``, not by force, and resume those that a person has paused for it.

        Returns when they have ended, or rest again: waiting to be finalized, or stopped by an error. Jobs whose work was done
        before stay as they are.
        """
        for job in self.jobs.copy():
            if not (isinstance(job, BlockJob) and any(edge.node is node for edge in job.edges)):
                continue
            if job.status not in ACTIVE:
                continue
            if job.user_paused:
                self._lift_user_pause(job)
            await self.cancel(job, force=False)
            await job.noticed()
            while not (job.run_ended or job.paused):
                await job.noticed()
            if job.run_ended and job.finalizing:
                await self.wait(job)

    def complete(self, job: Job) -> None:
        """Tell a ready job to finish its work; a paused one does so when it goes on."""
        self._check(job, JobVerb.COMPLETE)
        if job.cancel_requested:
            raise CommandError(f"Job '{job.id}' has been told to cancel and can no longer be completed")
        job.complete()
        if not job.paused:
            job.wake()

    async def finalize(self, job: Job) -> None:
        """Finish a pending job (and its group); returns when it is concluded or dismissed."""
        self._check(job, JobVerb.FINALIZE)
        if job.finalizing:
            raise JobStateError(job.id or "", "being finalized", JobVerb.FINALIZE.value)
        assert job.txn is not None
        self._claim(job.txn)
        await self._in_own_task(self._finalize_group(job.txn))

    async def dismiss(self, job: Job) -> None:
        """Forget a concluded job; what it alone has kept is closed."""
        self._check(job, JobVerb.DISMISS)
        self._dismiss(job)
        await self.opener.close_orphans()

    def set_speed(self, job: BlockJob, speed: int) -> None:
        """Limit the job to ``speed`` bytes per second, 0 for no limit."""
        self._check(job, JobVerb.SET_SPEED)
        job.set_speed(speed)

    async def cancel_all(self) -> None:
        """Force every job to its end, newest first; returns when all are gone, those that rested concluded too.

        As in QEMU the requests under way come to an end first, and the jobs that run show a pause, each until its turn comes.
        """
        resting: set[Job] = set()
        if self.jobs:
            async with drained_all(self.graph):
                resting.update(job for job in self.jobs if job.quiesced > job.own_quiesced)
                for job in resting:
                    job.add_pause()
        held_back = []
        for job in reversed(self.jobs.copy()):
            for member in resting.intersection((job, *(job.txn.jobs if job.txn is not None else ()))):
                resting.remove(member)  # those that end together with it must not wait for a turn of their own
                member.remove_pause()
            if job.status in VERBS[JobVerb.CANCEL]:
                await self.cancel(job, force=True)
            if job.quiesced > job.own_quiesced:
                held_back.append(job)  # another job's drained section holds it: that one's end comes first
            else:
                await self._see_off(job)
        for job in held_back:
            await self._see_off(job)

    async def _see_off(self, job: Job) -> None:
        """Wait until the job is concluded, and forget it."""
        await self.wait(job)
        if job.status is JobStatus.CONCLUDED:
            self._dismiss(job)

    # -------------------------------------------------------------------------------------------------------- queries

    def query_jobs(self) -> list[dict[str, Json]]:
        """The reply of ``query-jobs``: newest first."""
        return [self._describe(job) for job in reversed(self.jobs) if job.id is not None]

    def query_block_jobs(self) -> list[dict[str, Json]]:
        """The reply of ``query-block-jobs``: newest first."""
        return [job.describe() for job in reversed(self.jobs) if isinstance(job, BlockJob)]

    @staticmethod
    def _describe(job: Job) -> dict[str, Json]:
        info: dict[str, Json] = {
            "id": job.id,
            "type": job.type,
            "status": job.status.value,
            "current-progress": job.progress_done,
            "total-progress": job.progress_total,
        }
        if job.error is not None:
            info["error"] = str(job.error)
        return info

    # ------------------------------------------------------------------------------------------- walking the tables

    def transition(self, job: Job, status: JobStatus) -> None:
        """Move ``job`` to ``status``, which the table must allow, and say so."""
        assert status in TRANSITIONS[job.status], f"{job!r} cannot become {status.value}"
        if (hit := self.trace.job_state_transition) is not None:
            hit(job=job.id, ret=-_errno(job.error), old=job.status.value, new=status.value)
        changed = job.status is not status
        job.status = status
        if changed and job.id is not None:
            self.emit("JOB_STATUS_CHANGE", {"id": job.id, "status": status.value})
        if changed and status is JobStatus.READY and not job.was_ready:
            job.was_ready = True
            self._block_event("BLOCK_JOB_READY", job)

    def _check(self, job: Job, verb: JobVerb) -> None:
        allowed = job.status in VERBS[verb]
        if (hit := self.trace.job_apply_verb) is not None:
            word = "allowed" if allowed else "prohibited"
            hit(job=job.id, status=job.status.value, verb=verb.value, allowed=word)
        if not allowed:
            raise JobStateError(job.id or "", job.status.value, verb.value)

    def _block_event(self, event: str, job: Job, *, error: str | None = None) -> None:
        if isinstance(job, BlockJob):
            data: dict[str, Json] = {
                "type": job.type,
                "device": job.id,
                "len": job.progress_total,
                "offset": job.progress_done,
                "speed": job.speed,
            }
            if error is not None:
                data["error"] = error
            self.emit(event, data)

    def _lift_user_pause(self, job: Job) -> None:
        job.user_paused = False
        if isinstance(job, BlockJob):
            job.io_status = IoStatus.OK
        job.remove_pause()

    def _intend_cancel(self, job: Job, *, force: bool) -> None:
        forced = job.cancelling(force=force)
        if job.user_paused:
            self._lift_user_pause(job)
        job.cancel_requested = True
        job.force_cancelled |= forced
        job.wake()

    async def _in_own_task(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for ``work``, which goes on if the caller is cancelled: an ending must not stop half-way."""
        await asyncio.shield(self.spawn(work, "ending of jobs"))

    async def _drive(self, job: Job) -> None:
        """The life of a started job, up to where only a verb can take it further."""
        try:
            await job.pause_point()
            await job.run()
        except JobCancelled:
            assert job.force_cancelled
        except (QBlockError, OSError) as error:
            job.error = error.with_traceback(None)  # its frames hold buffers
        except Exception as bug:  # reported by re-raising; but the job must end, or its nodes stay busy for ever
            job.error = bug
            raise
        finally:
            job.run_ended = True
            if (hit := self.trace.job_completed) is not None:
                hit(job=job.id, ret=-errno.ECANCELED if job.force_cancelled else -_errno(job.error))
            job.notice()
            job.at_rest()
            await self._run_ended(job)

    async def _run_ended(self, job: Job) -> None:
        txn = job.txn
        assert txn is not None
        if txn.aborting:
            return  # whoever failed first ends us all
        if job.error is not None or job.force_cancelled:
            await self._abort_group(job)
            return
        self.transition(job, JobStatus.WAITING)
        if not txn.all_done:
            return
        for member in txn.newest_first():
            self.transition(member, JobStatus.PENDING)
            if not member.auto_finalize and isinstance(member, BlockJob):
                self.emit("BLOCK_JOB_PENDING", {"type": member.type, "id": member.id})
        if txn.finalizes_itself:
            self._claim(txn)
            await self._finalize_group(txn)

    @staticmethod
    def _claim(txn: JobTransaction) -> None:
        for member in txn.jobs:
            member.finalizing = True

    async def _finalize_group(self, txn: JobTransaction) -> None:
        for member in txn.newest_first():
            try:
                await member.undisturbed()  # two that drained one node at once would wait for each other
                await member.settle()
                await member.undisturbed()
                await member.prepare()
            except (QBlockError, OSError) as error:
                member.error = error
                await self._abort_group(member)
                return
        for member in txn.newest_first():
            member.commit()
            await self._conclude(member, "BLOCK_JOB_COMPLETED")

    async def _abort_group(self, culprit: Job, *, at_once: bool = True) -> None:
        """End all jobs of the group: ``culprit`` with its error or cancelled, the others cancelled.

        ``at_once``: the culprit shows before the others end what has become of it, as one does whose run has just ended.
        """
        txn = culprit.txn
        assert txn is not None
        txn.aborting = True
        self._claim(txn)
        for member in txn.newest_first():
            if member is not culprit:
                self._intend_cancel(member, force=True)
        for member in txn.newest_first():
            if member.status is JobStatus.CREATED:
                member.run_ended = True
            while not member.run_ended:
                await member.noticed()
        if at_once:
            self._fail(culprit)
        for member in txn.newest_first():
            await member.undisturbed()  # two that drained one node at once would wait for each other
            self._fail(member)
            await member.settle()
            await member.undisturbed()
            member.abort()
            await self._conclude(member, "BLOCK_JOB_CANCELLED" if member.cancelled else "BLOCK_JOB_COMPLETED")

    def _fail(self, job: Job) -> None:
        """The job has failed, or is cancelled if there is no error; this is so at once, its end may take time."""
        if job.status is not JobStatus.ABORTING:
            job.cancelled = job.error is None
            if job.cancelled:
                job.error = CommandError(CANCELLED_TEXT)
            self.transition(job, JobStatus.ABORTING)

    async def _conclude(self, job: Job, event: str) -> None:
        """Clean up, drop the nodes that nobody holds any more, then the final events."""
        job.clean()
        await job.afterwards()
        await self.opener.close_orphans()
        failed = job.error is not None and event == "BLOCK_JOB_COMPLETED"
        if job.was_started:
            self._block_event(event, job, error=str(job.error) if failed else None)
        self.transition(job, JobStatus.CONCLUDED)
        if job.auto_dismiss or not job.was_started:
            self._dismiss(job)
        job.concluded.set_result(None)

    def _dismiss(self, job: Job) -> None:
        self.transition(job, JobStatus.NULL)
        self.jobs.remove(job)
        job.forgotten()


def _errno(error: Exception | None) -> int:
    """What a trace line tells of an outcome: 0 for a good one, EIO for an error without a number."""
    if error is None:
        return 0
    return (error.errno if isinstance(error, OSError) else None) or errno.EIO
