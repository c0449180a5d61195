"""The files of a run as a crash at any moment would have left them, made again from the beginning and the history.

Two kinds of crash: the machine's process is *killed*, and what it wrote stays, since the host has it; or the *power* goes, and
nothing stays that was not flushed. Real disks keep some of what was not flushed; that none of it is kept is the case in which
a flush that was left out shows. Both are walked through in one go, from the first moment to the last.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qblock.lab.compare.history import NO_BYTES, WRITES, Effect, Flushed, Made, Record, Resized, Wrote

KILL: Final = "kill"
POWER: Final = "power"
CRASHES: Final = (KILL, POWER)
_PIECE: Final = 1 << 20


class Replay:
    """Files that follow a history. ``directories`` tells for each kind of crash where its files are; they are ours to make.

    ``versions`` counts how often the files of a kind of crash on a disk have changed.
    """

    def __init__(self, run: Path, records: Sequence[Record], directories: dict[str, Path]) -> None:
        self.moment = 0
        self.versions: Counter[tuple[str, str]] = Counter()
        self._records = records
        self._directories = directories
        self._unflushed: dict[str, list[tuple[int, Effect]]] = {}
        with (run / WRITES).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._bytes = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b"")

    def advance(self, moment: int) -> None:
        """Go on to ``moment``, which is not before the present one."""
        for index in range(self.moment, moment):
            record = self._records[index]
            if isinstance(record, Flushed):
                self._flush(record)
            elif isinstance(record, (Made, Wrote, Resized)):
                self._apply(KILL, record)
                if isinstance(record, Made):
                    self._unflushed.pop(record.file, None)
                    self._apply(POWER, record)
                else:
                    self._unflushed.setdefault(record.file, []).append((index, record))
        self.moment = moment

    def _flush(self, record: Flushed) -> None:
        waiting = self._unflushed.pop(record.file, [])
        for index, effect in waiting:
            if index < record.began:
                self._apply(POWER, effect)
            else:
                self._unflushed.setdefault(record.file, []).append((index, effect))

    def _apply(self, crash: str, effect: Effect) -> None:
        path = self._directories[crash] / effect.file
        self.versions[crash, effect.file.partition("/")[0]] += 1
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if isinstance(effect, Made):
                os.ftruncate(fd, 0)
            elif isinstance(effect, Resized):
                os.ftruncate(fd, effect.length)
            elif isinstance(effect, Wrote):
                self._write(fd, effect)
        finally:
            os.close(fd)

    def _write(self, fd: int, effect: Wrote) -> None:
        if effect.place != NO_BYTES:
            os.pwrite(fd, self._bytes[effect.place : effect.place + effect.length], effect.offset)
            return
        for offset in range(effect.offset, effect.offset + effect.length, _PIECE):
            os.pwrite(fd, bytes(min(_PIECE, effect.offset + effect.length - offset)), offset)
