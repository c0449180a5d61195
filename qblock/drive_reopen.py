"""drive-reopen: a drive leaves its image for another one while the guest runs, with a witness of the moment if one is given.

Models the command of the proposal of April 2012 (rfc-2012.md), by which management moves a guest to the copy that a mirror has
made; in QEMU 1.3 ``block-job-complete`` took its place. The drive is found; its requests are held back; its job is cancelled,
and must have completed; nobody else may use the image; the format must be known; requests that are under way come to an end;
the old image is flushed and closed; the new one is opened by the same flags, with its backing files as ``-drive`` has them; the
witness is written. What fails up to the flush leaves everything as it was. What fails later brings the old image back as it
was (`Blueprint`), and the error names the new one. When not even that works, the error names the old one and the drive is left
without a medium: its guest gets ``ENOMEDIUM``, and a later drive-reopen can give it one.

**What the witness tells.** Management has to know after a crash of everything but the disks which image is the right one. The
guest's requests are held back from before the job is cancelled, so that none of them finds the old image after the copy was
complete, until after the last step. And the last steps are, in this order: the new image is open and has its user; the byte
is written; the byte is made durable; the guest goes on; the command is answered. So

- byte absent: no request of the guest has gone to the new image, and every write that the guest knows to be done is in the old
  one. (The byte is also absent after a crash between writing it and its becoming durable. No request has been let through then.)
- byte present: the new image was complete and opened, and requests may have gone there; the old one gets no more of them.

Without a witness there is no way to tell a crash before the reply from a crash before the switch. A failure to make the byte
durable is ignored, as proposed: the guarantee is then no better than that storage. The byte stays where it is when the command
has failed after it was written, which nothing that is done here can bring about: there is no step behind it that fails.

Differs from 2012: what the graph adds is refused, an image which somebody else uses too (the monitor, another node, another
job); filters that the user has put over the old image are closed with it, and come back only with it; the read-only flag is the
old image's. An image of another size is taken, and who listens for new sizes is told as by block_resize. Dirty bitmaps of the
old nodes, their automatic names, their write threshold and what storage in memory holds are gone, also when the old image comes
back. The job is finalized
without being asked for; one that belongs to a group with other jobs is cancelled with all of it, ready or not. A job that an
error has stopped while it is waited for is cancelled, since nobody could answer to it. The medium cannot be changed or deleted
by somebody else meanwhile; once begun the command goes on to its end when its caller is cancelled.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import attrs

from qblock.backend import BlockBackend
from qblock.blockers import OpBlocker, OpType, block_all, unblock
from qblock.blueprint import Blueprint, own_nodes
from qblock.devices.drives import prepare_medium
from qblock.drain import drain_all
from qblock.errors import (
    BlockIOError,
    DeviceInUse,
    FlushFailed,
    JobCancelled,
    OpenFileFailed,
    QBlockError,
)
from qblock.jobs.job import BlockJob
from qblock.jobs.state import ErrorAction, JobStatus
from qblock.node import BlockDriverState
from qblock.nodespec import MediumFlags
from qblock.requests import flush
from qblock.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qblock.driver import Json
    from qblock.system import BlockSystem

__all__ = ["Witness", "drive_reopen"]


async def drive_reopen(
    system: BlockSystem, *, device: str, filename: str, fmt: str | None, witness: Witness | None
) -> None:
    """Let the drive ``device`` have the image ``filename`` of format ``fmt`` (None: probed) instead of its own.

    Closes ``witness`` in any case. Raises `DeviceNotFound`, `DeviceInUse`, `registry.UnknownDriver`, `FlushFailed`, after which
    nothing has changed but that the drive's job may have ended; and `OpenFileFailed`, see the module.
    """
    await system.uninterrupted(_exchange(system, device, filename, fmt, witness), f"drive-reopen of '{device}'")


async def _exchange(system: BlockSystem, device: str, filename: str, fmt: str | None, witness: Witness | None) -> None:
    try:
        backend = system.graph.find_backend(device)
        if backend.changing_medium:
            raise DeviceInUse(device, "its medium is being changed already")
        if (hit := system.env.trace.drive_reopen_begin) is not None:
            hit(device=device, filename=filename)
        exchange = _Exchange(system, backend, device, filename, fmt, witness)
        backend.changing_medium = True
        backend.quiesce()
        try:
            await exchange.run()
        finally:
            backend.resume()
            backend.changing_medium = False
    finally:
        if witness is not None:
            witness.close()
            if (hit := system.env.trace.witness_closed) is not None:
                hit(witness=witness.name)


@attrs.define(eq=False)
class _Exchange:
    """One execution on ``backend``, whose requests are held back meanwhile."""

    system: BlockSystem
    backend: BlockBackend
    device: str
    filename: str
    fmt: str | None
    witness: Witness | None

    async def run(self) -> None:
        """The whole of it; see the module for the order."""
        if self.backend.root is not None:
            while (job := self._job()) is not None:
                await self._cancel(job)
            self._refuse_shared()
        if self.fmt is not None:
            self.system.registry.get(self.fmt)
        old = None if self.backend.root is None else await self._leave()
        try:
            await self._take_new()
        except Exception as error:
            await self._return_to(old, error)
        if (hit := self.system.env.trace.drive_reopen_done) is not None:
            hit(device=self.device, filename=self.filename)

    # --------------------------------------------------------------------------------------------------------- the job

    def _job(self) -> BlockJob | None:
        """A job on the image: one that holds nodes of it, other than as the target of its own copying."""
        own = set(own_nodes(self.backend.node, ignoring=BlockJob))
        for job in self.system.jobs.jobs:
            if isinstance(job, BlockJob) and any(edge.node in own and edge.name != "target" for edge in job.edges):
                return job
        return None

    async def _cancel(self, job: BlockJob) -> None:
        """Cancel the job and wait for its end; raises `DeviceInUse` unless it has completed."""
        user = job.describe_user()
        loss = ", and its target is not complete" if any(edge.name == "target" for edge in job.edges) else ""
        if job.status is JobStatus.CREATED:
            raise DeviceInUse(self.device, f"{user} is being set up for it")
        if job.status is JobStatus.CONCLUDED:
            raise DeviceInUse(self.device, f"{user} has ended, and holds its nodes until it is dismissed")
        assert job.txn is not None
        job.auto_finalize = True
        with self._killing_when_stopped(job):
            result = await self.system.jobs.cancel_sync(job, force=len(job.txn.jobs) > 1)
        cancelled = isinstance(result, JobCancelled)
        if (hit := self.system.env.trace.drive_reopen_job_cancelled) is not None:
            outcome = "cancelled" if cancelled else "completed" if result is None else str(result)
            hit(device=self.device, job=job.id, outcome=outcome)
        if cancelled:
            raise DeviceInUse(self.device, f"{user} was not done; it is cancelled now{loss}")
        if result is not None:
            raise DeviceInUse(self.device, f"{user} has failed: {result}")

    @contextlib.contextmanager
    def _killing_when_stopped(self, job: BlockJob) -> Iterator[None]:
        """Cancel the job by force when an error stops it: as long as that waits for a person, the guest would, too."""

        def listen(name: str, data: Mapping[str, Json], when: tuple[int, int]) -> None:
            del when
            if name == "BLOCK_JOB_ERROR" and data["device"] == job.id and data["action"] == ErrorAction.STOP.value:
                self.system.jobs.spawn(self._kill(job), f"end of {job.describe_user()}")

        end = self.system.events.subscribe(listen)
        try:
            yield
        finally:
            end()

    async def _kill(self, job: BlockJob) -> None:
        if not job.run_ended:
            await self.system.jobs.cancel(job, force=True)

    # -------------------------------------------------------------------------------------------------- the old image

    def _refuse_shared(self, own_block: OpBlocker | None = None) -> None:
        """Raise `DeviceInUse` when somebody else holds the image; ``own_block`` is ours."""
        root = self.backend.node
        others = [edge.parent for edge in root.parents if edge is not self.backend.root]
        if others:
            holder = next((user for user in others if isinstance(user, BlockJob)), others[0])
            raise DeviceInUse(self.device, f"{holder.describe_user()} uses its node '{root.node_name}'")
        if root.monitor_owned:
            raise DeviceInUse(
                self.device, f"its node '{root.node_name}' belongs to the monitor, which has added it by blockdev-add"
            )
        for blocker in root.blockers:
            if blocker is not own_block and OpType.CHANGE not in blocker.exempt:
                raise DeviceInUse(self.device, str(blocker.reason))

    async def _leave(self) -> Blueprint:
        """Bring the old image to rest, and close it; raises `DeviceInUse` and `FlushFailed` with nothing changed."""
        root = self.backend.node
        block = block_all(root, "drive-reopen is about to close it")
        try:
            await drain_all(self.system.graph)
            self._tell_drained()
            await self._flush(root)
            self._refuse_shared(block)
            # From here to the removal nobody else gets a turn.
            image = self.system.graph.skip_filters(root)
            self.backend.last_medium = MediumFlags.of(image)
            blueprint = Blueprint.of(root, own_nodes(root))
            self.backend.remove()
        finally:
            unblock(block)
        await self.system.opener.close_orphans()
        if (hit := self.system.env.trace.drive_reopen_closed) is not None:
            hit(device=self.device)
        return blueprint

    def _tell_drained(self) -> None:
        if (hit := self.system.env.trace.drive_reopen_drained) is not None:
            hit(device=self.device)

    async def _flush(self, root: BlockDriverState) -> None:
        if not root.read_only:
            try:
                await flush(root)
            except BlockIOError as error:
                raise FlushFailed(
                    error.errno or errno.EIO, f"Device '{self.device}' could not be flushed and keeps its image"
                ) from error
        if (hit := self.system.env.trace.drive_reopen_flushed) is not None:
            hit(device=self.device)

    # -------------------------------------------------------------------------------------------------- the new image

    async def _take_new(self) -> None:
        """Open the new image, put it in, and write the witness. Raises whatever these raise; the image may be in then."""
        medium = self.backend.last_medium or MediumFlags()
        node = await self.system.opener.open_image(
            self.filename,
            fmt=self.fmt,
            read_only=medium.flags.read_only,
            options=medium.options(),
            force_share=medium.flags.force_share,
            inherited=medium.flags,
        )
        self.backend.insert(node)
        prepare_medium(self.system, node, filename=self.filename, copy_on_read=medium.copy_on_read)
        trace = self.system.env.trace
        if (hit := trace.drive_reopen_opened) is not None:
            hit(device=self.device, filename=self.filename)
        if self.witness is None:
            return
        await self.witness.write(self.system.env.executor)
        if (hit := trace.drive_reopen_witness_written) is not None:
            hit(device=self.device, witness=self.witness.name)
        await self.witness.sync(self.system.env.executor)
        if (hit := trace.drive_reopen_witness_synced) is not None:
            hit(device=self.device, witness=self.witness.name)

    async def _return_to(self, old: Blueprint | None, error: Exception) -> NoReturn:
        """Give the drive its old image back after ``error``, and report it; or report that even that fails."""
        trace = self.system.env.trace
        self.backend.remove()
        await self.system.opener.close_orphans()
        if old is not None:
            if (hit := trace.drive_reopen_rollback) is not None:
                hit(device=self.device, filename=old.name, error=str(error))
            try:
                self.backend.insert(await old.build(self.system.opener))
            except (QBlockError, OSError) as second:
                await self.system.opener.close_orphans()
                if (hit := trace.drive_reopen_lost) is not None:
                    hit(device=self.device, filename=old.name, error=str(second))
                raise OpenFileFailed(
                    old.name,
                    device=self.device,
                    detail=f"opening it again failed: {second}",
                    now=f"nor could it have '{self.filename}' ({error}), so it has no medium until drive-reopen gives it one",
                ) from error
        if not isinstance(error, (QBlockError, OSError)):
            raise error  # a bug; the drive at least is as it was
        now = f"it keeps '{old.name}'" if old is not None else "it still has no medium"
        raise OpenFileFailed(self.filename, device=self.device, detail=str(error), now=now) from error
