"""Commit of the active layer: a mirror into a lower layer of the same chain, and the start of ``block-commit``, which chooses.

Models ``block-commit`` of QEMU 7.2 where the topmost layer to commit is the active one, or has another writer (semantics.md
section 4.3). The job is called ``commit``. It becomes ready when all that the layers above ``base`` hold is in ``base``; told
to complete, it makes ``base`` the active layer: whoever used the old one uses ``base`` from then on. A cancel after READY
leaves the old one in its place. No header is rewritten: the old layers are out of date as soon as the guest writes again.

As in QEMU, ``base`` is made writable for the job and stays so; and it is made longer if it is shorter than ``top``, but not
shorter. Inner layers are the business of `commit.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import attrs

from qblock.backend import BlockBackend
from qblock.errors import CommandError
from qblock.jobs.commit import CommitJob, start_inner_commit
from qblock.jobs.commit_plan import CommitPlace, CommitRequest, find_place
from qblock.jobs.mirror import MirrorRequest, PreparedMirror
from qblock.jobs.mirror_job import MirrorJob
from qblock.jobs.mirror_plan import MirrorPlan
from qblock.jobs.mirror_top import MirrorTop
from qblock.jobs.new_copy import SyncMode
from qblock.permissions import Perm, PermissionPair
from qblock.transaction import Transaction

if TYPE_CHECKING:
    from qblock.node import BlockDriverState
    from qblock.system import BlockSystem


class ActiveCommitJob(MirrorJob):
    """See the module."""

    type: ClassVar[str] = "commit"

    def hold_chain(self, place: CommitPlace, change: Transaction) -> None:
        """Take the layers between, and freeze the links from the filter down to the base."""
        graph = self.runner.graph
        with graph.deferred_permissions(change):
            for layer in place.layers():
                if layer is not place.top:
                    self.hold("intermediate node", layer, Perm.NONE, place.shared_on(layer), change=change)
        graph.freeze_chain(self.filter.node, place.base)
        change.add(abort=partial(graph.unfreeze_chain, self.filter.node, place.base))

    async def match_sizes(self) -> None:
        """See `MirrorJob`: a shorter base grows, a longer one stays as it is."""
        if self.target.length < self.length:
            await self.target.truncate(self.length)

    def let_go(self, target: BlockDriverState, change: Transaction) -> None:
        """See `MirrorJob`."""
        graph = self.runner.graph
        graph.unfreeze_chain(self.filter.node, target)
        change.add(abort=partial(graph.freeze_chain, self.filter.node, target))
        super().let_go(target, change)


@attrs.define(eq=False)
class PreparedCommit(PreparedMirror):
    """A commit of the active layer on its way to a running job. ``find`` gives the place, or raises."""

    within_chain: ClassVar[bool] = True

    find: Callable[[], CommitPlace] = attrs.field(kw_only=True)
    place: CommitPlace = attrs.field(init=False)

    def _check(self, target: BlockDriverState) -> None:
        place = self.place = self.find()
        if place.top is not self.source or place.base is not target or not place.is_active:
            raise CommandError(f"The chain of '{place.device.node_name}' has changed meanwhile: try again")
        self.system.jobs.check_id(self.job_id)

    def _plan(self, target: BlockDriverState) -> MirrorPlan:
        return attrs.evolve(super()._plan(target), base=target, unit=1)

    def _make_job(self, driver: MirrorTop, plan: MirrorPlan) -> ActiveCommitJob:
        request = self.request
        return ActiveCommitJob(
            self.system.jobs, self.job_id, plan, filter_driver=driver, target=self.backend,
            auto_finalize=request.auto_finalize, auto_dismiss=request.auto_dismiss,
        )  # fmt: skip

    def _target_permissions(self, target: BlockDriverState) -> PermissionPair:
        grows = Perm.RESIZE if target.length < self.source.length else Perm.NONE
        return PermissionPair(Perm.WRITE | grows, Perm.CONSISTENT_READ | Perm.WRITE | Perm.WRITE_UNCHANGED)

    def _set_up(self, target: BlockDriverState, change: Transaction) -> None:
        super()._set_up(target, change)
        assert isinstance(self.job, ActiveCommitJob)
        self.job.hold_chain(self.place, change)


async def start_commit(system: BlockSystem, *, device: str, request: CommitRequest) -> CommitJob | MirrorJob:
    """``block-commit``: commit layers of the chain of ``device`` (device or root node name); returns the running job.

    Raises `DeviceNotFound`, `CommandError` and its kin, and then nothing has changed.
    """
    place = find_place(system.graph, device, request)
    if request.job_id is None:
        request = attrs.evolve(request, job_id=system.graph.device_name(place.device))
    find = partial(find_place, system.graph, device, request)
    if place.is_active:
        return await _start_active(system, find, request)
    return await start_inner_commit(system, find, request)


async def _start_active(
    system: BlockSystem, find: Callable[[], CommitPlace], request: CommitRequest
) -> MirrorJob:
    place = find()
    mirror = MirrorRequest(
        sync=SyncMode.TOP,
        job_id=request.job_id,
        speed=request.speed,
        on_source_error=request.on_error,
        on_target_error=request.on_error,
        filter_node_name=request.filter_node_name,
        auto_finalize=request.auto_finalize,
        auto_dismiss=request.auto_dismiss,
    )
    was_read_only = place.base.read_only
    if was_read_only:
        await system.opener.reopen(place.base, read_only=False)
    backend = BlockBackend(system.graph, perm=Perm.NONE, shared=Perm.ALL)
    commit = PreparedCommit(system, place.top, backend, mirror, zero_target=False, find=find)
    try:
        await commit.prepare(place.base)
    except BaseException:
        if was_read_only:
            await system.opener.reopen(place.base, read_only=True)
        raise
    return await commit.run()
