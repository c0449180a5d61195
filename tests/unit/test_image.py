"""The library's synchronous face: images for plain scripts."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qblock
from qblock.image import MapExtent

KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A qcow2 image of 1 MiB with some content."""
    path = tmp_path / "disk.qcow2"
    qblock.create(path, "1M")
    with qblock.open(path, writable=True) as image:
        image.write(64 * KiB, b"hello".ljust(64 * KiB, b"\0"))
        image.write(512 * KiB, bytes([7]) * 64 * KiB)
    return path


def test_what_was_written_is_read_again_after_reopening(disk: Path) -> None:
    """The ten lines of the README."""
    with qblock.open(disk) as image:
        assert image.length == len(image) == MiB
        assert image.read(64 * KiB, 6) == b"hello\0"
        buffer = bytearray(4)
        image.readinto(512 * KiB - 2, buffer)
        assert buffer == b"\0\0\7\7"
        assert repr(image) == f"<Image '{disk}' read-only>"
    assert repr(image) == f"<Image '{disk}' closed>"


def test_map_tells_what_is_stored_in_the_longest_runs(disk: Path) -> None:
    """The same as qemu-img map: neighbours that tell the same story are one run."""
    with qblock.open(disk) as image:
        runs = list(image.map())
        part = list(image.map(64 * KiB, 1))
    assert [(run.start, run.length, run.data) for run in runs] == [
        (0, 64 * KiB, False), (64 * KiB, 64 * KiB, True), (128 * KiB, 384 * KiB, False),
        (512 * KiB, 64 * KiB, True), (576 * KiB, 448 * KiB, False),
    ]  # fmt: skip
    assert runs[1].offset is not None
    assert part == [MapExtent(64 * KiB, 1, 0, True, False, True, False, runs[1].offset)]


def test_info_names_format_sizes_and_backing_file(disk: Path) -> None:
    """Enough to decide what to do with an image."""
    overlay = disk.with_name("top.qcow2")
    qblock.create(overlay, MiB, backing=disk.name, backing_fmt="qcow2", cluster_size=4096)
    with qblock.open(overlay, backing=True) as image:
        info = image.info()
        assert (info.format, info.length, info.cluster_size, info.backing_filename) == ("qcow2", MiB, 4096, disk.name)
        assert info.filename == str(overlay)
        assert info.allocated
        assert image.read(64 * KiB, 5) == b"hello"
        assert {run.depth for run in image.map() if run.data} == {1}


def test_a_backing_file_that_is_merely_mentioned_is_not_opened(disk: Path) -> None:
    """An image from a stranger must not make us open files of our own."""
    overlay = disk.with_name("top.qcow2")
    qblock.create(overlay, MiB, backing=disk.name, backing_fmt="qcow2")
    with pytest.raises(qblock.OpenDenied, match=r"disk\.qcow2"):
        qblock.open(overlay)


def test_zeroes_discards_and_resizes(disk: Path) -> None:
    """The rest of what one does to a disk."""
    with qblock.open(disk, writable=True) as image:
        image.write_zeroes(512 * KiB, 32 * KiB)
        image.discard(544 * KiB, 32 * KiB)
        image.resize(2 * MiB)
        image.flush()
        assert image.read(512 * KiB, 32 * KiB) == bytes(32 * KiB)
        assert image.length == 2 * MiB
        assert image.read(2 * MiB - 1, 1) == b"\0"


def test_a_read_only_image_refuses_writes(disk: Path) -> None:
    """By its own words, before anything below is asked."""
    with qblock.open(disk) as image:
        changes: list[Callable[[], None]] = [
            lambda: image.write(0, b"x"), lambda: image.discard(0, 512), lambda: image.resize(MiB)
        ]  # fmt: skip
        for change in changes:
            with pytest.raises(qblock.BlockIOError) as caught:
                change()
            assert caught.value.errno == errno.EROFS
        image.flush()  # nothing to do, but not wrong


def test_requests_outside_of_the_image_are_refused(disk: Path) -> None:
    """A disk has an end; a file object over it stops there instead."""
    with qblock.open(disk, writable=True) as image:
        with pytest.raises(qblock.BlockIOError):
            image.read(MiB - 1, 2)
        with pytest.raises(qblock.BlockIOError):
            image.write(MiB, b"x")


def test_a_closed_image_says_so(disk: Path) -> None:
    """Using it afterwards is a mistake of the script; closing it again is not."""
    image = qblock.open(disk)
    image.close()
    image.close()
    with pytest.raises(ValueError, match="is closed"):
        image.read(0, 1)


def test_what_cannot_be_opened_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither a loop nor a thread nor a descriptor (warnings are errors in this run)."""
    with pytest.raises((qblock.QBlockError, OSError)):
        qblock.open(tmp_path / "nothing.qcow2")
    (tmp_path / "short.qcow2").write_bytes(b"QFI\xfb")
    with pytest.raises(qblock.QBlockError):
        qblock.open(tmp_path / "short.qcow2", fmt="qcow2")


def test_what_cannot_be_created_leaves_no_file(tmp_path: Path) -> None:
    """A half-made image would look like one."""
    with pytest.raises(qblock.CommandError):
        qblock.create(tmp_path / "bad.qcow2", "1M", cluster_size=1000)
    assert not (tmp_path / "bad.qcow2").exists()
    with pytest.raises(qblock.QBlockError):
        qblock.create(tmp_path / "bad.xyz", "1M", fmt="xyz")


def test_a_file_object_reads_seeks_and_ends_like_a_file(disk: Path) -> None:
    """io.BufferedReader, shutil.copyfileobj, zipfile and the like take it."""
    with qblock.open(disk) as image, image.as_file() as file:
        reader = io.BufferedReader(file)
        reader.seek(64 * KiB)
        assert reader.read(5) == b"hello"
        assert reader.seek(-2, io.SEEK_END) == MiB - 2
        assert reader.read() == b"\0\0"
        assert reader.read() == b""
        assert file.readable()
        assert not file.writable()
        with pytest.raises(ValueError, match="negative"):
            file.seek(-1)


def test_a_file_object_writes_up_to_the_end_of_the_disk(disk: Path) -> None:
    """A disk does not grow by writing; the writer learns it as from a full device."""
    with qblock.open(disk, writable=True) as image:
        with io.BufferedRandom(image.as_file()) as file:
            file.seek(MiB - 3)
            file.write(b"end")
            file.flush()
            file.seek(MiB - 4)
            assert file.read() == b"\0end"
        raw = image.as_file()
        assert raw.seek(MiB - 1) == raw.tell()
        assert raw.write(b"xy") == 1
        with pytest.raises(qblock.BlockIOError) as caught:
            raw.write(b"y")
        assert caught.value.errno == errno.ENOSPC
        assert raw.truncate(2 * MiB) == image.length


def test_raw_images_need_no_ceremony(tmp_path: Path) -> None:
    """Name the format when strangers wrote the content; else it is found."""
    path = tmp_path / "disk.raw"
    qblock.create(path, 1000, fmt="raw")
    assert path.stat().st_size == 1024
    with qblock.open(path, fmt="raw", writable=True) as image:
        image.write(1000, b"x")
    assert path.read_bytes()[1000:1001] == b"x"


def test_importing_qblock_imports_nothing_else() -> None:
    """The public names are found when first used; `import qblock` is for free."""
    code = (
        "import sys, qblock; own = [m for m in sys.modules if m.startswith(('qblock.', 'asyncio', 'attrs'))];"
        "assert not own, own; assert 'open' in dir(qblock); qblock.QBlockError; assert 'qblock.errors' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists() -> None:
    """The list in the package is kept by hand."""
    for name in qblock.__all__:
        assert getattr(qblock, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qblock.nothing


def test_an_encrypted_image_opens_with_its_passphrase_only(tmp_path: Path) -> None:
    """Neither without one nor with another; its content is not to be seen in the file."""
    path = tmp_path / "locked.qcow2"
    qblock.create(path, "1M", passphrase="correct", encrypt={"iter-time": 0})
    with qblock.open(path, writable=True, passphrase="correct") as image:
        image.write(1000, b"nobody else reads this")
    assert b"nobody else" not in path.read_bytes()
    with qblock.open(path, passphrase="correct") as image:
        assert image.read(1000, 22) == b"nobody else reads this"
    for wrong in (None, "Correct"):
        with pytest.raises(qblock.CommandError):
            qblock.open(path, passphrase=wrong)
