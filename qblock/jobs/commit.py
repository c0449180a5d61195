"""The commit job: move what inner layers of a chain hold down into a lower one, then take these layers out of the chain.

Models ``block-commit`` of QEMU 7.2 where the topmost layer to commit is not the active one (semantics.md section 4.2; otherwise
it is a mirror, see `active_commit.py`). What the layers from ``top`` down to but not including ``base`` hold is written to
``base``, which is made writable for the time of the job, and longer first if it is shorter than ``top``. While the job runs
``commit_top`` stands above ``top``. The layers between hide all that is written below them, so the chain reads the same at
every moment; it is whole whatever is interrupted.

At the end ``base`` is made durable, then the headers of the images above ``top`` are rewritten, then the graph. A crash in
between leaves images that read the same either way.

Differs from QEMU: what reads as zeroes is written as zeroes, not as data; an image above ``top`` with a filter in between has
its header rewritten too; and in what `scanning.py` tells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

from qblock import requests
from qblock.backend import BlockBackend
from qblock.blockers import block_all, unblock
from qblock.copying_down import MAX_ZEROES, Piece
from qblock.drain import drained
from qblock.driver import BackingLink, SupportsBacking
from qblock.errors import CommandError, PermissionConflict, QBlockError
from qblock.jobs.commit_plan import CommitPlace, CommitRequest
from qblock.jobs.commit_top import CommitTop
from qblock.jobs.scanning import STEP, ScanningJob
from qblock.naming import link_to
from qblock.node import BlockDriverState
from qblock.options import DriverOptions
from qblock.permissions import ChildRole, Perm
from qblock.transaction import Transaction

if TYPE_CHECKING:
    from qblock.jobs.runner import JobRunner
    from qblock.system import BlockSystem

_SHARED_BY_WRITER: Final = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED


class CommitJob(ScanningJob):
    """See the module."""

    type: ClassVar[str] = "commit"
    ignored_is_skipped: ClassVar[bool] = False

    def __init__(
        self, runner: JobRunner, place: CommitPlace, request: CommitRequest, *, base_was_read_only: bool
    ) -> None:
        super().__init__(
            runner, request.job_id or "", request.on_error,
            auto_finalize=request.auto_finalize, auto_dismiss=request.auto_dismiss,
        )  # fmt: skip
        self.place = place
        self.request = request
        self.filter: CommitTop
        self._base_was_read_only = base_was_read_only
        self._read_only_again: list[BlockDriverState] = []
        graph, user = runner.graph, self.describe_user()
        self.reader = BlockBackend(graph, perm=Perm.NONE, shared=Perm.ALL, description=user)
        grows = Perm.RESIZE if place.base.length < place.top.length else Perm.NONE
        self.writer = BlockBackend(
            graph, perm=Perm.CONSISTENT_READ | Perm.WRITE | grows, shared=_SHARED_BY_WRITER, description=user
        )

    # --------------------------------------------------------------------------------------------------------- beginning

    def set_up(self, change: Transaction) -> None:
        """Insert the filter and take the nodes."""
        system, place, name = self.runner, self.place, self.request.filter_node_name
        graph = system.graph
        change.add(abort=partial(self._forget_backends))
        self.filter = system.opener.make_filter(
            CommitTop, DriverOptions(), node_name=name, above=place.top, implicit=name is None, change=change
        )
        node = self.filter.node
        node.read_only = True
        graph.append(node, onto=place.top, change=change, name="backing")
        # A stream that counted the filter among its layers would freeze the link that has to change at the end.
        token = block_all(node, f"it is in use by {self.describe_user()}")
        change.add(abort=partial(unblock, token))
        self.hold("main node", place.device, Perm.NONE, Perm.ALL, change=change)
        for layer in place.layers():
            self.hold("intermediate node", layer, Perm.NONE, place.shared_on(layer), change=change)
        self.hold("base", place.base, Perm.NONE, Perm.ALL, change=change)
        graph.freeze_chain(node, place.base)
        change.add(abort=partial(graph.unfreeze_chain, node, place.base))
        for backend, target in ((self.reader, place.top), (self.writer, place.base)):
            backend.disable_queuing = True
            backend.insert(target, change)

    def _forget_backends(self) -> None:
        for backend in (self.reader, self.writer):
            self.runner.graph.remove_backend(backend)

    # ----------------------------------------------------------------------------------------------------------- running

    async def run(self) -> None:
        """See the module."""
        top, base = self.place.top, self.place.base
        if (hit := self.runner.trace.commit_start) is not None:
            hit(node=top.node_name, base=base.node_name, job=self.id)
        if base.length < top.length:
            await self.writer.truncate(top.length)
        await self.scan(top.length)

    @property
    def stored_in(self) -> BlockDriverState:
        """See `ScanningJob`."""
        return self.place.base

    async def part_at(self, offset: int, end: int) -> Piece:
        """See `ScanningJob`: work is what the layers above the base hold."""
        extent = await requests.chain_status(self.place.top, offset, end - offset, base=self.place.base)
        if extent.present:
            part = Piece(offset, min(extent.length, MAX_ZEROES if extent.zero else STEP), zero=extent.zero)
        else:
            part = Piece(offset, extent.length, work=False)
        if (hit := self.runner.trace.commit_one_iteration) is not None:
            hit(job=self.id, offset=offset, length=part.length, allocated=part.work)
        return part

    async def fetch(self, part: Piece, buffer: memoryview) -> None:
        """See `ScanningJob`."""
        if not part.zero:
            await self.reader.read_into(part.offset, buffer)

    async def store(self, part: Piece, buffer: memoryview) -> None:
        """See `ScanningJob`."""
        if part.zero:
            await self.writer.write_zeroes(part.offset, part.length, may_unmap=True)
        else:
            await self.writer.write_from(part.offset, buffer)

    # ----------------------------------------------------------------------------------------------------------- endings

    async def settle(self) -> None:
        """See `Job`: nothing is under way above the layers that are to go."""
        if not self.drained_nodes:
            await self.drain(self.filter.node)

    async def prepare(self) -> None:
        """See `Job`: rewrite the links in the headers, then in the graph."""
        await requests.flush(self.place.base)
        link = link_to(self.place.base, text=self.request.backing_file)
        for overlay in _images_above(self.filter.node):
            await self._rewrite_link(overlay, link)
        await self.undisturbed()
        with Transaction() as change, self.runner.graph.deferred_permissions(change):
            if self.auto_dismiss:
                self.release(change)
            self._dismantle(change, below=self.place.base)

    async def _rewrite_link(self, overlay: BlockDriverState, link: BackingLink | None) -> None:
        if not isinstance(overlay.driver, SupportsBacking):
            return
        if overlay.read_only:
            self._read_only_again.append(overlay)
            await self.runner.opener.reopen(overlay, read_only=False)
        await overlay.driver.change_backing_link(link)

    def _dismantle(self, change: Transaction, *, below: BlockDriverState) -> None:
        """Take the filter out of the graph; what used it uses ``below`` instead."""
        graph, node = self.runner.graph, self.filter.node
        self._let_go_of_chain(change)
        graph.replace_node(node, below, change)
        graph.detach(self.filter.child, change)

    def abort(self) -> None:
        """See `Job`: the chain stays; what was written to the base is hidden by the layers above it.

        A filter without which somebody could not go on using a layer stays, too.
        """
        try:
            with Transaction() as change, self.runner.graph.deferred_permissions(change):
                self.release(change)
                self._dismantle(change, below=self.place.top)
        except PermissionConflict:  # a writer has come to a layer who may be there only below the filter
            with Transaction() as change:
                self.release(change)
                self._let_go_of_chain(change)

    def _let_go_of_chain(self, change: Transaction) -> None:
        """Give back the links of the chain and the backends that the job reads and writes with."""
        graph, node = self.runner.graph, self.filter.node
        graph.unfreeze_chain(node, self.place.base)
        change.add(abort=partial(graph.freeze_chain, node, self.place.base))
        self.reader.remove(change)
        self.writer.remove(change)

    def forgotten(self) -> None:
        """See `Job`: as in QEMU, one that has succeeded holds its nodes until it is dismissed."""
        if self.edges:
            with Transaction() as change:
                self.release(change)

    def clean(self) -> None:
        """See `Job`."""
        self.end_drain()
        self._forget_backends()

    async def afterwards(self) -> None:
        """See `Job`: what was read-only is so again; where that fails it stays writable, which changes nothing that is stored."""
        base = [self.place.base] if self._base_was_read_only else []
        for node in base + self._read_only_again:
            with contextlib.suppress(QBlockError, OSError):
                await self.runner.opener.reopen(node, read_only=True)


def _images_above(node: BlockDriverState) -> list[BlockDriverState]:
    """The images whose backing ``node`` is, directly or through filters."""
    found: dict[BlockDriverState, None] = {}
    pending = list(node.parents)
    while pending:
        edge = pending.pop(0)
        if not isinstance(edge.parent, BlockDriverState):
            continue
        if edge.role is ChildRole.BACKING:
            found[edge.parent] = None
        elif edge.role is ChildRole.FILTERED:
            pending += edge.parent.parents
    return list(found)


# ------------------------------------------------------------------------------------------------------------- starting


async def start_inner_commit(
    system: BlockSystem, find: Callable[[], CommitPlace], request: CommitRequest
) -> CommitJob:
    """Commit inner layers at the place that ``find`` gives, which raises when the command is refused; returns the running job.

    Raises `CommandError` and its kin, and then nothing has changed.
    """
    system.jobs.check_id(request.job_id or "")
    base = find().base
    was_read_only = base.read_only
    if was_read_only:
        await system.opener.reopen(base, read_only=False)
    try:
        async with drained(base):
            place = find()  # the graph may have changed while we waited
            if place.base is not base or place.is_active:
                raise CommandError(f"The chain of '{place.device.node_name}' has changed meanwhile: try again")
            job = _set_up(system, place, request, base_was_read_only=was_read_only)
    except BaseException:
        if was_read_only:
            await system.opener.reopen(base, read_only=True)
        raise
    system.jobs.start(job)
    await job.noticed()
    return job


def _set_up(
    system: BlockSystem, place: CommitPlace, request: CommitRequest, *, base_was_read_only: bool
) -> CommitJob:
    """Make the job and give it its nodes; all or nothing."""
    with Transaction() as change:
        job = CommitJob(system.jobs, place, request, base_was_read_only=base_was_read_only)
        system.jobs.create(job)
        change.add(abort=partial(system.jobs.abandon, job))
        with system.graph.deferred_permissions(change):  # or every layer would have all below it looked at
            job.set_up(change)
        job.set_speed(request.speed)
    return job
