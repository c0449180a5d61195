"""The nodes and edges of the block graph: state only, no algorithms.

Models QEMU's ``BlockDriverState`` and ``BdrvChild``. `graph.py` changes the edges, `drain.py` and `requests.py` keep the
counters. What differs from QEMU: a node is alive while it has a parent edge or is owned by the monitor; there is no other
reference count. Lengths and offsets are in bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from qblock.permissions import ChildRole, Perm

if TYPE_CHECKING:
    from qblock.dirty import DirtyBitmap
    from qblock.driver import Driver
    from qblock.iothreads import IOThread


class EdgeParent(Protocol):
    """Who may hold an edge to a node: another node, a block backend, a job."""

    @property
    def iothread(self) -> IOThread | None:
        """Where it lives, if it cannot move or is a node: an I/O thread, or None for the main loop."""

    @property
    def is_pinned(self) -> bool:
        """True for a guest device, which does not move to another I/O thread."""

    def child_edges(self) -> Iterable[BdrvChild]:
        """All its edges: where its requests may go, and what moves along with it."""

    def describe_user(self) -> str:
        """How conflict reports name it: ``node 'n'``, ``block device 'd'``, ``mirror job 'j'``."""

    def quiesce(self) -> None:
        """A drained section of the node below begins: start no new requests (counted; called once per section)."""

    def resume(self) -> None:
        """One such section has ended."""

    def is_busy(self) -> bool:
        """True while it still has requests under way that a drained section must wait for."""


@attrs.define(eq=False, slots=True)
class BdrvChild:
    """An edge: ``parent`` uses ``node`` as its child called ``name``.

    ``perm`` is what the parent takes, ``shared`` what it lets others take. The three booleans are ``perm`` unpacked for the
    data path; `graph.py` keeps them in step.
    """

    name: str
    role: ChildRole
    node: BlockDriverState
    parent: EdgeParent
    perm: Perm = Perm.NONE
    shared: Perm = Perm.ALL
    frozen: bool = False
    may_write: bool = False
    may_resize: bool = False

    def __repr__(self) -> str:
        return f"<BdrvChild {self.parent.describe_user()} --{self.name}--> {self.node.node_name!r}>"


@attrs.define(eq=False, slots=True)
class BlockDriverState:
    """A node of the graph.

    ``length`` is the driver's length rounded up to 512, kept by the border. ``in_flight`` counts requests inside the node,
    ``quiesce_counter`` the drained sections it is in. ``write_generation`` counts completed writes and
    ``flushed_generation`` is the one the last successful flush covered. ``tracking`` is true while a serialising request
    (copy-on-read, read-modify-write) is under way: writes that start then enter ``tracked``; those that are under way already
    are counted in ``untracked_writes``, and the serialising request waits for them (serialising.py). While there are
    ``read_watchers``, reads enter ``tracked_reads``. ``to_check``: the node was
    opened to be checked and repaired, so that damage which a repair mends does not forbid writing. ``holders`` counts those who
    keep it from being closed without being its users (`Graph.holding`).
    """

    node_name: str
    driver: Driver = attrs.field(init=False, repr=False)
    options_given: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    read_only: bool = False
    auto_read_only: bool = False
    discard_unmap: bool = False
    describe_only: bool = False
    detect_zeroes: str = "off"
    cache_direct: bool = False
    cache_no_flush: bool = False
    force_share: bool = False
    aio: str = "threads"
    to_check: bool = False
    implicit: bool = False
    monitor_owned: bool = False
    holders: int = 0
    probed: bool = False

    children: dict[str, BdrvChild] = attrs.field(factory=dict, repr=False)
    parents: list[BdrvChild] = attrs.field(factory=list, repr=False)
    iothread: IOThread | None = None
    perm: Perm = Perm.NONE
    shared: Perm = Perm.ALL
    blockers: list[Any] = attrs.field(factory=list, repr=False)

    length: int = 0
    in_flight: int = 0
    quiesce_counter: int = 0
    idle_waiters: list[asyncio.Future[None]] = attrs.field(factory=list, repr=False)
    tracked: dict[int, Any] = attrs.field(factory=dict, repr=False)
    tracked_reads: dict[int, Any] = attrs.field(factory=dict, repr=False)
    read_watchers: int = 0
    tracking: bool = False
    serialising: int = 0
    untracked_writes: int = 0
    untracked_waiters: list[asyncio.Future[None]] = attrs.field(factory=list, repr=False)
    copy_on_read: int = 0
    write_generation: int = 0
    flushed_generation: int = 0
    dirty_bitmaps: list[DirtyBitmap] = attrs.field(factory=list, repr=False)
    write_threshold: int = 0
    wr_highest_offset: int = 0
    poisoned: BaseException | None = None
    closed: bool = False

    # ------------------------------------------------------------------------------------------------ the main children

    @property
    def storage(self) -> BdrvChild | None:
        """The child that holds this node's data and metadata: ``file``, or a filter's one filtered child."""
        for child in self.children.values():
            if child.role in (ChildRole.STORAGE, ChildRole.FILTERED, ChildRole.PRIMARY_DATA):
                return child
        return None

    @property
    def data_storage(self) -> BdrvChild | None:
        """The child that the offsets of this node's data refer to: the external data file of an image, else `storage`."""
        return self.children.get("data-file") or self.storage

    @property
    def backing(self) -> BdrvChild | None:
        """The backing (copy-on-write) child, if any; a filter has none here."""
        child = self.children.get("backing")
        return child if child is not None and child.role is ChildRole.BACKING else None

    @property
    def filtered(self) -> BdrvChild | None:
        """A filter's one child, or None for a node that is no filter."""
        for child in self.children.values():
            if child.role is ChildRole.FILTERED:
                return child
        return None

    # ------------------------------------------------------------------------------------------------ drained sections

    def enter_sections(self, count: int) -> None:
        """The node is in ``count`` more drained sections; its driver hears of the first."""
        was_free = not self.quiesce_counter
        self.quiesce_counter += count
        if was_free and count:
            self.driver.drained_begin()

    def leave_sections(self, count: int) -> None:
        """``count`` of them have ended; the driver hears of the last."""
        assert self.quiesce_counter >= count, f"{self!r} is in fewer drained sections than are to end"
        self.quiesce_counter -= count
        if not self.quiesce_counter and count:
            self.driver.drained_end()

    # --------------------------------------------------------------------------------------------- as a parent of others

    @property
    def is_pinned(self) -> bool:
        """See `EdgeParent`."""
        return False

    def child_edges(self) -> Iterable[BdrvChild]:
        """See `EdgeParent`."""
        return self.children.values()

    def describe_user(self) -> str:
        """See `EdgeParent`."""
        return f"node '{self.node_name}'"

    def quiesce(self) -> None:
        """See `EdgeParent`: passes the section on to its own parents, once for each of their edges."""
        pending = [self]
        while pending:
            node = pending.pop()
            node.enter_sections(1)
            for edge in node.parents:
                if isinstance(edge.parent, BlockDriverState):
                    pending.append(edge.parent)
                else:
                    edge.parent.quiesce()

    def resume(self) -> None:
        """See `EdgeParent`."""
        pending = [self]
        while pending:
            node = pending.pop()
            node.leave_sections(1)
            for edge in node.parents:
                if isinstance(edge.parent, BlockDriverState):
                    pending.append(edge.parent)
                else:
                    edge.parent.resume()

    def is_busy(self) -> bool:
        """See `EdgeParent`: true while a request is in this node or anywhere above it."""
        seen = {self}
        pending = [self]
        while pending:
            node = pending.pop()
            if node.in_flight:
                return True
            for edge in node.parents:
                parent = edge.parent
                if not isinstance(parent, BlockDriverState):
                    if parent.is_busy():
                        return True
                elif parent not in seen:
                    seen.add(parent)
                    pending.append(parent)
        return False

    def wake_idle_waiters(self) -> None:
        """Let all who wait in `idle_waiters` look again: something here became idle, or an edge to here is gone."""
        waiters, self.idle_waiters = self.idle_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def __repr__(self) -> str:
        mode = "ro" if self.read_only else "rw"
        driver = self.driver.name if hasattr(self, "driver") else "unopened"
        backing = f" backing={self.backing.node.node_name!r}" if self.backing else ""
        return f"<BlockDriverState {self.node_name!r} {driver} {mode} {self.length} bytes{backing}>"
