"""Buffers of zeroes: one shared block to write from, to fill with, and to compare against.

Models no part of QEMU by itself; it serves ``detect-zeroes``, the fallback of zero writes and reads behind the end of a node.
The block is one untouched private mapping, so that it costs address space and page table entries, not memory.
"""

from __future__ import annotations

import functools
from typing import Final

from qblock.units import MiB

ZERO_PIECE: Final = 16 * MiB
"""Largest view that `zero_view` gives, in bytes; also the largest piece in which zeroes are written as plain data."""

_COMPARE_PIECE: Final = MiB


@functools.cache
def _block() -> memoryview:
    # calloc of this size is an anonymous mapping: reading it maps the kernel's one zero page.
    return memoryview(bytes(ZERO_PIECE))


@functools.cache
def _compare_block() -> bytes:
    return bytes(_COMPARE_PIECE)


def zero_view(length: int) -> memoryview:
    """A read-only view of ``length`` zero bytes, at most `ZERO_PIECE`."""
    assert length <= ZERO_PIECE, length
    return _block()[:length]


def fill_zero(buffer: memoryview) -> None:
    """Overwrite all of ``buffer`` with zeroes."""
    length = len(buffer)
    if length <= ZERO_PIECE:
        buffer[:] = _block()[:length]
        return
    for start in range(0, length, ZERO_PIECE):
        piece = buffer[start : start + ZERO_PIECE]
        piece[:] = _block()[: len(piece)]


def all_zero(buffer: memoryview) -> bool:
    """Whether every byte is zero; stops at the first piece that has another one. True for an empty buffer."""
    zeroes = _compare_block()
    if len(buffer) <= _COMPARE_PIECE:
        return zeroes.startswith(buffer)  # a memcmp without a copy
    return all(zeroes.startswith(buffer[at : at + _COMPARE_PIECE]) for at in range(0, len(buffer), _COMPARE_PIECE))
