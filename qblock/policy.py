"""Who decides whether a file that an image merely names is opened.

QEMU opens whatever a header mentions. Here a gate stands before it (house.md, "Errors"): a library user gets nothing opened
that was not asked for, command lines that imitate QEMU's follow the header.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from qblock.errors import OpenDenied


@attrs.frozen
class Mention:
    """An image's header names another file: ``image`` is the file that says so, ``filename`` the one named (resolved),
    ``what`` its part (``backing file``), ``format`` what the header says of its format, if it does.
    """

    image: str
    filename: str
    what: str
    format: str | None


@attrs.frozen
class OpenPolicy:
    """A decision on each `Mention`; make one with `deny`, `follow` or `ask`."""

    _allows: Callable[[Mention], bool]

    @classmethod
    def deny(cls) -> OpenPolicy:
        """Open nothing that an image mentions."""
        return cls(lambda mention: False)

    @classmethod
    def follow(cls) -> OpenPolicy:
        """Open what images mention, as QEMU does."""
        return cls(lambda mention: True)

    @classmethod
    def ask(cls, allows: Callable[[Mention], bool]) -> OpenPolicy:
        """Open what ``allows`` says yes to."""
        return cls(allows)

    def check(self, mention: Mention) -> None:
        """Raise `OpenDenied` unless the mentioned file may be opened."""
        if not self._allows(mention):
            raise OpenDenied(image=mention.image, mentions=mention.filename, what=mention.what)
