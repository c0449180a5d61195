"""What becomes of discarded clusters: given up, kept for later, discarded in the file."""

from __future__ import annotations

from typing import Any

import pytest

from qblock.backend import BlockBackend
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.errors import BlockIOError
from qblock.extents import Zero
from qblock.testing.formats import FormatBench
from qblock.testing.simloop import run
from qblock.units import KiB

CLUSTER = 16 * KiB
SIZE = 20 * CLUSTER
KEPT = {"discard_no_unref": True}


async def filled(*, extended: bool = False, **options: Any) -> tuple[FormatBench, BlockBackend]:
    """An open image, all of whose clusters are written."""
    bench = FormatBench(Qcow2Driver)
    await bench.create(size=SIZE, cluster_size=CLUSTER, extended_l2=extended)
    disk = await bench.open(**options)
    await disk.write(0, b"a" * SIZE)
    await disk.flush()
    return bench, disk


async def close_soundly(bench: FormatBench) -> None:
    await bench.close()
    result = await bench.check()
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.findings


async def place_of(bench: FormatBench, offset: int) -> int | None:
    extent = await bench.node.driver.block_status(offset, CLUSTER)
    assert isinstance(extent, Zero)
    return extent.offset


@pytest.mark.parametrize("extended", [False, True])
def test_clusters_that_keep_their_places_are_written_there_again(extended: bool) -> None:
    """With discard-no-unref a disk that is discarded and written over and over keeps the order of its file, and its length."""

    async def main() -> None:
        bench, disk = await filled(extended=extended, **KEPT)
        places = [(await bench.node.driver.block_status(at, CLUSTER)).offset for at in range(0, SIZE, CLUSTER)]  # type: ignore[attr-defined]
        length = bench.storage.length()
        for turn in range(3):
            await disk.discard(0, SIZE // 2)
            await disk.write_zeroes(SIZE // 2, SIZE // 2, may_unmap=True)
            assert await disk.read(0, SIZE) == bytes(SIZE)
            await disk.flush()
            assert [await place_of(bench, at) for at in range(0, SIZE, CLUSTER)] == places
            await disk.write(0, bytes([turn]) * SIZE)
        assert bench.storage.length() == length
        await close_soundly(bench)

    run(main)


@pytest.mark.parametrize("extended", [False, True])
def test_what_kept_places_held_is_discarded_in_the_file_when_the_tables_say_so_durably(extended: bool) -> None:
    """Before that a crash must show the old content or zeroes; afterwards the space is the host's."""

    async def main() -> None:
        bench, disk = await filled(extended=extended, **KEPT)
        await disk.discard(CLUSTER, 3 * CLUSTER)
        place = await place_of(bench, CLUSTER)
        assert place is not None
        assert bytes(bench.storage.live[place : place + CLUSTER]) == b"a" * CLUSTER
        await disk.flush()
        await disk.flush()
        assert bytes(bench.storage.live[place : place + CLUSTER]) == b"\xdd" * CLUSTER
        assert await disk.read(0, 5 * CLUSTER) == b"a" * CLUSTER + bytes(3 * CLUSTER) + b"a" * CLUSTER
        await close_soundly(bench)

    run(main)


@pytest.mark.parametrize("extended", [False, True])
def test_a_place_that_is_used_again_is_not_discarded(extended: bool) -> None:
    """The guest may write to it before the discard has reached the file."""

    async def main() -> None:
        bench, disk = await filled(extended=extended, **KEPT)
        await disk.discard(0, 4 * CLUSTER)
        await disk.write(2 * CLUSTER, b"b" * CLUSTER)
        await disk.flush()
        await disk.flush()
        assert await disk.read(0, 4 * CLUSTER) == bytes(2 * CLUSTER) + b"b" * CLUSTER + bytes(CLUSTER)
        await close_soundly(bench)

    run(main)


def test_without_pass_discard_request_the_file_keeps_what_was_discarded() -> None:
    """The places stay, and so does their content."""

    async def main() -> None:
        bench, disk = await filled(**KEPT, pass_discard_request=False)
        await disk.discard(0, CLUSTER)
        place = await place_of(bench, 0)
        assert place is not None
        await disk.flush()
        await disk.flush()
        assert bytes(bench.storage.live[place : place + CLUSTER]) == b"a" * CLUSTER

    run(main)


@pytest.mark.parametrize("extended", [False, True])
def test_places_shared_with_a_snapshot_and_packed_ones_are_given_up(extended: bool) -> None:
    """What cannot be written in place anyway is not kept: the snapshot has it, or nobody."""

    async def main() -> None:
        bench, disk = await filled(extended=extended, **KEPT)
        driver = bench.node.driver
        assert isinstance(driver, Qcow2Driver)
        await driver.create_snapshot("before")
        await disk.discard(0, CLUSTER)
        assert await place_of(bench, 0) is None
        await driver.write_compressed(0, memoryview(bytes([1, 2]) * (CLUSTER // 2)))
        await disk.discard(0, CLUSTER)
        assert await place_of(bench, 0) is None
        await close_soundly(bench)

    run(main)


def test_version_2_cannot_keep_places() -> None:
    """It has no clusters that read as zeroes and have a place; so the option is refused, also by a reopen."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        await bench.create(size=SIZE, version="v2")
        with pytest.raises(BlockIOError, match="version 2"):
            await bench.open(**KEPT)

    run(main)


@pytest.mark.parametrize("passed", [False, True])
def test_what_copying_frees_is_discarded_as_pass_discard_other_says(passed: bool) -> None:
    """A compressed cluster is written over: nobody discarded it, but its place becomes free."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        await bench.create(size=SIZE, cluster_size=CLUSTER)
        disk = await bench.open(pass_discard_other=passed)
        driver = bench.node.driver
        assert isinstance(driver, Qcow2Driver)
        await driver.write_compressed(0, memoryview(bytes([1, 2]) * (CLUSTER // 2)))
        await disk.write(0, b"x" * 512)
        await disk.flush()
        assert (b"\xdd" * CLUSTER in bytes(bench.storage.live)) is passed
        await close_soundly(bench)

    run(main)


@pytest.mark.parametrize("kept", [False, True])
def test_zeroes_in_parts_of_a_cluster_leave_a_snapshot_what_it_has(kept: bool) -> None:
    """Subclusters become zero one after the other, until all of a cluster is; its place is the snapshot's as well."""

    async def main() -> None:
        bench, disk = await filled(extended=True, discard_no_unref=kept)
        driver = bench.node.driver
        assert isinstance(driver, Qcow2Driver)
        info = await driver.create_snapshot("before")
        for at in range(0, CLUSTER, CLUSTER // 4):
            await disk.write_zeroes(at, CLUSTER // 4, may_unmap=True)
        await disk.flush()
        assert await disk.read(0, SIZE) == bytes(CLUSTER) + b"a" * (SIZE - CLUSTER)
        await driver.apply_snapshot(info)
        assert await disk.read(0, SIZE) == b"a" * SIZE
        await close_soundly(bench)

    run(main)
