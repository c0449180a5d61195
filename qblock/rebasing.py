"""Giving an overlay another backing file, as ``qemu-img rebase`` does.

`rebase` blocks until done; `rebase_image` is the same for whoever has the overlay open. Sizes are bytes. What the guest sees
stays the same: where the overlay holds nothing and the old and the new backing file differ, it gets what the old one shows. The
header names the new file only when that is durable, so that a run which ends early has made the overlay larger, and nothing else.
With ``unsafe`` only the name changes.

What is known without reading is not read: areas that both files show as zeroes, and, when an overlay moves down its own chain,
all that lies under the new backing file. Differs from QEMU: what is known to become zero takes no space, and a missing format of
the new backing file is noticed before anything is copied.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import attrs

from qblock import requests
from qblock.chain import cow_node, find_backing_image, skip_filters
from qblock.copying_down import CHUNK, MAX_ZEROES, Buffers, Piece, cut, spread
from qblock.driver import BackingLink, Progress, SupportsBacking, no_progress
from qblock.errors import CommandError, QBlockError
from qblock.extents import Unallocated
from qblock.filenames import combine_filename
from qblock.node import BdrvChild, BlockDriverState
from qblock.nodespec import NO_FLAGS, NodeFlags
from qblock.offline import WRITING, run_offline, using
from qblock.opening import Opener
from qblock.permissions import Perm
from qblock.status import FIRST_QUESTION, ChainExtent, block_status, chain_status, next_question
from qblock.zeroes import ZERO_PIECE, all_zero, zero_view


@attrs.frozen
class Rebased:
    """What `rebase` did: ``backing`` is the new name in the header (None: none); ``copied`` and ``zeroed`` are the bytes of the
    overlay that got data, or zeroes, since the backing files differ there.
    """

    backing: str | None
    copied: int
    zeroed: int


@attrs.frozen(kw_only=True)
class RebaseOrder:
    """What the overlay is to stand on: ``backing`` is a file name, relative to the overlay's (None: nothing), ``fmt`` its format.

    ``flags`` are those by which the new backing file is opened; ``force_share``: others may be writing to it.
    ``writethrough``: each write to the overlay is durable when it ends.
    """

    backing: str | None
    fmt: str | None = None
    unsafe: bool = False
    flags: NodeFlags = NO_FLAGS
    force_share: bool = False
    writethrough: bool = False


def differing_runs(
    old: bytearray, new: bytearray | None, length: int, *, unit: int, skew: int = 0
) -> Iterator[tuple[int, int]]:
    """Start and end of what differs in the first ``length`` bytes, in units of ``unit`` bytes; None stands for zeroes.

    The first unit has begun ``skew`` bytes earlier.
    """
    view = memoryview(old)[:length] if new is None else memoryview(new)[:length]
    if all_zero(view) if new is None else old.startswith(view):
        return
    start = None
    for unit_start in range(-skew, length, unit):
        at, end = max(unit_start, 0), min(unit_start + unit, length)
        same = all_zero(view[at:end]) if new is None else old.startswith(view[at:end], at)
        if same and start is not None:
            yield start, at
            start = None
        elif not same and start is None:
            start = at
    if start is not None:
        yield start, length


async def rebase_image(
    opener: Opener, overlay: BdrvChild, order: RebaseOrder, progress: Progress = no_progress
) -> Rebased:
    """Rebase the image that ``overlay`` leads to, which its user may write, and which has its old backing file open.

    With ``unsafe`` that need not be open. The graph is left as it is: open the image anew to see the new backing file. Raises
    `CommandError`, `ImageError` (the new file) and `BlockIOError`.
    """
    node = skip_filters(overlay.node)
    driver = node.driver
    if not isinstance(driver, SupportsBacking):
        raise CommandError(f"images of the format '{driver.name}' have no backing file that could be changed")
    if order.fmt is not None:
        opener.registry.get(order.fmt)
    if order.backing is not None and order.fmt is None:
        raise CommandError(f"the backing file '{order.backing}' needs its format too: it is never guessed")
    copied = zeroed = 0
    if not order.unsafe:
        async with _Comparing(opener, overlay, node, order) as comparing:
            copied, zeroed = await comparing.run(progress)
        await requests.flush(overlay.node)
    else:
        progress(0, 1)
    await driver.change_backing_link(None if order.backing is None else BackingLink(order.backing, order.fmt))
    progress(1, 1)
    return Rebased(order.backing, copied, zeroed)


@attrs.define(eq=False)
class _Comparing:
    """Looking at both backing files, and copying where they differ. An async context manager: leaving it closes the new one."""

    opener: Opener
    overlay: BdrvChild
    node: BlockDriverState
    order: RebaseOrder
    shared: BlockDriverState | None = attrs.field(init=False, default=None)
    """The layer of the present chain that the new backing file is."""
    new: BdrvChild | None = attrs.field(init=False, default=None)
    _backend: Any = attrs.field(init=False, default=None)
    _copied: int = attrs.field(init=False, default=0)
    _zeroed: int = attrs.field(init=False, default=0)
    _buffers: Buffers = attrs.field(init=False, factory=Buffers)

    async def __aenter__(self) -> _Comparing:
        name = self.order.backing
        if name is None:
            return self
        own = self.node.driver.filename() or self.node.node_name
        located = combine_filename(own, name)
        below = find_backing_image(self.node, located)
        if below is None:
            try:
                below = await self.opener.open_image(
                    located, fmt=self.order.fmt, inherited=self.order.flags, force_share=self.order.force_share
                )
            except QBlockError as error:
                raise CommandError(f"the new backing file '{located}' cannot be opened: {error}") from error
        else:
            self.shared = below
        self._backend = using(self.opener, below, name=located, perm=Perm.CONSISTENT_READ)
        self.new = self._backend.__enter__().root
        return self

    async def __aexit__(self, *failure: Any) -> None:
        if self._backend is not None:
            self._backend.__exit__(*failure)
            await self.opener.close_orphans()

    async def run(self, progress: Progress) -> tuple[int, int]:
        """Do it; returns the bytes copied, and those made zero."""
        total, done = self.node.length, 0

        def ended(piece: Piece) -> None:
            nonlocal done
            done += piece.length
            progress(done, total)

        progress(0, total)
        await spread(self._pieces(total), self._perform, ended, clock=self.opener.env.clock)
        return self._copied, self._zeroed

    async def _pieces(self, end: int) -> AsyncIterator[Piece]:
        """The plan. Work is what must be looked at; ``zero`` when the old backing file is known to show zeroes there."""
        at, question = 0, FIRST_QUESTION
        while at < end:
            extent = await block_status(self.node, at, min(question, end - at), want_zero=False)
            length = extent.length
            if not isinstance(extent, Unallocated):
                yield Piece(at, length, work=False)
            else:
                old = await self._old_status(at, length)
                length = old.length
                # What no layer above the shared one holds, nor is cut off by the end of one, is the same for both.
                work = old.present or old.zero
                if work:
                    new = await self._new_status(at, length)
                    length = min(length, new.length)
                    work = not (old.zero and new.zero)
                for offset, count in cut(at, length, CHUNK if work else MAX_ZEROES):
                    yield Piece(offset, count, work=work, zero=old.zero)
            question = next_question(question, length)
            at += length

    async def _old_status(self, at: int, length: int) -> ChainExtent:
        below = cow_node(self.node)
        if below is None:
            return ChainExtent(length, 0, present=True, zero=True, data=False)
        return await chain_status(below, at, length, base=self.shared)

    async def _new_status(self, at: int, length: int) -> ChainExtent:
        if self.new is None:
            return ChainExtent(length, 0, present=True, zero=True, data=False)
        return await chain_status(self.new.node, at, length)

    async def _perform(self, piece: Piece) -> None:
        """Read what has to be read, and write to the overlay where it differs, in whole clusters."""
        unit = self.node.driver.info().cluster_size or CHUNK
        old, new = self._buffers.take(), None
        if not piece.zero:
            backing = self.node.backing
            assert backing is not None
            await requests.read_into(backing, piece.offset, memoryview(old)[: piece.length])
        if self.new is not None:
            new = self._buffers.take()
            await requests.read_into(self.new, piece.offset, memoryview(new)[: piece.length])
        skew = piece.offset % unit
        if piece.zero:
            runs = differing_runs(new or old, None, piece.length, unit=unit, skew=skew)
        else:
            runs = differing_runs(old, new, piece.length, unit=unit, skew=skew)
        for start, end in runs:
            await self._write(piece, start, memoryview(old)[start:end])
        self._buffers.give(old)
        if new is not None:
            self._buffers.give(new)

    async def _write(self, piece: Piece, start: int, data: memoryview) -> None:
        fua, length = self.order.writethrough, len(data)
        if piece.zero or all_zero(data):
            await requests.write_zeroes(self.overlay, piece.offset + start, length, fua=fua)
            if not await self._holds(piece.offset + start, length):
                # Without a backing node a format may express zeroes by holding nothing (qcow2 of version 2).
                for at in range(0, length, ZERO_PIECE):
                    zeroes = zero_view(min(ZERO_PIECE, length - at))
                    await requests.write_from(self.overlay, piece.offset + start + at, zeroes, fua=fua)
            self._zeroed += length
        else:
            await requests.write_from(self.overlay, piece.offset + start, data, fua=fua)
            self._copied += length

    async def _holds(self, offset: int, length: int) -> bool:
        """Whether the overlay itself holds all of a range, so that no backing file shows through."""
        while length:
            extent = await block_status(self.node, offset, length, want_zero=False)
            if isinstance(extent, Unallocated):
                return False
            offset, length = offset + extent.length, length - extent.length
        return True


@contextmanager
def _overlay(opener: Opener, node: BlockDriverState, name: str) -> Iterator[BdrvChild]:
    with using(opener, node, name=name, perm=WRITING) as backend:
        assert backend.root is not None
        yield backend.root


def rebase(
    path: str | os.PathLike[str],
    backing: str | os.PathLike[str] | None,
    backing_fmt: str | None = None,
    *,
    fmt: str | None = None,
    unsafe: bool = False,
    progress: Progress = no_progress,
) -> Rebased:
    """Let the image at ``path`` stand on ``backing`` (None: on nothing), a name relative to its directory, of ``backing_fmt``.

    What it shows does not change, unless with ``unsafe``, where the name alone changes and no backing file is opened.
    ``progress`` is called with the bytes done and those in all. Raises `QBlockError`.
    """
    name = os.fspath(path)
    order = RebaseOrder(backing=None if backing is None else os.fspath(backing), fmt=backing_fmt, unsafe=unsafe)

    async def work(opener: Opener) -> Rebased:
        node = await opener.open_image(name, fmt=fmt, read_only=False, backing=not unsafe)
        with _overlay(opener, node, name) as overlay:
            return await rebase_image(opener, overlay, order, progress)

    return run_offline(work, backing=True)
