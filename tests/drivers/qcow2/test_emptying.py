"""Emptying an overlay, after a commit: whatever moment it is cut off at, the disk shows what the backing node holds as well."""

from __future__ import annotations

from random import Random

import pytest

from qblock.driver import SupportsEmptying
from qblock.drivers.memory import MemoryDriver, MemoryOptions
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.testing.formats import FormatBench
from qblock.testing.simloop import run
from qblock.units import KiB, MiB

SIZE = MiB


async def committed(content: bytes, image: bytes | None = None) -> FormatBench:
    """An open overlay over a disk with ``content``; a new one holds the same in many parts, with zeroes among them."""
    bench = FormatBench(Qcow2Driver)
    await bench.create(size=SIZE, cluster_size=512)
    below = await bench.bench.add(MemoryDriver, MemoryOptions(size=SIZE))
    await bench.bench.backend(below).write(0, content)
    disk = await bench.open(backing=below, content=image)
    if image is None:
        random = Random(1)
        for start in random.sample(range(0, SIZE // 2, 8 * KiB), 40):
            await disk.write(start, content[start : start + 8 * KiB])
        for start in range(SIZE // 2, SIZE, 64 * KiB):
            await disk.write_zeroes(start, 32 * KiB)
        await disk.flush()
    return bench


def with_zeroes(content: bytes) -> bytes:
    """The content with zeroes where the overlay has them."""
    parts = [content[: SIZE // 2]]
    for start in range(SIZE // 2, SIZE, 64 * KiB):
        parts += [bytes(32 * KiB), content[start + 32 * KiB : start + 64 * KiB]]
    return b"".join(parts)


@pytest.mark.parametrize("seed", range(3))
def test_power_cuts_while_an_overlay_is_emptied_change_nothing_that_is_seen(seed: int) -> None:
    """L1 entries go before their tables are free, and the file is cut off last."""

    async def main() -> None:
        content = with_zeroes(Random(seed).randbytes(SIZE))
        bench = await committed(content)
        storage, random = bench.storage, Random(seed)
        start, before = len(storage.effects), len(storage.live)
        driver = bench.node.driver
        assert isinstance(driver, SupportsEmptying)
        await driver.make_empty()
        assert len(storage.live) < before // 10
        moments = range(start, len(storage.effects) + 1)
        for moment in [*random.sample(moments, min(len(moments), 30)), moments[-1]]:
            for image in (storage.after_kill(moment), storage.after_power_cut(moment, random)):
                other = await committed(content, image)
                disk = bench.bench.backend(other.node)
                assert await disk.read(0, SIZE) == content
                result = await bench.check(image)
                assert not result.corruptions
                assert not result.check_errors

    run(main)


def test_an_emptied_overlay_goes_on_to_work() -> None:
    """Writes after it find their place, the backing node shows through elsewhere, and nothing leaks."""

    async def main() -> None:
        content = with_zeroes(Random(7).randbytes(SIZE))
        bench = await committed(content)
        disk = bench.bench.backend(bench.node)
        driver = bench.node.driver
        assert isinstance(driver, SupportsEmptying)
        for turn in range(3):
            await driver.make_empty()
            assert await disk.read(0, SIZE) == content
            await disk.write(turn * 64 * KiB, b"n" * 100 * KiB)
            await disk.flush()
            assert await disk.read(turn * 64 * KiB, 100 * KiB) == b"n" * 100 * KiB
        await driver.make_empty()
        await bench.close()
        result = await bench.check()
        assert (result.leaks, result.corruptions) == (0, 0)
        assert result.allocated_clusters == 0

    run(main)
