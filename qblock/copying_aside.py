"""What is about to be overwritten is copied aside first: a copy of one moment, made by whoever comes first.

Models QEMU's block-copy, which a ``copy-before-write`` filter and a backup job share (semantics.md sections 4.5 and 17). A bitmap
says which clusters are *pending*: not copied, and nobody is copying them. Whoever wants a range copied takes pending clusters
out of the bitmap as a `Piece`, so that two copies never overlap; a piece that fails goes back. A guest's write waits for the
pieces of others that it overlaps, and copies what is pending itself; only then may it overwrite the source.

Zeroes are written as zeroes. Of a piece only as much is copied at a time as is of one kind; the rest becomes pending again.
All offsets and lengths are bytes. A piece has whole clusters, but for the last one of the disk.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs

from qblock import requests
from qblock.chain import chain_next, contains, skip_filters
from qblock.dirty import DirtyBitmap
from qblock.errors import BlockIOError, ImageError
from qblock.serialising import reads_ended, unwatch_reads, wake_waiters, watch_reads
from qblock.units import KiB, MiB, align_down, align_up

if TYPE_CHECKING:
    from qblock.node import BdrvChild, BlockDriverState

MIN_CLUSTER: Final = 64 * KiB
MAX_BUFFERED: Final = MiB
"""The most that one piece copies by buffer."""
_MAX_OFFLOADED: Final = 16 * MiB
_KEPT_BUFFERS: Final = 16
_BUFFERS: Final = 128
"""How many pieces may have a buffer at the same time."""
_IO_FAILURES: Final = (OSError, ImageError)


@attrs.frozen
class CopyFailure:
    """Why a piece was not copied, and whether it was the reading that failed."""

    error: OSError
    is_read: bool


class Content(enum.Enum):
    """What a piece of the source is, as far as a copy is concerned."""

    DATA = enum.auto()
    ZERO = enum.auto()
    UNWANTED = enum.auto()


@attrs.define(eq=False, slots=True)
class Piece:
    """Clusters that somebody is copying, and who waits for them; ``content`` once `CopyAside.look` has looked."""

    offset: int
    length: int
    content: Content | None = None
    waiters: list[asyncio.Future[None]] = attrs.field(factory=list)

    @property
    def end(self) -> int:
        """The first byte behind the piece."""
        return self.offset + self.length

    async def changed(self) -> None:
        """Wait until it is copied, has failed, or has become smaller."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        await waiter


@attrs.define(eq=False)
class CopyCall:
    """One caller's wish to have a range copied; ``stopped``: it does not wait any more, so no more pieces are begun."""

    stopped: bool = False


class CopyAside:
    """Copies from the child ``source`` to the child ``target`` of one node.

    ``compress`` stores clusters packed; ``offload`` copies inside the storage where that can be done; with
    ``skip_unallocated`` only what the uppermost layer of the source holds is copied. ``progress`` is called when a piece has
    ended, with the bytes that it has copied, in whole clusters.
    """

    def __init__(self, source: BdrvChild, target: BdrvChild) -> None:
        self.source = source
        self.target = target
        self.cluster = max(MIN_CLUSTER, target.node.driver.info().cluster_size)
        self.pending = DirtyBitmap(source.node.length, self.cluster, enabled=False)
        self.compress = False
        self.offload = False
        self.skip_unallocated = False
        self.progress: Callable[[int], None] = lambda count: None
        self.in_flight = 0
        """Bytes of the pieces that are being copied, in whole clusters."""
        self._pieces: list[Piece] = []
        self._buffers: list[memoryview] = []
        self._room = asyncio.Semaphore(_BUFFERS)
        self._watched: BlockDriverState | None = None
        self._bitmap_holder = source.node
        self._bitmap_holder.dirty_bitmaps.append(self.pending)
        if contains(target.node, skip_filters(source.node)):
            # Who reads the target reads the source where it has nothing: a guest's write must wait for that.
            self._watched = target.node
            watch_reads(target.node)

    def close(self) -> None:
        """Let go of the nodes; may be called again."""
        if self.pending in self._bitmap_holder.dirty_bitmaps:
            self._bitmap_holder.dirty_bitmaps.remove(self.pending)
        if self._watched is not None:
            unwatch_reads(self._watched)
            self._watched = None

    @property
    def chunk(self) -> int:
        """The most data that one piece should have; zeroes may be longer. Zeroes in what is packed are found by the cluster."""
        if self.compress and self.target.node.detect_zeroes != "off":
            return self.cluster
        return max(self.cluster, _MAX_OFFLOADED if self.offload else MAX_BUFFERED)

    # ------------------------------------------------------------------------------------------------------- pieces

    def take(self, offset: int, end: int, *, limit: int) -> Piece | None:
        """The first pending clusters at or behind ``offset`` and before ``end``, at most ``limit`` bytes; `copy` must follow.

        ``offset`` and ``limit`` are whole clusters.
        """
        if offset >= end:
            return None
        run = self.pending.next_dirty_range(offset, max_length=limit)
        if run is None or run.offset >= end:
            return None
        piece = Piece(run.offset, min(run.length, align_up(end, self.cluster) - run.offset))
        self.pending.reset(piece.offset, piece.length)
        self._pieces.append(piece)
        self.in_flight += self._counted(piece)
        return piece

    def forget(self, offset: int, length: int) -> None:
        """The clusters that lie wholly in the range need no copy."""
        self.pending.reset(offset, length)

    def _end(self, piece: Piece, *, copied: bool) -> None:
        self._pieces.remove(piece)
        self.in_flight -= self._counted(piece)
        if not copied:
            self.pending.mark(piece.offset, piece.length)
        self.progress(self._counted(piece) if copied and piece.content is not Content.UNWANTED else 0)
        wake_waiters(piece.waiters)

    async def look(self, piece: Piece) -> None:
        """See what a piece is, and cut it to what is of one kind; the rest is pending again."""
        try:
            piece.content = await self._look(piece)
        except BaseException:
            self._end(piece, copied=False)
            raise

    async def copy(self, piece: Piece) -> CopyFailure | None:
        """Copy what `take` gave, or its beginning; what is not copied is pending again afterwards."""
        if piece.content is None:
            await self.look(piece)
        copied = False
        try:
            failure = await self._copy(piece)
            copied = failure is None
            return failure
        finally:
            self._end(piece, copied=copied)

    async def ensure(self, offset: int, length: int, call: CopyCall | None = None) -> CopyFailure | None:
        """Have the whole range copied, so that it may be overwritten; stops at the first failure of its own."""
        start, end = align_down(offset, self.cluster), min(align_up(offset + length, self.cluster), self.pending.size)
        while call is None or not call.stopped:
            piece = self.take(start, end, limit=self.chunk)
            if piece is not None:
                if (failure := await self.copy(piece)) is not None:
                    return failure
            elif (other := self.overlapping(start, end)) is not None:
                await other.changed()
            else:
                break
        if self._watched is not None:
            await reads_ended(self._watched, start, end)
        return None

    def overlapping(self, start: int, end: int) -> Piece | None:
        """Some piece that is being copied and overlaps the range."""
        for piece in self._pieces:
            if piece.offset < end and start < piece.end:
                return piece
        return None

    def _counted(self, piece: Piece) -> int:
        """Bytes of a piece as progress: as in QEMU the last cluster of the disk counts as a whole one."""
        return align_up(piece.length, self.cluster)

    def _shorten(self, piece: Piece, length: int) -> None:
        """Give the end of a piece back."""
        if length < piece.length:
            self.pending.mark(piece.offset + length, piece.length - length)
            self.in_flight -= self._counted(piece)
            piece.length = length
            self.in_flight += self._counted(piece)
            wake_waiters(piece.waiters)

    # ------------------------------------------------------------------------------------------------------ copying

    async def _copy(self, piece: Piece) -> CopyFailure | None:
        if piece.content is Content.UNWANTED:
            return None
        if piece.end > self.target.node.length:
            return CopyFailure(BlockIOError(errno.ENOSPC, "The target is shorter than the source"), is_read=False)
        try:
            if piece.content is Content.ZERO:
                await requests.write_zeroes(self.target, piece.offset, piece.length)
            elif not (self.offload and await self._offloaded(piece)):
                failure = await self._copy_by_buffer(piece)
                if failure is not None:
                    return failure
        except _IO_FAILURES as error:
            return CopyFailure(_with_errno(error), is_read=False)
        return None

    async def _look(self, piece: Piece) -> Content:
        node = self.source.node
        base = chain_next(skip_filters(node)) if self.skip_unallocated else None
        try:
            extent = await requests.chain_status(node, piece.offset, piece.length, base=base)
        except _IO_FAILURES:
            self._shorten(piece, self.chunk)
            return Content.DATA  # reading will tell
        present = extent.present or not self.skip_unallocated
        plain = present and not extent.zero
        whole = extent.length if extent.length >= piece.length else align_down(extent.length, self.cluster)
        if plain or not whole:
            self._shorten(piece, min(self.chunk, max(whole, self.cluster)))
            return Content.DATA
        self._shorten(piece, whole)
        return Content.ZERO if present else Content.UNWANTED

    async def _offloaded(self, piece: Piece) -> bool:
        """Copy inside the storage if that can be done. Whoever fails, a copy by buffer will tell whose fault it was."""
        try:
            await requests.copy_range(self.source, piece.offset, self.target, piece.offset, piece.length)
        except _IO_FAILURES as error:
            self.offload = self.offload and not (isinstance(error, OSError) and error.errno == errno.ENOTSUP)
            self._shorten(piece, self.chunk)
            return False
        return True

    async def _copy_by_buffer(self, piece: Piece) -> CopyFailure | None:
        """Read and write; raises what the writing raises."""
        async with self._room:
            block = self._buffers.pop() if self._buffers else memoryview(mmap.mmap(-1, max(MAX_BUFFERED, self.cluster)))
            buffer = block[: piece.length]
            try:
                try:
                    await requests.read_into(self.source, piece.offset, buffer)
                except _IO_FAILURES as error:
                    return CopyFailure(_with_errno(error), is_read=True)
                if self.compress:
                    await requests.write_compressed(self.target, piece.offset, buffer)
                else:
                    await requests.write_from(self.target, piece.offset, buffer)
            finally:
                if len(self._buffers) < _KEPT_BUFFERS:
                    self._buffers.append(block)
        return None


def _with_errno(error: Exception) -> OSError:
    return error if isinstance(error, OSError) else BlockIOError(errno.EIO, str(error))
