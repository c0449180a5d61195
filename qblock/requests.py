"""The border: every request to a node passes here, is checked, aligned, counted and tracked, and goes to the driver.

Models ``bdrv_co_preadv`` and its relatives (semantics.md section 16). Requests are on the level of nodes: reads behind the end
give zeroes, writes behind it grow the node and need the resize permission; range checks against a disk's size are the
`BlockBackend`'s. Differs from QEMU in its fast path: a read or write that needs nothing special (aligned, inside the node, no
bitmap, no serialising neighbour) costs two counters and one call, and never suspends unless the driver does.

All functions raise `BlockIOError` with the driver's errno; ``EPERM``: the node is read-only. Offsets and lengths are bytes.
Block status lives in `status.py` and copy-on-read in `copying_up.py`; both are offered here too.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from qblock.alignment import discard_pieces, read_aligned, write_aligned, zero_aligned
from qblock.chain import skip_filters
from qblock.copying_up import copy_on_read_into, read_and_copy_up
from qblock.drain import enter, leave, wake
from qblock.driver import SupportsPointInTime, SupportsVmState
from qblock.errors import BlockIOError, ImagePoisoned
from qblock.extents import Extent
from qblock.node import BlockDriverState
from qblock.permissions import ChildRole
from qblock.serialising import TrackedRequest, begin_read, begin_write, finish_read, finish_write, wake_waiters
from qblock.status import ChainExtent, block_status, chain_status, is_allocated_above, is_zero
from qblock.units import align_down, align_up
from qblock.zeroes import all_zero, fill_zero

if TYPE_CHECKING:
    from qblock.node import BdrvChild

__all__ = [
    "ChainExtent",
    "block_status",
    "chain_status",
    "copy_on_read_into",
    "copy_range",
    "discard",
    "discard_snapshot",
    "flush",
    "is_allocated_above",
    "is_zero",
    "read_into",
    "read_snapshot_into",
    "refresh_length",
    "snapshot_status",
    "truncate",
    "write_compressed",
    "write_from",
    "write_zeroes",
]

_SECTOR: Final = 512
_FAR_END: Final = 1 << 63
_SAME_CONTENT: Final = (ChildRole.FILTERED, ChildRole.PRIMARY_DATA)


# ---------------------------------------------------------------------------------------------------------------- reads


async def read_into(edge: BdrvChild, offset: int, buffer: memoryview) -> None:
    """Fill all of ``buffer`` from ``offset`` of the node; what lies behind its end reads as zeroes."""
    node = edge.node
    driver = node.driver
    limits = driver.limits
    if (
        offset + len(buffer) > node.length
        or node.copy_on_read
        or node.read_watchers
        or limits.request_alignment != 1
        or limits.max_transfer
    ):
        await _read_carefully(node, offset, buffer)
        return
    node.in_flight += 1
    try:
        await driver.read_into(offset, buffer)
    finally:
        node.in_flight -= 1
        if not node.in_flight and node.idle_waiters:
            wake(node)


async def _read_carefully(node: BlockDriverState, offset: int, buffer: memoryview) -> None:
    inside = max(0, min(len(buffer), node.length - offset))
    if inside < len(buffer):
        fill_zero(buffer[inside:])
        buffer = buffer[:inside]
    if not inside:
        return
    request = begin_read(node, offset, offset + inside) if node.read_watchers else None
    enter(node)
    try:
        if node.copy_on_read and not node.read_only:
            await read_and_copy_up(node, offset, buffer)
        else:
            await read_aligned(node.driver, offset, buffer)
    finally:
        leave(node)
        if request is not None:
            finish_read(node, request)


# --------------------------------------------------------------------------------------------------------------- writes


async def write_from(edge: BdrvChild, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
    """Write all of ``buffer`` at ``offset``; with ``fua`` it is durable on return. The node grows as needed."""
    node = edge.node
    driver = node.driver
    limits = driver.limits
    end = offset + len(buffer)
    if (
        node.tracking
        or node.dirty_bitmaps
        or end > node.length
        or fua
        or node.write_threshold
        or limits.request_alignment != 1
        or limits.max_transfer
        or node.detect_zeroes != "off"
        or node.read_only
        or node.poisoned is not None
        or not edge.may_write
    ):
        await _write_carefully(edge, offset, buffer, fua=fua)
        return
    node.in_flight += 1
    node.untracked_writes += 1
    try:
        await driver.write_from(offset, buffer)
    finally:
        node.write_generation += 1
        if end > node.wr_highest_offset:
            node.wr_highest_offset = end
        node.untracked_writes -= 1
        if node.untracked_waiters and not node.untracked_writes:
            wake_waiters(node.untracked_waiters)
        node.in_flight -= 1
        if not node.in_flight and node.idle_waiters:
            wake(node)


async def _write_carefully(edge: BdrvChild, offset: int, buffer: memoryview, *, fua: bool) -> None:
    node = edge.node
    length = len(buffer)
    if not length or await _write_detected_zeroes(edge, offset, buffer, fua=fua):
        return
    enter(node)
    try:
        request = await _begin(edge, offset, length)
        try:
            await write_aligned(node.driver, offset, buffer)
        finally:
            _finish(node, request, offset, length)
        if fua:
            await flush(node)
    finally:
        leave(node)


async def _write_detected_zeroes(edge: BdrvChild, offset: int, buffer: memoryview, *, fua: bool) -> bool:
    """Write ``buffer`` as zeroes if it is nothing else, and the node is to look for that; False: it is to be written."""
    node = edge.node
    if node.detect_zeroes == "off" or not node.driver.supports_write_zeroes or not all_zero(buffer):
        return False
    await write_zeroes(edge, offset, len(buffer), may_unmap=node.detect_zeroes == "unmap", fua=fua)
    return True


async def write_zeroes(
    edge: BdrvChild, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
) -> None:
    """Make the range read as zeroes, cheaply where the driver can.

    ``may_unmap`` allows to give the space back, and counts only on nodes with ``discard=unmap``. Where the driver cannot,
    buffers of zeroes are written, or with ``no_fallback`` ``BlockIOError(ENOTSUP)`` is raised (a part may be zeroed then).
    """
    if not length:
        return
    node = edge.node
    enter(node)
    try:
        request = await _begin(edge, offset, length)
        try:
            await zero_aligned(
                node.driver, offset, length, may_unmap=may_unmap and node.discard_unmap, no_fallback=no_fallback
            )
        finally:
            _finish(node, request, offset, length)
        if fua:
            await flush(node)
    finally:
        leave(node)


async def write_compressed(edge: BdrvChild, offset: int, buffer: memoryview) -> None:
    """Store whole clusters in packed form. ``BlockIOError``: ENOTSUP where the format cannot, EIO where something is stored."""
    node = edge.node
    if not node.driver.supports_compressed:
        raise BlockIOError(errno.ENOTSUP)
    if not len(buffer) or await _write_detected_zeroes(edge, offset, buffer, fua=False):
        return
    enter(node)
    try:
        request = await _begin(edge, offset, len(buffer))
        try:
            await node.driver.write_compressed(offset, buffer)
        finally:
            _finish(node, request, offset, len(buffer))
    finally:
        leave(node)


async def load_vm_state(node: BlockDriverState, offset: int, buffer: memoryview) -> None:
    """Read what a machine keeps beside the disk. ``BlockIOError(ENOTSUP)``: the format has no place for it."""
    enter(node)
    try:
        await _keeper_of_state(node).load_vm_state(offset, buffer)
    finally:
        leave(node)


async def save_vm_state(edge: BdrvChild, offset: int, buffer: memoryview) -> None:
    """Write what a machine keeps beside the disk; raises as `load_vm_state`."""
    node = edge.node
    keeper = _keeper_of_state(node)
    _check_write(edge)
    enter(node)
    try:
        await keeper.save_vm_state(offset, buffer)
        node.write_generation += 1
    finally:
        leave(node)


def _keeper_of_state(node: BlockDriverState) -> SupportsVmState:
    driver = skip_filters(node).driver
    if not isinstance(driver, SupportsVmState):
        raise BlockIOError(errno.ENOTSUP)
    return driver


async def discard(edge: BdrvChild, offset: int, length: int) -> None:
    """The content of the range is no longer needed.

    Without effect where the node lacks ``discard=unmap``, where the driver cannot, and behind the end of the node.
    """
    node = edge.node
    length = min(length, node.length - offset)
    if length <= 0:
        return
    _check_write(edge)
    if not (node.discard_unmap and node.driver.supports_discard):
        return
    enter(node)
    try:
        request = await _begin(edge, offset, length, whole_blocks=False)
        try:
            await discard_pieces(node.driver, offset, length)
        finally:
            _finish(node, request, offset, length, whole_blocks=False)
    finally:
        leave(node)


def _check_write(edge: BdrvChild) -> None:
    """Raise when the node refuses writes; a user without the write permission is a bug."""
    _check_changeable(edge.node)
    assert edge.may_write, f"{edge!r} writes without the permission"


def _check_changeable(node: BlockDriverState) -> None:
    """Raise when the node refuses to be changed, by whomever."""
    if node.read_only:
        raise BlockIOError(errno.EPERM, f"Node '{node.node_name}' is read-only")
    if node.poisoned is not None:
        raise ImagePoisoned(node.node_name, node.poisoned)
    for bitmap in node.dirty_bitmaps:
        if bitmap.readonly:
            raise BlockIOError(
                errno.EPERM,
                f"Node '{node.node_name}' has the read-only bitmap '{bitmap.name}', which a write would make wrong",
            )


async def _begin(edge: BdrvChild, offset: int, length: int, *, whole_blocks: bool = True) -> TrackedRequest | None:
    """Check a change of the range, report the write threshold, and wait for overlapping serialising requests.

    With ``whole_blocks`` a range that covers blocks in part becomes a serialising request on the whole blocks.
    """
    _check_write(edge)
    node = edge.node
    end = offset + length
    assert end <= node.length or edge.may_resize, f"{edge!r} grows the node without the resize permission"
    if node.write_threshold and end > node.write_threshold:
        _report_threshold(node, end)
    alignment = node.driver.limits.request_alignment
    if alignment != 1 and whole_blocks and (offset % alignment or end % alignment):
        return await begin_write(node, align_down(offset, alignment), align_up(end, alignment), serialising=True)
    return await begin_write(node, offset, end, serialising=False)


def _finish(
    node: BlockDriverState, request: TrackedRequest | None, offset: int, length: int, *, whole_blocks: bool = True
) -> None:
    """Book a change of the range that has ended, also when it failed: it may have changed a part. As in QEMU, blocks that were
    written back whole count as changed.
    """
    end = offset + length
    node.write_generation += 1
    if end > node.wr_highest_offset:
        node.wr_highest_offset = end
    if end > node.length:
        refresh_length(node)
    if node.dirty_bitmaps:
        alignment = node.driver.limits.request_alignment if whole_blocks else 1
        start = align_down(offset, alignment)
        covered = min(align_up(end, alignment), max(node.length, end)) - start
        for bitmap in node.dirty_bitmaps:
            bitmap.set(start, covered)
    finish_write(node, request)


def _report_threshold(node: BlockDriverState, end: int) -> None:
    threshold, node.write_threshold = node.write_threshold, 0
    node.driver.env.emit(
        "BLOCK_WRITE_THRESHOLD",
        {"node-name": node.node_name, "amount-exceeded": end - threshold, "write-threshold": threshold},
    )


# ----------------------------------------------------------------------------------------------------- flush and size


async def flush(node: BlockDriverState) -> None:
    """Make all completed writes durable. A node whose driver is the storage is skipped when nothing was written since the
    last flush, or with ``cache.no-flush``; so are filters that say so. Format drivers are always asked, they know what they
    hold back.
    """
    if node.poisoned is not None:
        raise ImagePoisoned(node.node_name, node.poisoned)
    generation = node.write_generation
    is_clean = generation == node.flushed_generation
    if (node.driver.is_protocol and (node.cache_no_flush or is_clean)) or (is_clean and node.driver.flushes_writes_only):
        return
    enter(node)
    try:
        await node.driver.flush()
    finally:
        leave(node)
    if generation > node.flushed_generation:
        node.flushed_generation = generation


def refresh_length(node: BlockDriverState) -> None:
    """Take over the driver's size (after open, growth, truncate), rounded up to 512, for the node, its bitmaps and parents."""
    length = align_up(node.driver.length(), _SECTOR)
    if length == node.length:
        return
    node.length = length
    for bitmap in node.dirty_bitmaps:
        bitmap.truncate(length)
    refresh_lengths_above(node)


def refresh_lengths_above(node: BlockDriverState) -> None:
    """Let the parents of ``node`` that are as long as what they lie on, as filters and raw windows are, look at it again."""
    for edge in node.parents:
        if edge.role in _SAME_CONTENT and isinstance(edge.parent, BlockDriverState):
            refresh_length(edge.parent)


async def truncate(edge: BdrvChild, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
    """Change the size of the node to ``length``; an added area reads as zeroes, whatever a longer backing node holds there.

    ``exact=False`` allows a storage that cannot shrink to stay longer. ``preallocation`` is a ``PreallocMode``.
    """
    node = edge.node
    _check_changeable(node)
    assert edge.may_resize, f"{edge!r} resizes without the permission"
    enter(node)
    try:
        request = await begin_write(node, min(length, node.length), _FAR_END, serialising=True)
        try:
            old = node.length
            await node.driver.truncate(length, exact=exact, preallocation=preallocation)
            node.write_generation += 1
            if (backing := node.backing) is not None and (end := min(length, backing.node.length)) > old:
                await zero_aligned(node.driver, old, end - old, may_unmap=False, no_fallback=False)
        finally:
            refresh_length(node)
            finish_write(node, request)
    finally:
        leave(node)


# --------------------------------------------------------------------------------------------- what was at one moment


async def read_snapshot_into(edge: BdrvChild, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` with what was at ``offset`` when the node began to keep it; ``ENOTSUP`` where nobody does."""
    with _point_in_time(edge.node) as driver:
        await driver.read_snapshot_into(offset, buffer)


async def snapshot_status(edge: BdrvChild, offset: int, length: int, *, want_zero: bool = True) -> Extent:
    """What was stored there then, as a block status; ``ENOTSUP`` likewise."""
    with _point_in_time(edge.node) as driver:
        return await driver.snapshot_status(offset, length, want_zero=want_zero)


async def discard_snapshot(edge: BdrvChild, offset: int, length: int) -> None:
    """What was there then need not be kept; ``ENOTSUP`` likewise."""
    with _point_in_time(edge.node) as driver:
        await driver.discard_snapshot(offset, length)


@contextmanager
def _point_in_time(node: BlockDriverState) -> Iterator[SupportsPointInTime]:
    if not isinstance(node.driver, SupportsPointInTime):
        raise BlockIOError(errno.ENOTSUP, f"Node '{node.node_name}' ({node.driver.name}) keeps no snapshot")
    enter(node)
    try:
        yield node.driver
    finally:
        leave(node)


# ----------------------------------------------------------------------------------------------------------- copy range


async def copy_range(source: BdrvChild, source_offset: int, target: BdrvChild, target_offset: int, length: int) -> None:
    """Copy inside the storage, without a buffer. ``BlockIOError(ENOTSUP)``: copy by buffer (a part may be copied already).

    The request first goes down the source's nodes to the storage, then down the target's; each translates its side.
    """
    node = source.node
    if not node.driver.supports_copy_range or not target.node.driver.supports_copy_range:
        raise BlockIOError(errno.ENOTSUP)
    if source_offset + length > node.length or node.read_watchers:
        raise BlockIOError(errno.ENOTSUP)
    enter(node)
    try:
        if node.driver.is_protocol:
            await _receive_range(source, source_offset, target, target_offset, length)
        else:
            await node.driver.copy_range(source_offset, target, target_offset, length)
    finally:
        leave(node)


async def _receive_range(
    source: BdrvChild, source_offset: int, target: BdrvChild, target_offset: int, length: int
) -> None:
    node = target.node
    alignment = node.driver.limits.request_alignment
    if alignment != 1 and (target_offset % alignment or length % alignment):
        raise BlockIOError(errno.ENOTSUP)
    enter(node)
    try:
        request = await _begin(target, target_offset, length)
        try:
            if node.driver.is_protocol:
                await source.node.driver.copy_range(source_offset, target, target_offset, length)
            else:
                await node.driver.receive_range(target_offset, source, source_offset, length)
        finally:
            _finish(node, request, target_offset, length)
    finally:
        leave(node)
