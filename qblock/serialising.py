"""Overlap tracking: requests that must have a range to themselves wait for others, and others wait for them.

Models QEMU's tracked and serialising requests (semantics.md section 16). A read-modify-write reads a block, changes a part
and writes all of it; a copy-on-read writes back what it read. Between their reading and their writing no other write may
touch the range, or it would be undone. Both are *serialising*: they wait for every older write that overlaps, and every
younger overlapping write waits for them.

Differs from QEMU in that nothing is tracked while no serialising request exists, which is nearly always: a plain write then
costs one counter. A serialising request that starts waits once for the writes that are counted but not tracked (their ranges
are not known); writes that start later see ``node.tracking`` and register.

Reads are tracked only on nodes that somebody watches (`watch_reads`): a copy of one moment that shows its source through must
not lose it under a reader.

Waits cannot form a circle: a request waits only for requests that registered before it, and untracked writes wait for nobody.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from qblock.node import BlockDriverState


@attrs.define(eq=False, slots=True)
class TrackedRequest:
    """A write under way on bytes ``start`` to ``end`` (exclusive), and who waits for its end."""

    start: int
    end: int
    serialising: bool
    waiters: list[asyncio.Future[None]] = attrs.field(factory=list)


async def begin_write(node: BlockDriverState, start: int, end: int, *, serialising: bool) -> TrackedRequest | None:
    """Register a write of [start, end) and wait until it may go on; `finish_write` must follow with what this returned.

    None: the write is counted only. A cancelled wait leaves nothing behind.
    """
    if not serialising and not node.tracking:
        node.untracked_writes += 1
        return None
    request = TrackedRequest(start, end, serialising)
    node.tracked[id(request)] = request
    if serialising:
        node.serialising += 1
        node.tracking = True
    try:
        while serialising and node.untracked_writes:
            await _wait(node.untracked_waiters)
        while (other := _older_conflict(node, request)) is not None:
            await _wait(other.waiters)
    except BaseException:
        finish_write(node, request)
        raise
    return request


def finish_write(node: BlockDriverState, request: TrackedRequest | None) -> None:
    """The write has ended, well or badly: let those go on that waited for it."""
    if request is None:
        node.untracked_writes -= 1
        if not node.untracked_writes and node.untracked_waiters:
            wake_waiters(node.untracked_waiters)
        return
    del node.tracked[id(request)]
    if request.serialising:
        node.serialising -= 1
        node.tracking = node.serialising > 0
    wake_waiters(request.waiters)


def watch_reads(node: BlockDriverState) -> None:
    """Track the reads of ``node`` from now on, for `reads_ended`; `unwatch_reads` must follow."""
    node.read_watchers += 1


def unwatch_reads(node: BlockDriverState) -> None:
    """Undo one `watch_reads`."""
    node.read_watchers -= 1


def begin_read(node: BlockDriverState, start: int, end: int) -> TrackedRequest:
    """Register a read of [start, end) of a watched node; `finish_read` must follow."""
    request = TrackedRequest(start, end, serialising=False)
    node.tracked_reads[id(request)] = request
    return request


def finish_read(node: BlockDriverState, request: TrackedRequest) -> None:
    """The read has ended, well or badly."""
    del node.tracked_reads[id(request)]
    wake_waiters(request.waiters)


async def reads_ended(node: BlockDriverState, start: int, end: int) -> None:
    """Wait for the tracked reads of [start, end) that are under way now; later ones are not waited for."""
    for request in list(node.tracked_reads.values()):
        if request.start < end and start < request.end and id(request) in node.tracked_reads:
            await _wait(request.waiters)


def wake_waiters(waiters: list[asyncio.Future[None]]) -> None:
    """Let everybody in the list go on, and empty it."""
    for future in waiters:
        if not future.done():
            future.set_result(None)
    waiters.clear()


def _older_conflict(node: BlockDriverState, request: TrackedRequest) -> TrackedRequest | None:
    # A dict keeps the order of insertion, so everything before the request itself is older.
    for other in node.tracked.values():
        if other is request:
            return None
        overlaps = other.start < request.end and request.start < other.end
        if overlaps and (other.serialising or request.serialising):
            assert isinstance(other, TrackedRequest)
            return other
    raise AssertionError("the request is not registered")


async def _wait(waiters: list[asyncio.Future[None]]) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiters.append(future)
    await future
