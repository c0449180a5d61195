"""The packed form of compressed clusters: zlib (raw deflate, window of 4096 bytes) and zstd, both ways.

Models image-formats.md section 1.5: decoding stops when a whole cluster came out; what follows in the file belongs to the
next cluster. Data that cannot be decoded is `EIO`, never an exception of the decoder. ``zstandard`` is imported when the
first zstd cluster is met. Both ways let other threads run meanwhile.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from qblock.errors import BlockIOError

ZLIB: Final = 0
ZSTD: Final = 1
_DEFLATE_WINDOW: Final = -12
_DEFLATE_MEMORY: Final = 9


class PackedPart(NamedTuple):
    """The packed form of a cluster, and where to put its content from byte ``skip`` on, as much as ``view`` takes."""

    packed: memoryview
    skip: int
    view: memoryview


def decompress(kind: int, parts: Iterable[PackedPart], cluster_size: int) -> None:
    """Unpack clusters, each of which must hold exactly ``cluster_size`` bytes. Raises ``BlockIOError(EIO)``."""
    unpack = _inflate if kind == ZLIB else _zstd_unpacker()
    for packed, skip, view in parts:
        content = unpack(packed, cluster_size)
        if len(content) != cluster_size:
            raise BlockIOError(errno.EIO, f"a compressed cluster holds {len(content)} bytes instead of {cluster_size}")
        view[:] = content if len(view) == cluster_size else memoryview(content)[skip : skip + len(view)]


def _inflate(packed: memoryview, cluster_size: int) -> bytes:
    try:
        return zlib.decompressobj(_DEFLATE_WINDOW).decompress(packed, cluster_size)
    except zlib.error as error:
        raise BlockIOError(errno.EIO, f"a compressed cluster cannot be decoded ({error})") from error


def _zstd_unpacker() -> Callable[[memoryview, int], bytes]:
    import zstandard  # noqa: PLC0415 - heavy, and few images need it

    decoder = zstandard.ZstdDecompressor()

    def unpack(packed: memoryview, cluster_size: int) -> bytes:
        try:
            with decoder.stream_reader(packed, read_across_frames=True) as reader:
                return reader.read(cluster_size)
        except zstandard.ZstdError as error:
            raise BlockIOError(errno.EIO, f"a compressed cluster cannot be decoded ({error})") from error

    return unpack


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
