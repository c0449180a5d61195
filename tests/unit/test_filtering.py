"""FilterDriver: everything passes to the child, and copying by range goes down both sides of a graph."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from qblock import requests
from qblock.backend import BlockBackend
from qblock.drivers.file import FileDriver, FileOptions
from qblock.drivers.memory import MemoryOptions
from qblock.drivers.raw import RawDriver, RawOptions
from qblock.errors import BlockIOError
from qblock.extents import Data
from qblock.filtering import FilterDriver
from qblock.node import BlockDriverState
from qblock.options import DriverOptions
from qblock.permissions import ChildRole
from qblock.testing.nodes import FaultyMemoryDriver, LayerDriver, NodeBench
from qblock.testing.simloop import run
from qblock.units import KiB


class PassFilter(FilterDriver):
    """A filter that changes nothing."""

    name = "pass"
    options_class = DriverOptions


async def filter_over(bench: NodeBench, node: BlockDriverState) -> BlockBackend:
    above = await bench.add(
        PassFilter, DriverOptions(), children={"file": (node, ChildRole.FILTERED)}, discard_unmap=True
    )
    return bench.backend(above)


def test_a_filter_passes_every_request_on() -> None:
    """At the same place, once, with all flags."""

    async def main() -> None:
        bench = NodeBench()
        node = await bench.add(FaultyMemoryDriver, MemoryOptions(size=64 * KiB), discard_unmap=True)
        assert isinstance(node.driver, FaultyMemoryDriver)
        backend = await filter_over(bench, node)
        await backend.write(100, b"x")
        assert await backend.read(100, 1) == b"x"
        await backend.write_zeroes(200, 10)
        await backend.write_zeroes(300, 10, may_unmap=True)
        await backend.discard(400, 10)
        await backend.flush()
        assert node.driver.calls == [
            ("write", 100, 1), ("read", 100, 1), ("zero", 200, 10), ("unmap", 300, 10), ("discard", 400, 10), ("flush", 0, 0)
        ]  # fmt: skip
        await backend.truncate(128 * KiB)
        assert backend.length == node.length == 128 * KiB
        # The first page of the memory disk was written.
        assert await requests.block_status(backend.node, 0, 512) == Data(512, 0)
        assert backend.node.driver.filename() is None

    run(main)


def test_a_filter_tells_its_childs_cluster_size() -> None:
    """Copy-on-read above a filter must round to it."""

    async def main() -> None:
        bench = NodeBench()
        backend = await filter_over(bench, await bench.add(LayerDriver, MemoryOptions(size=4096)))
        assert backend.node.driver.info().cluster_size == LayerDriver.cluster

    run(main)


async def file_disk(bench: NodeBench, path: Path, size: int) -> BlockDriverState:
    with path.open("wb") as stream:
        stream.truncate(size)
    return await bench.add(FileDriver, FileOptions(filename=str(path)))


def test_copy_range_goes_down_through_filters_and_windows_on_both_sides(tmp_path: Path) -> None:
    """Each node translates its side; the files meet in one system call."""

    async def main() -> None:
        bench = NodeBench()
        children = {
            name: (await file_disk(bench, tmp_path / name, 64 * KiB), ChildRole.PRIMARY_DATA)
            for name in ("source", "target")
        }
        (tmp_path / "source").write_bytes(bytes(range(256)) * 256)
        source = await bench.add(RawDriver, RawOptions(file="", offset=512), children={"file": children["source"]})
        target = await bench.add(RawDriver, RawOptions(file="", offset=1024), children={"file": children["target"]})
        one, two = await filter_over(bench, source), await filter_over(bench, target)
        await one.copy_range(5, two, 7, 10000)
        assert await two.read(7, 10000) == await one.read(5, 10000)
        for node in (two.node, target, children["target"][0]):
            assert node.write_generation == 1 and node.in_flight == 0
        await bench.close()

    run(main)


def test_copy_range_is_not_supported_between_different_kinds_of_storage(tmp_path: Path) -> None:
    """Nor behind the end of the source, nor in parts of blocks."""

    async def main() -> None:
        bench = NodeBench()
        memory = bench.backend(await bench.add(FaultyMemoryDriver, MemoryOptions(size=64 * KiB)))
        one = bench.backend(await file_disk(bench, tmp_path / "one", 64 * KiB))
        two = bench.backend(await file_disk(bench, tmp_path / "two", 64 * KiB))
        assert one.root is not None and two.root is not None
        for request in (
            memory.copy_range(0, two, 0, 512), two.copy_range(0, memory, 0, 512),
            requests.copy_range(one.root, 64 * KiB, two.root, 0, 512),
        ):  # fmt: skip
            with pytest.raises(BlockIOError) as caught:
                await request
            assert caught.value.errno == errno.ENOTSUP
        with pytest.raises(BlockIOError) as caught:
            await (await filter_over(bench, memory.node)).copy_range(0, two, 0, 512)
        assert caught.value.errno == errno.ENOTSUP
        await bench.close()

    run(main)


def test_a_guessed_raw_disk_takes_no_copied_first_sector(tmp_path: Path) -> None:
    """It could not be looked at on its way."""

    async def main() -> None:
        bench = NodeBench()
        source = bench.backend(await file_disk(bench, tmp_path / "source", 64 * KiB))
        storage = await file_disk(bench, tmp_path / "target", 64 * KiB)
        raw = await bench.add(
            RawDriver, RawOptions(file=""), children={"file": (storage, ChildRole.PRIMARY_DATA)}, probed=True
        )
        target = bench.backend(raw)
        for offset, length in ((0, 512), (1000, 512)):
            with pytest.raises(BlockIOError) as caught:
                await source.copy_range(0, target, offset, length)
            assert caught.value.errno == errno.ENOTSUP
        await source.copy_range(0, target, 512, 1024)
        await bench.close()

    run(main)
