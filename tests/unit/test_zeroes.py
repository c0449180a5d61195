"""Buffers of zeroes, also longer than the shared block."""

from __future__ import annotations

import pytest

from qblock.units import MiB
from qblock.zeroes import ZERO_PIECE, all_zero, fill_zero, zero_view


@pytest.mark.parametrize("size", [0, 1, 4096, MiB, MiB + 1, ZERO_PIECE + 5])
def test_filling_and_comparing_agree(size: int) -> None:
    """Whatever the length, and wherever the one byte is that differs."""
    buffer = memoryview(bytearray(b"\xff" * size))
    fill_zero(buffer)
    assert all_zero(buffer) and bytes(buffer) == bytes(size)
    for at in {0, size // 2, size - 1} if size else ():
        buffer[at] = 1
        assert not all_zero(buffer)
        buffer[at] = 0


def test_the_shared_block_cannot_be_written() -> None:
    """It is everybody's."""
    with pytest.raises(TypeError):
        zero_view(1)[0] = 1
    assert len(zero_view(ZERO_PIECE)) == ZERO_PIECE
