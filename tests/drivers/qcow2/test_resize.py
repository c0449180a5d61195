"""Resizing qcow2 disks under crashes and faults: a power cut leaves the old size or the new one, and all that was flushed."""

from __future__ import annotations

import errno
from collections.abc import Awaitable
from random import Random
from typing import Any

import pytest

from qblock.drivers.memory import MemoryDriver, MemoryOptions
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.errors import BlockIOError
from qblock.node import BlockDriverState
from qblock.testing.formats import FormatBench
from qblock.testing.simloop import run
from qblock.units import KiB, MiB

CLUSTER = 512
SIZE = 96 * KiB


async def made(seed: int, **options: Any) -> tuple[FormatBench, bytes]:
    """An image with random data all over, closed, and its content."""
    bench = FormatBench(Qcow2Driver)
    await bench.create(**{"size": SIZE, "cluster_size": CLUSTER, **options})
    disk = await bench.open()
    content = Random(seed).randbytes(SIZE)
    step = 4 * KiB
    for start in Random(seed).sample(range(0, SIZE, step), SIZE // step):
        await disk.write(start, content[start : start + step])
    await bench.close()
    return bench, content


async def look(content: bytes) -> tuple[int, bytes, int]:
    """The size, the content and the leaks of the disk that a crash left; its check must find no errors."""
    bench = FormatBench(Qcow2Driver)
    disk = await bench.open(content=content)
    data = await disk.read(0, disk.length)
    result = await bench.check(content)
    assert not result.corruptions
    assert not result.check_errors
    return disk.length, data, result.leaks


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length", [512, 5 * KiB, 40 * KiB + 512, SIZE - 512])
def test_power_cuts_while_a_disk_shrinks_leave_what_lies_before_the_new_end(length: int, seed: int) -> None:
    """Refcounts are lowered and the file is cut off only when nothing durable refers to what goes."""

    async def main() -> None:
        bench, content = await made(seed)
        disk = await bench.open()
        storage, random = bench.storage, Random(seed)
        before = len(storage.live)
        await disk.truncate(length)
        ended = len(storage.effects)
        assert len(storage.live) < before or length > 5 * KiB  # the data lie in random order
        for moment in range(ended + 1):
            for image in (storage.after_kill(moment), storage.after_power_cut(moment, random)):
                size, data, _ = await look(image)
                assert size in (SIZE, length)
                assert data[:length] == content[:length]
        await bench.close()
        assert await look(bench.content) == (length, content[:length], 0)

    run(main)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_power_cuts_while_a_disk_grows_leave_its_content_and_zeroes_behind(preallocation: str, seed: int) -> None:
    """The new size comes last; whatever it finds behind the old end reads as zeroes."""

    async def main() -> None:
        bench, content = await made(seed)
        disk = await bench.open()
        await disk.truncate(21 * KiB - 512)
        await bench.close()
        disk = await bench.open()
        storage, random = bench.storage, Random(seed)
        await disk.truncate(MiB, preallocation=preallocation)
        expected = content[: 21 * KiB - 512] + bytes(MiB - 21 * KiB + 512)
        moments = range(len(storage.effects) + 1)
        for moment in [*random.sample(moments, min(len(moments), 40)), moments[-1]]:
            for image in (storage.after_kill(moment), storage.after_power_cut(moment, random)):
                size, data, _ = await look(image)
                assert size in (21 * KiB - 512, MiB)
                assert data == expected[:size]
        await bench.close()
        assert await look(bench.content) == (MiB, expected, 0)

    run(main)


async def overlay(cluster: int = 4096, version: str = "v3") -> tuple[FormatBench, BlockDriverState]:
    """A bench with an empty image, and below it a longer disk full of ones."""
    bench = FormatBench(Qcow2Driver)
    await bench.create(size=10 * KiB, cluster_size=cluster, version=version)
    below = await bench.bench.add(MemoryDriver, MemoryOptions(size=MiB))
    await bench.bench.backend(below).write(0, b"\1" * MiB)
    return bench, below


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("preallocation", ["off", "metadata"])
def test_a_longer_backing_file_never_shines_through_what_was_added(preallocation: str, version: str) -> None:
    """Not even after a crash: the zeroes, which version 2 has to write, are there before the size is in the header."""

    async def main() -> None:
        bench, below = await overlay(version=version)
        disk = await bench.open(backing=below)
        await disk.truncate(64 * KiB, preallocation=preallocation)
        for moment in range(len(bench.storage.effects) + 1):
            image = bench.storage.after_kill(moment)
            other, below = await overlay()
            disk = await other.open(backing=below, content=image)
            data = await disk.read(0, disk.length)
            assert data == b"\1" * 10 * KiB + bytes(disk.length - 10 * KiB)

    run(main)


async def outcome(request: Awaitable[None]) -> BlockIOError | None:
    """What a request fails with, if it does."""
    try:
        await request
    except BlockIOError as error:
        return error
    return None


@pytest.mark.parametrize("preallocation", ["off", "metadata", "full"])
def test_growth_that_finds_no_room_leaves_the_image_as_it_was(preallocation: str) -> None:
    """For every write that can be the first to fail: the size stays, nothing leaks once it is closed, the content reads."""

    async def main() -> None:
        for fail in range(200):
            bench, content = await made(1, cluster_size=4096)
            disk = await bench.open()
            before = len(bench.storage.live)
            bench.storage.fail_writes, bench.storage.failure = fail, errno.ENOSPC
            failure = await outcome(disk.truncate(16 * MiB, preallocation=preallocation))
            if failure is None:
                break
            assert failure.errno == errno.ENOSPC
            bench.storage.fail_writes = None
            assert await disk.read(0, SIZE) == content
            if bench.node.poisoned is None:
                assert disk.length == SIZE
                await bench.close()
                size, _, leaks = await look(bench.content)
                assert (size, leaks) == (SIZE, 0)
                disk = await bench.open(content=bench.content)
                await disk.truncate(SIZE - 512)  # at the latest this gives back what is free at the end of the file
                await bench.close()
                assert len(bench.content) <= before + 64 * KiB
            else:
                _, data, _ = await look(bytes(bench.storage.live))
                assert data[:SIZE] == content
        else:
            pytest.fail("it never got through")

    run(main)


def test_preallocated_clusters_are_written_in_place() -> None:
    """Writing into them changes no table: nothing but the data reaches the file."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        await bench.create(size=MiB)
        disk = await bench.open()
        await disk.truncate(4 * MiB, preallocation="metadata")
        await disk.flush()
        done = len(bench.storage.effects)
        await disk.write(2 * MiB, b"x" * 65536)
        await disk.flush()
        writes = [effect for effect in bench.storage.effects[done:] if effect.kind == "write"]
        assert len(writes) == 1
        await bench.close()
        assert (await bench.check()).leaks == 0

    run(main)


def test_freed_space_is_used_again_after_the_file_became_shorter() -> None:
    """Shrinking and growing in turns does not let the file grow without end."""

    async def main() -> None:
        bench, _ = await made(3)
        disk = await bench.open()
        lengths = []
        for _ in range(5):
            await disk.truncate(8 * KiB)
            await disk.truncate(SIZE)
            await disk.write(0, b"y" * SIZE)
            await disk.flush()
            lengths.append(len(bench.storage.live))
        assert max(lengths) <= lengths[0] + 8 * CLUSTER
        await bench.close()
        assert await look(bench.content) == (SIZE, b"y" * SIZE, 0)

    run(main)
