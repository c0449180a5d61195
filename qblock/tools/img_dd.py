"""``qblock-img dd``: copy a number of blocks from one image to a new one, with operands as dd has them.

Operands, limits and exit codes as qemu-img 7.2's, one of its peculiarities included: ``count`` limits where the input ends, not
how much is copied, so that with ``skip=S`` and ``count=C`` at most C - S blocks are. Everything is written as data. Differs from
QEMU in how much is read at a time, which only takes less time, and in refusing to write over its input.
"""

from __future__ import annotations

import os
from typing import Final

import attrs

from qblock.backend import BlockBackend
from qblock.errors import CommandError, QBlockError
from qblock.formatting import options_of
from qblock.tools.arguments import Arguments, size_of
from qblock.tools.console import complain
from qblock.tools.creation import SECTOR, create_file, remove_file
from qblock.tools.images import ImageArguments, ImageSession, Watch, run_session, with_secrets
from qblock.units import MiB, align_up

OPERANDS: Final = ("bs", "count", "if", "of", "skip")
MAX_BLOCK: Final = (1 << 31) - 1
CHUNK: Final = 2 * MiB


@attrs.frozen
class _Request:
    """One checked command line. ``count`` and ``skip`` are blocks of ``block`` bytes."""

    source: ImageArguments
    output: str
    fmt: str
    block: int
    count: int | None
    skip: int


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(
        args, "f:O:U", {"image-opts": "image-opts", "force-share": "U", "object=": "object"}
    )  # fmt: skip
    arguments.check_image_opts()
    watch = with_secrets(arguments, watch)
    request = _checked(arguments)
    existed = os.path.lexists(request.output)
    try:
        run_session(lambda session: _dd(session, request), watch)
    except BaseException:
        if not existed:
            remove_file(request.output)
        raise
    return 0


def _checked(arguments: Arguments) -> _Request:
    operands = {}
    for word in arguments.words:
        name, equals, value = word.partition("=")
        if name not in OPERANDS or not equals:
            raise CommandError(f"'{word}' is no operand of dd; these are: {', '.join(name + '=' for name in OPERANDS)}")
        operands[name] = value
    if "if" not in operands or "of" not in operands:
        raise CommandError("Must specify both input and output: if=FILE of=FILE")
    block = size_of(operands.get("bs", "512"), "bs")
    if not 1 <= block <= MAX_BLOCK:
        raise CommandError(f"Invalid bs: it must be from 1 to {MAX_BLOCK}")
    fmt = arguments.get("O") or "raw"
    options_of(fmt)
    source = ImageArguments.of(arguments, operands["if"])
    return _Request(
        source,
        operands["of"],
        fmt,
        block,
        size_of(operands["count"], "count") if "count" in operands else None,
        size_of(operands.get("skip", "0"), "skip"),
    )


async def _dd(session: ImageSession, request: _Request) -> None:
    source = await session.open(request.source)
    filename = source.node.driver.filename()
    if filename is not None and _same_file(filename, request.output):
        raise CommandError(f"'{request.output}' is the input: it would be emptied before it is read")
    end = source.length if request.count is None else min(source.length, request.count * request.block)
    start = request.skip * request.block
    if start > end:
        complain("qblock-img", f"{request.source.name}: the input ends before the place to skip to")
    length = max(end - start, 0)
    await create_file(session, request.output, request.fmt, {"size": length})
    target = await session.open(ImageArguments(request.output, fmt=request.fmt, writable=True))
    await _copy(source, start, target, length)


def _same_file(first: str, second: str) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


async def _copy(source: BlockBackend, start: int, target: BlockBackend, length: int) -> None:
    """Copy bytes from ``start`` of the source to the beginning of the target, and flush; the last sector is filled up."""
    for at in range(0, length, CHUNK):
        count = min(CHUNK, length - at)
        view = memoryview(bytearray(align_up(count, SECTOR)))
        try:
            await source.read_into(start + at, view[:count])
        except QBlockError as error:
            raise CommandError(f"error while reading at byte {start + at}: {error}") from error
        try:
            await target.write_from(at, view)
        except QBlockError as error:
            raise CommandError(f"error while writing at byte {at}: {error}") from error
    try:
        await target.flush()
    except QBlockError as error:
        raise CommandError(f"error while flushing the output: {error}") from error
