"""Reading compressed clusters: what lies side by side is read at once, and unpacked by threads.

Models image-formats.md section 1.5 (reader). A row of compressed clusters is cut into jobs of at most `JOB` bytes of the disk.
Each job reads its packed data, by one request where they lie one behind the other as writers leave them, and has them unpacked in
a thread, since the decoders let go of the interpreter: all processors unpack. Reading does not wait for threads, so the disk and
the processors are busy at the same time; no more than `WINDOW` bytes of one call are on their way.

Differs from QEMU, which reads and unpacks one cluster at a time.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterator, Sequence
from typing import Final

from qblock.drivers.qcow2.compression import PackedPart, decompress
from qblock.drivers.qcow2.layout import COMPRESSED, Geometry, compressed_location
from qblock.drivers.qcow2.storage import ImageFile
from qblock.threads import COMPUTING, ThreadQueue
from qblock.units import KiB, MiB

JOB: Final = 512 * KiB
"""Bytes (or one cluster) that a thread unpacks at a time."""
ALONE: Final = 64 * KiB
"""Up to this size a lone cluster is unpacked at once: a thread would only add two switches."""
WINDOW: Final = 4 * MiB
"""Bytes of one call that are read before any of them is unpacked."""


def packed_row(entries: array[int], index: int, limit: int) -> array[int]:
    """The entries from ``index`` on, at most ``limit``, up to the first that is not a compressed cluster's."""
    end = index
    while end < index + limit and entries[end] & COMPRESSED:
        end += 1
    return entries[index:end]


class Unpacker:
    """Reads of compressed clusters of one open image."""

    def __init__(self, file: ImageFile, geometry: Geometry) -> None:
        self.file = file
        self._bits = geometry.cluster_bits
        self._size = geometry.cluster_size
        # An announced step belongs to one cluster.
        self._job = 1 if file.traced else max(JOB // self._size, 1)
        self._window = self._job if file.traced else max(WINDOW // self._size, 1)
        self._threads = ThreadQueue(file.env.executor, COMPUTING)

    async def read(self, entries: Sequence[int], start: int, view: memoryview) -> None:
        """Fill ``view`` from compressed clusters in a row, beginning ``start`` bytes into the first one. `BlockIOError`."""
        for at in range(0, len(entries), self._window):
            window = range(at, min(at + self._window, len(entries)))
            jobs = [
                self._run(entries[first : first + self._job], *self._part(view, start, first, first + self._job))
                for first in window[:: self._job]
            ]
            if len(jobs) == 1:
                await jobs[0]
                continue
            # All of them have let go of the caller's buffer before a failure is told.
            for failure in await asyncio.gather(*jobs, return_exceptions=True):
                if failure is not None:
                    raise failure

    def _part(self, view: memoryview, start: int, first: int, end: int) -> tuple[int, memoryview]:
        """Which part of ``view`` the clusters ``first`` to ``end`` (exclusive) of a row fill, and how far into the first one."""
        return 0 if first else start, view[max(first * self._size - start, 0) : end * self._size - start]

    async def _run(self, entries: Sequence[int], start: int, view: memoryview) -> None:
        parts = []
        at = 0
        for packed in await self._read_packed(entries):
            count = min(self._size - start, len(view) - at)
            parts.append(PackedPart(packed, start, view[at : at + count]))
            start, at = 0, at + count
        if len(entries) == 1 and self._size <= ALONE:
            decompress(self.file.header.compression_type, parts, self._size)
        else:
            await self._threads.run(decompress, self.file.header.compression_type, parts, self._size)

    async def _read_packed(self, entries: Sequence[int]) -> list[memoryview]:
        """The packed forms, each with what may follow it in its last sector."""
        forms: list[memoryview] = []
        for offset, row in self._neighbours(entries):
            self.file.event("read_compressed")
            data = memoryview(await self.file.read(offset, row[-1][0] + row[-1][1] - offset))
            forms.extend(data[place - offset : place - offset + length] for place, length in row)
        return forms

    def _neighbours(self, entries: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """The places (offset, length) of packed clusters, those together of which each begins where the one before it ends."""
        row: list[tuple[int, int]] = []
        for entry in entries:
            offset, length = compressed_location(entry, self._bits)
            if row and not row[-1][0] <= offset <= row[-1][0] + row[-1][1]:
                yield row[0][0], row
                row = []
            row.append((offset, length))
        yield row[0][0], row
