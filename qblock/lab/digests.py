"""What files were when a verdict was found on them, so that whoever looks later notices that one of them is another now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

Digests = Mapping[str, str]
"""The SHA-256 of files by their names; an empty text for one that is not there."""


def digests(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """Those of the files ``names`` below ``directory``. Raises `OSError` when one cannot be read."""
    return {name: _digest(directory / name) for name in names}


def changed(before: Digests, now: Digests) -> list[str]:
    """The names of which they tell different things, in the order of ``before``."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _digest(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
