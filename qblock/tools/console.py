"""What the programs share as processes: their version, where complaints go, how they end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Final, NoReturn

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


class Progress:
    """The percentage of -p: printed at the start, whenever it has grown by a hundredth, and with a newline at the end.

    Without -p it is told on stderr to whoever sends SIGUSR1 (or SIGINFO, where there is one); -q does not silence that.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
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
            print(f"    ({percent:.2f}/100%)", end="\r", flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self.enabled:
            print()
