"""Finding what a command's arguments name, where the graph's own lookups do not fit (semantics.md section 2)."""

from __future__ import annotations

from qblock.errors import CommandError, DeviceNotFound, NodeNotFound
from qblock.graph import Graph
from qblock.node import BlockDriverState


def device_or_node(graph: Graph, device: str | None, node_name: str | None) -> BlockDriverState:
    """The node of the device ``device``, otherwise the node ``node_name``; for commands that have both members.

    Raises `NodeNotFound` (of class GenericError, as QEMU answers here), or `CommandError` for a device without medium.
    """
    if device is not None:
        try:
            backend = graph.find_backend(device)
        except DeviceNotFound:
            if node_name is None:
                raise NodeNotFound(device, "There is no device named") from None
        else:
            if backend.root is None:
                raise CommandError(f"Device '{device}' has no medium")
            return backend.root.node
    if node_name is None:
        raise CommandError("A device or a node must be given: 'device' or 'node-name'")
    return graph.find_node(node_name)
