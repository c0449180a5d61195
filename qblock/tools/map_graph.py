"""``qblock-img map --graph``: which layer of a chain holds what, drawn.

Of our own. A row stands for a layer, the top one first, and a column for an equal part of the disk; it shows the most that the
layer holds there: data that the guest sees, data that an upper layer hides, zeroes, or nothing.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final

import attrs

from qblock.chain import backing_chain
from qblock.extents import Compressed, Data, Unallocated
from qblock.node import BlockDriverState
from qblock.status import block_status, chain_status
from qblock.tools.console import Style
from qblock.units import format_size

NOTHING, ZERO, HIDDEN, SEEN = range(4)
GLYPHS: Final = "·○▒█"
ASCII_GLYPHS: Final = ".0x#"
_COLOURS: Final = ("2", "34", "33", "32")
_MEANINGS: Final = ("nothing", "zeroes", "data that an upper layer hides", "data that the guest sees")


@attrs.define
class Row:
    """One layer: what each column shows, and how many bytes of its data are seen and hidden."""

    name: str
    columns: bytearray
    seen: int = 0
    hidden: int = 0
    zero: int = 0


@attrs.frozen
class Scale:
    """From bytes ``start`` to ``end`` of the disk in ``columns`` columns."""

    start: int
    end: int
    columns: int

    def mark(self, row: Row, at: int, length: int, kind: int) -> None:
        """Show ``kind`` in all columns that the run touches, unless there is more in one already."""
        span = self.end - self.start
        first = (at - self.start) * self.columns // span
        last = -(-(at + length - self.start) * self.columns // span)
        for column in range(first, min(last, self.columns)):
            row.columns[column] = max(row.columns[column], kind)


async def draw(node: BlockDriverState, start: int, end: int, *, width: int) -> list[Row]:
    """The rows for the layers of a chain; ``width`` is how many columns there are for the disk. Raises `QBlockError`."""
    layers = list(backing_chain(node))
    scale = Scale(start, end, max(min(width, end - start), 1))
    rows = [Row(layer.driver.filename() or layer.node_name, bytearray(scale.columns)) for layer in layers]
    for layer, row in zip(layers, rows, strict=True):
        async for at, length, kind in _held(layer, start, end):
            scale.mark(row, at, length, kind)
            if kind == HIDDEN:
                row.hidden += length
            else:
                row.zero += length
    async for at, length, depth in _seen(node, start, end):
        scale.mark(rows[depth], at, length, SEEN)
        rows[depth].seen += length
        rows[depth].hidden -= length
    return rows


async def _held(layer: BlockDriverState, start: int, end: int) -> AsyncIterator[tuple[int, int, int]]:
    """What a layer itself holds: runs of data (not known yet whether hidden) and of zeroes."""
    at = start
    while at < min(end, layer.length):
        extent = await block_status(layer, at, min(end, layer.length) - at)
        match extent:
            case Unallocated():
                pass
            case Data() | Compressed():
                yield at, extent.length, HIDDEN
            case _:
                yield at, extent.length, ZERO
        at += extent.length


async def _seen(node: BlockDriverState, start: int, end: int) -> AsyncIterator[tuple[int, int, int]]:
    """The data that the guest sees, with the depth of the layer that they come from."""
    at = start
    while at < end:
        extent = (await chain_status(node, at, end - at)).as_mapped()
        if extent.present and not extent.zero:
            yield at, extent.length, extent.depth
        at += extent.length


def lines(rows: Sequence[Row], start: int, end: int, style: Style) -> Iterator[str]:
    """The picture, with a scale above and a legend below."""
    columns = len(rows[0].columns)
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    glyphs = GLYPHS if unicode else ASCII_GLYPHS
    names = max(len(row.name) for row in rows)
    left, right = format_size(start) if start else "0", format_size(end)
    yield " " * (names + 2) + left + right.rjust(columns - len(left))
    for row in rows:
        drawn = "".join(style.paint(glyphs[kind] * count, _COLOURS[kind]) for kind, count in _runs(row.columns))
        yield f"{style.bold(row.name.ljust(names))}  {drawn}  {_amounts(row)}"
    yield ""
    yield "   ".join(f"{style.paint(glyphs[kind], _COLOURS[kind])} {_MEANINGS[kind]}" for kind in (SEEN, HIDDEN, ZERO, NOTHING))
    yield f"A column stands for {format_size((end - start) // columns)} of the disk and shows the first of these that is in it."


def _amounts(row: Row) -> str:
    parts = [("seen", row.seen), ("hidden", row.hidden), ("zero", row.zero)]
    return ", ".join(f"{format_size(amount)} {word}" for word, amount in parts if amount) or "nothing"


def _runs(columns: bytearray) -> Iterator[tuple[int, int]]:
    """Equal neighbours together: what they are, and how many."""
    first = 0
    for at in range(1, len(columns) + 1):
        if at == len(columns) or columns[at] != columns[first]:
            yield columns[first], at - first
            first = at
