"""A sheet to draw on, which becomes an SVG file. Lengths are pixels from the upper left corner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"
INK = "#1b1f24"
FAINT = "#6b7280"
RULE = "#d4d8de"


class Sheet:
    """White paper of a size. Text and attributes are escaped by the XML library."""

    def __init__(self, width: float, height: float, *, title: str) -> None:
        self._root = ElementTree.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "viewBox": f"0 0 {_number(width)} {_number(height)}",
                "width": _number(width),
                "height": _number(height),
                "font-family": FONT,
                "role": "img",
            },
        )
        self._add("title").text = title
        self.box(0, 0, width, height, fill="#ffffff")

    def _add(self, tag: str, **attributes: str | float) -> ElementTree.Element:
        named = {name.replace("_", "-"): _number(value) for name, value in attributes.items()}
        return ElementTree.SubElement(self._root, tag, named)

    def box(self, x: float, y: float, width: float, height: float, *, fill: str, hint: str = "") -> None:
        """A filled rectangle; ``hint`` is shown by a browser when the pointer is on it."""
        self._hinted(self._add("rect", x=x, y=y, width=max(width, 0), height=height, fill=fill), hint)

    def line(self, start: tuple[float, float], end: tuple[float, float], *, colour: str = RULE, width: float = 1) -> None:
        """A straight line."""
        self._add("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], stroke=colour, stroke_width=width)

    def stairs(self, steps: Sequence[tuple[float, float]], *, foot: float, colour: str, dashes: str = "") -> None:
        """A line that begins at the height ``foot`` and goes to the x of each step, then to its y."""
        way = "".join(f"H{_number(x)}V{_number(y)}" for x, y in steps)
        dashed = {"stroke_dasharray": dashes} if dashes else {}
        start = f"M{_number(steps[0][0])} {_number(foot)}"
        self._add("path", d=start + way, fill="none", stroke=colour, stroke_width=2, stroke_linejoin="round", **dashed)

    def dot(self, x: float, y: float, *, radius: float, fill: str, edge: str, hint: str = "") -> None:
        """A small circle."""
        self._hinted(self._add("circle", cx=x, cy=y, r=radius, fill=fill, stroke=edge, stroke_width=1.4), hint)

    def text(
        self, x: float, y: float, words: str, *, size: float = 12, colour: str = INK, anchor: str = "start", bold: bool = False
    ) -> None:
        """Words whose baseline is at ``y``; ``anchor`` is start, middle or end."""
        weight = {"font_weight": "bold"} if bold else {}
        self._add("text", x=x, y=y, font_size=size, fill=colour, text_anchor=anchor, **weight).text = words

    def lines(self, x: float, y: float, texts: Iterable[str], *, size: float, colour: str = FAINT) -> None:
        """Several lines of text, the first at ``y``."""
        for number, words in enumerate(texts):
            self.text(x, y + number * size * 1.25, words, size=size, colour=colour)

    @staticmethod
    def _hinted(element: ElementTree.Element, hint: str) -> None:
        if hint:
            ElementTree.SubElement(element, "title").text = hint

    def svg(self) -> str:
        """The file's text."""
        ElementTree.indent(self._root, " ")
        return ElementTree.tostring(self._root, encoding="unicode") + "\n"


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".rstrip("0").rstrip(".")
