"""The file driver on real files: data, holes, sizes, errors, reopen and creation."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qblock.clock import RealClock
from qblock.driver import CreateTarget
from qblock.drivers.file import FileCreateOptions, FileDriver, FileOptions, space
from qblock.environment import Environment
from qblock.errors import BlockIOError, CommandError, ImageLocked, InvalidParameter
from qblock.extents import Data, Zero
from qblock.node import BlockDriverState
from qblock.permissions import Perm
from qblock.requests import block_status, flush, write_zeroes
from qblock.testing.nodes import NodeBench
from qblock.testing.simloop import run
from qblock.units import KiB, MiB

READ_WRITE = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE


@asynccontextmanager
async def opened(
    path: Path, options: FileOptions | None = None, **state: Any
) -> AsyncIterator[tuple[NodeBench, BlockDriverState]]:
    bench = NodeBench()
    node = await bench.add(FileDriver, options or FileOptions(filename=str(path)), **state)
    try:
        yield bench, node
    finally:
        await bench.close()


def file_of(node: BlockDriverState) -> FileDriver:
    assert isinstance(node.driver, FileDriver)
    return node.driver


def o_direct_works(folder: Path) -> bool:
    try:
        fd = os.open(folder / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError:
        return False
    os.close(fd)
    return True


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("size", [1, 4 * KiB, 256 * KiB, 257 * KiB, MiB, 3 * MiB + 5])
def test_what_is_written_is_in_the_file_and_is_read_back(tmp_path: Path, size: int, threads: bool) -> None:
    """Small requests run on the loop's thread, large ones in the executor; nobody sees a difference."""
    path = tmp_path / "disk"
    path.touch()
    data = random.Random(size).randbytes(size)

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            await backend.truncate(4 * MiB)
            await backend.write(777, data)
            await backend.flush()
            assert await backend.read(777, size) == data
            assert await backend.read(0, 777) == bytes(777)

    asyncio.run(main()) if threads else run(main)
    assert path.read_bytes()[777 : 777 + size] == data


def test_a_size_between_sectors_is_rounded_up_and_reads_as_zeroes(tmp_path: Path) -> None:
    """The last sector of a file of 700 bytes exists, and the file stays as it is."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 700)

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            assert backend.length == 1024
            with pytest.raises(StopIteration):  # not even the end of the file costs a thread
                backend.read(512, 512).send(None)
            assert await backend.read(512, 512) == b"x" * 188 + bytes(324)
            assert path.stat().st_size == 700

    run(main)


def test_short_reads_and_writes_of_the_kernel_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call may do less than it was asked (signals, a nearly full disk)."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(64 * KiB))
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset, flags=0: preadv(fd, [views[0][:1000]], offset, flags))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:999], offset))
    data = random.Random(0).randbytes(9 * KiB)

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            await backend.write(100, data)
            assert await backend.read(100, len(data)) == data

    run(main)


def test_data_that_are_not_cached_are_read_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RWF_NOWAIT says EAGAIN where the disk would have to be asked, and some file systems do not know it at all."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 4096)
    preadv = os.preadv
    answers = [errno.EAGAIN, errno.EOPNOTSUPP]
    asked = []

    def answer(fd: int, views: Any, offset: int, flags: int = 0) -> int:
        asked.append(flags)
        if flags and answers:
            code = answers.pop(0)
            raise OSError(code, os.strerror(code))
        return preadv(fd, views, offset, flags)

    monkeypatch.setattr(os, "preadv", answer)

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            for _ in range(3):
                assert await backend.read(0, 4096) == b"x" * 4096

    run(main)
    assert asked == [os.RWF_NOWAIT, 0, os.RWF_NOWAIT, 0, 0]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_errors_of_the_system_keep_their_errno(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Error policies tell a full disk from a broken one."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            for name in ("preadv", "pwrite", "fdatasync"):
                monkeypatch.setattr(os, name, fail)
            for request in (
                backend.read(0, 512),
                backend.write(0, b"x"),
                backend.write(0, bytes(4096)),
                backend.flush(),
            ):
                with pytest.raises(BlockIOError) as caught:
                    await request
                assert caught.value.errno == code and str(path) in str(caught.value)
            monkeypatch.undo()
            await backend.write(0, b"x")

    run(main)


def test_a_full_file_system_is_enospc(tmp_path: Path) -> None:
    """/dev/full cannot be a disk image, so the limit of the process stands in for the device."""
    import resource

    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            await backend.truncate(MiB)
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, old[1]))
            try:
                with pytest.raises(BlockIOError) as caught:
                    await backend.write(65536, b"x" * 4096)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, old)
            assert caught.value.errno == errno.EFBIG

    run(main)


def test_a_failed_flush_is_remembered_until_reopen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel forgets the pages that it could not write, so a second fdatasync would lie."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "no")

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            await backend.write(0, b"x")
            with monkeypatch.context() as patch:
                patch.setattr(os, "fdatasync", fail)
                with pytest.raises(BlockIOError):
                    await flush(node)
            with pytest.raises(BlockIOError) as caught:
                await flush(node)
            assert caught.value.errno == errno.EIO and "reopen" in str(caught.value)
            driver = file_of(node)
            await driver.prepare_reopen(driver.options, read_only=False)
            driver.commit_reopen(driver.options, read_only=False)
            await flush(node)

    run(main)


def test_holes_are_zero_and_data_are_data(tmp_path: Path) -> None:
    """SEEK_HOLE and SEEK_DATA find what the file system left out."""
    path = tmp_path / "disk"
    with path.open("wb") as stream:
        stream.truncate(MiB)
        stream.seek(256 * KiB)
        stream.write(b"x" * 128 * KiB)

    async def main() -> None:
        async with opened(path) as (_, node):
            assert await block_status(node, 0, MiB) == Zero(256 * KiB, 0)
            assert await block_status(node, 257 * KiB, MiB) == Data(127 * KiB, 257 * KiB)
            assert await block_status(node, 384 * KiB, MiB) == Zero(640 * KiB, 384 * KiB)
            assert await block_status(node, 0, MiB, want_zero=False) == Data(MiB, 0)

    run(main)


def test_status_where_holes_cannot_be_told_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old file systems answer EINVAL."""

    def fail(*_: object) -> int:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "lseek", fail)
    assert space.find_extent(3, 512, 1024) == Data(1024, 512)


def test_zero_writes_keep_space_and_unmapping_gives_it_back(tmp_path: Path) -> None:
    """Without may_unmap the range stays allocated; with it the blocks return to the file system."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 4 * MiB)

    async def main() -> None:
        async with opened(path, discard_unmap=True) as (bench, node):
            backend = bench.backend(node)
            before = file_of(node).allocated_size() or 0
            await backend.write_zeroes(0, 2 * MiB)
            assert (file_of(node).allocated_size() or 0) >= before - 64 * KiB
            await backend.write_zeroes(2 * MiB, 1 * MiB, may_unmap=True)
            assert (file_of(node).allocated_size() or 0) <= before - MiB + 64 * KiB
            await backend.discard(3 * MiB, MiB)
            assert await block_status(node, 2 * MiB, 2 * MiB) == Zero(2 * MiB, 2 * MiB)
            assert await backend.read(0, 4 * MiB) == bytes(4 * MiB)
            assert file_of(node).statistics() == {
                "driver": "file", "discard-nb-ok": 1, "discard-nb-failed": 0, "discard-bytes-ok": MiB
            }  # fmt: skip

    run(main)
    assert path.stat().st_size == 4 * MiB


@pytest.mark.parametrize("may_unmap", [False, True])
def test_zero_writes_behind_the_end_grow_the_file(tmp_path: Path, may_unmap: bool) -> None:
    """Format drivers preallocate that way."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 4096)

    async def main() -> None:
        async with opened(path, discard_unmap=True) as (bench, node):
            edge = bench.backend(node).root
            assert edge is not None
            await write_zeroes(edge, 2048, 8192, may_unmap=may_unmap)
            assert node.length == 10240

    run(main)
    assert path.read_bytes() == b"x" * 2048 + bytes(8192)


def test_a_file_system_without_fallocate_gets_zeroes_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver says ENOTSUP and the border writes buffers."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 8192)

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(space, "_change_space", refuse)

    async def main() -> None:
        async with opened(path, discard_unmap=True) as (bench, node):
            backend = bench.backend(node)
            await backend.write_zeroes(100, 5000, may_unmap=True)
            with pytest.raises(BlockIOError) as caught:
                await backend.write_zeroes(0, 512, no_fallback=True)
            assert caught.value.errno == errno.ENOTSUP
            await backend.discard(0, 4096)
            assert file_of(node).statistics()["discard-nb-failed"] == 1

    run(main)
    assert path.read_bytes() == b"x" * 100 + bytes(5000) + b"x" * 3092


@pytest.mark.parametrize(("preallocation", "allocated"), [("off", 0), ("falloc", MiB), ("full", MiB)])
def test_truncate_reserves_what_was_asked_for(tmp_path: Path, preallocation: str, allocated: int) -> None:
    """off makes a hole, falloc reserves, full writes."""
    path = tmp_path / "disk"
    path.touch()

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            await backend.truncate(MiB, preallocation=preallocation)
            assert backend.length == MiB and (file_of(node).allocated_size() or 0) >= allocated
            await backend.truncate(512)
            assert backend.length == 512
            for mode, size in (("metadata", MiB), ("falloc", 0)):
                with pytest.raises(BlockIOError) as caught:
                    await backend.truncate(size, preallocation=mode)
                assert caught.value.errno == errno.ENOTSUP

    run(main)
    assert path.stat().st_size == 512


def test_a_failed_preallocation_gives_the_old_size_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC half-way must not leave a longer disk."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    written = []

    def fill(fd: int, offset: int, buffer: memoryview) -> None:
        written.append(offset)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "full")
        os.ftruncate(fd, offset + len(buffer))

    monkeypatch.setattr(space, "write_fully", fill)

    async def main() -> None:
        async with opened(path) as (bench, node):
            backend = bench.backend(node)
            with pytest.raises(BlockIOError) as caught:
                await backend.truncate(8 * MiB, preallocation="full")
            assert caught.value.errno == errno.ENOSPC and backend.length == 4096

    run(main)
    assert path.stat().st_size == 4096


def test_copy_range_moves_data_between_files(tmp_path: Path) -> None:
    """Inside the kernel, at any offsets; behind the end of the source it is the caller's turn."""
    source, target = tmp_path / "source", tmp_path / "target"
    data = random.Random(1).randbytes(300 * KiB)
    source.write_bytes(data)
    target.touch()

    async def main() -> None:
        bench = NodeBench()
        nodes = [await bench.add(FileDriver, FileOptions(filename=str(path))) for path in (source, target)]
        one, two = (bench.backend(node) for node in nodes)
        await two.truncate(MiB)
        await one.copy_range(1000, two, 5000, 200 * KiB)
        await two.flush()
        assert await two.read(5000, 200 * KiB) == data[1000 : 1000 + 200 * KiB]
        assert two.node.write_generation > 0
        await bench.close()

    run(main)


@pytest.mark.parametrize(
    ("name", "code"),
    [("missing", errno.ENOENT), ("folder", errno.EISDIR), ("fifo", errno.EINVAL), ("a\0b", errno.EINVAL)],
)
def test_what_cannot_be_opened_is_told_at_once(tmp_path: Path, name: str, code: int) -> None:
    """Opening never waits for a FIFO's other end, and never creates."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")

    async def main() -> None:
        for read_only in (False, True):
            with pytest.raises(BlockIOError) as caught:
                await NodeBench().add(FileDriver, FileOptions(filename=f"{tmp_path}/{name}"), read_only=read_only)
            assert caught.value.errno == code

    run(main)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"pr_manager": "pr"},
    ],
)
def test_what_is_not_offered_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    """An option is honoured or refused, never ignored."""
    path = tmp_path / "disk"
    path.touch()

    async def main() -> None:
        with pytest.raises(InvalidParameter) as caught:
            await NodeBench().add(FileDriver, FileOptions(filename=str(path), **changes))
        assert caught.value.name.replace("-", "_") in changes

    run(main)


def test_auto_read_only_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be opened for writing becomes a read-only node, unless writing was insisted on."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    real_open = os.open

    def refuse_writing(name: str, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "no")
        return real_open(name, flags, mode, **more)

    monkeypatch.setattr(os, "open", refuse_writing)

    async def main() -> None:
        async with opened(path, auto_read_only=True) as (_, node):
            assert node.read_only
        with pytest.raises(BlockIOError) as caught:
            await NodeBench().add(FileDriver, FileOptions(filename=str(path)))
        assert caught.value.errno == errno.EACCES

    run(main)


def test_reopen_switches_between_reading_and_writing(tmp_path: Path) -> None:
    """The descriptor is a new one, the locks stay, and calling it off changes nothing."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))

    async def main() -> None:
        async with opened(path, read_only=True) as (bench, node):
            driver = file_of(node)
            await driver.prepare_reopen(driver.options, read_only=False)
            driver.abort_reopen()
            await driver.prepare_reopen(driver.options, read_only=False)
            driver.commit_reopen(driver.options, read_only=False)
            node.read_only = False
            backend = bench.backend(node)
            await backend.write(0, b"x")
            driver.check_reopen(FileOptions(filename=str(path), drop_cache=False), read_only=False)
            with pytest.raises(CommandError, match="filename"):
                driver.check_reopen(FileOptions(filename="other"), read_only=False)
            path.rename(tmp_path / "moved")
            path.touch()
            with pytest.raises(BlockIOError) as caught:
                await driver.prepare_reopen(driver.options, read_only=True)
            assert caught.value.errno == errno.ESTALE

    run(main)


def test_direct_access_is_aligned_whatever_is_asked(tmp_path: Path) -> None:
    """cache.direct=on: the page cache is not used, and odd requests still work."""
    if not o_direct_works(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    path = tmp_path / "disk"
    model = bytearray(random.Random(2).randbytes(3 * MiB))
    path.write_bytes(model)
    rng = random.Random(3)

    async def main() -> None:
        async with opened(path, cache_direct=True) as (bench, node):
            assert node.driver.limits.request_alignment in (512, 4096)
            backend = bench.backend(node)
            for _ in range(30):
                offset = rng.randrange(len(model))
                length = min(rng.choice([1, 511, 4096, 70000, 2 * MiB]), len(model) - offset)
                data = rng.randbytes(length)
                model[offset : offset + length] = data
                await backend.write(offset, data)
                assert await backend.read(offset, length) == data
            await backend.flush()
            assert await backend.read(0, len(model)) == model

    asyncio.run(main())
    assert path.read_bytes() == model


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_a_new_file_grows_to_any_size_past_the_page_cache(tmp_path: Path, preallocation: str) -> None:
    """Management software that uses cache=none creates its images so: the size of an image need not be aligned."""
    if not o_direct_works(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    path = tmp_path / "disk"
    path.touch()

    async def main() -> None:
        async with opened(path, cache_direct=True) as (_, node):
            await node.driver.truncate(196616, preallocation=preallocation)

    asyncio.run(main())
    assert path.read_bytes() == bytes(196616)


def test_direct_access_to_a_file_of_odd_size(tmp_path: Path) -> None:
    """The tail is read with zeroes; a writer that may not resize is refused, since whole blocks would grow the file."""
    if not o_direct_works(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 700)

    async def main() -> None:
        async with opened(path, cache_direct=True) as (bench, node):
            assert await bench.backend(node, perm=Perm.CONSISTENT_READ).read(0, 1024) == b"x" * 700 + bytes(324)
            with pytest.raises(CommandError, match="growing"):
                bench.backend(node, perm=Perm.CONSISTENT_READ | Perm.WRITE)

    run(main)


def test_a_cancelled_request_ends_only_when_the_thread_has_let_go(tmp_path: Path) -> None:
    """Otherwise a thread could still write to a descriptor that is closed, or to a buffer that is used again."""
    import threading

    path = tmp_path / "disk"
    path.touch()
    started, proceed = threading.Event(), threading.Event()
    order = []

    def work() -> None:
        started.set()
        proceed.wait()
        order.append("thread")

    async def main() -> None:
        async with opened(path) as (_, node):
            task = asyncio.ensure_future(file_of(node)._run(work))
            await asyncio.get_running_loop().run_in_executor(None, started.wait)
            task.cancel()
            await asyncio.sleep(0)
            proceed.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            order.append("caller")

    asyncio.run(main())
    assert order == ["thread", "caller"]


class Context:
    """A `CreateContext` that opens nothing."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.env = Environment(
            clock=RealClock(),
            executor=ThreadPoolExecutor(1),
            random=random.Random(0),
            emit=lambda *_: None,
            warn=self.warnings.append,
        )

    async def open_reference(self, ref: Any) -> CreateTarget:
        raise AssertionError(ref)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_create_makes_an_empty_file_of_the_size(tmp_path: Path, existing: bool, preallocation: Any) -> None:
    """What was in an existing file is gone."""
    path = tmp_path / "new"
    if existing:
        path.write_bytes(b"x" * 10000)
    run(
        lambda: FileDriver.create(
            FileCreateOptions(filename=str(path), size=8192, preallocation=preallocation), Context()
        )
    )
    assert path.read_bytes() == bytes(8192)


def test_hints_that_the_file_system_does_not_take_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are hints: the file is made all the same."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTTY, "no")

    monkeypatch.setattr("fcntl.ioctl", refuse)
    context = Context()
    options = FileCreateOptions(filename=str(tmp_path / "new"), size=1024, nocow=True, extent_size_hint=MiB)
    run(lambda: FileDriver.create(options, context))
    assert len(context.warnings) == 2 and (tmp_path / "new").stat().st_size == 1024


@pytest.mark.parametrize(("options", "error"), [
    (FileCreateOptions(filename="new", size=1, preallocation="metadata"), InvalidParameter),
    (FileCreateOptions(filename="new", size=-1), InvalidParameter),
    (FileCreateOptions(filename="no/where", size=1), BlockIOError),
    (FileCreateOptions(filename="new", size=1 << 62), BlockIOError),
])  # fmt: skip
def test_a_failed_create_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, error: type[Exception]
) -> None:
    """Nothing is left to be mistaken for an image."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        run(lambda: FileDriver.create(options, Context()))
    assert list(tmp_path.iterdir()) == []


def test_create_does_not_destroy_an_image_in_use(tmp_path: Path) -> None:
    """Whoever has it open keeps it, content and all."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 4096)

    async def main() -> None:
        async with opened(path) as (bench, node):
            bench.backend(node, perm=READ_WRITE, shared=Perm.CONSISTENT_READ)
            with pytest.raises(ImageLocked):
                await FileDriver.create(FileCreateOptions(filename=str(path), size=0), Context())

    run(main)
    assert path.read_bytes() == b"x" * 4096
