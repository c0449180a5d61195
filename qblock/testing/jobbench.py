"""A bench for jobs: nodes in memory that take their time and fail as told, guests that write, and a model of what they wrote.

For tests of jobs on virtual time, ours and those of other packages. The nodes' driver (`ShakyMemory`) suspends at random
places, also in the middle of a write, so that every race that a real disk allows can happen; faults are injected by
counting requests. Everything random comes from one seed.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, ClassVar

import attrs

from qblock.backend import BlockBackend
from qblock.clock import LoopClock
from qblock.drivers.memory import MemoryDriver
from qblock.errors import BlockIOError
from qblock.jobs.job import Job
from qblock.jobs.state import JobStatus
from qblock.node import BdrvChild, BlockDriverState
from qblock.opening import OpenPolicy
from qblock.permissions import Perm
from qblock.system import BlockSystem


@attrs.define(eq=False)
class Faults:
    """Which requests of a node fail: the ``first`` to ``last`` one of ``operation`` (counted from 1), with ``errno``."""

    operation: str = ""
    first: int = 0
    last: int = 0
    errno: int = errno.EIO
    seen: int = attrs.field(default=0, init=False)

    def count(self, operation: str) -> None:
        """A request of that kind arrives; raises `BlockIOError` if it is one that fails."""
        if operation == self.operation:
            self.seen += 1
            if self.first <= self.seen <= self.last:
                raise BlockIOError(self.errno, f"{operation} number {self.seen} was told to fail")


class ShakyMemory(MemoryDriver):
    """Memory that suspends where a disk might. ``random`` None: it does not; ``faults`` say what fails."""

    name: ClassVar[str] = "shaky-memory"

    supports_copy_range: ClassVar[bool] = True

    random: Random | None = None
    offloads_left: int = 0
    faults: Faults = Faults()

    async def _dawdle(self) -> None:
        if self.random is not None:
            for _ in range(self.random.randrange(4)):
                await self.env.clock.sleep_ns(self.random.choice((0, 0, 1000, 100_000)))

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `MemoryDriver`."""
        self.faults.count("read")
        half = len(buffer) // 2
        await self._dawdle()
        await super().read_into(offset, buffer[:half])
        await self._dawdle()
        await super().read_into(offset + half, buffer[half:])
        await self._dawdle()

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `MemoryDriver`."""
        self.faults.count("write")
        half = len(buffer) // 2
        await self._dawdle()
        await super().write_from(offset, buffer[:half])
        await self._dawdle()
        await super().write_from(offset + half, buffer[half:])
        await self._dawdle()

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `MemoryDriver`."""
        self.faults.count("write")
        await self._dawdle()
        await super().write_zeroes(offset, length)
        await self._dawdle()

    async def discard(self, offset: int, length: int) -> None:
        """See `MemoryDriver`."""
        await self._dawdle()
        await super().discard(offset, length)
        await self._dawdle()

    async def copy_range(self, offset: int, target: BdrvChild, target_offset: int, length: int) -> None:
        """See `Driver`: between two of these, until the target's ``offloads_left`` are used up."""
        other = target.node.driver
        if not isinstance(other, ShakyMemory) or not other.offloads_left:
            raise BlockIOError(errno.ENOTSUP)
        other.offloads_left -= 1
        buffer = memoryview(bytearray(length))
        await self.read_into(offset, buffer)
        await other.write_from(target_offset, buffer)

    async def flush(self) -> None:
        """See `MemoryDriver`."""
        self.faults.count("flush")
        await self._dawdle()

    def content(self) -> bytes:
        """Everything in it, at this very moment."""
        pages = {number: bytes(page) for number, page in self._pages.items()}
        size = len(next(iter(pages.values()))) if pages else 1
        data = bytearray(self.length())
        for number, page in pages.items():
            start = number * size
            data[start : start + size] = page[: len(data) - start]
        return bytes(data)


class JobBench:
    """A block system on virtual time, with the events it sent. ``seed`` None: nodes never suspend."""

    def __init__(self, seed: int | None = None) -> None:
        self.random = Random(seed)
        self.shaky = seed is not None
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.listeners: list[Callable[[str, Mapping[str, Any]], None]] = []
        self.warnings: list[str] = []
        self.system = BlockSystem.create(
            clock=LoopClock(), policy=OpenPolicy.follow(), random=self.random, warn=self.warnings.append
        )
        self.system.registry.register(ShakyMemory)
        self.system.events.subscribe(self._heard)
        self.graph = self.system.graph
        self.jobs = self.system.jobs

    def _heard(self, event: str, data: Mapping[str, Any], when: tuple[int, int]) -> None:
        self.events.append((event, dict(data)))
        for listener in self.listeners:
            listener(event, data)

    @property
    def story(self) -> list[str]:
        """The events as words: the status of status changes, the name of the others without BLOCK_JOB_."""
        return [
            data["status"] if event == "JOB_STATUS_CHANGE" else event.removeprefix("BLOCK_JOB_")
            for event, data in self.events
        ]

    async def node(self, name: str, size: int, **options: Any) -> BlockDriverState:
        """A node of ``size`` bytes, owned by the monitor."""
        node = await self.system.opener.open_blockdev(
            {"driver": ShakyMemory.name, "node-name": name, "size": size, **options}
        )
        node.monitor_owned = True
        if self.shaky:
            driver_of(node).random = Random(self.random.random())
        return node

    def disk(self, node: BlockDriverState, name: str = "") -> BlockBackend:
        """A guest's disk on ``node``: takes read and write, shares neither write nor resize."""
        backend = BlockBackend(
            self.graph,
            name,
            perm=Perm.CONSISTENT_READ | Perm.WRITE,
            shared=Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED,
        )
        backend.insert(node)
        return backend

    async def until(self, job: Job, *statuses: JobStatus) -> None:
        """Wait until the job is in one of ``statuses`` (or over)."""
        await eventually(lambda: job.status in (*statuses, JobStatus.CONCLUDED, JobStatus.NULL))

    async def close(self) -> None:
        """Close the system."""
        await self.system.close()


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until the condition holds, looking every virtual millisecond."""
    while not condition():
        await LoopClock().sleep_ns(1_000_000)


def driver_of(node: BlockDriverState) -> ShakyMemory:
    """The driver of a node made by `JobBench.node`."""
    assert isinstance(node.driver, ShakyMemory)
    return node.driver


class BusyGuest:
    """Several writers on one disk, each on blocks of its own, and a model of what the disk must hold in the end."""

    def __init__(self, disk: BlockBackend, seed: int, *, block: int = 1536, writers: int = 3) -> None:
        self.disk = disk
        self.block = block
        self.writers = writers
        self.random = Random(seed)
        self.model = bytearray(disk.length)

    async def fill(self) -> None:
        """Give the disk content before the job starts."""
        for index in range(len(self.model) // self.block):
            if self.random.random() < 0.4:
                await self._write(index, self.random)

    async def run(self, steps: int) -> None:
        """All writers at once, ``steps`` requests each."""
        async with asyncio.TaskGroup() as group:
            for number in range(self.writers):
                group.create_task(self._writer(number, steps, Random(self.random.random())))

    async def _writer(self, number: int, steps: int, random: Random) -> None:
        blocks = range(number, len(self.model) // self.block, self.writers)
        for _ in range(steps):
            await self._write(random.choice(blocks), random)
            await asyncio.sleep(random.choice((0, 0.0001, 0.01)))

    async def _write(self, index: int, random: Random) -> None:
        start = index * self.block
        kind = random.random()
        if kind < 0.7:
            data = random.randbytes(self.block)
            await self.disk.write_from(start, memoryview(data))
        else:
            data = bytes(self.block)
            await self.disk.write_zeroes(start, self.block, may_unmap=kind < 0.85)
        self.model[start : start + self.block] = data
