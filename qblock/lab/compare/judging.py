"""What an image is worth after a crash: does it open, does it check clean, does it hold what the guest was promised.

The promise: a write that was answered before a flush was sent, which was answered, is there. What was written since may be
there or not, each write for itself; anything else is a loss.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from qblock.errors import QBlockError
from qblock.image import Image
from qblock.lab.compare.history import Answered, Issued, Record
from qblock.lab.compare.load import BLOCK, FIRST_TAG, FLUSH, WRITE, marked, tag_of
from qblock.units import MiB

_PIECE: Final = MiB


class State(enum.Enum):
    """What can be said of an image, from bad to good."""

    ABSENT = "absent"
    UNREADABLE = "unreadable"
    CORRUPT = "corrupt"
    INCOMPLETE = "incomplete"
    GOOD = "good"


@attrs.frozen
class Verdict:
    """The state of an image; ``lost`` counts the blocks of 4 KiB that do not hold what was promised."""

    state: State
    lost: int = 0
    detail: str = ""

    @property
    def good(self) -> bool:
        """Whether the guest can go on with it."""
        return self.state is State.GOOD


@attrs.define(eq=False)
class Promise:
    """What a disk of ``size`` bytes must hold at a moment of a history: follows it record by record."""

    size: int
    moment: int = attrs.field(init=False, default=0)
    version: int = attrs.field(init=False, default=0)
    """How often the promise has changed."""
    content: bytearray = attrs.field(init=False, repr=False)
    """The disk as the last flush promised it."""
    _settled: list[int] = attrs.field(init=False, repr=False)
    _recent: dict[int, list[int]] = attrs.field(init=False, factory=dict)
    """Tags of the writes of each block since then, oldest first."""
    _answered: dict[int, int] = attrs.field(init=False, factory=dict)
    _under_way: dict[int, tuple[int, Issued]] = attrs.field(init=False, factory=dict)

    @classmethod
    def of(cls, size: int, tags: Mapping[int, int]) -> Promise:
        """That of a disk which begins with these tags, by block number."""
        promise = cls(size)
        promise._settled = [0] * (size // BLOCK)
        promise.content = bytearray(size)
        for block, tag in tags.items():
            promise._settle(block, tag)
        return promise

    def advance(self, records: Sequence[Record], moment: int) -> None:
        """Go on to ``moment``, which is not before the present one."""
        for index in range(self.moment, moment):
            record = records[index]
            if isinstance(record, Issued):
                self._under_way[record.number] = (index, record)
                if record.op == WRITE:
                    self.version += 1
                    for block in _blocks(record):
                        self._recent.setdefault(block, []).append(FIRST_TAG + record.number)
            elif isinstance(record, Answered):
                sent, request = self._under_way.pop(record.number)
                if request.op == WRITE and not record.error:
                    self._answered[FIRST_TAG + record.number] = index
                elif request.op == FLUSH and not record.error:
                    self._flushed(sent)
        self.moment = moment

    def _flushed(self, sent: int) -> None:
        """A flush was done that was sent at the moment ``sent``: what was answered by then is promised."""
        for block, tags in list(self._recent.items()):
            covered = [number for number, tag in enumerate(tags) if self._answered.get(tag, sent) < sent]
            if covered:
                self._settle(block, tags[covered[-1]])
                del tags[: covered[-1] + 1]
                if not tags:
                    del self._recent[block]

    def _settle(self, block: int, tag: int) -> None:
        self.version += 1
        self._settled[block] = tag
        self.content[block * BLOCK : (block + 1) * BLOCK] = marked(tag, block)

    def broken_blocks(self, offset: int, found: bytes) -> int:
        """How many blocks of ``found``, which begins at ``offset``, are not as promised."""
        content = self.content[offset : offset + len(found)]
        if content == found:
            return 0
        broken = 0
        for start in range(0, len(found), BLOCK):
            piece, block = found[start : start + BLOCK], (offset + start) // BLOCK
            if piece != content[start : start + BLOCK] and tag_of(piece, block) not in self._recent.get(block, ()):
                broken += 1
        return broken


def _blocks(request: Issued) -> range:
    return range(request.offset // BLOCK, (request.offset + request.length) // BLOCK)


def judge(path: Path, promise: Promise) -> Verdict:
    """Look at an image file as it was left behind, with what it names below it. Does not change it."""
    if not path.exists():
        return Verdict(State.ABSENT)
    try:
        with Image(path, fmt="qcow2", backing=True) as image:
            check = image.check()
            if check.corruptions or check.check_errors:
                return Verdict(State.CORRUPT, detail=f"{check.corruptions} corruptions, {check.check_errors} errors")
            lost = _lost_blocks(image, promise)
    except (QBlockError, OSError) as error:
        return Verdict(State.UNREADABLE, detail=str(error).replace(f"{path.parent.parent}/", ""))
    return Verdict(State.INCOMPLETE if lost else State.GOOD, lost)


def _lost_blocks(image: Image, promise: Promise) -> int:
    """How many blocks an open image lacks; those behind its end are lost."""
    length = min(image.length, promise.size)
    lost = (promise.size - length) // BLOCK
    for offset in range(0, length, _PIECE):
        lost += promise.broken_blocks(offset, image.read(offset, min(_PIECE, length - offset)))
    return lost
