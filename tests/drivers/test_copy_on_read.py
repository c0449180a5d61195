"""Copy-on-read: by the filter, with and without a bottom, and as a property of the node."""

from __future__ import annotations

import asyncio

import pytest

from qblock import requests
from qblock.dirty import DirtyBitmap
from qblock.drivers.copy_on_read import CopyOnReadDriver, CopyOnReadOptions
from qblock.drivers.memory import MemoryOptions
from qblock.errors import BlockIOError, CommandError, NodeNotFound
from qblock.node import BlockDriverState
from qblock.permissions import ChildRole, Perm
from qblock.testing.nodes import LayerDriver, NodeBench
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SIZE = 64 * KiB


async def layers(bench: NodeBench) -> list[BlockDriverState]:
    """base, mid and top of 64 KiB each; base is full of 1, mid has 2 in [4K, 12K), top has 3 in [8K, 12K)."""
    found: list[BlockDriverState] = []
    for number, (start, end) in enumerate([(0, SIZE), (4096, 12288), (8192, 12288)], start=1):
        children = {"backing": (found[-1], ChildRole.BACKING)} if found else None
        name = ("base", "mid", "top")[number - 1]
        node = await bench.add(LayerDriver, MemoryOptions(size=SIZE), children=children, node_name=name)
        backend = bench.backend(node)
        await backend.write(start, bytes([number]) * (end - start))
        backend.close()
        found.append(node)
    return found


def layer(node: BlockDriverState) -> LayerDriver:
    assert isinstance(node.driver, LayerDriver)
    return node.driver


async def filtered(bench: NodeBench, top: BlockDriverState, bottom: str | None = None) -> BlockDriverState:
    options = CopyOnReadOptions(file="top", bottom=bottom)
    return await bench.add(CopyOnReadDriver, options, children={"file": (top, ChildRole.FILTERED)})


def test_what_is_read_is_kept_in_whole_clusters() -> None:
    """A read of one byte copies its cluster; what the top has already is not written again."""

    async def main() -> None:
        bench = NodeBench()
        _, _, top = await layers(bench)
        backend = bench.backend(await filtered(bench, top), perm=Perm.CONSISTENT_READ)
        bitmap = DirtyBitmap(SIZE, 4096)
        top.dirty_bitmaps.append(bitmap)
        assert await backend.read(4097, 1) == b"\2"
        assert layer(top).allocated == {1, 2}
        assert await backend.read(8000, 20000) == b"\2" * 192 + b"\3" * 4096 + b"\1" * 15712
        assert layer(top).allocated == set(range(1, 7))
        assert bitmap.count == 0, "the content has not changed"
        assert not top.tracking and top.in_flight == 0

    run(main)


def test_zeroes_are_kept_as_zero_writes() -> None:
    """They take no room."""

    async def main() -> None:
        bench = NodeBench()
        base, _, top = await layers(bench)
        lower = bench.backend(base)
        await lower.write_zeroes(32768, 4096)
        lower.close()
        backend = bench.backend(await filtered(bench, top), perm=Perm.CONSISTENT_READ)
        layer(top).calls.clear()
        assert await backend.read(32768, 4096) == bytes(4096)
        assert [call[0] for call in layer(top).calls] == ["read", "zero"]

    run(main)


def test_with_a_bottom_only_layers_down_to_it_are_kept() -> None:
    """What lies below is read without a copy."""

    async def main() -> None:
        bench = NodeBench()
        _, _, top = await layers(bench)
        backend = bench.backend(await filtered(bench, top, "mid"), perm=Perm.CONSISTENT_READ)
        assert await backend.read(0, SIZE) == b"\1" * 4096 + b"\2" * 4096 + b"\3" * 4096 + b"\1" * (SIZE - 12288)
        assert layer(top).allocated == {1, 2}

    run(main)


def test_a_bottom_must_be_a_layer_of_the_chain() -> None:
    """Neither unknown nor a filter."""

    async def main() -> None:
        bench = NodeBench()
        _, _, top = await layers(bench)
        with pytest.raises(NodeNotFound):
            await filtered(bench, top, "nope")
        inner = await bench.add(
            CopyOnReadDriver,
            CopyOnReadOptions(file="top"),
            children={"file": (top, ChildRole.FILTERED)},
            node_name="inner",
        )
        with pytest.raises(CommandError, match="filter"):
            await filtered(bench, inner, "inner")

    run(main)


def test_a_node_can_copy_on_read_without_a_filter() -> None:
    """``copy-on-read=on`` of a drive; a read-only node only reads."""

    async def main() -> None:
        bench = NodeBench()
        _, _, top = await layers(bench)
        top.copy_on_read = 1
        backend = bench.backend(top, perm=Perm.CONSISTENT_READ)
        assert await backend.read(SIZE - 1, 1) == b"\1"
        assert layer(top).allocated == {2, 15}
        top.read_only = True
        assert await backend.read(0, 1) == b"\1"
        assert layer(top).allocated == {2, 15}

    run(main)


def test_a_failed_write_is_reported_to_the_reader() -> None:
    """Nothing is registered afterwards, and the next read tries again."""

    async def main() -> None:
        bench = NodeBench()
        _, _, top = await layers(bench)
        backend = bench.backend(await filtered(bench, top), perm=Perm.CONSISTENT_READ)
        layer(top).fail_after = 1
        with pytest.raises(BlockIOError):
            await backend.read(0, 512)
        layer(top).fail_after = None
        assert not top.tracking and not top.tracked
        assert await backend.read(0, 512) == b"\1" * 512

    run(main)


@pytest.mark.parametrize("seed", range(20))
def test_a_guest_write_beside_copy_on_read_is_never_undone(seed: int) -> None:
    """Reading old data and writing them here must not come around a write that was acknowledged."""

    class Yielding(LayerDriver):
        async def _enter(self, operation: str, offset: int, length: int) -> None:
            await asyncio.sleep(0)
            await super()._enter(operation, offset, length)
            await asyncio.sleep(0)

    async def main() -> None:
        bench = NodeBench()
        base, *_ = await layers(bench)
        top = await bench.add(Yielding, MemoryOptions(size=SIZE), children={"backing": (base, ChildRole.BACKING)})
        backend = bench.backend(await filtered(bench, top), perm=Perm.CONSISTENT_READ | Perm.WRITE)
        async with asyncio.TaskGroup() as group:
            group.create_task(backend.read(0, 16384))
            for block in range(4):
                group.create_task(backend.write(block * 4096, b"g" * 4096))
            group.create_task(backend.read(4096, 8192))
        assert await backend.read(0, 16384) == b"g" * 16384
        assert not top.tracking and top.untracked_writes == 0
        assert (await requests.chain_status(top, 0, 16384)).depth == 0

    run(main, Seeded(seed))
