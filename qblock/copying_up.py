"""Copy-on-read: what is read from below a node is kept in the node.

Models QEMU's ``BDRV_REQ_COPY_ON_READ`` (semantics.md section 16). Reads are rounded to the node's clusters and done in pieces of
at most 16 MiB; each piece is a serialising request, so that no guest write can come between reading old data and writing them
here. Zeroes are written as zero writes. The content of the node does not change, so bitmaps stay as they are and the permission
needed is *write unchanged*. A failed write is reported to the reader.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qblock.alignment import read_aligned, write_aligned, zero_aligned
from qblock.drain import enter, leave
from qblock.errors import ImagePoisoned
from qblock.extents import Unallocated
from qblock.serialising import begin_write, finish_write
from qblock.status import block_status
from qblock.units import MiB, align_down, align_up
from qblock.zeroes import all_zero, fill_zero

if TYPE_CHECKING:
    from qblock.node import BdrvChild, BlockDriverState

_PIECE = 16 * MiB


async def copy_on_read_into(edge: BdrvChild, offset: int, buffer: memoryview) -> None:
    """Read like ``requests.read_into``, and keep in the node what came from its backing nodes."""
    node = edge.node
    assert not node.read_only, f"{node!r} cannot keep what is read"
    inside = max(0, min(len(buffer), node.length - offset))
    fill_zero(buffer[inside:])
    enter(node)
    try:
        await read_and_copy_up(node, offset, buffer[:inside])
    finally:
        leave(node)


async def read_and_copy_up(node: BlockDriverState, offset: int, buffer: memoryview) -> None:
    """The same for a request that is counted and inside the node."""
    cluster = max(node.driver.info().cluster_size, node.driver.limits.request_alignment)
    done = 0
    while done < len(buffer):
        start = align_down(offset + done, cluster)
        end = min(align_up(offset + len(buffer), cluster), start + max(_PIECE, cluster), node.length)
        count = min(end - offset, len(buffer)) - done
        await _piece(node, start, end, into=buffer[done : done + count], at=offset + done)
        done += count


async def _piece(node: BlockDriverState, start: int, end: int, *, into: memoryview, at: int) -> None:
    """Copy up [start, end), whole clusters, and fill ``into`` from ``at``, which lies inside."""
    request = await begin_write(node, start, end, serialising=True)
    try:
        while start < end:
            extent = await block_status(node, start, end - start, want_zero=False)
            stop = start + extent.length
            first, last = max(at, start), min(at + len(into), stop)
            wanted = into[first - at : last - at] if first < last else into[:0]
            if isinstance(extent, Unallocated):
                await _copy_up(node, start, stop, into=wanted, at=first)
            elif wanted:
                await read_aligned(node.driver, first, wanted)
            start = stop
    finally:
        finish_write(node, request)


async def _copy_up(node: BlockDriverState, start: int, end: int, *, into: memoryview, at: int) -> None:
    if node.poisoned is not None:
        raise ImagePoisoned(node.node_name, node.poisoned)
    whole = len(into) == end - start
    data = into if whole else memoryview(bytearray(end - start))
    await read_aligned(node.driver, start, data)
    node.driver.debug_event("cor_write")
    if all_zero(data):
        await zero_aligned(node.driver, start, end - start, may_unmap=False, no_fallback=False)
    else:
        await write_aligned(node.driver, start, data)
    node.write_generation += 1
    if not whole:
        into[:] = data[at - start : at - start + len(into)]
