"""The job of ``blockdev-create``: make a new image.

Models QEMU's create job (semantics.md section 4.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from qblock.errors import CommandError, InvalidParameter
from qblock.jobs.single_step import SingleStepJob, started

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.jobs.runner import JobRunner
    from qblock.system import BlockSystem


class CreateJob(SingleStepJob):
    """See the module. ``options`` are those of ``BlockdevCreateOptions`` without ``driver``."""

    type: ClassVar[str] = "create"

    def __init__(self, runner: JobRunner, job_id: str, *, driver: str, options: Mapping[str, Json]) -> None:
        super().__init__(runner, job_id)
        self.driver = driver
        self.options = options

    async def act(self) -> None:
        """See the module."""
        await self.runner.opener.create_image(self.driver, self.options)


async def start_create(system: BlockSystem, *, job_id: str, options: Mapping[str, Json]) -> CreateJob:
    """``blockdev-create``: start making an image of ``options["driver"]``; returns the running job."""
    driver = options.get("driver")
    if not isinstance(driver, str):
        raise InvalidParameter("options.driver", "is missing")
    if not hasattr(system.registry.get(driver), "create_options_class"):
        raise CommandError(f"Driver '{driver}' cannot create images")
    members = {key: value for key, value in options.items() if key != "driver"}
    return await started(CreateJob(system.jobs, job_id, driver=driver, options=members))
