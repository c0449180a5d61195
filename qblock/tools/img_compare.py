"""``qblock-img compare``: do two images have the same content?

Exit codes of qemu-img 7.2: 0 identical, 1 different, 2 an image cannot be opened, 3 its map cannot be read, 4 its data cannot
be read. A difference is reported by the 512-byte sector it lies in. A longer image is the same when its surplus is zero.
"""

from __future__ import annotations

from typing import Final

import attrs

from qblock.backend import BlockBackend
from qblock.errors import QBlockError
from qblock.status import ChainExtent, Further, chain_status
from qblock.tools.arguments import Arguments, UsageError
from qblock.tools.console import Progress, Teller, complain
from qblock.tools.images import ImageArguments, ImageSession, Watch, cache_flags, run_session, with_secrets
from qblock.units import MiB, align_down
from qblock.zeroes import all_zero

IDENTICAL, DIFFERENT, OPEN_FAILED, STATUS_FAILED, READ_FAILED = range(5)
CHUNK: Final = MiB
"""Bytes of each image that are compared at a time: both buffers stay in the processor's cache."""
MAX_QUESTION: Final = 1 << 40
SECTOR: Final = 512
NOTHING: Final = ChainExtent(0, 0, present=False, zero=False, data=False)


class _Stop(QBlockError):
    """The comparison has ended, with this exit code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Difference(_Stop):
    """The images differ; ``offset`` is the sector in which their content does first."""

    def __init__(self, text: str, offset: int | None = None) -> None:
        super().__init__(DIFFERENT, text)
        self.offset = offset


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(
        args, "f:F:T:pqsU", {"image-opts": "image-opts", "force-share": "U", "object=": "object"}
    )
    if len(arguments.words) != 2:
        raise UsageError("Expecting two image file names")
    watch = with_secrets(arguments, watch)
    progress = Progress("p" in arguments and "q" not in arguments)
    with progress.line():
        try:
            return run_session(lambda session: _compare(session, arguments, progress), watch)
        except _Stop as stop:
            if stop.code != DIFFERENT:
                complain("qblock-img", str(stop))
            elif "q" not in arguments:
                print(stop)
            return stop.code


async def _compare(session: ImageSession, arguments: Arguments, progress: Progress) -> int:
    one = await _open(session, arguments, arguments.words[0], "f")
    two = await _open(session, arguments, arguments.words[1], "F")
    quiet = "q" in arguments
    comparison = Comparison(one, two, strict="s" in arguments, quiet=quiet, progress=progress)
    await comparison.run()
    if not quiet:
        print("Images are identical.")
    return IDENTICAL


async def _open(session: ImageSession, arguments: Arguments, name: str, fmt: str) -> BlockBackend:
    try:
        arguments.check_image_opts(fmt)
        flags = cache_flags(arguments.get("T"), "source cache option")
        return await session.open(ImageArguments.of(arguments, name, fmt, flags=flags))
    except QBlockError as error:
        raise _Stop(OPEN_FAILED, str(error)) from error


@attrs.define(eq=False)
class Comparison:
    """Two images and how to compare them; the methods raise `Difference` when there is one, `_Stop` when they cannot go on."""

    one: BlockBackend
    two: BlockBackend
    strict: bool
    quiet: bool
    progress: Teller
    _further: Further = attrs.field(init=False, factory=Further)
    _buffers: tuple[bytearray, bytearray] = attrs.field(init=False, factory=lambda: (bytearray(CHUNK), bytearray(CHUNK)))

    async def run(self) -> None:
        """Compare all of it; returns when the images are the same."""
        shared = min(self.one.length, self.two.length)
        total = max(self.one.length, self.two.length)
        self.progress.show(0, total)
        if self.strict and shared != total:
            raise Difference("Strict mode: Image size mismatch!")
        at = first_end = second_end = 0
        first = second = NOTHING
        while at < shared:
            if first_end <= at:
                first = await self._status(self.one, at, shared)
                first_end = at + first.length
            if second_end <= at:
                second = await self._status(self.two, at, shared)
                second_end = at + second.length
            if self.strict and _kind(first) != _kind(second):
                raise Difference(f"Strict mode: Offset {at} block status mismatch!")
            end = min(first_end, second_end)
            await self._compare_run(at, end - at, first, second)
            at = end
            self.progress.show(at, total)
        if shared != total:
            await self._check_surplus(shared, total)
        self.progress.show(total, total)

    async def _compare_run(self, at: int, length: int, first: ChainExtent, second: ChainExtent) -> None:
        if first.zero and second.zero:
            return
        for start in range(at, at + length, CHUNK):
            count = min(CHUNK, at + length - start)
            if first.zero or second.zero:
                await self._expect_zero(self.two if first.zero else self.one, start, count)
            else:
                await self._expect_equal(start, count)

    async def _expect_equal(self, at: int, count: int) -> None:
        one, two = self._buffers if count == CHUNK else (bytearray(count), bytearray(count))
        await self._read(self.one, at, one)
        await self._read(self.two, at, two)
        if one != two:
            sector = next(n for n in range(0, count, SECTOR) if one[n : n + SECTOR] != two[n : n + SECTOR])
            raise Difference(f"Content mismatch at offset {at + sector}!", at + sector)

    async def _expect_zero(self, image: BlockBackend, at: int, count: int) -> None:
        data = self._buffers[0] if count == CHUNK else bytearray(count)
        await self._read(image, at, data)
        if not all_zero(memoryview(data)):
            first = len(data) - len(data.lstrip(b"\0"))
            raise Difference(f"Content mismatch at offset {at + align_down(first, SECTOR)}!", at + align_down(first, SECTOR))

    async def _check_surplus(self, shared: int, total: int) -> None:
        if not self.quiet:
            print("Warning: Image size mismatch!")
        longer = self.one if self.one.length == total else self.two
        at = shared
        while at < total:
            extent = await self._status(longer, at, total)
            if not extent.zero:
                for start in range(at, at + extent.length, CHUNK):
                    await self._expect_zero(longer, start, min(CHUNK, at + extent.length - start))
            at += extent.length
            self.progress.show(at, total)

    async def _read(self, image: BlockBackend, at: int, data: bytearray) -> None:
        try:
            await image.read_into(at, memoryview(data))
        except QBlockError as error:
            raise _Stop(READ_FAILED, f"{image.description}: error while reading offset {at}: {error}") from error

    async def _status(self, image: BlockBackend, at: int, end: int) -> ChainExtent:
        """The kind of what is at ``at``, and how far it goes, wherever it lies."""
        try:
            extent = await chain_status(image.node, at, min(end - at, MAX_QUESTION), further=self._further)
        except QBlockError as error:
            raise _Stop(STATUS_FAILED, f"{image.description}: cannot tell what is at offset {at}: {error}") from error
        return attrs.evolve(extent, length=extent.length + self._further.length) if self._further.runs else extent


def _kind(extent: ChainExtent) -> tuple[bool, ...]:
    """What strict mode compares of a place."""
    return extent.present, extent.zero, extent.data, extent.offset is not None
