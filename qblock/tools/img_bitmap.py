"""``qblock-img bitmap``: add, remove, clear, switch or merge persistent bitmaps of an image.

Command line, order of the operations and exit codes of qemu-img 7.2: operations are done in the order given, those before one
that fails stay done. Differs from QEMU: when the bitmaps cannot be stored at the end, that is an error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import attrs

from qblock.bitmaps import BitmapUse, bitmap_of, check_merge, check_use, forget_stored, new_bitmap
from qblock.driver import SupportsBitmaps
from qblock.errors import CommandError, QBlockError
from qblock.node import BlockDriverState
from qblock.tools.arguments import Arguments, UsageError
from qblock.tools.images import ImageArguments, ImageSession, Watch, run_session, with_secrets

LONG: Final = {
    "add": "add", "remove": "remove", "clear": "clear", "enable": "enable", "disable": "disable", "merge=": "merge",
    "source-file=": "b", "source-format=": "F", "granularity=": "g", "object=": "object", "image-opts": "image-opts",
}  # fmt: skip


@attrs.frozen
class _Desk:
    """What operations work on: ``source`` is the node with the bitmaps that are merged from."""

    node: BlockDriverState
    name: str
    source: BlockDriverState
    granularity: int | None


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(args, "b:f:F:g:", LONG)
    operations = [(option, value) for option, value in arguments.given if option in OPERATIONS]
    if len(arguments.words) != 2:
        raise UsageError("Expecting an image file name and the name of a bitmap")
    if not operations:
        raise UsageError("Need at least one of " + ", ".join(f"--{option}" for option in OPERATIONS))
    watch = with_secrets(arguments, watch)
    _check_combinations(arguments)
    granularity = arguments.size("g", "granularity")
    run_session(lambda session: _work(session, arguments, operations, granularity), watch)
    return 0


def _check_combinations(arguments: Arguments) -> None:
    if "g" in arguments and "add" not in arguments:
        raise CommandError("-g is for --add: only a new bitmap can be given a granularity")
    if "F" in arguments and "b" not in arguments:
        raise CommandError("-F is for -b: it is the format of that file")
    if "b" in arguments and "merge" not in arguments:
        raise CommandError("-b is for --merge: it has the bitmaps to merge from")
    arguments.check_image_opts()


async def _work(
    session: ImageSession, arguments: Arguments, operations: list[tuple[str, str]], granularity: int | None
) -> None:
    image, name = arguments.words
    disk = await session.open(ImageArguments.of(arguments, image, writable=True, backing=False))
    source = disk
    if (filename := arguments.get("b")) is not None:
        source = await session.open(ImageArguments(filename, fmt=arguments.get("F"), backing=False))
    desk = _Desk(disk.node, name, source.node, granularity)
    try:
        for operation, value in operations:
            try:
                await OPERATIONS[operation](desk, value)
            except QBlockError as error:
                raise CommandError(f"Operation {operation} on bitmap {name} failed: {error}") from error
    finally:
        if isinstance(disk.node.driver, SupportsBitmaps):
            await disk.node.driver.store_bitmaps()


async def _add(desk: _Desk, value: str) -> None:
    bitmap = new_bitmap(desk.node, desk.name, granularity=desk.granularity, persistent=True)
    desk.node.dirty_bitmaps.append(bitmap)


async def _remove(desk: _Desk, value: str) -> None:
    bitmap = bitmap_of(desk.node, desk.name)
    check_use(bitmap, BitmapUse.REMOVE)
    desk.node.dirty_bitmaps.remove(bitmap)
    await forget_stored(desk.node, bitmap)


async def _clear(desk: _Desk, value: str) -> None:
    bitmap = bitmap_of(desk.node, desk.name)
    check_use(bitmap, BitmapUse.CHANGE)
    bitmap.clear()


async def _enable(desk: _Desk, value: str) -> None:
    bitmap = bitmap_of(desk.node, desk.name)
    check_use(bitmap, BitmapUse.SWITCH)
    bitmap.enable()


async def _disable(desk: _Desk, value: str) -> None:
    bitmap = bitmap_of(desk.node, desk.name)
    check_use(bitmap, BitmapUse.SWITCH)
    bitmap.disable()


async def _merge(desk: _Desk, value: str) -> None:
    target = bitmap_of(desk.node, desk.name)
    check_use(target, BitmapUse.CHANGE)
    source = bitmap_of(desk.source, value)
    check_merge(source, target)
    target.merge(source)


OPERATIONS: Final[Mapping[str, Callable[[_Desk, str], Awaitable[None]]]] = {
    "add": _add,
    "remove": _remove,
    "clear": _clear,
    "enable": _enable,
    "disable": _disable,
    "merge": _merge,
}
"""By the name of their option; the value is that of the option."""
