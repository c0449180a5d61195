"""The mirror job: a copy of a node that follows its source until it is told to take over or to let go.

Models QEMU's mirror (semantics.md section 4.4, type ``mirror``). How it stays right while guests write:

- *Background mode.* Every change of the source marks the bitmap **after** it is done. The job clears the bits of a run
  **before** it reads, so a change that races with the copy leaves its bit behind and is copied again. Two copies never
  overlap: a run is cut where an earlier request on it is still under way, since of two writes to one place the older could
  land last.
- *Write-blocking mode.* The bitmap is disabled; `mirror_top` hands each guest request to `guest_write` and its siblings.
  It waits until no copy covers its range, changes the source and then the target, and only then answers. When the target
  fails the guest is not told: its range is marked, and the error policy decides.
- *Semi-sync mode* is background mode in which the guest's flushes wait for the target: see `mirror_semisync`. Who chooses what
  to copy next, the job's own run or a round for these flushes, holds ``_choosing`` while it does.
- *READY* once nothing is dirty and nothing under way; it is never taken back. To finish, the job drains the source: if a
  last guest write marks something, it goes back to copying (a few times: then it copies the rest while the source is
  drained, or a guest that always writes could put the end off for ever); otherwise the source stays drained until the graph
  has been changed (in ``pending`` too, as in QEMU: the two sides must not part again).
- *Layers on top of a backing chain* (sync top or none): a part of a target cluster that has never been written would be
  completed with zeroes instead of backing data. All requests are then widened to whole target clusters.

Data are copied by buffer unless the target's storage prefers otherwise: on ext4 the kernel's own copying was measured to be
slower (0.95 s against 0.6 s for 800 MiB of a three-layer qcow2 chain); where blocks can be shared it is the other way round.

Differs from QEMU: a request that is ignored by policy is tried again after 100 ms instead of at once; and in write-blocking
mode partial clusters of such layers are handled (7.2 leaves zeroes in the rest of the cluster).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, ClassVar, Final

from qblock import requests
from qblock.chain import may_be_replaced
from qblock.dirty import DirtyBitmap
from qblock.errors import BlockIOError, CommandError, PermissionConflict, QBlockError
from qblock.jobs.copying import IO_FAILURES, SLICE_NS, BufferPool, InFlight, Operation, io_error
from qblock.jobs.job import BlockJob
from qblock.jobs.mirror_guest import GuestRequests
from qblock.jobs.mirror_plan import BackingAtEnd, Method, MirrorPlan
from qblock.jobs.mirror_semisync import GuestFlushes
from qblock.jobs.state import ErrorAction, IoStatus, OnError
from qblock.ranges import ByteRange
from qblock.status import FIRST_QUESTION, next_question
from qblock.transaction import Transaction
from qblock.units import GiB, MiB, align_down, align_up

if TYPE_CHECKING:
    from qblock.backend import BlockBackend
    from qblock.jobs.mirror_top import MirrorTop
    from qblock.jobs.runner import JobRunner
    from qblock.node import BdrvChild, BlockDriverState

_ZERO_STEP: Final = GiB
_MAX_REACH: Final = 256 * MiB
_FLUSH_STEP: Final = 128 * MiB
"""Copied bytes after which the target is flushed beside the copying, so that the flush before READY has little left to do."""
_PATIENCE: Final = 3
"""How often a guest may write during the last flush of a job that is to end, before its requests are held to copy the rest."""


class MirrorJob(BlockJob):
    """See the module. ``filter_driver`` is above the source already; ``target`` is the job's own backend on the target."""

    type: ClassVar[str] = "mirror"

    def __init__(
        self,
        runner: JobRunner,
        job_id: str,
        plan: MirrorPlan,
        *,
        filter_driver: MirrorTop,
        target: BlockBackend,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        super().__init__(runner, job_id, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.plan = plan
        self.filter = filter_driver
        self.source = filter_driver.child.node
        self.target = target
        self.bitmap = DirtyBitmap(self.source.length, plan.granularity, enabled=not plan.write_blocking)
        self.in_flight = InFlight()
        self.flushes = GuestFlushes(self)
        self._choosing = asyncio.Lock()
        self._buffers: BufferPool | None = None
        self._cursor = 0
        self.failure: Exception | None = None
        """What the job is about to fail with."""
        self._retrying = False
        self._unflushed = 0
        self._reach = plan.buf_size
        """How long the next run may be: each run of nothing but zeroes makes it longer, up to `_MAX_REACH`."""
        self._should_complete = False
        self._misses = 0
        self._offload = False
        self.mirroring = False
        """Whether guest writes are to reach the target before they are answered."""
        self._replacement: BlockDriverState | None = None

    def begin_watching(self) -> None:
        """From now on no change of the source escapes the job; the target has been inserted."""
        self.source.dirty_bitmaps.append(self.bitmap)
        self.mirroring = self.plan.write_blocking and self.target_edge.node.length == self.length
        self.filter.host = GuestRequests(self)
        if (hit := self.runner.trace.mirror_start) is not None:
            hit(node=self.source.node_name, job=self.id)

    @property
    def length(self) -> int:
        """Size of the source in bytes."""
        return self.source.length

    @property
    def target_edge(self) -> BdrvChild:
        """The edge that the job writes to."""
        edge = self.target.root
        assert edge is not None
        return edge

    @property
    def _zeroes_cheaply(self) -> bool:
        """Whether zero writes to the target give space back instead of writing."""
        node = self.target_edge.node
        return node.discard_unmap and node.driver.supports_write_zeroes

    # ------------------------------------------------------------------------------------------------------------ verbs

    def complete(self) -> None:
        """Switch over as soon as the two sides are equal."""
        if self.plan.replaces is not None:
            self.runner.graph.find_node(self.plan.replaces)
        self._should_complete = True

    def cancelling(self, *, force: bool) -> bool:
        """A cancel after READY that is not forced only means: finish without switching over."""
        return force or not self.is_ready

    @property
    def ends_by_itself(self) -> bool:
        """See `Job`: once it was told what to do when the two sides are equal."""
        return self._should_complete or self.cancel_requested

    # ------------------------------------------------------------------------------------------------------------ running

    async def run(self) -> None:
        """See the module."""
        await self.match_sizes()
        self._buffers = BufferPool(self.plan.buf_size)
        self.in_flight.limit = self._buffers.count
        self._offload = _storage_of(self.target_edge.node).driver.prefers_copy_range
        try:
            if self.plan.scan and self.length:
                await self._find_what_to_copy()
            await self._converge()
        finally:
            await self.flushes.stop()
            await self.in_flight.all_background_ended()
            self._buffers.close()

    async def match_sizes(self) -> None:
        """Have the target as long as the source, or raise; the job begins with it."""
        target_length = self.target_edge.node.length
        if target_length != self.length:
            raise CommandError(
                f"The source has {self.length} bytes and the target {target_length}: make the target the same size"
            )

    async def before_pause(self) -> None:
        """See `Job`: let the copies under way end."""
        async with self._choosing:
            await self.in_flight.all_background_ended()

    def is_busy(self) -> bool:
        """See `Job`: what guests wait for goes on in a paused job."""
        return super().is_busy() or self.flushes.busy

    async def _find_what_to_copy(self) -> None:
        """Mark everything that the target lacks; the target is zeroed first where that is cheap and needed.

        As in QEMU no error policy is asked when the source cannot say what it holds.
        """
        if self.plan.zero_target:
            if not self._zeroes_cheaply:
                self.bitmap.mark(0, self.length)
                return
            await self._zero_target()
        offset, question = 0, FIRST_QUESTION
        while offset < self.length:
            await self.pause_point()
            step = min(question, self.length - offset)
            allocated, count = await requests.is_allocated_above(self.source, self.plan.base, offset, step)
            if allocated:
                self.bitmap.mark(offset, count)
            offset += count
            question = next_question(question, count)

    async def _zero_target(self) -> None:
        offset = 0
        while offset < self.length:
            await self.pause_point()
            count = min(_ZERO_STEP, self.length - offset)
            try:
                await requests.write_zeroes(self.target_edge, offset, count, may_unmap=self.plan.unmap)
            except IO_FAILURES as error:
                if self.target_failed(error) is ErrorAction.REPORT:
                    raise
                await self.sleep_ns(SLICE_NS)
                continue
            offset += count

    async def _converge(self) -> None:
        """Copy what is dirty until told to finish; returns with the source drained and nothing left to copy."""
        while True:
            await self.pause_point()
            if self.failure is not None:
                raise self.failure
            if self._choosing.locked():
                await self._round_ended()
                continue
            dirty = self.bitmap.count
            self.progress_remaining = dirty + self.in_flight.bytes
            delay = SLICE_NS if self._retrying else 0
            self._retrying = False
            if self.in_flight.full or (not dirty and self.in_flight.background):
                await self._some_copy_ended()
            elif dirty:
                delay = max(delay, await self._copy_next_run())
            elif await self._nothing_dirty():
                return
            else:
                delay = 0 if self.bitmap.count else SLICE_NS
            if delay:
                if (hit := self.runner.trace.mirror_before_sleep) is not None:
                    hit(job=self.id, dirty=self.bitmap.count, synced=self.is_ready, delay_ns=delay)
                await self.sleep_ns(delay)

    async def _round_ended(self) -> None:
        async with self._choosing:
            return

    async def _some_copy_ended(self) -> None:
        if (hit := self.runner.trace.mirror_yield) is not None:
            under_way = self.in_flight.background
            hit(job=self.id, dirty=self.bitmap.count, free=self.in_flight.limit - under_way, in_flight=under_way)
        await self.in_flight.changed()

    async def _conflict_ended(self, offset: int) -> None:
        if (hit := self.runner.trace.mirror_yield_in_flight) is not None:
            hit(job=self.id, offset=offset, in_flight=self.in_flight.background)
        await self.in_flight.changed()

    async def _nothing_dirty(self) -> bool:
        """The two sides are equal for a moment: become ready, and if told so, finish (True)."""
        if (hit := self.runner.trace.mirror_before_flush) is not None:
            hit(job=self.id)
        generation = self.filter.generation
        self.flushes.active = self.plan.semi_sync
        if not await self._flush_target() or self.failure is not None:
            return False
        self.flushes.known(generation)
        # A guest that wrote while we waited does not put READY off: on a slow disk with a busy guest it would never come.
        self.progress_remaining = self.bitmap.count + self.in_flight.bytes
        if not self.is_ready:
            self.ready()
        if not self._group_ends or self.force_cancelled:
            return False
        if not self._is_clean():
            self._misses += 1
            if self._misses <= _PATIENCE:
                return False
        return await self._finish()

    @property
    def _group_ends(self) -> bool:
        """Whether this job and all that end together with it have been told to: until then it follows its source, or its guest
        would be held while another disk's copy goes on.
        """
        assert self.txn is not None
        return all(job.ends_by_itself for job in self.txn.jobs)

    async def _finish(self) -> bool:
        """Hold the guest's requests; they stay held if the two sides are equal then (True)."""
        if (hit := self.runner.trace.mirror_before_drain) is not None:
            hit(job=self.id, dirty=self.bitmap.count)
        assert self.txn is not None
        for job in self.txn.jobs:
            job.wake()  # or this one's guest would be held until they look by themselves
        await self.drain(self.source)
        while self._misses > _PATIENCE and not self._is_clean() and self._goes_well():
            await self.undisturbed()
            if self.bitmap.count:
                await self._copy_next_run()
            else:
                await self._some_copy_ended()
        if not self._is_clean() or not await self._flush_target():
            self._misses += 1
            self.end_drain()
            return False
        self.progress_remaining = 0
        return True

    def _goes_well(self) -> bool:
        """Whether nothing has failed and nobody wants the job to stop: no reason to let the guest go on first."""
        return not (self.failure or self._retrying or self.force_cancelled or self.user_paused)

    def _is_clean(self) -> bool:
        """Whether there is nothing to copy, nothing being copied, and no failure to end with."""
        return not (self.bitmap.count or self.in_flight.background) and self.failure is None

    async def _flush_target(self) -> bool:
        try:
            await requests.flush(self.target_edge.node)
        except IO_FAILURES as error:
            if self.target_failed(error) is ErrorAction.REPORT:
                raise
            return False
        return True

    # ------------------------------------------------------------------------------------------------- copying one run

    def _next_run(self, dirty: DirtyBitmap) -> ByteRange | None:
        """The next run of ``dirty`` within reach, cut where a request is under way; the walk goes round and round.

        Its length is 0 when the run begins with a request under way.
        """
        run = dirty.next_dirty_range(self._cursor, max_length=self._reach)
        if run is None:
            run = dirty.next_dirty_range(0, max_length=self._reach)
            if (hit := self.runner.trace.mirror_restart_iter) is not None:
                hit(job=self.id, dirty=dirty.count)
        if run is None:
            return None
        unit = self.plan.unit
        start, end = align_down(run.offset, unit), min(align_up(run.end, unit), self.length)
        free = self.in_flight.clear_run(start, end - start)
        if free < end - start:
            free = align_down(free, max(self.plan.granularity, unit))
        return ByteRange(start, free)

    async def _copy_next_run(self) -> int:
        """Begin copies of the next dirty run; returns for how many nanoseconds to sleep afterwards."""
        async with self._choosing:
            run = self._next_run(self.bitmap)
            if run is None:
                return 0
            if not run.length:
                await self._conflict_ended(run.offset)
                return 0
            return await self._copy_run(run)

    async def _copy_run(self, run: ByteRange) -> int:
        """Begin copies of a run, perhaps only its beginning: ``_cursor`` says up to where."""
        if (hit := self.runner.trace.mirror_one_iteration) is not None:
            hit(job=self.id, offset=run.offset, length=run.length)
        self.bitmap.reset(run.offset, run.length)
        self._cursor = run.end
        delay, offset, end, only_zeroes = 0, run.offset, run.end, True
        while offset < end and not self.force_cancelled:
            length, method = await self._next_request(offset, end - offset)
            if method is Method.COPY:
                only_zeroes = False
                self._unflushed += length
                if self._reach > self.plan.buf_size:
                    end = min(end, align_up(max(offset + length, run.offset + self.plan.buf_size), self.plan.unit))
            while self.in_flight.full or self.in_flight.conflict(offset, length):
                await self._conflict_ended(offset)
            operation = self.in_flight.begin(offset, length)
            work = self._copy(operation) if method is Method.COPY else self._empty(operation, method)
            self.spawn(self._watched(operation, work), f"copy at {offset}")
            delay = self.limit.delay_ns(0 if method is not Method.COPY and self._zeroes_cheaply else length)
            offset += length
        if offset < run.end:  # data found, where only zeroes may be taken in long runs; or cancelled
            self.bitmap.mark(offset, run.end - offset)
            self._cursor = offset
        self._reach = min(4 * self._reach, max(_MAX_REACH, self.plan.buf_size)) if only_zeroes else self.plan.buf_size
        if self._unflushed >= _FLUSH_STEP:
            self._begin_early_flush()
        return delay

    def _begin_early_flush(self) -> None:
        """Flush as an operation of its own, on no bytes: whoever waits for the copies waits for it too."""
        self._unflushed = 0
        self.spawn(self._watched(self.in_flight.begin(0, 0), self._flush_early()), "early flush")

    async def _flush_early(self) -> None:
        with contextlib.suppress(*IO_FAILURES):  # the flush before READY fails as well, and tells
            await requests.flush(self.target_edge.node)

    async def _next_request(self, offset: int, length: int) -> tuple[int, Method]:
        """How many of ``length`` bytes the next request is to take, and how."""
        assert self._buffers is not None
        piece, cluster = self._buffers.piece, self.target_edge.node.driver.info().cluster_size
        try:
            extent = await requests.chain_status(self.source, offset, length)
        except IO_FAILURES:
            return min(length, piece), Method.COPY  # reading will tell
        count, method = self.plan.next_request(extent, offset, piece=piece, target_cluster=cluster)
        return min(count, length), method

    async def _watched(self, operation: Operation, work: Coroutine[Any, Any, None]) -> None:
        """Do the work of an operation; nobody may take a bug in it for success."""
        try:
            await work
        except Exception as bug:
            self.failure = self.failure or bug
        finally:
            self.in_flight.end(operation)
            if operation.length and (hit := self.runner.trace.mirror_iteration_done) is not None:
                hit(job=self.id, offset=operation.offset, length=operation.length, ret=operation.ret)

    async def _copy(self, operation: Operation) -> None:
        assert self._buffers is not None
        if self._offload and await self._copied_by_offload(operation):
            self.advance(operation.length)
            return
        buffer = self._buffers.take()
        try:
            await self._copy_by_buffer(operation, buffer[: operation.length])
        finally:
            self._buffers.give(buffer)

    async def _copied_by_offload(self, operation: Operation) -> bool:
        """Copy without a buffer if that can be done. Whoever fails, a copy by buffer will tell whose fault it was."""
        try:
            await requests.copy_range(
                self.filter.child, operation.offset, self.target_edge, operation.offset, operation.length
            )
        except IO_FAILURES as error:
            self._offload = self._offload and not (isinstance(error, OSError) and error.errno == errno.ENOTSUP)
            return False
        return True

    async def _copy_by_buffer(self, operation: Operation, buffer: memoryview) -> None:
        offset = operation.offset
        try:
            await requests.read_into(self.filter.child, offset, buffer)
        except IO_FAILURES as error:
            self._copy_failed(operation, error)
            self._source_failed(error)
            return
        try:
            await requests.write_from(self.target_edge, offset, buffer)
        except IO_FAILURES as error:
            self._copy_failed(operation, error)
            self.target_failed(error)
            return
        self.advance(operation.length)

    async def _empty(self, operation: Operation, method: Method) -> None:
        offset, length = operation.offset, operation.length
        try:
            if method is Method.ZERO:
                await requests.write_zeroes(self.target_edge, offset, length, may_unmap=self.plan.unmap)
            else:
                await requests.discard(self.target_edge, offset, length)
        except IO_FAILURES as error:
            self._copy_failed(operation, error)
            self.target_failed(error)
            return
        self.advance(length)

    def _copy_failed(self, operation: Operation, error: Exception) -> None:
        operation.ret = -(io_error(error).errno or errno.EIO)
        self.bitmap.mark(operation.offset, operation.length)

    def _source_failed(self, error: Exception) -> ErrorAction:
        return self._failed(error, self.plan.on_source_error, is_read=True)

    def target_failed(self, error: Exception) -> ErrorAction:
        """A request of the target has failed: tell, and do what the policy says."""
        return self._failed(error, self.plan.on_target_error, is_read=False)

    def _failed(self, error: Exception, policy: OnError, *, is_read: bool) -> ErrorAction:
        action = self.failed_request(io_error(error), policy, is_read=is_read)
        self.flushes.doubt()
        if action is ErrorAction.REPORT:
            self.failure = self.failure or error
            self.wake()
        elif action is ErrorAction.IGNORE:
            self._retrying = True
        return action

    # ----------------------------------------------------------------------------------------- guest flushes, semi-sync

    @property
    def may_promise(self) -> bool:
        """See `RoundHost`: not once the job is about to fail, nor while an error has stopped it."""
        return self.failure is None and self.io_status is IoStatus.OK and not self.force_cancelled

    async def catch_up(self) -> int:
        """See `RoundHost`."""
        async with self._choosing:
            generation, doubts = self.filter.generation, self.flushes.doubts
            due = DirtyBitmap(self.bitmap.size, self.bitmap.granularity)
            due.merge(self.bitmap)
            while due.count and doubts == self.flushes.doubts and self.may_promise:
                run = self._next_run(due)
                assert run is not None
                if run.length:
                    await self._copy_run(run)
                    due.reset(run.offset, self._cursor - run.offset)
                else:
                    await self._conflict_ended(run.offset)
            await self.in_flight.all_background_ended()
        if doubts == self.flushes.doubts and self.may_promise:
            with contextlib.suppress(*IO_FAILURES):  # the policy has been applied to it
                await self._flush_target()
        return generation

    # ---------------------------------------------------------------------------------------------------------- endings

    async def settle(self) -> None:
        """See `Job`: both sides at rest; a finished run has the source drained already."""
        self.mirroring = False
        missing = [node for node in (self.source, self.target_edge.node) if node not in self.drained_nodes]
        await self.drain(*missing)

    async def prepare(self) -> None:
        """See `Job`: the switch, all or nothing."""
        plan = self.plan
        node = self.target_edge.node
        self._replacement = node if self._should_complete else None
        if self._should_complete and plan.replaces is not None:
            self._check_replaced(self.runner.graph.find_node(plan.replaces))
        if self._should_complete and plan.backing_at_end is BackingAtEnd.HEADER:
            await self.runner.opener.open_backing_chain(node)
            await self.undisturbed()
        with Transaction() as change, self.runner.graph.deferred_permissions(change):
            self.dismantle(node, change, switch=self._should_complete)

    def _check_replaced(self, wanted: BlockDriverState) -> None:
        if not may_be_replaced(self.source, wanted):
            raise BlockIOError(errno.EPERM, f"Node '{wanted.node_name}' cannot be replaced any more: others use it now")

    def dismantle(self, target: BlockDriverState, change: Transaction, *, switch: bool) -> None:
        """Take the job's parts out of the graph, and with ``switch`` put the target in the place of the source."""
        graph = self.runner.graph
        self.filter.retire(change)
        self.let_go(target, change)
        if switch:
            if self.plan.backing_at_end is BackingAtEnd.SOURCE_CHAIN:
                graph.set_backing(graph.skip_filters(target), self.plan.backing_node, change)
            replaced = self.source if self.plan.replaces is None else graph.find_node(self.plan.replaces)
            graph.replace_node(replaced, target, change)
        graph.drop(self.filter.node, change)

    def let_go(self, target: BlockDriverState, change: Transaction) -> None:
        """Give back what the job holds, the filter aside."""
        del target
        change.add(commit=self._forget_bitmap)
        self.release(change)
        self.target.remove(change)

    def _forget_bitmap(self) -> None:
        self.source.dirty_bitmaps.remove(self.bitmap)

    async def afterwards(self) -> None:
        """See `Job`: what took the place of a read-only node is read-only too."""
        if self._replacement is not None and self.error is None and self.source.read_only:
            with contextlib.suppress(QBlockError, OSError):  # it stays writable, which changes nothing that is stored
                await self.runner.opener.reopen(self._replacement, read_only=True)

    def abort(self) -> None:
        """See `Job`: the source keeps its place. A filter without which somebody could not go on using the source stays."""
        target = self.target_edge.node
        try:
            with Transaction() as change, self.runner.graph.deferred_permissions(change):
                self.dismantle(target, change, switch=False)
        except PermissionConflict:  # a writer has come to the source who may be there only below the filter
            with Transaction() as change:
                self.let_go(target, change)

    def clean(self) -> None:
        """See `Job`."""
        self.filter.host = None
        self.end_drain()
        self.runner.graph.remove_backend(self.target)


def _storage_of(node: BlockDriverState) -> BlockDriverState:
    """The node at the bottom that keeps the data of ``node``."""
    while (edge := node.storage) is not None:
        node = edge.node
    return node
