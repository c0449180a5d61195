"""The mirror job of April 2012, as it was proposed: one chunk at a time, and in sync when its offset equals its length.

Models the fourth patch of the series (rfc-2012.md, "Semantics of the seed's mirror"). How it goes:

- *First phase.* The disk is walked, and each chunk of 1 MiB is marked in which anything is allocated above the base. If that
  fails, the job fails (a literal copy of the proposal would go on).
- *Before it is in sync* the job clears the bit of one chunk, then reads the source and writes the target, then sleeps: as long
  as the speed limit says, and at least once around the loop, so that there is a moment without I/O of the job. A guest write
  sets its bit after it is done, so one that races with the copy leaves the bit behind. ``offset`` is the disk's length less
  what is dirty: it goes backwards when the guest writes faster than the job copies.
- *In sync* from the moment when nothing was dirty: ``offset`` becomes the length and stays there. No speed limit; the job
  sleeps 100 ms when all is clean and not at all otherwise. There is no event.
- *A cancel before* that ends the job as cancelled: the target is of no use. *A cancel after* it, whatever its force, drains
  the source, copies what is still dirty without sleeping, and ends with success: the target equals the source of that moment.

The target is opened without its backing file and ignores flushes; nobody else knows of it. No filter is put into the graph: the
dirty bitmap lies on the image that the device's filters, if any, lead to, so no writer escapes it.

Differs from the proposal: at a successful end the target is made durable, once, since COMPLETED would otherwise promise a copy
that a power cut could take back; an existing target of a full copy is not taken to be empty where the source is; and with
``full`` false chunks are widened to the clusters of the target, which would be completed with zeroes instead of backing data.
"""

from __future__ import annotations

import enum
import os.path
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

import attrs

from qblock import requests
from qblock.blockers import OpType
from qblock.creating import create_image_file
from qblock.device_dirty import CHUNK, DeviceDirty
from qblock.drain import drained
from qblock.driver import BackingLink, SupportsBacking
from qblock.errors import CommandError, DeviceInUse, DeviceNotFound, InvalidParameter, NodeNotFound
from qblock.filenames import has_protocol
from qblock.jobs.copying import SLICE_NS, BufferPool
from qblock.jobs.job import BlockJob
from qblock.naming import format_of
from qblock.permissions import Perm
from qblock.status import FIRST_QUESTION, next_question
from qblock.transaction import Transaction
from qblock.units import align_down

if TYPE_CHECKING:
    from qblock.jobs.runner import JobRunner
    from qblock.jobs.txn import JobTransaction
    from qblock.node import BdrvChild, BlockDriverState
    from qblock.system import BlockSystem

_OTHERS_AT_SOURCE: Final = Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED
_OTHERS_AT_TARGET: Final = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED


class Mode2012(enum.Enum):
    """Whether ``drive-mirror`` makes its target; the values are the wire names."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


@attrs.frozen(kw_only=True)
class Target2012:
    """Where the copy goes. Without ``format`` a new image gets the source's, an existing one is probed."""

    filename: str
    format: str | None = None
    mode: Mode2012 = Mode2012.ABSOLUTE_PATHS


class Mirror2012Job(BlockJob):
    """See the module. ``base`` is the first layer that is not copied; None: everything is, ``full``. Lengths are bytes.

    ``existing``: the target was there before the job, and may hold anything. ``synced`` from when the two sides were first
    equal.
    """

    type: ClassVar[str] = "mirror"

    def __init__(
        self,
        runner: JobRunner,
        job_id: str,
        *,
        source: BlockDriverState,
        target: BlockDriverState,
        base: BlockDriverState | None,
        existing: bool,
    ) -> None:
        super().__init__(runner, job_id)
        self.source = source
        self.target = target
        self.base = base
        self.existing = existing
        self.image = runner.graph.skip_filters(source)
        self.length = source.length
        self.dirty = DeviceDirty(self.length)
        self.synced = False
        self.progress_remaining = self.length  # or a job that has not begun would look as if it were in sync
        cluster = target.driver.info().cluster_size
        self._unit = CHUNK if base is None else max(CHUNK, cluster)
        self._position = -1

    # -------------------------------------------------------------------------------------------------- set up and undone

    def take_nodes(self, change: Transaction) -> None:
        """Hold source and target, and begin to note the source's changes; raises when permissions conflict."""
        self.hold("source", self.source, Perm.CONSISTENT_READ, _OTHERS_AT_SOURCE, change=change)
        if self.image is not self.source:
            self.hold("image", self.image, Perm.NONE, _OTHERS_AT_SOURCE, change=change)
        self.hold("target", self.target, Perm.WRITE, _OTHERS_AT_TARGET, change=change)
        self.image.dirty_bitmaps.append(self.dirty.bitmap)
        change.add(abort=partial(self.image.dirty_bitmaps.remove, self.dirty.bitmap))

    async def give_up(self) -> None:
        """Undo `prepare_mirror_2012` of a job that has not been started. A target that was made stays as a file."""
        self.runner.abandon(self)
        self.clean()
        await self.runner.opener.close_orphans()

    def clean(self) -> None:
        """See `Job`."""
        self.image.dirty_bitmaps.remove(self.dirty.bitmap)
        with Transaction() as change:
            self.release(change)
        self.end_drain()

    # -------------------------------------------------------------------------------------------------------------- verbs

    def cancelling(self, *, force: bool) -> bool:
        """In sync no cancel is forced: the two sides are left equal."""
        return not self.synced

    # ------------------------------------------------------------------------------------------------------------ running

    async def run(self) -> None:
        """See the module."""
        if (hit := self.runner.trace.mirror_start) is not None:
            hit(node=self.source.node_name, job=self.id)
        buffers = BufferPool(self._unit, piece=self._unit)
        buffer = buffers.take()
        try:
            await self._find_what_to_copy()
            while not (self.synced and self.cancel_requested):
                delay = await self._one_iteration(buffer)
                if not (self.synced and self.cancel_requested):
                    if (hit := self.runner.trace.mirror_before_sleep) is not None:
                        hit(job=self.id, dirty=self.dirty.count, synced=self.synced, delay_ns=delay)
                    await self.sleep_ns(delay)
            await self._finish(buffer)
        finally:
            buffers.give(buffer)
            buffers.close()

    async def _find_what_to_copy(self) -> None:
        """The first phase. Long runs are asked about at once, with the result of asking chunk by chunk."""
        offset, question = 0, FIRST_QUESTION
        while offset < self.length:
            await self.pause_point()
            step = min(question, self.length - offset)
            allocated, count = await requests.is_allocated_above(self.source, self.base, offset, step)
            if allocated or not await self._is_absent_from_target(offset, count):
                self.dirty.set(offset, count)
            offset += count
            question = next_question(question, count)

    async def _is_absent_from_target(self, offset: int, length: int) -> bool:
        """Whether the target shows nothing of its own in a range that the source's layers do not hold."""
        if not self.existing or self.base is not None:
            return True
        driver = self.target.driver
        if isinstance(driver, SupportsBacking) and driver.backing_link() is not None:
            return False
        return await requests.is_zero(self.target, offset, length)

    async def _one_iteration(self, buffer: memoryview) -> int:
        """Copy a chunk, if there is a dirty one; returns for how many nanoseconds to sleep."""
        dirty = self.dirty.count
        if not dirty:
            self.synced = True
        self._show(dirty)
        copied = await self._copy_next_chunk(buffer) if dirty else 0
        if self.synced:
            return 0 if self.dirty.count else SLICE_NS
        # The last chunk does not count as done before the next look: offset must not equal the length too early.
        self._show(self.dirty.count or copied)
        return self.limit.delay_ns(copied)

    def _show(self, dirty: int) -> None:
        """Let the progress tell how many bytes are dirty, or that the job is in sync."""
        self.progress_remaining = 0 if self.synced else dirty
        self.progress_done = self.length - self.progress_remaining

    async def _copy_next_chunk(self, buffer: memoryview) -> int:
        """Copy the next dirty chunk behind the last one; returns its length."""
        found = self.dirty.get_next(self._position)
        assert found is not None
        start = align_down(found, self._unit)
        length = min(self._unit, self.length - start)
        self._position = start + length - 1
        if (hit := self.runner.trace.mirror_one_iteration) is not None:
            hit(job=self.id, offset=start, length=length)
        self.dirty.reset(start, length)  # then read: a write that is done later leaves its bit behind
        await requests.read_into(self._edge(self.source), start, buffer[:length])
        await requests.write_from(self._edge(self.target), start, buffer[:length])
        return length

    async def _finish(self, buffer: memoryview) -> None:
        """Told to end when in sync: make the two sides equal while nobody writes. The source stays drained until `clean`."""
        await self.pause_point()
        if (hit := self.runner.trace.mirror_before_drain) is not None:
            hit(job=self.id, dirty=self.dirty.count)
        await self.drain(self.image)
        while self.dirty.count:
            await self._copy_next_chunk(buffer)
        await self._make_durable()

    async def _make_durable(self) -> None:
        if (hit := self.runner.trace.mirror_before_flush) is not None:
            hit(job=self.id)
        node: BlockDriverState | None = self.target
        while node is not None:
            node.cache_no_flush = False
            node = None if node.storage is None else node.storage.node
        await requests.flush(self.target)

    def _edge(self, node: BlockDriverState) -> BdrvChild:
        return next(edge for edge in self.edges if edge.node is node)


# ------------------------------------------------------------------------------------------------------------- starting


async def start_mirror_2012(
    system: BlockSystem,
    *,
    device: str,
    target: Target2012,
    full: bool,
    speed: int = 0,
    txn: JobTransaction | None = None,
) -> Mirror2012Job:
    """``drive-mirror`` of the proposal: mirror ``device`` (device or root node name); returns the running job.

    ``speed`` is in bytes per second, 0 for no limit. Raises as `prepare_mirror_2012`.
    """
    job = await prepare_mirror_2012(system, device=device, target=target, full=full, speed=speed, txn=txn)
    system.jobs.start(job)
    await job.noticed()
    return job


async def prepare_mirror_2012(
    system: BlockSystem,
    *,
    device: str,
    target: Target2012,
    full: bool,
    speed: int = 0,
    txn: JobTransaction | None = None,
) -> Mirror2012Job:
    """All that can fail before the job runs: checks, the target made and opened, its nodes held and watched.

    The job must then be given to ``system.jobs.start``, or its `Mirror2012Job.give_up` be awaited. Raises `DeviceNotFound`,
    `NodeBusy`, `CommandError` and its kin, and what making and opening the target raise; then only the file may stay.
    """
    if speed < 0:
        raise InvalidParameter("speed", f"cannot be negative ({speed}); 0 means unlimited")
    source = _source(system, device)
    job_id = system.graph.device_name(source) or source.node_name
    system.jobs.check_id(job_id)
    below = system.graph.cow_node(source)
    base = None if full else below
    fmt, existing = target.format, target.mode is Mode2012.EXISTING
    if not existing:
        fmt = fmt or format_of(system.graph.skip_filters(source))
        await _create(system, target.filename, fmt, size=source.length, backing=base)
    node = await system.opener.open_image(
        target.filename, fmt=fmt, read_only=False, backing=False, options={"cache": {"no-flush": True}}
    )
    node.monitor_owned = True  # until the job holds it
    try:
        async with drained(source):  # a write under way now would not know of the bitmap when it ends
            if _source(system, device) is not source or system.graph.cow_node(source) is not below:
                raise DeviceInUse(device, "its images have changed meanwhile")
            if node.length != source.length:
                raise CommandError(
                    f"'{device}' has {source.length} bytes and the target {node.length}: make the target the same size"
                )
            with Transaction() as change:
                job = Mirror2012Job(system.jobs, job_id, source=source, target=node, base=base, existing=existing)
                system.jobs.create(job, txn)
                change.add(abort=partial(system.jobs.abandon, job))
                job.set_speed(speed)
                job.take_nodes(change)
    except BaseException:
        node.monitor_owned = False
        await system.opener.close_orphans()
        raise
    node.monitor_owned = False
    return job


def _source(system: BlockSystem, device: str) -> BlockDriverState:
    """The node that ``device`` means, which nobody but devices uses; raises `DeviceNotFound` and `NodeBusy`."""
    graph = system.graph
    try:
        node = graph.lookup(device)
    except NodeNotFound as error:
        raise DeviceNotFound(device) from error
    graph.check_op(node, OpType.MIRROR_SOURCE)
    if not graph.is_root(node):
        raise DeviceInUse(device, "it is a part of another device")
    return node


async def _create(system: BlockSystem, filename: str, fmt: str, *, size: int, backing: BlockDriverState | None) -> None:
    """Make the target; its header names the image of ``backing``, if there is one, by its absolute path."""
    link = None
    if backing is not None:
        image = system.graph.skip_filters(backing)
        name = image.driver.filename()
        if name is None:
            raise CommandError(f"Node '{image.node_name}' has no file name for the new image's header; copy it in full")
        if not system.registry.get(fmt).supports_backing:
            raise CommandError(f"Images of format '{fmt}' cannot have a backing file; choose another, or copy in full")
        link = BackingLink(name if has_protocol(name) else os.path.abspath(name), format_of(image))
    await create_image_file(system.opener, filename, fmt, size=size, backing=link, announce=system.announce)
