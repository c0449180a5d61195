"""Giving guest clusters their places before anything is written to them, when a disk grows; and seeing that it was done.

Models ``preallocation`` of a resize: with ``metadata`` the clusters are mapped and the file is long enough, ``falloc`` also
reserves space for them, ``full`` writes zeroes. Differs from QEMU in where they lie: free clusters are used before the file
grows.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from qblock import requests
from qblock.drivers.qcow2.layout import COPIED, U64, ZERO
from qblock.drivers.qcow2.refcounts import Claim
from qblock.errors import BlockIOError
from qblock.zeroes import ZERO_PIECE, zero_view

if TYPE_CHECKING:
    from qblock.driver import Driver
    from qblock.drivers.qcow2.allocation import Allocator
    from qblock.drivers.qcow2.storage import ImageFile


async def preallocate(writer: Allocator, start: int, end: int, mode: str) -> None:
    """Map all clusters between two guest offsets, which are unallocated and nobody else's, to clusters that read as zeroes.

    ``mode`` is metadata, falloc or full. When it fails, what was mapped so far stays so.
    """
    clusters, geometry = writer.map, writer.map.geometry
    guest = start
    while guest < end:
        table = await clusters.writable_slice(guest)
        index = clusters.index(guest)
        wanted = min(geometry.clusters(end - guest), len(table.entries) - index)
        claim = await writer.claim(guest >> geometry.cluster_bits, wanted)
        try:
            await _make_zero(writer.file, claim, mode, claim.clusters * geometry.cluster_size)
            table = await clusters.writable_slice(guest)
        except BlockIOError:
            await writer.give_back(claim)
            raise
        # In an encrypted image, what reads as zeroes is not what the file holds: the entry has to say it.
        zero = ZERO if writer.file.crypto is not None else 0
        entry, step = claim.host | COPIED | zero, geometry.cluster_size
        clusters.reserve(table, index, array(U64, range(entry, entry + claim.clusters * step, step)))
        guest += claim.clusters * step
        await writer.write_back_if_crowded()


async def _make_zero(file: ImageFile, claim: Claim, mode: str, length: int) -> None:
    if mode == "falloc":
        await requests.write_zeroes(file.data, claim.host, length)
    elif mode == "full":
        for at in range(0, length, ZERO_PIECE):
            await requests.write_from(file.data, claim.host + at, zero_view(min(ZERO_PIECE, length - at)))
    elif not claim.virgin:
        await requests.write_zeroes(file.data, claim.host, length, may_unmap=True)
    if file.data.node.driver.length() < claim.host + length:
        await requests.truncate(file.data, claim.host + length)


def lies_on_holes(storage: Driver, cluster_bits: int) -> bool:
    """Whether a file takes so much less space than it has clusters, as 7.2 was seen to count them, that some seem to be mapped
    ahead of being written: their holes are zeroes then. (7.2 leaves free clusters out of the count.)
    """
    allocated = storage.allocated_size()
    if allocated is None:
        return False
    taken = allocated >> cluster_bits
    return -(-storage.length() >> cluster_bits) >= max(taken * 10 // 9, taken + 2)
