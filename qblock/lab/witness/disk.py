"""The disk of the experiment: what it holds at first, what the guest writes to it, and what an image holds of that.

Everything on the disk is text in records of 16 bytes, so ``strings`` on an image shows what was lost. The guest's journal tells
what it wrote and what was flushed when; it lies outside the machine, as does whoever the guest has told that its data is safe.
Offsets and lengths are bytes.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import attrs

from qblock.driver import CheckResult
from qblock.errors import QBlockError
from qblock.image import open_image
from qblock.testing.images import make_chain
from qblock.units import KiB, MiB

CHUNKS: Final = 2
"""Parts of the disk that the mirror copies at once, each 1 MiB."""
SIZE: Final = CHUNKS * MiB
CLUSTER: Final = 64 * KiB
BLOCK: Final = 4 * KiB
"""What one write of the guest covers."""
RECORD: Final = 16

BASE: Final = "base.qcow2"
SOURCE: Final = "source.qcow2"
GUEST_JOURNAL: Final = "guest.journal"


class GuestKind(enum.Enum):
    """What the guest does with its disk."""

    COUNTER = "counter"
    """Writes are numbered, and go all over the disk: each one that is lost is seen."""
    DOOR = "door"
    """One block says whether a door is open; each write says the other thing: the same contents come back."""


@attrs.frozen
class Write:
    """Write ``number`` (from 1) of the guest: ``record``, again and again, in the block at ``offset``."""

    number: int
    offset: int
    record: bytes

    @property
    def content(self) -> bytes:
        """The bytes of the whole block."""
        return self.record * (BLOCK // RECORD)


def make_write(kind: GuestKind, number: int) -> Write:
    """The guest's write of that number. Numbered writes that follow each other lie in different chunks."""
    if kind is GuestKind.DOOR:
        return Write(number, BLOCK, b"the door is open" if number % 2 else b"the door is shut")
    place = number % (SIZE // CLUSTER)
    return Write(number, place % CHUNKS * MiB + place // CHUNKS * CLUSTER + BLOCK, b"write %09d\n" % number)


def _first_record(cluster: int) -> bytes:
    """What the chain is made with: every third cluster is in the base, every third in the overlay, the rest is zero."""
    return (b"base  %09d\n" % cluster, b"layer %09d\n" % cluster, bytes(RECORD))[cluster % 3]


@cache
def first_content() -> bytes:
    """The whole disk as it is before the guest starts."""
    return b"".join(_first_record(cluster) * (CLUSTER // RECORD) for cluster in range(SIZE // CLUSTER))


def make_disk(directory: Path) -> None:
    """Make the chain that all cases begin with."""
    clusters, times = range(SIZE // CLUSTER), CLUSTER // RECORD
    base = {number * CLUSTER: b"base  %09d\n" % number * times for number in clusters if number % 3 != 2}
    layer = {number * CLUSTER: _first_record(number) * times for number in clusters if number % 3 == 1}
    make_chain(directory, SIZE, [(BASE, base), (SOURCE, layer)])


# ------------------------------------------------------------------------------------------------------- the guest's journal


@attrs.frozen
class History:
    """What the guest's journal tells: its writes in order, and the number of the last one that was flushed."""

    writes: Sequence[Write] = ()
    flushed: int = 0

    @classmethod
    def read(cls, path: Path) -> History:
        """From the journal's file; a line that was cut off by a kill does not count."""
        writes, flushed = [], 0
        for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
            entry = json.loads(line) if line.endswith("\n") else {}
            if "write" in entry:
                writes.append(Write(entry["write"], entry["offset"], entry["record"].encode()))
            flushed = entry.get("flushed", flushed)
        return cls(tuple(writes), flushed)

    def by_place(self) -> Mapping[int, list[Write]]:
        """The writes to each block, in order."""
        places: dict[int, list[Write]] = {}
        for write in self.writes:
            places.setdefault(write.offset, []).append(write)
        return places


def write_entry(write: Write) -> bytes:
    """The journal's line before a write is sent."""
    entry = {"write": write.number, "offset": write.offset, "record": write.record.decode()}
    return json.dumps(entry).encode() + b"\n"


def flushed_entry(number: int) -> bytes:
    """The journal's line when all writes up to that number have been flushed."""
    return json.dumps({"flushed": number}).encode() + b"\n"


# ------------------------------------------------------------------------------------------------------------- an image


def _numbers(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(values)


@attrs.frozen
class Findings:
    """What an image holds of a guest's writes.

    ``lost``: numbers of flushed writes whose block holds neither them nor anything written there later. ``damaged``: offsets
    of blocks that hold what nobody wrote. ``corruptions`` and ``leaks`` as the format's own check counts them. ``error``:
    the image cannot be used at all. ``objection``: what another program's check has to say against it.
    """

    lost: Sequence[int] = attrs.field(default=(), converter=_numbers)
    damaged: Sequence[int] = attrs.field(default=(), converter=_numbers)
    corruptions: int = 0
    leaks: int = 0
    error: str = ""
    objection: str = ""

    @property
    def sound(self) -> bool:
        """Whether a guest could go on with the image and miss nothing. Leaked clusters are allowed."""
        return not (self.lost or self.damaged or self.corruptions or self.error or self.objection)


def examine(path: Path, history: History) -> Findings:
    """Open an image with its backing files, as for a guest, and look for everything in ``history``. Its name tells its format."""
    if not path.exists():
        return Findings(error="there is no such file")
    try:
        fmt = path.suffix.removeprefix(".")
        with open_image(path, fmt=fmt, backing=True) as image:
            checked = CheckResult() if fmt == "raw" else image.check()
            content = image.read(0, image.length)
    except (QBlockError, OSError) as error:
        return Findings(error=str(error).replace(f"{path.parent}/", ""))
    lost = tuple(sorted(_lost_writes(content, history)))
    damaged = tuple(_damaged_blocks(content, history))
    return Findings(lost, damaged, checked.corruptions, checked.leaks)


def _lost_writes(content: bytes, history: History) -> Iterator[int]:
    for offset, writes in history.by_place().items():
        held = content[offset : offset + BLOCK]
        newest = max((write.number for write in writes if write.content == held), default=0)
        yield from (write.number for write in writes if newest < write.number <= history.flushed)


def _damaged_blocks(content: bytes, history: History) -> Iterator[int]:
    expected = bytearray(first_content())
    for offset, writes in history.by_place().items():
        held = content[offset : offset + BLOCK]
        if any(write.content == held for write in writes):
            expected[offset : offset + BLOCK] = held
    if content != expected:
        for offset in range(0, max(len(content), len(expected)), BLOCK):
            if content[offset : offset + BLOCK] != expected[offset : offset + BLOCK]:
                yield offset
