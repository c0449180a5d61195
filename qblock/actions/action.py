"""All or nothing: actions that are prepared one after the other and then take effect together, or not at all.

Models QEMU's ``transaction`` (semantics.md section 5). An action does its work when it is prepared, undoably, so that the next
one finds it done: the mirror of a disk that the action before has given a new top is a mirror of the new top. When the last
one is prepared all are committed, which cannot fail; when one fails those before it are undone, the last one first.

What the guests see is one moment. Each action drains the nodes that it touches from before it looks at them until the end of
the whole transaction, so of two disks the first stands still while the second is prepared, and no write that a guest makes
after another one can be on one side of the moment while the earlier one is on the other.

Differs from QEMU in that actions on bitmaps drain their node too, from the very beginning. QEMU need not, since its guests
wait for its monitor anyway; here a write between a bitmap that is disabled and the one that takes over would escape both.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from qblock.drain import drained_all, drained_begin, drained_end
from qblock.errors import CommandError
from qblock.jobs.txn import JobTransaction

if TYPE_CHECKING:
    from qblock.jobs.job import Job
    from qblock.node import BlockDriverState
    from qblock.system import BlockSystem


class Action(abc.ABC):
    """One thing to be done. `perform` calls `prepare` first, then either `commit` and `afterwards` or `abort`, then `clean`.

    ``kind`` is the wire name, as ``blockdev-snapshot``; ``joins_groups`` tells whether it can be in a transaction of which
    the jobs complete together. What `drain` is given is drained until `clean`.
    """

    kind: ClassVar[str]
    joins_groups: ClassVar[bool] = False

    def __init__(self, system: BlockSystem) -> None:
        self.system = system
        self.group: JobTransaction | None = None
        """What its job has to join; None: it stands alone."""
        self._drained: list[BlockDriverState] = []

    def watched(self) -> Iterable[BlockDriverState]:
        """Nodes that must be at rest from the beginning of the transaction, as far as they exist by then."""
        return ()

    @abc.abstractmethod
    async def prepare(self) -> None:
        """Do it, undoably. Raises what stands in the way; nothing has changed then but that files may have been made."""

    @abc.abstractmethod
    def commit(self) -> None:
        """It is final now; cannot fail."""

    async def afterwards(self) -> None:
        """What takes waiting, when all actions are committed and their nodes still at rest; must not raise."""

    @abc.abstractmethod
    async def abort(self) -> None:
        """Undo what `prepare` did: all actions that were prepared later are undone already. Must not raise."""

    def clean(self) -> None:
        """Called last, also when `prepare` has failed: what `drain` has brought to rest goes on."""
        drained_end(self._drained)
        self._drained.clear()

    async def drain(self, *nodes: BlockDriverState) -> None:
        """Bring ``nodes`` to rest until `clean`."""
        await drained_begin(nodes)
        self._drained += nodes


class Abort(Action):
    """``abort``: never succeeds, so it undoes the actions before it; for trying out what others would do."""

    kind: ClassVar[str] = "abort"
    joins_groups: ClassVar[bool] = True

    async def prepare(self) -> None:
        """See `Action`."""
        raise CommandError("The transaction was told to abort by its 'abort' action; all is as it was")

    def commit(self) -> None:
        """See `Action`."""
        raise AssertionError("it cannot be prepared")

    async def abort(self) -> None:
        """See `Action`."""
        raise AssertionError("it cannot be prepared")


async def paused(job: Job) -> None:
    """Wait until a job whose nodes are drained has come to rest."""
    while not (job.paused or job.run_ended):
        await job.noticed()


async def perform(system: BlockSystem, actions: Sequence[Action], *, grouped: bool = False) -> None:
    """Do all of ``actions`` or none of them; raises what the first one that fails raises.

    ``grouped``: their jobs complete together, or fail together. As in QEMU the requests of the whole system come to an end
    first, which jobs show as a pause. A caller that is cancelled waits until all is done or undone.
    """
    task = system.jobs.spawn(_perform(system, actions, grouped=grouped), "transaction")
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _perform(system: BlockSystem, actions: Sequence[Action], *, grouped: bool) -> None:
    async with drained_all(system.graph):
        watched = list(dict.fromkeys(node for action in actions for node in action.watched()))
        await drained_begin(watched)
    begun: list[Action] = []
    try:
        await _prepare(actions, begun, JobTransaction() if grouped else None)
        for index, action in enumerate(actions):
            if (hit := system.env.trace.transaction_commit) is not None:
                hit(action=action.kind, index=index)
            action.commit()
        for action in actions:
            await action.afterwards()
    finally:
        for action in reversed(begun):
            if (hit := system.env.trace.transaction_clean) is not None:
                hit(action=action.kind, index=actions.index(action))
        for action in begun:  # their jobs go on in the order in which they were started
            action.clean()
        drained_end(watched)


async def _prepare(actions: Sequence[Action], begun: list[Action], group: JobTransaction | None) -> None:
    """Prepare all; when one fails, those before it are undone. Enters in ``begun`` what is to be cleaned."""
    prepared: list[Action] = []
    try:
        for action in actions:
            if group is not None and not action.joins_groups:
                raise CommandError(
                    f"The action '{action.kind}' starts no job that could complete together with others; "
                    "leave out 'completion-mode'"
                )
            action.group = group
            begun.append(action)
            if (hit := action.system.env.trace.transaction_prepare) is not None:
                hit(action=action.kind, index=len(prepared))
            await action.prepare()
            prepared.append(action)
    except BaseException:
        for action in reversed(prepared):
            if (hit := action.system.env.trace.transaction_abort) is not None:
                hit(action=action.kind, index=prepared.index(action))
            await action.abort()
        raise
