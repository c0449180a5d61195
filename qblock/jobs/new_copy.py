"""What the commands share that copy a disk: which part of it is copied, and the file that some of them make for the copy.

Models ``drive-mirror`` and ``drive-backup`` (semantics.md sections 4.4 and 4.5).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import attrs

from qblock.creating import create_image_file, is_plain
from qblock.errors import CommandError
from qblock.naming import link_to
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


@attrs.frozen(kw_only=True)
class TargetFile:
    """The file that is to hold the copy, and the name of its node. Without ``format`` a new image gets the source's, an
    existing one is probed.
    """

    filename: str
    format: str | None = None
    node_name: str | None = None
    mode: NewImageMode = NewImageMode.ABSOLUTE_PATHS

    @property
    def is_made(self) -> bool:
        """Whether the command makes it."""
        return self.mode is NewImageMode.ABSOLUTE_PATHS


async def make_target(
    system: BlockSystem, target: TargetFile, source: BlockDriverState, *, backing: BlockDriverState | None
) -> str | None:
    """Make the file, as long as ``source`` and with ``backing`` named in its header, unless it is there.

    Returns the driver to open it by; None: to be probed. Where the source is storage without a format, no format is looked for.
    """
    if not target.is_made:
        is_storage = source.driver.is_protocol or source.driver.names_storage
        return target.format or (system.opener.protocol_of(target.filename) if is_storage else None)
    fmt = target.format or source.driver.name
    link = None
    if backing is not None:
        if is_plain(fmt):
            raise CommandError(f"A {fmt} image cannot have a backing file; choose another format or sync=full")
        link = link_to(system.graph.skip_filters(backing))
    await create_image_file(
        system.opener, target.filename, fmt, size=source.length, backing=link, announce=system.announce
    )
    return fmt
