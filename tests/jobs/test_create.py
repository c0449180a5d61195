"""blockdev-create as a job: it makes the image, stays concluded, and shows its error in query-jobs only."""

from __future__ import annotations

from pathlib import Path

import pytest

from qblock.errors import CommandError, DeviceNotActive
from qblock.jobs.create import start_create
from qblock.testing.jobbench import JobBench
from qblock.testing.simloop import run
from qblock.units import MiB


def test_creating_an_image_is_a_job_that_waits_to_be_dismissed(tmp_path: Path) -> None:
    """Only JOB_STATUS_CHANGE events; 1/1 at the end; not a block job."""

    async def main() -> None:
        bench = JobBench()
        path = tmp_path / "image"
        options = {"driver": "file", "filename": str(path), "size": MiB}
        job = await start_create(bench.system, job_id="j", options=options)
        await bench.jobs.wait(job)
        assert path.stat().st_size == MiB
        assert bench.story == ["created", "running", "waiting", "pending", "concluded"]
        assert bench.jobs.query_jobs() == [
            {"id": "j", "type": "create", "status": "concluded", "current-progress": 1, "total-progress": 1}
        ]
        assert bench.jobs.query_block_jobs() == []
        with pytest.raises(DeviceNotActive):
            bench.jobs.find_block_job("j")
        await bench.jobs.dismiss(job)
        assert bench.story[-1] == "null"
        await bench.close()

    run(main)


def test_a_failure_is_told_by_query_jobs(tmp_path: Path) -> None:
    """The directory does not exist: aborting, concluded, an error, progress 1/1."""

    async def main() -> None:
        bench = JobBench()
        options = {"driver": "file", "filename": str(tmp_path / "none" / "image"), "size": MiB}
        job = await start_create(bench.system, job_id="j", options=options)
        await bench.jobs.wait(job)
        assert bench.story == ["created", "running", "aborting", "concluded"]
        (info,) = bench.jobs.query_jobs()
        assert info["error"]
        assert (info["current-progress"], info["total-progress"]) == (1, 1)
        await bench.close()

    run(main)


def test_a_driver_that_cannot_create_is_refused_at_once() -> None:
    """No job, no event."""

    async def main() -> None:
        bench = JobBench()
        with pytest.raises(CommandError):
            await start_create(bench.system, job_id="j", options={"driver": "null-co", "size": MiB})
        with pytest.raises(CommandError):
            await start_create(bench.system, job_id="j", options={"size": MiB})
        assert bench.events == []
        await bench.close()

    run(main)
