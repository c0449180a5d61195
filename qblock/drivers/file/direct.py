"""Reading and writing without the page cache (``O_DIRECT``): what alignment it takes, and buffers that have it.

All functions block, and raise `OSError`.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from typing import Final

from qblock.units import MiB
from qblock.zeroes import fill_zero

BOUNCE: Final = MiB
"""Bytes of a `Bounce`."""
_DIRECT_ALIGNMENTS: Final = (512, 4096)
_BLKSSZGET: Final = 0x1268


class Bounce(threading.local):
    """A thread's aligned buffer for O_DIRECT: making one for each request would cost more than a small request."""

    def __init__(self) -> None:
        self.buffer = memoryview(mmap.mmap(-1, BOUNCE))


def alignment_of(fd: int, *, is_device: bool) -> int:
    """The smallest unit in bytes that O_DIRECT takes for an open file."""
    if is_device:
        answer = fcntl.ioctl(fd, _BLKSSZGET, b"\0" * 4)
        return int.from_bytes(answer, "little")
    with mmap.mmap(-1, _DIRECT_ALIGNMENTS[-1]) as area, memoryview(area) as page:
        for alignment in _DIRECT_ALIGNMENTS:
            with contextlib.suppress(OSError), page[:alignment] as block:
                os.preadv(fd, (block,), 0)
                return alignment
    return _DIRECT_ALIGNMENTS[-1]


def set_direct(fd: int, *, on: bool) -> None:
    """Let an open file bypass the page cache, or use it."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)


def read_once(fd: int, offset: int, piece: memoryview) -> None:
    """Fill ``piece``; a count that is no whole block is the end of the file."""
    done = 0
    while done < len(piece):
        count = os.preadv(fd, (piece[done:],), offset + done)
        done += count
        if not count or done % _DIRECT_ALIGNMENTS[0]:
            fill_zero(piece[done:])
            return
