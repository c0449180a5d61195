"""Dirty bitmap commands.

Models semantics.md section 11: which state of a bitmap allows which command is the table `ALLOWED`. Differs from QEMU: bitmaps
live in memory only, so ``persistent`` is refused as QEMU refuses it for formats that cannot store bitmaps.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import attrs

from qblock.dirty import DirtyBitmap
from qblock.errors import CommandError, InvalidParameter
from qblock.graph import Graph
from qblock.monitor.command import CommandContext, command
from qblock.monitor.replies import BlockDirtyBitmapSha256
from qblock.node import BlockDriverState
from qblock.options import option, required
from qblock.units import is_power_of_two

MAX_NAME: Final = 1023
DEFAULT_GRANULARITY: Final = (4096, 65536)
"""Bounds of the granularity that a node's cluster size suggests; the upper one stands in for nodes without clusters."""


class BitmapState(enum.Enum):
    """What can stand in the way of using a bitmap."""

    BUSY = "is in use by a job or an export"
    READONLY = "is read-only, as its image is"
    INCONSISTENT = "was not stored in time and does not say what changed; it can only be removed"


class BitmapUse(enum.Enum):
    """What a command wants with a bitmap."""

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


@attrs.frozen
class BitmapArguments:
    """Names a bitmap."""

    node: str = required(doc="device or node that has the bitmap")
    name: str = required(doc="name of the bitmap")


@attrs.frozen
class BitmapAddArguments:
    """Arguments of block-dirty-bitmap-add."""

    node: str = required(doc="device or node to get the bitmap")
    name: str = required(doc="name of the bitmap, unique on the node")
    granularity: int | None = option(None, doc="bytes per bit, a power of two from 512 on")
    persistent: bool = option(False, doc="store the bitmap in the image")
    disabled: bool = option(False, doc="do not record writes yet")


@attrs.frozen
class BitmapRef:
    """Names a bitmap of any node."""

    node: str = required(doc="device or node that has the bitmap")
    name: str = required(doc="name of the bitmap")


@attrs.frozen
class BitmapMergeArguments:
    """Arguments of block-dirty-bitmap-merge."""

    node: str = required(doc="device or node that has the target")
    target: str = required(doc="name of the bitmap to merge into")
    bitmaps: list[str | BitmapRef] = required(doc="bitmaps to merge from: of the same node by name, or of any node")


def find_bitmap(graph: Graph, node_name: str, name: str) -> tuple[BlockDriverState, DirtyBitmap]:
    """The node and its bitmap; raises `NodeNotFound` or `CommandError`."""
    node = graph.lookup(node_name)
    for bitmap in node.dirty_bitmaps:
        if bitmap.name == name:
            return node, bitmap
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


@command("block-dirty-bitmap-add", since="2.4")
async def block_dirty_bitmap_add(ctx: CommandContext, args: BitmapAddArguments) -> None:
    """Begin to record which parts of a node change."""
    node = ctx.system.graph.lookup(args.node)
    if not args.name:
        raise InvalidParameter("name", "must not be empty")
    if args.granularity is not None and not (args.granularity >= 512 and is_power_of_two(args.granularity)):
        raise InvalidParameter("granularity", "must be a power of two and at least 512")
    if len(args.name.encode()) > MAX_NAME:
        raise InvalidParameter("name", f"is longer than {MAX_NAME} bytes")
    if any(bitmap.name == args.name for bitmap in node.dirty_bitmaps):
        raise CommandError(f"Node '{node.node_name}' has a dirty bitmap '{args.name}' already")
    if args.persistent:
        raise CommandError(
            f"Persistent bitmaps cannot be stored in '{node.node_name}' ({node.driver.name}); leave 'persistent' out"
        )
    granularity = args.granularity or default_granularity(node)
    node.dirty_bitmaps.append(DirtyBitmap(node.length, granularity, args.name, enabled=not args.disabled))


@command("block-dirty-bitmap-remove", since="2.4")
async def block_dirty_bitmap_remove(ctx: CommandContext, args: BitmapArguments) -> None:
    """Forget a bitmap."""
    node, bitmap = find_bitmap(ctx.system.graph, args.node, args.name)
    check_use(bitmap, BitmapUse.REMOVE)
    node.dirty_bitmaps.remove(bitmap)


@command("block-dirty-bitmap-clear", since="2.4")
async def block_dirty_bitmap_clear(ctx: CommandContext, args: BitmapArguments) -> None:
    """Make all of a bitmap clean."""
    _, bitmap = find_bitmap(ctx.system.graph, args.node, args.name)
    check_use(bitmap, BitmapUse.CHANGE)
    bitmap.clear()


@command("block-dirty-bitmap-enable", since="4.0")
async def block_dirty_bitmap_enable(ctx: CommandContext, args: BitmapArguments) -> None:
    """Record writes in a bitmap from now on."""
    _, bitmap = find_bitmap(ctx.system.graph, args.node, args.name)
    check_use(bitmap, BitmapUse.SWITCH)
    bitmap.enable()


@command("block-dirty-bitmap-disable", since="4.0")
async def block_dirty_bitmap_disable(ctx: CommandContext, args: BitmapArguments) -> None:
    """Stop recording in a bitmap; what is dirty stays dirty."""
    _, bitmap = find_bitmap(ctx.system.graph, args.node, args.name)
    check_use(bitmap, BitmapUse.SWITCH)
    bitmap.disable()


@command("block-dirty-bitmap-merge", since="4.0")
async def block_dirty_bitmap_merge(ctx: CommandContext, args: BitmapMergeArguments) -> None:
    """Add what is dirty in other bitmaps to one; all of them or none."""
    graph = ctx.system.graph
    _, target = find_bitmap(graph, args.node, args.target)
    check_use(target, BitmapUse.CHANGE)
    sources = []
    for source in args.bitmaps:
        node_name, name = (args.node, source) if isinstance(source, str) else (source.node, source.name)
        _, bitmap = find_bitmap(graph, node_name, name)
        check_use(bitmap, BitmapUse.READ)
        if bitmap.size != target.size:
            raise CommandError(f"Bitmap '{name}' covers {bitmap.size} bytes, '{args.target}' {target.size}: no merge")
        sources.append(bitmap)
    for bitmap in sources:
        target.merge(bitmap)


@command("x-debug-block-dirty-bitmap-sha256", since="2.10", features=("unstable",), returns=BlockDirtyBitmapSha256)
async def x_debug_block_dirty_bitmap_sha256(ctx: CommandContext, args: BitmapArguments) -> BlockDirtyBitmapSha256:
    """Hash the bits of a bitmap, for tests."""
    _, bitmap = find_bitmap(ctx.system.graph, args.node, args.name)
    return BlockDirtyBitmapSha256(sha256=bitmap.sha256())
