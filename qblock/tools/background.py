"""Programs that go to the background when everything is set up, and say by which process id they are known."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeAlias

from qblock.errors import CommandError, QBlockError
from qblock.tools.console import complain

Ready: TypeAlias = Callable[[], None]
"""Called by a program when it is set up."""


def in_background(program: str, serve: Callable[[Ready], None]) -> int:
    """Fork; the parent returns when the child is set up (0) or has failed (1), the child never returns."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            return 0 if pipe.read(1) == b"+" else 1
    os.close(reading)
    os.setsid()

    def ready() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        os.close(null)
        os.write(writing, b"+")
        os.close(writing)

    code = 0
    try:
        serve(ready)
    except QBlockError as error:
        complain(program, str(error))
        code = 1
    sys.stdout.flush()
    os._exit(code)


def write_pid(path: str) -> None:
    """Write the process id to a file; raises `CommandError`."""
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
    except OSError as error:
        raise CommandError(f"cannot write the pid file '{path}': {error.strerror}") from error


def remove_file(path: str) -> None:
    """Remove a file, if it is there."""
    try:
        os.unlink(path)
    except OSError:
        pass
