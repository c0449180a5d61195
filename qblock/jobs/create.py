"""The job of ``blockdev-create``: make a new image.

Models QEMU's create job (semantics.md section 4.6): it finalizes itself and stays concluded until dismissed, sends only
JOB_STATUS_CHANGE, shows progress 0/1 and then 1/1 (after a failure too), and cannot be stopped half-way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from qblock.errors import CommandError, InvalidParameter
from qblock.jobs.job import Job

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.jobs.runner import JobRunner
    from qblock.system import BlockSystem


class CreateJob(Job):
    """See the module. ``options`` are those of ``BlockdevCreateOptions`` without ``driver``."""

    type: ClassVar[str] = "create"

    def __init__(self, runner: JobRunner, job_id: str, *, driver: str, options: Mapping[str, Json]) -> None:
        super().__init__(runner, job_id, auto_finalize=True, auto_dismiss=False)
        self.driver = driver
        self.options = options

    async def run(self) -> None:
        """See the module."""
        self.progress_remaining = 1
        try:
            await self.runner.opener.create_image(self.driver, self.options)
        finally:
            self.advance(1)


async def start_create(system: BlockSystem, *, job_id: str, options: Mapping[str, Json]) -> CreateJob:
    """``blockdev-create``: start making an image of ``options["driver"]``; returns the running job."""
    driver = options.get("driver")
    if not isinstance(driver, str):
        raise InvalidParameter("options.driver", "is missing")
    if not hasattr(system.registry.get(driver), "create_options_class"):
        raise CommandError(f"Driver '{driver}' cannot create images")
    job = CreateJob(
        system.jobs, job_id, driver=driver, options={key: value for key, value in options.items() if key != "driver"}
    )
    system.jobs.create(job)
    system.jobs.start(job)
    await job.noticed()
    return job
