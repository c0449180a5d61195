"""The VM state: what a machine keeps beside its disk, in the same image.

Models image-formats.md section 1.5: the state lies at guest offsets behind the disk, from the first that no L2 table of the disk
maps. The disk does not show it. With a data file that must stay a raw image there is no place for it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from qblock.driver import NodeInfo
from qblock.drivers.qcow2.allocation import Payload
from qblock.drivers.qcow2.amended import AmendedDriver
from qblock.drivers.qcow2.header import DIRTY
from qblock.drivers.qcow2.resize import grow_l1
from qblock.errors import BlockIOError

if TYPE_CHECKING:
    from qblock.drivers.qcow2.clusters import ClusterMap


class VmStateDriver(AmendedDriver):
    """The base of the qcow2 driver that keeps the state of a machine: `SupportsVmState`."""

    _map: ClusterMap

    def info(self) -> NodeInfo:
        """See `Driver`."""
        header = self._file.header
        cluster_size = self._map.geometry.cluster_size
        return NodeInfo(cluster_size=cluster_size, dirty=header.has(DIRTY), vm_state_offset=self.vm_state_offset())

    def vm_state_offset(self) -> int:
        """See `SupportsVmState`."""
        geometry = self._map.geometry
        return geometry.l1_entries(self.length()) << geometry.l1_shift

    async def load_vm_state(self, offset: int, buffer: memoryview) -> None:
        """See `SupportsVmState`."""
        self._file.check_readable()
        self._file.event("vmstate_load")
        await self._map.read(self._place(offset, len(buffer)), buffer)

    async def save_vm_state(self, offset: int, buffer: memoryview) -> None:
        """See `SupportsVmState`."""
        writer = await self._writing(0, 0)
        start = self._place(offset, len(buffer))
        self._file.event("vmstate_save")
        await grow_l1(writer, self._map.geometry.l1_entries(start + len(buffer)))
        await writer.write(start, Payload(buffer))

    def _place(self, offset: int, length: int) -> int:
        """The guest offset of a part of the state."""
        if self._file.header.raw_data_file:
            raise BlockIOError(errno.ENOTSUP, "an image with a raw data file has no place for the state of a machine")
        start = self.vm_state_offset() + offset
        if start + length > self._map.geometry.max_size:
            raise BlockIOError(errno.EFBIG, "the state of the machine would end behind what the L1 table can map")
        return start
