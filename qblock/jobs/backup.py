"""Starting a backup: everything that ``blockdev-backup`` and ``drive-backup`` check and set up before the job runs.

Models the two commands of QEMU 7.2 (semantics.md section 4.5). Both are actions of a transaction (`actions.backups`), so what is
here can be undone until it is started. The job is in `backup_job.py`, what the filter does in `drivers.copy_before_write`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import attrs

from qblock.bitmaps import BitmapUse, bitmap_of, check_use, freeze, reclaim
from qblock.blockers import OpType
from qblock.dirty import DirtyBitmap
from qblock.drivers.copy_before_write import CopyBeforeWriteDriver, filter_options
from qblock.errors import CommandError, InvalidParameter
from qblock.jobs.backup_job import BackupJob
from qblock.jobs.backup_plan import BackupPlan, BitmapMode
from qblock.jobs.new_copy import SyncMode, TargetFile, make_target
from qblock.jobs.state import OnError
from qblock.node import BlockDriverState
from qblock.nodespec import NodeFlags
from qblock.permissions import ChildRole, Perm
from qblock.transaction import Transaction
from qblock.units import align_down

if TYPE_CHECKING:
    from qblock.jobs.txn import JobTransaction
    from qblock.system import BlockSystem

DEFAULT_WORKERS: Final = 64
_MAX_INT: Final = (1 << 31) - 1
_WITH_BITMAP: Final = (SyncMode.INCREMENTAL, SyncMode.BITMAP)


@attrs.frozen(kw_only=True)
class Performance:
    """``BackupPerf``: ``max_chunk`` in bytes, 0 for no limit."""

    use_copy_range: bool = False
    max_workers: int = DEFAULT_WORKERS
    max_chunk: int = 0


@attrs.frozen(kw_only=True)
class BackupRequest:
    """The members that both commands have, with QEMU's defaults. ``speed`` in bytes per second (0: unlimited). Without
    ``job_id`` the name of the source's device is taken.
    """

    sync: SyncMode
    job_id: str | None = None
    speed: int = 0
    bitmap: str | None = None
    bitmap_mode: BitmapMode | None = None
    compress: bool = False
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    filter_node_name: str | None = None
    performance: Performance = Performance()
    auto_finalize: bool = True
    auto_dismiss: bool = True


async def prepare_blockdev_backup(
    system: BlockSystem, *, source: BlockDriverState, target: str, request: BackupRequest, txn: JobTransaction | None
) -> PreparedBackup:
    """Set up a backup to the device or node ``target``, undoably. ``source`` must stay at rest from before this until the
    backup is started or given up. ``txn`` is the group that the job is to join, None for its own.
    """
    backup = PreparedBackup(system, source, system.graph.lookup(target), request, txn=txn)
    backup.prepare()
    return backup


async def prepare_drive_backup(
    system: BlockSystem,
    *,
    source: BlockDriverState,
    target: TargetFile,
    request: BackupRequest,
    txn: JobTransaction | None,
) -> PreparedBackup:
    """Set up a backup to a file, which is made first unless it exists; otherwise as `prepare_blockdev_backup`.

    The file is made before most members are checked, as in QEMU: a refused command may leave it.
    """
    graph, sync = system.graph, request.sync
    graph.check_op(source, OpType.BACKUP_SOURCE)
    below = graph.cow_node(source)
    if sync is SyncMode.TOP and below is None:
        sync = SyncMode.FULL
    layer_below = {SyncMode.TOP: below, SyncMode.NONE: source}.get(sync)
    fmt = await make_target(system, target, source, backing=layer_below)
    node = await system.opener.open_image(
        target.filename, fmt=fmt, read_only=False, backing=sync is not SyncMode.NONE, node_name=target.node_name,
        options={"discard": "unmap", "detect-zeroes": "unmap"},
        inherited=NodeFlags.of(source).for_another(),
    )  # fmt: skip
    node.monitor_owned = True  # until the filter has it
    backup = PreparedBackup(system, source, node, attrs.evolve(request, sync=sync), txn=txn)
    try:
        if sync is SyncMode.NONE:
            with Transaction() as change:
                graph.set_backing(node, source, change)
        backup.prepare()
    finally:
        node.monitor_owned = False
        await system.opener.close_orphans()
    return backup


@attrs.define(eq=False)
class PreparedBackup:
    """A backup on its way to a running job: `prepare` it, then `start` it or `give_up`."""

    system: BlockSystem
    source: BlockDriverState
    target: BlockDriverState
    request: BackupRequest
    txn: JobTransaction | None = None
    job: BackupJob = attrs.field(init=False)
    _change: Transaction = attrs.field(factory=Transaction, init=False)
    _is_complete: bool = attrs.field(default=False, init=False)

    def prepare(self) -> None:
        """Check and set up; when that fails all is as before."""
        try:
            self._set_up(self._check())
        except BaseException:
            self._change.abort()
            raise
        self._is_complete = True

    def start(self) -> BackupJob:
        """Let the prepared job run; cannot fail."""
        self._change.commit()
        self.system.jobs.start(self.job)
        return self.job

    async def give_up(self) -> None:
        """Undo `prepare`; a file that was made stays."""
        self._change.abort()
        await self.system.opener.close_orphans()

    # ------------------------------------------------------------------------------------------------------- checking

    def _check(self) -> BackupPlan:
        request, graph, target = self.request, self.system.graph, self.target
        mode = _bitmap_mode(request)
        bitmap = None
        if request.bitmap is not None:
            bitmap = bitmap_of(self.source, request.bitmap)
            check_use(bitmap, BitmapUse.READ if mode is BitmapMode.NEVER else BitmapUse.CHANGE)
        if self.source is target:
            raise CommandError(f"Node '{target.node_name}' cannot be backed up to itself")
        if request.compress and not target.driver.supports_compressed:
            raise InvalidParameter("compress", f"is not possible with the format of the target, {target.driver.name}")
        graph.check_op(self.source, OpType.BACKUP_SOURCE)
        graph.check_op(target, OpType.BACKUP_TARGET)
        _check_performance(request.performance)
        if self.source.length != target.length:
            raise CommandError(
                f"The source has {self.source.length} bytes and the target {target.length}: make the target the same size"
            )
        return BackupPlan(
            sync=request.sync,
            bitmap=bitmap,
            bitmap_mode=mode,
            on_source_error=request.on_source_error,
            on_target_error=request.on_target_error,
            max_workers=request.performance.max_workers,
            max_chunk=request.performance.max_chunk,
        )

    # ----------------------------------------------------------------------------------------------------- setting up

    def _set_up(self, plan: BackupPlan) -> None:
        """Insert the filter and give the job its nodes."""
        request, jobs, change = self.request, self.system.jobs, self._change
        given = request.job_id
        job_id = self.system.graph.device_name(self.source) if given is None else given
        if plan.bitmap is not None:
            freeze(self.source, plan.bitmap)
            change.add(abort=partial(reclaim, self.source, plan.bitmap))
        driver = self._insert_filter(plan.bitmap if plan.sync in _WITH_BITMAP else None)
        driver.copies.compress = request.compress
        driver.copies.offload = request.performance.use_copy_range and not request.compress
        driver.copies.skip_unallocated = plan.sync is SyncMode.TOP
        cluster = driver.copies.cluster
        if 0 < plan.max_chunk < cluster:
            raise InvalidParameter("x-perf.max-chunk", f"is less than a cluster of the copy ({cluster} bytes)")
        plan = attrs.evolve(plan, max_chunk=align_down(plan.max_chunk, cluster))
        job = self.job = BackupJob(
            jobs, job_id, plan, filter_driver=driver,
            auto_finalize=request.auto_finalize, auto_dismiss=request.auto_dismiss,
        )  # fmt: skip
        jobs.create(job, self.txn)
        change.add(abort=self._forget_job)
        job.set_speed(request.speed)
        job.hold("main node", driver.node, Perm.NONE, Perm.ALL, change=change)
        job.hold("target", self.target, Perm.NONE, Perm.ALL, change=change)

    def _forget_job(self) -> None:
        self.system.jobs.abandon(self.job, cancelled=self._is_complete)

    def _insert_filter(self, wanted: DirtyBitmap | None) -> CopyBeforeWriteDriver:
        graph, change, source = self.system.graph, self._change, self.source
        driver = self.system.opener.make_filter(
            CopyBeforeWriteDriver, filter_options(), node_name=self.request.filter_node_name, above=source,
            implicit=False, change=change,
        )  # fmt: skip
        node = driver.node
        node.read_only = False  # whatever the source: it writes to the target
        with graph.deferred_permissions(change):
            graph.attach(node, self.target, name="target", role=ChildRole.DATA, change=change)
            graph.append(node, onto=source, change=change)
        driver.begin(wanted)
        change.add(abort=driver.end)
        return driver


def _bitmap_mode(request: BackupRequest) -> BitmapMode:
    """What becomes of the bitmap at the end; raises when bitmap, its mode and what is copied do not go together."""
    sync, mode = request.sync, request.bitmap_mode
    if request.bitmap is None:
        if sync in _WITH_BITMAP:
            raise InvalidParameter("bitmap", f"is needed with sync={sync.value}: it says what to copy")
        if mode is not None:
            raise InvalidParameter("bitmap-mode", "says what becomes of a bitmap, but there is no 'bitmap'")
        return BitmapMode.ON_SUCCESS
    if sync is SyncMode.INCREMENTAL:
        mode = mode or BitmapMode.ON_SUCCESS
        if mode is not BitmapMode.ON_SUCCESS:
            raise InvalidParameter("bitmap-mode", "can only be 'on-success' with sync=incremental; take sync=bitmap")
    if mode is None:
        raise InvalidParameter("bitmap-mode", "is missing: it says what becomes of the bitmap at the end")
    if sync is SyncMode.NONE:
        raise InvalidParameter("bitmap", "makes no sense with sync=none, which ends with nothing in particular copied")
    if mode is BitmapMode.NEVER and sync is not SyncMode.BITMAP:
        raise InvalidParameter("bitmap-mode", f"'never' makes no sense with sync={sync.value}: the bitmap would have no use")
    return mode


def _check_performance(given: Performance) -> None:
    if not 1 <= given.max_workers <= _MAX_INT:
        raise InvalidParameter("x-perf.max-workers", f"must be from 1 to {_MAX_INT}, not {given.max_workers}")
    if given.max_chunk < 0:
        raise InvalidParameter("x-perf.max-chunk", f"cannot be negative ({given.max_chunk})")
