"""``qblock-img resize``: make the disk in an image larger or smaller.

Command line, exit codes and the printed line of qemu-img 7.2: the size is the last word of the line, so ``-512k`` needs no
``--``; shrinking needs ``--shrink``.
"""

from __future__ import annotations

from typing import cast

from qblock.errors import CommandError
from qblock.resizing import PREALLOCATIONS, Preallocation, ShrinkRefused, resize_disk, wanted_length
from qblock.tools.arguments import Arguments, UsageError
from qblock.tools.images import ImageArguments, ImageSession, Watch, run_session, with_secrets

LONG = {"object=": "object", "image-opts": "image-opts", "preallocation=": "preallocation", "shrink": "shrink"}


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    if len(args) < 2:
        raise UsageError("Expecting an image file name and its new size")
    *rest, size = args
    arguments = Arguments(rest, "f:q", LONG)
    if len(arguments.words) != 1:
        raise UsageError("Expecting one image file name and its new size")
    watch = with_secrets(arguments, watch)
    preallocation = arguments.get("preallocation", "off")
    if preallocation not in PREALLOCATIONS:
        raise CommandError(f"Invalid preallocation mode '{preallocation}' (choose from {', '.join(PREALLOCATIONS)})")
    arguments.check_image_opts()
    try:
        run_session(lambda session: _resize(session, arguments, size, cast(Preallocation, preallocation)), watch)
    except ShrinkRefused as error:
        raise CommandError(f"{error}: Use the --shrink option to perform a shrink operation.") from None
    if "q" not in arguments:
        print("Image resized.")
    return 0


async def _resize(session: ImageSession, arguments: Arguments, size: str, preallocation: Preallocation) -> None:
    # A size that is none is refused before anything is opened.
    wanted_length("+" + size.lstrip("+-"), 1)
    disk = await session.open(ImageArguments.of(arguments, arguments.words[0], writable=True, resizable=True))
    length = wanted_length(size, disk.length)
    await resize_disk(disk, length, shrink="shrink" in arguments, preallocation=preallocation)
