"""Reading compressed clusters: zlib (raw deflate, window of 4096 bytes) and zstd.

Models image-formats.md section 1.5: decoding stops when a whole cluster came out; what follows in the file belongs to the
next cluster. Data that cannot be decoded is `EIO`, never an exception of the decoder. ``zstandard`` is imported when the
first zstd cluster is read.
"""

from __future__ import annotations

import errno
import zlib
from typing import Final

from qblock.errors import BlockIOError

ZLIB: Final = 0
ZSTD: Final = 1
_DEFLATE_WINDOW: Final = -12


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
