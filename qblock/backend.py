"""BlockBackend: what guests, jobs, exports and tools hold to do I/O on the root of a graph.

Models QEMU's ``BlockBackend``: an edge to a node that can be changed under its user (or be absent: an empty drive), which
checks that requests lie inside the disk, waits while the node is drained, and keeps what belongs to the user, not to the
image: error policies, I/O status, the write-through flag, limits of its rate.

Requests raise `BlockIOError`: ``ENOMEDIUM`` without a node, ``EIO`` outside of the disk, otherwise what `requests` raises.
Offsets and lengths are bytes.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from qblock.drain import kick
from qblock.errors import BlockIOError
from qblock.permissions import ChildRole, Perm
from qblock.requests import (
    copy_range,
    discard,
    flush,
    load_vm_state,
    read_into,
    save_vm_state,
    truncate,
    write_compressed,
    write_from,
    write_zeroes,
)
from qblock.transaction import Transaction

if TYPE_CHECKING:
    from qblock.accounting import DeviceAccounting
    from qblock.graph import Graph
    from qblock.iothreads import IOThread
    from qblock.node import BdrvChild, BlockDriverState
    from qblock.nodespec import MediumFlags
    from qblock.throttling import ThrottleMember

IO_OK: Final = "ok"
IO_FAILED: Final = "failed"
IO_NOSPACE: Final = "nospace"

_LIMITED: Final = ("read", "write", "zero")
"""The operations that wait for the limits of a backend."""


class BlockBackend:
    """A user's handle on a node. ``perm`` and ``shared`` are what its edge takes and shares, also of nodes inserted later.

    ``name`` is the device name or empty. ``io_status`` is ``ok``, ``failed`` or ``nospace``; ``on_read_error`` and
    ``on_write_error`` are the device's error policies; ``device`` is the guest device attached, if any, which lives on
    ``iothread`` (None: the main loop). With ``writethrough`` every write is durable when it completes. With
    ``disable_queuing`` requests do not wait while the node is drained: for jobs, which stop by themselves.
    ``changing_medium`` while a command puts another node in, which nobody else may do then; ``last_medium`` tells how the
    node was opened that such a command took out. ``in_flight`` counts requests under way, those not included that wait for
    the end of a drained section. ``throttle`` holds up reads, writes and zero writes, see `limit`. ``accounting``
    counts what query-blockstats tells, for drives and guest devices: who makes a request says whether it counts.
    """

    def __init__(
        self, graph: Graph, name: str = "", *, perm: Perm, shared: Perm, description: str | None = None
    ) -> None:
        self.name = name
        self.root: BdrvChild | None = None
        self.perm = perm
        self.shared = shared
        self.description = description
        self.in_flight = 0
        self.quiesce_counter = 0
        self.disable_queuing = False
        self.writethrough = False
        self.io_status = IO_OK
        self.on_read_error = "report"
        self.on_write_error = "enospc"
        self.accounting: DeviceAccounting | None = None
        self.device: Any = None
        self.iothread: IOThread | None = None
        self.changing_medium = False
        self.closed = False
        self.last_medium: MediumFlags | None = None
        self.throttle: ThrottleMember | None = None
        self._graph = graph
        self._queue: list[asyncio.Future[None]] = []
        graph.add_backend(self)

    # ------------------------------------------------------------------------------------------------------- the node

    @property
    def node(self) -> BlockDriverState:
        """The node below; raises ``BlockIOError(ENOMEDIUM)`` when there is none."""
        return self._edge().node

    @property
    def length(self) -> int:
        """Size of the disk in bytes, a multiple of 512; raises ``BlockIOError(ENOMEDIUM)`` when there is none."""
        return self._edge().node.length

    def insert(self, node: BlockDriverState, change: Transaction | None = None) -> None:
        """Put ``node`` in; raises `PermissionConflict`. There must be none yet. Without ``change`` it is final at once."""
        assert self.root is None, f"{self!r} has a node"
        if change is None:
            with Transaction() as change:
                self.insert(node, change)
            return
        self.root = self._graph.attach(
            self, node, name="root", role=ChildRole.ROOT, perm=self.perm, shared=self.shared, change=change
        )
        change.add(abort=partial(setattr, self, "root", None))

    def remove(self, change: Transaction | None = None) -> None:
        """Take the node out; nothing happens when there is none."""
        if self.root is None:
            return
        if change is None:
            with Transaction() as change:
                self.remove(change)
            return
        self._graph.detach(self.root, change)
        change.add(abort=partial(setattr, self, "root", self.root))
        self.root = None

    def set_permissions(self, perm: Perm, shared: Perm, change: Transaction | None = None) -> None:
        """Take and share other permissions; raises `PermissionConflict`, and then nothing has changed."""
        if change is None:
            with Transaction() as change:
                self.set_permissions(perm, shared, change)
            return
        if self.root is not None:
            self._graph.set_edge_permissions(self.root, perm, shared, change)
        change.add(abort=partial(self._store_permissions, self.perm, self.shared))
        self._store_permissions(perm, shared)

    def close(self) -> None:
        """Take the node out and leave the graph; the backend is ``closed`` and not used any more."""
        self.closed = True
        self.remove()
        self.limit(None)
        self._graph.remove_backend(self)

    def limit(self, throttle: ThrottleMember | None) -> None:
        """Let ``throttle`` say when requests may pass (None: at once); the one before it leaves its group."""
        if self.throttle is not None:
            self.throttle.leave()
        self.throttle = throttle
        if throttle is not None:
            throttle.set_drained(self.quiesce_counter > 0)

    def _store_permissions(self, perm: Perm, shared: Perm) -> None:
        self.perm, self.shared = perm, shared

    def _edge(self) -> BdrvChild:
        if self.root is None:
            raise BlockIOError(errno.ENOMEDIUM, f"{self.describe_user()} has no medium")
        return self.root

    # ------------------------------------------------------------------------------------------------- as an edge's parent

    @property
    def is_pinned(self) -> bool:
        """See `EdgeParent`."""
        return self.device is not None

    def child_edges(self) -> Iterable[BdrvChild]:
        """See `EdgeParent`."""
        return () if self.root is None else (self.root,)

    def describe_user(self) -> str:
        """See `EdgeParent`."""
        if self.description is not None:
            return self.description
        return f"block device '{self.name}'" if self.name else "an unnamed block device"

    def quiesce(self) -> None:
        """See `EdgeParent`: requests that come from now on wait."""
        self.quiesce_counter += 1
        if self.throttle is not None:
            self.throttle.set_drained(True)

    def resume(self) -> None:
        """See `EdgeParent`."""
        self.quiesce_counter -= 1
        if not self.quiesce_counter:
            if self.throttle is not None:
                self.throttle.set_drained(False)
            queue, self._queue = self._queue, []
            for future in queue:
                if not future.done():
                    future.set_result(None)

    def is_busy(self) -> bool:
        """See `EdgeParent`."""
        return self.in_flight > 0

    # ----------------------------------------------------------------------------------------------------------- requests

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill all of ``buffer`` (writable, format B) from ``offset``."""
        if self.quiesce_counter:
            await self._until_resumed()
        root = self.root
        if root is None or offset < 0 or offset + len(buffer) > root.node.length:
            root = self._checked(offset, len(buffer))
        if self.throttle is not None:
            await self._counted("read", offset, len(buffer), lambda edge: read_into(edge, offset, buffer))
            return
        self.in_flight += 1
        try:
            await read_into(root, offset, buffer)
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                kick(root.node)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """Write all of ``buffer`` at ``offset``; with ``fua`` it is durable on return."""
        if self.quiesce_counter:
            await self._until_resumed()
        fua = fua or self.writethrough
        root = self.root
        if root is None or offset < 0 or offset + len(buffer) > root.node.length:
            root = self._checked(offset, len(buffer))
        if self.throttle is not None:
            await self._counted("write", offset, len(buffer), lambda edge: write_from(edge, offset, buffer, fua=fua))
            return
        self.in_flight += 1
        try:
            await write_from(root, offset, buffer, fua=fua)
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                kick(root.node)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """Make the range read as zeroes; see `requests.write_zeroes`."""
        await self._until_resumed()
        how = {"may_unmap": may_unmap, "no_fallback": no_fallback, "fua": fua or self.writethrough}
        await self._counted("zero", offset, length, lambda edge: write_zeroes(edge, offset, length, **how))

    async def write_compressed(self, offset: int, buffer: memoryview) -> None:
        """Store whole clusters in packed form; see `requests.write_compressed`."""
        await self._until_resumed()
        await self._counted("write", offset, len(buffer), lambda edge: write_compressed(edge, offset, buffer))
        if self.writethrough:
            await self.flush()

    async def discard(self, offset: int, length: int) -> None:
        """The content of the range is no longer needed; see `requests.discard`."""
        await self._until_resumed()
        await self._counted("discard", offset, length, lambda edge: discard(edge, offset, length))

    async def flush(self) -> None:
        """Make all completed writes durable."""
        await self._until_resumed()
        await self._counted("flush", 0, 0, lambda edge: flush(edge.node))

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Change the size of the disk; the backend must hold the resize permission."""
        await self._until_resumed()
        await self._counted(
            None, 0, 0, lambda edge: truncate(edge, length, exact=exact, preallocation=preallocation)
        )

    async def copy_range(self, offset: int, target: BlockBackend, target_offset: int, length: int) -> None:
        """Copy to ``target`` inside the storage. ``BlockIOError(ENOTSUP)``: copy by buffer instead."""
        await self._until_resumed()
        self._checked(offset, length)
        to = target._checked(target_offset, length)
        target.in_flight += 1
        try:
            await self._counted(None, offset, length, lambda edge: copy_range(edge, offset, to, target_offset, length))
        finally:
            target._left()

    async def load_vm_state(self, offset: int, buffer: memoryview) -> None:
        """Read from the state of a machine that is kept beside the disk; see `requests.load_vm_state`."""
        await self._until_resumed()
        await self._beside_disk(load_vm_state(self._edge().node, offset, buffer))

    async def save_vm_state(self, offset: int, buffer: memoryview) -> None:
        """Write to the state of a machine that is kept beside the disk; see `requests.save_vm_state`."""
        await self._until_resumed()
        await self._beside_disk(save_vm_state(self._edge(), offset, buffer))

    async def _beside_disk(self, request: Coroutine[Any, Any, None]) -> None:
        """Run a request that is none of the guest's: it has no place on the disk, and is not in the statistics."""
        self.in_flight += 1
        try:
            await request
        finally:
            self._left()

    async def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``, for callers that do not mind a copy."""
        data = bytearray(length)
        await self.read_into(offset, memoryview(data))
        return bytes(data)

    async def write(self, offset: int, data: bytes) -> None:
        """Write ``data`` at ``offset``, for callers that hold bytes."""
        await self.write_from(offset, memoryview(data))

    # ------------------------------------------------------------------------------------------------- around a request

    async def _until_resumed(self) -> None:
        # Somebody else may have begun another section between the waking and this task's turn: look again.
        while self.quiesce_counter and not self.disable_queuing:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queue.append(future)
            await future

    def _checked(self, offset: int, length: int) -> BdrvChild:
        """The root edge, when the range lies inside the disk."""
        root = self._edge()
        size = root.node.length
        if offset < 0 or length < 0 or offset + length > size:
            raise BlockIOError(
                errno.EIO, f"{length} bytes at {offset} are not inside {self.describe_user()} of {size} bytes"
            )
        return root

    async def _counted(
        self, operation: str | None, offset: int, length: int, request: Callable[[BdrvChild], Coroutine[Any, Any, None]]
    ) -> None:
        """Run a request on the root edge, as one of those under way; ``operation`` tells whether limits hold it up."""
        edge = self._checked(offset, length)
        self.in_flight += 1
        try:
            if self.throttle is not None and operation in _LIMITED:
                await self.throttle.admit(length, is_write=operation != "read")
                edge = self._checked(offset, length)  # the medium may have gone meanwhile
            await request(edge)
        finally:
            self._left()

    def _left(self) -> None:
        self.in_flight -= 1
        if not self.in_flight and self.root is not None:
            kick(self.root.node)

    def __repr__(self) -> str:
        node = self.root.node.node_name if self.root is not None else None
        return f"<BlockBackend {self.name!r} node={node!r} in_flight={self.in_flight}>"
