"""Giving the end of the file back to the host, when nothing in it is used any more.

Models what QEMU's qcow2 driver does after a disk was made smaller: refcount blocks that count nothing are dropped, and the file
ends behind the last cluster in use. Clusters in use are not moved, so free ones before it stay, as holes where discards reach
the file.

Theory. The caller has dropped its references already. `give_back_end` writes back twice: once so that the references are gone,
which releases the clusters, and once so that their lower counts are durable. From then on it holds ``Refcounts.structure``, so
that nobody claims clusters: what is free stays free until the file is shorter. Counts can only be lowered meanwhile, and clusters
that requests still use have not been released, so the end that is found is never too early. A dropped block is taken out of the
refcount table, durably, before its own cluster may be used again. A crash leaves a longer file, or leaked clusters.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from qblock import requests
from qblock.drivers.qcow2.refcounts import Freed
from qblock.drivers.qcow2.storage import Area
from qblock.errors import BlockIOError
from qblock.zeroes import all_zero

if TYPE_CHECKING:
    from array import array

    from qblock.drivers.qcow2.refcounts import Refcounts
    from qblock.drivers.qcow2.writeback import WriteBack


async def give_back_end(refcounts: Refcounts, writeback: WriteBack) -> None:
    """Write everything back, then make the file end behind its last cluster in use. Raises `BlockIOError` for failed metadata.

    A file that cannot be made shorter (a block device) stays as it is; other failures to do so are only warned of.
    """
    await writeback.commit(durable=True)
    await writeback.commit(durable=True)
    file = refcounts.file
    async with refcounts.structure:
        while await _drop_empty_blocks(refcounts):
            await writeback.commit(durable=True)
        end = await _end_of_use(refcounts) << refcounts.geometry.cluster_bits
        if end >= file.length():
            return
        try:
            await requests.truncate(file.edge, end, exact=False)
        except BlockIOError as error:
            if error.errno != errno.ENOTSUP:
                file.env.warn(f"the end of '{file.name}', which is not used any more, could not be given back: {error}")
            return
        file.virgin = min(file.virgin, end)


async def _drop_empty_blocks(refcounts: Refcounts) -> bool:
    """Take blocks that count no cluster but themselves out of the table in memory; False when there are none."""
    bits, block_bits = refcounts.geometry.cluster_bits, refcounts.geometry.block_bits
    found = False
    for block in range(len(refcounts.table)):
        host = refcounts.block_offset(block)
        if not host:
            continue
        counts = await _counts_of(refcounts, block)
        own = host >> bits
        describes_itself = own >> block_bits == block
        if describes_itself and counts[own & ((1 << block_bits) - 1)] == 1:
            counts[own & ((1 << block_bits) - 1)] = 0
        if all_zero(memoryview(counts).cast("B")):
            refcounts.unlink_block(block)
            if not describes_itself:
                refcounts.pending.append(Freed(own, 1, refcounts.discard_other))
            if refcounts.file.metadata is not None:
                refcounts.file.metadata.remove(Area.REFCOUNT_BLOCK, [own])
            found = True
    return found


async def _end_of_use(refcounts: Refcounts) -> int:
    """The first cluster behind all that are in use."""
    for block in reversed(range(len(refcounts.table))):
        if refcounts.block_offset(block):
            counts = await _counts_of(refcounts, block)
            used = len(memoryview(counts).cast("B").tobytes().rstrip(b"\0"))
            if used:
                return (block << refcounts.geometry.block_bits) + -(-used // counts.itemsize)
    return 0


async def _counts_of(refcounts: Refcounts, block: int) -> array[int]:
    """All counts of a block that exists, as they are in memory."""
    raw = await refcounts.file.read(refcounts.block_offset(block), refcounts.geometry.cluster_size)
    return refcounts.overlaid(block, refcounts.codec.decode(raw))
