"""Image files of a given shape, and a model of what a disk should hold.

For tests that need a disk or a chain of overlays with known content, and want to know afterwards whether a copy holds
the same. Images are made with the library's own synchronous face (`qblock.image`). Offsets and sizes are bytes; sizes
may also be text such as ``"64M"``.
"""

from __future__ import annotations

import random as random_module
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import attrs

from qblock.image import Image, create, open_image
from qblock.units import KiB, MiB, align_down, parse_size

PAGE: Final = 64 * KiB
COMPARE_STEP: Final = MiB

Content: TypeAlias = Mapping[int, bytes] | Mapping[str, bytes]
"""What to write: bytes by the offset at which they go (a number, or text such as ``"1M"``)."""


def make_image(
    path: str | Path,
    size: int | str,
    data: Content | None = None,
    *,
    fmt: str = "qcow2",
    backing: str | Path | None = None,
    **options: Any,
) -> Path:
    """Make an image with ``data`` in it; ``options`` are creation options (``cluster_size=4096``).

    ``backing`` is a qcow2 image unless ``backing_fmt`` says otherwise. Returns the path.
    """
    if backing is not None:
        options.setdefault("backing_fmt", "qcow2")
    create(path, size, fmt=fmt, backing=backing, **options)
    with open_image(path, writable=True, fmt=fmt, backing=backing is not None) as image:
        for offset, piece in (data or {}).items():
            image.write(parse_size(offset) if isinstance(offset, str) else offset, piece)
    return Path(path)


def make_chain(directory: str | Path, size: int | str, layers: Sequence[tuple[str, Content]]) -> list[Path]:
    """Make a qcow2 chain in ``directory``: file names and contents from the base up. Returns the paths, base first."""
    paths: list[Path] = []
    for name, data in layers:
        backing = paths[-1].name if paths else None
        paths.append(make_image(Path(directory) / name, size, data, backing=backing))
    return paths


def random_blocks(random: random_module.Random, size: int, *, count: int, block: int = PAGE) -> dict[int, bytes]:
    """``count`` blocks of random bytes at different aligned places of a disk of ``size`` bytes (fewer if it is too
    small).
    """
    places = random.sample(range(size // block), min(count, size // block))
    return {place * block: random.randbytes(block) for place in sorted(places)}


@attrs.define(eq=False)
class DiskModel:
    """What a disk of ``size`` bytes should hold, kept sparsely; what was never written is zero."""

    size: int
    _pages: dict[int, bytearray] = attrs.field(init=False, factory=dict, repr=False)

    @classmethod
    def of_chain(cls, size: int, layers: Sequence[tuple[str, Content]]) -> DiskModel:
        """The content that `make_chain` gives the top of a chain."""
        model = cls(size)
        for _, data in layers:
            for offset, piece in data.items():
                model.write(parse_size(offset) if isinstance(offset, str) else offset, piece)
        return model

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """The disk should now hold ``data`` at ``offset``."""
        for start, end, page in self._pieces(offset, len(data)):
            held = self._pages.setdefault(page, bytearray(PAGE))
            held[start - page : end - page] = data[start - offset : end - offset]

    def read(self, offset: int, length: int) -> bytes:
        """What the disk should hold at ``offset``."""
        zeroes = bytes(PAGE)
        return b"".join(
            self._pages.get(page, zeroes)[start - page : end - page]
            for start, end, page in self._pieces(offset, length)
        )

    def first_difference(self, image: Image) -> int | None:
        """The offset of the first byte in which ``image`` differs from the model, or None; a shorter one differs at
        its end.
        """
        for offset in range(0, min(self.size, image.length), COMPARE_STEP):
            length = min(COMPARE_STEP, self.size - offset, image.length - offset)
            held, expected = image.read(offset, length), self.read(offset, length)
            if held != expected:
                return offset + next(i for i, (a, b) in enumerate(zip(held, expected, strict=True)) if a != b)
        return None if self.size == image.length else min(self.size, image.length)

    def save_raw(self, path: str | Path) -> None:
        """Write the model as a sparse raw image, for other programs to compare with."""
        with Path(path).open("wb") as file:
            file.truncate(self.size)
            for page, held in sorted(self._pages.items()):
                file.seek(page)
                file.write(held[: self.size - page])

    @staticmethod
    def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Start, end and page of the parts of a range that lie in one page each."""
        end = offset + length
        while offset < end:
            page = align_down(offset, PAGE)
            stop = min(end, page + PAGE)
            yield offset, stop, page
            offset = stop
