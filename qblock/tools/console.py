"""What the programs share as processes: their version, where complaints go, how they end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NoReturn, Protocol

import attrs

PROGRAM_VERSION: Final = "0.1.0 (speaks as QEMU 7.2)"


def complain(program: str, text: str) -> None:
    """One message on stderr, after what was printed so far."""
    sys.stdout.flush()
    print(f"{program}: {text}", file=sys.stderr)


def ending_quietly(run: Callable[[], int]) -> int:
    """Run a program's body; an interrupt ends with 130 and a closed pipe with 1, both without a traceback."""
    try:
        code = run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def end_program(text: str) -> NoReturn:
    """End the process with status 1 in the middle of what it does: disks that must be alike differ."""
    print(text, file=sys.stderr)
    leave(1)


def leave(code: int) -> NoReturn:
    """End the process at once: everything is flushed and closed, and taking the interpreter apart costs milliseconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@attrs.frozen
class Style:
    """Weights and colours, where there is somebody to see them."""

    colours: bool

    @classmethod
    def of_terminal(cls) -> Style:
        """Colours when standard output is a terminal that has them, and nobody asked for none (``NO_COLOR``)."""
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        return cls(sys.stdout.isatty() and not plain)

    def paint(self, text: str, code: str) -> str:
        """``text`` with an SGR code."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours and text else text

    def bold(self, text: str) -> str:
        """What the eye is to find."""
        return self.paint(text, "1")

    def dim(self, text: str) -> str:
        """What matters less."""
        return self.paint(text, "2")

    def warning(self, text: str) -> str:
        """What is not as it should be."""
        return self.paint(text, "33")


class Teller(Protocol):
    """Hears how far something is."""

    def show(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes."""


@attrs.frozen
class Told:
    """Tells a function how far something is."""

    _callback: Callable[[int, int], None]

    def show(self, done: int, total: int) -> None:
        """See `Teller`."""
        self._callback(done, total)


class Progress:
    """The percentage of -p: printed at the start, whenever it has grown by a hundredth, and with a newline at the end.

    Without -p it is told on stderr to whoever sends SIGUSR1 (or SIGINFO, where there is one); -q does not silence that.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._terminal = sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf")
        self._printed = -1.0
        self._percent = 0.0
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGUSR1", "SIGINFO"):
                if (number := getattr(signal, name, None)) is not None:
                    signal.signal(number, self._tell)

    def _tell(self, number: int, frame: object) -> None:
        # Not by print: the signal may have come in the middle of one.
        if not self.enabled:
            os.write(2, f"    ({self._percent:.2f}/100%)\n".encode())

    def show(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes."""
        percent = self._percent = 100 * done / total if total else 100.0
        if self.enabled and (percent - self._printed >= 1 or (percent >= 100 > self._printed)):
            self._printed = percent
            print(f"    ({percent:.2f}/100%){self._bar(percent)}", end="\r", flush=True)

    def _bar(self, percent: float) -> str:
        """What stands behind the percentage at a terminal."""
        if not self._terminal:
            return ""
        import shutil  # only who shows progress needs it

        width = max(min(shutil.get_terminal_size().columns - 24, 60), 0)
        done = round(width * percent / 100)
        return f" {'█' * done}{'░' * (width - done)}"

    @contextmanager
    def line(self, *, from_start: bool = False) -> Iterator[None]:
        """The work that is told of; the line ends with it, whether it succeeds or fails. ``from_start``: it begins at once."""
        if from_start:
            self.show(0, 1)
        try:
            yield
        finally:
            if self.enabled:
                print()
