"""``qblock-img convert --bitmaps``: the persistent bitmaps of the source's top image are copied to the new image.

Models semantics.md section 19 (convert). Inconsistent bitmaps end the run before anything is copied, unless they are to be
skipped. Differs from QEMU: so does a target that cannot take the bitmaps.
"""

from __future__ import annotations

from qblock.bitmaps import check_merge, new_bitmap
from qblock.chain import skip_filters
from qblock.dirty import DirtyBitmap
from qblock.driver import SupportsBitmaps
from qblock.environment import Environment
from qblock.errors import CommandError
from qblock.node import BlockDriverState
from qblock.tools.arguments import Arguments


def check_options(arguments: Arguments, sources: int) -> None:
    """Raise `CommandError` for options that contradict each other."""
    if "skip-broken-bitmaps" in arguments and "bitmaps" not in arguments:
        raise CommandError("--skip-broken-bitmaps requires --bitmaps: otherwise no bitmap is copied")
    if "bitmaps" in arguments and sources > 1:
        raise CommandError("--bitmaps takes the bitmaps of one image: it cannot be used with several")


def check_source(source: BlockDriverState, *, skip_broken: bool) -> None:
    """Raise `CommandError` when the bitmaps of this image cannot be copied."""
    source = skip_filters(source)
    if not _can_have_bitmaps(source):
        raise CommandError(f"the source ('{source.driver.name}') cannot have bitmaps that could be copied: leave out --bitmaps")
    broken = [bitmap.name for bitmap in _stored(source) if bitmap.inconsistent]
    if broken and not skip_broken:
        raise CommandError(
            f"Cannot copy the inconsistent bitmap '{broken[0]}': use --skip-broken-bitmaps, or remove it from the "
            "source with 'qblock-img bitmap --remove'"
        )


def check_target(source: BlockDriverState, target: BlockDriverState) -> None:
    """Raise `CommandError` when ``target`` could not be given the bitmaps of ``source``."""
    source, target = skip_filters(source), skip_filters(target)
    if not _can_have_bitmaps(target):
        raise CommandError(f"the output ('{target.driver.name}') cannot have bitmaps: leave out --bitmaps")
    for bitmap in _stored(source):
        if not bitmap.inconsistent:
            _copy_of(bitmap, target)


async def copy_bitmaps(source: BlockDriverState, target: BlockDriverState, env: Environment) -> None:
    """Give ``target`` the persistent bitmaps of ``source``, durably; inconsistent ones are skipped with a warning."""
    source, target = skip_filters(source), skip_filters(target)
    for bitmap in reversed(_stored(source)):
        if bitmap.inconsistent:
            env.warn(f"Skipping inconsistent bitmap '{bitmap.name}'")
            continue
        copy = _copy_of(bitmap, target)
        copy.merge(bitmap)
        target.dirty_bitmaps.append(copy)
    assert isinstance(target.driver, SupportsBitmaps), "checked before"
    await target.driver.store_bitmaps()


def _can_have_bitmaps(node: BlockDriverState) -> bool:
    return isinstance(node.driver, SupportsBitmaps) and node.driver.can_store_bitmaps


def _copy_of(bitmap: DirtyBitmap, target: BlockDriverState) -> DirtyBitmap:
    """An empty bitmap for ``target`` with the properties of ``bitmap``, which can be merged into it."""
    name = bitmap.name or ""
    copy = new_bitmap(target, name, granularity=bitmap.granularity, persistent=True, enabled=bitmap.recording)
    check_merge(bitmap, copy)
    return copy


def _stored(node: BlockDriverState) -> list[DirtyBitmap]:
    return [bitmap for bitmap in node.dirty_bitmaps if bitmap.persistent]
