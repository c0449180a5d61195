"""raw, null, memory: what each adds to or leaves out of plain storage."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qblock import requests
from qblock.backend import BlockBackend
from qblock.drivers.memory import MemoryDriver, MemoryOptions
from qblock.drivers.null import NullAioDriver, NullCoDriver, NullOptions
from qblock.drivers.raw import RawDriver, RawOptions, looks_like_an_image
from qblock.errors import BlockIOError, CommandError
from qblock.extents import Unallocated, Zero
from qblock.node import BlockDriverState
from qblock.permissions import ChildRole, Perm
from qblock.testing.nodes import NodeBench
from qblock.testing.simloop import run
from qblock.units import GiB, KiB, MiB

READ_WRITE = Perm.CONSISTENT_READ | Perm.WRITE


async def raw_over_memory(bench: NodeBench, *, probed: bool = False, **options: Any) -> BlockDriverState:
    disk = await bench.add(MemoryDriver, MemoryOptions(size=64 * KiB), node_name="disk")
    children = {"file": (disk, ChildRole.PRIMARY_DATA)}
    return await bench.add(RawDriver, RawOptions(file="disk", **options), children=children, probed=probed)


# ------------------------------------------------------------------------------------------------------------------ raw


def test_a_raw_window_is_a_disk_of_its_own() -> None:
    """Nothing outside of it can be reached, and the storage around it stays."""

    async def main() -> None:
        bench = NodeBench()
        raw = await raw_over_memory(bench, offset=1000, size=8192)
        backend = bench.backend(raw, perm=READ_WRITE)
        assert backend.length == 8192
        await backend.write(0, b"w" * 8192)
        await backend.write_zeroes(100, 200)
        with pytest.raises(BlockIOError) as caught:
            await backend.write(8192, b"x")
        assert caught.value.errno == errno.EIO
        with pytest.raises(BlockIOError) as caught:
            await raw.driver.write_from(8191, memoryview(b"xx"))
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(BlockIOError) as caught:
            await raw.driver.truncate(512)
        assert caught.value.errno == errno.ENOTSUP
        await backend.flush()
        backend.close()
        below = bench.backend(bench.graph.find_node("disk"), perm=Perm.CONSISTENT_READ)
        assert await below.read(0, 9300) == bytes(1000) + b"w" * 100 + bytes(200) + b"w" * 7892 + bytes(108)

    run(main)


@pytest.mark.parametrize(("offset", "size"), [(65537, None), (0, 66048), (512, 65536), (0, 100), (-1, None), (0, -512)])
def test_a_window_outside_of_the_storage_is_refused(offset: int, size: int | None) -> None:
    """Also when it is changed by reopen."""

    async def main() -> None:
        with pytest.raises(CommandError):
            await raw_over_memory(NodeBench(), offset=offset, size=size)
        raw = await raw_over_memory(NodeBench())
        with pytest.raises(CommandError):
            raw.driver.check_reopen(RawOptions(file="disk", offset=offset, size=size), read_only=False)

    run(main)


def test_raw_is_as_long_as_its_storage_and_follows_it() -> None:
    """A resize of either is seen in the other; a reopen can move the window."""

    async def main() -> None:
        bench = NodeBench()
        raw = await raw_over_memory(bench, offset=512)
        backend = bench.backend(raw)
        assert backend.length == 65024
        await backend.truncate(128 * KiB)
        assert bench.graph.find_node("disk").length == 128 * KiB + 512
        await requests.write_from(raw.children["file"], 256 * KiB, memoryview(b"x" * 512))
        assert backend.length == 256 * KiB
        options = RawOptions(file="disk", offset=1024, size=512)
        raw.driver.check_reopen(options, read_only=False)
        raw.driver.commit_reopen(options, read_only=False)
        assert backend.length == 512

    run(main)


def test_a_window_keeps_its_storage_from_being_resized() -> None:
    """Whoever cuts the storage off would cut the window off."""

    async def main() -> None:
        bench = NodeBench()
        raw = await raw_over_memory(bench, offset=512)
        bench.backend(raw, perm=READ_WRITE)
        edge = raw.children["file"]
        assert (edge.perm, edge.shared) == (READ_WRITE, Perm.ALL & ~Perm.RESIZE)

    run(main)


HEADS = [b"QFI\xfb", b"QED\0", b"KDMV", b"vhdxfile", b"conectix", b"LUKS\xba\xbe", bytes(64) + b"\x7f\x10\xda\xbe"]


@pytest.mark.parametrize("head", HEADS)
def test_a_guessed_raw_disk_cannot_be_made_to_look_like_another_format(head: bytes) -> None:
    """A guest that writes a qcow2 header with a backing file into its disk would read any file of the host next time."""

    async def main() -> None:
        for probed in (True, False):
            bench = NodeBench()
            backend = bench.backend(await raw_over_memory(bench, probed=probed), perm=READ_WRITE)
            if not probed:
                await backend.write(0, head)
                continue
            with pytest.raises(BlockIOError) as caught:
                await backend.write(0, head)
            assert caught.value.errno == errno.EPERM
            # Byte by byte does not work either.
            first = next(at for at, value in enumerate(head) if value)
            await backend.write(0, head[:first] + b"x" + head[first + 1 :])
            with pytest.raises(BlockIOError):
                await backend.write(first, head[first : first + 1])
            await backend.write(512, head)
            await backend.write(0, b"\xeb\x3c boot sector")

    run(main)


def test_a_discard_cannot_complete_a_signature() -> None:
    """Discarding one byte would make a zero of it, and some signatures end with one."""

    async def main() -> None:
        bench = NodeBench()
        raw = await raw_over_memory(bench, probed=True)
        for node in bench.graph.nodes.values():
            node.discard_unmap = True
        backend = bench.backend(raw, perm=READ_WRITE)
        await backend.write(0, b"QEDx")
        await backend.discard(3, 1)
        assert await backend.read(0, 4) == b"QEDx"
        await backend.discard(0, 512)
        assert await backend.read(0, 4) == bytes(4)

    run(main)


def test_no_signature_hides_in_zeroes() -> None:
    """An empty disk is raw."""
    assert not looks_like_an_image(bytes(512)) and RawDriver.probe(bytes(512), "x") == 1


def test_the_name_of_raw_is_the_name_of_its_storage_unless_there_is_a_window() -> None:
    """A window cannot be opened again from a name alone."""

    class Named(MemoryDriver):
        def filename(self) -> str:
            return "/disk"

    async def main() -> None:
        bench = NodeBench()
        disk = await bench.add(Named, MemoryOptions(size=4096))
        for options, name in ((RawOptions(file=""), "/disk"), (RawOptions(file="", offset=512), None)):
            raw = await bench.add(RawDriver, options, children={"file": (disk, ChildRole.PRIMARY_DATA)})
            assert raw.driver.filename() == name

    run(main)


# ----------------------------------------------------------------------------------------------------------------- null


@pytest.mark.parametrize("driver", [NullCoDriver, NullAioDriver])
@pytest.mark.parametrize("read_zeroes", [False, True])
def test_null_keeps_nothing(driver: type[NullCoDriver], read_zeroes: bool) -> None:
    """Reads leave the buffer alone unless zeroes are asked for."""

    async def main() -> None:
        bench = NodeBench()
        node = await bench.add(driver, NullOptions(read_zeroes=read_zeroes))
        backend = bench.backend(node)
        assert backend.length == GiB
        await backend.write(0, b"x" * 512)
        buffer = bytearray(b"y" * 512)
        await backend.read_into(0, memoryview(buffer))
        assert buffer == (bytes(512) if read_zeroes else b"y" * 512)
        await backend.write_zeroes(0, 512)
        await backend.flush()
        expected = Zero(512, 0) if read_zeroes else Unallocated(512)
        assert await requests.block_status(node, 0, 512) == expected
        assert node.driver.allocated_size() == 0

    run(main)


def test_null_takes_its_latency_on_the_systems_clock() -> None:
    """A day of latency costs no wall time on virtual time."""

    async def main() -> None:
        bench = NodeBench()
        day = 86400 * 10**9
        backend = bench.backend(await bench.add(NullCoDriver, NullOptions(latency_ns=day)))
        start = bench.env.clock.now_ns()
        await backend.read(0, 512)
        await backend.write(0, b"x")
        await backend.flush()
        assert bench.env.clock.now_ns() - start == 3 * day

    run(main)


@pytest.mark.parametrize("options", [NullOptions(size=-1), NullOptions(latency_ns=-1)])
def test_null_refuses_negative_numbers(options: NullOptions) -> None:
    """By name."""

    async def main() -> None:
        with pytest.raises(CommandError):
            await NodeBench().add(NullCoDriver, options)

    run(main)


# --------------------------------------------------------------------------------------------------------------- memory

SIZE = 300 * KiB
work = st.lists(
    st.tuples(st.sampled_from(["write", "zero", "discard", "truncate"]), st.integers(0, SIZE), st.integers(0, SIZE)),
    max_size=25,
)


@given(work)
def test_a_memory_disk_equals_a_byte_model(work: list[tuple[str, int, int]]) -> None:
    """Pages come and go, the bytes do not show it; status never calls data zero."""

    async def main() -> None:
        bench = NodeBench()
        node = await bench.add(MemoryDriver, MemoryOptions(size=SIZE), discard_unmap=True)
        backend = bench.backend(node)
        model = bytearray(SIZE)
        for number, (operation, offset, length) in enumerate(work):
            length = min(length, len(model) - offset)
            if operation == "truncate":
                size = -(-offset // 512) * 512
                await backend.truncate(size)
                model = model[:size] + bytes(max(0, size - len(model)))
            elif length > 0:
                data = random.Random(number).randbytes(length) if operation == "write" else bytes(length)
                model[offset : offset + length] = data
                if operation == "write":
                    await backend.write(offset, data)
                elif operation == "zero":
                    await backend.write_zeroes(offset, length)
                else:
                    await backend.discard(offset, length)
        assert await backend.read(0, backend.length) == model
        await check_status(backend, model)

    run(main)


async def check_status(backend: BlockBackend, model: bytearray) -> None:
    offset = 0
    while offset < len(model):
        extent = await requests.block_status(backend.node, offset, len(model) - offset)
        if isinstance(extent, Zero):
            assert not any(model[offset : offset + extent.length])
        offset += extent.length


def test_a_memory_disk_takes_room_for_what_was_written_only() -> None:
    """A terabyte with one byte in it is one page."""

    async def main() -> None:
        bench = NodeBench()
        node = await bench.add(MemoryDriver, MemoryOptions(size=1 << 40), discard_unmap=True)
        backend = bench.backend(node)
        await backend.write(1 << 39, b"x")
        assert 0 < (node.driver.allocated_size() or 0) <= MiB
        await backend.discard(0, 1 << 40)
        assert node.driver.allocated_size() == 0
        assert await backend.read(1 << 39, 1) == b"\0"

    run(main)


def test_a_memory_disk_of_negative_size_is_refused() -> None:
    """By name."""

    async def main() -> None:
        with pytest.raises(CommandError):
            await NodeBench().add(MemoryDriver, MemoryOptions(size=-1))

    run(main)
