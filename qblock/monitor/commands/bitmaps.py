"""Dirty bitmap commands; what they do is in `qblock.actions.bitmaps`, and can be a part of a transaction."""

from __future__ import annotations

import attrs

from qblock.actions.bitmaps import (
    AddBitmap,
    BitmapName,
    ClearBitmap,
    DisableBitmap,
    EnableBitmap,
    MergeBitmaps,
    RemoveBitmap,
    find_bitmap,
)
from qblock.monitor.command import CommandContext, command
from qblock.monitor.replies import BlockDirtyBitmapSha256
from qblock.options import option, required
from qblock.system import BlockSystem


@attrs.frozen
class BitmapArguments:
    """Names a bitmap."""

    node: str = required(doc="device or node that has the bitmap")
    name: str = required(doc="name of the bitmap")

    @property
    def bitmap(self) -> BitmapName:
        """What is named."""
        return BitmapName(self.node, self.name)


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


def add_action(system: BlockSystem, args: BitmapAddArguments) -> AddBitmap:
    """The action of block-dirty-bitmap-add."""
    return AddBitmap(
        system,
        BitmapName(args.node, args.name),
        granularity=args.granularity,
        persistent=args.persistent,
        disabled=args.disabled,
    )


def remove_action(system: BlockSystem, args: BitmapArguments) -> RemoveBitmap:
    """The action of block-dirty-bitmap-remove."""
    return RemoveBitmap(system, args.bitmap)


def clear_action(system: BlockSystem, args: BitmapArguments) -> ClearBitmap:
    """The action of block-dirty-bitmap-clear."""
    return ClearBitmap(system, args.bitmap)


def enable_action(system: BlockSystem, args: BitmapArguments) -> EnableBitmap:
    """The action of block-dirty-bitmap-enable."""
    return EnableBitmap(system, args.bitmap)


def disable_action(system: BlockSystem, args: BitmapArguments) -> DisableBitmap:
    """The action of block-dirty-bitmap-disable."""
    return DisableBitmap(system, args.bitmap)


def merge_action(system: BlockSystem, args: BitmapMergeArguments) -> MergeBitmaps:
    """The action of block-dirty-bitmap-merge."""
    sources = [BitmapName(args.node, ref) if isinstance(ref, str) else BitmapName(ref.node, ref.name) for ref in args.bitmaps]
    return MergeBitmaps(system, BitmapName(args.node, args.target), sources)


@command("block-dirty-bitmap-add", since="2.4")
async def block_dirty_bitmap_add(ctx: CommandContext, args: BitmapAddArguments) -> None:
    """Begin to record which parts of a node change."""
    add_action(ctx.system, args).perform_alone()


@command("block-dirty-bitmap-remove", since="2.4")
async def block_dirty_bitmap_remove(ctx: CommandContext, args: BitmapArguments) -> None:
    """Forget a bitmap."""
    action = remove_action(ctx.system, args)
    action.perform_alone()
    await action.forget()


@command("block-dirty-bitmap-clear", since="2.4")
async def block_dirty_bitmap_clear(ctx: CommandContext, args: BitmapArguments) -> None:
    """Make all of a bitmap clean."""
    clear_action(ctx.system, args).perform_alone()


@command("block-dirty-bitmap-enable", since="4.0")
async def block_dirty_bitmap_enable(ctx: CommandContext, args: BitmapArguments) -> None:
    """Record writes in a bitmap from now on."""
    enable_action(ctx.system, args).perform_alone()


@command("block-dirty-bitmap-disable", since="4.0")
async def block_dirty_bitmap_disable(ctx: CommandContext, args: BitmapArguments) -> None:
    """Stop recording in a bitmap; what is dirty stays dirty."""
    disable_action(ctx.system, args).perform_alone()


@command("block-dirty-bitmap-merge", since="4.0")
async def block_dirty_bitmap_merge(ctx: CommandContext, args: BitmapMergeArguments) -> None:
    """Add what is dirty in other bitmaps to one; all of them or none."""
    merge_action(ctx.system, args).perform_alone()


@command("x-debug-block-dirty-bitmap-sha256", since="2.10", features=("unstable",), returns=BlockDirtyBitmapSha256)
async def x_debug_block_dirty_bitmap_sha256(ctx: CommandContext, args: BitmapArguments) -> BlockDirtyBitmapSha256:
    """Hash the bits of a bitmap, for tests."""
    _, bitmap = find_bitmap(ctx.system.graph, args.node, args.name)
    return BlockDirtyBitmapSha256(sha256=bitmap.sha256())
