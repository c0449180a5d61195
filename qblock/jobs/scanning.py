"""What jobs share that go once through a disk and move the parts that need it: stream and commit.

Models the loops of QEMU's two jobs (semantics.md sections 4.1 and 4.2): steps of 512 KiB, skipping costs nothing, ``offset`` is
where the first part begins that is not done. Differs from QEMU in that up to 16 steps are under way at the same time; and a
failed part that is to be tried again without a pause is tried after 100 ms instead of at once. What was stored is made durable
before the job is done, and a flush that fails is treated like a write that does (QEMU does not flush, or looks away).
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar, Final

from qblock import requests
from qblock.copying_down import Piece
from qblock.jobs.copying import IO_FAILURES, SLICE_NS, BufferPool, InFlight, Operation, io_error
from qblock.jobs.job import BlockJob
from qblock.jobs.state import ErrorAction, IoStatus, OnError
from qblock.units import KiB

if TYPE_CHECKING:
    from qblock.jobs.runner import JobRunner
    from qblock.node import BlockDriverState

STEP: Final = 512 * KiB
_PARALLEL: Final = 16


class ScanningJob(BlockJob):
    """See the module. Subclasses say where there is work (`part_at`) and do it (`fetch`, then `store`)."""

    ignored_is_skipped: ClassVar[bool]
    """What policy ``ignore`` means: go on without the part, and fail at the end; or try the part again."""

    def __init__(
        self, runner: JobRunner, job_id: str, on_error: OnError, *, auto_finalize: bool = True, auto_dismiss: bool = True
    ) -> None:
        super().__init__(runner, job_id, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.on_error = on_error
        self.in_flight = InFlight(limit=_PARALLEL)
        self._end = 0
        self._position = 0
        """All parts below have been begun; those that have not ended are in ``_unfinished``."""
        self._unfinished: list[Piece] = []
        self._again: list[Piece] = []
        self._later = False
        self._failure: Exception | None = None
        self._ignored: Exception | None = None

    # --------------------------------------------------------------------------------------------- written by subclasses

    @property
    @abc.abstractmethod
    def stored_in(self) -> BlockDriverState:
        """The node that the parts are stored in."""

    @abc.abstractmethod
    async def part_at(self, offset: int, end: int) -> Piece:
        """The part of the disk at ``offset``, and what is to be done about it; a part with work that is not known to become
        zero has at most `STEP` bytes."""

    @abc.abstractmethod
    async def fetch(self, part: Piece, buffer: memoryview) -> None:
        """The first half of moving a part, whose failure is one of reading; ``buffer`` is as long as the part, or empty if that
        becomes zero."""

    async def store(self, part: Piece, buffer: memoryview) -> None:
        """The other half, whose failure is one of writing."""

    # ------------------------------------------------------------------------------------------------------------ the loop

    async def scan(self, end: int) -> None:
        """Go through the disk from 0 to ``end``; raises what the job is to fail with."""
        self.progress_remaining = self._end = end
        buffers = BufferPool(_PARALLEL * STEP, piece=STEP)
        try:
            while await self._step(buffers):
                pass
        finally:
            await self.in_flight.all_background_ended()
            buffers.close()
        await self._make_durable()
        if self._ignored is not None:
            raise self._ignored

    async def _make_durable(self) -> None:
        """Flush while the error policy can still be asked; `prepare` then finds little to do that may fail."""
        while self._ignored is None:
            await self.pause_point()
            try:
                await requests.flush(self.stored_in)
            except IO_FAILURES as error:
                match self._failed(error, is_read=False):
                    case ErrorAction.REPORT:
                        raise
                    case ErrorAction.IGNORE if not self.ignored_is_skipped:
                        await self.sleep_ns(SLICE_NS)
            else:
                return

    async def before_pause(self) -> None:
        """See `Job`: let the copies under way end."""
        await self.in_flight.all_background_ended()

    async def _step(self, buffers: BufferPool) -> bool:
        """Skip or begin to copy the next part; False when all is done."""
        await self.pause_point()
        if self._failure is not None:
            raise self._failure
        if self.in_flight.full:
            await self.in_flight.changed()
            return True
        if self._later:
            self._later = False
            await self.sleep_ns(SLICE_NS)
            return True
        part = self._again.pop() if self._again else await self._next_part()
        if part is None:
            if self.in_flight.background:
                await self.in_flight.changed()
            return bool(self.in_flight.background or self._again or self._failure)
        operation = self.in_flight.begin(part.offset, part.length)
        self.spawn(self._move(operation, part, buffers), f"copy at {part.offset}")
        delay = self.limit.delay_ns(0 if part.zero else part.length)
        if delay:
            await self.sleep_ns(delay)
        return True

    async def _next_part(self) -> Piece | None:
        """The next part that there is work for; what needs none is counted as done."""
        while self._position < self._end:
            try:
                part = await self.part_at(self._position, self._end)
            except IO_FAILURES as error:
                await self._status_failed(error)
                continue
            self._position += part.length
            if part.work:
                self._unfinished.append(part)
                return part
            self._count()
            await self.pause_point()
        return None

    async def _status_failed(self, error: Exception) -> None:
        match self._failed(error, is_read=True):
            case ErrorAction.REPORT:
                raise error
            case ErrorAction.IGNORE if self.ignored_is_skipped:
                self._position = min(self._position + STEP, self._end)
                self._count()
            case ErrorAction.IGNORE:
                await self.sleep_ns(SLICE_NS)
        await self.pause_point()

    async def _move(self, operation: Operation, part: Piece, buffers: BufferPool) -> None:
        buffer = buffers.take()
        view = buffer[: 0 if part.zero else part.length]
        reading = True
        try:
            await self.fetch(part, view)
            reading = False
            await self.store(part, view)
            self._finished(part)
        except IO_FAILURES as error:
            self._part_failed(part, error, is_read=reading)
        except Exception as bug:  # nobody may take it for success
            self._failure = self._failure or bug
        finally:
            buffers.give(buffer)
            self.in_flight.end(operation)

    def _part_failed(self, part: Piece, error: Exception, *, is_read: bool) -> None:
        """Do what the policy says; only the first failure of parts that were under way together is told, as QEMU has one."""
        if self._failure is not None:
            return
        if self.io_status is not IoStatus.OK:
            self._again.append(part)
            return
        match self._failed(error, is_read=is_read):
            case ErrorAction.REPORT:
                self._failure = error
                self.wake()  # a slow job has nothing more to wait for
            case ErrorAction.IGNORE if self.ignored_is_skipped:
                self._finished(part)
            case ErrorAction.IGNORE:
                self._again.append(part)
                self._later = True
            case ErrorAction.STOP:
                self._again.append(part)

    def _finished(self, part: Piece) -> None:
        self._unfinished.remove(part)
        self._count()

    def _count(self) -> None:
        self.progress_done = min((part.offset for part in self._unfinished), default=self._position)
        self.progress_remaining = self._end - self.progress_done

    def _failed(self, error: Exception, *, is_read: bool) -> ErrorAction:
        action = self.failed_request(io_error(error), self.on_error, is_read=is_read)
        if action is ErrorAction.IGNORE and self.ignored_is_skipped:
            self._ignored = self._ignored or error
        return action
