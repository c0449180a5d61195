"""The guest of a comparison: a fixed list of requests, the same for every strategy, and what its disk must hold.

The load is *open*: a request comes at its time whether or not those before it are done, as requests of a guest's users do, so
that a pause of the disk is felt by all who would have come during it. A request that overlaps one under way waits for it,
as a file system would see to; its latency counts from when it came. Reads come all the time. Writes come in bursts, mostly
to one place, a flush after every few (what a journal does); the pause between bursts is what lets a copy catch up.

Every block of 4 KiB carries the number of its last write (its *tag*), so that any image can be asked what it holds.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from random import Random
from typing import Final

import attrs

from qblock.clock import Clock
from qblock.errors import BlockIOError
from qblock.graph import Graph
from qblock.lab.compare.history import Answered, Issued, Recorder
from qblock.units import SECOND_NS, KiB, MiB

BLOCK: Final = 4 * KiB
FIRST_TAG: Final = 16
"""The tag of the guest's request number 0; smaller ones are what the images began with, 0 is a block of zeroes."""
GARBAGE: Final = -1
"""The tag of a block that no single write can have left."""
READ, WRITE, FLUSH = "read", "write", "flush"
OPERATIONS: Final = (READ, WRITE, FLUSH)
_MARK: Final = struct.Struct("<QQ")
_READ_BLOCKS: Final = (1, 1, 2, 4)
_WRITE_BLOCKS: Final = (1, 1, 2, 4, 8)
_HOT_BYTES: Final = 2 * MiB
_ELSEWHERE: Final = 0.05
"""The share of writes that do not go to the hot place."""


@attrs.frozen(kw_only=True)
class Pace:
    """How much a guest does: reads a second, and bursts of writes with ``flushes`` flushes among them. ``phase_ns`` is how long
    it is watched before the operation, while the copy is in step, and afterwards."""

    reads_per_second: int
    burst_every_ns: int
    burst_lasts_ns: int
    flushes: int
    writes_per_flush: int
    phase_ns: int

    def steady(self) -> Pace:
        """The same amount of everything without pauses between the bursts."""
        return attrs.evolve(self, burst_lasts_ns=self.burst_every_ns)


@attrs.frozen
class GuestRequest:
    """One request: when it comes (nanoseconds), what it is, and its range in bytes (0 for a flush)."""

    number: int
    arrival_ns: int
    op: str
    offset: int
    length: int

    @property
    def tag(self) -> int:
        """What its blocks are marked with, if it is a write."""
        return FIRST_TAG + self.number

    @property
    def blocks(self) -> range:
        """The numbers of its blocks."""
        return range(self.offset // BLOCK, (self.offset + self.length) // BLOCK)


def requests_of(seed: int, size: int, pace: Pace) -> Iterator[GuestRequest]:
    """The endless list of a guest's requests, in the order of their arrival. ``size`` is the disk's, in bytes."""
    random = Random(f"load {seed}")
    blocks = size // BLOCK
    hot_blocks = max(8, min(_HOT_BYTES, size // 8) // BLOCK)
    hot = random.randrange(blocks - hot_blocks)
    number = 0
    for period in range(1 << 62):
        start = period * pace.burst_every_ns
        planned = sorted(_period(random, pace, start))
        for arrival, op in planned:
            place = 0
            count = 0
            if op == READ:
                count = random.choice(_READ_BLOCKS)
                place = random.randrange(blocks - count + 1)
            elif op == WRITE:
                count = random.choice(_WRITE_BLOCKS)
                place = hot + random.randrange(hot_blocks - count + 1)
                if random.random() < _ELSEWHERE:
                    place = random.randrange(blocks - count + 1)
            yield GuestRequest(number, arrival, op, place * BLOCK, count * BLOCK)
            number += 1


def _period(random: Random, pace: Pace, start: int) -> Iterator[tuple[int, str]]:
    """Times and kinds of the requests of one period."""
    reads = pace.reads_per_second * pace.burst_every_ns // SECOND_NS
    for _ in range(reads):
        yield start + random.randrange(pace.burst_every_ns), READ
    step = pace.burst_lasts_ns // pace.flushes
    for end in range(start + step, start + step * pace.flushes + 1, step):
        for _ in range(pace.writes_per_flush):
            yield end - 1 - random.randrange(step), WRITE
        yield end, FLUSH


# ---------------------------------------------------------------------------------------------------------- marked blocks


def marked(tag: int, block: int) -> bytes:
    """The content of block number ``block`` that was last written by ``tag``."""
    return _MARK.pack(tag, block) * (BLOCK // _MARK.size) if tag else bytes(BLOCK)


def tag_of(content: bytes, block: int) -> int:
    """The tag of block number ``block`` with this content; `GARBAGE` when it has none, or that of another place."""
    tag, place = _MARK.unpack_from(content)
    return tag if (place == block or not tag) and content == marked(tag, block) else GARBAGE


def initial_tags(seed: int, size: int) -> tuple[dict[int, int], dict[int, int]]:
    """The tags of the blocks that the base and the layer above it begin with, by block number."""
    random = Random(f"content {seed}")
    run = max(1, size // 128 // BLOCK)
    starts = range(0, size // BLOCK - run + 1, run)
    layers = []
    for tag, share in ((1, 0.6), (2, 0.25)):
        chosen = sorted(random.sample(starts, int(len(starts) * share)))
        layers.append({block: tag for start in chosen for block in range(start, start + run)})
    return layers[0], layers[1]


# ---------------------------------------------------------------------------------------------------------------- the guest


class WrongAnswer(AssertionError):
    """The guest has read what it did not write."""


@attrs.define(eq=False)
class LabGuest:
    """Sends the requests to whatever ``device`` leads to. ``tags`` is what its disk holds, by block number (absent: zero)."""

    graph: Graph
    device: str
    clock: Clock
    recorder: Recorder
    tags: dict[int, int]
    _busy: set[int] = attrs.field(init=False, factory=set)
    _waiting: list[asyncio.Future[None]] = attrs.field(init=False, factory=list)
    _stopping: bool = attrs.field(init=False, default=False)

    async def run(self, requests: Iterator[GuestRequest]) -> None:
        """Send requests at their times until `stop`; returns when the last has been answered."""
        async with asyncio.TaskGroup() as group:
            for request in requests:
                if (ahead := request.arrival_ns - self.clock.now_ns()) > 0:
                    await self.clock.sleep_ns(ahead)
                if self._stopping:
                    return
                group.create_task(self._serve(request), name=f"guest request {request.number}")

    def stop(self) -> None:
        """Send no more."""
        self._stopping = True

    async def _serve(self, request: GuestRequest) -> None:
        blocks = request.blocks
        while not self._busy.isdisjoint(blocks):
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
        self._busy.update(blocks)
        self.recorder.add(
            Issued(self.clock.now_ns(), request.number, request.arrival_ns, request.op, request.offset, request.length)
        )
        error = ""
        try:
            await self._perform(request)
        except BlockIOError as failure:
            error = str(failure)
        finally:
            self._busy.difference_update(blocks)
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                waiter.set_result(None)
        self.recorder.add(Answered(self.clock.now_ns(), request.number, error))

    async def _perform(self, request: GuestRequest) -> None:
        backend = self.graph.find_backend(self.device)
        if request.op == FLUSH:
            await backend.flush()
        elif request.op == WRITE:
            data = b"".join(marked(request.tag, block) for block in request.blocks)
            self.tags.update(dict.fromkeys(request.blocks, GARBAGE))  # what a failed write leaves is not known
            await backend.write_from(request.offset, memoryview(data))
            self.tags.update(dict.fromkeys(request.blocks, request.tag))
        else:
            self._check(request, await backend.read(request.offset, request.length))

    def _check(self, request: GuestRequest, data: bytes) -> None:
        for block in request.blocks:
            start = block * BLOCK - request.offset
            found, written = tag_of(data[start : start + BLOCK], block), self.tags.get(block, 0)
            if written not in (found, GARBAGE):
                raise WrongAnswer(f"block {block} holds tag {found}, and {written} was written there")
