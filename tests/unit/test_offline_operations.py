"""`qblock.resize`, `rebase` and `commit` for plain scripts: results, progress, refusals, and disks that fail half-way."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qblock
from qblock.committing import Committed
from qblock.drivers.file.driver import FileDriver
from qblock.errors import BlockIOError, CommandError, ImageError, QBlockError
from qblock.rebasing import Rebased, differing_runs
from qblock.resizing import Resized, ShrinkRefused
from qblock.testing.images import make_image
from qblock.units import KiB, MiB


class Steps:
    """A progress callback that remembers, and looks whether what it hears makes sense."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        assert 0 <= done <= total
        assert not self.heard or self.heard[-1] <= (done, total) or self.heard[-1][1] != total
        self.heard.append((done, total))


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """``base``, ``middle`` and ``top`` of different sizes, and ``other``."""
    make_image(tmp_path / "base", MiB, {0: b"b" * MiB})
    make_image(tmp_path / "middle", 2 * MiB, {"256k": b"m" * 256 * KiB}, backing=tmp_path / "base")
    make_image(tmp_path / "top", 3 * MiB, {"448k": b"t" * 128 * KiB, "2500k": b"t" * KiB}, backing=tmp_path / "middle")
    make_image(tmp_path / "other", 2 * MiB, {"0": b"b" * 320 * KiB, "1M": b"o" * MiB})
    return tmp_path


def content(image: Path) -> bytes:
    with qblock.open(image, backing=True) as disk:
        return disk.read(0, disk.length)


def backing_of(image: Path) -> str | None:
    with qblock.open(image, backing=True) as disk:
        return disk.info().backing_filename


# -------------------------------------------------------------------------------------------------------------- resize


def test_resize_takes_sizes_and_steps(tmp_path: Path) -> None:
    """Bytes, texts, and changes of the present size."""
    image = make_image(tmp_path / "a", MiB, {0: b"x" * KiB})
    assert qblock.resize(image, "2M") == Resized(MiB, 2 * MiB)
    assert qblock.resize(image, "+1M", preallocation="metadata") == Resized(2 * MiB, 3 * MiB)
    assert qblock.resize(image, "-2M", shrink=True) == Resized(3 * MiB, MiB)
    assert qblock.resize(image, 512, shrink=True) == Resized(MiB, 512)
    assert content(image) == b"x" * 512


@pytest.mark.parametrize("size", ["0", "-3M", "x", "+", "", "8E"])
def test_resize_refuses_sizes_that_are_none(size: str, tmp_path: Path) -> None:
    """And leaves the image as it was."""
    image = make_image(tmp_path / "a", MiB)
    with pytest.raises(CommandError, match=r"size|preallocation"):
        qblock.resize(image, size, shrink=True)
    with pytest.raises(ShrinkRefused, match="1048576"):
        qblock.resize(image, "512k")
    with pytest.raises(CommandError, match="preallocation"):
        qblock.resize(image, MiB, preallocation="full")
    assert len(content(image)) == MiB


def test_an_overlay_is_resized_only_by_who_trusts_its_backing_file(chain: Path) -> None:
    """As `qblock.open` does: what an image mentions is opened when asked for."""
    with pytest.raises(qblock.OpenDenied):
        qblock.resize(chain / "top", "4M")
    assert qblock.resize(chain / "top", "4M", backing=True).length == 4 * MiB


# -------------------------------------------------------------------------------------------------------------- commit


def test_commit_moves_everything_down_and_empties_the_image(chain: Path) -> None:
    """The base grows, data and zeroes are told apart, and the image is small afterwards."""
    with qblock.open(chain / "top", writable=True, backing=True) as disk:
        disk.write_zeroes(128 * KiB, 64 * KiB)
    before, steps = content(chain / "top"), Steps()
    result = qblock.commit(chain / "top", progress=steps)
    assert result == Committed(str(chain / "middle"), 192 * KiB, 64 * KiB, MiB, True)
    assert steps.heard[0] == (0, 3 * MiB)
    assert steps.heard[-1] == (3 * MiB, 3 * MiB)
    assert content(chain / "top") == before == content(chain / "middle")
    assert os.path.getsize(chain / "top") <= 4 * 65536


def test_commit_into_a_lower_base_keeps_the_image(chain: Path) -> None:
    """With a base nothing is emptied unless asked for."""
    before, size = content(chain / "top"), os.path.getsize(chain / "top")
    result = qblock.commit(chain / "top", base=chain / "base")
    assert (result.base, result.emptied, result.grown) == (str(chain / "base"), False, 2 * MiB)
    assert os.path.getsize(chain / "top") == size
    assert content(chain / "base") == before == content(chain / "top")


def test_commit_keeps_to_its_speed(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps as long as the limit asks for."""
    slept = 0

    async def sleep_ns(self: qblock.RealClock, ns: int) -> None:
        nonlocal slept
        slept += ns

    monkeypatch.setattr(qblock.RealClock, "sleep_ns", sleep_ns)
    qblock.commit(chain / "top", speed=1000)
    assert slept > 100_000_000_000


def test_commit_refuses_what_it_cannot_do(chain: Path) -> None:
    """No backing file, and bases that are none."""
    for image, base in (("base", None), ("top", "other"), ("top", "top"), ("top", "gone")):
        with pytest.raises(CommandError, match="back"):
            qblock.commit(chain / image, base=base)


# -------------------------------------------------------------------------------------------------------------- rebase


@pytest.mark.parametrize("backing", ["base", "middle", "other", None])
def test_rebase_leaves_what_is_seen(backing: str | None, chain: Path) -> None:
    """Down the chain, in place, onto another image, onto none."""
    before, steps = content(chain / "top"), Steps()
    result = qblock.rebase(chain / "top", backing, "qcow2" if backing else None, progress=steps)
    assert result.backing == backing == backing_of(chain / "top")
    assert content(chain / "top") == before
    # Of 3 MiB, what differs below the 192 KiB that the image holds itself.
    assert (
        result
        == {
            "base": Rebased("base", 192 * KiB, 0),
            "middle": Rebased("middle", 0, 0),
            "other": Rebased("other", MiB - 128 * KiB - 256 * KiB, MiB),
            None: Rebased(None, MiB - 128 * KiB, 0),
        }[backing]
    )
    assert steps.heard[-1] == (3 * MiB, 3 * MiB) or steps.heard[-1] == (1, 1)


def test_unsafe_rebase_opens_nothing_but_the_image(chain: Path) -> None:
    """It mends a link whose file has moved."""
    before = content(chain / "top")
    (chain / "middle").rename(chain / "moved")
    with pytest.raises(QBlockError, match="middle"):
        qblock.rebase(chain / "top", "moved", "qcow2")
    assert qblock.rebase(chain / "top", "moved", "qcow2", unsafe=True) == Rebased("moved", 0, 0)
    assert content(chain / "top") == before
    qblock.rebase(chain / "top", None, unsafe=True)
    assert backing_of(chain / "top") is None


def test_rebase_refuses_what_it_cannot_do(chain: Path, tmp_path: Path) -> None:
    """Before anything is copied: the image is the same to the byte."""
    before = (chain / "top").read_bytes()
    for backing, fmt in (("other", None), ("other", "nonsense"), ("gone", "qcow2"), ("top", "qcow2")):
        with pytest.raises(QBlockError):
            qblock.rebase(chain / "top", backing, fmt)
    make_image(tmp_path / "above", MiB, backing=chain / "top")
    with pytest.raises(QBlockError):
        qblock.rebase(chain / "top", "above", "qcow2")
    assert (chain / "top").read_bytes() == before
    (tmp_path / "plain").write_bytes(bytes(512))
    with pytest.raises(CommandError, match="raw"):
        qblock.rebase(tmp_path / "plain", None, fmt="raw")


@given(
    old=st.binary(min_size=1, max_size=60).map(bytearray),
    changes=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 2)), max_size=6),
    unit=st.integers(1, 20),
    skew=st.integers(0, 19),
    empty=st.booleans(),
)
def test_differing_runs_are_whole_units_with_all_that_differs(
    old: bytearray, changes: list[tuple[int, int]], unit: int, skew: int, empty: bool
) -> None:
    """Every difference is in a run, every unit of a run has one, and runs do not touch."""
    skew %= unit
    new = bytearray(old) if not empty else bytearray(len(old))
    for place, value in changes:
        new[place % len(new)] = value
    if empty:
        new = bytearray(len(old))
    runs = list(differing_runs(old, None if empty else new, len(old), unit=unit, skew=skew))
    inside = {place for start, end in runs for place in range(start, end)}
    units = {(place + skew) // unit for place in range(len(old)) if old[place] != new[place]}
    assert inside == {place for place in range(len(old)) if (place + skew) // unit in units}
    assert all(first[1] < second[0] for first, second in pairwise(runs))


# ------------------------------------------------------------------------------------------------------- failing disks


def fail_at(monkeypatch: pytest.MonkeyPatch, image: Path, count: int) -> None:
    """The ``count``-th write to the file of ``image``, and all that follow, find no room."""
    left, write = count, FileDriver.write_from

    async def failing(self: FileDriver, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        nonlocal left
        if self.options.filename == str(image):
            left -= 1
            if left < 0:
                raise BlockIOError(errno.ENOSPC, f"no room in {image}")
        await write(self, offset, buffer, fua=fua)

    monkeypatch.setattr(FileDriver, "write_from", failing)


@pytest.mark.filterwarnings("ignore:.*could not be:UserWarning")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("operation", ["commit", "rebase"])
@pytest.mark.parametrize("full", ["middle", "top"])
def test_a_full_disk_costs_no_data_and_the_operation_can_be_repeated(
    operation: str, full: str, seed: int, chain: Path
) -> None:
    """Whichever write finds no room first: the image shows what it did, and the same succeeds once there is room."""
    operations: dict[str, Callable[[], object]] = {
        "commit": lambda: qblock.commit(chain / "top"),
        "rebase": lambda: qblock.rebase(chain / "top", "other", "qcow2"),
    }
    kept = {name: (chain / name).read_bytes() for name in ("base", "middle", "top")}
    before = content(chain / "top")
    failures, random = 0, Random(seed)
    for count in range(random.randrange(2), 60, 2):
        for name, image in kept.items():
            (chain / name).write_bytes(image)
        with pytest.MonkeyPatch.context() as monkeypatch:
            fail_at(monkeypatch, chain / full, count)
            try:
                operations[operation]()
            except (BlockIOError, ImageError):
                failures += 1
        assert content(chain / "top") == before, count
        operations[operation]()
        assert content(chain / "top") == before, count
    assert failures or (operation, full) == ("rebase", "middle")


def test_options_of_the_new_backing_file_are_json_names_too(chain: Path) -> None:
    """A backing file may be told by its options."""
    name = "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(chain / "other")}})
    before = content(chain / "top")
    qblock.rebase(chain / "top", name, "qcow2")
    assert content(chain / "top") == before
    assert backing_of(chain / "top") == name


def test_zeroes_of_an_image_without_backing_file_stay_zeroes_over_a_new_one(tmp_path: Path) -> None:
    """Version 2 has no zero clusters: what is unallocated there has to become data before another file may show through."""
    make_image(tmp_path / "below", MiB, {0: b"b" * MiB})
    for version in ("v2", "v3"):
        image = make_image(tmp_path / version, MiB, {"64k": b"x" * 64 * KiB}, version=version)
        before = content(image)
        assert qblock.rebase(image, "below", "qcow2") == Rebased("below", 0, MiB - 64 * KiB)
        assert content(image) == before
