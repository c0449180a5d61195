"""The kernel's own queue of requests below the file driver: on real files, an ordinary loop and the real kernel."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import random
import select
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qblock.drain import drained
from qblock.drivers.file import FileDriver, FileOptions, aio
from qblock.drivers.file.aio import LinuxAio
from qblock.drivers.file.direct import DirectAccess
from qblock.drivers.file.slots import DEPTH, LARGEST
from qblock.errors import BlockIOError, CommandError, InvalidParameter
from qblock.node import BlockDriverState
from qblock.opening import Opener
from qblock.testing.contract import Keeps, check_driver
from qblock.testing.nodes import NodeBench
from qblock.testing.simloop import run
from qblock.units import KiB, MiB

BLOCK = 4 * KiB
KernelCall = Callable[..., int]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A disk of 2 MiB, where past the page cache there is a queue."""

    async def probe(fd: int) -> None:
        queue = LinuxAio()
        try:
            if not await queue.read(fd, 0, memoryview(bytearray(BLOCK))):
                raise OSError(errno.EOPNOTSUPP, "this file system would wait")
        finally:
            queue.close()

    path = tmp_path / "disk"
    path.write_bytes(random.Random(1).randbytes(2 * MiB))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.fsync(fd)  # writes into space that is allocated already need not wait
        asyncio.run(probe(fd))
        os.close(fd)
    except OSError as error:
        pytest.skip(f"there is no queue here: {error}")
    return path


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[tuple[NodeBench, BlockDriverState]]:
    bench = NodeBench()
    wanted = FileOptions(filename=str(path), aio="native", **options)
    node = await bench.add(FileDriver, wanted, cache_direct=True)
    try:
        yield bench, node
    finally:
        await bench.close()
        bench.env.executor.shutdown()


def queue_of(node: BlockDriverState) -> LinuxAio:
    assert isinstance(node.driver, FileDriver)
    assert isinstance(node.driver._access, DirectAccess)
    queue = node.driver._access._queue
    assert queue is not None
    return queue


def replace_call(monkeypatch: pytest.MonkeyPatch, number: int, instead: KernelCall) -> None:
    """Let ``instead`` answer the system call that stands at this place of the table, the kernel all others."""
    real = aio.call
    numbers = {table[number] for table in aio._CALLS.values()}
    monkeypatch.setattr(aio, "call", lambda which, *args: (instead if which in numbers else real)(which, *args))


def fail_with(code: int) -> KernelCall:
    def fail(*args: object) -> int:
        ctypes.set_errno(code)
        return -1

    return fail


SETUP, SUBMIT = 0, 3


@pytest.mark.parametrize("seed", [1, 2])
def test_a_file_below_the_queue_keeps_the_contract(seed: int, path: Path) -> None:
    """A user sees a disk, whoever runs the requests."""

    async def open_node(opener: Opener) -> BlockDriverState:
        return await opener.open_blockdev(
            {
                "driver": "file", "node-name": "disk", "filename": str(path), "discard": "unmap", "aio": "native",
                "aio-max-batch": 3, "cache": {"direct": True},
            }
        )  # fmt: skip

    check_driver(open_node, keeps=Keeps.FOREVER, seed=seed, real_time=True)


@pytest.mark.parametrize(("limit", "largest"), [(0, DEPTH), (5, 5)])
def test_requests_of_one_turn_go_to_the_kernel_together(
    limit: int, largest: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests than the queue has slots: the rest follows as slots become free, no batch is beyond the limit."""
    batches = []
    real = aio.call

    def count(*args: Any) -> int:
        batches.append(args[2].value)
        return real(*args)

    replace_call(monkeypatch, SUBMIT, count)
    content = bytearray(path.read_bytes())

    async def main() -> None:
        async with opened(path, aio_max_batch=limit) as (bench, node):
            backend = bench.backend(node)
            places = range(0, len(content), BLOCK)
            assert await asyncio.gather(*(backend.read(at, BLOCK) for at in places)) == [
                bytes(content[at : at + BLOCK]) for at in places
            ]
            for at in places:
                content[at : at + BLOCK] = bytes([at // BLOCK % 251]) * BLOCK
            await asyncio.gather(*(backend.write(at, bytes(content[at : at + BLOCK])) for at in places))
            assert sorted(queue_of(node)._free) == list(range(DEPTH))

    asyncio.run(main())
    assert path.read_bytes() == content
    assert sum(batches) == 2 * len(content) // BLOCK
    assert max(batches) == largest


def test_the_end_of_the_file_reads_as_zeroes(path: Path) -> None:
    """A file of an odd size: the kernel gives less than was asked for."""
    os.truncate(path, 3 * BLOCK + 100)
    data = path.read_bytes()

    async def main() -> None:
        async with opened(path) as (_, node):
            buffer = memoryview(bytearray(b"x" * 4 * BLOCK))
            await node.driver.read_into(2 * BLOCK, buffer)
            assert buffer == data[2 * BLOCK :] + bytes(3 * BLOCK - 100)
            await node.driver.read_into(8 * BLOCK, buffer)
            assert buffer == bytes(4 * BLOCK)

    asyncio.run(main())


def test_a_cancelled_request_waits_for_the_kernel(path: Path) -> None:
    """The file must not change after the caller has gone on, however often it is cancelled."""

    async def main() -> None:
        async with opened(path) as (bench, node):
            queue = queue_of(node)
            loop = asyncio.get_running_loop()
            loop.remove_reader(queue._eventfd)  # results wait until we fetch them
            task = asyncio.create_task(bench.backend(node).write(0, b"n" * BLOCK))
            for _ in range(3):
                await turns()
                task.cancel()
            await turns()
            assert not task.done()
            assert len(queue._free) == DEPTH - 1
            select.select([queue._eventfd], [], [], 30)
            loop.add_reader(queue._eventfd, queue._collect)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(queue._free) == DEPTH

    asyncio.run(main())


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_cancelled_wait_for_a_slot_loses_none(path: Path) -> None:
    """Among them one that is cancelled just when a slot becomes its own."""

    async def main() -> None:
        async with opened(path) as (bench, node):
            queue, backend = queue_of(node), bench.backend(node)
            slots = [queue._free.pop() for _ in range(DEPTH)]
            waiting = [asyncio.create_task(backend.read(0, BLOCK)) for _ in range(3)]
            await turns()
            waiting[0].cancel()
            await turns()
            queue._give_back(slots.pop())
            waiting[1].cancel()
            assert await waiting[2] == path.read_bytes()[:BLOCK]
            for slot in slots:
                queue._give_back(slot)
            assert sorted(queue._free) == list(range(DEPTH))

    asyncio.run(main())


def test_a_drained_file_can_be_closed_under_load(path: Path) -> None:
    """Draining waits for the kernel; every write is in the file."""

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            tasks = [asyncio.create_task(backend.write(n * BLOCK, bytes([n]) * BLOCK)) for n in range(200)]
            await asyncio.sleep(0)
            async with drained(node):
                assert sorted(queue_of(node)._free) == list(range(DEPTH))
            await asyncio.gather(*tasks)

    asyncio.run(main())
    assert path.read_bytes()[: 200 * BLOCK] == b"".join(bytes([n]) * BLOCK for n in range(200))


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL])
def test_what_the_kernel_will_not_queue_is_done_in_a_thread(
    code: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk queue, a file system that cannot promise not to wait, a child of fork: nobody sees a difference."""
    replace_call(monkeypatch, SUBMIT, fail_with(code))

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            await backend.write(BLOCK, b"t" * BLOCK)
            assert await backend.read(0, 3 * BLOCK) == path.read_bytes()[: 3 * BLOCK]

    asyncio.run(main())
    assert path.read_bytes()[BLOCK : 2 * BLOCK] == b"t" * BLOCK


def test_writes_that_would_wait_are_soon_not_offered_any_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space is allocated in threads, and one write in seventeen asks whether the time of the queue has come again."""
    asked = []

    def refuse(*args: object) -> int:
        asked.append(args)
        return fail_with(errno.EAGAIN)()

    replace_call(monkeypatch, SUBMIT, refuse)

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            for n in range(35):
                await backend.write(n * BLOCK, bytes([n]) * BLOCK)

    asyncio.run(main())
    assert path.read_bytes()[: 35 * BLOCK] == b"".join(bytes([n]) * BLOCK for n in range(35))
    assert len(asked) == 3


def test_an_error_of_the_kernel_is_the_error_of_the_request(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next request is another matter."""

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            with monkeypatch.context() as broken:
                replace_call(broken, SUBMIT, fail_with(errno.EIO))
                for request in (backend.read(0, BLOCK), backend.write(0, b"x" * BLOCK)):
                    with pytest.raises(BlockIOError) as caught:
                        await request
                    assert caught.value.errno == errno.EIO
            assert await backend.read(0, BLOCK) == path.read_bytes()[:BLOCK]

    asyncio.run(main())


def test_large_requests_pass_the_queue_by(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in threads, so that no copy of theirs holds the loop up."""
    replace_call(monkeypatch, SUBMIT, fail_with(errno.EIO))

    async def main() -> None:
        async with opened(path) as (bench, node):
            assert await bench.backend(node).read(0, LARGEST + BLOCK) == path.read_bytes()[: LARGEST + BLOCK]

    asyncio.run(main())


def test_without_a_queue_only_native_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system has handed out all queues, or a filter of system calls has none: threads serve who does not insist."""
    replace_call(monkeypatch, SETUP, fail_with(errno.EAGAIN))

    async def main() -> None:
        with pytest.raises(CommandError, match="aio=native"):
            async with opened(path):
                pass
        bench = NodeBench()
        node = await bench.add(FileDriver, FileOptions(filename=str(path)), cache_direct=True)
        assert await bench.backend(node).read(0, BLOCK) == path.read_bytes()[:BLOCK]
        await bench.close()

    asyncio.run(main())


def test_native_is_refused_where_it_would_not_be_so(path: Path) -> None:
    """In virtual time nobody can wait for the kernel; through the page cache there is nothing to queue."""

    async def virtual() -> None:
        with pytest.raises(CommandError, match="virtual time"):
            async with opened(path):
                pass

    async def cached() -> None:
        with pytest.raises(InvalidParameter):
            await NodeBench().add(FileDriver, FileOptions(filename=str(path), aio="native"))
        async with opened(path) as (_, node):
            with pytest.raises(CommandError, match="needs cache"):
                node.driver.check_cache(direct=False)

    run(virtual)
    asyncio.run(cached())


def test_no_descriptor_is_left_behind(path: Path) -> None:
    """Neither by a node that is closed nor by one whose opening fails at the very end."""

    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with opened(path):
            pass
        with pytest.raises(InvalidParameter):
            async with opened(path, pr_manager="pr"):
                pass
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(main())
