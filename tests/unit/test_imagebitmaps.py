"""Persistent bitmaps of an image, for plain scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

import qblock
from qblock.errors import BlockIOError, CommandError

KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A qcow2 image of 8 MiB with a bitmap that has seen one write."""
    path = tmp_path / "disk.qcow2"
    qblock.create(path, 8 * MiB)
    with qblock.open(path, writable=True) as image:
        image.write(0, b"before")
        image.bitmaps.add("since", granularity=4096)
        image.write(MiB + 10, b"after" * 1000)
    return path


def test_an_incremental_backup_is_a_loop_over_what_is_dirty(disk: Path, tmp_path: Path) -> None:
    """The reason for bitmaps: only what changed is read and copied, then the record begins anew."""
    with qblock.open(disk, writable=True) as image:
        bitmap = image.bitmaps["since"]
        assert [(run.offset, run.length) for run in bitmap.dirty()] == [(MiB, 8 * KiB)]
        assert [run.length for run in bitmap.dirty(max_length=4096)] == [4096, 4096]
        assert bitmap.count == 8 * KiB
        bitmap.clear()
        image.write(5 * MiB, b"next")
    with qblock.open(disk) as image:
        assert [run.offset for run in image.bitmaps["since"].dirty()] == [5 * MiB]
        assert image.check().leaks == 0


def test_bitmaps_are_a_mapping_in_the_order_in_which_they_were_made(disk: Path) -> None:
    """Names, then values; what is not there is a KeyError, and no bitmap of a job is shown."""
    with qblock.open(disk, writable=True) as image:
        image.bitmaps.add("other", enabled=False)
        assert list(image.bitmaps) == ["since", "other"] and len(image.bitmaps) == 2
        assert repr(image.bitmaps["other"]) == "<ImageBitmap 'other' disabled 0 bytes dirty, granularity 65536>"
        image.bitmaps["other"].merge(image.bitmaps["since"])
        assert image.bitmaps["other"].count == 64 * KiB
        image.bitmaps["since"].disable()
        image.write(2 * MiB, b"unseen")
        image.bitmaps["since"].enable()
        with pytest.raises(CommandError, match="already"):
            image.bitmaps.add("other")
        with pytest.raises(KeyError):
            image.bitmaps["none"]
    with qblock.open(disk, writable=True) as image:
        assert image.bitmaps["since"].recording and image.bitmaps["since"].count == 8 * KiB
        image.bitmaps.remove("other")
        assert list(image.bitmaps) == ["since"]
    with qblock.open(disk) as image:
        assert list(image.bitmaps) == ["since"]
        assert image.check().leaks == 0


def test_bitmaps_of_an_image_that_is_only_read_stay_as_they_are(disk: Path) -> None:
    """A change that nobody would store is refused, instead of being lost at the end."""
    with qblock.open(disk) as image:
        bitmap = image.bitmaps["since"]
        for change in (bitmap.clear, bitmap.disable, bitmap.enable):
            with pytest.raises(CommandError, match="read-only"):
                change()
        with pytest.raises(BlockIOError):
            image.bitmaps.add("more")
        with pytest.raises(BlockIOError):
            image.bitmaps.remove("since")
        assert bitmap.count == 8 * KiB


def test_an_inconsistent_bitmap_says_nothing_and_can_be_removed(disk: Path) -> None:
    """A copy of the file while it is open for writing is what a crash would leave."""
    copy = disk.with_name("crashed.qcow2")
    with qblock.open(disk, writable=True) as image:
        image.write(0, b"x")
        image.flush()
        copy.write_bytes(disk.read_bytes())
    with qblock.open(copy, writable=True) as image:
        bitmap = image.bitmaps["since"]
        assert bitmap.inconsistent and "inconsistent" in repr(bitmap)
        for use in (bitmap.dirty, bitmap.clear, bitmap.enable):
            with pytest.raises(CommandError, match="removed"):
                use()
        image.bitmaps.remove("since")
        assert not image.bitmaps.add("since").inconsistent
    with qblock.open(copy) as image:
        assert image.bitmaps["since"].count == 0


def test_raw_images_have_no_bitmaps(tmp_path: Path) -> None:
    """The mapping is empty, and adding says why it cannot be."""
    path = tmp_path / "disk.raw"
    qblock.create(path, MiB, fmt="raw")
    with qblock.open(path, writable=True, fmt="raw") as image:
        assert not image.bitmaps
        with pytest.raises(CommandError, match="raw"):
            image.bitmaps.add("a")
