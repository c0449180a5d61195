"""What is stored where: block status of one node, and of a chain of layers.

Models ``bdrv_block_status`` and its relatives (semantics.md section 16). The flag words of QEMU are a closed union here
(`extents.Extent`) for one node and a `ChainExtent` for a chain. Offsets and lengths are bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final, assert_never

import attrs

from qblock.chain import chain_next, skip_filters
from qblock.drain import enter, leave
from qblock.driver import SupportsFragments
from qblock.extents import Compressed, Data, Extent, Fragment, Unallocated, Zero
from qblock.units import MiB, TiB, align_down, align_up

if TYPE_CHECKING:
    from qblock.node import BlockDriverState

FIRST_QUESTION: Final = 8 * MiB
_MAX_QUESTION: Final = TiB


@attrs.frozen(slots=True)
class ChainExtent:
    """Which layer of a chain answers for a run of ``length`` bytes, and with what.

    ``depth`` counts layers from 0 at the top (filters are no layers). ``present``: some layer down to the base holds it;
    otherwise it reads as zeroes, unless the search stopped at a base or nobody holds anything (null-co). ``data`` and ``zero``
    may both be set: space is taken, but reads as zeroes. ``offset`` is the byte offset in ``file`` where plain data lie;
    ``node`` is the layer. ``cut_off``: ``node`` ends before, so this is zero whatever longer layers further down hold there; it
    counts as held by that layer, because who moves data between layers must move it, too.
    """

    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool = False
    offset: int | None = None
    node: BlockDriverState | None = None
    file: BlockDriverState | None = None
    cut_off: bool = False

    def as_mapped(self) -> ChainExtent:
        """As ``map`` shows it: zeroes behind the end of a layer are the layer's above it, which does not hold them either."""
        if not self.cut_off:
            return self
        return attrs.evolve(self, depth=self.depth - 1, present=False)


_KNOWN_AT_MOST: Final = 1 << 16


class Further:
    """What one walk along a chain learns about data that lie in many places: see `chain_status`.

    ``runs`` are those behind the last answer. What the storage has where is asked once and remembered, so nobody may write
    to the chain during the walk. With ``gaps`` runs need not follow each other: in between no layer down to the base holds
    anything.
    """

    def __init__(self, *, gaps: bool = False) -> None:
        self.runs: list[Fragment] = []
        self.gaps = gaps
        self._known: dict[BlockDriverState, _Known] = {}

    @property
    def length(self) -> int:
        """Bytes of all runs together."""
        return self.runs[-1][0] + self.runs[-1][1] - self.runs[0][0] if self.runs else 0

    async def behind(
        self, held: ChainExtent, offset: int, length: int, *, want_zero: bool, is_last: bool
    ) -> list[Fragment]:
        """The runs behind the one at ``offset`` for which ``held`` is the answer, too, as far as ``length`` bytes from there.

        ``is_last``: the base lies right below the layer.
        """
        layer = held.node
        if held.length >= length or layer is None or not held.data or held.offset is None:
            return []
        if not isinstance(layer.driver, SupportsFragments):
            return []
        enter(layer)
        try:
            start, rest = offset + held.length, min(length, layer.length - offset) - held.length
            after = held.offset + held.length
            found = await layer.driver.fragments(start, rest, after=after, gaps=self.gaps and is_last)
        finally:
            leave(layer)
        storage = layer.data_storage
        if not (want_zero and layer.driver.probes_storage) or storage is None:
            return found
        known = self._known.setdefault(storage.node, _Known(storage.node))
        if found:
            first, end = min(place for _, _, place in found), max(place + size for _, size, place in found)
            if await known.is_zero(first, end - first) is held.zero:
                return found
        for number, (_, size, place) in enumerate(found):
            if await known.is_zero(place, size) is not held.zero:
                return found[:number]
        return found


class _Known:
    """Parts of a storage node that are known to be data, or zero: disjoint, in order."""

    def __init__(self, node: BlockDriverState) -> None:
        self.node = node
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._zero: list[bool] = []

    async def is_zero(self, offset: int, length: int) -> bool | None:
        """Whether all of a range reads as zeroes (True) or is data (False); None when it is neither."""
        at = bisect_right(self._starts, offset) - 1
        if at >= 0 and offset + length <= self._ends[at]:
            return self._zero[at]
        below = await block_status(self.node, offset, _MAX_QUESTION)
        zero = _reads_zero(skip_filters(self.node), below)
        self._learn(offset, offset + below.length, zero=zero)
        return zero if length <= below.length else None

    def _learn(self, start: int, end: int, *, zero: bool) -> None:
        if len(self._starts) >= _KNOWN_AT_MOST:
            del self._starts[:], self._ends[:], self._zero[:]
        first, last = bisect_left(self._starts, start), bisect_left(self._starts, end)
        if first and self._ends[first - 1] > start:
            first -= 1
        if first < last:
            # What overlaps is of one kind.
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]
        self._zero[first:last] = [zero]


async def block_status(node: BlockDriverState, offset: int, length: int, *, want_zero: bool = True) -> Extent:
    """This node's own answer for the run that starts at ``offset``: at least 1 and at most ``length`` bytes.

    Filters answer for their child. What lies behind the end of the node is zero. With ``want_zero`` data over a hole of the
    storage child is reported as zero where the driver says that this can be (``Driver.probes_storage``).
    """
    if node.driver.wants_debug_events and offset < node.length:
        return await _filter_status(node, offset, length, want_zero=want_zero)
    extent, _ = await _refined_status(skip_filters(node), offset, length, want_zero=want_zero)
    return extent


async def _filter_status(node: BlockDriverState, offset: int, length: int, *, want_zero: bool) -> Extent:
    """The answer of a filter that is not looked through, since it may let the question fail (blkdebug)."""
    enter(node)
    try:
        return await _driver_status(node, offset, min(length, node.length - offset), want_zero=want_zero)
    finally:
        leave(node)


async def chain_status(
    node: BlockDriverState,
    offset: int,
    length: int,
    *,
    base: BlockDriverState | None = None,
    want_zero: bool = True,
    further: Further | None = None,
) -> ChainExtent:
    """The first layer from ``node`` down to but not including ``base`` that holds the run starting at ``offset``.

    With a ``base`` a run that no layer above it holds is neither present nor zero. ``further`` takes the runs that follow, by its
    own rule about gaps, and for which the answer is the same but for length and place, as far as the layer knows them without
    effort.
    """
    if further is not None:
        further.runs = []
    if node.driver.wants_debug_events and offset < node.length:
        length = (await _filter_status(node, offset, length, want_zero=want_zero)).length
    depth = 0
    layer = skip_filters(node)
    stop = skip_filters(base) if base is not None else None
    above = None
    while layer is not stop:
        if offset >= layer.length:
            return _behind_the_end(length, layer, depth, above)
        # A layer below that is shorter ends the run where it ends.
        extent, stored = await _refined_status(layer, offset, length, want_zero=want_zero)
        if not isinstance(extent, Unallocated):
            held = _held(extent, layer, depth, stored=stored)
            if further is not None:
                is_last = stop is not None and chain_next(layer) is stop
                further.runs = await further.behind(held, offset, length, want_zero=want_zero, is_last=is_last)
            return held
        length = extent.length
        below = chain_next(layer)
        if below is None:
            assert stop is None, "the base is not in the chain"
            return _held_by_nobody(extent, layer, depth)
        above = layer, extent
        layer = below
        depth += 1
    return ChainExtent(length, depth, present=False, zero=False, data=False)


def next_question(asked: int, answered: int) -> int:
    """How many bytes a walk along a chain should ask about next, after a question with an answer about ``answered`` bytes.

    Long answers make it longer. Of a long one most is lost where a lower layer is in many parts: the layers above it are searched
    to the end of the question for each part.
    """
    longer = min(4 * answered, _MAX_QUESTION)
    return longer if answered == asked else max(longer, FIRST_QUESTION)


async def is_allocated_above(
    top: BlockDriverState,
    base: BlockDriverState | None,
    offset: int,
    length: int,
    *,
    include_base: bool = False,
) -> tuple[bool, int]:
    """Whether a layer from ``top`` down to ``base`` holds the run at ``offset``, and how many bytes the answer covers.

    ``base`` itself is searched only with ``include_base``; None means the whole chain. The area behind the end of a layer
    that is shorter than those above it counts as allocated there.
    """
    stop = chain_next(base) if base is not None and include_base else base
    extent = await chain_status(top, offset, length, base=stop, want_zero=False)
    return extent.present, extent.length


async def is_zero(node: BlockDriverState, offset: int, length: int) -> bool:
    """Whether the whole range is known to read as zeroes (False when it might not)."""
    while length > 0:
        extent = await chain_status(node, offset, length)
        if not extent.zero:
            return False
        offset += extent.length
        length -= extent.length
    return True


def _held_by_nobody(extent: Unallocated, layer: BlockDriverState, depth: int) -> ChainExtent:
    """The chain's answer where its last layer has nothing, though perhaps space for it."""
    return ChainExtent(
        extent.length, depth, present=False, zero=_reads_zero(layer, extent), data=False, offset=extent.offset, node=layer,
        file=_space_of(layer, extent),
    )  # fmt: skip


def _behind_the_end(
    length: int, layer: BlockDriverState, depth: int, above: tuple[BlockDriverState, Unallocated] | None
) -> ChainExtent:
    """The chain's answer where ``layer`` has ended; the layer ``above`` may have space for what it shows there."""
    if above is None:
        return ChainExtent(length, depth, present=False, zero=True, data=False, node=layer)
    return ChainExtent(
        length, depth, present=True, zero=True, data=False, offset=above[1].offset, node=layer, file=_space_of(*above),
        cut_off=True,
    )  # fmt: skip


def _space_of(layer: BlockDriverState, extent: Unallocated) -> BlockDriverState | None:
    """The node in which a layer has space for what it does not hold."""
    edge = layer.data_storage if extent.offset is not None else None
    return None if edge is None else edge.node


def _held(extent: Data | Zero | Compressed, layer: BlockDriverState, depth: int, *, stored: bool) -> ChainExtent:
    """The chain's answer from the answer of the layer that holds the run."""
    match extent:
        case Compressed(length):
            return ChainExtent(length, depth, present=True, zero=False, data=True, compressed=True, node=layer)
        case Data(length, offset):
            zero = False
        case Zero(length, offset):
            zero = True
        case _:
            assert_never(extent)
    file = None
    if offset is not None:
        storage = layer.data_storage
        file = layer if layer.driver.is_protocol or storage is None else storage.node
    return ChainExtent(length, depth, True, zero, stored or not zero, offset=offset, node=layer, file=file)


async def _refined_status(node: BlockDriverState, offset: int, length: int, *, want_zero: bool) -> tuple[Extent, bool]:
    """The status of ``node``, no filter, and whether a zero extent is a data area of a format over a hole of its storage."""
    if offset >= node.length:
        return Zero(length), False
    length = min(length, node.length - offset)
    enter(node)
    try:
        extent = await _driver_status(node, offset, length, want_zero=want_zero)
    finally:
        leave(node)
    if not (want_zero and node.driver.probes_storage and isinstance(extent, Data) and extent.offset is not None):
        return extent, False
    storage = node.data_storage
    if storage is None:
        return extent, False
    below = await block_status(storage.node, extent.offset, extent.length)
    run = min(below.length, extent.length)
    if _reads_zero(skip_filters(storage.node), below):
        return Zero(run, extent.offset), node.driver.supports_backing
    return Data(run, extent.offset), True


def _reads_zero(node: BlockDriverState, extent: Extent) -> bool:
    if not isinstance(extent, Unallocated) or node.backing is not None:
        return isinstance(extent, Zero)
    below = node.storage  # of a raw window, whose storage lacks it
    return node.driver.supports_backing or (below is not None and _reads_zero(skip_filters(below.node), extent))


async def _driver_status(node: BlockDriverState, offset: int, length: int, *, want_zero: bool) -> Extent:
    """Ask the driver in whole blocks of its request alignment, and cut the answer to what was asked."""
    driver = node.driver
    alignment = driver.limits.request_alignment
    start = align_down(offset, alignment)
    extent = await driver.block_status(start, align_up(offset + length, alignment) - start, want_zero=want_zero)
    assert extent.length > 0, f"{node.node_name}: empty block status"
    if extent.length <= offset - start:
        # The driver ends inside this block, before what was asked: the rest of the block reads as zeroes.
        return Zero(min(length, start + alignment - offset))
    return clip(extent, offset - start, length)


def clip(extent: Extent, skip: int, length: int) -> Extent:
    """The extent without its first ``skip`` bytes, and at most ``length`` bytes long."""
    count = min(extent.length - skip, length)
    if not skip and count == extent.length:
        return extent
    match extent:
        case Data(_, offset):
            return Data(count, None if offset is None else offset + skip)
        case Zero(_, offset):
            return Zero(count, None if offset is None else offset + skip)
        case Unallocated(_, offset):
            return Unallocated(count, None if offset is None else offset + skip)
        case Compressed():
            return Compressed(count)
        case _:
            assert_never(extent)
