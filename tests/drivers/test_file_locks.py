"""Image locking: among our own nodes, and against the real programs in both directions."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qblock.drivers.file import FileDriver, FileOptions
from qblock.drivers.file.locks import FileLocks
from qblock.errors import CommandError, ImageLocked
from qblock.node import BlockDriverState
from qblock.permissions import Perm
from qblock.testing.nodes import NodeBench
from qblock.testing.simloop import run
from qblock.transaction import Transaction

READ = Perm.CONSISTENT_READ
READ_WRITE = Perm.CONSISTENT_READ | Perm.WRITE
GUEST_SHARES = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 65536)
    return path


async def file_node(bench: NodeBench, image: Path, locking: Any = "on", **state: Any) -> BlockDriverState:
    options = FileOptions(filename=str(image), locking=locking)
    return await bench.add(FileDriver, options, **state)


def locked_bytes(image: Path) -> set[int]:
    """Bytes of the file on which anybody holds a lock, as the kernel lists them."""
    inode = f":{image.stat().st_ino}"
    lines = Path("/proc/locks").read_text().splitlines()
    found: set[int] = set()
    for line in lines:
        if inode in line and "OFDLCK" in line:
            first, last = line.split()[6:8]  # neighbouring bytes are listed as one range
            found |= set(range(int(first), int(last) + 1))
    return found


def test_each_permission_has_its_byte(image: Path) -> None:
    """Used ones at 100, those not shared at 200, in the order of the bits."""

    async def main() -> None:
        bench = NodeBench()
        node = await file_node(bench, image)
        assert locked_bytes(image) == set()
        backend = bench.backend(node, perm=READ_WRITE, shared=GUEST_SHARES)
        assert locked_bytes(image) == {100, 101, 201, 203}
        backend.set_permissions(READ, Perm.ALL)
        assert locked_bytes(image) == {100}
        await bench.close()
        assert locked_bytes(image) == set()

    run(main)


def test_a_refused_or_undone_change_holds_what_it_held_before(image: Path) -> None:
    """Half-taken locks would keep others out for nothing."""

    async def main() -> None:
        bench = NodeBench()
        first, second = await file_node(bench, image), await file_node(bench, image)
        writer = bench.backend(first, perm=READ_WRITE, shared=GUEST_SHARES)
        held = locked_bytes(image)
        with pytest.raises(ImageLocked) as caught:
            bench.backend(second, perm=READ_WRITE, shared=Perm.ALL)
        assert (caught.value.permission, caught.value.needed) == ("write", True)
        assert "another node of this process" in caught.value.holders
        with pytest.raises(ImageLocked) as caught:
            bench.backend(second, perm=READ, shared=READ)
        assert (caught.value.permission, caught.value.needed) == ("write", False)
        assert locked_bytes(image) == held
        reader = bench.backend(second, perm=READ, shared=Perm.ALL)
        with Transaction() as change:
            reader.set_permissions(READ, Perm.ALL & ~Perm.RESIZE, change)
            assert 203 in locked_bytes(image)
            change.abort()
        writer.set_permissions(READ, Perm.ALL)
        reader.set_permissions(READ_WRITE, Perm.ALL)
        await bench.close()

    run(main)


@pytest.mark.parametrize("state", [{"locking": "off"}, {"force_share": True, "read_only": True}])
def test_without_locking_nobody_is_kept_out(image: Path, state: dict[str, Any]) -> None:
    """``locking=off``, and tools' ``-U``."""

    async def main() -> None:
        bench = NodeBench()
        locked = bench.backend(await file_node(bench, image), perm=READ_WRITE, shared=GUEST_SHARES)
        held = locked_bytes(image)
        bench.backend(await file_node(bench, image, **state), perm=READ, shared=Perm.ALL)
        assert locked_bytes(image) == held and locked.root is not None
        await bench.close()

    run(main)


def test_locking_on_is_refused_where_there_are_no_locks(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto does without."""
    monkeypatch.setattr(FileLocks, "supported", lambda self: False)

    async def main() -> None:
        bench = NodeBench()
        with pytest.raises(CommandError, match="cannot be locked"):
            await file_node(bench, image)
        bench.backend(await file_node(bench, image, locking="auto"), perm=READ_WRITE, shared=GUEST_SHARES)
        assert locked_bytes(image) == set()
        await bench.close()

    run(main)


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    """An image whose format driver does not share writing (a raw one would share everything)."""
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    return path


@contextmanager
def real_program_holding(image: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A real qemu-io that has the image open."""
    process = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", *options, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write("length\n")
        process.stdin.flush()
        while "MiB" not in (line := process.stdout.readline()):
            assert line, "qemu-io did not open the image"
        yield process
    finally:
        process.communicate("quit\n")


@pytest.mark.qemu
def test_the_real_program_keeps_our_writers_out_and_is_named(qcow2: Path) -> None:
    """The refusal tells whom to stop."""

    async def main() -> None:
        bench = NodeBench()
        with real_program_holding(qcow2) as program:
            node = await file_node(bench, qcow2)
            for perm, shared in ((READ_WRITE, Perm.ALL), (READ, GUEST_SHARES)):
                with pytest.raises(ImageLocked) as caught:
                    bench.backend(node, perm=perm, shared=shared)
                assert caught.value.permission == "write"
                assert f"process {program.pid} (qemu-io)" in str(caught.value)
            bench.backend(node, perm=READ, shared=Perm.ALL)
        with real_program_holding(qcow2, "-r"):
            bench.backend(node, perm=READ, shared=GUEST_SHARES)
        bench.backend(await file_node(bench, qcow2), perm=READ, shared=Perm.ALL)
        await bench.close()

    run(main)


@pytest.mark.qemu
def test_our_writer_keeps_the_real_programs_out(qcow2: Path) -> None:
    """qemu-img says which lock it could not get; with -U it reads all the same."""

    def qemu_img(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["qemu-img", *arguments, str(qcow2)], capture_output=True, text=True, check=False)

    def qemu_io(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["qemu-io", "-f", "qcow2", *arguments, "-c", "read 0 512", str(qcow2)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    async def main() -> None:
        bench = NodeBench()
        backend = bench.backend(await file_node(bench, qcow2), perm=READ_WRITE, shared=GUEST_SHARES)
        refused = qemu_img("info")
        assert refused.returncode == 1 and 'shared "write" lock' in refused.stderr
        assert 'Failed to get "write" lock' in qemu_io().stderr
        assert qemu_img("info", "-U").returncode == 0
        backend.set_permissions(READ, GUEST_SHARES)
        assert qemu_img("info").returncode == 0
        assert 'Failed to get "write" lock' in qemu_io().stderr
        assert qemu_io("-r").returncode == 0
        await bench.close()
        assert qemu_io().returncode == 0

    run(main)
