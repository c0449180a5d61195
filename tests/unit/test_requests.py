"""The border: what it lets through, how it cuts and books requests, and what it refuses."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from qblock import requests
from qblock.dirty import DirtyBitmap
from qblock.driver import Limits
from qblock.drivers.memory import MemoryOptions
from qblock.errors import BlockIOError, ImagePoisoned
from qblock.node import BdrvChild, BlockDriverState
from qblock.permissions import ChildRole, Perm
from qblock.ranges import ByteRange
from qblock.testing.nodes import FaultyMemoryDriver, LayerDriver, NodeBench
from qblock.testing.simloop import run
from qblock.units import KiB, MiB
from qblock.zeroes import ZERO_PIECE


async def faulty(
    bench: NodeBench, size: int = 64 * KiB, limits: Limits | None = None, **state: Any
) -> tuple[FaultyMemoryDriver, BdrvChild]:
    """A faulty memory disk and an edge that may do everything with it."""
    node = await bench.add(FaultyMemoryDriver, MemoryOptions(size=size), **state)
    driver = node.driver
    assert isinstance(driver, FaultyMemoryDriver)
    if limits is not None:
        driver.limits = limits
    perm = Perm.CONSISTENT_READ | (Perm.NONE if node.read_only else Perm.WRITE | Perm.RESIZE)
    edge = bench.backend(node, perm=perm).root
    assert edge is not None
    return driver, edge


def view(data: bytes) -> memoryview:
    return memoryview(data)


async def others_blocked() -> None:
    """Virtual time passes only when nothing else can run."""
    await asyncio.sleep(1)


async def content(edge: BdrvChild, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    await requests.read_into(edge, offset, memoryview(buffer))
    return bytes(buffer)


def test_a_plain_request_reaches_the_driver_as_it_is_and_never_suspends() -> None:
    """The fast path: one driver call, no wait, so a coroutine driven by hand ends at once."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench())
        buffer = memoryview(bytearray(100))
        for request in (requests.write_from(edge, 512, buffer), requests.read_into(edge, 512, buffer)):
            with pytest.raises(StopIteration):
                request.send(None)
        assert driver.calls == [("write", 512, 100), ("read", 512, 100)]

    run(main)


def test_reading_behind_the_end_gives_zeroes() -> None:
    """A node may be shorter than the one above it."""

    async def main() -> None:
        _, edge = await faulty(NodeBench(), size=1024)
        await requests.write_from(edge, 0, view(b"a" * 1024))
        assert await content(edge, 1000, 100) == b"a" * 24 + bytes(76)
        assert await content(edge, 4096, 100) == bytes(100)

    run(main)


def test_a_write_behind_the_end_grows_the_node_and_its_bitmaps() -> None:
    """Format drivers allocate at the end of their file; lengths are whole sectors."""

    async def main() -> None:
        _, edge = await faulty(NodeBench(), size=1024)
        bitmap = DirtyBitmap(1024, 512)
        edge.node.dirty_bitmaps.append(bitmap)
        await requests.write_from(edge, 2000, view(b"a" * 100))
        assert edge.node.length == 2560
        assert bitmap.size == 2560
        assert [(r.offset, r.length) for r in bitmap.iterate()] == [(1536, 1024)]

    run(main)


def test_long_transfers_are_split_to_what_the_driver_takes() -> None:
    """``max_transfer`` limits each call, rounded down to the alignment."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench(), limits=Limits(request_alignment=512, max_transfer=1500))
        await requests.write_from(edge, 512, view(b"a" * 3072))
        await content(edge, 512, 2048)
        assert driver.calls == [
            ("write", 512, 1024), ("write", 1536, 1024), ("write", 2560, 1024), ("read", 512, 1024), ("read", 1536, 1024)
        ]  # fmt: skip

    run(main)


def test_zero_writes_are_split_into_head_bulk_and_tail() -> None:
    """A format zeroes whole clusters cheaply; the parts at both ends come as requests of their own."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench(), limits=Limits(zero_alignment=4096, max_write_zeroes=10000))
        await requests.write_zeroes(edge, 1000, 30000)
        assert driver.calls == [
            ("zero", 1000, 3096), ("zero", 4096, 8192), ("zero", 12288, 8192), ("zero", 20480, 8192), ("zero", 28672, 2328)
        ]  # fmt: skip

    run(main)


@pytest.mark.parametrize(("discard_unmap", "operation"), [(False, "zero"), (True, "unmap")])
def test_unmapping_needs_discard_unmap_on_the_node(discard_unmap: bool, operation: str) -> None:
    """A user who did not ask for ``discard=unmap`` keeps preallocated space."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench(), discard_unmap=discard_unmap)
        await requests.write_zeroes(edge, 0, 4096, may_unmap=True)
        assert driver.calls == [(operation, 0, 4096)]

    run(main)


def test_zeroes_are_written_as_data_where_the_driver_cannot() -> None:
    """The fallback is cut into pieces of 16 MiB; with no_fallback the caller is told instead."""

    class NoZeroes(FaultyMemoryDriver):
        async def write_zeroes(
            self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
        ) -> None:
            raise BlockIOError(errno.ENOTSUP)

        async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
            await self._enter("write", offset, len(buffer))

    async def main() -> None:
        bench = NodeBench()
        node = await bench.add(NoZeroes, MemoryOptions(size=64 * MiB))
        edge = bench.backend(node).root
        assert edge is not None and isinstance(node.driver, NoZeroes)
        with pytest.raises(BlockIOError) as caught:
            await requests.write_zeroes(edge, 0, 4096, no_fallback=True)
        assert caught.value.errno == errno.ENOTSUP and not node.driver.calls
        await requests.write_zeroes(edge, 512, 2 * ZERO_PIECE)
        assert node.driver.calls == [("write", 512, ZERO_PIECE), ("write", 512 + ZERO_PIECE, ZERO_PIECE)]

    run(main)


@pytest.mark.parametrize(("mode", "data", "operation"), [
    ("off", bytes(4096), "write"), ("on", bytes(4096), "zero"), ("unmap", bytes(4096), "unmap"),
    ("on", bytes(4095) + b"\1", "write"),
])  # fmt: skip
def test_detect_zeroes_turns_zero_payloads_into_zero_writes(mode: str, data: bytes, operation: str) -> None:
    """``unmap`` also gives the space back."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench(), detect_zeroes=mode, discard_unmap=True)
        await requests.write_from(edge, 4096, view(data))
        assert driver.calls == [(operation, 4096, 4096)]

    run(main)


def test_discard_has_no_effect_without_discard_unmap() -> None:
    """It succeeds, and the driver does not hear of it."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench())
        await requests.discard(edge, 0, 4096)
        assert driver.calls == [] and edge.node.write_generation == 0

    run(main)


def test_discards_are_split_and_unsupported_pieces_are_ignored() -> None:
    """A discard is advice: a driver that takes whole clusters only says so for the ends, and that is fine."""

    class ClustersOnly(FaultyMemoryDriver):
        async def discard(self, offset: int, length: int) -> None:
            await self._enter("discard", offset, length)
            if offset % 4096 or length % 4096:
                raise BlockIOError(errno.ENOTSUP)

    async def main() -> None:
        bench = NodeBench()
        node = await bench.add(ClustersOnly, MemoryOptions(size=64 * KiB), discard_unmap=True)
        assert isinstance(node.driver, ClustersOnly)
        node.driver.limits = Limits(discard_alignment=4096, max_discard=8192)
        edge = bench.backend(node).root
        assert edge is not None
        await requests.discard(edge, 1000, 1 * MiB)
        assert node.driver.calls[:3] == [("discard", 1000, 3096), ("discard", 4096, 8192), ("discard", 12288, 8192)]
        assert node.driver.calls[-1] == ("discard", 61440, 4096)

    run(main)


def test_bitmaps_are_set_after_a_write_also_when_it_failed() -> None:
    """A write that failed may have changed a part: a mirror must copy it again."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench())
        bitmap = DirtyBitmap(64 * KiB, 4096)
        edge.node.dirty_bitmaps.append(bitmap)
        driver.gate = asyncio.Event()
        write = asyncio.ensure_future(requests.write_from(edge, 4096, view(b"x")))
        await others_blocked()
        assert driver.calls and bitmap.count == 0
        driver.gate.set()
        await write
        assert bitmap.get(4096) and bitmap.count == 4096
        driver.fail_after = 0
        with pytest.raises(BlockIOError):
            await requests.write_zeroes(edge, 8192, 4096)
        assert bitmap.get(8192)

    run(main)


def test_a_read_only_bitmap_forbids_writes_and_discards() -> None:
    """A bitmap stored in an image that is open read-only elsewhere could not follow them."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench(), discard_unmap=True)
        edge.node.dirty_bitmaps.append(DirtyBitmap(64 * KiB, 4096, "b", readonly=True))
        write = requests.write_from(edge, 0, view(b"x"))
        for request in (write, requests.write_zeroes(edge, 0, 1), requests.discard(edge, 0, 1)):
            with pytest.raises(BlockIOError) as caught:
                await request
            assert caught.value.errno == errno.EPERM
        assert driver.calls == []

    run(main)


def test_a_read_only_node_refuses_every_change() -> None:
    """With EPERM, whatever the caller thinks it may do."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench(), read_only=True)
        for request in (
            requests.write_from(edge, 0, view(b"x")), requests.write_zeroes(edge, 0, 1),
            requests.discard(edge, 0, 1), requests.truncate(edge, 0),
        ):  # fmt: skip
            with pytest.raises(BlockIOError) as caught:
                await request
            assert caught.value.errno == errno.EPERM
        assert driver.calls == [] and edge.node.in_flight == 0

    run(main)


def test_a_poisoned_node_reads_but_refuses_writes_and_flushes() -> None:
    """What is on disk is not known, so nothing may be promised; error policies see an EIO."""

    async def main() -> None:
        _, edge = await faulty(NodeBench())
        edge.node.poisoned = OSError("no")
        await content(edge, 0, 512)
        for request in (requests.write_from(edge, 0, view(b"x")), requests.flush(edge.node)):
            with pytest.raises(BlockIOError) as caught:
                await request
            assert isinstance(caught.value, ImagePoisoned) and caught.value.errno == errno.EIO

    run(main)


def test_a_writer_without_the_permission_is_a_bug() -> None:
    """The border asserts; it is never a message for a person."""

    async def main() -> None:
        _, edge = await faulty(NodeBench())
        edge.may_write = False
        with pytest.raises(AssertionError):
            await requests.write_from(edge, 0, view(b"x"))
        edge.may_write, edge.may_resize = True, False
        with pytest.raises(AssertionError):
            await requests.write_from(edge, 64 * KiB, view(b"x"))

    run(main)


def test_the_write_threshold_fires_once_with_how_far_it_was_exceeded() -> None:
    """Management software extends the volume below in time."""

    async def main() -> None:
        bench = NodeBench()
        _, edge = await faulty(bench, node_name="disk")
        edge.node.write_threshold = 8192
        await requests.write_from(edge, 0, view(b"x" * 8192))
        assert bench.events == []
        await requests.write_zeroes(edge, 8000, 1000)
        await requests.write_from(edge, 9000, view(b"x"))
        data = {"node-name": "disk", "amount-exceeded": 808, "write-threshold": 8192}
        assert bench.events == [("BLOCK_WRITE_THRESHOLD", data)]
        assert edge.node.wr_highest_offset == 9001

    run(main)


def test_flush_is_skipped_when_nothing_was_written_since() -> None:
    """fdatasync is the dearest call of all."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench())
        await requests.flush(edge.node)
        await requests.write_from(edge, 0, view(b"x"))
        await requests.flush(edge.node)
        await requests.flush(edge.node)
        assert [call[0] for call in driver.calls] == ["write", "flush"]

    run(main)


def test_a_write_during_a_flush_is_not_covered_by_it() -> None:
    """The flush may have passed its place already."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench())
        await requests.write_from(edge, 0, view(b"x"))
        driver.gate = asyncio.Event()
        flush = asyncio.ensure_future(requests.flush(edge.node))
        await others_blocked()
        gate, driver.gate = driver.gate, None
        await requests.write_from(edge, 0, view(b"y"))
        gate.set()
        await flush
        await requests.flush(edge.node)
        assert [call[0] for call in driver.calls] == ["write", "flush", "write", "flush"]

    run(main)


def test_a_failed_flush_is_tried_again() -> None:
    """The generation counts as flushed only after success."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench())
        await requests.write_from(edge, 0, view(b"x"))
        driver.fail_after = 0
        with pytest.raises(BlockIOError):
            await requests.flush(edge.node)
        driver.fail_after = None
        await requests.flush(edge.node)
        assert [call[0] for call in driver.calls] == ["write", "flush", "flush"]

    run(main)


def test_no_flush_is_honoured_at_the_storage() -> None:
    """``cache.no-flush=on`` gives safety away for speed."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench(), cache_no_flush=True)
        await requests.write_from(edge, 0, view(b"x"), fua=True)
        await requests.flush(edge.node)
        assert [call[0] for call in driver.calls] == ["write"]

    run(main)


def test_forced_unit_access_is_a_write_and_a_flush() -> None:
    """Write-through users get durability with every request."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench())
        await requests.write_from(edge, 0, view(b"x"), fua=True)
        await requests.write_zeroes(edge, 0, 1, fua=True)
        assert [call[0] for call in driver.calls] == ["write", "flush", "zero", "flush"]

    run(main)


def test_growing_hides_what_a_longer_backing_node_holds() -> None:
    """Old data of a snapshot must not reappear in a disk that was shrunk and grown."""

    async def main() -> None:
        bench = NodeBench()
        base = await bench.add(LayerDriver, MemoryOptions(size=32 * KiB))
        lower = bench.backend(base)
        await lower.write(0, b"b" * 32 * KiB)
        lower.close()
        top = await bench.add(LayerDriver, MemoryOptions(size=8 * KiB), children={"backing": (base, ChildRole.BACKING)})
        backend = bench.backend(top)
        await backend.truncate(64 * KiB)
        assert backend.length == 64 * KiB
        assert await backend.read(0, 64 * KiB) == b"b" * 8 * KiB + bytes(56 * KiB)

    run(main)


def test_requests_in_flight_are_counted_and_their_end_is_told() -> None:
    """Drained sections wait for exactly this."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench())
        driver.gate = asyncio.Event()
        tasks = [
            asyncio.ensure_future(request)
            for request in (
                requests.write_from(edge, 0, view(b"x")), requests.read_into(edge, 0, memoryview(bytearray(1))),
                requests.write_zeroes(edge, 0, 1), requests.read_into(edge, 65535, memoryview(bytearray(10))),
            )
        ]  # fmt: skip
        await others_blocked()
        assert edge.node.in_flight == 4
        waiter = asyncio.get_running_loop().create_future()
        edge.node.idle_waiters.append(waiter)
        driver.gate.set()
        await waiter
        assert edge.node.in_flight == 0
        await asyncio.gather(*tasks)

    run(main)


@pytest.mark.parametrize("operation", ["read", "write", "zero", "discard", "flush", "unaligned"])
@pytest.mark.parametrize("nth", range(6))
def test_a_failure_at_any_call_leaves_no_trace_in_the_books(operation: str, nth: int) -> None:
    """Fail the n-th driver call of every kind of request: counters, tracking and the node's use go on."""

    async def main() -> None:
        limits = Limits(request_alignment=512, max_transfer=1024, zero_alignment=4096, discard_alignment=4096)
        driver, edge = await faulty(NodeBench(), limits=limits, discard_unmap=True)
        await requests.write_from(edge, 0, view(b"x" * 512))
        driver.fail_after = nth
        work = {
            "read": requests.read_into(edge, 0, memoryview(bytearray(5000))),
            "write": requests.write_from(edge, 0, view(b"x" * 5120)),
            "zero": requests.write_zeroes(edge, 512, 16384),
            "discard": requests.discard(edge, 512, 16384),
            "flush": requests.flush(edge.node),
            "unaligned": requests.write_from(edge, 100, view(b"x" * 2000), fua=True),
        }
        request = work.pop(operation)
        for unused in work.values():
            unused.close()
        failed = False
        try:
            await request
        except BlockIOError:
            failed = True
        assert failed == (driver.fail_after < 0)
        driver.fail_after = None
        node: BlockDriverState = edge.node
        assert (node.in_flight, node.untracked_writes, node.serialising, node.tracked) == (0, 0, 0, {})
        await requests.write_from(edge, 100, view(b"y" * 600))
        assert await content(edge, 100, 600) == b"y" * 600

    run(main)


def test_blocks_that_are_written_in_part_are_dirty_as_a_whole() -> None:
    """They are read and written back whole; a discard leaves what it does not cover alone, so it counts as it was asked for."""

    async def main() -> None:
        driver, edge = await faulty(NodeBench(), limits=Limits(request_alignment=4096), discard_unmap=True)
        bitmap = DirtyBitmap(64 * KiB, 512)
        edge.node.dirty_bitmaps.append(bitmap)
        await requests.write_from(edge, 8 * KiB + 512, view(b"x" * 512))
        assert [*bitmap.iterate()] == [ByteRange(8 * KiB, 4 * KiB)]
        bitmap.clear()
        await requests.discard(edge, 20 * KiB + 512, 512)
        assert bitmap.count == (512 if driver.supports_discard else 0)

    run(main)
