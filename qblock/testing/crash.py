"""`CrashStorage`: a storage in memory that remembers every write and flush, so that a crash at any moment can be replayed.

Part of the public kit: put a format driver on it, let it work, then ask for the image that a killed process
(`CrashStorage.after_kill`) or a power cut (`CrashStorage.after_power_cut`) would have left behind at some moment.
"""

from __future__ import annotations

import asyncio
import errno
from random import Random
from typing import Any, ClassVar, Final, NamedTuple

import attrs

from qblock.driver import Driver
from qblock.environment import Environment
from qblock.errors import BlockIOError
from qblock.extents import Data, Extent
from qblock.node import BlockDriverState
from qblock.options import DriverOptions
from qblock.zeroes import fill_zero

SECTOR: Final = 512


class Effect(NamedTuple):
    """One thing that happened: ``write`` with its bytes, ``truncate`` (offset: new length), ``flush`` (offset: how many
    effects it covers)."""

    kind: str
    offset: int = 0
    data: bytes = b""


@attrs.frozen
class CrashStorageOptions(DriverOptions):
    """None."""


class CrashStorage(Driver):
    """See the module. ``live`` is the content; ``effects`` what was done, oldest first.

    With ``restless`` every request waits for one turn of the loop first, so that schedules can order them. ``fail_writes``
    counts writes down: the one that finds it at 0 fails with ``failure``, and so do all that follow.
    """

    name: ClassVar[str] = "crash-storage"
    options_class: ClassVar[type[DriverOptions]] = CrashStorageOptions
    is_protocol: ClassVar[bool] = True
    supports_write_zeroes: ClassVar[bool] = True
    supports_discard: ClassVar[bool] = True

    def __init__(self, node: BlockDriverState, options: Any, env: Environment) -> None:
        super().__init__(node, options, env)
        self.live = bytearray()
        self.start = b""
        self.effects: list[Effect] = []
        self.journal: list[CrashStorage] = []
        """Whose turn each effect was; storages that are to crash together are given one list (`moments`)."""
        self.restless = False
        self.fail_writes: int | None = None
        self.failure = errno.EIO

    def fill(self, content: bytes) -> None:
        """Begin with this content, as if it had always been there."""
        self.live = bytearray(content)
        self.start = bytes(content)
        self.effects.clear()
        self.journal.clear()

    # ------------------------------------------------------------------------------------------------------- as a driver

    async def open(self) -> None:
        """See `Driver`."""

    def length(self) -> int:
        """See `Driver`."""
        return len(self.live)

    async def _turn(self, *, writes: bool = False) -> None:
        if self.restless:
            await asyncio.sleep(0)
        if writes and self.fail_writes is not None:
            self.fail_writes -= 1
            if self.fail_writes < 0:
                raise BlockIOError(self.failure)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        await self._turn()
        part = self.live[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        fill_zero(buffer[len(part) :])

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        await self._turn(writes=True)
        self._do(Effect("write", offset, bytes(buffer)))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`."""
        await self._turn(writes=True)
        self._do(Effect("write", offset, bytes(length)))

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`: the worst that can happen, the content turns into something else."""
        await self._turn()
        self._do(Effect("write", offset, b"\xdd" * length))

    async def flush(self) -> None:
        """See `Driver`. Covers what had happened when it began."""
        at = len(self.effects)
        await self._turn(writes=True)
        self.effects.append(Effect("flush", at))
        self.journal.append(self)

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """See `Driver`."""
        await self._turn(writes=True)
        self._do(Effect("truncate", length))

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """See `Driver`."""
        return Data(length, offset)

    def _do(self, effect: Effect) -> None:
        self.effects.append(effect)
        self.journal.append(self)
        apply_effect(self.live, effect)

    # --------------------------------------------------------------------------------------------------------- crashes

    def after_kill(self, moment: int) -> bytes:
        """The content after the first ``moment`` effects: the process died, the page cache lived on."""
        image = bytearray(self.start)
        for effect in self.effects[:moment]:
            apply_effect(image, effect)
        return bytes(image)

    def moment_at(self, moment: int) -> int:
        """How many of the first ``moment`` effects of the journal were this storage's."""
        return sum(storage is self for storage in self.journal[:moment])

    def last_flush(self, moment: int) -> int:
        """How many of the first ``moment`` effects a flush has made durable."""
        return max((effect.offset for effect in self.effects[:moment] if effect.kind == "flush"), default=0)

    def after_power_cut(self, moment: int, random: Random) -> bytes:
        """As `after_kill`, but of what no flush covered only a part, drawn at random, has reached the medium.

        Sectors of one write are kept or lost by themselves; so is a new length of the file. Which order they went in is
        covered by that: of two writes to a sector the later one may be lost. How much is lost differs from draw to draw,
        from nearly nothing to nearly everything.
        """
        durable = self.last_flush(moment)
        image = bytearray(self.after_kill(durable))
        kept = random.choice((0.05, 0.5, 0.95))
        for effect in self.effects[durable:moment]:
            if effect.kind == "truncate" and random.random() < kept:
                apply_effect(image, effect)
            if effect.kind != "write":
                continue
            start = effect.offset
            while start < effect.offset + len(effect.data):
                end = min((start // SECTOR + 1) * SECTOR, effect.offset + len(effect.data))
                if random.random() < kept:
                    apply_effect(image, Effect("write", start, effect.data[start - effect.offset : end - effect.offset]))
                start = end
        return bytes(image)


def apply_effect(image: bytearray, effect: Effect) -> None:
    """Do to a content what ``effect`` says."""
    if effect.kind == "write":
        end = effect.offset + len(effect.data)
        if end > len(image):
            image.extend(bytes(end - len(image)))
        image[effect.offset : end] = effect.data
    elif effect.kind == "truncate":
        if effect.offset < len(image):
            del image[effect.offset :]
        else:
            image.extend(bytes(effect.offset - len(image)))
