"""Graphs without storage: nodes and users that only keep count, for tests of what changes a graph or drains it.

Models nothing of QEMU. The drivers keep the contract of `qblock.driver.Driver` (reads give zeroes, writes are dropped), and
note how they are asked for permissions, so that a test can see whether checks were settled or called off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any, ClassVar

import attrs

from qblock.clock import RealClock
from qblock.driver import Driver
from qblock.environment import Environment
from qblock.graph import Graph
from qblock.iothreads import IOThread
from qblock.node import BdrvChild, BlockDriverState
from qblock.options import DriverOptions
from qblock.permissions import ChildRole, Perm, PermissionPair, cumulative, find_clash


class PassiveDriver(Driver):
    """A protocol without storage. ``held`` is what was made final, ``checked`` what a change in progress asks for."""

    name: ClassVar[str] = "passive"
    options_class: ClassVar[type[DriverOptions]] = DriverOptions
    is_protocol: ClassVar[bool] = True

    def __init__(self, node: BlockDriverState, options: Any, env: Environment) -> None:
        super().__init__(node, options, env)
        self.size = 1 << 20
        self.held = PermissionPair(Perm.NONE, Perm.ALL)
        self.checked: PermissionPair | None = None
        self.refusal: Exception | None = None

    async def open(self) -> None:
        """Nothing to read."""

    def length(self) -> int:
        """As set in ``size`` (bytes)."""
        return self.size

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """All zeroes."""
        buffer[:] = bytes(len(buffer))

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """Dropped."""

    async def flush(self) -> None:
        """Nothing to do."""

    def check_permissions(self, perm: Perm, shared: Perm) -> None:
        """Raises ``refusal`` when a test has set one."""
        if self.refusal is not None:
            raise self.refusal
        self.checked = PermissionPair(perm, shared)

    def set_permissions(self, perm: Perm, shared: Perm) -> None:
        """Final."""
        assert self.checked is not None, "settled what was not checked"
        self.held = PermissionPair(perm, shared)

    def abort_permissions(self) -> None:
        """Called off."""
        self.checked = self.held


class PassiveFormat(PassiveDriver):
    """A format that can have a backing node."""

    name: ClassVar[str] = "passive-format"
    is_protocol: ClassVar[bool] = False
    supports_backing: ClassVar[bool] = True


class PassiveFilter(PassiveDriver):
    """A filter."""

    name: ClassVar[str] = "passive-filter"
    is_protocol: ClassVar[bool] = False
    is_filter: ClassVar[bool] = True


def no_environment() -> Environment:
    """An environment for drivers that use nothing of it: no thread is started, events and warnings are dropped."""
    return Environment(
        clock=RealClock(),
        executor=ThreadPoolExecutor(max_workers=1),
        random=Random(0),
        emit=lambda event, data: None,
        warn=lambda text: None,
    )


def passive_node(
    graph: Graph, name: str = "", kind: type[PassiveDriver] = PassiveFormat, *, read_only: bool = False
) -> BlockDriverState:
    """A node without edges, entered in ``graph``."""
    node = BlockDriverState(name, read_only=read_only)
    node.driver = kind(node, DriverOptions(), no_environment())
    graph.add_node(node)
    return node


@attrs.define(eq=False)
class CountingUser:
    """A user of nodes, such as a backend or a job, that counts its drained sections and is busy when a test says so."""

    name: str
    sections: int = 0
    busy: bool = False
    root: BdrvChild | None = None
    iothread: IOThread | None = None
    is_pinned: bool = False

    def child_edges(self) -> Iterable[BdrvChild]:
        """See `EdgeParent`."""
        return () if self.root is None else (self.root,)

    def describe_user(self) -> str:
        """See `EdgeParent`."""
        return f"block device '{self.name}'"

    def quiesce(self) -> None:
        """See `EdgeParent`."""
        self.sections += 1

    def resume(self) -> None:
        """See `EdgeParent`."""
        assert self.sections, "resumed more often than quiesced"
        self.sections -= 1

    def is_busy(self) -> bool:
        """See `EdgeParent`."""
        return self.busy


def describe_graph(graph: Graph) -> dict[str, Any]:
    """Everything that a change can touch, as plain values in order: equal for equal graphs."""
    return {
        name: {
            "children": [(key, _describe_edge(edge), edge.node.node_name) for key, edge in node.children.items()],
            "parents": [(id(edge), edge.parent.describe_user()) for edge in node.parents],
            "root edges": [_describe_edge(edge) for edge in node.parents if edge.role is ChildRole.ROOT],
            "permissions": (node.perm, node.shared),
            "quiesced": node.quiesce_counter,
            "read only": node.read_only,
        }
        for name, node in graph.nodes.items()
    }


def _describe_edge(edge: BdrvChild) -> tuple[Any, ...]:
    return (id(edge), edge.name, edge.role, edge.perm, edge.shared, edge.frozen, edge.may_write, edge.may_resize)


def assert_consistent(graph: Graph, sections: Mapping[BlockDriverState, int] | None = None) -> None:
    """Fail unless all ends of edges agree, permissions follow the rules without conflict, and drained sections add up.

    ``sections`` are those begun on the nodes themselves (`drained_begin`). Cycles would never end: checked first.
    """
    _assert_no_cycle(graph)
    for node in graph.nodes.values():
        for name, edge in node.children.items():
            assert edge.name == name and edge.parent is node
            assert edge.node.parents.count(edge) == 1
            perm, shared = node.driver.child_permissions(edge.role, node.perm, node.shared)
            assert (edge.perm, edge.shared) == (perm, Perm.ALL if node.force_share else shared), edge
        for edge in node.parents:
            assert edge.node is node
            assert not isinstance(edge.parent, BlockDriverState) or edge.parent.children[edge.name] is edge
        assert (node.perm, node.shared) == cumulative(node.parents), node
        assert find_clash(node.parents) is None, node
        if isinstance(node.driver, PassiveDriver):
            assert node.driver.held == (node.perm, node.shared), node
        own = (sections or {}).get(node, 0)
        assert node.quiesce_counter == own + sum(edge.node.quiesce_counter for edge in node.children.values()), node


def _assert_no_cycle(graph: Graph) -> None:
    """Take nodes away from the top as long as there is one without parents left; a cycle is what remains."""
    waiting = {
        node: sum(isinstance(edge.parent, BlockDriverState) for edge in node.parents) for node in graph.nodes.values()
    }
    free = [node for node, parents in waiting.items() if not parents]
    while free:
        node = free.pop()
        del waiting[node]
        for edge in node.children.values():
            waiting[edge.node] -= 1
            if not waiting[edge.node]:
                free.append(edge.node)
    assert not waiting, f"a cycle among {list(waiting)}"
