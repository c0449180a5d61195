"""The stream job: copy data of the backing chain up into a device, then cut the chain short.

Models ``block-stream`` of QEMU 7.2 (semantics.md section 4.1). The layers between the device and ``base`` (exclusive) are
scanned; what a lower layer holds is copied in steps of 512 KiB, skipping costs nothing. At the end the header's backing link
is rewritten first, then the graph; a crash in between leaves an image that is complete either way. The chain down to the
lowest copied layer is frozen meanwhile, but not the link to ``base``: other jobs may work on what is below.

Differs from QEMU in what `scanning.py` tells.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

import attrs

from qblock import requests
from qblock.backend import BlockBackend
from qblock.blockers import OpType
from qblock.chain import chain_edge
from qblock.copying_down import Piece
from qblock.drain import drained, pause_above
from qblock.driver import BackingLink, SupportsBacking
from qblock.errors import CommandError, InvalidParameter, QBlockError
from qblock.jobs.scanning import STEP, ScanningJob
from qblock.jobs.state import OnError
from qblock.jobs.stream_top import StreamTop
from qblock.naming import link_to
from qblock.options import DriverOptions
from qblock.permissions import Perm
from qblock.transaction import Transaction

if TYPE_CHECKING:
    from qblock.jobs.runner import JobRunner
    from qblock.node import BlockDriverState
    from qblock.system import BlockSystem

_READ_WRITE_UNCHANGED: Final = Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED


@attrs.frozen(kw_only=True)
class StreamRequest:
    """The members of ``block-stream`` with QEMU's defaults; ``speed`` in bytes per second (0: unlimited).

    At most one of ``base`` (a file name), ``base_node`` and ``bottom`` (node names) may be given; ``backing_file`` is the
    text for the header.
    """

    job_id: str | None = None
    base: str | None = None
    base_node: str | None = None
    bottom: str | None = None
    backing_file: str | None = None
    speed: int = 0
    on_error: OnError = OnError.REPORT
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


class StreamJob(ScanningJob):
    """See the module. ``lowest`` is the last node whose data are copied, the device itself when there is nothing to do."""

    type: ClassVar[str] = "stream"
    ignored_is_skipped: ClassVar[bool] = True

    def __init__(
        self,
        runner: JobRunner,
        request: StreamRequest,
        *,
        filter_driver: StreamTop,
        lowest: BlockDriverState,
        was_read_only: bool,
    ) -> None:
        super().__init__(
            runner, request.job_id or "", request.on_error,
            auto_finalize=request.auto_finalize, auto_dismiss=request.auto_dismiss,
        )  # fmt: skip
        self.request = request
        self.filter = filter_driver
        self.reader = BlockBackend(
            runner.graph, perm=Perm.CONSISTENT_READ, shared=_READ_WRITE_UNCHANGED, description=self.describe_user()
        )
        """What keeps the data readable for the job while it lasts, though others may write."""
        self.device = filter_driver.child.node
        self.lowest = lowest
        self.was_read_only = was_read_only

    @property
    def base(self) -> BlockDriverState | None:
        """The node that is to be the new backing, as the graph is now."""
        edge = chain_edge(self.lowest)
        return edge.node if edge is not None else None

    # ------------------------------------------------------------------------------------------------------------ running

    async def run(self) -> None:
        """See the module."""
        if not self.has_work():
            return
        if (hit := self.runner.trace.stream_start) is not None:
            hit(node=self.device.node_name, base=self.base.node_name if self.base is not None else None, job=self.id)
        await self.scan(self.device.length)

    def has_work(self) -> bool:
        """Whether there is an image to copy from: filters that go along with their image hold nothing of their own."""
        image = self.runner.graph.skip_filters(self.device)
        below = False
        for layer in self.runner.graph.whole_chain(image):
            below = below or (layer is not image and not layer.driver.is_filter)
            if layer is self.lowest:
                return below
        return False

    @property
    def stored_in(self) -> BlockDriverState:
        """See `ScanningJob`."""
        return self.device

    async def part_at(self, offset: int, end: int) -> Piece:
        """See `ScanningJob`: work is what a layer below the device's image holds. Filters above that image are not asked."""
        image = self.runner.graph.skip_filters(self.device)
        extent = await requests.chain_status(image, offset, end - offset, base=self.base, want_zero=False)
        needed = extent.present and extent.depth > 0
        length = min(extent.length, STEP) if needed else extent.length
        if (hit := self.runner.trace.stream_one_iteration) is not None:
            hit(job=self.id, offset=offset, length=length, allocated=needed)
        return Piece(offset, length, needed)

    async def fetch(self, part: Piece, buffer: memoryview) -> None:
        """See `ScanningJob`: reading through the chain stores the part in the device."""
        await requests.copy_on_read_into(self.filter.child, part.offset, buffer)

    def others_at(self, layer: BlockDriverState) -> Perm:
        """What others may do to a layer that the job copies from or to."""
        return _READ_WRITE_UNCHANGED if layer is self.device else Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED

    # ---------------------------------------------------------------------------------------------------------- endings

    async def settle(self) -> None:
        """See `Job`: nothing is under way at the device."""
        if not self.drained_nodes:
            await self.drain(self.device)

    async def prepare(self) -> None:
        """See `Job`: rewrite the link in the header, then in the graph."""
        image = self.runner.graph.skip_filters(self.device)
        if image.backing is not None:
            await requests.flush(image)
            if isinstance(image.driver, SupportsBacking):
                await image.driver.change_backing_link(self._new_link())
            await self.undisturbed()
        with Transaction() as change, self.runner.graph.deferred_permissions(change):
            self._dismantle(change)
            if image.backing is not None:
                self.runner.graph.set_backing(image, self.base, change)

    def _new_link(self) -> BackingLink | None:
        base = self.base
        if base is None:
            return None
        return link_to(self.runner.graph.skip_filters(base), text=self.request.backing_file)

    def freeze(self, change: Transaction) -> None:
        """Forbid changes of the links that the job relies on."""
        graph = self.runner.graph
        graph.freeze_chain(self.filter.node, self.lowest)
        change.add(abort=partial(graph.unfreeze_chain, self.filter.node, self.lowest))

    def _dismantle(self, change: Transaction) -> None:
        """Take the job's parts out of the graph."""
        graph = self.runner.graph
        graph.unfreeze_chain(self.filter.node, self.lowest)
        change.add(abort=partial(graph.freeze_chain, self.filter.node, self.lowest))
        self.filter.retire(change)
        self.release(change)
        self.reader.remove(change)
        graph.drop(self.filter.node, change)

    def abort(self) -> None:
        """See `Job`: the chain stays; what was copied does no harm."""
        with Transaction() as change, self.runner.graph.deferred_permissions(change):
            self._dismantle(change)

    def clean(self) -> None:
        """See `Job`."""
        self.end_drain()
        self.runner.graph.remove_backend(self.reader)

    async def afterwards(self) -> None:
        """See `Job`: a device that was read-only is so again."""
        await pause_above(self.device, times=2 if self.error is not None else 3)
        if self.was_read_only:
            try:
                await self.runner.opener.reopen(self.device, read_only=True)
            except (QBlockError, OSError):
                return  # it stays writable, which changes nothing that is stored


# ------------------------------------------------------------------------------------------------------------- starting


async def start_stream(
    system: BlockSystem, *, device: str, request: StreamRequest, kind: type[StreamJob] = StreamJob
) -> StreamJob:
    """``block-stream``: copy what is between ``device`` (device or node name) and the base up; returns the running job.

    ``kind`` is the class of the job.
    Raises `CommandError` and its kin, and then nothing has changed.
    """
    graph = system.graph
    node = graph.lookup(device)
    _check(system, node, request)
    job_id = graph.device_name(node) if request.job_id is None else request.job_id
    request = attrs.evolve(request, job_id=job_id)
    was_read_only = node.read_only
    if was_read_only:
        await system.opener.reopen(node, read_only=False)
    try:
        job = await _set_up(system, node, kind, request, was_read_only=was_read_only)
    except BaseException:
        if was_read_only:
            await system.opener.reopen(node, read_only=True)
        raise
    system.jobs.start(job)
    await job.noticed()
    return job


def _check(system: BlockSystem, node: BlockDriverState, request: StreamRequest) -> BlockDriverState:
    """Check everything that can be checked without a change; returns the lowest node to copy from."""
    if request.base is not None and request.base_node is not None:
        raise CommandError("'base' and 'base-node' cannot be given together")
    if request.bottom is not None and (request.base is not None or request.base_node is not None):
        raise CommandError("'bottom' cannot be given together with 'base' or 'base-node'")
    lowest = _lowest(system, node, request)
    if request.backing_file is not None:
        if chain_edge(lowest) is None:
            raise InvalidParameter("backing-file", "makes no sense when the whole chain is streamed: nothing is left below")
        if request.bottom is not None:
            raise InvalidParameter("backing-file", "cannot be given together with 'bottom': name the base by 'base-node'")
    for layer in system.graph.whole_chain(node):
        system.graph.check_op(layer, OpType.STREAM)
        if layer is lowest:
            break
    return lowest


def _lowest(system: BlockSystem, node: BlockDriverState, request: StreamRequest) -> BlockDriverState:
    graph = system.graph
    base: BlockDriverState | None = None
    if request.base is not None:
        base = graph.find_backing_image(node, request.base)
        if base is None:
            raise CommandError(f"There is no '{request.base}' in the backing chain of '{node.node_name}'")
    elif request.base_node is not None:
        base = graph.find_node(request.base_node)
    elif request.bottom is not None:
        bottom = graph.find_node(request.bottom)
        if not graph.contains(node, bottom):
            raise CommandError(f"Node '{bottom.node_name}' is not in the backing chain of '{node.node_name}'")
        if bottom.driver.is_filter:
            raise InvalidParameter("bottom", f"cannot be '{bottom.node_name}': it is a filter")
        return bottom
    lowest = node
    for layer in graph.whole_chain(node):
        if layer is base:
            break
        lowest = layer
    else:
        if base is not None:
            raise CommandError(f"Node '{base.node_name}' is not a backing image of '{node.node_name}'")
    if base is not None and graph.skip_filters(base) is graph.skip_filters(node):
        raise CommandError(f"Node '{base.node_name}' is not a backing image of '{node.node_name}', but the same image")
    return lowest


async def _set_up(
    system: BlockSystem, node: BlockDriverState, kind: type[StreamJob], request: StreamRequest, *, was_read_only: bool
) -> StreamJob:
    """Insert the filter and give the job its nodes; all or nothing. As in QEMU only the former is a drained section."""
    name = request.filter_node_name
    with Transaction() as change:
        driver = system.opener.make_filter(
            StreamTop, DriverOptions(), node_name=name, above=node, implicit=name is None, change=change
        )
    try:
        with system.graph.holding([driver.node]):
            async with drained(node):
                lowest = _check(system, node, request)
                with Transaction() as change:
                    system.graph.append(driver.node, onto=node, change=change)
        job = kind(
            system.jobs, request,
            filter_driver=driver, lowest=lowest, was_read_only=was_read_only,
        )  # fmt: skip
        with Transaction() as change:
            _take_nodes(job, change)
    except BaseException:
        await _take_out(system, driver.node)
        raise
    return job


async def _take_out(system: BlockSystem, filter_node: BlockDriverState) -> None:
    """Take out a filter for which there is no job after all."""
    if filter_node.filtered is None:
        system.graph.remove_node(filter_node)
        return
    async with drained(filter_node.filtered.node):
        with Transaction() as change:
            system.graph.drop(filter_node, change)
    await system.opener.close_orphans()


def _take_nodes(job: StreamJob, change: Transaction) -> None:
    """List the job and give it what it works with."""
    system, top = job.runner, job.filter.node
    change.add(abort=partial(system.graph.remove_backend, job.reader))
    system.create(job)
    change.add(abort=partial(system.abandon, job))
    job.reader.insert(top, change)
    job.set_speed(job.request.speed)
    job.hold("main node", top, Perm.NONE, Perm.ALL, change=change)
    with system.graph.deferred_permissions(change):
        for layer in system.graph.whole_chain(job.device):
            name = "active node" if layer is job.device else "intermediate node"
            job.hold(name, layer, Perm.NONE, job.others_at(layer), change=change)
            if layer is job.lowest:
                break
    job.freeze(change)
