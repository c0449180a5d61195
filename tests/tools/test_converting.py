"""The copy engine: zeroes are found exactly, and the plan covers every byte once."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from qblock.tools.converting import data_runs


def runs_by_looking(data: bytes, unit: int) -> list[tuple[int, int]]:
    """The same, unit by unit."""
    found: list[tuple[int, int]] = []
    for start in range(0, len(data), unit):
        end = min(start + unit, len(data))
        if any(data[start:end]):
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
    return found


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=20),
    st.sampled_from([4, 8, 16]),
    st.binary(max_size=20),
)
@example([], 4, b"")
@example([(True, 4), (False, 2)], 4, b"")
def test_zero_runs_are_found_exactly(pieces: list[tuple[bool, int]], unit: int, rest: bytes) -> None:
    """Not one unit of data is lost, and not one whole unit of zeroes is written."""
    data = b"".join((b"\1" if filled else b"\0") * length for filled, length in pieces)
    buffer = bytearray(data + rest)
    assert list(data_runs(buffer, len(data), unit)) == runs_by_looking(data, unit)
