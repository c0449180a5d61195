"""Walks down a chain of images: through filters, along backing links; and over all nodes below or above some.

Models QEMU's chain helpers (semantics.md section 7): a *chain* goes from a node down its backing link, or for a filter down
its one filtered child; *backing chain* means its nodes that are no filters. Nothing here changes the graph or blocks.
Differs from QEMU in that file names are compared as texts (made absolute), never by asking the file system.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from qblock.driver import SupportsBacking, SupportsSnapshots
from qblock.errors import CommandError
from qblock.permissions import ChildRole

if TYPE_CHECKING:
    from qblock.node import BdrvChild, BlockDriverState


def chain_edge(node: BlockDriverState) -> BdrvChild | None:
    """The edge to the next node of the chain: a filter's filtered child, otherwise the backing child, if any."""
    return node.filtered or node.backing


def whole_chain(node: BlockDriverState) -> Iterator[BlockDriverState]:
    """``node`` and everything below it in its chain, filters included."""
    edge = chain_edge(node)
    yield node
    while edge is not None:
        node = edge.node
        edge = chain_edge(node)
        yield node


def skip_filters(node: BlockDriverState) -> BlockDriverState:
    """The first node from ``node`` down that is no filter (itself, if it is none)."""
    while (edge := node.filtered) is not None:
        node = edge.node
    return node


def snapshot_node(node: BlockDriverState) -> BlockDriverState:
    """The node that keeps the internal snapshots of ``node``: itself, or what lies below if that is its only child."""
    while not isinstance(node.driver, SupportsSnapshots) and len(node.children) == 1 and (edge := node.storage) is not None:
        node = edge.node
    return node


def skip_implicit(node: BlockDriverState) -> BlockDriverState:
    """The first node from ``node`` down that is not a filter which a job has inserted on its own."""
    while node.implicit and (edge := node.filtered) is not None:
        node = edge.node
    return node


def may_be_replaced(source: BlockDriverState, wanted: BlockDriverState) -> bool:
    """Whether a copy of ``source`` may take the place of ``wanted`` without a change of what anybody sees.

    It shows just what ``source`` does (through filters), or is a child that votes there, and nobody else uses it.
    """
    node = source
    while node is not wanted and (edge := node.filtered) is not None:
        node = edge.node
    if node is wanted:
        return True
    return node.driver.mends_children and [edge.parent for edge in wanted.parents] == [node]


def cow_node(node: BlockDriverState) -> BlockDriverState | None:
    """The node directly below the backing link of ``node`` (looked for through filters), itself possibly a filter."""
    edge = skip_filters(node).backing
    return None if edge is None else edge.node


def chain_next(node: BlockDriverState) -> BlockDriverState | None:
    """The next image of the backing chain: `cow_node` with filters skipped, or None at the base."""
    below = cow_node(node)
    return None if below is None else skip_filters(below)


def backing_chain(node: BlockDriverState) -> Iterator[BlockDriverState]:
    """The images of the chain from ``node`` down, without filters; starts with ``node`` or what it filters."""
    image: BlockDriverState | None = skip_filters(node)
    while image is not None:
        following = chain_next(image)
        yield image
        image = following


def base_of(node: BlockDriverState) -> BlockDriverState:
    """The last image of the backing chain."""
    *_, base = backing_chain(node)
    return base


def find_overlay(active: BlockDriverState, node: BlockDriverState) -> BlockDriverState | None:
    """The image in the chain of ``active`` whose backing (filters skipped) is ``node``; None if there is none."""
    wanted = skip_filters(node)
    for image in backing_chain(active):
        if chain_next(image) is wanted:
            return image
    return None


def contains(top: BlockDriverState, node: BlockDriverState) -> bool:
    """Whether ``node`` is in the chain from ``top`` down (both ends and filters included)."""
    return any(candidate is node for candidate in whole_chain(top))


def find_backing_image(top: BlockDriverState, filename: str) -> BlockDriverState | None:
    """The image below ``top`` that goes by that file name; None if there is none.

    Names that count: the node's own file name, and what the image above it has in its header. Relative names are taken
    relative to the directory of the image above, as in headers, and as they stand.
    """
    overlay = skip_filters(top)
    while (image := chain_next(overlay)) is not None:
        if filename in _names_of(image, overlay) or _located(filename, overlay) in _names_of(image, overlay):
            return image
        overlay = image
    return None


def _names_of(image: BlockDriverState, overlay: BlockDriverState) -> set[str]:
    """The texts that name ``image`` as the backing of ``overlay``."""
    names = set()
    own = image.driver.filename()
    if own is not None:
        names |= {own, os.path.abspath(own)}
    if isinstance(overlay.driver, SupportsBacking):
        link = overlay.driver.backing_link()
        # The header speaks of this node only while nothing else was put below the overlay.
        if link is not None and (own is None or _located(link.filename, overlay) == os.path.abspath(own)):
            names |= {link.filename, _located(link.filename, overlay)}
    return names


def _located(filename: str, overlay: BlockDriverState) -> str:
    """``filename`` made absolute as if the header of ``overlay`` named it."""
    directory = os.path.dirname(overlay.driver.filename() or "")
    return os.path.abspath(os.path.join(directory, filename))


def chain_edges(top: BlockDriverState, base: BlockDriverState | None) -> list[BdrvChild]:
    """The edges of the chain from ``top`` down to ``base`` (None: to its end), top first; ``base`` must be in the chain."""
    edges = []
    node = top
    while node is not base:
        edge = chain_edge(node)
        if edge is None:
            assert base is None, f"{base!r} is not in the chain of {top!r}"
            break
        edges.append(edge)
        node = edge.node
    return edges


def is_root(node: BlockDriverState) -> bool:
    """Whether all users of ``node`` are block backends (none is a node or a job): what some commands insist on."""
    return all(edge.role is ChildRole.ROOT for edge in node.parents)


def check_root(node: BlockDriverState, name: str) -> None:
    """Raise `CommandError` unless `is_root`; ``name`` is how the user calls the node."""
    for edge in node.parents:
        if edge.role is not ChildRole.ROOT:
            raise CommandError(f"'{name}' is not a root node: {edge.parent.describe_user()} uses it")


def children_of(node: BlockDriverState) -> list[BlockDriverState]:
    """The nodes that ``node`` has an edge to; one that has several of its edges is named as often."""
    return [edge.node for edge in node.children.values()]


def descendants(node: BlockDriverState) -> set[BlockDriverState]:
    """``node`` and all nodes that can be reached from it by any edges."""
    return set(in_order([node], children_of))


def in_order(
    nodes: Iterable[BlockDriverState], onward: Callable[[BlockDriverState], Iterable[BlockDriverState]]
) -> list[BlockDriverState]:
    """``nodes`` and all that ``onward`` leads to from them, each once and before those it leads to; linear in the edges."""
    order: list[BlockDriverState] = []
    seen: set[BlockDriverState] = set()
    for start in nodes:
        if start in seen:
            continue
        seen.add(start)
        path = [(start, iter(onward(start)))]
        while path:
            node, ahead = path[-1]
            for following in ahead:
                if following not in seen:
                    seen.add(following)
                    path.append((following, iter(onward(following))))
                    break
            else:
                order.append(node)
                path.pop()
    order.reverse()
    return order
