"""The packed form of compressed clusters: zlib (raw deflate, window of 4096 bytes) and zstd, both ways.

Models image-formats.md section 1.5: decoding stops when a whole cluster came out; what follows in the file belongs to the
next cluster. Data that cannot be decoded is `EIO`, never an exception of the decoder. ``zstandard`` is imported when the
first zstd cluster is met. Packing lets other threads run meanwhile.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable
from typing import Final

from qblock.errors import BlockIOError

ZLIB: Final = 0
ZSTD: Final = 1
_DEFLATE_WINDOW: Final = -12
_DEFLATE_MEMORY: Final = 9


def decompress(kind: int, packed: bytes | bytearray | memoryview, cluster_size: int) -> bytes:
    """One cluster's content, exactly ``cluster_size`` bytes, from its packed form. Raises ``BlockIOError(EIO)``."""
    data = _inflate(packed, cluster_size) if kind == ZLIB else _unzstd(packed, cluster_size)
    if len(data) != cluster_size:
        raise BlockIOError(errno.EIO, f"a compressed cluster holds {len(data)} bytes instead of {cluster_size}")
    return data


def _inflate(packed: bytes | bytearray | memoryview, cluster_size: int) -> bytes:
    try:
        return zlib.decompressobj(_DEFLATE_WINDOW).decompress(packed, cluster_size)
    except zlib.error as error:
        raise BlockIOError(errno.EIO, f"a compressed cluster cannot be decoded ({error})") from error


def _unzstd(packed: bytes | bytearray | memoryview, cluster_size: int) -> bytes:
    import zstandard  # noqa: PLC0415 - heavy, and few images need it

    try:
        with zstandard.ZstdDecompressor().stream_reader(bytes(packed), read_across_frames=True) as reader:
            return reader.read(cluster_size)
    except zstandard.ZstdError as error:
        raise BlockIOError(errno.EIO, f"a compressed cluster cannot be decoded ({error})") from error


def compress(kind: int, data: memoryview, cluster_size: int) -> list[bytes | None]:
    """The packed forms of whole clusters; None for each that would not become smaller, and is to be stored as it is."""
    pack = _deflate if kind == ZLIB else _zstd_packer()
    packed = (pack(data[at : at + cluster_size]) for at in range(0, len(data), cluster_size))
    return [form if len(form) < cluster_size else None for form in packed]


def _deflate(cluster: memoryview) -> bytes:
    packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _DEFLATE_WINDOW, _DEFLATE_MEMORY)
    return packer.compress(cluster) + packer.flush()


def _zstd_packer() -> Callable[[memoryview], bytes]:
    import zstandard  # noqa: PLC0415 - heavy, and few images need it

    return zstandard.ZstdCompressor().compress
