"""``qblock-img bench``: how long a number of requests of one size takes, a few of them at a time.

Command line, checks and output as qemu-img 7.2's; -q silences nothing, as there. Differs from QEMU: a depth of 0 and an empty
image are refused, and a failing request ends the run at once.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final

import attrs

from qblock.backend import BlockBackend
from qblock.clock import Clock
from qblock.errors import CommandError, QBlockError
from qblock.tools.arguments import (
    CACHE_MODES,
    Arguments,
    UsageError,
    aio_mode,
    is_writethrough,
    size_of,
)
from qblock.tools.images import ImageArguments, ImageSession, Watch, cache_flags, run_session

MAX_NUMBER: Final = (1 << 31) - 1
DEFAULT_COUNT: Final = 75000
DEFAULT_DEPTH: Final = 64
DEFAULT_BUFFER: Final = 4096
LONG: Final = {
    "pattern=": "pattern", "flush-interval=": "flush-interval", "no-drain": "no-drain", "image-opts": "image-opts",
    "force-share": "U",
}  # fmt: skip


@attrs.frozen
class BenchSettings:
    """What to send: ``count`` requests of ``length`` bytes, ``depth`` at a time, at ``offset`` and then ``step`` bytes on each.

    ``pattern``: the byte to write; None: reads. A flush follows every ``flush_interval`` requests (0: none), counted from the
    last one backwards; without ``drain`` it does not wait for the requests under way.
    """

    count: int
    depth: int
    length: int
    offset: int
    step: int
    pattern: int | None
    flush_interval: int
    drain: bool


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(args, "c:d:f:ni:o:qs:S:t:wU", LONG)
    settings = _settings(arguments)
    if len(arguments.words) != 1:
        raise UsageError("Expecting one image file name")
    arguments.check_image_opts()
    cache = arguments.get("t", "writeback")
    if cache not in CACHE_MODES:
        raise CommandError(f"Invalid cache mode: '{cache}' (choose from {', '.join(CACHE_MODES)})")
    wanted = ImageArguments.of(
        arguments,
        arguments.words[0],
        writable="w" in arguments,
        flags=attrs.evolve(cache_flags(cache), aio=aio_mode(arguments, "n")),
        writethrough=is_writethrough(cache),
    )
    run_session(lambda session: _bench(session, wanted, settings), watch)
    return 0


def _settings(arguments: Arguments) -> BenchSettings:
    writes = "w" in arguments
    length = _bytes(arguments, "s", "buffer size", DEFAULT_BUFFER)
    depth = _number(arguments, "d", "queue depth", DEFAULT_DEPTH)
    interval = _number(arguments, "flush-interval", "flush interval", 0)
    pattern = _number(arguments, "pattern", "pattern byte", 0, limit=255)
    if interval and not writes:
        raise CommandError("--flush-interval is for write tests (-w)")
    if interval and interval < depth:
        raise CommandError("the flush interval must not be smaller than the depth")
    if not depth:
        raise CommandError("Invalid queue depth: with 0 requests at a time none is ever sent")
    return BenchSettings(
        count=_number(arguments, "c", "request count", DEFAULT_COUNT),
        depth=depth,
        length=length,
        offset=size_of(arguments.get("o") or "0", "offset"),
        step=_bytes(arguments, "S", "step size", 0) or length,
        pattern=pattern if writes else None,
        flush_interval=interval,
        drain="no-drain" not in arguments,
    )


def _number(arguments: Arguments, name: str, what: str, default: int, *, limit: int = MAX_NUMBER) -> int:
    text = arguments.get(name)
    if text is None:
        return default
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= limit:
        raise CommandError(f"Invalid {what}: it must be a number from 0 to {limit}")
    return number


def _bytes(arguments: Arguments, name: str, what: str, default: int) -> int:
    size = arguments.size(name, what)
    if size is not None and size > MAX_NUMBER:
        raise CommandError(f"Invalid {what}: it must be from 0 to {MAX_NUMBER}")
    return default if size is None else size


async def _bench(session: ImageSession, wanted: ImageArguments, settings: BenchSettings) -> None:
    image = await session.open(wanted)
    if not image.length:
        raise CommandError(f"'{wanted.name}' is empty: there is nothing to read or write")
    print(
        f"Sending {settings.count} {'read' if settings.pattern is None else 'write'} requests, {settings.length} bytes each, "
        f"{settings.depth} in parallel (starting at offset {settings.offset}, step size {settings.step})"
    )
    if settings.flush_interval:
        print(f"Sending flush every {settings.flush_interval} requests")
    sys.stdout.flush()
    bench = Bench(image, settings)
    seconds = await bench.run(session.environment.clock)
    print(f"Run completed in {seconds:3.3f} seconds.")


class Bench:
    """One run against one image."""

    def __init__(self, image: BlockBackend, settings: BenchSettings) -> None:
        self.image = image
        self.settings = settings
        self._left = settings.count
        """Requests that have not been sent."""
        self._offset = settings.offset
        self._payload = memoryview(bytes([settings.pattern or 0]) * settings.length)

    async def run(self, clock: Clock) -> float:
        """Send everything; the seconds that it took. Raises `CommandError` for the first request that fails."""
        started = clock.now_ns()
        interval = self.settings.flush_interval if self.settings.drain else 0
        try:
            while self._left:
                # With draining, a round ends where a flush is due.
                stop = (self._left - 1) // interval * interval if interval else 0
                await self._round(stop)
                if interval:
                    await self.image.flush()
        except QBlockError as error:
            raise CommandError(f"a request failed: {error}") from error
        return (clock.now_ns() - started) / 1e9

    async def _round(self, stop: int) -> None:
        """Send requests until ``stop`` are left, and wait for them."""
        workers = min(self.settings.depth, self._left - stop)
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(workers):
                    tasks.create_task(self._reads(stop) if self.settings.pattern is None else self._writes(stop, tasks))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    def _next(self) -> int:
        """The offset of the next request, which counts as sent."""
        offset = self._offset
        self._left -= 1
        self._offset = (offset + self.settings.step) % self.image.length
        return offset

    async def _reads(self, stop: int) -> None:
        if self._left <= stop:
            return
        buffer, read_into = memoryview(bytearray(self.settings.length)), self.image.read_into
        while self._left > stop:
            await read_into(self._next(), buffer)

    async def _writes(self, stop: int, tasks: asyncio.TaskGroup) -> None:
        write_from, payload = self.image.write_from, self._payload
        interval = 0 if self.settings.drain else self.settings.flush_interval
        while self._left > stop:
            offset = self._next()
            if interval and not self._left % interval:
                tasks.create_task(self.image.flush())
                # Writes may complete without a wait; the flush is to begin now.
                await asyncio.sleep(0)
            await write_from(offset, payload)
