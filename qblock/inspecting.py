"""Looking at a chain of images from outside: what each of them is and mentions, who uses it, and what about it is not safe.

Of our own; QEMU's nearest is ``qemu-img info --backing-chain``. Nothing is written, no lock is taken, and the content of the disk
is not read: each image is opened by itself, without what it mentions.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final

import attrs

from qblock.chain import skip_filters
from qblock.driver import Driver, SupportsBacking
from qblock.drivers.file.holders import LockHolder, lock_holders
from qblock.errors import BlockIOError, CommandError, ImageError
from qblock.filenames import combine_filename
from qblock.imageinfo import image_info
from qblock.node import BlockDriverState
from qblock.policy import Mention

BACKING: Final = "backing file"
DATA: Final = "data file"


@attrs.frozen
class Layer:
    """One image of a chain: ``info`` is QMP's ``ImageInfo`` of it, None when it cannot be opened, and ``failure`` tells why.

    ``mentions`` are the files that opening it opens too (as an `OpenPolicy` is asked), ``holders`` the processes that have it
    open, ``unsafe`` sentences on what can go wrong.
    """

    filename: str
    info: Mapping[str, Any] | None
    failure: str | None
    mentions: tuple[Mention, ...]
    holders: tuple[LockHolder, ...]
    unsafe: tuple[str, ...]


Open = Callable[[str, str | None], Awaitable[BlockDriverState]]
"""Opens one image by its name and format (None: probed), for reading what it says of itself only."""


async def inspect_chain(open_alone: Open, filename: str, fmt: str | None = None) -> list[Layer]:
    """All layers from the top down, until one mentions no backing file or cannot be opened."""
    layers: list[Layer] = []
    seen: set[str] = set()
    above: Mention | None = None
    while filename is not None:
        identity = os.path.realpath(filename.removeprefix("file:"))
        if identity in seen:
            layers.append(_failed(filename, "the chain comes back to an image that is in it already"))
            return layers
        seen.add(identity)
        try:
            node = await open_alone(filename, fmt)
        except (CommandError, ImageError, BlockIOError) as error:
            layers.append(_failed(filename, str(error)))
            return layers
        layer = _layer(filename, skip_filters(node), above)
        layers.append(layer)
        above = next((one for one in layer.mentions if one.what == BACKING), None)
        if above is None:
            return layers
        filename, fmt = above.filename, above.format
    return layers


def _failed(filename: str, failure: str) -> Layer:
    return Layer(filename, None, failure, (), tuple(_holders(filename)), (f"it cannot be opened: {failure}",))


def _layer(filename: str, node: BlockDriverState, above: Mention | None) -> Layer:
    info = image_info(node)
    mentions = tuple(mentions_of(node.driver, info))
    holders = tuple(_holders(filename))
    return Layer(filename, info, None, mentions, holders, tuple(_unsafe(info, mentions, holders, above)))


def mentions_of(driver: Driver, info: Mapping[str, Any]) -> Iterator[Mention]:
    """What opening an image opens besides: the data file and the backing file that its header names."""
    image = info["filename"]
    data_file = info.get("format-specific", {}).get("data", {}).get("data-file")
    if data_file is not None:
        yield Mention(image, data_file, DATA, "raw")
    link = driver.backing_link() if isinstance(driver, SupportsBacking) else None
    if link is not None:
        yield Mention(image, combine_filename(image, link.filename), BACKING, link.format)


def _holders(filename: str) -> list[LockHolder]:
    try:
        fd = os.open(filename.removeprefix("file:"), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return []
    try:
        return lock_holders(fd)
    finally:
        os.close(fd)


def _unsafe(
    info: Mapping[str, Any], mentions: tuple[Mention, ...], holders: tuple[LockHolder, ...], above: Mention | None
) -> Iterator[str]:
    """Sentences on what can go wrong with this image."""
    data = info.get("format-specific", {}).get("data", {})
    if data.get("corrupt"):
        yield "it is marked as corrupt: repair it (qblock-img check -r all) before anything writes to it"
    if info.get("dirty-flag"):
        yield "it was not shut down cleanly: it is repaired when it is opened for writing"
    for bitmap in data.get("bitmaps", ()):
        if "in-use" in bitmap.get("flags", ()):
            yield f"its bitmap '{bitmap['name']}' is in use, or a crash has left it inconsistent"
    for mention in mentions:
        if mention.format is None:
            yield f"it does not tell the format of its {mention.what}, which is then guessed from the content"
        if ":" in mention.filename.partition("/")[0]:
            yield f"its {mention.what} '{mention.filename}' is no plain file name"
        elif not os.path.exists(mention.filename):
            yield f"its {mention.what} '{mention.filename}' is not there"
    for holder in holders:
        if holder.writes:
            yield f"{holder} may write to it" + (", while others stand on it" if above is not None else "")
