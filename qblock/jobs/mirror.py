"""Starting a mirror: everything that ``blockdev-mirror`` and ``drive-mirror`` check and set up before the job runs.

Models the two commands of QEMU 7.2 (semantics.md section 4.4) with their order of checks: arguments, blockers, ``replaces``,
the filter, then the job. What fails once the job is listed (a negative speed, a target that cannot be written) shows as
created and null. Differs from QEMU: the job id is checked before the filter is inserted. The job is in `mirror_job.py`.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, ClassVar, Final

import attrs

from qblock.backend import BlockBackend
from qblock.blockers import OpType
from qblock.chain import check_root, may_be_replaced
from qblock.drain import drained
from qblock.errors import CommandError, InvalidParameter
from qblock.jobs.mirror_job import MirrorJob
from qblock.jobs.mirror_plan import BackingAtEnd, MirrorPlan
from qblock.jobs.mirror_top import MirrorTop
from qblock.jobs.new_copy import SyncMode, TargetFile, make_target
from qblock.jobs.state import OnError
from qblock.node import BlockDriverState
from qblock.nodespec import NodeFlags
from qblock.options import DriverOptions
from qblock.permissions import Perm, PermissionPair
from qblock.transaction import Transaction
from qblock.units import KiB, MiB, align_up, is_power_of_two

if TYPE_CHECKING:
    from qblock.jobs.txn import JobTransaction
    from qblock.system import BlockSystem

MIN_GRANULARITY: Final = 512
MAX_GRANULARITY: Final = 64 * MiB
DEFAULT_BUF_SIZE: Final = 16 * MiB
_DEFAULT_GRANULARITY: Final = (4 * KiB, 64 * KiB)
_MAX_BUF_SIZE: Final = (1 << 31) - 1
_READ_WRITE_UNCHANGED: Final = Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED


class CopyMode(enum.Enum):
    """When guest writes reach the target, as ``MirrorCopyMode`` on the wire; ``semi-sync`` is ours (`mirror_semisync`)."""

    BACKGROUND = "background"
    WRITE_BLOCKING = "write-blocking"
    SEMI_SYNC = "semi-sync"


@attrs.frozen(kw_only=True)
class MirrorRequest:
    """The members that both commands have, with QEMU's defaults. ``granularity`` and ``buf_size`` in bytes (0: default),
    ``speed`` in bytes per second (0: unlimited). Without ``job_id`` the name of the source's device is taken.
    """

    sync: SyncMode
    job_id: str | None = None
    replaces: str | None = None
    speed: int = 0
    granularity: int = 0
    buf_size: int = 0
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    copy_mode: CopyMode = CopyMode.BACKGROUND
    filter_node_name: str | None = None
    unmap: bool = True
    auto_finalize: bool = True
    auto_dismiss: bool = True


async def start_blockdev_mirror(
    system: BlockSystem, *, device: str, target: str, request: MirrorRequest
) -> MirrorJob:
    """``blockdev-mirror``: mirror ``device`` (device or node name) to the node ``target``; returns the running job.

    Raises `CommandError` and its kin, and then nothing has changed.
    """
    return await (await prepare_blockdev_mirror(system, device=device, target=target, request=request)).run()


async def start_drive_mirror(
    system: BlockSystem, *, device: str, target: TargetFile, request: MirrorRequest
) -> MirrorJob:
    """``drive-mirror``: mirror ``device`` to a file, which is made first unless it exists; returns the running job.

    The file is made before most members are checked, as in QEMU: a refused command may leave it.
    """
    return await (await prepare_drive_mirror(system, device=device, target=target, request=request)).run()


async def prepare_blockdev_mirror(
    system: BlockSystem, *, device: str, target: str, request: MirrorRequest, txn: JobTransaction | None = None
) -> PreparedMirror:
    """All of `start_blockdev_mirror` that can fail; ``txn`` is the group that the job is to join, None for its own."""
    source, node = root_node(system, device), system.graph.lookup(target)
    backend = BlockBackend(system.graph, perm=Perm.NONE, shared=Perm.ALL)
    mirror = PreparedMirror(system, source, backend, request, zero_target=request.sync is SyncMode.FULL, txn=txn)
    await mirror.prepare(node)
    return mirror


async def prepare_drive_mirror(
    system: BlockSystem, *, device: str, target: TargetFile, request: MirrorRequest, txn: JobTransaction | None = None
) -> PreparedMirror:
    """All of `start_drive_mirror` that can fail; ``txn`` is the group that the job is to join, None for its own."""
    graph = system.graph
    source = root_node(system, device)
    if request.replaces is not None and target.node_name is None:
        raise InvalidParameter("node-name", "is needed when the target is to replace a named node of the graph")
    graph.check_op(source, OpType.MIRROR_SOURCE)
    below = graph.cow_node(source)
    full = request.sync is SyncMode.FULL or (request.sync is SyncMode.TOP and below is None)
    layer_below = source if request.sync is SyncMode.NONE else None if full else below
    fmt = await make_target(system, target, source, backing=layer_below)
    node = await system.opener.open_image(
        target.filename, fmt=fmt, read_only=False, backing=False, node_name=target.node_name,
        inherited=NodeFlags.of(source).for_another(),
    )  # fmt: skip
    # The backend keeps the node alive while this waits for other things.
    backend = BlockBackend(graph, perm=Perm.NONE, shared=Perm.ALL)
    backend.insert(node)
    mirror = PreparedMirror(
        system, source, backend, request, txn=txn,
        zero_target=full and not (target.is_made and node.driver.zero_initialised),
        backing_at_end=BackingAtEnd.SOURCE_CHAIN if target.is_made else BackingAtEnd.HEADER,
        backing_node=layer_below,
    )  # fmt: skip
    await mirror.prepare(node)
    return mirror


def root_node(system: BlockSystem, device: str) -> BlockDriverState:
    """The node that ``device`` (device or node name) means, which must have no users but block backends."""
    node = system.graph.lookup(device)
    check_root(node, device)
    return node


@attrs.define(eq=False)
class PreparedMirror:
    """A mirror on its way to a running job: `prepare` it, then `start` it or `give_up`. ``backend`` holds the target."""

    within_chain: ClassVar[bool] = False
    """Whether the target is a layer of the source's own chain, see `MirrorTop`."""

    system: BlockSystem
    source: BlockDriverState
    backend: BlockBackend
    request: MirrorRequest
    zero_target: bool
    backing_at_end: BackingAtEnd = BackingAtEnd.KEEP
    backing_node: BlockDriverState | None = None
    txn: JobTransaction | None = None
    job_id: str = attrs.field(init=False)
    job: MirrorJob = attrs.field(init=False)
    _change: Transaction = attrs.field(factory=Transaction, init=False)
    _is_complete: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        # Asked for now: once the filter is in, the source has no device any more.
        given = self.request.job_id
        self.job_id = self.system.graph.device_name(self.source) if given is None else given

    async def prepare(self, target: BlockDriverState) -> None:
        """Check and set up, undoably; when that fails all is as before, and a target that nobody uses is closed.

        The source must stay at rest from now until `start`: in a drained section, or because nothing waits in between.
        """
        try:
            self._check(target)
            async with drained(self.source):
                self._check(target)  # the graph may have changed while we waited
                self._set_up(target, self._change)
        except BaseException:
            await self.give_up()
            raise
        self._is_complete = True

    def start(self) -> MirrorJob:
        """Let the prepared job run; cannot fail."""
        self._change.commit()
        self.job.begin_watching()
        self.system.jobs.start(self.job)
        return self.job

    async def run(self) -> MirrorJob:
        """Let the prepared job run up to where it first rests."""
        job = self.start()
        await job.noticed()
        return job

    async def give_up(self) -> None:
        """Undo `prepare`; a file that was made stays."""
        self._change.abort()
        self.backend.close()
        await self.system.opener.close_orphans()

    def _check(self, target: BlockDriverState) -> None:
        graph, request = self.system.graph, self.request
        _check_sizes(request)
        graph.check_op(self.source, OpType.MIRROR_SOURCE)
        graph.check_op(target, OpType.MIRROR_TARGET)
        if request.replaces is not None:
            check_replaces(self.system, self.source, request.replaces)
        if request.sync in (SyncMode.INCREMENTAL, SyncMode.BITMAP):
            raise InvalidParameter("sync", f"cannot be '{request.sync.value}': mirror copies full, top or none")
        if request.buf_size < 0:
            raise InvalidParameter("buf-size", f"cannot be negative ({request.buf_size})")
        if graph.skip_filters(self.source) is graph.skip_filters(target):
            raise CommandError(f"Node '{self.source.node_name}' cannot be mirrored into itself")
        self.system.jobs.check_id(self.job_id)

    def _plan(self, target: BlockDriverState) -> MirrorPlan:
        graph, request = self.system.graph, self.request
        cluster = target.driver.info().cluster_size
        smallest, largest = _DEFAULT_GRANULARITY
        granularity = request.granularity or (min(max(cluster, smallest), largest) if cluster else largest)
        shown = graph.skip_implicit(self.source)
        replaces = shown.node_name if request.replaces is None and shown is not self.source else request.replaces
        base = graph.cow_node(self.source) if request.sync is SyncMode.TOP else None
        layered = request.sync is SyncMode.NONE or base is not None
        return MirrorPlan(
            scan=request.sync is not SyncMode.NONE,
            base=base,
            granularity=granularity,
            buf_size=align_up(min(request.buf_size or DEFAULT_BUF_SIZE, _MAX_BUF_SIZE), granularity),
            on_source_error=request.on_source_error,
            on_target_error=request.on_target_error,
            unmap=request.unmap,
            write_blocking=request.copy_mode is CopyMode.WRITE_BLOCKING,
            semi_sync=request.copy_mode is CopyMode.SEMI_SYNC,
            zero_target=self.zero_target,
            unit=max(cluster, 1) if layered and target.backing is None else 1,
            backing_at_end=self.backing_at_end,
            backing_node=self.backing_node,
            replaces=replaces,
        )

    def _make_job(self, driver: MirrorTop, plan: MirrorPlan) -> MirrorJob:
        request = self.request
        return MirrorJob(
            self.system.jobs, self.job_id, plan, filter_driver=driver, target=self.backend,
            auto_finalize=request.auto_finalize, auto_dismiss=request.auto_dismiss,
        )  # fmt: skip

    def _target_permissions(self, target: BlockDriverState) -> PermissionPair:
        """What the job takes and shares on its target."""
        return PermissionPair(Perm.WRITE, Perm.WRITE_UNCHANGED)

    def _set_up(self, target: BlockDriverState, change: Transaction) -> None:
        """Insert the filter and give the job its nodes."""
        driver = self._insert_filter(change)
        job = self.job = self._make_job(driver, self._plan(target))
        self.system.jobs.create(job, self.txn)
        change.add(abort=self._forget_job)
        job.set_speed(self.request.speed)
        job.hold("main node", driver.node, Perm.CONSISTENT_READ, _READ_WRITE_UNCHANGED, change=change)
        self.backend.set_permissions(*self._target_permissions(target), change)
        if self.backend.root is None:
            self.backend.insert(target, change)
        self.backend.disable_queuing = True
        job.hold("source", self.source, Perm.NONE, _READ_WRITE_UNCHANGED, change=change)
        job.hold("target", target, Perm.NONE, Perm.ALL, change=change)

    def _forget_job(self) -> None:
        self.system.jobs.abandon(self.job, cancelled=self._is_complete)

    def _insert_filter(self, change: Transaction) -> MirrorTop:
        name = self.request.filter_node_name
        driver = self.system.opener.make_filter(
            MirrorTop, DriverOptions(), node_name=name, above=self.source, implicit=name is None, change=change
        )
        driver.node.read_only = False  # whatever the source: the filter itself has nothing to write
        driver.within_chain = self.within_chain
        self.system.graph.append(driver.node, onto=self.source, change=change, name="backing")
        return driver


def _check_sizes(request: MirrorRequest) -> None:
    granularity = request.granularity
    if granularity and not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY:
        raise InvalidParameter("granularity", f"must be from 512 bytes to 64 MiB, not {granularity}")
    if granularity and not is_power_of_two(granularity):
        raise InvalidParameter("granularity", f"must be a power of two, not {granularity}")


def check_replaces(system: BlockSystem, source: BlockDriverState, name: str) -> None:
    """Raise unless a copy of ``source`` may take the place of the node ``name``."""
    wanted = system.graph.find_node(name)
    if not may_be_replaced(source, wanted):
        raise CommandError(
            f"Node '{name}' cannot be replaced by a copy of '{source.node_name}': somebody could see other data then"
        )
    if wanted.length != source.length:
        raise CommandError(f"Node '{name}' cannot be replaced: its size differs from that of '{source.node_name}'")
