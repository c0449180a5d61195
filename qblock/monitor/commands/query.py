"""Queries about devices, nodes and the graph."""

from __future__ import annotations

from typing import cast

import attrs

from qblock.backend import BlockBackend
from qblock.chain import skip_implicit
from qblock.devices.device import GuestDevice
from qblock.jobs.job import BlockJob
from qblock.monitor.command import CommandContext, NoArguments, command
from qblock.monitor.nodeinfo import NodeReports, device_stats, node_stats, nodes_oldest_first, shown_backends
from qblock.monitor.replies import (
    BlockDeviceInfo,
    BlockInfo,
    BlockStats,
    IoStatusName,
    PermissionName,
    VertexKind,
    XDbgBlockGraph,
    XDbgBlockGraphEdge,
    XDbgBlockGraphNode,
)
from qblock.node import BdrvChild, EdgeParent
from qblock.options import option
from qblock.permissions import PERMISSION_NAMES, SINGLE_PERMISSIONS, Perm


@attrs.frozen
class FlatArguments:
    """Arguments of query-named-block-nodes."""

    flat: bool = option(False, doc="leave the backing images out of each entry")


@attrs.frozen
class BlockstatsArguments:
    """Arguments of query-blockstats."""

    query_nodes: bool = option(False, doc="list all nodes instead of the devices")


@command("query-block", since="0.14", returns=list[BlockInfo])
async def query_block(ctx: CommandContext, args: NoArguments) -> list[BlockInfo]:
    """List the devices with their media."""
    del args
    reports = NodeReports()
    return [_block_info(backend, reports) for backend in shown_backends(ctx.system)]


def _block_info(backend: BlockBackend, reports: NodeReports) -> BlockInfo:
    device: GuestDevice | None = backend.device
    inserted = None
    if backend.root is not None:
        inserted = reports.device(skip_implicit(backend.root.node), backend=backend, flat=False)
    return BlockInfo(
        device=backend.name,
        qdev=None if device is None else device.name,
        type="unknown",
        removable=device is None or device.removable,
        locked=device is not None and device.locked,
        inserted=inserted,
        tray_open=device.tray_open if device is not None and device.has_tray else None,
        io_status=None if device is None else cast(IoStatusName | None, device.io_status),
    )


@command("query-named-block-nodes", since="2.0", returns=list[BlockDeviceInfo])
async def query_named_block_nodes(ctx: CommandContext, args: FlatArguments) -> list[BlockDeviceInfo]:
    """List all nodes, newest first."""
    nodes = reversed(nodes_oldest_first(ctx.system.graph))
    reports = NodeReports()
    return [reports.device(node, backend=None, flat=args.flat) for node in nodes]


@command("query-blockstats", since="0.14", returns=list[BlockStats])
async def query_blockstats(ctx: CommandContext, args: BlockstatsArguments) -> list[BlockStats]:
    """Tell how much the devices have read and written, or how far writes to the nodes went."""
    if args.query_nodes:
        return [node_stats(node, below=False) for node in nodes_oldest_first(ctx.system.graph)]
    return [device_stats(backend) for backend in shown_backends(ctx.system)]


# ---------------------------------------------------------------------------------------------------------- graph dump


@command("x-debug-query-block-graph", since="4.0", features=("unstable",), returns=XDbgBlockGraph)
async def x_debug_query_block_graph(ctx: CommandContext, args: NoArguments) -> XDbgBlockGraph:
    """Dump the block graph with its permissions, for debugging."""
    del args
    dump = _GraphDump()
    graph = ctx.system.graph
    nodes = nodes_oldest_first(graph)
    for backend in graph.backends:
        dump.add(backend, "block-backend", backend.name or (backend.device.name if backend.device is not None else ""))
    for job in ctx.system.jobs.jobs:
        if isinstance(job, BlockJob):
            dump.add(job, "block-job", job.id or "")
    for node in nodes:
        dump.add(node, "block-driver", node.node_name)
    for node in nodes:
        for edge in node.parents:
            if edge.parent in dump:
                dump.connect(edge)
    return XDbgBlockGraph(nodes=dump.nodes[::-1], edges=dump.edges[::-1])


class _GraphDump:
    """Gives users and nodes their numbers, from 1 on; QEMU lists what has the highest number first."""

    def __init__(self) -> None:
        self.nodes: list[XDbgBlockGraphNode] = []
        self.edges: list[XDbgBlockGraphEdge] = []
        self._ids: dict[EdgeParent, int] = {}

    def add(self, user: EdgeParent, kind: VertexKind, name: str) -> None:
        """Enter a vertex."""
        self._ids[user] = len(self._ids) + 1
        self.nodes.append(XDbgBlockGraphNode(id=self._ids[user], type=kind, name=name))

    def __contains__(self, user: EdgeParent) -> bool:
        """Whether it is a vertex; a node that is being closed is none."""
        return user in self._ids

    def connect(self, edge: BdrvChild) -> None:
        """Enter an edge."""
        self.edges.append(
            XDbgBlockGraphEdge(
                parent=self._ids[edge.parent],
                child=self._ids[edge.node],
                name=edge.name,
                perm=_names(edge.perm),
                shared_perm=_names(edge.shared),
            )
        )


def _names(perm: Perm) -> list[PermissionName]:
    return [cast(PermissionName, PERMISSION_NAMES[single]) for single in reversed(SINGLE_PERMISSIONS) if single & perm]
