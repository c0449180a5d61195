"""What is allowed to be done to the dirty bitmaps of a node, and how a new one is made.

Models semantics.md section 11: which state of a bitmap allows which use is the table `ALLOWED`. Bitmap commands of the monitor
(`actions.bitmaps`) and ``qblock-img bitmap`` follow these rules.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from qblock.dirty import DirtyBitmap
from qblock.drain import enter, leave
from qblock.driver import SupportsBitmaps
from qblock.errors import CommandError, InvalidParameter
from qblock.node import BlockDriverState
from qblock.units import is_power_of_two

MAX_NAME: Final = 1023
MAX_GRANULARITY: Final = 1 << 31
DEFAULT_GRANULARITY: Final = (4096, 65536)
"""Bounds of the granularity that a node's cluster size suggests; the upper one stands in for nodes without clusters."""


class BitmapState(enum.Enum):
    """What can stand in the way of using a bitmap."""

    BUSY = "is in use by a job or an export"
    READONLY = "is read-only, as its image is"
    INCONSISTENT = "was not stored in time and does not say what changed; it can only be removed"


class BitmapUse(enum.Enum):
    """What somebody wants with a bitmap."""

    CHANGE = "clear it or merge into it"
    SWITCH = "enable or disable it"
    READ = "merge from it"
    REMOVE = "remove it"


ALLOWED: Final[Mapping[BitmapUse, frozenset[BitmapState]]] = {
    BitmapUse.CHANGE: frozenset(),
    BitmapUse.SWITCH: frozenset({BitmapState.READONLY}),
    BitmapUse.READ: frozenset({BitmapState.READONLY}),
    BitmapUse.REMOVE: frozenset({BitmapState.INCONSISTENT}),
}
"""The states that do not stand in the way."""


def bitmap_of(node: BlockDriverState, name: str) -> DirtyBitmap:
    """The bitmap of this name on the node; raises `CommandError`."""
    for bitmap in node.dirty_bitmaps:
        if bitmap.name == name:
            return bitmap
    raise CommandError(f"Node '{node.node_name}' has no dirty bitmap '{name}'")


def check_use(bitmap: DirtyBitmap, use: BitmapUse) -> None:
    """Raise `CommandError` when the bitmap's state stands in the way of ``use``."""
    states = {
        BitmapState.BUSY: bitmap.busy or bitmap.successor is not None,
        BitmapState.READONLY: bitmap.readonly,
        BitmapState.INCONSISTENT: bitmap.inconsistent,
    }
    for state, given in states.items():
        if given and state not in ALLOWED[use]:
            raise CommandError(f"Bitmap '{bitmap.name}' {state.value}")


def default_granularity(node: BlockDriverState) -> int:
    """The cluster size of the node, within bounds."""
    smallest, largest = DEFAULT_GRANULARITY
    cluster_size = node.driver.info().cluster_size
    return max(smallest, min(largest, cluster_size)) if cluster_size else largest


def new_bitmap(
    node: BlockDriverState, name: str, *, granularity: int | None = None, persistent: bool = False, enabled: bool = True
) -> DirtyBitmap:
    """A bitmap that the node can be given; ``granularity`` in bytes, None for the default.

    Raises `InvalidParameter`, and `CommandError` when the node has one of that name or its format could not store it.
    """
    if not name:
        raise InvalidParameter("name", "must not be empty")
    if granularity is not None and not (512 <= granularity <= MAX_GRANULARITY and is_power_of_two(granularity)):
        raise InvalidParameter("granularity", "must be a power of two from 512 bytes to 2 GiB")
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise InvalidParameter("name", f"is longer than {MAX_NAME} bytes")
    if any(bitmap.name == name for bitmap in node.dirty_bitmaps):
        raise CommandError(f"Node '{node.node_name}' has a dirty bitmap '{name}' already")
    granularity = granularity or default_granularity(node)
    bitmap = DirtyBitmap(node.length, granularity, name, enabled=enabled, persistent=persistent)
    if persistent:
        if not isinstance(node.driver, SupportsBitmaps):
            raise CommandError(
                f"Persistent bitmaps cannot be stored in '{node.node_name}' ({node.driver.name}); leave 'persistent' out"
            )
        node.driver.check_new_bitmap(bitmap)
    return bitmap


def check_merge(source: DirtyBitmap, target: DirtyBitmap) -> None:
    """Raise `CommandError` when what is dirty in ``source`` cannot be added to ``target``."""
    check_use(source, BitmapUse.READ)
    if source.size != target.size:
        raise CommandError(
            f"Bitmap '{source.name}' covers {source.size} bytes, '{target.name}' {target.size}: no merge"
        )


def freeze(node: BlockDriverState, bitmap: DirtyBitmap) -> None:
    """Let a user have what the bitmap says now; a nameless successor records what is written until `reclaim` or `abdicate`."""
    node.dirty_bitmaps.append(bitmap.create_successor())


def reclaim(node: BlockDriverState, bitmap: DirtyBitmap) -> None:
    """The user gave up: the bitmap says what it said, and what was written since."""
    assert bitmap.successor is not None
    node.dirty_bitmaps.remove(bitmap.successor)
    bitmap.reclaim()


def abdicate(node: BlockDriverState, bitmap: DirtyBitmap) -> None:
    """The user is done with what the bitmap said: it says what was written since, and stands where the successor stood."""
    assert bitmap.successor is not None
    node.dirty_bitmaps.remove(bitmap)
    node.dirty_bitmaps[node.dirty_bitmaps.index(bitmap.successor)] = bitmap
    bitmap.abdicate()


async def forget_stored(node: BlockDriverState, bitmap: DirtyBitmap) -> None:
    """Take a bitmap that was removed from the node out of its image, if it is persistent.

    Raises `BlockIOError`: it stays in the image then, as inconsistent.
    """
    if bitmap.persistent and bitmap.name and isinstance(node.driver, SupportsBitmaps):
        enter(node)
        try:
            await node.driver.forget_bitmap(bitmap.name)
        finally:
            leave(node)
