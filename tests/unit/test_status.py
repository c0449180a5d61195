"""Block status of nodes and chains."""

from __future__ import annotations

import pytest

from qblock import requests
from qblock.drivers.memory import MemoryDriver, MemoryOptions
from qblock.drivers.raw import RawDriver, RawOptions
from qblock.extents import Compressed, Data, Unallocated, Zero
from qblock.filtering import FilterDriver
from qblock.node import BlockDriverState
from qblock.options import DriverOptions
from qblock.permissions import ChildRole
from qblock.status import clip
from qblock.testing.nodes import LayerDriver, NodeBench
from qblock.testing.simloop import run
from qblock.units import KiB


class PassFilter(FilterDriver):
    """A filter that changes nothing."""

    name = "pass"
    options_class = DriverOptions


async def chain(bench: NodeBench, *sizes: int, filters: bool = False) -> list[BlockDriverState]:
    """Layers of these sizes, base first; layer n (from 1) has data in its n-th 4 KiB."""
    layers: list[BlockDriverState] = []
    for number, size in enumerate(sizes, start=1):
        below = layers[-1] if layers else None
        if below is not None and filters:
            below = await bench.add(PassFilter, DriverOptions(), children={"file": (below, ChildRole.FILTERED)})
        children = {"backing": (below, ChildRole.BACKING)} if below is not None else None
        node = await bench.add(LayerDriver, MemoryOptions(size=size), children=children)
        backend = bench.backend(node)
        await backend.write((number - 1) * 4096, bytes([number]) * 4096)
        backend.close()
        layers.append(node)
    return layers


async def walk(node: BlockDriverState, base: BlockDriverState | None = None) -> list[tuple[int, int, bool, bool]]:
    """(length, depth, present, zero) of the whole node."""
    found, offset = [], 0
    while offset < node.length:
        extent = await requests.chain_status(node, offset, node.length - offset, base=base)
        found.append((extent.length, extent.depth, extent.present, extent.zero))
        offset += extent.length
    return found


@pytest.mark.parametrize("filters", [False, True])
def test_the_first_layer_that_holds_a_run_answers(filters: bool) -> None:
    """Depth counts layers, and filters are none."""

    async def main() -> None:
        base, mid, top = await chain(NodeBench(), 20 * KiB, 20 * KiB, 20 * KiB, filters=filters)
        assert await walk(top) == [
            (4096, 2, True, False), (4096, 1, True, False), (4096, 0, True, False), (8192, 2, False, True)
        ]  # fmt: skip
        assert await walk(top, mid) == [(8192, 1, False, False), (4096, 0, True, False), (8192, 1, False, False)]
        extent = await requests.chain_status(top, 0, 512)
        assert extent.node is base and extent.length == 512 and extent.data
        assert await requests.is_allocated_above(top, base, 0, 20 * KiB) == (False, 4096)
        assert await requests.is_allocated_above(top, base, 0, 20 * KiB, include_base=True) == (True, 4096)
        assert await requests.is_allocated_above(top, None, 4096, 20 * KiB) == (True, 4096)

    run(main)


def test_a_shorter_layer_below_cuts_off_what_lies_behind_its_end() -> None:
    """That reads as zeroes and hides what longer layers further down hold there."""

    async def main() -> None:
        bench = NodeBench()
        base, mid, top = await chain(bench, 20 * KiB, 8 * KiB, 20 * KiB)
        lower = bench.backend(base)
        await lower.write(12 * KiB, b"x" * 8 * KiB)
        assert await walk(top) == [
            (4096, 2, True, False), (4096, 1, True, False), (4096, 0, True, False), (8192, 1, True, True)
        ]  # fmt: skip
        backend = bench.backend(top)
        assert await backend.read(12 * KiB, 8 * KiB) == bytes(8 * KiB)
        assert await requests.is_allocated_above(top, base, 12 * KiB, 8 * KiB) == (True, 8 * KiB)
        assert await requests.is_zero(top, 12 * KiB, 8 * KiB)
        assert not await requests.is_zero(top, 8 * KiB, 8 * KiB)
        extent = await requests.chain_status(top, 12 * KiB, 8 * KiB)
        assert extent.cut_off and extent.node is mid
        # `qemu-img map` shows it as a hole of the layer above.
        assert (extent.as_mapped().depth, extent.as_mapped().present) == (0, False)

    run(main)


def test_behind_the_end_of_a_node_is_zero() -> None:
    """A reader gets zeroes there, so that is its status."""

    async def main() -> None:
        node = await NodeBench().add(MemoryDriver, MemoryOptions(size=4096))
        assert await requests.block_status(node, 4096, 512) == Zero(512)

    run(main)


def test_raw_data_over_a_hole_of_the_storage_is_zero() -> None:
    """raw knows nothing itself; its storage does, and offsets are those in the storage."""

    async def main() -> None:
        bench = NodeBench()
        disk = await bench.add(MemoryDriver, MemoryOptions(size=256 * KiB))
        lower = bench.backend(disk)
        await lower.write(64 * KiB, b"x" * 64 * KiB)
        lower.close()
        raw = await bench.add(
            RawDriver, RawOptions(file="", offset=32 * KiB), children={"file": (disk, ChildRole.PRIMARY_DATA)}
        )
        assert await requests.block_status(raw, 0, 256 * KiB) == Zero(32 * KiB, 32 * KiB)
        assert await requests.block_status(raw, 32 * KiB, 256 * KiB) == Data(64 * KiB, 64 * KiB)
        assert await requests.block_status(raw, 0, 256 * KiB, want_zero=False) == Data(224 * KiB, 32 * KiB)
        extent = await requests.chain_status(raw, 32 * KiB, KiB)
        assert (extent.file, extent.offset, extent.data) == (disk, 64 * KiB, True)
        hole = await requests.chain_status(raw, 0, KiB)
        assert (hole.present, hole.zero, hole.data, hole.offset) == (True, True, False, 32 * KiB)

    run(main)


def test_a_format_whose_data_lie_on_a_hole_is_data_and_zero() -> None:
    """Preallocated metadata: the cluster is taken, and the file has a hole there."""

    class Preallocated(LayerDriver):
        probes_storage = True

        async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Data:
            return Data(length, offset)

    async def main() -> None:
        bench = NodeBench()
        disk = await bench.add(MemoryDriver, MemoryOptions(size=64 * KiB))
        node = await bench.add(Preallocated, MemoryOptions(size=64 * KiB), children={"file": (disk, ChildRole.STORAGE)})
        extent = await requests.chain_status(node, 0, 64 * KiB)
        assert (extent.present, extent.zero, extent.data, extent.offset) == (True, True, True, 0)

    run(main)


def test_clipping_keeps_offsets_in_step() -> None:
    """Each kind of extent can be cut at both ends."""
    assert clip(Data(100, 1000), 10, 50) == Data(50, 1010)
    assert clip(Data(100), 10, 500) == Data(90)
    assert clip(Zero(100, 0), 1, 1) == Zero(1, 1)
    assert clip(Unallocated(100), 99, 5) == Unallocated(1)
    assert clip(Compressed(100), 0, 5) == Compressed(5)
