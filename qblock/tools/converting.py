"""The copy engine of ``qblock-img convert``: long extents, several workers, holes stay holes.

Models semantics.md section 19 (convert): data go through buffers in which runs of zeroes are found, areas that the map
knows as zero are never read, writes happen in order unless told otherwise. One planner asks the chain for long extents and
cuts them into pieces; each worker takes a piece, reads it, waits for its turn and writes it. Memory is one buffer per worker.
Differs from QEMU: zeroes are looked for in units of the target's cluster when that is larger than -S, which allocates the
same clusters; and with a backing file for the target, the layers above that file in the source's chain are copied, not the
top one alone (7.2 loses what lies between). Compressing workers do not wait for each other's writes, only for the beginning of
them: what is packed is laid out in the same order, and all processors pack.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, Final

import attrs

from qblock.backend import BlockBackend
from qblock.clock import Clock, RateLimit
from qblock.errors import BlockIOError, CommandError, QBlockError
from qblock.node import BlockDriverState
from qblock.status import FIRST_QUESTION, Further, chain_status, next_question
from qblock.tools.console import Teller
from qblock.units import GiB, MiB, align_down, align_up
from qblock.zeroes import ZERO_PIECE, fill_zero, zero_view

COMPRESSED_CHUNK: Final = MiB
CHUNK: Final = 2 * MiB
"""Bytes that a worker copies at a time (or one cluster of the target, when that is larger)."""
OFFLOAD_CHUNK: Final = 16 * MiB
MAX_ZEROES: Final = GiB
SECTOR: Final = 512
_DATA: Final = (False, False)
_ZERO: Final = (True, False)
_SKIP: Final = (False, True)
"""What is to be made of a run: whether it is to be zero, whether nothing is to be done for it."""


@attrs.frozen
class ConvertSettings:
    """How to copy. ``sparse`` is the unit in bytes in which zeroes are looked for (0: everything is written as data).

    ``base``: what the source's layers below it hold is left to the target's own backing file. ``target_is_zero``: the target
    reads as zeroes now. ``speed`` in bytes per second, 0 for no limit. ``compressed``: whole clusters are written packed.
    ``salvage`` is told what cannot be read, and zeroes are written in its place; None: that ends the copy.
    """

    workers: int = 8
    in_order: bool = True
    sparse: int = 4096
    offload: bool = False
    target_is_zero: bool = False
    has_backing: bool = False
    base: BlockDriverState | None = None
    speed: int = 0
    compressed: bool = False
    salvage: Callable[[str], None] | None = None


@attrs.frozen(slots=True)
class Piece:
    """A part of the target: ``length`` bytes at ``offset``, to be zeroes or data from ``source_offset`` of ``source``.

    Pieces to be compressed are data of all sources, which lie one behind the other.
    """

    number: int
    zero: bool
    source: BlockBackend
    source_offset: int
    offset: int
    length: int


def data_runs(buffer: bytearray, length: int, unit: int) -> Iterator[tuple[int, int]]:
    """Start and end of what is not zero in the first ``length`` bytes, in whole units of ``unit`` bytes.

    Only units that begin with a zero byte are looked at, so that data cost next to nothing.
    """
    zeroes = bytes(unit)
    view = memoryview(buffer)[:length]
    firsts = view[::unit].tobytes()
    start = 0
    at = firsts.find(0)
    while at >= 0:
        place = at * unit
        if zeroes.startswith(view[place : place + unit]):
            if start < place:
                yield start, place
            start = place + unit
        at = firsts.find(0, at + 1)
    if start < length:
        yield start, length


@attrs.define(eq=False)
class Converter:
    """Copies the sources, one behind the other, to the target."""

    sources: Sequence[BlockBackend]
    target: BlockBackend
    settings: ConvertSettings
    clock: Clock
    progress: Teller
    _plan: AsyncIterator[Piece] = attrs.field(init=False)
    _planning: asyncio.Lock = attrs.field(init=False, factory=asyncio.Lock)
    _turn: int = attrs.field(init=False, default=0)
    _waiting: dict[int, asyncio.Future[None]] = attrs.field(init=False, factory=dict)
    _offload: bool = attrs.field(init=False)
    _limit: RateLimit = attrs.field(init=False)
    _buffers: list[bytearray] = attrs.field(init=False, factory=list)
    _unit: int = attrs.field(init=False)
    _chunk: int = attrs.field(init=False)
    _total: int = attrs.field(init=False)
    _question: int = attrs.field(init=False, default=FIRST_QUESTION)
    _further: Further = attrs.field(init=False, factory=Further)
    _done: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        """Derive sizes from the target: its cluster is the unit for zeroes and divides a worker's buffer."""
        cluster = self.target.node.driver.info().cluster_size
        sparse = self.settings.sparse
        self._unit = cluster if sparse and cluster > sparse and not cluster % sparse else sparse
        if self.settings.compressed and sparse:
            self._unit = cluster
        self._chunk = align_up(CHUNK, max(self._unit, 1))
        self._offload = self.settings.offload
        self._limit = RateLimit(self.clock)
        self._limit.set_speed(self.settings.speed)
        self._total = sum(source.length for source in self.sources)
        self._plan = self._pieces()
        if self.settings.compressed:
            self._chunk = align_up(COMPRESSED_CHUNK, cluster)
            self._plan = self._whole_clusters(cluster)

    async def run(self) -> None:
        """Copy everything and flush the target; raises a QBlockError that says where it failed."""
        if not self.settings.target_is_zero and not self.settings.has_backing and self.settings.sparse:
            target_is_zero = await self._zero_whole_target()
            self.settings = attrs.evolve(self.settings, target_is_zero=target_is_zero)
        self.progress.show(0, self._total)
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self.settings.workers):
                    tasks.create_task(self._compress() if self.settings.compressed else self._work())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        try:
            await self.target.flush()
        except QBlockError as error:
            raise CommandError(f"error while flushing the output: {error}") from error
        self.progress.show(self._total, self._total)

    async def _zero_whole_target(self) -> bool:
        """Make an existing target zero in one cheap operation; False where it has none."""
        try:
            await self.target.write_zeroes(0, self.target.length, may_unmap=True, no_fallback=True)
        except BlockIOError as error:
            if error.errno != errno.ENOTSUP:
                raise
            return False
        return True

    # ------------------------------------------------------------------------------------------------------ planning

    async def _pieces(self) -> AsyncIterator[Piece]:
        """The plan: what is to be read or zeroed, in order of the target's offsets; what may be left out is left out."""
        number = start = 0
        for source in self.sources:
            at = 0
            while at < source.length:
                zero, skip, length = await self._extent(source, at)
                step = MAX_ZEROES if zero else OFFLOAD_CHUNK if self._offload else self._chunk
                end = at + length
                while not skip and at < end:
                    count = min(step - at % step, end - at)
                    yield Piece(number, zero, source, at, start + at, count)
                    number += 1
                    at += count
                at = end
            start += source.length

    async def _whole_clusters(self, cluster: int) -> AsyncIterator[Piece]:
        """The plan for compressing: pieces of whole clusters of the target."""
        number = start = end = 0
        held = _SKIP
        async for kind, first, stop in self._cluster_runs(cluster):
            if kind != held:
                if start < end and held != _SKIP:
                    yield Piece(number, held == _ZERO, self.sources[0], start, start, end - start)
                    number += 1
                held, start = kind, first
            end = stop
            while held == _DATA and end - start > self._chunk:
                yield Piece(number, False, self.sources[0], start, start, self._chunk)
                number += 1
                start += self._chunk
        if start < end and held != _SKIP:
            yield Piece(number, held == _ZERO, self.sources[0], start, start, end - start)

    async def _cluster_runs(self, cluster: int) -> AsyncIterator[tuple[tuple[bool, bool], int, int]]:
        """What is to be made of runs of whole clusters, as (kind, start, end); where that differs within one, it is all data."""
        kinds = set()
        async for kind, start, end in self._runs():
            while start < end:
                if start % cluster or (end - start < cluster and end < self._total):
                    stop = min(end, align_down(start, cluster) + cluster)
                    kinds.add(kind)
                    if not stop % cluster or stop == self._total:
                        yield kind if len(kinds) == 1 else _DATA, align_down(start, cluster), stop
                        kinds.clear()
                else:
                    stop = end if end == self._total else align_down(end, cluster)
                    yield kind, start, stop
                start = stop

    async def _runs(self) -> AsyncIterator[tuple[tuple[bool, bool], int, int]]:
        """What is to be made of the runs of all sources, by the target's offsets."""
        start = 0
        for source in self.sources:
            at = 0
            while at < source.length:
                zero, skip, length = await self._extent(source, at)
                # Without a unit for zeroes everything is data.
                zero = zero and self._unit > 0
                yield (zero, skip) if not skip else _SKIP, start + at, start + at + length
                at += length
            start += source.length

    async def _extent(self, source: BlockBackend, at: int) -> tuple[bool, bool, int]:
        """Whether the run at ``at`` is to be zero, whether nothing is to be done for it, and its length."""
        base = self.settings.base
        question = min(source.length - at, self._question)
        try:
            extent = await chain_status(source.node, at, question, base=base, further=self._further)
        except QBlockError as error:
            text = f"error while reading the block status at offset {at}: {error}"
            if self.settings.salvage is None:
                raise CommandError(text) from error
            if self._question > SECTOR:
                self._question = max(self._question // 2 & -SECTOR, SECTOR)
                return await self._extent(source, at)
            self.settings.salvage(text)
            return False, False, min(SECTOR, source.length - at)
        length = extent.length + self._further.length
        self._question = next_question(self._question, length)
        if base is not None and not extent.present:
            return False, True, length
        nothing_to_do = extent.zero and self.settings.target_is_zero and self.settings.sparse > 0
        return extent.zero, nothing_to_do, length

    # ------------------------------------------------------------------------------------------------------- copying

    async def _work(self) -> None:
        """One worker: pieces until there are none."""
        while True:
            async with self._planning:
                piece = await anext(self._plan, None)
            if piece is None:
                return
            if not piece.zero and not (self._offload and await self._offloaded(piece)):
                for part in self._parts(piece):
                    await self._copy(part)
            elif piece.zero:
                await self._wait_for_turn(piece.number)
                await self._write_zeroes(piece)
            self._end_turn(piece.number)
            self.progress.show(piece.offset + piece.length, self._total)
            await self._keep_speed(piece)

    async def _keep_speed(self, piece: Piece) -> None:
        if self.settings.speed and (delay := self._limit.delay_ns(piece.length)):
            await self.clock.sleep_ns(delay)

    def _parts(self, piece: Piece) -> Iterator[Piece]:
        """A piece cut to the size of a buffer (pieces are longer where offloading was tried)."""
        for at in range(0, piece.length, self._chunk):
            length = min(self._chunk, piece.length - at)
            yield attrs.evolve(
                piece, source_offset=piece.source_offset + at, offset=piece.offset + at, length=length
            ) if length != piece.length else piece

    async def _copy(self, piece: Piece) -> None:
        """Through a buffer: the one used last, whose memory is in the processor's cache."""
        buffer = self._buffers.pop() if self._buffers else bytearray(self._chunk)
        await self._copy_through(buffer, piece)
        self._buffers.append(buffer)

    async def _copy_through(self, buffer: bytearray, piece: Piece) -> None:
        view = memoryview(buffer)
        await self._read(piece.source, piece.source_offset, view[: piece.length])
        await self._wait_for_turn(piece.number)
        runs = data_runs(buffer, piece.length, self._unit) if self._unit else iter([(0, piece.length)])
        at = 0
        try:
            for start, end in runs:
                await self._fill_gap(piece.offset + at, start - at)
                await self.target.write_from(piece.offset + start, view[start:end])
                at = end
            await self._fill_gap(piece.offset + at, piece.length - at)
        except QBlockError as error:
            raise CommandError(f"error while writing at byte {piece.offset}: {error}") from error

    async def _read(self, source: BlockBackend, offset: int, view: memoryview) -> None:
        """Fill ``view``; when salvaging, sectors that cannot be read are zeroes."""
        try:
            await source.read_into(offset, view)
        except QBlockError as error:
            text = f"error while reading at byte {offset}: {error}"
            if self.settings.salvage is None:
                raise CommandError(text) from error
            if len(view) > SECTOR:
                half = align_up(len(view) // 2, SECTOR)
                await self._read(source, offset, view[:half])
                await self._read(source, offset + half, view[half:])
                return
            self.settings.salvage(text)
            fill_zero(view)

    async def _compress(self) -> None:
        """One worker that compresses: the next piece may be written as soon as this one's writes have begun, in their order."""
        buffer = memoryview(bytearray(self._chunk))
        while True:
            async with self._planning:
                piece = await anext(self._plan, None)
            if piece is None:
                return
            if not piece.zero:
                await self._read_joined(piece.offset, buffer[: piece.length])
            await self._wait_for_turn(piece.number)
            writes = [asyncio.ensure_future(write) for write in self._writes_of(piece, buffer)]
            self._end_turn(piece.number)
            try:
                await asyncio.gather(*writes)
            except QBlockError as error:
                raise CommandError(f"error while writing at byte {piece.offset}: {error}") from error
            self._done += piece.length
            self.progress.show(self._done, self._total)
            await self._keep_speed(piece)

    def _writes_of(self, piece: Piece, buffer: memoryview) -> Iterator[Coroutine[Any, Any, None]]:
        """The requests that write a piece which is in ``buffer``."""
        if piece.zero:
            yield self._write_zeroes(piece)
            return
        data = bytearray(buffer[: piece.length]) if piece.length < len(buffer) else buffer.obj
        assert isinstance(data, bytearray)
        at = 0
        for start, end in data_runs(data, piece.length, self._unit) if self._unit else [(0, piece.length)]:
            yield self._fill_gap(piece.offset + at, start - at)
            yield self._write_compressed(piece.offset + start, memoryview(data)[start:end])
            at = end
        yield self._fill_gap(piece.offset + at, piece.length - at)

    async def _write_compressed(self, offset: int, view: memoryview) -> None:
        """Whole clusters; the last one of the sources may be a part of one of the target's, which is written plainly."""
        end = offset + len(view)
        rest = end % self.target.node.driver.info().cluster_size if end < self.target.length else 0
        if rest < len(view):
            await self.target.write_compressed(offset, view[: len(view) - rest])
        if rest:
            await self.target.write_from(end - rest, view[len(view) - rest :])

    async def _read_joined(self, offset: int, view: memoryview) -> None:
        """Read from the sources as they lie one behind the other."""
        start = 0
        for source in self.sources:
            first, end = max(offset, start), min(offset + len(view), start + source.length)
            if first < end:
                await self._read(source, first - start, view[first - offset : end - offset])
            start += source.length

    async def _fill_gap(self, offset: int, length: int) -> None:
        """Zeroes found in a buffer: nothing to do where the target is zero already."""
        if length and not self.settings.target_is_zero:
            await self.target.write_zeroes(offset, length, may_unmap=True)

    async def _write_zeroes(self, piece: Piece) -> None:
        try:
            if self.settings.sparse:
                await self.target.write_zeroes(piece.offset, piece.length, may_unmap=True)
                return
            for at in range(0, piece.length, ZERO_PIECE):
                await self.target.write_from(piece.offset + at, zero_view(min(ZERO_PIECE, piece.length - at)))
        except QBlockError as error:
            raise CommandError(f"error while writing zeroes at byte {piece.offset}: {error}") from error

    async def _offloaded(self, piece: Piece) -> bool:
        """Try to let the storage copy; False (for good) where it cannot."""
        await self._wait_for_turn(piece.number)
        try:
            await piece.source.copy_range(piece.source_offset, self.target, piece.offset, piece.length)
        except BlockIOError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL):
                raise CommandError(f"error while copying at byte {piece.offset}: {error}") from error
            self._offload = False
            return False
        return True

    # ---------------------------------------------------------------------------------------------------- order of writes

    async def _wait_for_turn(self, number: int) -> None:
        if self.settings.in_order and number != self._turn:
            turn = asyncio.get_running_loop().create_future()
            self._waiting[number] = turn
            await turn

    def _end_turn(self, number: int) -> None:
        if not self.settings.in_order:
            return
        self._turn = number + 1
        turn = self._waiting.pop(self._turn, None)
        if turn is not None:
            turn.set_result(None)
