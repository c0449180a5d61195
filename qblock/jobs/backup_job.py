"""The backup job: a copy of a disk as it was at one moment, made while a guest writes.

Models QEMU's backup (semantics.md section 4.5, type ``backup``). A ``copy-before-write`` filter above the source copies what
a guest is about to overwrite; the job copies the rest, both by the same `CopyAside`, so no cluster is copied twice. The job's
own failures go by its error policies. One that a guest's write has caused is that write's failure: the job tells nobody, and goes
on.

With a bitmap, what it says at the start is what has to be copied (sync incremental and bitmap), and a successor records what
guests write meanwhile. What becomes of the two at the end is in `BackupJob._settle_bitmap`.

Differs from QEMU: the target is flushed before the job is done; and a failure that is ignored by policy is tried again after
100 ms instead of at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from qblock import requests
from qblock.bitmaps import abdicate, reclaim
from qblock.chain import chain_next, skip_filters
from qblock.copying_aside import Content, CopyFailure, Piece
from qblock.jobs.backup_plan import BackupPlan, BitmapMode
from qblock.jobs.copying import IO_FAILURES, SLICE_NS, InFlight, Operation, io_error
from qblock.jobs.job import BlockJob
from qblock.jobs.new_copy import SyncMode
from qblock.jobs.state import ErrorAction
from qblock.status import FIRST_QUESTION, next_question
from qblock.transaction import Transaction
from qblock.units import MiB

if TYPE_CHECKING:
    from qblock.drivers.copy_before_write import CopyBeforeWriteDriver
    from qblock.jobs.runner import JobRunner

_MAX_REACH: Final = 256 * MiB
MAX_PARALLEL: Final = 16


class BackupJob(BlockJob):
    """See the module. ``filter_driver`` is that of the filter above the source, which watches already."""

    type: ClassVar[str] = "backup"

    def __init__(
        self,
        runner: JobRunner,
        job_id: str,
        plan: BackupPlan,
        *,
        filter_driver: CopyBeforeWriteDriver,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        super().__init__(runner, job_id, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.plan = plan
        self.filter = filter_driver
        self.copies = filter_driver.copies
        self.source = filter_driver.child.node
        self.target = filter_driver.target.node
        self.in_flight = InFlight(limit=min(plan.max_workers, MAX_PARALLEL))
        self._failure: CopyFailure | None = None
        self._bug: Exception | None = None
        self._cursor = 0
        self._reach = self.copies.chunk
        """How long the next piece may be: each one of nothing but zeroes makes it longer, up to `_MAX_REACH`."""
        self.copies.progress = self._progressed
        self._progressed(0)

    def _progressed(self, count: int) -> None:
        self.progress_done += count
        self.progress_remaining = self.copies.pending.count + self.copies.in_flight

    # ------------------------------------------------------------------------------------------------------------ running

    async def run(self) -> None:
        """See the module."""
        try:
            if self.plan.sync is SyncMode.TOP:
                await self._forget_unallocated()
            while self.plan.sync is SyncMode.NONE:
                await self.idle()
            while await self._step():
                pass
        finally:
            await self.in_flight.all_background_ended()
        while not await self._flushed():
            pass

    async def before_pause(self) -> None:
        """See `Job`: let the copies under way end."""
        await self.in_flight.all_background_ended()

    async def _forget_unallocated(self) -> None:
        """Only what the uppermost layer holds is to be copied; until this has ended each piece is looked at for that."""
        copies, size = self.copies, self.source.length
        base = chain_next(skip_filters(self.source))
        offset, empty_from, question = 0, 0, FIRST_QUESTION
        while offset < size:
            await self.pause_point()
            step = min(question, size - offset)
            allocated, count = await requests.is_allocated_above(self.source, base, offset, step)
            offset += count
            if allocated:
                empty_from = offset
            else:
                copies.forget(empty_from, offset - empty_from)
                self._progressed(0)
            question = next_question(question, count)
        copies.skip_unallocated = False

    async def _step(self) -> bool:
        """Begin to copy the next piece, or wait for one; False when all is copied."""
        await self.pause_point()
        if self._bug is not None:
            raise self._bug
        if self._failure is not None:
            await self._answer_failure()
            return True
        if self.in_flight.full:
            await self.in_flight.changed()
            return True
        if self.copies.pending.count and (delay := self.limit.delay_ns(0)):
            await self.sleep_ns(delay)  # whoever wakes the job before that makes it look again, and no faster
            return True
        piece = self._next_piece()
        if piece is None:
            other = self.copies.overlapping(0, self.copies.pending.size)
            if other is not None:  # also a guest's: if it fails, it is ours to copy
                await other.changed()
            return other is not None or self.copies.pending.count > 0 or self._failure is not None
        await self.copies.look(piece)
        self._cursor = piece.end
        self._reach = min(4 * self._reach, _MAX_REACH) if piece.content is not Content.DATA else self.copies.chunk
        operation = self.in_flight.begin(piece.offset, piece.length)
        self.spawn(self._copy(operation, piece), f"copy at {piece.offset}")
        if piece.content is not Content.UNWANTED:
            self.limit.delay_ns(piece.length)
        return True

    def _next_piece(self) -> Piece | None:
        """The next pending piece behind the last one; the walk goes round and round."""
        limit = self.plan.max_chunk or (self.copies.chunk if self.speed else self._reach)
        size = self.copies.pending.size
        return self.copies.take(self._cursor, size, limit=limit) or self.copies.take(0, self._cursor, limit=limit)

    async def _copy(self, operation: Operation, piece: Piece) -> None:
        try:
            failure = await self.copies.copy(piece)
            self._failure = self._failure or failure
        except Exception as bug:  # nobody may take it for success
            self._bug = bug
        finally:
            self.in_flight.end(operation)
            if self._failure is not None:
                self.wake()  # a slow job has nothing more to wait for

    async def _answer_failure(self) -> None:
        await self.in_flight.all_background_ended()
        failure, self._failure = self._failure, None
        assert failure is not None
        self._cursor = 0
        policy = self.plan.on_source_error if failure.is_read else self.plan.on_target_error
        match self.failed_request(failure.error, policy, is_read=failure.is_read):
            case ErrorAction.REPORT:
                raise failure.error
            case ErrorAction.IGNORE:
                await self.sleep_ns(SLICE_NS)

    async def _flushed(self) -> bool:
        """Make the copy durable; False when that has to be tried again."""
        await self.pause_point()
        try:
            await requests.flush(self.target)
        except IO_FAILURES as error:
            match self.failed_request(io_error(error), self.plan.on_target_error, is_read=False):
                case ErrorAction.REPORT:
                    raise
                case ErrorAction.IGNORE:
                    await self.sleep_ns(SLICE_NS)
            return False
        return True

    # ---------------------------------------------------------------------------------------------------------- endings

    async def settle(self) -> None:
        """See `Job`: no request of a guest is under way at the filter."""
        if not self.drained_nodes:
            await self.drain(self.source, self.target)

    async def undisturbed(self) -> None:
        """See `Job`: a backup of the same source that ends together with this one is no disturbance."""
        assert self.txn is not None
        others = [job for job in self.txn.jobs if isinstance(job, BackupJob) and job is not self]
        if not any(self.source in other.drained_nodes for other in others):
            await super().undisturbed()

    def commit(self) -> None:
        """See `Job`."""
        self._dismantle()
        self._settle_bitmap(succeeded=True)

    def abort(self) -> None:
        """See `Job`: the target is worth nothing, unless the bitmap says what it lacks."""
        self._dismantle()
        self._settle_bitmap(succeeded=False)

    def _dismantle(self) -> None:
        """Take the filter out and let go of the nodes."""
        graph = self.runner.graph
        self.filter.end()
        with Transaction() as change, graph.deferred_permissions(change):
            self.release(change)
            graph.drop(self.filter.node, change)

    def _settle_bitmap(self, *, succeeded: bool) -> None:
        """``on-success``: what was copied is clean, or all as if nothing had been. ``always``: what was copied is clean, even if
        that is not all. ``never``: nothing is. What guests have written meanwhile is dirty in any case.
        """
        bitmap, mode = self.plan.bitmap, self.plan.bitmap_mode
        if bitmap is None:
            return
        if mode is BitmapMode.ALWAYS or (succeeded and mode is BitmapMode.ON_SUCCESS):
            abdicate(self.source, bitmap)
            if not succeeded:
                bitmap.merge(self.copies.pending)
        else:
            reclaim(self.source, bitmap)

    def clean(self) -> None:
        """See `Job`."""
        self.end_drain()
