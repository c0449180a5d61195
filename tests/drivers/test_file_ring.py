"""aio=io_uring: requests by way of rings that are shared with the kernel."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qblock
from qblock.blueprint import Blueprint, own_nodes
from qblock.drain import drained
from qblock.drivers.file import FileDriver, FileOptions, ring
from qblock.drivers.file import driver as file_driver
from qblock.drivers.file.access import ThreadAccess
from qblock.drivers.file.ring import PIECE, IoUring
from qblock.drivers.file.slots import DEPTH, LARGEST
from qblock.errors import BlockIOError, CommandError
from qblock.graph import Graph
from qblock.node import BlockDriverState
from qblock.nodespec import NodeFlags
from qblock.opening import Opener
from qblock.testing.contract import Keeps, check_driver
from qblock.testing.nodes import NodeBench
from qblock.testing.simloop import run
from qblock.tools.images import ImageArguments, ImageSession, run_session
from qblock.tools.img import main as img_main
from qblock.units import MiB

BLOCK = 4096
SETUP, ENTER = ring._SETUP, ring._ENTER
KernelCall = Callable[..., int]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A disk of 3 MiB, on a system that has rings."""

    async def probe() -> None:
        IoUring(1).close()

    try:
        asyncio.run(probe())
    except OSError as error:
        pytest.skip(f"there are no rings here: {error}")
    path = tmp_path / "disk"
    path.write_bytes(random.Random(1).randbytes(3 * MiB))
    return path


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is served by the page cache at once: every request is one for the rings."""
    for limit in ("INLINE_READ", "INLINE_WRITE", "INLINE_ALONE"):
        monkeypatch.setattr(file_driver, limit, -1)


class NoThreads(Executor):
    """Fails whoever wants a thread."""

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        """No."""
        raise AssertionError("this was to be done without threads")


@asynccontextmanager
async def opened(path: Path, *, direct: bool = False, **options: Any) -> AsyncIterator[tuple[NodeBench, BlockDriverState]]:
    bench = NodeBench(executor=NoThreads())
    wanted = FileOptions(filename=str(path), aio="io_uring", **options)
    node = await bench.add(FileDriver, wanted, cache_direct=direct)
    try:
        yield bench, node
    finally:
        await bench.close()


def rings_of(node: BlockDriverState) -> IoUring:
    assert isinstance(node.driver, FileDriver)
    assert isinstance(node.driver._access, IoUring)
    return node.driver._access


def replace_call(monkeypatch: pytest.MonkeyPatch, number: int, instead: KernelCall) -> None:
    """Let ``instead`` answer this system call, the kernel all others."""
    real = ring.call
    monkeypatch.setattr(ring, "call", lambda which, *args: (instead if which == number else real)(which, *args))


def fail_with(code: int) -> KernelCall:
    def fail(*args: object) -> int:
        ctypes.set_errno(code)
        return -1

    return fail


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("direct", [False, True])
def test_a_file_below_the_rings_keeps_the_contract(direct: bool, path: Path) -> None:
    """A user sees a disk, whoever runs the requests."""

    async def open_node(opener: Opener) -> BlockDriverState:
        return await opener.open_blockdev(
            {
                "driver": "file", "node-name": "disk", "filename": str(path), "discard": "unmap", "aio": "io_uring",
                "aio-max-batch": 3, "cache": {"direct": direct},
            }
        )  # fmt: skip

    check_driver(open_node, keeps=Keeps.FOREVER, seed=1, real_time=True)


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("direct", [False, True])
def test_small_and_large_requests_and_flushes_need_no_thread(direct: bool, path: Path) -> None:
    """Lengths around the limits of a slot and of a piece, several at a time."""
    content = bytearray(path.read_bytes())
    lengths = [512, LARGEST, LARGEST + 512, PIECE, PIECE + 512, 2 * PIECE + LARGEST]
    lengths += [] if direct else [1, LARGEST + 1, PIECE + 1]

    async def main() -> None:
        async with opened(path, direct=direct) as (bench, node):
            backend = bench.backend(node)
            assert await asyncio.gather(*(backend.read(512, length) for length in lengths)) == [
                content[512 : 512 + length] for length in lengths
            ]
            for n, length in enumerate(lengths):
                data = random.Random(n).randbytes(length)
                content[1024 : 1024 + length] = data
                await backend.write(1024, data)
                await backend.flush()
            assert await backend.read(0, len(content)) == content

    asyncio.run(main())
    assert path.read_bytes() == content


@pytest.mark.parametrize(("limit", "largest"), [(0, DEPTH), (5, 5), (-1, DEPTH)])
def test_requests_of_one_turn_go_to_the_kernel_together(
    limit: int, largest: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests than there are slots: the rest follows as slots become free, no batch is beyond the limit."""
    batches = []
    real = ring.call

    def count(*args: Any) -> int:
        batches.append(args[2].value)
        return real(*args)

    replace_call(monkeypatch, ENTER, count)
    content = bytearray(path.read_bytes())

    async def main() -> None:
        async with opened(path, direct=True, aio_max_batch=limit) as (bench, node):
            backend = bench.backend(node)
            places = range(0, len(content), BLOCK)
            assert await asyncio.gather(*(backend.read(at, BLOCK) for at in places)) == [
                content[at : at + BLOCK] for at in places
            ]
            for at in places:
                content[at : at + BLOCK] = bytes([at // BLOCK % 251]) * BLOCK
            await asyncio.gather(*(backend.write(at, bytes(content[at : at + BLOCK])) for at in places))
            assert sorted(rings_of(node)._free) == list(range(DEPTH))

    asyncio.run(main())
    assert path.read_bytes() == content
    assert sum(batches) == 2 * len(content) // BLOCK
    assert max(batches) == largest


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("direct", [False, True])
def test_the_end_of_the_file_reads_as_zeroes(direct: bool, path: Path) -> None:
    """A file of an odd size: the kernel gives less than was asked for."""
    os.truncate(path, 3 * BLOCK + 100)
    data = path.read_bytes()

    async def main() -> None:
        async with opened(path, direct=direct) as (_, node):
            buffer = memoryview(bytearray(b"x" * (PIECE + BLOCK)))
            await node.driver.read_into(2 * BLOCK, buffer)
            assert buffer == data[2 * BLOCK :] + bytes(len(buffer) - BLOCK - 100)
            await node.driver.read_into(8 * BLOCK, buffer)
            assert buffer == bytes(len(buffer))

    asyncio.run(main())


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_cancelled_request_waits_for_the_kernel(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file must not change after the caller has gone on, however often it is cancelled; the slot stays taken."""
    held: list[Any] = []
    real = ring.call

    def hold(*args: Any) -> int:
        held.append(args)
        return int(args[2].value)

    async def main() -> None:
        async with opened(path, direct=True) as (bench, node):
            rings = rings_of(node)
            with monkeypatch.context() as slow:
                replace_call(slow, ENTER, hold)
                task = asyncio.create_task(bench.backend(node).write(0, b"n" * BLOCK))
                for _ in range(3):
                    await turns()
                    task.cancel()
                await turns()
            assert not task.done()
            assert len(rings._free) == DEPTH - 1
            assert real(*held.pop()) == 1
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(rings._free) == DEPTH

    asyncio.run(main())
    assert path.read_bytes()[:BLOCK] == b"n" * BLOCK


def test_a_drained_file_can_be_closed_under_load(path: Path) -> None:
    """Draining waits for the kernel; every write is in the file."""

    async def main() -> None:
        async with opened(path, direct=True) as (bench, node):
            backend = bench.backend(node)
            tasks = [asyncio.create_task(backend.write(n * BLOCK, bytes([n]) * BLOCK)) for n in range(200)]
            await asyncio.sleep(0)
            async with drained(node):
                assert sorted(rings_of(node)._free) == list(range(DEPTH))
            await asyncio.gather(*tasks)

    asyncio.run(main())
    assert path.read_bytes()[: 200 * BLOCK] == b"".join(bytes([n]) * BLOCK for n in range(200))


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINTR, errno.EBUSY])
def test_what_the_kernel_cannot_take_now_is_handed_over_again(
    code: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once with nothing taken, once with the half: no request is lost or done twice."""
    failures = [fail_with(code), lambda fd, count, *rest: real(ENTER, fd, ctypes.c_uint(count.value // 2), *rest[1:])]
    real = ring.call
    calls = []

    def enter(*args: Any) -> int:
        calls.append(args[2].value)
        return failures.pop(0)(*args[1:]) if failures else real(*args)

    replace_call(monkeypatch, ENTER, enter)
    places = range(0, 10 * BLOCK, BLOCK)
    content = path.read_bytes()

    async def main() -> None:
        async with opened(path, direct=True) as (bench, node):
            backend = bench.backend(node)
            assert await asyncio.gather(*(backend.read(at, BLOCK) for at in places)) == [
                content[at : at + BLOCK] for at in places
            ]

    asyncio.run(main())
    assert calls == [10, 9, 5, 1]


def test_an_error_of_the_kernel_is_the_error_of_the_request(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it refuses the call or the request; the next request is another matter."""

    async def main() -> None:
        async with opened(path, direct=True) as (bench, node):
            backend = bench.backend(node)
            with monkeypatch.context() as broken:
                replace_call(broken, ENTER, fail_with(errno.EIO))
                for request in (backend.read(0, BLOCK), backend.write(0, b"x" * BLOCK), node.driver.flush()):
                    with pytest.raises(BlockIOError) as caught:
                        await request
                    assert caught.value.errno == errno.EIO
            assert await backend.read(0, BLOCK) == path.read_bytes()[:BLOCK]
            with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
                await rings_of(node).read(-1, 0, memoryview(bytearray(BLOCK)))

    asyncio.run(main())


def test_a_reopened_file_keeps_its_rings(path: Path) -> None:
    """Past the page cache and back: what is aligned changes, who runs the requests does not."""
    data = path.read_bytes()

    async def main() -> None:
        async with opened(path) as (bench, node):
            rings = rings_of(node)
            for direct in (True, False):
                node.driver.check_cache(direct=direct)
                await node.driver.prepare_reopen(node.driver.options, read_only=False)
                node.cache_direct = direct
                node.driver.commit_reopen(node.driver.options, read_only=False)
                assert rings_of(node) is rings
                assert (rings.alignment > 1) is direct
                assert (node.driver.limits.request_alignment > 1) is direct
                assert await bench.backend(node).read(1, BLOCK) == data[1 : BLOCK + 1]

    asyncio.run(main())


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.ENOMEM, errno.EMFILE])
def test_where_the_kernel_has_no_rings_the_mode_is_refused(
    code: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's filter of system calls, an old kernel, a limit: it says so, and nothing stays open."""
    replace_call(monkeypatch, SETUP, fail_with(code))

    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(CommandError, match=f"aio=io_uring: {os.strerror(code)}"):
            async with opened(path):
                pass
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(main())


def test_an_old_kernel_or_virtual_time_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can wait for the kernel in virtual time; before Linux 5.6 rings could not read and write like this."""

    async def main() -> None:
        with pytest.raises(CommandError, match="virtual time"):
            async with opened(path):
                pass

    async def old() -> None:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(CommandError, match=r"5\.6"):
            async with opened(path):
                pass
        assert len(os.listdir("/proc/self/fd")) == before

    run(main)
    monkeypatch.setattr(ring, "_CAN_READ", 1 << 31)
    asyncio.run(old())


def test_a_command_line_chooses_the_mode_for_all_files_of_an_image(path: Path) -> None:
    """Backing files and data files as well, also when the image is closed and opened again as it was; options overrule it."""
    options = f"backing_file={path.name},backing_fmt=raw,data_file={path.with_name('data')}"
    assert img_main(["create", "-q", "-f", "qcow2", "-o", options, str(path.with_name("mid")), "3M"]) == 0
    qblock.create(path.with_name("top"), 3 * MiB, backing="mid", backing_fmt="qcow2")
    wanted = ImageArguments(str(path.with_name("top")), flags=NodeFlags(aio="io_uring"), extra={"file.aio": "threads"})

    def modes(graph: Graph) -> dict[str, type]:
        drivers = [node.driver for node in graph.nodes.values()]
        return {Path(d.options.filename).name: type(d._access) for d in drivers if isinstance(d, FileDriver)}

    async def check(session: ImageSession) -> None:
        backend = await session.open(wanted)
        assert backend.root is not None
        expected = {"top": ThreadAccess, "mid": IoUring, "data": IoUring, path.name: IoUring}
        assert modes(session.graph) == expected
        noted = Blueprint.of(backend.root.node, own_nodes(backend.root.node))
        await session.close(backend)
        again = await noted.build(session.opener)
        again.monitor_owned = True
        assert modes(session.graph) == expected
        again.monitor_owned = False

    run_session(check)


def test_no_descriptor_is_left_behind(path: Path) -> None:
    """The rings are given back with the file."""

    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            async with opened(path) as (bench, node):
                await bench.backend(node).read(0, BLOCK)
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(main())
