"""What guests ask for while a mirror follows their disk, in the modes in which that concerns the target.

Models the other half of QEMU's ``mirror_top`` (semantics.md section 4.4): in write-blocking mode a change is applied to the
source, then to the target, then answered. In semi-sync mode a flush waits for the target (`mirror_semisync`). The job itself
is in `mirror_job.py`, the filter through which the requests come in `mirror_top.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import attrs

from qblock import requests
from qblock.jobs.copying import IO_FAILURES, MAX_REQUEST, Operation
from qblock.units import align_down, align_up

if TYPE_CHECKING:
    from qblock.jobs.mirror_job import MirrorJob


@attrs.define(eq=False)
class GuestRequests:
    """The requests of guests that concern the target of ``job``; implements `mirror_top.MirrorHost`."""

    job: MirrorJob

    async def guest_flushed(self, generation: int) -> None:
        """See `MirrorHost`."""
        if self.job.flushes.active and (hit := self.job.runner.trace.mirror_flush_generation) is not None:
            hit(job=self.job.id, generation=generation)
        await self.job.flushes.reached(generation)

    @property
    def copies_guest_writes(self) -> bool:
        """See `MirrorHost`."""
        return self.job.mirroring and self.job.failure is None and not self.job.force_cancelled

    async def guest_write(self, offset: int, buffer: memoryview, *, fua: bool) -> None:
        """See `MirrorHost`."""
        operation = await self._begin_guest(offset, len(buffer))
        try:
            await requests.write_from(self.job.filter.child, offset, buffer, fua=fua)
            await self._follow(operation, lambda: requests.write_from(self.job.target_edge, offset, buffer, fua=fua))
        except BaseException:
            self.job.bitmap.mark(operation.offset, operation.length)
            raise
        finally:
            self.job.in_flight.end(operation)

    async def guest_write_zeroes(self, offset: int, length: int, *, may_unmap: bool, fua: bool) -> None:
        """See `MirrorHost`."""
        operation = await self._begin_guest(offset, length)
        try:
            await requests.write_zeroes(self.job.filter.child, offset, length, may_unmap=may_unmap, fua=fua)
            await self._follow(
                operation,
                lambda: requests.write_zeroes(self.job.target_edge, offset, length, may_unmap=may_unmap, fua=fua),
            )
        except BaseException:
            self.job.bitmap.mark(operation.offset, operation.length)
            raise
        finally:
            self.job.in_flight.end(operation)

    async def guest_discard(self, offset: int, length: int) -> None:
        """See `MirrorHost`: the target gets what the source reads as afterwards, zeroes or not."""
        operation = await self._begin_guest(offset, length)
        try:
            await requests.discard(self.job.filter.child, offset, length)
            if await requests.is_zero(self.job.source, offset, length):
                await self._follow(
                    operation, lambda: requests.write_zeroes(self.job.target_edge, offset, length, may_unmap=True)
                )
            else:
                self.job.bitmap.mark(offset, length)
        except BaseException:
            self.job.bitmap.mark(operation.offset, operation.length)
            raise
        finally:
            self.job.in_flight.end(operation)

    async def _begin_guest(self, offset: int, length: int) -> Operation:
        """Register a guest's request, widened to whole units of the target, once no copy covers it."""
        unit = self.job.plan.unit
        start, end = align_down(offset, unit), min(align_up(offset + length, unit), self.job.length)
        await self.job.in_flight.clear_of(start, end - start)
        self.job.progress_remaining += length
        return self.job.in_flight.begin_foreground(start, end - start, counted=length)

    async def _follow(self, operation: Operation, to_target: Callable[[], Awaitable[None]]) -> None:
        """After the source has changed, change the target. Its failure is the job's, not the guest's."""
        if not self.copies_guest_writes:
            self.job.bitmap.mark(operation.offset, operation.length)
            return
        try:
            if self.job.plan.unit == 1:
                await to_target()
            else:
                await self._copy_whole_units(operation)
        except IO_FAILURES as error:
            self.job.bitmap.mark(operation.offset, operation.length)
            self.job.target_failed(error)
            return
        self.job.bitmap.reset(operation.offset, operation.length)
        self.job.advance(operation.counted)

    async def _copy_whole_units(self, operation: Operation) -> None:
        end = operation.offset + operation.length
        if await requests.is_zero(self.job.source, operation.offset, operation.length):
            await requests.write_zeroes(
                self.job.target_edge, operation.offset, operation.length, may_unmap=self.job.plan.unmap
            )
            return
        buffer = memoryview(bytearray(min(operation.length, MAX_REQUEST)))
        for offset in range(operation.offset, end, MAX_REQUEST):
            piece = buffer[: min(MAX_REQUEST, end - offset)]
            await requests.read_into(self.job.filter.child, offset, piece)
            await requests.write_from(self.job.target_edge, offset, piece)
