"""Changing the size of the disk in an image, as ``qemu-img resize`` does.

`resize` blocks until done; `resize_disk` is the same for whoever has the image open. Sizes are bytes. Shrinking destroys what
lies behind the new end, so that it has to be asked for.
"""

from __future__ import annotations

import os
from typing import Final, Literal, TypeAlias

import attrs

from qblock.backend import BlockBackend
from qblock.errors import CommandError
from qblock.offline import run_offline, using
from qblock.opening import Opener
from qblock.units import parse_size

Preallocation: TypeAlias = Literal["off", "metadata", "falloc", "full"]

PREALLOCATIONS: Final = ("off", "metadata", "falloc", "full")


@attrs.frozen
class Resized:
    """What `resize` did: the size of the disk before and after, in bytes."""

    old: int
    length: int


class ShrinkRefused(CommandError):
    """The new size is less than the present one, and nobody allowed that."""


def wanted_length(text: str, present: int) -> int:
    """The bytes that a size like ``64M``, ``+1G`` or ``-512k`` means for a disk of ``present`` bytes. Raises `CommandError`."""
    sign, digits = (text[0], text[1:]) if text[:1] in ("+", "-") else ("", text)
    try:
        size = parse_size(digits)
    except ValueError as error:
        raise CommandError(f"Invalid image size: {error}") from None
    length = {"": size, "+": present + size, "-": present - size}[sign]
    if not 0 < length < 1 << 63:
        raise CommandError(f"the new size of the image must be positive and below 8 EiB, but would be {length} bytes")
    return length


async def resize_disk(
    disk: BlockBackend, length: int, *, shrink: bool = False, preallocation: Preallocation = "off"
) -> Resized:
    """Make a disk that is open for writing ``length`` bytes long. Raises `CommandError` or `BlockIOError`."""
    old = disk.length
    if length <= old and preallocation != "off":
        raise CommandError("preallocation is only for images that grow")
    if length < old and not shrink:
        raise ShrinkRefused(
            f"the image has {old} bytes, and shrinking it to {length} would destroy what lies behind; allow that explicitly"
        )
    await disk.truncate(length, preallocation=preallocation)
    await disk.flush()
    return Resized(old, disk.length)


def resize(
    path: str | os.PathLike[str],
    size: int | str,
    *,
    fmt: str | None = None,
    shrink: bool = False,
    preallocation: Preallocation = "off",
    backing: bool = False,
) -> Resized:
    """Make the disk in the image at ``path`` as large as ``size`` says (bytes, or text such as ``"64M"``, ``"+1G"``, ``"-1G"``).

    What is added reads as zeroes. ``backing=True`` opens the backing files that the image names, without which an overlay is
    refused with `OpenDenied`. Raises `ShrinkRefused` for a smaller size without ``shrink``, and other `QBlockError`.
    """
    name = os.fspath(path)

    async def work(opener: Opener) -> Resized:
        node = await opener.open_image(name, fmt=fmt, read_only=False)
        with using(opener, node, name=name) as disk:
            length = size if isinstance(size, int) else wanted_length(size, disk.length)
            return await resize_disk(disk, length, shrink=shrink, preallocation=preallocation)

    return run_offline(work, backing=backing)
