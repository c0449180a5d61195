"""The block graph, jobs and progress as text for people: what the REPL's ``graph`` and ``watch`` and the demo show.

QEMU offers the graph only as JSON (x-debug-query-block-graph) and leaves pictures to others. Users of nodes (guest
devices, jobs, the monitor) are the roots of the drawing; a node that is reached twice is drawn once and named the
second time. A format node and its file are one line unless ``full`` is asked for. Sizes are bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import attrs

from qblock.node import BdrvChild, BlockDriverState
from qblock.permissions import ChildRole, Perm
from qblock.units import format_size


@attrs.frozen
class Strokes:
    """What lines and bars are made of."""

    branch: str
    last: str
    along: str
    full: str
    empty: str


UNICODE: Final = Strokes("├─ ", "└─ ", "│  ", "█", "░")
ASCII: Final = Strokes("+- ", "`- ", "|  ", "#", ".")

_PLAIN_NAMES: Final = {"file": "", "root": ""}


@attrs.define
class GraphDrawing:
    """One drawing; ``lines`` does it. ``permissions`` adds what each edge takes."""

    nodes: Sequence[BlockDriverState]
    strokes: Strokes = UNICODE
    full: bool = False
    permissions: bool = False
    _drawn: set[str] = attrs.field(init=False, factory=set)

    def lines(self) -> list[str]:
        """The drawing, line by line, without line ends."""
        result: list[str] = []
        for title, edges in self._roots():
            if title.startswith(_UNNAMED) and all(edge.node.node_name in self._drawn for edge in edges):
                continue  # a job's own handle on what stands below the job already
            result.append(title)
            result += self._edges(edges, "")
        for node in sorted(self.nodes, key=lambda node: bool(node.parents)):
            if node.node_name not in self._drawn and not self._is_folded(node):
                result.append("monitor" if node.monitor_owned else "nobody")
                result += self._node(node, "", self.strokes.last, "   ", "")
        return result or ["(there are no block nodes)"]

    def _roots(self) -> list[tuple[str, list[BdrvChild]]]:
        """Who uses nodes without being one: devices first, then jobs, in the order in which their nodes are listed.

        A job and the backend that it works through are one user, and that backend's edge is left out beside the job's own.
        """
        users: dict[int | str, tuple[str, list[BdrvChild]]] = {}
        for node in reversed(self.nodes):
            for edge in node.parents:
                if not isinstance(edge.parent, BlockDriverState):
                    title = edge.parent.describe_user()
                    users.setdefault(title if _is_job(title) else id(edge.parent), (title, []))[1].append(edge)
        shown = ((title, _without_handles(edges) if _is_job(title) else edges) for title, edges in users.values())
        return sorted(shown, key=lambda user: _rank(user[0]))

    def _edges(self, edges: list[BdrvChild], indent: str) -> Iterator[str]:
        for index, edge in enumerate(edges):
            is_last = index == len(edges) - 1
            connector = self.strokes.last if is_last else self.strokes.branch
            label = "" if edge.role is ChildRole.FILTERED else _PLAIN_NAMES.get(edge.name, f"{edge.name} ")
            if self.permissions:
                label += f"({describe_permissions(edge.perm)}) "
            yield from self._node(edge.node, indent, connector, "   " if is_last else self.strokes.along, label)

    def _node(self, node: BlockDriverState, indent: str, connector: str, below: str, label: str) -> Iterator[str]:
        if node.node_name in self._drawn:
            yield f"{indent}{connector}{label}{node.node_name} (drawn above)"
            return
        self._drawn.add(node.node_name)
        yield f"{indent}{connector}{label}{describe_node(node)}"
        children = [edge for edge in node.children.values() if self.full or not self._is_folded(edge.node)]
        yield from self._edges(children, indent + below)

    def _is_folded(self, node: BlockDriverState) -> bool:
        """True for a file that is shown on the line of the one format node above it."""
        if self.full or not node.driver.is_protocol or len(node.parents) != 1:
            return False
        (edge,) = node.parents
        storing = (ChildRole.STORAGE, ChildRole.PRIMARY_DATA)
        return isinstance(edge.parent, BlockDriverState) and edge.role in storing


_UNNAMED: Final = "an unnamed"


def _is_job(user: str) -> bool:
    return " job " in user and not user.startswith(_UNNAMED)


def _without_handles(edges: list[BdrvChild]) -> list[BdrvChild]:
    named = [edge.node for edge in edges if edge.role is not ChildRole.ROOT]
    return [edge for edge in edges if edge.role is not ChildRole.ROOT or edge.node not in named]


def _rank(user: str) -> tuple[int, str]:
    """Disks come first, then jobs, then what has no name."""
    return (2 if user.startswith(_UNNAMED) else 1 if _is_job(user) else 0), user


def describe_node(node: BlockDriverState) -> str:
    """One line: ``top: qcow2, 64 MiB, read-only (top.qcow2)``."""
    parts = [node.driver.name]
    if not node.driver.is_filter:
        parts.append(format_size(node.length))
    if node.read_only:
        parts.append("read-only")
    filename = node.driver.filename()
    shown = f" ({os.path.basename(filename)})" if filename and not node.driver.is_filter else ""
    return f"{node.node_name}: {', '.join(parts)}{shown}"


def describe_permissions(perm: Perm) -> str:
    """Letters for what is taken: c(onsistent read), w(rite), u(nchanged writes), r(esize); ``-`` for nothing."""
    letters = {Perm.CONSISTENT_READ: "c", Perm.WRITE: "w", Perm.WRITE_UNCHANGED: "u", Perm.RESIZE: "r"}
    return "".join(letter for flag, letter in letters.items() if flag in perm) or "-"


def progress_bar(done: int, total: int, *, width: int = 40, strokes: Strokes = UNICODE) -> str:
    """``[████░░░░]  50.0 %``; nothing to do counts as done."""
    share = min(1.0, done / total) if total else 1.0
    filled = int(share * width)
    return f"[{strokes.full * filled}{strokes.empty * (width - filled)}] {share:6.1%}".replace("%", " %")


def columns(rows: Iterable[tuple[str, ...]], *, indent: str = "  ") -> list[str]:
    """Lines with the cells of ``rows`` under one another; the last column is not padded."""
    table = list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]) - 1)] if table else []
    return [
        indent + "".join(cell.ljust(width + 2) for cell, width in zip(row, widths, strict=False)) + row[-1]
        for row in table
    ]
