"""What is stored at a place of a node: a closed union of extents, in the driver's own terms.

Models the answer of a driver's block-status (semantics.md section 16): data, zero or unallocated runs. Instead of QEMU's
flag word each kind is a type, and ``match`` with ``assert_never`` covers all of them. Lengths and offsets are in bytes.
"""

from __future__ import annotations

from typing import TypeAlias

import attrs


@attrs.frozen(slots=True)
class Data:
    """Allocated in this node as plain data.

    ``offset`` is the byte offset in the node's storage child (in the file itself for a protocol driver) when the run is
    stored there contiguously, else None.
    """

    length: int
    offset: int | None = None


@attrs.frozen(slots=True)
class Zero:
    """Allocated in this node and reads as zeroes; ``offset`` as in `Data` when space is preallocated for it."""

    length: int
    offset: int | None = None


@attrs.frozen(slots=True)
class Unallocated:
    """Not allocated in this node: read from its backing node, or zeroes when there is none. In a node of a driver that knows no
    backing nodes: held nowhere, and what is read is undefined.

    ``offset`` as in `Data` when space is preallocated for it all the same (a part of a cluster of which other parts are data).
    """

    length: int
    offset: int | None = None


@attrs.frozen(slots=True)
class Compressed:
    """Allocated in this node as compressed data, which has no plain offset."""

    length: int


Extent: TypeAlias = Data | Zero | Unallocated | Compressed

Fragment: TypeAlias = tuple[int, int, int]
"""A run of plain data on the disk: where it starts, its length, and its place as ``Data.offset``. A tuple: there are millions."""
