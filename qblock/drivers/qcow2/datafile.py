"""Images whose guest clusters lie in a file of their own, while the image file holds metadata only.

Models image-formats.md section 1.11. Every guest cluster lies in the data file at its guest offset; the L2 tables say which of
them count. The data file has no refcounts, no compressed clusters and no snapshots. An entry that points elsewhere is damage,
found by whoever meets it. Where the header says that the data file is *raw*, it reads as the disk does without its metadata: what
becomes zero in the tables becomes zero in the data file first.

Order of effects: data reach the data file before the entry that refers to them (`ImageFile.barrier` flushes both files, the
data file first), and so do zeroes that stand for discarded clusters, so that a crash shows the old content or zeroes.

Differs from QEMU in that discards keep a raw data file true: what the guest discarded is zeroed there, too (QEMU leaves the old
content unless discards are passed on).
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from qblock import requests
from qblock.drivers.qcow2.allocation import Allocator
from qblock.drivers.qcow2.clusters import ClusterMap
from qblock.drivers.qcow2.layout import OFFSET_MASK, Kind, Run
from qblock.drivers.qcow2.refcounts import Claim
from qblock.errors import BlockIOError, CommandError, CorruptImage

if TYPE_CHECKING:
    from array import array

    from qblock.drivers.qcow2.cache import CachedTable
    from qblock.drivers.qcow2.header import Header
    from qblock.drivers.qcow2.storage import ImageFile


def name_in_header(header: Header, image: str) -> str:
    """The name of the data file that the header asks for; raises `CommandError` when it has to be given, and has no name."""
    name = header.data_file
    if name is None:
        raise CommandError(f"'{image}' keeps its data in another file and does not tell which: give it by 'data-file'")
    if "\0" in name:
        raise CorruptImage(image, "the name of its data file has a zero byte in it")
    return name


async def fit(file: ImageFile, length: int) -> None:
    """Make the data file as long as the disk, whose size has just changed durably. A device keeps the length that it has."""
    edge = file.data
    if edge.node.driver.length() == length:
        return
    try:
        await requests.truncate(edge, length, exact=False)
    except BlockIOError as error:
        if error.errno not in (errno.ENOTSUP, errno.EINVAL) or edge.node.driver.length() < length:
            raise


class DataFileMap(ClusterMap):
    """The mapping of such an image: entries must point to their guest offset."""

    def run_at(self, table: CachedTable, index: int, limit: int) -> Run:
        """See `ClusterMap`; what lies elsewhere is reported as damaged, one cluster at a time."""
        run = super().run_at(table, index, limit)
        if run.kind is Kind.DATA or run.kind is Kind.ZERO_ALLOCATED:
            guest = (table.key << self.geometry.slice_shift) + (index << self.geometry.cluster_bits)
            if run.entry & OFFSET_MASK != guest:
                return Run(Kind.CORRUPT, 1, run.entry)
        return run


class DataFileAllocator(Allocator):
    """Allocation in a data file: every cluster's place is known, and none is ever given back."""

    @property
    def raw(self) -> bool:
        """The data file is a raw image of the disk."""
        return self.file.header.raw_data_file

    async def guard(self, host: int, length: int) -> None:
        """See `Allocator`: there is no metadata in the data file."""

    async def claim(self, first: int, count: int) -> Claim:
        """See `Allocator`. What was there before is not known, so it does not count as zeroes."""
        return Claim(first << self.map.geometry.cluster_bits, count, False)

    async def give_back(self, claim: Claim) -> None:
        """See `Allocator`: nothing was counted."""

    def drop(self, old: array[int], *, pass_discard: bool) -> None:
        """See `Allocator`: nothing was counted; `clear` has emptied the place where that was wanted."""

    def empty_later(self, run: Run, guest: int) -> None:
        """See `Allocator`: `clear` has done it."""

    async def clear(self, offset: int, length: int, *, unmap: bool) -> None:
        """See `Allocator`: always in a raw data file, else where discards are passed on."""
        data = self.file.data
        if self.raw:
            await requests.write_zeroes(data, offset, length, may_unmap=unmap)
        elif unmap and self.pass_discard:
            with contextlib.suppress(BlockIOError):
                await requests.write_zeroes(data, offset, length, may_unmap=True, no_fallback=True)
