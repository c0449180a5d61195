"""Writing compressed clusters: they are packed by threads, and laid one behind the other into host clusters that they share.

Models image-formats.md section 1.5 (writer). Only whole clusters can be compressed, where nothing is stored yet: `EINVAL`, or
`EIO`, otherwise. A cluster that does not become smaller is stored as it is, also over what is there. Every host cluster that
packed data touch counts one more user; data go on into the next host cluster where that one happens to be free.

Theory. Packing is done first, and by several threads; then the calls take turns in the order in which they came, so that what
comes out is the same for the same calls. Within a turn: the guest clusters are marked as being allocated (`allocation.py`), space
is claimed by raising counts in memory, data are written, entries change. As for any other write, a crash leaves leaks at most.
The rest of the last host cluster is remembered as ``Refcounts.packed_end``; it is forgotten when the cluster loses a user, since
it may then be given to somebody else.

Differs from QEMU, whose convert packs one cluster at a time.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from qblock import requests
from qblock.drivers.qcow2.allocation import Payload
from qblock.drivers.qcow2.cache import SECTOR
from qblock.drivers.qcow2.compression import compress
from qblock.drivers.qcow2.layout import COMPRESSED, U64, Kind, compressed_clusters
from qblock.drivers.qcow2.refcounts import Freed
from qblock.errors import BlockIOError
from qblock.threads import COMPUTING, ThreadQueue
from qblock.units import KiB, MiB, align_up

if TYPE_CHECKING:
    from qblock.drivers.qcow2.allocation import Allocator

_EMPTY: Final = (Kind.UNALLOCATED, Kind.ZERO)
JOB: Final = 512 * KiB
"""Bytes (or one cluster) that a thread packs at a time."""
WINDOW: Final = 4 * MiB
"""Bytes of one call that are packed before any of them is written."""


class CompressedWriter:
    """Compressed writes to one image that is open for writing."""

    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator
        allocator.packer = self
        self.map = allocator.map
        self.file = allocator.file
        self.refcounts = allocator.refcounts
        self._cluster = self.map.geometry.cluster_size
        self._threads = ThreadQueue(self.file.env.executor, COMPUTING)
        self._last: asyncio.Future[None] | None = None

    async def write(self, offset: int, data: memoryview) -> None:
        """Store guest clusters compressed. ``BlockIOError``: EINVAL for parts of a cluster, EIO where something is stored."""
        end = offset + len(data)
        if offset % self._cluster or (end % self._cluster and end < self.map.length):
            raise BlockIOError(errno.EINVAL, "only whole clusters can be written compressed")
        window = align_up(WINDOW, self._cluster)
        for at in range(0, len(data), window):
            await self._write_window(offset + at, data[at : at + window])
        await self.allocator.write_back_if_crowded()

    async def _write_window(self, offset: int, data: memoryview) -> None:
        if len(data) % self._cluster:
            padded = bytearray(align_up(len(data), self._cluster))
            padded[: len(data)] = data
            data = memoryview(padded)
        # The turn is taken before the first wait: calls come out in the order in which they came in.
        before, done = self._last, asyncio.get_running_loop().create_future()
        self._last = done
        try:
            packed = await self._pack(data)
            if before is not None and not before.done():
                await asyncio.shield(before)
            await self._store(offset, data, packed)
        finally:
            done.set_result(None)

    async def _pack(self, data: memoryview) -> list[bytes | None]:
        job = align_up(JOB, self._cluster)
        packed = await asyncio.gather(*(self._pack_job(data[at : at + job]) for at in range(0, len(data), job)))
        return [form for forms in packed for form in forms]

    async def _pack_job(self, data: memoryview) -> list[bytes | None]:
        return await self._threads.run(compress, self.file.header.compression_type, data, self._cluster)

    # ------------------------------------------------------------------------------------------------------- storing

    async def _store(self, offset: int, data: memoryview, packed: Sequence[bytes | None]) -> None:
        """Store runs of clusters that became smaller, or did not."""
        at = 0
        while at < len(packed):
            count = 1
            while at + count < len(packed) and (packed[at + count] is None) is (packed[at] is None):
                count += 1
            guest = offset + at * self._cluster
            forms = [form for form in packed[at : at + count] if form is not None]
            if forms:
                await self._store_packed(guest, forms)
            else:
                end = min(offset + (at + count) * self._cluster, align_up(self.map.length, SECTOR))
                await self.allocator.write(guest, Payload(data[at * self._cluster : end - offset]))
            at += count

    async def _store_packed(self, guest: int, forms: Sequence[bytes]) -> None:
        done = 0
        while done < len(forms):
            async with self._empty_run(guest, len(forms) - done) as count:
                part = forms[done : done + count]
                entries = array(U64)
                try:
                    for form in part:
                        entries.append(await self._place(len(form)))
                    await self._write_packed(entries, part)
                    table = await self.map.writable_slice(guest)
                    self.file.check_writable()
                except BlockIOError:
                    await self._give_back(entries)
                    raise
                self.file.event("l2_update_compressed")
                self.map.change(table, self.map.index(guest), entries)
            done += count
            guest += count * self._cluster

    @asynccontextmanager
    async def _empty_run(self, guest: int, limit: int) -> AsyncIterator[int]:
        """Guest clusters of one slice, as many as can be up to ``limit``, that nobody else may allocate meanwhile."""
        first = guest >> self.map.geometry.cluster_bits
        while True:
            self.file.check_writable()
            table = await self.map.writable_slice(guest)
            index = self.map.index(guest)
            count = await self.allocator.free_to_change(first, min(limit, (1 << self.map.geometry.slice_bits) - index))
            if count:
                break
        empty = 0
        while empty < count and (run := self.map.run_at(table, index + empty, count - empty)).kind in _EMPTY:
            empty += run.clusters
        if not empty:
            raise BlockIOError(errno.EIO, f"the cluster at {guest:#x} is in use, and can only be overwritten plainly")
        count = empty
        with self.allocator.allocating(first, count):
            yield count

    async def _write_packed(self, entries: Sequence[int], forms: Sequence[bytes]) -> None:
        """Write packed data; what lies side by side is written at once."""
        x = 62 - (self.map.geometry.cluster_bits - 8)
        at = 0
        while at < len(forms):
            host = entries[at] & ((1 << x) - 1)
            count, end = 1, host + len(forms[at])
            while at + count < len(forms) and entries[at + count] & ((1 << x) - 1) == end:
                end += len(forms[at + count])
                count += 1
            await self.allocator.guard(host, end - host)
            self.file.event("write_compressed")
            # The file ends with a whole sector.
            rest = -end % SECTOR if end > self.file.length() else 0
            data = b"".join([*forms[at : at + count], bytes(rest)])
            await requests.write_from(self.file.edge, host, memoryview(data))
            at += count

    async def _give_back(self, entries: Sequence[int]) -> None:
        for entry in entries:
            touched = compressed_clusters(entry, self.map.geometry.cluster_bits)
            await self.refcounts.release([Freed(touched.start, len(touched), False)])

    # ------------------------------------------------------------------------------------------------------- placing

    async def _place(self, length: int) -> int:
        """The entry for ``length`` bytes (fewer than a cluster) of packed data; they count as users of the file already."""
        self.file.event("cluster_alloc_bytes")
        host = await self._claim(length)
        x = 62 - (self.map.geometry.cluster_bits - 8)
        sectors = ((host + length - 1) >> 9) - (host >> 9)
        if host >> x:
            first, end = host >> self.map.geometry.cluster_bits, (host + length - 1) >> self.map.geometry.cluster_bits
            await self.refcounts.release([Freed(first, end + 1 - first, False)])
            raise BlockIOError(errno.EFBIG, "compressed clusters cannot lie that far behind in the file")
        return COMPRESSED | sectors << x | host

    async def _claim(self, length: int) -> int:
        refcounts = self.refcounts
        while True:
            at = refcounts.packed_end
            room = -at % self._cluster
            if room >= length:
                if not await refcounts.add_user(at):
                    continue
                # No wait since the count was raised.
                refcounts.packed_end = at + length if length < room else 0
                return at
            claim = await refcounts.allocate(1)
            if room and claim.host == at + room and await refcounts.add_user(at):
                refcounts.packed_end = at + length
                return at
            refcounts.packed_end = claim.host + length
            return claim.host
