"""Rewriting: a part of a node is read and written back, and nobody else's write gets in between.

Models what image streaming through the ``blkmirror`` of March 2012 does to every part of the disk (rfc-2012.md, "What it is
compared with"): the node's content stays the same, but what lies below, and beside, has been given all of it. Like copy-on-read
(`copying_up.py`) it is a serialising request: a guest's write waits for it, or it for the write, so it never puts old data over
new ones. Bitmaps stay as they are, and the permission needed is *write unchanged*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qblock.alignment import read_aligned, write_aligned, zero_aligned
from qblock.drain import enter, leave
from qblock.errors import ImagePoisoned
from qblock.serialising import begin_write, finish_write
from qblock.status import chain_status
from qblock.units import align_down, align_up
from qblock.zeroes import all_zero

if TYPE_CHECKING:
    from qblock.node import BdrvChild, BlockDriverState


async def rewrite(edge: BdrvChild, offset: int, length: int, buffer: memoryview) -> None:
    """Read ``length`` bytes at ``offset`` and write them back; zeroes as zero writes, which may give space back.

    ``buffer`` is for the data of one request, of which there are several when it is shorter than the range. The range must lie
    inside the node. Raises `BlockIOError`, `ImagePoisoned`.
    """
    node = edge.node
    assert edge.may_write and not node.read_only, f"{edge!r} rewrites without the permission"
    alignment = node.driver.limits.request_alignment
    enter(node)
    try:
        start, end = align_down(offset, alignment), align_up(offset + length, alignment)
        request = await begin_write(node, start, end, serialising=True)
        try:
            done = 0
            while done < length:
                done += await _run(node, offset + done, length - done, buffer)
        finally:
            node.write_generation += 1
            finish_write(node, request)
    finally:
        leave(node)


async def _run(node: BlockDriverState, offset: int, length: int, buffer: memoryview) -> int:
    """The first run of data or zeroes; the range is the caller's own meanwhile. Returns how many bytes it has."""
    if node.poisoned is not None:
        raise ImagePoisoned(node.node_name, node.poisoned)
    extent = await chain_status(node, offset, length)
    count = extent.length
    if not extent.zero:
        count = min(count, len(buffer))
        data = buffer[:count]
        await read_aligned(node.driver, offset, data)
        if not all_zero(data):
            await write_aligned(node.driver, offset, data)
            return count
    await zero_aligned(node.driver, offset, count, may_unmap=node.discard_unmap, no_fallback=False)
    return count
