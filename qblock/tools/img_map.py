"""``qblock-img map``: which layer of the chain holds what, and where in its file.

Lines and JSON as qemu-img 7.2 prints them; adjacent areas with the same answer are one. The form for people lists only data
that lie plainly in a file, and fails where data have no plain offset (compressed clusters). Of ours is ``--graph``, a picture.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import attrs

from qblock.chain import backing_chain
from qblock.errors import CommandError
from qblock.extents import Fragment
from qblock.status import ChainExtent, Further, chain_status
from qblock.tools.arguments import Arguments, UsageError
from qblock.tools.images import ImageArguments, ImageSession, Watch, run_session, with_secrets

ROOM_FOR_AMOUNTS: Final = 40
LEAST_COLUMNS: Final = 20
MAX_QUESTION: Final = 1 << 40
"""How many bytes one question about the chain covers."""


@attrs.frozen
class Area:
    """A run of bytes with one answer. ``offset`` is where it starts in the file called ``filename``, if it is stored plainly."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    filename: str

    def continues_in(self, other: Area) -> bool:
        """True when ``other``, which begins where this one ends, has the same answer."""
        if (self.depth, self.present, self.zero, self.data) != (other.depth, other.present, other.zero, other.data):
            return False
        if self.filename != other.filename or (self.offset is None) != (other.offset is None):
            return False
        return self.offset is None or self.offset + self.length == other.offset


def run(args: list[str], watch: Watch | None = None) -> int:
    """The sub-command; returns the exit code. ``watch``: see `images.run_session`."""
    arguments = Arguments(
        args, "f:s:l:U", {"output=": "output", "format=": "f", "start-offset=": "s", "max-length=": "l",
                          "image-opts": "image-opts", "force-share": "U", "object=": "object",
                          "graph": "graph"}
    )  # fmt: skip
    output = arguments.output_format()
    start = arguments.size("s", "start offset") or 0
    max_length = arguments.size("l", "maximum length")
    if len(arguments.words) != 1:
        raise UsageError("Expecting one image file name")
    arguments.check_image_opts()
    watch = with_secrets(arguments, watch)
    wanted = ImageArguments.of(arguments, arguments.words[0])
    if "graph" in arguments and "output" in arguments:
        raise CommandError("--graph is a form of its own: it cannot be used with --output")
    show = _print_graph if "graph" in arguments else _print_json if output == "json" else _print_lines
    run_session(lambda session: show(session, wanted, start, max_length), watch)
    return 0


async def _areas(
    session: ImageSession, wanted: ImageArguments, start: int, max_length: int | None
) -> AsyncIterator[tuple[Area, list[Fragment]]]:
    """The areas of the asked range, adjacent equal ones joined; one empty area when the range is empty.

    With each area come those right behind it which differ from it, and among each other, in nothing but length and place.
    """
    node = (await session.open(wanted)).node
    end = node.length if max_length is None else min(node.length, start + max_length)
    at, current, further = start, None, Further()
    while at < end:
        extent = await chain_status(node, at, min(end - at, MAX_QUESTION), further=further)
        area = _area(at, extent)
        if current is not None and current.continues_in(area):
            area = attrs.evolve(area, start=current.start, length=current.length + area.length, offset=current.offset)
        elif current is not None:
            yield current, []
        at, current = at + extent.length, area
        if further.runs:
            at += further.length
            # The last one may go on.
            first, length, place = further.runs.pop()
            yield current, further.runs
            current = attrs.evolve(area, start=first, length=length, offset=place)
    yield current or Area(start, 0, 0, False, False, False, None, ""), []


def _area(at: int, extent: ChainExtent) -> Area:
    extent = extent.as_mapped()
    filename = (extent.file.driver.filename() or "") if extent.file is not None else ""
    return Area(
        at, extent.length, extent.depth, extent.present, extent.zero, extent.data, extent.offset, filename
    )


async def _print_json(session: ImageSession, wanted: ImageArguments, start: int, max_length: int | None) -> None:
    before = "["
    async for area, further in _areas(session, wanted, start, max_length):
        members = {"start": area.start, "length": area.length, "depth": area.depth}
        text = ", ".join(f'"{key}": {value}' for key, value in members.items())
        for key, flag in (("present", area.present), ("zero", area.zero), ("data", area.data)):
            text += f', "{key}": {str(flag).lower()}'
        if area.offset is not None:
            text += f', "offset": {area.offset}'
        print(f"{before}{{ {text}}}", end="")
        before = ",\n"
        if further:
            same = text[text.index(', "depth"') : text.index(', "offset"')]
            lines = [
                f',\n{{ "start": {at}, "length": {length}{same}, "offset": {place}}}' for at, length, place in further
            ]
            print("".join(lines), end="")
    print("]")


async def _print_graph(session: ImageSession, wanted: ImageArguments, start: int, max_length: int | None) -> None:
    import shutil

    from qblock.tools.console import Style
    from qblock.tools.map_graph import draw, lines

    node = (await session.open(wanted)).node
    end = node.length if max_length is None else min(node.length, start + max_length)
    if start >= end:
        raise CommandError("there is nothing to draw: the range is empty")
    names = max(len(layer.driver.filename() or layer.node_name) for layer in backing_chain(node))
    room = shutil.get_terminal_size().columns - names - ROOM_FOR_AMOUNTS
    rows = await draw(node, start, end, width=max(room, LEAST_COLUMNS))
    print("\n".join(lines(rows, start, end, Style.of_terminal())))


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


async def _print_lines(session: ImageSession, wanted: ImageArguments, start: int, max_length: int | None) -> None:
    started = False
    async for area, further in _areas(session, wanted, start, max_length):
        if not started:
            print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
            started = True
        if not area.data or area.zero or not area.length:
            continue
        if area.offset is None:
            raise CommandError(
                f"'{wanted.name}' holds data that have no plain place in a file (compressed clusters, for example) "
                f"at offset {area.start}; use --output=json"
            )
        parts = [(area.start, area.length, area.offset), *further]
        lines = [
            f"{_hex(at):<16}{_hex(length):<16}{_hex(place):<16}{area.filename}\n" for at, length, place in parts
        ]
        print("".join(lines), end="")
