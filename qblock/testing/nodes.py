"""`NodeBench`: a graph built node by node, for tests of one driver or of the border, without options text and opener.
Beside it two drivers to build from: a memory disk that fails when told to, and a layer with a backing node.

Part of the public kit: a driver of a third party can be tried on a memory disk in three lines. ::

    bench = NodeBench()
    disk = await bench.add(MemoryDriver, MemoryOptions(size=MiB))
    backend = bench.backend(await bench.add(MyFilter, MyOptions(file="disk"), children={"file": (disk, ChildRole.FILTERED)}))
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from random import Random
from typing import Any, ClassVar

from qblock.backend import BlockBackend
from qblock.clock import Clock, LoopClock
from qblock.driver import Driver, NodeInfo
from qblock.drivers.memory import MemoryDriver
from qblock.environment import Environment
from qblock.errors import BlockIOError
from qblock.extents import Data, Extent, Unallocated
from qblock.graph import Graph
from qblock.node import BlockDriverState
from qblock.permissions import ChildRole, Perm
from qblock.requests import read_into, refresh_length
from qblock.transaction import Transaction
from qblock.zeroes import fill_zero


class FaultyMemoryDriver(MemoryDriver):
    """A memory disk that asserts its ``limits``, notes each call in ``calls``, and fails when told to.

    ``fail_after`` counts calls down: the call that finds it at 0 raises ``failure``, and so do all that follow.
    """

    name: ClassVar[str] = "faulty-memory"

    def __init__(self, node: BlockDriverState, options: Any, env: Environment) -> None:
        super().__init__(node, options, env)
        self.calls: list[tuple[str, int, int]] = []
        self.fail_after: int | None = None
        self.failure = errno.EIO
        self.gate: asyncio.Event | None = None

    async def _enter(self, operation: str, offset: int, length: int) -> None:
        self.calls.append((operation, offset, length))
        unit = self.limits.request_alignment
        if operation != "discard":
            assert offset % unit == 0 and length % unit == 0, f"{operation} {offset} {length} is not aligned to {unit}"
        if operation in ("read", "write") and self.limits.max_transfer:
            assert length <= self.limits.max_transfer
        if self.gate is not None:
            await self.gate.wait()
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise BlockIOError(self.failure)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        await self._enter("read", offset, len(buffer))
        await super().read_into(offset, buffer)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        await self._enter("write", offset, len(buffer))
        await super().write_from(offset, buffer, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`."""
        await self._enter("unmap" if may_unmap else "zero", offset, length)
        await super().write_zeroes(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`."""
        await self._enter("discard", offset, length)
        await super().discard(offset, length)

    async def flush(self) -> None:
        """See `Driver`."""
        await self._enter("flush", 0, 0)


class LayerDriver(FaultyMemoryDriver):
    """A format with a backing node whose clusters are in memory: what was never written is read from below."""

    name: ClassVar[str] = "layer"
    is_protocol: ClassVar[bool] = False
    supports_backing: ClassVar[bool] = True
    cluster: ClassVar[int] = 4096

    def __init__(self, node: BlockDriverState, options: Any, env: Environment) -> None:
        super().__init__(node, options, env)
        self.allocated: set[int] = set()

    def info(self) -> NodeInfo:
        """See `Driver`."""
        return NodeInfo(cluster_size=self.cluster)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        await self._enter("read", offset, len(buffer))
        for at, piece in self._by_cluster(offset, buffer):
            backing = self.node.backing
            if at // self.cluster in self.allocated:
                await MemoryDriver.read_into(self, at, piece)
            elif backing is not None:
                await read_into(backing, at, piece)
            else:
                fill_zero(piece)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`: clusters that are written in part are filled from below first."""
        await self._fill(offset, offset + len(buffer))
        await super().write_from(offset, buffer, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`."""
        await self._fill(offset, offset + length)
        await super().write_zeroes(offset, length, may_unmap=may_unmap)

    async def _fill(self, start: int, end: int) -> None:
        for number in range(start // self.cluster, -(-end // self.cluster)):
            if number in self.allocated:
                continue
            if self.node.backing is not None:
                old = memoryview(bytearray(self.cluster))
                await read_into(self.node.backing, number * self.cluster, old)
                length = self._length
                await MemoryDriver.write_from(self, number * self.cluster, old)
                self._length = length
            self.allocated.add(number)

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """See `Driver`."""
        number = offset // self.cluster
        held = number in self.allocated
        while number * self.cluster < offset + length and (number in self.allocated) == held:
            number += 1
        run = min(number * self.cluster - offset, length)
        return Data(run) if held else Unallocated(run)

    def _by_cluster(self, offset: int, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
        done = 0
        while done < len(buffer):
            count = min(self.cluster - (offset + done) % self.cluster, len(buffer) - done)
            yield offset + done, buffer[done : done + count]
            done += count


class NodeBench:
    """A graph with its environment. ``events`` collects what nodes emit, ``warnings`` what they warn of."""

    def __init__(self, *, clock: Clock | None = None, executor: Executor | None = None) -> None:
        self.graph = Graph(Random(0))
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.warnings: list[str] = []
        self.env = Environment(
            clock=clock if clock is not None else LoopClock(),
            executor=executor if executor is not None else ThreadPoolExecutor(2),
            random=Random(0),
            emit=lambda event, data: self.events.append((event, data)),
            warn=self.warnings.append,
        )

    async def add(
        self,
        driver: type[Driver],
        options: Any,
        *,
        children: Mapping[str, tuple[BlockDriverState, ChildRole]] | None = None,
        **state: Any,
    ) -> BlockDriverState:
        """Open a node with these children; ``state`` sets fields of the node (``read_only``, ``discard_unmap``, …)."""
        node = BlockDriverState(state.pop("node_name", ""), **state)
        node.driver = driver(node, options, self.env)
        with Transaction() as change:
            self.graph.add_node(node, change)
            for name, (child, role) in (children or {}).items():
                self.graph.attach(node, child, name=name, role=role, change=change)
            await node.driver.open()
            refresh_length(node)
        return node

    def backend(
        self,
        node: BlockDriverState,
        *,
        perm: Perm = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE,
        shared: Perm = Perm.ALL,
    ) -> BlockBackend:
        """A new anonymous backend on ``node``."""
        backend = BlockBackend(self.graph, perm=perm, shared=shared)
        backend.insert(node)
        return backend

    async def close(self) -> None:
        """Take all backends out and close all nodes, parents first."""
        for backend in list(self.graph.backends):
            backend.close()
        while self.graph.nodes:
            node = next(node for node in self.graph.nodes.values() if not node.parents)
            with Transaction() as change:
                for edge in list(node.children.values()):
                    self.graph.detach(edge, change)
                self.graph.remove_node(node, change)
            await node.driver.close()
