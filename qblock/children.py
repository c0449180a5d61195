"""Children that come and go while a node is open: a quorum with one disk more, or one less.

Models ``x-blockdev-change`` (semantics.md section 10.3). Both functions belong into a drained section of the parent.
"""

from __future__ import annotations

from qblock.driver import SupportsChildren
from qblock.errors import CommandError, NodeBusy
from qblock.graph import Graph
from qblock.node import BlockDriverState
from qblock.transaction import Transaction


def add_child(graph: Graph, parent: BlockDriverState, node: BlockDriverState) -> None:
    """Make ``node``, which nobody uses, one more child of ``parent``.

    Raises `CommandError`: a parent that takes none, a node in use, a loop, permissions.
    """
    children = _list_of(parent)
    if node.parents:
        raise NodeBusy(node.node_name, f"{node.parents[0].parent.describe_user()} uses it")
    name, role = children.new_child(node)
    with Transaction() as change:
        graph.attach(parent, node, name=name, role=role, change=change)


def remove_child(graph: Graph, parent: BlockDriverState, name: str) -> None:
    """Take the child called ``name`` away; raises `CommandError`: no such child, or one that is needed."""
    edge = parent.children.get(name)
    if edge is None:
        present = ", ".join(parent.children) or "none"
        raise CommandError(f"Node '{parent.node_name}' has no child called '{name}'; it has {present}")
    _list_of(parent).check_child_can_go(name)
    with Transaction() as change:
        graph.detach(edge, change)


def _list_of(parent: BlockDriverState) -> SupportsChildren:
    if not isinstance(parent.driver, SupportsChildren):
        raise CommandError(f"Node '{parent.node_name}' is a {parent.driver.name} node, whose children do not come and go")
    return parent.driver
