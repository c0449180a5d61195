"""The witness of drive-reopen: one byte or none, no waiting, and its descriptor always comes back."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qblock.errors import BlockIOError
from qblock.witness import WITNESS_BYTE, Witness


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def write(witness: Witness) -> None:
    """Write the byte and make it durable as drive-reopen does, from a thread."""

    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            await witness.write(executor)
            await witness.sync(executor)

    asyncio.run(main())


def test_exactly_one_byte_is_written_where_the_descriptor_stands(tmp_path: Path) -> None:
    """Management may keep notes of its own in the file."""

    (tmp_path / "w").write_bytes(b"switching to the copy:")
    before = open_descriptors()
    with Witness(os.open(tmp_path / "w", os.O_WRONLY | os.O_APPEND), "w") as witness:
        write(witness)
        assert (tmp_path / "w").read_bytes() == b"switching to the copy:" + WITNESS_BYTE
    assert open_descriptors() == before
    assert (tmp_path / "w").stat().st_size == 23
    assert len(WITNESS_BYTE) == 1
    assert WITNESS_BYTE != b"\0"


def full_pipe(path: Path, ends: list[int]) -> int:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 65536):
            pass
    os.set_blocking(writer, True)
    ends.append(reader)
    return writer


def closed_pipe(path: Path, ends: list[int]) -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_socket(path: Path, ends: list[int]) -> int:
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def read_only(path: Path, ends: list[int]) -> int:
    (path / "w").touch()
    return os.open(path / "w", os.O_RDONLY)


UNWRITABLE: dict[str, tuple[Callable[[Path, list[int]], int], int]] = {
    "a pipe that nobody empties": (full_pipe, errno.EAGAIN),
    "a pipe that nobody reads": (closed_pipe, errno.EPIPE),
    "a socket that nobody reads": (closed_socket, errno.EPIPE),
    "a file open for reading": (read_only, errno.EBADF),
    "a directory": (lambda path, ends: os.open(path, os.O_RDONLY | os.O_DIRECTORY), errno.EBADF),
    "a full disk": (lambda path, ends: os.open("/dev/full", os.O_WRONLY), errno.ENOSPC),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("action", [signal.SIG_IGN, signal.SIG_DFL], ids=["ignoring SIGPIPE", "dying of SIGPIPE"])
def test_what_cannot_be_written_is_reported_without_waiting(kind: str, action: signal.Handlers, tmp_path: Path) -> None:
    """A drive waits for its witness: neither a full pipe nor a signal may hold up or end the machine."""
    make, expected = UNWRITABLE[kind]
    before_action = signal.signal(signal.SIGPIPE, action)
    try:
        before = open_descriptors()
        ends: list[int] = []
        with (
            Witness(make(tmp_path, ends), "gone") as gone,
            pytest.raises(BlockIOError, match="witness 'gone'") as caught,
        ):
            write(gone)
        for end in ends:
            os.close(end)
        assert caught.value.errno == expected
        assert open_descriptors() == before
        assert signal.SIGPIPE not in signal.sigpending()
        assert signal.SIGPIPE not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGPIPE, before_action)


def test_the_byte_is_made_durable_after_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only in the page cache does not outlive the host."""
    synced: list[bytes] = []
    monkeypatch.setattr("os.fdatasync", lambda fd: synced.append((tmp_path / "witness").read_bytes()))
    with Witness(os.open(tmp_path / "witness", os.O_WRONLY | os.O_CREAT)) as witness:
        write(witness)
    assert synced == [WITNESS_BYTE]


def test_a_pipe_gets_its_byte_though_nothing_of_it_can_be_durable() -> None:
    """The result of fdatasync is ignored, as it was proposed."""

    reader, writer = os.pipe()
    with Witness(writer) as witness:
        write(witness)
    assert os.read(reader, 10) == WITNESS_BYTE
    assert os.read(reader, 10) == b""
    os.close(reader)


def test_who_is_cancelled_keeps_the_descriptor_until_the_thread_is_done(tmp_path: Path) -> None:
    """Else the thread would write into whatever file gets the same number next."""
    hold = threading.Event()

    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(hold.wait)
            with Witness(os.open(tmp_path / "w", os.O_WRONLY | os.O_CREAT)) as witness:
                task = asyncio.create_task(witness.write(executor))
                for _ in range(3):
                    await asyncio.sleep(0)
                    task.cancel()
                assert not task.done()
                hold.set()
                await asyncio.wait({task})
                assert task.cancelled()
        assert (tmp_path / "w").read_bytes() == WITNESS_BYTE

    asyncio.run(main())


def test_a_witness_that_nobody_holds_any_more_is_closed(tmp_path: Path) -> None:
    """For a command that is cancelled before it got its first turn."""
    before = open_descriptors()
    witness = Witness(os.open(tmp_path / "w", os.O_WRONLY | os.O_CREAT))
    assert open_descriptors() == before + 1
    del witness
    assert open_descriptors() == before
