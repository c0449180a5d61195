"""The ``copy-before-write`` filter: what a guest is about to overwrite is copied to another node first.

Models QEMU's filter of that name (semantics.md section 17). From when it is opened on, source and target together hold
the disk as it was at that moment: what has been overwritten since is in ``target``, the rest still in ``file``. It is given
by the user, for fleecing, or by a backup job (`jobs.backup`), which copies the rest beside the guest with the same `CopyAside`.

Who wants to read that old disk does so by way of a ``snapshot-access`` node above this one: `read_snapshot_into` and its
siblings. A read of what is still in the source holds up writes to that place until it has ended.

When a copy fails, or takes longer than ``cbw-timeout`` seconds, either the guest's write fails with it and nothing is lost
(``break-guest-write``), or the guest's write goes on and the old disk can be read no more (``break-snapshot``).

Differs from QEMU 7.2: above the filter of a backup by a bitmap nothing but what the bitmap says can be read (there QEMU gives
what happens to be in the target, where a guest has written); a discard by the reader need not be of whole clusters (QEMU dies of
others), and where the target is shorter than the source the copy fails (QEMU dies of that, too).
"""

from __future__ import annotations

import asyncio
import enum
import errno
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import frozen

from qblock import requests
from qblock.bitmaps import BitmapUse, bitmap_of, check_use
from qblock.copying_aside import CopyAside, CopyCall, CopyFailure
from qblock.dirty import DirtyBitmap
from qblock.drain import enter, leave
from qblock.errors import BlockIOError, CommandError, InvalidParameter
from qblock.extents import Data, Extent, Zero
from qblock.filtering import FilterDriver
from qblock.options import ChildRef, DriverOptions, child, option, required
from qblock.permissions import ChildRole, Perm, PermissionPair
from qblock.serialising import TrackedRequest, wake_waiters
from qblock.units import SECOND_NS, align_down, align_up

if TYPE_CHECKING:
    from qblock.node import BdrvChild

_UINT32_MAX = (1 << 32) - 1


class OnCbwError(enum.Enum):
    """What a copy that fails spoils; the values are the wire names."""

    BREAK_GUEST_WRITE = "break-guest-write"
    BREAK_SNAPSHOT = "break-snapshot"


@frozen
class BitmapOfNode:
    """``BlockDirtyBitmap``: names a bitmap."""

    node: str = required(doc="device or node that has the bitmap")
    name: str = required(doc="name of the bitmap")


@frozen
class CopyBeforeWriteOptions(DriverOptions):
    """``BlockdevOptionsCbw``."""

    file: ChildRef = child(ChildRole.FILTERED, doc="the node that is written to")
    target: ChildRef = child(ChildRole.DATA, doc="the node that keeps what was there before")
    bitmap: BitmapOfNode | None = option(None, doc="what is to be kept; all of the disk without one", since="7.0")
    on_cbw_error: OnCbwError = option(
        OnCbwError.BREAK_GUEST_WRITE, doc="what a failed copy spoils: the guest's write or the snapshot", since="7.1"
    )
    cbw_timeout: int = option(0, doc="seconds after which a copy counts as failed, 0 for never", since="7.1")


class CopyBeforeWriteDriver(FilterDriver):
    """See the module. `begin` starts the watch; ``copies`` is there from then on."""

    name: ClassVar[str] = "copy-before-write"
    options_class: ClassVar[type[DriverOptions]] = CopyBeforeWriteOptions
    supports_reopen: ClassVar[bool] = False

    options: CopyBeforeWriteOptions
    copies: CopyAside
    snapshot_is_broken: bool = False
    _done: DirtyBitmap
    """What has to be read from the target."""
    _readable: DirtyBitmap
    """What readers of the snapshot may ask for."""

    @property
    def target(self) -> BdrvChild:
        """The edge to the node that keeps what was there before."""
        return self.node.children["target"]

    async def open(self) -> None:
        """See `Driver`. Raises `InvalidParameter`, `NodeNotFound` and `CommandError`."""
        if not 0 <= self.options.cbw_timeout <= _UINT32_MAX:
            raise InvalidParameter("cbw-timeout", f"must be from 0 to {_UINT32_MAX} seconds")
        wanted = None
        if (ref := self.options.bitmap) is not None:
            wanted = bitmap_of(self.env.find_node(ref.node), ref.name)
            check_use(wanted, BitmapUse.READ)
            if wanted.size != self.child.node.length:
                raise CommandError(
                    f"Bitmap '{ref.name}' covers {wanted.size} bytes and the disk has {self.child.node.length}"
                )
        self.begin(wanted)

    def begin(self, wanted: DirtyBitmap | None = None) -> None:
        """Keep everything, or what is dirty in ``wanted``, from now on; the children are attached."""
        size = self.child.node.length
        self.copies = copies = CopyAside(self.child, self.target)
        self._done = DirtyBitmap(size, copies.cluster, enabled=False)
        self._readable = DirtyBitmap(size, copies.cluster, enabled=False)
        if wanted is None:
            copies.pending.mark(0, size)
        else:
            copies.pending.merge(wanted)
        self._readable.merge(copies.pending)
        self.node.dirty_bitmaps += [self._done, self._readable]
        self._readers: list[TrackedRequest] = []
        self._background: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """See `Driver`."""
        self.end()

    def end(self) -> None:
        """Stop watching, and let go of the nodes; may be called again, and before `begin`."""
        if hasattr(self, "copies"):
            self.copies.close()

    # ---------------------------------------------------------------------------------------------- what guests change

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        await self._keep(offset, len(buffer))
        await super().write_from(offset, buffer, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`."""
        await self._keep(offset, length)
        await super().write_zeroes(offset, length, may_unmap=may_unmap, no_fallback=no_fallback, fua=fua)

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`."""
        await self._keep(offset, length)
        await super().discard(offset, length)

    async def receive_range(self, offset: int, source: BdrvChild, source_offset: int, length: int) -> None:
        """See `Driver`."""
        await self._keep(offset, length)
        await super().receive_range(offset, source, source_offset, length)

    async def _keep(self, offset: int, length: int) -> None:
        """Return when the range may be overwritten; raises the error of a copy that spoils the guest's write."""
        if self.snapshot_is_broken:
            return
        failure = await (self._ensure_in_time(offset, length) if self.options.cbw_timeout else self.copies.ensure(offset, length))
        start, end = align_down(offset, self.copies.cluster), align_up(offset + length, self.copies.cluster)
        if failure is None:
            self._done.mark(start, end - start)
        elif self.options.on_cbw_error is OnCbwError.BREAK_GUEST_WRITE:
            raise failure.error
        else:
            self.snapshot_is_broken = True
        for reader in self._readers.copy():
            if reader in self._readers and reader.start < end and start < reader.end:
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                reader.waiters.append(waiter)
                await waiter

    async def _ensure_in_time(self, offset: int, length: int) -> CopyFailure | None:
        """Wait for the copy no longer than is allowed. One that takes longer goes on to its end, for nobody."""
        over: asyncio.Future[CopyFailure | None] = asyncio.get_running_loop().create_future()
        call = CopyCall()
        enter(self.node)  # so that a drained section waits for it, whatever becomes of the guest's write
        task = asyncio.get_running_loop().create_task(self._ensure_for(over, offset, length, call))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        late = CopyFailure(BlockIOError(errno.ETIMEDOUT, "Copying what was there before took too long"), is_read=False)
        timer = self.env.clock.call_after(
            self.options.cbw_timeout * SECOND_NS, lambda: None if over.done() else over.set_result(late)
        )
        try:
            return await over
        finally:
            call.stopped = True
            timer.cancel()

    async def _ensure_for(
        self, over: asyncio.Future[CopyFailure | None], offset: int, length: int, call: CopyCall
    ) -> None:
        try:
            failure = await self.copies.ensure(offset, length, call)
            if not over.done():
                over.set_result(failure)
        except BaseException as bug:
            if not over.done():
                over.set_exception(bug)
            raise
        finally:
            leave(self.node)

    # ------------------------------------------------------------------------------------------- what snapshots show

    async def read_snapshot_into(self, offset: int, buffer: memoryview) -> None:
        """See `SupportsPointInTime`."""
        if self._readable_run(offset, len(buffer)) < len(buffer):
            raise BlockIOError(errno.EACCES, f"The snapshot kept by '{self.node.node_name}' lacks a part of what is asked for")
        while len(buffer):
            edge, count, reader = self._side(offset, len(buffer))
            try:
                await requests.read_into(edge, offset, buffer[:count])
            finally:
                self._left(reader)
            offset, buffer = offset + count, buffer[count:]

    async def snapshot_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """See `SupportsPointInTime`."""
        edge, count, reader = self._side(offset, self._readable_run(offset, length))
        try:
            extent = await requests.chain_status(edge.node, offset, count, want_zero=want_zero)
        finally:
            self._left(reader)
        return Zero(extent.length) if extent.zero else Data(extent.length)

    async def discard_snapshot(self, offset: int, length: int) -> None:
        """See `SupportsPointInTime`: whole clusters are not kept any more."""
        cluster, size = self.copies.cluster, self._readable.size
        start, end = align_up(offset, cluster), offset + length
        end = size if end >= size else align_down(end, cluster)
        if start >= end:
            return
        self._readable.reset(start, end - start)
        self.copies.forget(start, end - start)
        await requests.discard(self.target, start, min(end, self.target.node.length) - start)

    def _readable_run(self, offset: int, length: int) -> int:
        """How many bytes from ``offset`` on, at most ``length``, can be read; raises ``EACCES`` when there are none."""
        if self.snapshot_is_broken:
            raise BlockIOError(errno.EACCES, f"The snapshot kept by '{self.node.node_name}' is broken: a copy has failed")
        run = self._readable.next_dirty_range(offset, max_length=length)
        if run is None or run.offset > offset:
            raise BlockIOError(errno.EACCES, f"The snapshot kept by '{self.node.node_name}' lacks what is at {offset}")
        return run.length

    def _side(self, offset: int, length: int) -> tuple[BdrvChild, int, TrackedRequest | None]:
        """Where the first part of the range is, how long that is, and a hold on it when writes to it have to wait."""
        kept = self._done.next_dirty_range(offset, max_length=length)
        if kept is not None and kept.offset == offset:
            return self.target, kept.length, None
        count = length if kept is None else min(length, kept.offset - offset)
        reader = TrackedRequest(offset, offset + count, serialising=False)
        self._readers.append(reader)
        return self.child, count, reader

    def _left(self, reader: TrackedRequest | None) -> None:
        if reader is not None:
            self._readers.remove(reader)
            wake_waiters(reader.waiters)

    # --------------------------------------------------------------------------------------------------- permissions

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """See `Driver`: writes to the target; while somebody is above, nobody else may change the source."""
        if role is ChildRole.DATA:
            return PermissionPair(Perm.WRITE, Perm.ALL & ~Perm.RESIZE)
        needs, shares = super().child_permissions(role, perm, shared)
        if self.node.parents:
            if Perm.WRITE in needs:
                needs |= Perm.CONSISTENT_READ
            shares &= ~(Perm.WRITE | Perm.RESIZE)
        return PermissionPair(needs, shares)


def filter_options(**members: Any) -> CopyBeforeWriteOptions:
    """The options of a filter that is not opened by a user, whose children are attached by hand."""
    return CopyBeforeWriteOptions(file="", target="", **members)
