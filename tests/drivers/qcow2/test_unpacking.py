"""Reading compressed clusters: rows of them, in one piece and in parts, wherever they lie, and when some are damaged."""

from __future__ import annotations

import errno
from random import Random
from typing import Any

import pytest

from qblock.backend import BlockBackend
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.drivers.qcow2.layout import COMPRESSED, decode_u64
from qblock.drivers.qcow2.unpacking import JOB, WINDOW
from qblock.errors import BlockIOError
from qblock.testing.formats import FormatBench
from qblock.testing.simloop import run
from qblock.units import KiB, MiB


def text(rng: Random, length: int) -> bytes:
    """What packs to about a half."""
    return b"".join(rng.randbytes(16) + bytes([rng.randrange(256)]) * 16 for _ in range(length // 32))


async def packed(content: bytes, order: list[int] | None = None, **options: Any) -> FormatBench:
    """A closed image in which the clusters of ``content`` were packed, in some order."""
    bench = FormatBench(Qcow2Driver)
    await bench.create(size=len(content), **options)
    disk, cluster = await bench.open(), options.get("cluster_size", 64 * KiB)
    for number in order or range(len(content) // cluster):
        at = number * cluster
        await disk.write_compressed(at, memoryview(content[at : at + cluster]))
    await bench.close()
    return bench


async def read(disk: BlockBackend, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_packed_clusters_side_by_side_are_read_together() -> None:
    """A megabyte of the disk, packed in one go, takes a request to the file for each job, not for each cluster."""

    async def main() -> None:
        content = text(Random(1), MiB)
        bench = await packed(content)
        disk = await bench.open()
        await read(disk, 0, 512)
        reads: list[int] = []
        below = bench.storage.read_into

        async def counted(offset: int, buffer: memoryview) -> None:
            reads.append(len(buffer))
            await below(offset, buffer)

        bench.storage.read_into = counted  # type: ignore[method-assign]
        assert await read(disk, 0, MiB) == content
        assert len(reads) == MiB // JOB

    run(main)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression_type": "zstd"},
        {"cluster_size": 512},
        {"cluster_size": 2 * MiB, "compression_type": "zstd"},
        {"extended_l2": True, "cluster_size": 16 * KiB},
    ],
)
def test_any_part_of_packed_and_plain_clusters_reads_as_written(options: dict[str, Any]) -> None:
    """Clusters packed in disorder, some overwritten since: every range of the disk is what was written last."""

    async def main() -> None:
        rng = Random(2)
        cluster = options.get("cluster_size", 64 * KiB)
        size = max(96 * cluster, 2 * WINDOW) if cluster > 512 else 300 * cluster
        size = min(size, 4 * WINDOW)
        content = bytearray(text(rng, size))
        order = list(range(size // cluster))
        rng.shuffle(order)
        bench = await packed(bytes(content), order, **options)
        disk = await bench.open()
        for _ in range(5):
            at, new = rng.randrange(size - 512), rng.randbytes(512)
            content[at : at + 512] = new
            await disk.write(at, new)
        ranges = [(0, size)] + [(at := rng.randrange(size), rng.randrange(1, size - at + 1)) for _ in range(30)]
        ranges += [(at := rng.randrange(size), rng.randrange(1, min(2 * cluster, size - at) + 1)) for _ in range(30)]
        for at, length in ranges:
            assert await read(disk, at, length) == content[at : at + length], (at, length)

    run(main)


def test_a_damaged_cluster_fails_the_read_when_nobody_writes_to_its_buffer_any_more() -> None:
    """The first cluster cannot be unpacked: the read ends with EIO, and by then all other clusters are in the buffer."""

    async def main() -> None:
        content = text(Random(3), 2 * MiB)
        bench = await packed(content)
        image = bytearray(bench.content)
        tables = decode_u64(image[int.from_bytes(image[40:48], "big") :][:8])
        entry = decode_u64(image[tables[0] & (1 << 56) - 1 :][:8])[0]
        assert entry & COMPRESSED
        at = entry & (1 << 54) - 1
        image[at : at + 64] = b"\xff" * 64
        disk = await bench.open(content=bytes(image))
        buffer = bytearray(2 * MiB)
        with pytest.raises(BlockIOError, match="cannot be decoded") as failure:
            await disk.read_into(0, memoryview(buffer))
        assert failure.value.errno == errno.EIO
        assert buffer[JOB:] == content[JOB:]
        assert await read(disk, 64 * KiB, MiB) == content[64 * KiB :][:MiB]

    run(main)
