"""The dirty bitmap of a device as the proposal of April 2012 has it: one per device, a bit for each chunk of 1 MiB.

Models the functions of the series' third patch (rfc-2012.md) over the product's own `DirtyBitmap`: set and reset a range, look
at a place, count, and find the next dirty chunk *after* a given place, going round at the end of the disk. The write path sets
bits through `DeviceDirty.bitmap`, which is put into a node's ``dirty_bitmaps``: `requests.py` does so after the write has
completed. (Set earlier, a copier could clear the bit, read what was there before the write, and the write would be lost.)

Differs from the proposal in its unit: places and lengths are bytes, not sectors of 512 bytes; and in that the range of a disk
whose size is no multiple of 1 MiB is counted to the disk's end.
"""

from __future__ import annotations

from typing import Final

import attrs

from qblock.dirty import DirtyBitmap
from qblock.units import MiB, align_down, align_up

CHUNK: Final = MiB
"""Bytes that one bit stands for."""


@attrs.define(eq=False)
class DeviceDirty:
    """The dirty chunks of a disk of ``length`` bytes, all clean at first. ``bitmap`` is what the write path gets."""

    length: int
    bitmap: DirtyBitmap = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.bitmap = DirtyBitmap(self.length, CHUNK)

    def set(self, offset: int, length: int) -> None:
        """Make every chunk dirty that the range touches."""
        self.bitmap.mark(offset, length)

    def reset(self, offset: int, length: int) -> None:
        """Make every chunk clean that the range touches."""
        if length > 0:
            start = align_down(offset, CHUNK)
            self.bitmap.reset(start, align_up(offset + length, CHUNK) - start)

    def get(self, offset: int) -> bool:
        """Whether the chunk that holds byte ``offset`` is dirty."""
        return self.bitmap.get(offset)

    @property
    def count(self) -> int:
        """Dirty bytes: those of whole chunks, of the last one only what lies on the disk."""
        overhang = -self.length % CHUNK
        return self.bitmap.count - (overhang if overhang and self.bitmap.get(self.length - 1) else 0)

    def get_next(self, after: int) -> int | None:
        """Where the next dirty chunk begins behind the one that holds byte ``after``; None when nothing is dirty.

        The search goes on at the start of the disk, so the chunk of ``after`` itself comes last. -1 searches from the start.
        """
        following = (after // CHUNK + 1) * CHUNK
        found = self.bitmap.next_dirty(following)
        return found if found is not None else self.bitmap.next_dirty(0)
