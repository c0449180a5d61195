"""Requests of any offset and length, cut into what a driver takes: padding, splitting, zeroes in pieces.

Models the padding and fragmenting part of QEMU's I/O core (semantics.md section 16). These functions call the driver and do
no accounting: `requests.py` and `copying_up.py` have checked, registered and counted the request before. Where a part of a
block is written, the caller holds the whole block as a serialising request. Offsets and lengths are bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qblock.errors import BlockIOError
from qblock.units import align_down, align_up
from qblock.zeroes import ZERO_PIECE, zero_view

if TYPE_CHECKING:
    from qblock.driver import Driver


async def read_aligned(driver: Driver, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer``; if blocks are asked for in part, all of them are read into a buffer of their own."""
    alignment = driver.limits.request_alignment
    end = offset + len(buffer)
    start, stop = align_down(offset, alignment), align_up(end, alignment)
    if (start, stop) == (offset, end):
        await _read_split(driver, offset, buffer)
        return
    blocks = memoryview(bytearray(stop - start))
    await _read_split(driver, start, blocks)
    buffer[:] = blocks[offset - start : end - start]


async def write_aligned(driver: Driver, offset: int, buffer: memoryview) -> None:
    """Write all of ``buffer``; blocks at its ends that are changed in part are read first, and all is written at once."""
    alignment = driver.limits.request_alignment
    end = offset + len(buffer)
    start, stop = align_down(offset, alignment), align_up(end, alignment)
    if (start, stop) == (offset, end):
        await _write_split(driver, offset, buffer)
        return
    blocks = memoryview(bytearray(stop - start))
    parts = [name for name, is_part in (("head", start < offset), ("tail", end < stop)) if is_part]
    if len(blocks) <= len(parts) * alignment:  # nothing lies between the ends, so that one read does
        await _read_parts(driver, parts, start, blocks)
    elif "head" in parts:
        await _read_parts(driver, ["head"], start, blocks[:alignment])
    if "tail" in parts and len(blocks) > len(parts) * alignment:
        await _read_parts(driver, ["tail"], stop - alignment, blocks[-alignment:])
    blocks[offset - start : end - start] = buffer
    await _write_split(driver, start, blocks)


async def _read_parts(driver: Driver, parts: Sequence[str], start: int, blocks: memoryview) -> None:
    for part in parts:
        driver.debug_event(f"pwritev_rmw_{part}")
    await _read_split(driver, start, blocks)
    for part in parts:
        driver.debug_event(f"pwritev_rmw_after_{part}")


async def zero_aligned(driver: Driver, offset: int, length: int, *, may_unmap: bool, no_fallback: bool) -> None:
    """Make the range read as zeroes: parts of blocks as data, the rest as head, bulk and tail of the driver's zero unit."""
    limits = driver.limits
    alignment = limits.request_alignment
    end = offset + length
    if no_fallback and (offset % alignment or end % alignment):
        raise _needs_a_buffer(driver)
    start = min(-(-offset // alignment) * alignment, end)
    stop = max(align_down(end, alignment), start)
    if start > offset:
        await write_aligned(driver, offset, zero_view(start - offset))
    unit, maximum = max(limits.zero_alignment, alignment), _whole_blocks(driver, limits.max_write_zeroes)
    for at, count in pieces(start, stop - start, unit=unit, maximum=maximum):
        await _zero_piece(driver, at, count, may_unmap=may_unmap, no_fallback=no_fallback)
    if end > stop:
        await write_aligned(driver, stop, zero_view(end - stop))


async def discard_pieces(driver: Driver, offset: int, length: int) -> None:
    """Pass a discard to the driver in pieces; a part of a block, and a piece that it does not support, are left as they are."""
    limits = driver.limits
    start, stop = align_up(offset, limits.request_alignment), align_down(offset + length, limits.request_alignment)
    unit = max(limits.discard_alignment, limits.request_alignment)
    for at, count in pieces(start, stop - start, unit=unit, maximum=limits.max_discard):
        try:
            await driver.discard(at, count)
        except BlockIOError as error:
            if error.errno != errno.ENOTSUP:
                raise


def pieces(offset: int, length: int, *, unit: int, maximum: int) -> Iterator[tuple[int, int]]:
    """Cut a range into (offset, length): a head up to the first multiple of ``unit``, whole units, and a tail.

    ``maximum`` limits a piece (0: no limit); it counts in whole units where it holds at least one.
    """
    end = offset + length
    most = maximum or length
    if most > unit:
        most = align_down(most, unit)
    while offset < end:
        if misplaced := offset % unit:
            count = min(unit - misplaced, end - offset)
        elif end - offset >= unit:
            count = align_down(end - offset, unit)
        else:
            count = end - offset
        count = min(count, most)
        yield offset, count
        offset += count


async def _zero_piece(driver: Driver, offset: int, length: int, *, may_unmap: bool, no_fallback: bool) -> None:
    if driver.supports_write_zeroes:
        try:
            await driver.write_zeroes(offset, length, may_unmap=may_unmap, no_fallback=no_fallback)
        except BlockIOError as error:
            if error.errno != errno.ENOTSUP:
                raise
        else:
            return
    if no_fallback:
        raise _needs_a_buffer(driver)
    for at, count in pieces(offset, length, unit=driver.limits.request_alignment, maximum=ZERO_PIECE):
        await _write_split(driver, at, zero_view(count))


def _needs_a_buffer(driver: Driver) -> BlockIOError:
    return BlockIOError(errno.ENOTSUP, f"Node '{driver.node.node_name}' cannot write zeroes without a buffer")


async def _read_split(driver: Driver, offset: int, buffer: memoryview) -> None:
    step = _whole_blocks(driver, driver.limits.max_transfer)
    if not step or len(buffer) <= step:
        await driver.read_into(offset, buffer)
        return
    for start in range(0, len(buffer), step):
        await driver.read_into(offset + start, buffer[start : start + step])


async def _write_split(driver: Driver, offset: int, buffer: memoryview) -> None:
    step = _whole_blocks(driver, driver.limits.max_transfer)
    if not step or len(buffer) <= step:
        await driver.write_from(offset, buffer)
        return
    for start in range(0, len(buffer), step):
        await driver.write_from(offset + start, buffer[start : start + step])


def _whole_blocks(driver: Driver, limit: int) -> int:
    """A limit of the driver in whole blocks of its request alignment, at least one; 0 stays: no limit."""
    alignment = driver.limits.request_alignment
    return max(align_down(limit, alignment), alignment) if limit else 0
