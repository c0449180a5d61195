"""A tree of open nodes, written down so that it can be closed and later be opened again as it was.

QEMU of 2012 kept a file name, a driver and flags for that. Here the graph is what counts, not what the headers say: each node
is noted with its options and flags in force, and with its children as the nodes that they are, whether a header names them,
the command line did, or a command has put them there. So the tree comes back with the same chain even where that differs from
the headers, and chains of any depth do. Names that were given by a person are kept, automatic ones are made anew.

What is not noted is gone with the nodes: dirty bitmaps that the image does not store, the write threshold, statistics of the
nodes, and the content of storage that lives in memory only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import attrs

from qblock.chain import children_of, in_order
from qblock.driver import Json
from qblock.node import BlockDriverState, EdgeParent
from qblock.nodespec import NodeFlags, child_fields
from qblock.options import dump, unflatten_dotted
from qblock.permissions import ChildRole

if TYPE_CHECKING:
    from qblock.opening import Opener

_MARKS: Final = ("options_given", "implicit", "probed", "copy_on_read")


@attrs.frozen(eq=False)
class _Entry:
    """One node. ``children`` are indices of entries, or names of nodes that stay open, or None for no backing. ``inherited`` and
    ``marks`` are flags and fields of the node that no option sets.
    """

    options: dict[str, Json]
    inherited: NodeFlags
    children: dict[str, int | str | None]
    marks: dict[str, Any]


@attrs.frozen(eq=False)
class Blueprint:
    """How to open a tree again. ``name`` is what people call it: the file of its image, or else its node."""

    name: str
    _entries: tuple[_Entry, ...]

    @classmethod
    def of(cls, root: BlockDriverState, closing: Iterable[BlockDriverState]) -> Blueprint:
        """Of the tree below ``root``, as far as it consists of nodes that are ``closing``; the others stay open."""
        order = _children_first(root, set(closing))
        index = {node: number for number, node in enumerate(order)}
        return cls(_called(root), tuple(_entry(node, index) for node in order))

    async def build(self, opener: Opener) -> BlockDriverState:
        """Open everything again and give the root, to which the caller gives a user before it awaits again.

        Raises what opening raises; nothing stays open then.
        """
        built: list[BlockDriverState] = []
        try:
            for entry in self._entries:
                options = dict(entry.options)
                for child, below in entry.children.items():
                    options[child] = built[below].node_name if isinstance(below, int) else below
                node = await opener.open_blockdev(unflatten_dotted(options), strings=True, root=False, inherited=entry.inherited)
                node.monitor_owned = True  # until its overlay is there
                for name, mark in entry.marks.items():
                    setattr(node, name, mark)
                built.append(node)
        except BaseException:
            _let_go(built)
            await opener.close_orphans()
            raise
        _let_go(built)
        return built[-1]


def own_nodes(root: BlockDriverState, *, ignoring: type[Any] | None = None) -> list[BlockDriverState]:
    """``root`` and what is below it and used by nobody else: the nodes that are closed when ``root`` loses its user.

    Users of the class ``ignoring`` do not count as somebody else.
    """
    own: dict[EdgeParent, None] = {root: None}
    nodes = [root]
    for node in nodes:  # grows on the way; a node with several users is looked at from each of them
        for edge in node.children.values():
            below = edge.node
            if below in own or below.monitor_owned:
                continue
            users = (parent.parent for parent in below.parents)
            if all(user in own or (ignoring is not None and isinstance(user, ignoring)) for user in users):
                own[below] = None
                nodes.append(below)
    return nodes


def _called(root: BlockDriverState) -> str:
    node = root
    while node.driver.filename() is None and node.filtered is not None:
        node = node.filtered.node
    return node.driver.filename() or root.node_name


def _let_go(nodes: Iterable[BlockDriverState]) -> None:
    for node in nodes:
        node.monitor_owned = False


def _children_first(root: BlockDriverState, wanted: set[BlockDriverState]) -> list[BlockDriverState]:
    """The nodes of ``wanted`` below and including ``root``, each behind all of its children."""
    return in_order([root], lambda node: [below for below in children_of(node) if below in wanted])[::-1]


def _entry(node: BlockDriverState, index: dict[BlockDriverState, int]) -> _Entry:
    driver, flags = type(node.driver), NodeFlags.of(node)
    roles = {field.wire: field.role for field in child_fields(driver)}
    children: dict[str, int | str | None] = {
        name: index.get(edge.node, edge.node.node_name) for name, edge in node.children.items()
    }
    for wire, role in roles.items():
        if role is ChildRole.BACKING:
            children.setdefault(wire, None)  # none now: none again, whatever the header says
    given = dict(node.options_given) or dump(node.driver.options)
    options = {key: value for key, value in given.items() if key not in roles}
    options |= {
        "driver": driver.name,
        "read-only": flags.read_only,
        "auto-read-only": flags.auto_read_only,
        "force-share": flags.force_share,
        "cache": {"direct": flags.cache_direct, "no-flush": flags.cache_no_flush},
        "discard": "unmap" if flags.discard_unmap else "ignore",
        "detect-zeroes": node.detect_zeroes,
    }
    return _Entry(options, NodeFlags(aio=flags.aio), children, {name: getattr(node, name) for name in _MARKS})
