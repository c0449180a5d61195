"""The states of subclusters: runs of them, and what a write into part of a cluster has to fill up."""

from __future__ import annotations

import itertools
from array import array

from hypothesis import given
from hypothesis import strategies as st

from qblock.drivers.qcow2.layout import COMPRESSED, COPIED, Geometry, Kind
from qblock.drivers.qcow2.subclusters import (
    ALL_DATA,
    ALL_ZERO,
    SUBCLUSTERS,
    ExtendedTable,
    find_sub_run,
    runs_of_bits,
    subcluster_kind,
)
from qblock.drivers.qcow2.subwriting import plan_filling

BITS = 14
SIZE = 1 << BITS
SUB = SIZE // SUBCLUSTERS
GEOMETRY = Geometry(BITS, 4, 3, 10, extended=True)

masks = st.one_of(st.sampled_from([0, ALL_DATA, 1, 1 << 31]), st.integers(0, ALL_DATA))


@st.composite
def entries(draw: st.DrawFn) -> tuple[int, int]:
    """The two words of an entry: mostly sound, hosts often following each other."""
    kind = draw(st.sampled_from(["data", "data", "empty", "packed", "any"]))
    if kind == "packed":
        return COMPRESSED | draw(st.integers(1, 1 << 20)), 0
    data = draw(masks)
    zero = draw(masks) & ~data
    if kind == "empty":
        return 0, zero << 32
    if kind == "any":
        return draw(st.sampled_from([0, 1, 3 * SIZE])), draw(st.integers(0, (1 << 64) - 1))
    return draw(st.integers(1, 6)) * SIZE | draw(st.sampled_from([COPIED, COPIED, 0])), data | zero << 32


@given(st.lists(entries(), min_size=1, max_size=12), st.data())
def test_a_run_is_as_long_as_what_it_is_made_of(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    """Every byte of a run is of its kind, and lies behind the one before it where there is a place for it."""
    table = ExtendedTable(0, array("Q", [row[0] for row in rows]), 0, states=array("Q", [row[1] for row in rows]))
    at = data.draw(st.integers(0, len(rows) * SUBCLUSTERS - 1)) * SUB + data.draw(st.sampled_from([0, 100]))
    length = data.draw(st.integers(1, len(rows) * SIZE - at))
    kind, got, entry = find_sub_run(table, at // SIZE, at % SIZE, length, GEOMETRY)
    assert 0 < got <= length and entry == rows[at // SIZE][0]
    hosted = entry and kind not in (Kind.COMPRESSED, Kind.CORRUPT)
    for place in range(at // SUB, (at + got - 1) // SUB + 1):
        row = rows[place * SUB // SIZE]
        assert subcluster_kind(*row, place % SUBCLUSTERS, GEOMETRY) is kind
        if hosted:
            assert row[0] == entry + (place * SUB // SIZE - at // SIZE) * SIZE


@given(masks)
def test_runs_of_bits_are_the_bits(bits: int) -> None:
    """Apart from each other, in order, and nothing left out."""
    runs = list(runs_of_bits(bits))
    assert sum((1 << end) - (1 << first) for first, end in runs) == bits
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))


@given(masks, masks, st.integers(0, SIZE - 1), st.data(), st.booleans())
def test_a_filled_cluster_shows_what_it_showed_and_what_was_written(
    data: int, zero: int, start: int, draw: st.DataObject, moved: bool
) -> None:
    """Byte by byte: what counts as data afterwards was written, filled up, or was data in a place that is kept."""
    end = draw.draw(st.integers(start + 1, SIZE))
    zero &= ~data
    filling = plan_filling((SIZE, data | zero << 32), start, end, kind=Kind.DATA, moved=moved, bits=BITS - 5)
    covered = bytearray(SIZE)
    for a, b in [(start, end), *filling.ranges]:
        assert not any(covered[a:b])
        covered[a:b] = b"\1" * (b - a)
    for number in range(SUBCLUSTERS):
        part, bit = covered[number * SUB : (number + 1) * SUB], 1 << number
        before = data & bit, zero & bit
        after = filling.states & bit, filling.states >> 32 & bit
        if after[0] and not (before[0] and not moved):
            assert all(part)
        if not any(part):
            assert after == before
        assert not (after[0] and after[1])


def test_a_compressed_cluster_becomes_data_throughout() -> None:
    """All of it is written when a part of it is."""
    filling = plan_filling((COMPRESSED, 0), 600, 700, kind=Kind.COMPRESSED, moved=True, bits=BITS - 5)
    assert filling.states == ALL_DATA
    assert filling.ranges == [(0, 600), (700, SIZE)]


def test_damage_concerns_the_whole_cluster() -> None:
    """One subcluster that is data and zero at once makes all of them unreadable, as in QEMU."""
    assert subcluster_kind(SIZE | COPIED, ALL_DATA | 1 << 40, 0, GEOMETRY) is Kind.CORRUPT
    assert subcluster_kind(0, 1, 31, GEOMETRY) is Kind.CORRUPT
    assert subcluster_kind(0, ALL_ZERO, 5, GEOMETRY) is Kind.ZERO
    assert subcluster_kind(SIZE, ALL_ZERO, 5, GEOMETRY) is Kind.ZERO_ALLOCATED
