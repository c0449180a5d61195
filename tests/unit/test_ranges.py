"""Byte ranges, and sets of them against a plain set of numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qblock.ranges import ByteRange, RangeSet

OPERATIONS = st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 12)), max_size=30)


def filled(operations: list[tuple[bool, int, int]]) -> tuple[RangeSet, set[int]]:
    """The same additions and removals done to a RangeSet and to a set of integers."""
    ranges, model = RangeSet(), set[int]()
    for adding, offset, length in operations:
        if adding:
            ranges.add(offset, length)
            model.update(range(offset, offset + length))
        else:
            ranges.remove(offset, length)
            model.difference_update(range(offset, offset + length))
    return ranges, model


def test_ranges_that_only_touch_do_not_overlap() -> None:
    """Two neighbouring requests may run at the same time."""
    first, second = ByteRange(0, 512), ByteRange(512, 512)
    assert not first.overlaps(second)
    assert first.intersect(second) is None
    assert first.overlaps(ByteRange(511, 1))
    assert not first.overlaps(ByteRange(100, 0))
    assert ByteRange(100, 200).intersect(first) == ByteRange(100, 200)
    assert str(second) == "[0x200, 0x400)"


@given(OPERATIONS)
def test_a_range_set_holds_exactly_what_was_put_in(operations: list[tuple[bool, int, int]]) -> None:
    """Whatever the order of additions and removals, content and size agree with a set of integers."""
    ranges, model = filled(operations)
    assert {byte for item in ranges for byte in range(item.offset, item.end)} == model
    assert ranges.total == len(model)
    assert all(byte in ranges for byte in model)


@given(OPERATIONS)
def test_a_range_set_keeps_no_two_ranges_that_meet(operations: list[tuple[bool, int, int]]) -> None:
    """Neighbours are merged, so memory is bounded by the number of gaps."""
    ends = [(item.offset, item.end) for item in filled(operations)[0]]
    assert all(first[1] < second[0] for first, second in pairwise(ends))
    assert all(start < end for start, end in ends)


@given(OPERATIONS, st.integers(0, 50), st.integers(0, 12))
def test_questions_agree_with_the_model(operations: list[tuple[bool, int, int]], offset: int, length: int) -> None:
    """contains and overlaps answer what a byte-by-byte look would."""
    ranges, model = filled(operations)
    asked = range(offset, offset + length)
    assert ranges.overlaps(offset, length) == any(byte in model for byte in asked)
    if length:
        assert ranges.contains(offset, length) == all(byte in model for byte in asked)


def test_a_set_is_shown_as_its_ranges() -> None:
    """A failing test should be readable."""
    assert repr(RangeSet.of([ByteRange(0, 16), ByteRange(32, 16)])) == "<RangeSet [0x0, 0x10) [0x20, 0x30)>"
    assert repr(RangeSet()) == "<RangeSet empty>"
    assert len(RangeSet.of([ByteRange(0, 16), ByteRange(16, 16)])) == 1
    assert "x" not in RangeSet()
