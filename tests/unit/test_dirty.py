"""Dirty bitmaps: what writes leave behind for jobs, against a plain set of granule numbers."""

from __future__ import annotations

import hashlib
import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qblock.dirty import DirtyBitmap
from qblock.errors import CommandError
from qblock.ranges import ByteRange
from qblock.units import GiB, KiB, MiB, TiB

SIZE = 100 * KiB + 512
GRAIN = 4 * KiB
GRANULES = 26

spans = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda s: (s[0], min(s[1], SIZE - s[0])))


def touched(offset: int, length: int) -> set[int]:
    return set(range(offset // GRAIN, (offset + length - 1) // GRAIN + 1))


def covered(offset: int, length: int) -> set[int]:
    end = GRANULES if offset + length == SIZE else (offset + length) // GRAIN
    return set(range(-(-offset // GRAIN), end))


@given(st.lists(st.tuples(st.booleans(), spans), max_size=30))
def test_marks_and_resets_match_a_set_of_granules(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    """A set grows by what a write touches and shrinks by what a copy covers wholly: half-copied granules stay dirty."""
    bitmap, model = DirtyBitmap(SIZE, GRAIN), set[int]()
    for mark, (offset, length) in steps:
        if mark:
            bitmap.set(offset, length)
            model |= touched(offset, length)
        else:
            bitmap.reset(offset, length)
            model -= covered(offset, length)
        assert bitmap.count == len(model) * GRAIN
    assert {g for g in range(GRANULES) if bitmap.get(g * GRAIN)} == model
    runs = list(bitmap.iterate())
    assert {g for run in runs for g in touched(run.offset, run.length)} == model
    assert all(one.end < two.offset for one, two in itertools.pairwise(runs))
    data = bitmap.to_bytes()
    assert len(data) == 8
    assert {g for g in range(GRANULES) if data[g // 8] >> (g % 8) & 1} == model


def test_a_range_is_cut_to_the_length_asked_for_and_to_the_size() -> None:
    """The copier takes at most its buffer, and never reads behind the end."""
    bitmap = DirtyBitmap(SIZE, GRAIN)
    bitmap.mark(0, SIZE)
    assert bitmap.next_dirty_range(0, max_length=3 * GRAIN) == ByteRange(0, 3 * GRAIN)
    assert bitmap.next_dirty_range(25 * GRAIN, max_length=MiB) == ByteRange(25 * GRAIN, SIZE - 25 * GRAIN)
    assert bitmap.next_dirty_range(100, max_length=GRAIN) == ByteRange(100, GRAIN)
    assert bitmap.next_dirty(SIZE) is None
    bitmap.reset(0, 20 * GRAIN)
    assert bitmap.next_dirty(0, 20 * GRAIN) is None
    assert bitmap.next_dirty(0) == 20 * GRAIN


def test_iteration_survives_changes_ahead_and_behind() -> None:
    """A job walks the bitmap while the guest goes on writing."""
    bitmap = DirtyBitmap(SIZE, GRAIN)
    bitmap.mark(0, 1)
    bitmap.mark(8 * GRAIN, 2 * GRAIN)
    seen = []
    for run in bitmap.iterate():
        seen.append(run.offset // GRAIN)
        if run.offset == 0:
            bitmap.clear()
            bitmap.mark(4 * GRAIN, 1)
            bitmap.mark(0, 1)
    assert seen == [0, 4]


def test_a_disabled_bitmap_records_no_writes_but_obeys_its_owner() -> None:
    """In write-blocking mirrors the bitmap is disabled, and the job alone marks what failed."""
    bitmap = DirtyBitmap(SIZE, GRAIN, enabled=False)
    bitmap.set(0, SIZE)
    assert bitmap.count == 0
    bitmap.mark(0, 1)
    assert bitmap.count == GRAIN
    bitmap.enable()
    bitmap.set(GRAIN, GRAIN + 1)
    assert bitmap.count == 3 * GRAIN


def test_writes_behind_the_end_are_left_out() -> None:
    """A file node may grow before its bitmaps hear of it."""
    bitmap = DirtyBitmap(SIZE, GRAIN)
    bitmap.set(SIZE, 512)
    bitmap.set(SIZE - 512, GRAIN * 4)
    assert bitmap.count == GRAIN


def test_abdicating_leaves_only_what_was_written_since() -> None:
    """A successful backup consumed the old bits."""
    bitmap = DirtyBitmap(SIZE, GRAIN, "b")
    bitmap.set(0, GRAIN)
    successor = bitmap.create_successor()
    assert bitmap.busy and bitmap.recording and not bitmap.enabled
    for each in (bitmap, successor):
        each.set(2 * GRAIN, 1)
    assert bitmap.count == GRAIN
    bitmap.abdicate()
    assert [run.offset for run in bitmap.iterate()] == [2 * GRAIN]
    assert bitmap.enabled and not bitmap.busy and bitmap.name == "b"


def test_reclaiming_keeps_old_and_new() -> None:
    """A failed backup must lose nothing; a bitmap that was disabled stays so."""
    bitmap = DirtyBitmap(SIZE, GRAIN, "b")
    bitmap.set(0, GRAIN)
    bitmap.create_successor().set(2 * GRAIN, 1)
    bitmap.reclaim()
    assert bitmap.count == 2 * GRAIN
    still = DirtyBitmap(SIZE, GRAIN, "s", enabled=False)
    still.create_successor().set(0, 1)
    still.reclaim()
    assert still.count == 0 and not still.recording


def test_a_busy_bitmap_has_no_second_user() -> None:
    """Two jobs consuming one bitmap would each lose the other's bits."""
    bitmap = DirtyBitmap(SIZE, GRAIN, "b")
    bitmap.create_successor()
    with pytest.raises(CommandError, match="in use"):
        bitmap.create_successor()


@pytest.mark.parametrize("grain", [512, GRAIN, 64 * KiB])
def test_merging_works_between_granularities(grain: int) -> None:
    """Merging may only round up: what was dirty stays dirty."""
    target, source = DirtyBitmap(SIZE, GRAIN), DirtyBitmap(SIZE, grain)
    target.mark(0, 1)
    source.mark(70 * KiB, 1)
    source.mark(SIZE - 1, 1)
    target.merge(source)
    expected = {0}
    for run in source.iterate():
        expected |= touched(run.offset, run.length)
    assert {g for g in range(GRANULES) if target.get(g * GRAIN)} == expected
    assert target.count == len(expected) * GRAIN


def test_merging_refuses_another_size() -> None:
    """Bits of another size would mean other places."""
    with pytest.raises(CommandError, match="same size"):
        DirtyBitmap(SIZE, GRAIN).merge(DirtyBitmap(SIZE + 512, GRAIN))


def test_truncating_cuts_bits_and_growing_adds_clean_ones() -> None:
    """A resized disk must not bring back dirty bits it had before."""
    bitmap = DirtyBitmap(SIZE, GRAIN)
    bitmap.mark(0, SIZE)
    bitmap.truncate(10 * GRAIN + 1)
    assert bitmap.count == 11 * GRAIN
    bitmap.truncate(SIZE)
    assert bitmap.count == 11 * GRAIN
    bitmap.truncate(16 * TiB * 1024)
    bitmap.mark(16 * TiB * 1024 - 1, 1)
    assert bitmap.count == 12 * GRAIN


def test_hash_of_256_clear_granules_is_that_of_32_zero_bytes() -> None:
    """Observed on the real program (semantics.md section 11)."""
    bitmap = DirtyBitmap(256 * GRAIN, GRAIN)
    assert bitmap.sha256() == hashlib.sha256(bytes(32)).hexdigest()
    bitmap.mark(9 * GRAIN, 8 * GRAIN)
    assert bitmap.sha256() == hashlib.sha256(bytes([0, 0xFE, 1]) + bytes(29)).hexdigest()


def test_the_bitmap_of_an_empty_disk_has_a_word() -> None:
    """As QEMU's has, so that hashes can be compared."""
    assert DirtyBitmap(0, 65536).sha256() == hashlib.sha256(bytes(8)).hexdigest()


def test_sparse_dirt_on_a_huge_disk_takes_little_room() -> None:
    """200,000 random clusters of 16 TiB: memory goes by what is dirty."""
    bitmap = DirtyBitmap(16 * TiB, 64 * KiB)
    for number in range(200_000):
        bitmap.set(number * 2654435761 % (1 << 28) * 64 * KiB, 512)
    assert bitmap.count == 200_000 * 64 * KiB
    assert len(bitmap._bits.serialize()) < MiB
    assert sum(1 for _ in bitmap.iterate()) > 190_000
    assert DirtyBitmap(8 * GiB, 512).to_bytes(0, 64) == bytes(8)


def noise(kind: str, granules: int, random: Random) -> bytes:
    """Serialised bits of one character: what write patterns make of a bitmap."""
    length = -(-granules // 64) * 8
    if kind == "dense":
        bits = int.from_bytes(random.randbytes(length), "little")
    elif kind == "full":
        bits = (1 << granules) - 1
    elif kind == "runs":
        bits = 0
        for _ in range(40):
            bits |= ((1 << random.randrange(1, 30000)) - 1) << random.randrange(granules)
    else:
        bits = 0
        for _ in range(300):
            bits |= 1 << random.randrange(granules)
    return (bits & ((1 << granules) - 1)).to_bytes(length, "little")


@pytest.mark.parametrize("kind", ["dense", "full", "runs", "sparse"])
@pytest.mark.parametrize("granules", [1, 64, 4096, 65536, 65537, 300_001])
@pytest.mark.parametrize("step", [8, 4096, 65536, 1 << 22])
def test_serialised_bits_come_back_whatever_the_pieces(kind: str, granules: int, step: int) -> None:
    """Bitmaps are stored cluster by cluster: every piece must be what the whole says, however the bits are kept in memory."""
    if granules / step > 5000:
        step = 4096
    expected = noise(kind, granules, Random(granules + step))
    bitmap = DirtyBitmap(granules * 512, 512)
    for first in range(0, granules, step):
        bitmap.load_bytes(first, expected[first // 8 : (first + step) // 8])
    assert bitmap.count // 512 == int.from_bytes(expected, "little").bit_count()
    assert bitmap.to_bytes() == expected
    for first in range(0, granules, step):
        piece = bitmap.to_bytes(first, step)
        wanted = expected[first // 8 : (first + step) // 8]
        assert piece[: len(wanted)] == wanted and not any(piece[len(wanted) :])


def test_what_lies_behind_the_last_granule_is_ignored_when_bits_are_loaded() -> None:
    """Images may have anything in the padding of a bitmap."""
    bitmap = DirtyBitmap(10 * 512, 512)
    bitmap.load_bytes(0, b"\xff" * 64)
    assert (bitmap.count, bitmap.to_bytes()) == (10 * 512, b"\xff\x03" + bytes(6))


def test_bits_of_a_bitmap_of_more_than_2_to_the_32_granules_are_serialised() -> None:
    """No image could store it, but its hash can be asked for."""
    bitmap = DirtyBitmap((1 << 33) * 512, 512)
    bitmap.mark((1 << 32) * 512 + 512 * 3, 512 * 10)
    assert bitmap.to_bytes(1 << 32, 64) == (0b1111111111 << 3).to_bytes(8, "little")
    other = DirtyBitmap((1 << 33) * 512, 512)
    other.load_bytes(1 << 32, bitmap.to_bytes(1 << 32, 64))
    assert other.count == bitmap.count


def test_the_sum_of_an_empty_disks_bitmap_is_that_of_one_word() -> None:
    """As the real program has it: two programs can tell by it that both have nothing."""
    assert DirtyBitmap(0, 64 * KiB).sha256() == hashlib.sha256(bytes(8)).hexdigest()
