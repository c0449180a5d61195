"""Committing an image: what an overlay holds moves into its backing file, or into one further down, as ``qemu-img commit`` does.

`commit` blocks until done; `commit_image` is the same for whoever has the overlay open. Sizes are bytes. The base is opened for
writing, grows when it is shorter, and is made durable; only then is the overlay emptied. A run that ends in between loses
nothing: it can be repeated.

Layers between the overlay and the base, and other overlays over what lies in between, do not show their content any more
afterwards: they go on top of a base that has changed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import attrs

from qblock.backend import BlockBackend
from qblock.blockers import OpType
from qblock.chain import chain_next, find_backing_image, skip_filters
from qblock.copying_down import Buffers, Piece, copy_piece, pieces_above, spread
from qblock.drain import drained
from qblock.driver import Progress, SupportsEmptying, no_progress
from qblock.errors import CommandError, QBlockError
from qblock.jobs.commit_top import CommitTop
from qblock.node import BdrvChild, BlockDriverState
from qblock.nodespec import NodeFlags
from qblock.offline import WRITING, run_offline, using
from qblock.opening import Opener
from qblock.options import DriverOptions
from qblock.permissions import ChildRole, Perm
from qblock.transaction import Transaction


@attrs.frozen
class Committed:
    """What `commit` did, in bytes: ``copied`` as data, ``zeroed`` as zeroes, ``grown`` at the end of the base (0: it was not).

    ``base`` is the base's file name (or its node's, when it has none), ``emptied`` tells whether the overlay was emptied.
    """

    base: str
    copied: int
    zeroed: int
    grown: int
    emptied: bool


@attrs.frozen(kw_only=True)
class CommitOrder:
    """What is to be committed how: ``base`` is a file name in the chain (None: the image below), ``empty`` the overlay after.

    ``speed`` is the limit in bytes per second, 0 for none. ``writethrough``: each write to the base is durable when it ends.
    """

    base: str | None = None
    empty: bool = True
    speed: int = 0
    writethrough: bool = False


def base_of_commit(top: BlockDriverState, base: str | None) -> BlockDriverState:
    """The image of the chain that ``base`` names; raises `CommandError`."""
    below = chain_next(top)
    if below is None:
        raise CommandError("the image has no backing file that it could be committed to")
    if base is None:
        return below
    found = find_backing_image(top, base)
    if found is None:
        raise CommandError(f"'{base}' is not in the backing chain of the image")
    return found


async def commit_image(
    opener: Opener, top: BdrvChild, order: CommitOrder, progress: Progress = no_progress
) -> Committed:
    """Commit the overlay that ``top`` leads to, which its user has open for writing, if it is to be emptied.

    Raises `CommandError` (no such base, a base that others use) and `BlockIOError`.
    """
    node = skip_filters(top.node)
    base = base_of_commit(node, order.base)
    name = base.driver.filename() or base.node_name
    if order.empty and not isinstance(node.driver, SupportsEmptying):
        raise CommandError(f"images of the format '{node.driver.name}' cannot be emptied: keep what they hold")
    was_read_only = base.read_only
    before = await _make_writable(opener, base)
    try:
        with using(opener, base, name=name, perm=WRITING) as target:
            grown = max(0, top.node.length - target.length)
            if grown:
                await target.truncate(top.node.length)
            assert target.root is not None
            copied, zeroed = await _copy(opener, top, target.root, order, progress)
            await target.flush()
    except BaseException:
        with contextlib.suppress(QBlockError):  # the cause matters more
            await _restore(opener, base, before, read_only=was_read_only)
        raise
    await _restore(opener, base, before, read_only=was_read_only)
    if order.empty:
        assert isinstance(node.driver, SupportsEmptying)
        await node.driver.make_empty()
    return Committed(name, copied, zeroed, grown, order.empty)


async def commit_in_use(opener: Opener, device: BlockBackend) -> Committed:
    """Commit the active layer of ``device`` into the image below and empty it, while the device's requests wait.

    Models HMP's ``commit``. Raises `NodeBusy` (a job is at work there), `CommandError` and `BlockIOError`.
    """
    top = device.root
    assert top is not None, f"{device!r} has no medium"
    node = skip_filters(top.node)
    base = base_of_commit(node, None)
    opener.graph.check_op(top.node, OpType.COMMIT_SOURCE)
    opener.graph.check_op(base, OpType.COMMIT_TARGET)
    if node.read_only:
        raise CommandError(f"Node '{node.node_name}' is read-only, so it cannot be emptied")
    async with drained(node):
        with _hidden_writer(opener, node):
            return await commit_image(opener, top, CommitOrder())


@contextlib.contextmanager
def _hidden_writer(opener: Opener, overlay: BlockDriverState) -> Iterator[None]:
    """Let what is below ``overlay`` be written although the users of ``overlay`` do not allow it; they wait."""
    edge = overlay.backing
    assert edge is not None
    below = edge.node
    with Transaction() as change, opener.graph.deferred_permissions(change):
        node = opener.make_filter(
            CommitTop, DriverOptions(), node_name=None, above=below, implicit=True, change=change
        ).node
        node.read_only = True
        opener.graph.attach(node, below, name="backing", role=ChildRole.FILTERED, change=change)
        opener.graph.set_backing(overlay, node, change)
    try:
        yield
    finally:
        with Transaction() as change, opener.graph.deferred_permissions(change):
            opener.graph.set_backing(overlay, below, change)
            opener.graph.detach(node.children["backing"], change)
            opener.graph.remove_node(node, change)


async def _make_writable(opener: Opener, base: BlockDriverState) -> list[tuple[BlockDriverState, NodeFlags]]:
    """Let the base be written; what becomes zero in it may give its space back. Returns how it was before."""
    before = []
    storage: BlockDriverState | None = base
    while storage is not None:
        flags = NodeFlags.of(storage)
        before.append((storage, flags))
        attrs.evolve(flags, discard_unmap=True).set_on(storage)
        storage = storage.storage.node if storage.storage is not None else None
    if base.read_only:
        await opener.reopen(base, read_only=False)
    return before


async def _restore(
    opener: Opener, base: BlockDriverState, before: list[tuple[BlockDriverState, NodeFlags]], *, read_only: bool
) -> None:
    """Let the base be as it was opened."""
    for node, flags in before:
        node.discard_unmap = flags.discard_unmap
    if read_only and base.poisoned is None:
        await opener.reopen(base, read_only=True)


async def _copy(
    opener: Opener, top: BdrvChild, target: BdrvChild, order: CommitOrder, progress: Progress
) -> tuple[int, int]:
    """Copy what the layers above the target hold; returns the bytes that were data, and those that were zeroes."""
    total = top.node.length
    buffers = Buffers()
    done = copied = zeroed = 0

    async def perform(piece: Piece) -> None:
        nonlocal copied, zeroed
        buffer = buffers.take()
        await copy_piece(piece, top, target, buffer, fua=order.writethrough)
        buffers.give(buffer)
        copied += 0 if piece.zero else piece.length
        zeroed += piece.length if piece.zero else 0

    def ended(piece: Piece) -> None:
        nonlocal done
        done += piece.length
        progress(done, total)

    progress(0, total)
    pieces = pieces_above(top.node, target.node, end=total)
    await spread(pieces, perform, ended, clock=opener.env.clock, speed=order.speed)
    progress(total, total)
    return copied, zeroed


def commit(
    path: str | os.PathLike[str],
    *,
    fmt: str | None = None,
    base: str | os.PathLike[str] | None = None,
    empty: bool | None = None,
    speed: int = 0,
    progress: Progress = no_progress,
) -> Committed:
    """Commit the image at ``path`` into its backing file, or into ``base`` further down its chain.

    Its backing files are opened, as the image names them. ``empty`` says whether the image gives up what it holds afterwards;
    None: it does, unless a ``base`` is given. ``speed`` is the limit in bytes per second. ``progress`` is called with the bytes
    done and those in all. Raises `QBlockError`.
    """
    name = os.fspath(path)
    order = CommitOrder(
        base=None if base is None else os.fspath(base), empty=base is None if empty is None else empty, speed=speed
    )

    async def work(opener: Opener) -> Committed:
        node = await opener.open_image(name, fmt=fmt, read_only=False, options={"discard": "unmap"})
        with using(opener, node, name=name, perm=Perm.CONSISTENT_READ | Perm.WRITE) as overlay:
            assert overlay.root is not None
            return await commit_image(opener, overlay.root, order, progress)

    return run_offline(work, backing=True)
