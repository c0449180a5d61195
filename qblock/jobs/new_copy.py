"""What the commands share that copy a disk: which part of it is copied, and the file that some of them make for the copy.

Models ``drive-mirror`` and ``drive-backup`` (semantics.md sections 4.4 and 4.5).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from qblock.creating import create_image_file
from qblock.driver import BackingLink
from qblock.errors import CommandError, NodeNotFound
from qblock.node import BlockDriverState

if TYPE_CHECKING:
    from qblock.system import BlockSystem


class SyncMode(enum.Enum):
    """What is copied, as ``MirrorSyncMode`` on the wire; mirror takes the first three."""

    TOP = "top"
    FULL = "full"
    NONE = "none"
    INCREMENTAL = "incremental"
    BITMAP = "bitmap"


class NewImageMode(enum.Enum):
    """Whether a command that takes a file name makes the file."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


def format_of(node: BlockDriverState) -> str:
    """The format of an image, as headers name it."""
    from_driver = node.driver
    return "raw" if from_driver.is_protocol else from_driver.name


async def create_target(
    system: BlockSystem, filename: str, fmt: str, *, size: int, backing: BlockDriverState | None
) -> None:
    """Make an image of ``size`` bytes whose header names ``backing`` as its backing file."""
    link = None
    if backing is not None:
        image = system.graph.skip_filters(backing)
        name = image.driver.filename()
        if name is None:
            raise NodeNotFound(image.node_name, detail="No file name for a header to name the backing node by:")
        link = BackingLink(name, format_of(image))
        if fmt == "raw":
            raise CommandError("A raw image cannot have a backing file; choose another format or sync=full")
    await create_image_file(system.opener, filename, fmt, size=size, backing=link, announce=system.announce)
