"""``qblock-img diff``: which parts of two disks differ, and in which layer of its chain each side holds them.

qemu-img has no such command. Content is compared by 512-byte sectors and the exit codes are those of ``compare``: 0 identical,
1 different, 2 an image cannot be opened, 3 its map cannot be read, 4 its data cannot be read. A longer disk is the same when
its surplus is zero. What both disks take from the same place of the same file is not read.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from functools import lru_cache
from typing import Any, Final

import attrs

from qblock.backend import BlockBackend
from qblock.chain import backing_chain
from qblock.errors import QBlockError
from qblock.filenames import has_protocol
from qblock.node import BlockDriverState
from qblock.status import FIRST_QUESTION, ChainExtent, chain_status, next_question
from qblock.tools.arguments import Arguments, UsageError
from qblock.tools.console import complain
from qblock.tools.images import ImageArguments, ImageSession, Watch, cache_flags, run_session, with_secrets
from qblock.units import MiB, format_size

IDENTICAL, DIFFERENT, OPEN_FAILED, STATUS_FAILED, READ_FAILED = range(5)
CHUNK: Final = 2 * MiB
SECTOR: Final = 512
_ZEROES: Final = bytes(SECTOR)


class _Failed(Exception):
    """The disks cannot be compared; the program ends with this exit code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@attrs.frozen
class Side:
    """What one of the disks has at a place: ``layer`` is the file that answers, ``depth`` counts from 0 at the top.

    ``kind``: ``data``, ``compressed``, ``zero`` (the layer says so), or ``none`` (no layer holds it: it reads as zeroes).
    """

    depth: int
    layer: str
    kind: str

    def as_json(self) -> dict[str, Any]:
        """With the names of our JSON."""
        return {"depth": self.depth, "filename": self.layer, "kind": self.kind}

    def __str__(self) -> str:
        return "held by no layer" if self.kind == "none" else f"{self.kind} in {self.layer}"


@attrs.frozen
class Difference:
    """``length`` bytes from ``start`` on in which the disks differ; a side is None behind the end of its disk."""

    start: int
    length: int
    one: Side | None
    two: Side | None

    def as_json(self) -> dict[str, Any]:
        """With the names of our JSON."""
        sides = {"a": self.one, "b": self.two}
        return {"start": self.start, "length": self.length,
                **{key: side and side.as_json() for key, side in sides.items()}}  # fmt: skip


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(
        args, "f:F:T:qsU", {"output=": "output", "image-opts": "image-opts", "force-share": "U", "object=": "object"}
    )
    arguments.output_format()
    if len(arguments.words) != 2:
        raise UsageError("Expecting two image file names")
    watch = with_secrets(arguments, watch)
    try:
        return run_session(lambda session: _diff(session, arguments), watch)
    except _Failed as failure:
        complain("qblock-img", str(failure))
        return failure.code


async def _diff(session: ImageSession, arguments: Arguments) -> int:
    one = await _open(session, arguments, arguments.words[0], "f")
    two = await _open(session, arguments, arguments.words[1], "F")
    found = differences(one, two)
    unequal = "s" in arguments and one.length != two.length
    if "q" in arguments:
        return DIFFERENT if unequal or await anext(found, None) is not None else IDENTICAL
    show = _print_json if arguments.output_format() == "json" else _print_table
    different = await show(one, two, found, unequal)
    return DIFFERENT if different or unequal else IDENTICAL


async def _open(session: ImageSession, arguments: Arguments, name: str, fmt: str) -> BlockBackend:
    try:
        arguments.check_image_opts(fmt)
        flags = cache_flags(arguments.get("T"), "source cache option")
        return await session.open(ImageArguments.of(arguments, name, fmt, flags=flags))
    except QBlockError as error:
        raise _Failed(OPEN_FAILED, str(error)) from error


# ----------------------------------------------------------------------------------------------------------- comparing


async def differences(one: BlockBackend, two: BlockBackend) -> AsyncIterator[Difference]:
    """All differences in order, neighbours with the same answers joined."""
    held: Difference | None = None
    async for found in _pieces(one, two):
        if held and held.start + held.length == found.start and (held.one, held.two) == (found.one, found.two):
            held = attrs.evolve(held, length=held.length + found.length)
            continue
        if held:
            yield held
        held = found
    if held:
        yield held


async def _pieces(one: BlockBackend, two: BlockBackend) -> AsyncIterator[Difference]:
    first, second = _Reader(one, layer_names(one)), _Reader(two, layer_names(two))
    end = max(one.length, two.length)
    at = 0
    while at < end:
        mine, other = await first.extent(at, end), await second.extent(at, end)
        length = min(mine.length, other.length)
        if not (mine.zero and other.zero) and not _same_place(mine, other):
            sides = first.side(at, mine), second.side(at, other)
            for start in range(at, at + length, CHUNK):
                count = min(CHUNK, at + length - start)
                data, theirs = await asyncio.gather(first.read(start, count, mine), second.read(start, count, other))
                for begin, stop in _unequal_runs(data, theirs, count):
                    yield Difference(start + begin, stop - begin, *sides)
        at += length


@attrs.define(eq=False)
class _Reader:
    """One of the disks; what lies behind its end reads as zeroes."""

    image: BlockBackend
    layers: list[str]
    _asking: int = FIRST_QUESTION
    _start: int = 0
    _extent: ChainExtent | None = None

    async def extent(self, at: int, end: int) -> ChainExtent:
        """What is at ``at``, and for how long."""
        held = self._extent
        if held is not None and at < self._start + held.length:
            return _cut(held, at - self._start)
        if at >= self.image.length:
            held = ChainExtent(end - at, 0, present=False, zero=True, data=False)
        else:
            asked = min(self.image.length - at, self._asking)
            try:
                held = (await chain_status(self.image.node, at, asked)).as_mapped()
            except QBlockError as error:
                text = f"{self.image.description}: cannot tell what is at offset {at}: {error}"
                raise _Failed(STATUS_FAILED, text) from error
            self._asking = next_question(asked, held.length)
        self._start, self._extent = at, held
        return held

    def side(self, at: int, extent: ChainExtent) -> Side | None:
        """The answer as it is shown; None behind the end."""
        if at >= self.image.length:
            return None
        kind = (
            "none" if not extent.present else "compressed" if extent.compressed else "zero" if extent.zero else "data"
        )
        return Side(extent.depth, self.layers[extent.depth], kind)

    async def read(self, at: int, count: int, extent: ChainExtent) -> bytearray | None:
        """The content; None when it is zero for sure."""
        if extent.zero:
            return None
        data = bytearray(count)
        try:
            await self.image.read_into(at, memoryview(data))
        except QBlockError as error:
            text = f"{self.image.description}: error while reading offset {at}: {error}"
            raise _Failed(READ_FAILED, text) from error
        return data


def _cut(extent: ChainExtent, skip: int) -> ChainExtent:
    offset = None if extent.offset is None else extent.offset + skip
    return attrs.evolve(extent, length=extent.length - skip, offset=offset) if skip else extent


def _same_place(one: ChainExtent, two: ChainExtent) -> bool:
    """Whether both are the same bytes of the same layer."""
    if one.node is None or two.node is None or one.node.driver.name != two.node.driver.name:
        return False
    if one.compressed != two.compressed or not (_same_file(one.node, two.node)):
        return False
    if one.compressed:
        return True
    if one.offset is None or one.offset != two.offset or one.file is None or two.file is None:
        return False
    return _same_file(one.file, two.file)


def _same_file(one: BlockDriverState, two: BlockDriverState) -> bool:
    names = one.driver.filename(), two.driver.filename()
    if names[0] is None or names[1] is None or has_protocol(names[0]) or has_protocol(names[1]):
        return False
    return _real_path(names[0]) == _real_path(names[1])


@lru_cache(maxsize=1024)
def _real_path(name: str) -> str:
    return os.path.realpath(name)


def _unequal_runs(one: bytearray | None, two: bytearray | None, count: int) -> Iterator[tuple[int, int]]:
    """Runs of sectors that differ; None stands for zeroes."""
    if one is not None and two is not None and one == two:
        return
    begin = None
    for at in range(0, count, SECTOR):
        stop = min(at + SECTOR, count)
        equal = _part(one, at, stop) == _part(two, at, stop)
        if equal and begin is not None:
            yield begin, at
            begin = None
        elif not equal and begin is None:
            begin = at
    if begin is not None:
        yield begin, count


def _part(data: bytearray | None, at: int, stop: int) -> bytes | bytearray:
    return _ZEROES[: stop - at] if data is None else data[at:stop]


def layer_names(image: BlockBackend) -> list[str]:
    """What the layers of an image's chain are called, top first: by their files, or else by their nodes."""
    return [node.driver.filename() or node.node_name for node in backing_chain(image.node)]


# ------------------------------------------------------------------------------------------------------------- showing


async def _print_table(one: BlockBackend, two: BlockBackend, found: AsyncIterator[Difference], unequal: bool) -> bool:
    """The table for a person; True when there is a difference. Lines are printed as they are found."""
    if one.length != two.length:
        print(f"The disks have different sizes: {_bytes(one.length)}, {_bytes(two.length)}")
    width = max(len("held by no layer"), *(len(f"compressed in {name}") for name in layer_names(one))) + 2
    ranges = total = 0
    async for difference in found:
        if not ranges:
            print(f"{'Offset':<16}{'Length':<16}{'First':<{width}}Second")
        sides = [str(side) if side else "behind the end" for side in (difference.one, difference.two)]
        print(f"{_hex(difference.start):<16}{_hex(difference.length):<16}{sides[0]:<{width}}{sides[1]}")
        ranges += 1
        total += difference.length
    if ranges:
        print(f"{ranges} {'range' if ranges == 1 else 'ranges'}, {_bytes(total)}")
    elif not unequal:
        print("Images are identical.")
    return ranges > 0


def _bytes(count: int) -> str:
    return f"{format_size(count)} ({count} bytes)"


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


async def _print_json(one: BlockBackend, two: BlockBackend, found: AsyncIterator[Difference], unequal: bool) -> bool:
    """One JSON object, whose list is printed as it is found; True when there is a difference."""
    print("{")
    for key, image in (("a", one), ("b", two)):
        disk = {"virtual-size": image.length, "layers": layer_names(image)}
        print(f'  "{key}": {json.dumps(disk, ensure_ascii=False)},')
    print('  "differences": [', end="")
    before, total = "\n", 0
    async for difference in found:
        print(f"{before}    {json.dumps(difference.as_json(), ensure_ascii=False)}", end="")
        before = ",\n"
        total += difference.length
    ending = "" if before == "\n" else "\n  "
    print(f'{ending}],\n  "different-bytes": {total},\n  "identical": {json.dumps(not total and not unequal)}\n}}')
    return total > 0
