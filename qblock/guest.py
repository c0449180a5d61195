"""A guest: a program that reads and writes a disk at its own pace, and remembers what the disk must hold.

QEMU has a virtual machine here; this is its stand-in, for demonstrations and proofs. A guest sends the requests that an
operating system would (writes, zero writes, discards, flushes, reads, several at once) through its device's `BlockBackend`, so
they go wherever the device leads at that moment. Everything it writes can be computed again from a tag and the sector number,
so the model of a disk is a map from ranges to tags, and any image can be proved equal to it byte for byte. All chances come from
the `random.Random` given; all offsets and lengths are bytes and multiples of 512, as for a real disk.
"""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import Awaitable, Callable, Iterator
from random import Random
from typing import TYPE_CHECKING, Final, Protocol

import attrs
from sortedcontainers import SortedDict

from qblock.breakpoints import Caller
from qblock.clock import Clock, CoSleep
from qblock.errors import BlockIOError, CommandError, QBlockError
from qblock.ranges import ByteRange
from qblock.units import KiB, MiB, align_down

if TYPE_CHECKING:
    from qblock.node import BdrvChild

SECTOR: Final = 512
UNKNOWN: Final = -1
"""Tag of what nobody promised: after a failed write, or a discard."""
_BYTE_TAGS: Final = -2
"""Tag ``_BYTE_TAGS - b`` means sectors full of the byte ``b``; tag 0 means zeroes; positive tags are numbered writes."""
_PIECE: Final = MiB
_MARK: Final = struct.Struct("<QQ")

Reader = Callable[[int, memoryview], Awaitable[None]]


class GuestMismatch(QBlockError):
    """A disk does not hold what was written to it; ``offset`` is the first wrong byte."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"{what} differs from what the guest wrote, first at offset {offset}")
        self.offset = offset


def byte_tag(value: int) -> int:
    """The tag of sectors that are full of one byte (0 to 255)."""
    return _BYTE_TAGS - value if value else 0


def expected_bytes(tag: int, offset: int, length: int) -> bytes:
    """The content that ``tag`` stands for at a place; ``offset`` and ``length`` are multiples of 512."""
    if tag == 0:
        return bytes(length)
    if tag < 0:
        return bytes([_BYTE_TAGS - tag]) * length
    first = offset // SECTOR
    repeat = SECTOR // _MARK.size
    return b"".join(_MARK.pack(tag, sector) * repeat for sector in range(first, first + length // SECTOR))


class ContentMap:
    """What a disk of ``size`` bytes must hold: runs of one tag each. Starts as zeroes. Memory grows with the runs only."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._runs: SortedDict[int, tuple[int, int]] = SortedDict({0: (size, 0)})

    def assign(self, offset: int, length: int, tag: int) -> None:
        """The range now holds what ``tag`` stands for."""
        end = offset + length
        assert 0 <= offset <= end <= self.size, (offset, length)
        if not length:
            return
        runs = self._runs
        first = runs.keys()[runs.bisect_right(offset) - 1]
        for start in list(runs.irange(first, end, inclusive=(True, False))):
            stop, old = runs.pop(start)
            if start < offset:
                runs[start] = (offset, old)
            if stop > end:
                runs[end] = (stop, old)
        runs[offset] = (end, tag)

    def resize(self, size: int) -> None:
        """The disk has got another size: what is cut off is forgotten, what is added are zeroes."""
        old = self.size
        if size > old:
            self._runs[old] = (size, 0)
        elif size < old:
            self.assign(size, old - size, 0)
            del self._runs[size]
        self.size = size

    def runs(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[ByteRange, int]]:
        """The runs inside a range with their tags, in ascending order."""
        end = self.size if length is None else offset + length
        if end <= offset or not self._runs:
            return
        first = self._runs.keys()[self._runs.bisect_right(offset) - 1]
        for start in list(self._runs.irange(first, end, inclusive=(True, False))):
            stop, tag = self._runs[start]
            low, high = max(start, offset), min(stop, end)
            yield ByteRange(low, high - low), tag

    def check(self, offset: int, data: memoryview, what: str) -> None:
        """Raise `GuestMismatch` unless ``data`` is what the range at ``offset`` must hold; ``what`` names its source."""
        for run, tag in self.runs(offset, len(data)):
            if tag == UNKNOWN:
                continue
            expected = expected_bytes(tag, run.offset, run.length)
            found = data[run.offset - offset : run.end - offset]
            if found != expected:
                wrong = next(i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
                raise GuestMismatch(run.offset + wrong, what)


@attrs.frozen
class Workload:
    """What a guest does. ``interval_ns`` passes between the starts of two requests, of which up to ``depth`` run at once.

    ``sizes`` are the lengths of requests in bytes; the weights say how often each kind comes.
    """

    interval_ns: int = 2_000_000
    depth: int = 4
    sizes: tuple[int, ...] = (4 * KiB, 4 * KiB, 16 * KiB, 64 * KiB)
    writes: int = 14
    zero_writes: int = 2
    discards: int = 1
    flushes: int = 2
    reads: int = 1


@attrs.define
class GuestCounters:
    """What a guest has done. ``failed`` counts requests that were answered with an error."""

    writes: int = 0
    zero_writes: int = 0
    discards: int = 0
    flushes: int = 0
    reads: int = 0
    bytes_written: int = 0
    failed: int = 0


class GuestDisk(Protocol):
    """What a guest sends its requests to: a guest device's disk, or a backend without one. All raise `BlockIOError`."""

    @property
    def root(self) -> BdrvChild | None:
        """The edge to the medium, None when there is none."""

    @property
    def length(self) -> int:
        """Size in bytes."""

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``."""

    async def write_from(self, offset: int, buffer: memoryview) -> None:
        """Write ``buffer``."""

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """Make a range read as zeroes."""

    async def discard(self, offset: int, length: int) -> None:
        """The content of a range is no longer needed."""

    async def flush(self) -> None:
        """Make all completed writes durable."""


@attrs.define(eq=False)
class Guest:
    """The guest on one disk. ``content`` is what the disk must hold; ``failure`` a wrong answer that it has seen."""

    disk: GuestDisk
    clock: Clock
    random: Random
    content: ContentMap = attrs.field(init=False)
    counters: GuestCounters = attrs.field(factory=GuestCounters, init=False)
    failure: GuestMismatch | None = attrs.field(default=None, init=False)
    last_error: BlockIOError | None = attrs.field(default=None, init=False)
    _task: asyncio.Task[None] | None = attrs.field(default=None, init=False)
    _stopping: bool = attrs.field(default=False, init=False)
    _sleep: CoSleep = attrs.field(init=False)
    _busy: list[ByteRange] = attrs.field(factory=list, init=False)
    _next_tag: int = attrs.field(default=1, init=False)

    def __attrs_post_init__(self) -> None:
        self.content = ContentMap(self.disk.length)
        self.content.assign(0, self.content.size, UNKNOWN)
        self._sleep = CoSleep(self.clock)

    def notice_size(self) -> None:
        """See whether the disk has got another size. The content that a disk gains are zeroes (see `requests.truncate`).

        A guest looks before each request; who changes a size tells it at once, so that it misses no area that was cut off and
        came back.
        """
        if self.disk.root is not None and self.disk.length != self.content.size:
            self.content.resize(self.disk.length)

    # ------------------------------------------------------------------------------------------------ single requests

    async def write(self, offset: int, length: int, pattern: int | None = None) -> None:
        """Write the byte ``pattern`` all over a range, or content of its own when None. Raises `BlockIOError`."""
        tag = self.new_tag() if pattern is None else byte_tag(pattern)
        with self._changing(offset, length):
            data = memoryview(expected_bytes(tag, offset, length))
            await self._change(self.disk.write_from(offset, data), offset, length, tag)
            self.counters.writes += 1
            self.counters.bytes_written += length

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        """Zero a range. Raises `BlockIOError`."""
        with self._changing(offset, length):
            await self._change(self.disk.write_zeroes(offset, length, may_unmap=may_unmap), offset, length, 0)
            self.counters.zero_writes += 1

    async def discard(self, offset: int, length: int) -> None:
        """Say that the content of a range is no longer needed; what it holds then is not known. Raises `BlockIOError`."""
        with self._changing(offset, length):
            await self._change(self.disk.discard(offset, length), offset, length, UNKNOWN)
            self.counters.discards += 1

    async def flush(self) -> None:
        """Have everything written so far made durable. Raises `BlockIOError`."""
        try:
            await self.disk.flush()
        except BlockIOError as error:
            self._note(error)
            raise
        self.counters.flushes += 1

    async def read(self, offset: int, length: int) -> bytes:
        """Read a range and compare it with what must be there. Raises `BlockIOError` and `GuestMismatch`."""
        self._check_range(offset, length)
        data = bytearray(length)
        with _Claim(self._busy, ByteRange(offset, length)), memoryview(data) as view:
            try:
                await self.disk.read_into(offset, view)
            except BlockIOError as error:
                self._note(error)
                raise
            self.content.check(offset, view, "the guest's disk")
        self.counters.reads += 1
        return bytes(data)

    # ---------------------------------------------------------------------------------------------------- the workload

    @property
    def running(self) -> bool:
        """Whether the workload runs."""
        return self._task is not None

    def start(self, workload: Workload | None = None) -> None:
        """Begin to work. Raises `CommandError` when it does already."""
        if self._task is not None:
            raise CommandError("The guest is running already")
        self._stopping = False
        with Caller().calling():
            self._task = asyncio.get_running_loop().create_task(self._work(workload or Workload()), name="guest")

    async def stop(self) -> None:
        """Stop working; returns when the last request has been answered. Raises `GuestMismatch` seen meanwhile."""
        if self._task is not None:
            self._stopping = True
            self._sleep.wake()
            task, self._task = self._task, None
            await task
        if self.failure is not None:
            raise self.failure

    async def _work(self, workload: Workload) -> None:
        async with asyncio.TaskGroup() as requests:
            under_way: set[asyncio.Task[None]] = set()
            while not self._stopping:
                if len(under_way) < workload.depth:
                    task = requests.create_task(self._one_request(workload))
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
                await self._sleep.sleep_ns(workload.interval_ns)

    async def _one_request(self, workload: Workload) -> None:
        weights = (workload.writes, workload.zero_writes, workload.discards, workload.flushes, workload.reads)
        kinds = (self.write, self.write_zeroes, self.discard, None, self.read)
        kind = self.random.choices(kinds, weights)[0]
        try:
            if kind is None:
                await self.flush()
            elif (place := self._choose_place(self.random.choice(workload.sizes))) is not None:
                await kind(place.offset, place.length)
        except BlockIOError:
            pass  # counted, and the range marked unknown; a guest tries something else
        except GuestMismatch as error:
            self.failure = self.failure or error

    def _choose_place(self, length: int) -> ByteRange | None:
        """A random range that no other request is at; None when there seems to be none."""
        self.notice_size()
        size = self.content.size  # also while the disk is being exchanged: its requests wait then
        length = min(length, align_down(size, SECTOR))
        for _ in range(8):
            place = ByteRange(self.random.randrange((size - length) // SECTOR + 1) * SECTOR, length)
            if not any(place.overlaps(busy) for busy in self._busy):
                return place
        return None

    # --------------------------------------------------------------------------------------------------------- proofs

    def expect(self, offset: int, length: int, tag: int) -> None:
        """The range is known to hold what ``tag`` stands for (see `byte_tag`), for instance from when the image was made."""
        self.content.assign(offset, length, tag)

    def new_tag(self) -> int:
        """A tag that no write of this guest has used, for content that is put onto the disk by other means."""
        tag, self._next_tag = self._next_tag, self._next_tag + 1
        return tag

    async def verify(self, read_into: Reader, *, what: str = "the image") -> int:
        """Compare all known content with what ``read_into`` gives; the result is how many bytes that were.

        Raises `GuestMismatch`. The guest must not be writing.
        """
        assert not self._busy, "requests are under way"
        buffer = bytearray(_PIECE)
        compared = 0
        with memoryview(buffer) as view:
            for run, tag in self.content.runs():
                for offset in range(run.offset, run.end if tag != UNKNOWN else run.offset, _PIECE):
                    piece = view[: min(_PIECE, run.end - offset)]
                    await read_into(offset, piece)
                    self.content.check(offset, piece, what)
                    compared += len(piece)
        return compared

    # --------------------------------------------------------------------------------------------------------- inside

    def _check_range(self, offset: int, length: int) -> None:
        self.notice_size()
        if offset % SECTOR or length % SECTOR or length <= 0:
            raise BlockIOError(errno.EINVAL, f"A guest's request must be whole sectors of {SECTOR} bytes")

    def _changing(self, offset: int, length: int) -> _Claim:
        self._check_range(offset, length)
        if offset < 0 or offset + length > self.content.size:
            raise BlockIOError(errno.EIO, f"The guest's disk ends at {self.content.size}")
        return _Claim(self._busy, ByteRange(offset, length))

    async def _change(self, request: Awaitable[None], offset: int, length: int, tag: int) -> None:
        # Between start and end of the request both the old and the new content are right.
        self.content.assign(offset, length, UNKNOWN)
        try:
            await request
        except BlockIOError as error:
            self._note(error)
            raise
        if offset < self.content.size:  # it may have been cut off meanwhile
            self.content.assign(offset, min(length, self.content.size - offset), tag)

    def _note(self, error: BlockIOError) -> None:
        self.counters.failed += 1
        self.last_error = error


@attrs.frozen(eq=False)
class _Claim:
    """Keeps a range on the list of those that requests are at."""

    _busy: list[ByteRange]
    _range: ByteRange

    def __enter__(self) -> None:
        self._busy.append(self._range)

    def __exit__(self, *_: object) -> None:
        self._busy.remove(self._range)
