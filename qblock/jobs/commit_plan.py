"""What ``block-commit`` is asked to do, and where in the graph that is: values, and the checks that come before any change.

Models the arguments of QEMU 7.2's command and the order of its checks (semantics.md sections 4.2 and 4.3). Differs from QEMU in
that ``top`` may be any of the names by which an image is known (see `chain.find_backing_image`).
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs

from qblock.blockers import OpType
from qblock.chain import base_of, check_root, contains, find_backing_image, skip_filters, whole_chain
from qblock.errors import CommandError, DeviceNotFound, InvalidParameter, NodeNotFound
from qblock.jobs.state import OnError
from qblock.permissions import Perm

if TYPE_CHECKING:
    from qblock.graph import Graph
    from qblock.node import BlockDriverState


@attrs.frozen(kw_only=True)
class CommitRequest:
    """The members of ``block-commit`` with QEMU's defaults; ``speed`` in bytes per second (0: unlimited).

    ``top`` and ``base`` are file names, ``top_node`` and ``base_node`` node names: at most one of each pair may be given.
    ``backing_file`` is the text for the header.
    """

    job_id: str | None = None
    base: str | None = None
    base_node: str | None = None
    top: str | None = None
    top_node: str | None = None
    backing_file: str | None = None
    speed: int = 0
    on_error: OnError = OnError.REPORT
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


@attrs.frozen(eq=False)
class CommitPlace:
    """Where in the chain of ``device`` is to be committed: from ``top`` down to but not including ``base``, into ``base``."""

    device: BlockDriverState
    top: BlockDriverState
    base: BlockDriverState

    def layers(self) -> Iterator[BlockDriverState]:
        """The nodes to be committed, top first, filters included."""
        for layer in whole_chain(self.top):
            if layer is self.base:
                return
            yield layer

    def shared_on(self, layer: BlockDriverState) -> Perm:
        """What the job lets others do to one of the layers; filters right above the base show what it has."""
        shows_base = skip_filters(layer) is skip_filters(self.base)
        return Perm.WRITE | Perm.WRITE_UNCHANGED | (Perm.CONSISTENT_READ if shows_base else Perm.NONE)

    @property
    def is_active(self) -> bool:
        """Whether ``top`` is what the device shows, or somebody may write to it, so that the job has to follow it."""
        return skip_filters(self.top) is skip_filters(self.device) or Perm.WRITE in self.top.perm


def find_place(graph: Graph, device: str, request: CommitRequest) -> CommitPlace:
    """Where to commit; raises `DeviceNotFound` when there is no ``device``, else `CommandError` and its kin."""
    try:
        root = graph.lookup(device)
    except NodeNotFound:
        raise DeviceNotFound(device) from None
    check_root(root, device)
    graph.check_op(root, OpType.COMMIT_SOURCE)
    place = _place(graph, root, request)
    for layer in (*place.layers(), place.base):
        graph.check_op(layer, OpType.COMMIT_TARGET)
    if place.is_active and request.backing_file is not None:
        raise InvalidParameter(
            "backing-file", f"makes no sense when the active layer '{place.top.node_name}' is committed: nothing is left above"
        )
    return place


def _place(graph: Graph, root: BlockDriverState, request: CommitRequest) -> CommitPlace:
    if request.top is not None and request.top_node is not None:
        raise CommandError("'top' and 'top-node' cannot be given together")
    if request.base is not None and request.base_node is not None:
        raise CommandError("'base' and 'base-node' cannot be given together")
    if request.top is not None and _is_file_of(root, request.top):
        top = root
    else:
        top = _image(graph, root, node_name=request.top_node, filename=request.top) or root
    base = _image(graph, top, node_name=request.base_node, filename=request.base) or base_of(top)
    if skip_filters(base) is skip_filters(top):
        raise CommandError(f"Image '{top.node_name}' cannot be committed into itself: choose another base, or a higher top")
    return CommitPlace(root, top, base)


def _is_file_of(node: BlockDriverState, filename: str) -> bool:
    own = node.driver.filename()
    return own is not None and os.path.abspath(own) == os.path.abspath(filename)


def _image(
    graph: Graph, active: BlockDriverState, *, node_name: str | None, filename: str | None
) -> BlockDriverState | None:
    """The image below ``active`` (by node name: or itself) that is meant; None where neither name is given."""
    if node_name is not None:
        node = graph.find_node(node_name)
        if not contains(active, node):
            raise CommandError(f"Node '{node.node_name}' is not in the backing chain of '{active.node_name}'")
        return node
    if filename is None:
        return None
    found = find_backing_image(active, filename)
    if found is None:
        raise CommandError(f"There is no '{filename}' in the backing chain of '{active.node_name}'")
    return found
