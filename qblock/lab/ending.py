"""An end by a signal, in the midst of anything: what must not stay behind is cleared up, and the process is gone at once.

An experiment runs loops and forks children, and exceptions may be held up in any of them, so nothing is unwound. What is to be
cleared up is noted in a list of this process, newest last; a forked child begins with an empty one (`begin_anew`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Those that ask a program to end."""

Duty = Callable[[], object]

_duties: Final[list[Duty]] = []


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """In this block, `SIGNALS` end the process after all duties, with the exit code that shells use (128 and the number).

    One that is ignored (``nohup``) stays ignored. Only for the main thread.
    """
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _end) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    while _duties:
        with contextlib.suppress(Exception):
            _duties.pop()()
    os._exit(128 + number)


@contextlib.contextmanager
def held_up() -> Iterator[None]:
    """In this block `SIGNALS` wait: between making something and noting that it is to be cleared up."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def note_duty(duty: Duty) -> None:
    """``duty`` is done when a signal ends the process, before all that were noted earlier."""
    _duties.append(duty)


def forget_duty(duty: Duty) -> None:
    """It has been done; nothing happens if it was never noted."""
    if duty in _duties:
        _duties.remove(duty)


def begin_anew() -> None:
    """In a forked child: the parent's duties are not ours, and signals end us as they end any process (or are ignored)."""
    _duties.clear()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def scratch_directory(prefix: str = "qblock-lab-", where: Path | None = None) -> Iterator[Path]:
    """A new directory (in ``where``, else where temporary files go) that is gone after the block, and after a signal."""
    with held_up():
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=where)).resolve()

        def remove() -> None:
            shutil.rmtree(directory, ignore_errors=True)  # a child may just be ending

        note_duty(remove)
    try:
        yield directory
    finally:
        remove()
        forget_duty(remove)
