"""What the actions share that start a copying job: it is set up, undoably, while its source is at rest, and then runs.

Models the job actions of ``transaction`` (semantics.md section 5). Prepared means that the job holds its nodes, committed that it
runs; it begins with a pause, since its nodes are drained until the end of the transaction.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar, Protocol

from qblock.actions.action import Action, paused

if TYPE_CHECKING:
    from qblock.jobs.job import Job
    from qblock.node import BlockDriverState
    from qblock.system import BlockSystem


class PreparedJob(Protocol):
    """A job that has been set up and does not run yet: `start` it or `give_up`."""

    @property
    def job(self) -> Job:
        """The job, which is listed already."""

    def start(self) -> Job:
        """Let it run; cannot fail."""

    async def give_up(self) -> None:
        """Undo all; a file that was made stays."""


class StartJob(Action):
    """Starts a job on ``device``, the name of a device or node."""

    joins_groups: ClassVar[bool] = True

    def __init__(self, system: BlockSystem, device: str) -> None:
        super().__init__(system)
        self.device = device
        self._prepared: PreparedJob

    @property
    def job(self) -> Job:
        """The job, once the action is prepared."""
        return self._prepared.job

    def source(self) -> BlockDriverState:
        """The node that ``device`` means; raises unless it can be a source."""
        return self.system.graph.lookup(self.device)

    @abc.abstractmethod
    async def set_up(self, source: BlockDriverState) -> PreparedJob:
        """All that can fail; ``source`` is at rest."""

    async def prepare(self) -> None:
        """See `Action`."""
        source = self.source()
        await self.drain(source)
        self._prepared = await self.set_up(source)

    def commit(self) -> None:
        """See `Action`."""
        self._prepared.start()

    async def afterwards(self) -> None:
        """See `Action`: the job begins with a pause."""
        await paused(self.job)

    async def abort(self) -> None:
        """See `Action`."""
        await self._prepared.give_up()
