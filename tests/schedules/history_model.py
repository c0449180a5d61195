"""What a history of a machine must hold to: a guest that always writes, what a crash may leave of its disk, what bitmaps say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import attrs

from job_histories import BLOCK, View
from qblock.devices.device import GuestDevice
from qblock.errors import QBlockError
from qblock.node import BlockDriverState
from qblock.system import BlockSystem

WRITERS = 2
SECTOR = 512


@attrs.define(eq=False)
class Write:
    """A request of the guest that is under way."""

    index: int


@attrs.define(eq=False)
class Mark:
    """What is written to the disk since a moment while ``node`` is the one that the guest writes to.

    ``surely`` are blocks of writes that began later and have ended, ``maybe`` of all that could have taken effect later.
    """

    node: BlockDriverState
    before: set[Write]
    surely: set[int] = attrs.field(factory=set)
    maybe: set[int] = attrs.field(factory=set)
    recording: bool = True


@attrs.define(eq=False)
class Tracked:
    """A dirty bitmap. ``anchor``: the image that shows the disk as it was when the bitmap began; None: there is none.

    ``bounded``: nobody but the guest has written to the node, so nothing else may be dirty.
    """

    name: str
    node: BlockDriverState
    mark: Mark
    persistent: bool = False
    bounded: bool = True
    anchor: str | None = None


class Guest:
    """Writers that never stop until told, each on blocks of its own, and one who flushes; what fails is tried again.

    ``find`` gives the device, None while it is unplugged; ``source`` the node that it writes to, below filters that come and go.
    """

    def __init__(
        self, system: BlockSystem, random: Random, find: Callable[[], GuestDevice | None], source: Callable[[], BlockDriverState]
    ) -> None:
        self.system, self.random, self.find, self.source = system, random, find, source
        self.model = bytearray()
        self.under_way: set[Write] = set()
        self.marks: list[Mark] = []
        self.survivors: list[list[bytes]] = []
        """For each block what a crash may leave: what was flushed first, then what was written."""
        self.ended: list[int] = []
        """For each block the position in its survivors of the last write that has ended."""
        self.running = True
        self.held = False
        self.failed = 0

    def begin(self, content: bytes) -> None:
        """The disk holds this, for good."""
        self.model[:] = content
        blocks = range(len(content) // BLOCK)
        self.survivors = [[content[index * BLOCK : (index + 1) * BLOCK]] for index in blocks]
        self.ended = [0] * len(self.survivors)

    def grow(self, size: int) -> None:
        """The disk is larger; what is new reads as zeroes."""
        self.model.extend(bytes(size - len(self.model)))
        more = len(self.model) // BLOCK - len(self.survivors)
        self.survivors += [[bytes(BLOCK)] for _ in range(more)]
        self.ended += [0] * more

    def capture(self) -> View:
        """What the disk shows now."""
        return View(bytes(self.model), frozenset(write.index for write in self.under_way))

    def mark(self, node: BlockDriverState | None = None) -> Mark:
        """Begin to note what is written from now on: to the node that is written to now, unless it is said which."""
        mark = Mark(node or self.source(), self.under_way.copy(), maybe={write.index for write in self.under_way})
        self.marks.append(mark)
        return mark

    async def writer(self, number: int) -> None:
        """One writer."""
        random = Random(self.random.random())
        while self.running:
            await asyncio.sleep(random.choice((0, 0.0005, 0.003)))
            if self.held or not self.system.run.running or self.poisoned:
                await asyncio.sleep(0.001)
                continue
            index = random.randrange(number, len(self.model) // BLOCK, WRITERS)
            kind = random.random()
            data = random.randbytes(BLOCK) if kind < 0.8 else bytes(BLOCK)
            write, source = Write(index), self.source()
            self.under_way.add(write)
            self.survivors[index].append(data)
            self._touch(index, source)
            await self._write(index, data, zero=kind >= 0.9)
            if not self.poisoned:
                self._done(write, source, data)

    def _done(self, write: Write, source: BlockDriverState, data: bytes) -> None:
        index = write.index
        self.under_way.discard(write)
        self.model[index * BLOCK : (index + 1) * BLOCK] = data
        self.ended[index] = len(self.survivors[index]) - 1
        self._touch(index, self.source())
        for mark in self.marks:
            if mark.recording and mark.node is source is self.source() and write not in mark.before:
                mark.surely.add(index)

    def _touch(self, index: int, source: BlockDriverState) -> None:
        for mark in self.marks:
            if mark.node is source:
                mark.maybe.add(index)

    @property
    def poisoned(self) -> bool:
        """Whether the image takes no writes any more, since its metadata could not be written."""
        node = self.source()
        while node.poisoned is None and node.filtered is not None:
            node = node.filtered.node
        return node.poisoned is not None

    async def _write(self, index: int, data: bytes, *, zero: bool) -> None:
        while not self.poisoned:
            device = self.find()
            try:
                if device is None:
                    await asyncio.sleep(0.001)
                elif zero:
                    await device.write_zeroes(index * BLOCK, BLOCK, may_unmap=True)
                    return
                else:
                    await device.write_from(index * BLOCK, memoryview(data))
                    return
            except QBlockError:
                self.failed += device is self.find()  # and not because it was pulled out
                await asyncio.sleep(0.001)

    async def flusher(self) -> None:
        """What has ended before a flush begins survives a crash after it has ended."""
        while self.running:
            await asyncio.sleep(self.random.choice((0.002, 0.01, 0.05)))
            device, survivors, ended = self.find(), self.survivors, self.ended.copy()
            if device is None or not self.system.run.running or self.held:
                continue
            try:
                await device.flush()
            except QBlockError:
                continue
            if survivors is self.survivors:
                for index, at in enumerate(ended):
                    del survivors[index][:at]
                    self.ended[index] -= at

    async def hold(self) -> bool:
        """Nothing is under way on return, and nothing begins before ``held`` is taken back; False if something does not end."""
        self.held = True
        for _ in range(1000):  # a job that waits to be finalized keeps the disk at rest
            if not self.under_way or self.poisoned:
                return True
            await asyncio.sleep(0.001)
        return False


@attrs.frozen
class Photo:
    """What a crash at one moment would leave: the storage of all images, and what the guest may find on its disks."""

    files: dict[str, bytes]
    disks: list[tuple[str, list[list[bytes]]]]
    """Each disk's image, and what each of its blocks may hold."""
    bitmaps: list[tuple[str, str, set[int]]]
    """Persistent bitmaps: their images, their names, and the blocks that they must know of."""


def not_left(seen: bytes, blocks: list[list[bytes]]) -> list[int]:
    """The numbers of the blocks that a crash cannot have left so: each sector has to be one of those that were written."""
    wrong = []
    for index, allowed in enumerate(blocks):
        block = seen[index * BLOCK : (index + 1) * BLOCK]
        if block in allowed:
            continue
        for at in range(0, BLOCK, SECTOR):
            if all(block[at : at + SECTOR] != one[at : at + SECTOR] for one in allowed):
                wrong.append(index)
                break
    return wrong
