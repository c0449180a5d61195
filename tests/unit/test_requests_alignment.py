"""Unaligned requests against a byte model, and read-modify-write against everything that may run beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qblock import requests
from qblock.alignment import pieces
from qblock.driver import Limits
from qblock.drivers.memory import MemoryOptions
from qblock.node import BdrvChild
from qblock.testing.nodes import FaultyMemoryDriver, NodeBench
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SIZE = 16 * KiB


async def disk(limits: Limits) -> tuple[FaultyMemoryDriver, BdrvChild]:
    bench = NodeBench()
    node = await bench.add(FaultyMemoryDriver, MemoryOptions(size=SIZE), discard_unmap=True)
    node.driver.limits = limits
    edge = bench.backend(node).root
    assert edge is not None and isinstance(node.driver, FaultyMemoryDriver)
    return node.driver, edge


limits = st.builds(
    Limits,
    request_alignment=st.sampled_from([1, 512, 4096]),
    max_transfer=st.sampled_from([0, 4096, 5000]),
    zero_alignment=st.sampled_from([1, 512, 4096]),
    max_write_zeroes=st.sampled_from([0, 3000, 8192]),
)
operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "read"]), st.integers(0, SIZE - 1), st.integers(1, SIZE), st.integers(1, 255)
    ),
    max_size=20,
)


@given(limits=limits, work=operations)
def test_any_sequence_of_requests_equals_a_byte_model(limits: Limits, work: list[tuple[str, int, int, int]]) -> None:
    """Whatever the driver's alignment and limits, the disk is a plain array of bytes."""

    async def main() -> None:
        _, edge = await disk(limits)
        model = bytearray(SIZE)
        for operation, offset, length, value in work:
            length = min(length, SIZE - offset)
            if operation == "write":
                model[offset : offset + length] = bytes([value]) * length
                await requests.write_from(edge, offset, memoryview(bytes([value]) * length))
            elif operation == "zero":
                model[offset : offset + length] = bytes(length)
                await requests.write_zeroes(edge, offset, length)
            buffer = bytearray(b"\xee" * length)
            await requests.read_into(edge, offset, memoryview(buffer))
            assert buffer == model[offset : offset + length]
        whole = bytearray(SIZE)
        await requests.read_into(edge, 0, memoryview(whole))
        assert whole == model

    run(main)


@given(
    st.integers(0, 10000),
    st.integers(1, 50000),
    st.sampled_from([1, 512, 4096, 65536]),
    st.sampled_from([0, 100, 9000]),
)
def test_pieces_cover_a_range_once_and_cross_no_unit_in_part(offset: int, length: int, unit: int, maximum: int) -> None:
    """Each piece lies inside one unit, or consists of whole units."""
    at = offset
    for start, count in pieces(offset, length, unit=unit, maximum=maximum):
        assert start == at and count > 0 and (not maximum or count <= maximum)
        whole = start % unit == 0 and count % unit == 0
        assert whole or start // unit == (start + count - 1) // unit
        at += count
    assert at == offset + length


Request = Callable[[BdrvChild], object]


@pytest.mark.parametrize("seed", range(30))
def test_partial_writes_of_one_block_do_not_undo_each_other(seed: int) -> None:
    """Eight writers each change their own eighth of a block, under any schedule: all eight must be there at the end."""

    class Yielding(FaultyMemoryDriver):
        async def _enter(self, operation: str, offset: int, length: int) -> None:
            await asyncio.sleep(0)
            await super()._enter(operation, offset, length)
            await asyncio.sleep(0)

    async def main() -> None:
        bench = NodeBench()
        node = await bench.add(Yielding, MemoryOptions(size=SIZE))
        node.driver.limits = Limits(request_alignment=512)
        edge = bench.backend(node).root
        assert edge is not None
        async with asyncio.TaskGroup() as group:
            for part in range(8):
                data = memoryview(bytes([part + 1]) * 64)
                group.create_task(requests.write_from(edge, part * 64, data))
            group.create_task(requests.write_from(edge, 512, memoryview(b"z" * 512)))
            group.create_task(requests.write_zeroes(edge, 1000, 48))
        buffer = bytearray(1536)
        await requests.read_into(edge, 0, memoryview(buffer))
        assert buffer[:512] == b"".join(bytes([part + 1]) * 64 for part in range(8))
        assert buffer[512:1000] == b"z" * 488
        assert buffer[1024:] == bytes(512)
        assert not node.tracking and not node.tracked

    run(main, Seeded(seed))


def test_a_partial_write_waits_for_whole_writes_that_were_under_way_untracked() -> None:
    """Nothing is tracked until the first serialising request comes; what started before is waited for."""

    async def main() -> None:
        driver, edge = await disk(Limits(request_alignment=512))
        driver.gate = asyncio.Event()
        whole = asyncio.ensure_future(requests.write_from(edge, 0, memoryview(b"a" * 512)))
        await asyncio.sleep(1)
        assert edge.node.untracked_writes == 1 and not edge.node.tracking
        part = asyncio.ensure_future(requests.write_from(edge, 100, memoryview(b"b" * 100)))
        later = asyncio.ensure_future(requests.write_from(edge, 0, memoryview(b"c" * 512)))
        aside = asyncio.ensure_future(requests.write_from(edge, 4096, memoryview(b"d" * 512)))
        await asyncio.sleep(1)
        # The read of the partial write has not begun, and the younger overlapping write waits behind it.
        assert driver.calls == [("write", 0, 512), ("write", 4096, 512)]
        driver.gate.set()
        await asyncio.gather(whole, part, later, aside)
        assert driver.calls[2:] == [("read", 0, 512), ("write", 0, 512), ("write", 0, 512)]

    run(main)


def test_a_cancelled_waiter_leaves_nothing_registered() -> None:
    """Others must not wait for a request that will never run."""

    async def main() -> None:
        driver, edge = await disk(Limits(request_alignment=512))
        driver.gate = asyncio.Event()
        first = asyncio.ensure_future(requests.write_from(edge, 0, memoryview(b"a")))
        await asyncio.sleep(1)
        second = asyncio.ensure_future(requests.write_from(edge, 1, memoryview(b"b")))
        await asyncio.sleep(1)
        second.cancel()
        await asyncio.sleep(1)
        assert len(edge.node.tracked) == 1 and edge.node.in_flight == 1
        driver.gate.set()
        await first
        await requests.write_from(edge, 2, memoryview(b"c"))
        assert not edge.node.tracking and not edge.node.tracked

    run(main)
