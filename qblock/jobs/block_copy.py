"""Live block copy: move a disk to another file while the guest runs, and switch to it without being asked.

Models the proposal of June 2011 (rfc-2012.md, "What it is compared with"): the first way to move a disk of a running guest,
before there were block jobs. A bulk pass copies everything (``-i``: what the top image holds; the base is shared), while the
dirty log notes what the guest writes; then passes over what the log has. When what remains can be copied within `PAUSE_NS`,
the guest's requests are held, the rest is copied and flushed, and the device continues on the target. **Nobody is asked and
nobody is told before**: that was the trouble with it. Management hears of the switch afterwards, if it still listens; when
both are killed around that moment, nothing in either file tells which one the guest wrote to last. `drive_reopen` with its
witness, and later READY and ``block-job-complete``, came of that.

A guest that writes faster than the copy reads cannot put the end off for ever: after `MAX_PASSES` passes over the log its
requests are held however much remains. That pause may be long; `BlockCopyJob.held_ns` says how long it was.

Differs from the proposal: it runs as a block job, so ``info block-jobs``, ``block_job_set_speed`` and ``block_job_cancel``
of one year later work on it (until the guest is running on the target), and it ends with BLOCK_JOB_COMPLETED or
BLOCK_JOB_CANCELLED; requests are held by a drained section instead of stopping the machine. Without a speed limit it begins
a tenth of a second after the command, so that ``block_job_set_speed`` can come first.
"""

from __future__ import annotations

import contextlib
import errno
import os.path
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

import attrs

from qblock import requests
from qblock.backend import BlockBackend
from qblock.blockers import OpType
from qblock.chain import skip_filters
from qblock.creating import create_image_file
from qblock.dirty import DirtyBitmap
from qblock.drain import drained
from qblock.driver import BackingLink, SupportsBacking
from qblock.errors import BlockIOError, CommandError, JobCancelled, NodeNotFound, QBlockError
from qblock.filenames import combine_filename, has_protocol
from qblock.jobs.copying import IO_FAILURES, SLICE_NS, io_error
from qblock.jobs.job import BlockJob
from qblock.jobs.state import OnError
from qblock.naming import format_of
from qblock.permissions import Perm
from qblock.status import FIRST_QUESTION, next_question
from qblock.transaction import Transaction
from qblock.units import MiB

if TYPE_CHECKING:
    from qblock.jobs.runner import JobRunner
    from qblock.node import BdrvChild, BlockDriverState
    from qblock.ranges import ByteRange
    from qblock.system import BlockSystem

CHUNK: Final = MiB
"""Bytes that one bit of the dirty log stands for (more where the target's clusters are larger)."""
PAUSE_NS: Final = 30_000_000
"""For how long the guest's requests may be held at the switch, as far as that can be foreseen."""
MAX_PASSES: Final = 10
"""Passes over the dirty log after which the requests are held whatever remains."""
_READ_WRITE_UNCHANGED: Final = Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED


@attrs.frozen(kw_only=True)
class CopyPlan:
    """What to copy: everything above ``base`` (None: all). ``blank``: the target reads as zeroes wherever nothing is copied.

    ``granularity`` is in bytes, a power of two.
    """

    base: BlockDriverState | None
    blank: bool
    granularity: int


@attrs.define
class _Pace:
    """How fast copying went lately: bytes and nanoseconds, sleeps not counted."""

    bytes: int = 0
    ns: int = 0

    def time_for(self, length: int) -> int:
        """Nanoseconds that ``length`` more bytes should take; 0 when nothing is known."""
        return length * self.ns // self.bytes if self.bytes else 0


class BlockCopyJob(BlockJob):
    """See the module. ``held_ns`` is how long requests were held at the switch, None before; ``passes`` counts those over the
    dirty log.
    """

    type: ClassVar[str] = "block-copy"

    def __init__(
        self, runner: JobRunner, job_id: str, plan: CopyPlan, *, source: BlockDriverState, target: BlockBackend
    ) -> None:
        super().__init__(runner, job_id)
        self.plan = plan
        self.source = source
        self.target = target
        self.bitmap = DirtyBitmap(source.length, plan.granularity)
        self.progress_remaining = source.length  # or a copy that has not begun would look as if it were done
        self.passes = 0
        self.held_ns: int | None = None
        self._pace = _Pace()
        self._replacement: BlockDriverState | None = None

    @property
    def _source_edge(self) -> BdrvChild:
        return self.edges[0]

    @property
    def _target_edge(self) -> BdrvChild:
        edge = self.target.root
        assert edge is not None
        return edge

    @property
    def _filename(self) -> str | None:
        return self._target_edge.node.driver.filename()

    # ------------------------------------------------------------------------------------------------------------ running

    async def run(self) -> None:
        """See the module."""
        if (hit := self.runner.trace.block_copy_start) is not None:
            incremental = self.plan.base is not None
            hit(job=self.id, node=self.source.node_name, filename=self._filename, incremental=incremental)
        if not self.speed:
            await self.sleep_ns(SLICE_NS)  # it has no argument for a speed: time for the command that sets one
        await self._find_what_to_copy()
        buffer = memoryview(bytearray(min(CHUNK, self.source.length)))
        await self._copy_dirty(buffer)
        while self._pace.time_for(self.bitmap.count) > PAUSE_NS and self.passes < MAX_PASSES:
            self.passes += 1
            await self._copy_dirty(buffer)
        await self._hold_and_copy_rest(buffer)

    async def _find_what_to_copy(self) -> None:
        if not self.plan.blank:
            self.bitmap.mark(0, self.source.length)
            return
        offset, question = 0, FIRST_QUESTION
        while offset < self.source.length:
            await self.pause_point()
            step = min(question, self.source.length - offset)
            allocated, count = await requests.is_allocated_above(self.source, self.plan.base, offset, step)
            if allocated:
                self.bitmap.mark(offset, count)
            offset += count
            question = next_question(question, count)

    async def _copy_dirty(self, buffer: memoryview) -> None:
        """One pass over the log, and a flush, so that the one in the pause has little to do."""
        self._pace = _Pace()
        cursor, delay = 0, 0
        self.progress_remaining = self.bitmap.count
        while (run := self.bitmap.next_dirty_range(cursor, max_length=self.plan.granularity)) is not None:
            await self.sleep_ns(delay)
            await self._copy(run, buffer)
            cursor, delay = run.end, self.limit.delay_ns(run.length)
        await self._flush_target()
        if (hit := self.runner.trace.block_copy_dirty) is not None:
            hit(job=self.id, dirty=self.bitmap.count)
        await self.sleep_ns(delay)

    async def _hold_and_copy_rest(self, buffer: memoryview) -> None:
        """What the guest notices of it all: returns with both sides drained and equal."""
        clock = self.runner.clock
        await self.drain(self.source, self._target_edge.node)
        held_since = clock.now_ns()
        self.progress_remaining = self.bitmap.count
        for run in self.bitmap.iterate(max_length=self.plan.granularity):
            await self.undisturbed()  # somebody else's section wants all requests to end, ours included
            if self.force_cancelled:
                raise JobCancelled
            await self._copy(run, buffer)
        await self._flush_target()
        self.held_ns = clock.now_ns() - held_since

    async def _copy(self, run: ByteRange, buffer: memoryview) -> None:
        """Copy a dirty run: clean first, then read, so that a write which races with this leaves its bit behind."""
        if (hit := self.runner.trace.block_copy_iteration) is not None:
            hit(job=self.id, offset=run.offset, length=run.length)
        self.bitmap.reset(run.offset, run.length)
        began = self.runner.clock.now_ns()
        offset = run.offset
        while offset < run.end:
            offset += await self._copy_piece(offset, run.end - offset, buffer)
        self._pace.bytes += run.length
        self._pace.ns += self.runner.clock.now_ns() - began
        self.progress_done += run.length
        self.progress_remaining = self.bitmap.count

    async def _copy_piece(self, offset: int, length: int, buffer: memoryview) -> int:
        """Copy up to ``length`` bytes, as zeroes where they read so; returns how many."""
        reading = True
        try:
            extent = await requests.chain_status(self.source, offset, length)
            if extent.zero:
                reading = False
                await requests.write_zeroes(self._target_edge, offset, extent.length)
                return extent.length
            piece = buffer[: extent.length]
            await requests.read_into(self._source_edge, offset, piece)
            reading = False
            await requests.write_from(self._target_edge, offset, piece)
            return len(piece)
        except IO_FAILURES as error:
            self.failed_request(io_error(error), OnError.REPORT, is_read=reading)
            raise

    async def _flush_target(self) -> None:
        try:
            await requests.flush(self._target_edge.node)
        except IO_FAILURES as error:
            self.failed_request(io_error(error), OnError.REPORT, is_read=False)
            raise

    # ---------------------------------------------------------------------------------------------------------- endings

    async def settle(self) -> None:
        """See `Job`: both sides at rest; a finished run has them drained already."""
        await self.drain(*(node for node in (self.source, self._target_edge.node) if node not in self.drained_nodes))

    async def prepare(self) -> None:
        """See `Job`: the switch, all or nothing."""
        if (hit := self.runner.trace.block_copy_switch) is not None:
            hit(job=self.id, filename=self._filename)
        self._replacement = self._target_edge.node
        with Transaction() as change, self.runner.graph.deferred_permissions(change):
            self._dismantle(change)
            if self.plan.base is not None:
                self.runner.graph.set_backing(self._replacement, self.plan.base, change)
            self.runner.graph.replace_node(self.source, self._replacement, change)

    def abort(self) -> None:
        """See `Job`: the device stays where it is; the target holds a part of the disk."""
        with Transaction() as change, self.runner.graph.deferred_permissions(change):
            self._dismantle(change)

    def _dismantle(self, change: Transaction) -> None:
        change.add(commit=partial(self.source.dirty_bitmaps.remove, self.bitmap))
        self.release(change)
        self.target.remove(change)

    async def afterwards(self) -> None:
        """See `Job`: what took the place of a read-only node is read-only too."""
        if self._replacement is not None and self.error is None and self.source.read_only:
            with contextlib.suppress(QBlockError, OSError):  # it stays writable, which changes nothing that is stored
                await self.runner.opener.reopen(self._replacement, read_only=True)

    def clean(self) -> None:
        """See `Job`."""
        self.end_drain()
        self.runner.graph.remove_backend(self.target)


# ------------------------------------------------------------------------------------------------------------- starting


async def start_block_copy(
    system: BlockSystem, *, device: str, filename: str, incremental: bool = False, speed: int = 0
) -> BlockCopyJob:
    """``block_copy``: begin to move ``device`` (a device's name, which the job goes by too) to ``filename``.

    A missing file is made in the source's format. An existing one is probed, must be of the source's size, and must have
    the source's backing file and nothing of its own when ``incremental``, no backing file otherwise. ``incremental`` copies
    the top image only, which is everything when there is no other. ``speed`` is in bytes per second, 0 for no limit.
    Raises `CommandError` and its kin; a file that was made stays then.
    """
    source = _source(system, device)
    base = system.graph.cow_node(source) if incremental else None
    node, made = await _open_target(system, filename, source, base)
    # The backend keeps the node alive while this waits for other things.
    backend = BlockBackend(system.graph, perm=Perm.NONE, shared=Perm.ALL)
    backend.insert(node)
    try:
        await _check_target(node, source, base, filename=filename)
        async with drained(source):
            if _source(system, device) is not source:
                raise CommandError(f"Device '{device}' has got another medium meanwhile")
            plan = CopyPlan(
                base=base,
                blank=base is not None or (made and node.driver.zero_initialised),
                granularity=max(CHUNK, node.driver.info().cluster_size),
            )
            job = _set_up(system, BlockCopyJob(system.jobs, device, plan, source=source, target=backend), speed)
    except BaseException:
        backend.close()
        await system.opener.close_orphans()
        raise
    system.jobs.start(job)
    await job.noticed()
    return job


def _source(system: BlockSystem, device: str) -> BlockDriverState:
    """The node of a device, which must be free for this."""
    node = system.graph.find_backend(device).root
    if node is None:
        raise CommandError(f"Device '{device}' has no medium")
    system.graph.check_op(node.node, OpType.MIRROR_SOURCE)
    if not system.graph.is_root(node.node):
        raise CommandError(f"The node of '{device}' is used by other nodes or jobs")
    system.jobs.check_id(device)
    return node.node


async def _open_target(
    system: BlockSystem, filename: str, source: BlockDriverState, base: BlockDriverState | None
) -> tuple[BlockDriverState, bool]:
    """The target's node without its backing, and whether its file was made for this."""
    try:
        return await system.opener.open_image(filename, read_only=False, backing=False), False
    except BlockIOError as error:
        if error.errno != errno.ENOENT:
            raise
    fmt = format_of(source)
    if base is not None and fmt == "raw":
        raise CommandError("A raw image cannot have a backing file; make the target yourself, or copy without -i")
    link = None if base is None else _link_to(skip_filters(base), overlay=filename)
    await create_image_file(system.opener, filename, fmt, size=source.length, backing=link, announce=system.announce)
    return await system.opener.open_image(filename, fmt=fmt, read_only=False, backing=False), True


async def _check_target(
    node: BlockDriverState, source: BlockDriverState, base: BlockDriverState | None, *, filename: str
) -> None:
    """Raise unless the image is one that this source can be copied to."""
    if node.length != source.length:
        raise CommandError(
            f"'{filename}' has {node.length} bytes and the device {source.length}: make the target the same size"
        )
    link = node.driver.backing_link() if isinstance(node.driver, SupportsBacking) else None
    if base is None:
        if link is not None:
            raise CommandError(f"'{filename}' has a backing file: for a full copy the target must not have one")
        return
    shared = skip_filters(base).driver.filename() or ""
    if link is None or not _same_file(combine_filename(node.driver.filename() or filename, link.filename), shared):
        raise CommandError(f"'{filename}' does not have the backing file of the device, which -i is to share")
    offset = 0
    while offset < node.length:
        allocated, count = await requests.is_allocated_above(node, None, offset, node.length - offset)
        if allocated:
            raise CommandError(f"'{filename}' holds data of its own at {offset}; for -i it must be empty")
        offset += count


def _link_to(image: BlockDriverState, *, overlay: str) -> BackingLink:
    """What the header of the new file ``overlay`` is to say of the image below it."""
    name = image.driver.filename()
    if name is None:
        raise NodeNotFound(image.node_name, detail="No file name for a header to name the backing node by:")
    if not (has_protocol(name) or _same_file(name, combine_filename(overlay, name))):
        name = os.path.abspath(name)  # a relative one would be looked for in the directory of the overlay
    return BackingLink(name, format_of(image))


def _same_file(name: str, other: str) -> bool:
    return os.path.realpath(name) == os.path.realpath(other)


def _set_up(system: BlockSystem, job: BlockCopyJob, speed: int) -> BlockCopyJob:
    """List the job and give it its nodes; all or nothing."""
    with Transaction() as change:
        system.jobs.create(job)
        change.add(abort=partial(system.jobs.abandon, job))
        job.set_speed(speed)
        job.hold("source", job.source, Perm.CONSISTENT_READ, _READ_WRITE_UNCHANGED, change=change)
        job.target.set_permissions(Perm.WRITE, Perm.WRITE_UNCHANGED, change)
        job.hold("target", job.target.node, Perm.NONE, Perm.ALL, change=change)
    job.source.dirty_bitmaps.append(job.bitmap)
    return job
