"""What a qcow2 driver tells of its image, and of images that are not open: sizes, features, what a new one would take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qblock.driver import Json, Measurement, Progress, no_progress
from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.bitmapped import BitmappedDriver
from qblock.drivers.qcow2.encrypted import EncryptedDriver
from qblock.drivers.qcow2.measuring import measure_image, stored_bitmaps

if TYPE_CHECKING:
    from qblock.node import BlockDriverState


class DescribedDriver(BitmappedDriver, EncryptedDriver):
    """The base of the qcow2 driver, which provides the open image."""

    def specific_info(self) -> Mapping[str, Json]:
        """``ImageInfoSpecificQCow2``."""
        header = self._file.header
        data: dict[str, Json] = {"compat": "0.10" if header.version == 2 else "1.1"}
        data["compression-type"] = head.COMPRESSION_NAMES[header.compression_type]
        if header.version >= 3:
            data["lazy-refcounts"] = header.has(head.LAZY_REFCOUNTS)
        if self._store is not None and self._store.entries:
            data["bitmaps"] = self._store.info()
        data["refcount-bits"] = self._map.geometry.refcount_bits
        data |= self._encryption_info()
        if header.has(head.DATA_FILE):
            if header.data_file is not None:
                data["data-file"] = header.data_file
            data["data-file-raw"] = header.raw_data_file
        if header.version >= 3:
            data["corrupt"] = header.has(head.CORRUPT)
            data["extended-l2"] = header.has(head.EXTENDED_L2)
        return {"type": "qcow2", "data": data}

    def allocated_size(self) -> int | None:
        """See `Driver`: of the image file and, when it is open, the data file."""
        sizes = [edge.node.driver.allocated_size() for edge in (self._file.edge, self._file.data_edge) if edge is not None]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def cached_bytes(self) -> int:
        """Bytes that cached L2 slices and refcounts take at present, in their stored form."""
        refcounts = self._map.refcounts
        return self._map.cache.stored_bytes() + (refcounts.cache.stored_bytes() if refcounts is not None else 0)

    @classmethod
    def probe(cls, head_bytes: bytes, filename: str) -> int:
        """See `Driver`."""
        return head.probe(head_bytes)

    @classmethod
    async def measure(
        cls,
        options: Mapping[str, Json],
        length: int,
        source: BlockDriverState | None,
        progress: Progress = no_progress,
    ) -> Measurement:
        """See `SupportsMeasure`."""
        driver = source.driver if source is not None else None
        bitmaps = await stored_bitmaps(driver._file) if isinstance(driver, cls) else None
        return await measure_image(options, length, source, bitmaps, progress)
