"""BlockBackend: ranges, empty drives, drained sections and write-through."""

from __future__ import annotations

import asyncio
import errno

import pytest

from qblock.backend import BlockBackend
from qblock.drain import drained
from qblock.drivers.memory import MemoryOptions
from qblock.errors import BlockIOError, DuplicateName, PermissionConflict
from qblock.permissions import Perm
from qblock.testing.nodes import FaultyMemoryDriver, NodeBench
from qblock.testing.simloop import run
from qblock.transaction import Transaction
from qblock.units import KiB

READ_WRITE = Perm.CONSISTENT_READ | Perm.WRITE


async def disk(bench: NodeBench, name: str = "") -> tuple[FaultyMemoryDriver, BlockBackend]:
    node = await bench.add(FaultyMemoryDriver, MemoryOptions(size=64 * KiB), discard_unmap=True)
    backend = BlockBackend(bench.graph, name, perm=READ_WRITE, shared=Perm.ALL)
    backend.insert(node)
    assert isinstance(node.driver, FaultyMemoryDriver)
    return node.driver, backend


def test_what_is_written_is_read() -> None:
    """Bytes in, bytes out, and the node keeps the rest at zero."""

    async def main() -> None:
        _, backend = await disk(NodeBench())
        await backend.write(100, b"hello")
        assert await backend.read(99, 7) == b"\0hello\0"
        await backend.write_zeroes(101, 2)
        assert await backend.read(99, 7) == b"\0h\0\0lo\0"
        await backend.discard(0, 4096)
        await backend.flush()
        assert await backend.read(99, 7) == bytes(7)

    run(main)


@pytest.mark.parametrize(("offset", "length"), [(64 * KiB, 1), (64 * KiB - 1, 2), (-1, 1), (1 << 70, 1)])
def test_requests_outside_of_the_disk_fail_with_eio(offset: int, length: int) -> None:
    """Unlike on nodes, where reads behind the end give zeroes."""

    async def main() -> None:
        driver, backend = await disk(NodeBench())
        for request in (
            backend.read(offset, length), backend.write(offset, b"x" * length), backend.write_zeroes(offset, length),
            backend.discard(offset, length), backend.copy_range(offset, backend, 0, length),
        ):  # fmt: skip
            with pytest.raises(BlockIOError) as caught:
                await request
            assert caught.value.errno == errno.EIO
        assert driver.calls == [] and backend.in_flight == 0

    run(main)


def test_an_empty_drive_has_no_medium() -> None:
    """A CD drive without disc."""

    async def main() -> None:
        backend = BlockBackend(NodeBench().graph, "cd", perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
        for request in (backend.read(0, 1), backend.write(0, b"x"), backend.flush(), backend.truncate(0)):
            with pytest.raises(BlockIOError) as caught:
                await request
            assert caught.value.errno == errno.ENOMEDIUM and "'cd'" in str(caught.value)
        backend.remove()

    run(main)


def test_requests_wait_while_the_node_is_drained() -> None:
    """A drained section waits for what is under way, and what comes then waits for the section's end."""

    async def main() -> None:
        driver, backend = await disk(NodeBench())
        driver.gate = asyncio.Event()
        early = asyncio.ensure_future(backend.write(0, b"a"))
        await asyncio.sleep(1)
        asyncio.get_running_loop().call_later(10, driver.gate.set)
        async with drained(backend.node):
            assert early.done() and backend.in_flight == 0
            late = [
                asyncio.ensure_future(work)
                for work in (backend.write(1, b"b"), backend.read(0, 2), backend.write_zeroes(9, 1), backend.flush())
            ]
            await asyncio.sleep(5)
            assert driver.calls == [("write", 0, 1)] and not any(task.done() for task in late)
        await asyncio.gather(*late)
        assert len(driver.calls) == 5

    run(main)


def test_a_job_does_not_wait_for_the_section_it_has_begun_itself() -> None:
    """``disable_queuing``: jobs stop at their pause points instead."""

    async def main() -> None:
        _, backend = await disk(NodeBench())
        backend.disable_queuing = True
        async with drained(backend.node):
            await backend.write(0, b"x")

    run(main)


def test_writethrough_makes_each_write_durable() -> None:
    """The guest has switched its write cache off."""

    async def main() -> None:
        driver, backend = await disk(NodeBench())
        backend.writethrough = True
        await backend.write(0, b"x")
        await backend.write_zeroes(0, 1)
        assert [call[0] for call in driver.calls] == ["write", "flush", "zero", "flush"]

    run(main)


def test_a_change_that_is_called_off_leaves_the_backend_as_it_was() -> None:
    """insert, remove and set_permissions are steps of a transaction."""

    async def main() -> None:
        bench = NodeBench()
        _, backend = await disk(bench)
        edge, node = backend.root, backend.node
        assert edge is not None
        with Transaction() as change:
            backend.set_permissions(Perm.NONE, Perm.ALL, change)
            backend.remove(change)
            assert backend.root is None
            backend.insert(node, change)
            change.abort()
        assert backend.root is edge and node.parents == [edge]
        assert (backend.perm, edge.perm) == (READ_WRITE, READ_WRITE)

    run(main)


def test_two_writers_that_do_not_share_conflict() -> None:
    """The refusal names both, and the second backend stays empty."""

    async def main() -> None:
        bench = NodeBench()
        _, first = await disk(bench, "d0")
        first.set_permissions(READ_WRITE, Perm.CONSISTENT_READ)
        second = BlockBackend(bench.graph, perm=READ_WRITE, shared=Perm.ALL)
        with pytest.raises(PermissionConflict) as caught:
            second.insert(first.node)
        assert second.root is None and "d0" in str(caught.value)
        with pytest.raises(PermissionConflict):
            bench.backend(first.node)

    run(main)


def test_device_names_are_unique_and_freed_by_close() -> None:
    """A closed backend leaves the graph."""
    bench = NodeBench()
    backend = BlockBackend(bench.graph, "d0", perm=Perm.NONE, shared=Perm.ALL)
    with pytest.raises(DuplicateName):
        BlockBackend(bench.graph, "d0", perm=Perm.NONE, shared=Perm.ALL)
    backend.close()
    assert BlockBackend(bench.graph, "d0", perm=Perm.NONE, shared=Perm.ALL).describe_user() == "block device 'd0'"
    assert repr(backend) == "<BlockBackend 'd0' node=None in_flight=0>"
