"""What a machine says to the person at it beside the answers to commands: warnings, and what QEMU prints to standard output.

QEMU writes both to the streams of its process at once. Here they are kept until somebody takes them (a prompt shows them with
the answer to a line), or handed to a listener as they come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import attrs

KEPT: Final = 1000


@attrs.frozen
class Report:
    """One text, ended by a newline; ``is_complaint`` tells which of the two streams it belongs to."""

    text: str
    is_complaint: bool = False


@attrs.define(eq=False)
class Reports:
    """Without a ``listener`` the last `KEPT` reports are kept."""

    listener: Callable[[Report], None] | None = None
    _kept: deque[Report] = attrs.field(init=False, factory=lambda: deque(maxlen=KEPT))

    def say(self, text: str) -> None:
        """Something that a program prints to its standard output."""
        self._add(Report(text.rstrip("\n") + "\n"))

    def complain(self, text: str) -> None:
        """Something that a program prints to its standard error."""
        self._add(Report(text.rstrip("\n") + "\n", is_complaint=True))

    def warn(self, text: str) -> None:
        """A warning of the block layer."""
        self.complain(f"warning: {text}")

    def take(self) -> list[Report]:
        """Those kept, which are not kept any longer."""
        taken = list(self._kept)
        self._kept.clear()
        return taken

    def _add(self, report: Report) -> None:
        if self.listener is not None:
            self.listener(report)
        else:
            self._kept.append(report)
