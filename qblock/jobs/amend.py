"""The job of ``x-blockdev-amend``: change how an open image is stored.

Models QEMU's amend job (semantics.md section 4.6). Of our formats qcow2 can, and there the key slots of its encryption.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from qblock.backend import BlockBackend
from qblock.driver import SupportsOpenAmend
from qblock.errors import CommandError, InvalidParameter
from qblock.jobs.single_step import SingleStepJob, started
from qblock.options import visit
from qblock.permissions import Perm

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.jobs.runner import JobRunner
    from qblock.node import BlockDriverState
    from qblock.system import BlockSystem


class AmendJob(SingleStepJob):
    """See the module. ``options`` are of the driver's ``amend_options_class``; ``force`` allows to lose data."""

    type: ClassVar[str] = "amend"

    def __init__(
        self, runner: JobRunner, job_id: str, node: BlockDriverState, options: Any, *, force: bool
    ) -> None:
        super().__init__(runner, job_id)
        self.options = options
        self.force = force
        # Keeps the node open for the job, though nobody else may need it meanwhile.
        self.user = BlockBackend(runner.graph, perm=Perm.NONE, shared=Perm.ALL, description=self.describe_user())
        self.user.insert(node)

    async def act(self) -> None:
        """See the module."""
        driver = self.user.node.driver
        assert isinstance(driver, SupportsOpenAmend)
        await driver.amend_open(self.options, force=self.force)

    def clean(self) -> None:
        """See `Job`."""
        self.user.close()


async def start_amend(
    system: BlockSystem, *, job_id: str, node_name: str, options: Mapping[str, Json], force: bool = False
) -> AmendJob:
    """``x-blockdev-amend``: change what ``options`` (with the node's ``driver``) say; returns the running job.

    Raises `CommandError` and its kin, and then nothing has changed.
    """
    node = system.graph.find_node(node_name)
    name = options.get("driver")
    if not isinstance(name, str):
        raise InvalidParameter("options.driver", "is missing" if name is None else "must be a string")
    driver = system.registry.get(name)
    if driver is not type(node.driver):
        raise CommandError(f"Node '{node_name}' is a {node.driver.name} node, and the driver cannot be changed")
    if not isinstance(node.driver, SupportsOpenAmend):
        raise CommandError(f"Nodes of the driver '{name}' cannot be amended")
    members = {key: value for key, value in options.items() if key != "driver"}
    parsed = visit(node.driver.amend_options_class, members, path="options")
    system.jobs.check_id(job_id)
    return await started(AmendJob(system.jobs, job_id, node, parsed, force=force))
