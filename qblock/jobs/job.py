"""What a job is: the base classes that `JobRunner` starts, pauses, cancels and finishes.

Models QEMU's ``Job`` and ``BlockJob`` (semantics.md section 3). A subclass writes ``run`` (async, pausable), ``prepare``
(async, may fail), and ``commit``, ``abort``, ``clean`` (plain functions that cannot fail). Two things differ from QEMU. A
forced cancel lifts a user's pause, as there, but not the pause of a drained section: a cancelled job ends when the section
has ended, so that no section sees the graph change under it. And a job's prepare step waits in the same way.

Cancelling is a verb, not ``task.cancel()``: it records what is wanted and wakes a sleeper; `JobCancelled` comes out of a
pause point and from nowhere else.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Coroutine, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from qblock import drain
from qblock.blockers import OpBlocker, block_all, unblock
from qblock.clock import CoSleep, RateLimit
from qblock.errors import CommandError, JobCancelled
from qblock.jobs.state import GOING_ON, PAUSED_FORM, ErrorAction, IoStatus, JobStatus, OnError, error_action
from qblock.permissions import ChildRole, Perm
from qblock.transaction import Transaction

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.iothreads import IOThread
    from qblock.jobs.runner import JobRunner
    from qblock.jobs.txn import JobTransaction
    from qblock.node import BdrvChild, BlockDriverState


class Job(abc.ABC):
    """One job. It is listed from `JobRunner.create` on; ``id`` is None for jobs that nobody is to see.

    ``progress_done`` and ``progress_remaining`` are in the job's own unit (bytes for block jobs).
    """

    type: ClassVar[str]
    """The wire name of the kind of job, as ``mirror``."""

    def __init__(
        self, runner: JobRunner, job_id: str | None, *, auto_finalize: bool = True, auto_dismiss: bool = True
    ) -> None:
        self.runner = runner
        self.id = job_id
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.status = JobStatus.UNDEFINED
        self.txn: JobTransaction | None = None
        self.error: Exception | None = None
        self.user_paused = False
        self.pause_count = 0
        self.paused = False
        self.was_started = False
        self.was_ready = False
        self.run_ended = False
        self.finalizing = False
        self.cancel_requested = False
        self.force_cancelled = False
        self.cancelled = False
        self.progress_done = 0
        self.progress_remaining = 0
        self.quiesced = 0
        self.own_quiesced = 0
        self.concluded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleep = CoSleep(runner.clock)
        self._rest: asyncio.Future[None] | None = None
        self._onlookers: list[asyncio.Future[None]] = []
        self._undisturbed: list[asyncio.Future[None]] = []

    # --------------------------------------------------------------------------------------------- written by subclasses

    @abc.abstractmethod
    async def run(self) -> None:
        """Do the work, with pause points. Raises what it failed of; returning means success so far."""

    async def settle(self) -> None:
        """Bring the job's nodes to rest for the change of the graph that follows: called before `prepare`, and before
        `abort`, perhaps twice. `clean` ends what this began.
        """

    async def prepare(self) -> None:
        """The last steps that may fail, when the job is finalized; must leave everything as it was if it raises."""

    def commit(self) -> None:
        """The job succeeded: make it so."""

    def abort(self) -> None:
        """The job failed or was cancelled: undo."""

    def clean(self) -> None:
        """Let go of everything, after `commit` or `abort`."""

    async def afterwards(self) -> None:
        """What takes waiting, after `clean`; must not raise."""

    def forgotten(self) -> None:
        """Nobody can see the job any more: give back what it has kept when it was concluded."""

    async def before_pause(self) -> None:
        """Bring the job to rest: no request of its own may be under way on return."""

    def cancelling(self, *, force: bool) -> bool:
        """A cancel was requested; returns whether to treat it as forced. The default treats every cancel so."""
        return True

    @property
    def ends_by_itself(self) -> bool:
        """Whether the job comes to an end without being told anything more."""
        return True

    def complete(self) -> None:
        """Told to complete (accepted only when ready)."""
        raise CommandError(f"Job '{self.id}' cannot be told to complete: a {self.type} job ends by itself")

    # ----------------------------------------------------------------------------------------------- used by subclasses

    async def pause_point(self) -> None:
        """Rest here while paused, then raise `JobCancelled` if a forced cancel was requested."""
        if self._onlookers:
            self.notice()
        while self.pause_count:
            await self.before_pause()
            await self._pause()
        if self.force_cancelled:
            raise JobCancelled

    async def sleep_ns(self, ns: int) -> None:
        """Sleep for ``ns`` nanoseconds unless somebody wants something of the job; a pause point."""
        if not (self.pause_count or self.force_cancelled):
            self.notice()
            if (hit := self.runner.trace.co_sleep_begin) is not None:
                hit(job=self.id, delay_ns=ns)
            woken = await self._sleep.sleep_ns(ns)
            if woken and (hit := self.runner.trace.co_sleep_woken) is not None:
                hit(job=self.id)
        await self.pause_point()

    async def idle(self) -> None:
        """Wait until somebody wants something of the job; a pause point."""
        if not (self.pause_count or self.force_cancelled):
            self.notice()
            await self._sleep.until_woken()
        await self.pause_point()

    def advance(self, count: int) -> None:
        """``count`` more units are done, and no longer remain."""
        self.progress_done += count
        self.progress_remaining = max(0, self.progress_remaining - count)

    def ready(self) -> None:
        """The job has reached the point from which `complete` is possible."""
        self.runner.transition(self, JobStatus.READY)

    def notice(self) -> None:
        """Let those go on who waited for the job to take note of something."""
        for onlooker in self._onlookers:
            if not onlooker.done():
                onlooker.set_result(None)
        self._onlookers.clear()

    async def undisturbed(self) -> None:
        """Wait until no drained section of somebody else covers the job's nodes. What follows at once is not covered."""
        while self.quiesced > self.own_quiesced:
            waiter = asyncio.get_running_loop().create_future()
            self._undisturbed.append(waiter)
            await waiter

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a part of the job that runs beside `run`; `run` must have seen its end before it returns."""
        return self.runner.spawn(work, f"{self.describe_user()}: {name}")

    # ------------------------------------------------------------------------------------------------ used by the runner

    @property
    def is_ready(self) -> bool:
        """Ready, or its paused form."""
        return self.status in (JobStatus.READY, JobStatus.STANDBY)

    @property
    def is_resting(self) -> bool:
        """Sleeping or paused: nothing of `run` is going on until somebody wakes it."""
        return self.paused or self._sleep.is_sleeping

    @property
    def progress_total(self) -> int:
        """``len`` of the queries: what is done and what remains."""
        return self.progress_done + self.progress_remaining

    def wake(self) -> None:
        """Wake the job from whatever sleep, to look at its state again."""
        self._sleep.wake()
        if self._rest is not None and not self._rest.done():
            self._rest.set_result(None)

    async def noticed(self) -> None:
        """Wait until the job has come to its next pause point, sleep or end."""
        if not self.run_ended:
            onlooker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._onlookers.append(onlooker)
            await onlooker

    def add_pause(self) -> None:
        """One more reason to pause."""
        self.pause_count += 1
        self._sleep.wake()

    def remove_pause(self) -> None:
        """One reason less; without any the job goes on, and shows that at once."""
        assert self.pause_count > 0
        self.pause_count -= 1
        if not self.pause_count:
            if self.paused:
                self.paused = False
                self.runner.transition(self, GOING_ON[self.status])
            self.wake()

    def rest(self) -> None:
        """Be paused from now on, for as long as there is a reason; the next pause point waits until none is left."""
        self.paused = True
        self.runner.transition(self, PAUSED_FORM[self.status])
        self.at_rest()

    async def _pause(self) -> None:
        """Be paused until no reason is left. A new one may have come since the wake-up: then the job has paused once more."""
        while self.pause_count:
            if not self.paused:
                self.rest()
            self.notice()
            self._rest = asyncio.get_running_loop().create_future()
            await self._rest
        self._rest = None
        self.notice()

    def at_rest(self) -> None:
        """Called when the job has just come to rest or to its end (drained sections may be waiting for that)."""

    # -------------------------------------------------------------------------------------------- as a parent of nodes

    def describe_user(self) -> str:
        """See `node.EdgeParent`."""
        return f"{self.type} job '{self.id or ''}'"

    def quiesce(self) -> None:
        """See `node.EdgeParent`: a drained section pauses the job."""
        self.quiesced += 1
        self.add_pause()

    def resume(self) -> None:
        """See `node.EdgeParent`."""
        self.quiesced -= 1
        self.remove_pause()
        if self.quiesced <= self.own_quiesced:
            for waiter in self._undisturbed:
                if not waiter.done():
                    waiter.set_result(None)
            self._undisturbed.clear()

    def is_busy(self) -> bool:
        """See `node.EdgeParent`: busy while running, unless it is paused or drains its nodes itself."""
        return self.was_started and not (self.run_ended or self.paused or self.own_quiesced)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r} {self.status.value} {self.progress_done}/{self.progress_total}>"


class BlockJob(Job):
    """A job on nodes: it holds edges and blocks operations on them, has a speed, and policies for failed requests."""

    def __init__(
        self, runner: JobRunner, job_id: str, *, auto_finalize: bool = True, auto_dismiss: bool = True
    ) -> None:
        super().__init__(runner, job_id, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.speed = 0
        self.limit = RateLimit(runner.clock)
        self.io_status = IoStatus.OK
        self.edges: list[BdrvChild] = []
        self._blocks: list[OpBlocker] = []
        self.drained_nodes: list[BlockDriverState] = []

    @property
    def iothread(self) -> IOThread | None:
        """See `EdgeParent`: that of its nodes."""
        return self.edges[0].node.iothread if self.edges else None

    @property
    def is_pinned(self) -> bool:
        """See `EdgeParent`."""
        return False

    def child_edges(self) -> Iterable[BdrvChild]:
        """See `EdgeParent`."""
        return self.edges

    def hold(
        self, name: str, node: BlockDriverState, perm: Perm, shared: Perm, *, change: Transaction
    ) -> None:
        """Take an edge called ``name`` to ``node`` and block operations on it; raises when permissions conflict."""
        graph = self.runner.graph
        edge = graph.attach(self, node, name=name, role=ChildRole.JOB, perm=perm, shared=shared, change=change)
        token = block_all(node, f"it is in use by {self.describe_user()}")
        self.edges.append(edge)
        self._blocks.append(token)
        change.add(abort=partial(self._let_go, edge, token))

    def _let_go(self, edge: BdrvChild, token: OpBlocker) -> None:
        self.edges.remove(edge)
        self._blocks.remove(token)
        unblock(token)

    async def drain(self, *nodes: BlockDriverState) -> None:
        """Begin the job's own drained sections: returns when no request of anybody is under way in ``nodes``."""
        before = self.quiesced
        drain.quiesce(nodes)
        self.own_quiesced += self.quiesced - before
        self.drained_nodes += nodes
        self.at_rest()
        await drain.wait_idle(*nodes)

    def end_drain(self) -> None:
        """End all of the job's own drained sections; the graph may have changed in between."""
        drained, self.drained_nodes = self.drained_nodes, []
        before = self.quiesced
        drain.resume(drained)
        self.own_quiesced -= before - self.quiesced

    def release(self, change: Transaction) -> None:
        """Give back all edges, and the blocked operations when ``change`` commits."""
        graph = self.runner.graph
        edges, self.edges = self.edges, []
        for edge in edges:
            graph.detach(edge, change)
        change.add(commit=self._unblock, abort=lambda: self.edges.extend(edges))

    def _unblock(self) -> None:
        self.own_quiesced = self.quiesced  # without edges no section reaches the job
        for token in self._blocks:
            unblock(token)
        self._blocks.clear()

    def set_speed(self, speed: int) -> None:
        """Limit copying to ``speed`` bytes per second, 0 for no limit; a sleeping job is woken to see it."""
        if speed < 0:
            raise CommandError(f"The speed of a job cannot be negative ({speed}); 0 means unlimited")
        faster = not speed or speed > self.speed
        self.speed = speed
        self.limit.set_speed(speed)
        if faster:
            self._sleep.wake()

    def failed_request(self, error: OSError, policy: OnError, *, is_read: bool) -> ErrorAction:
        """Tell the world about a failed request and do what ``policy`` says: with `ErrorAction.STOP` the job is paused as
        if by a user, and its next pause point holds it until somebody resumes it.
        """
        action = error_action(policy, error.errno)
        self.runner.emit(
            "BLOCK_JOB_ERROR",
            {"device": self.id, "operation": "read" if is_read else "write", "action": action.value},
        )
        if action is ErrorAction.STOP and not self.force_cancelled:
            if not self.user_paused:
                self.user_paused = True
                self.add_pause()
            if self.io_status is IoStatus.OK:
                nospace = error_action(OnError.ENOSPC, error.errno) is ErrorAction.STOP
                self.io_status = IoStatus.NOSPACE if nospace else IoStatus.FAILED
        return action

    def describe(self) -> dict[str, Json]:
        """The job's entry in ``query-block-jobs``."""
        info: dict[str, Json] = {
            "device": self.id,
            "type": self.type,
            "len": self.progress_total,
            "offset": self.progress_done,
            "busy": not (self.run_ended or self.is_resting or self.status is JobStatus.CREATED),
            "paused": self.pause_count > 0,
            "speed": self.speed,
            "io-status": self.io_status.value,
            "ready": self.is_ready,
            "status": self.status.value,
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
        }
        if self.error is not None:
            info["error"] = str(self.error)
        return info

    def at_rest(self) -> None:
        """See `Job.at_rest`: wake drained sections."""
        for edge in self.edges:
            drain.kick(edge.node)
