"""Every verb, told to every kind of job in every status: what is accepted, what it does, and that nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from chains import NAMES, SIZE, Chain, Faulty, chain
from qblock.actions.action import perform
from qblock.actions.backups import StartBlockdevBackup
from qblock.errors import CommandError, QBlockError
from qblock.jobs.backup import BackupRequest
from qblock.jobs.job import BlockJob
from qblock.jobs.mirror import MirrorRequest, start_blockdev_mirror
from qblock.jobs.new_copy import SyncMode
from qblock.jobs.state import VERBS, JobStatus, JobVerb
from qblock.testing.jobbench import eventually
from qblock.testing.simloop import run

Start = Callable[..., Awaitable[BlockJob]]


async def _mirror(made: Chain, **members: Any) -> BlockJob:
    target = await made.system.opener.open_blockdev(
        {"driver": "null-co", "node-name": "target", "size": SIZE, "read-zeroes": True}
    )
    target.monitor_owned = True
    request = MirrorRequest(job_id="j", sync=SyncMode.FULL, **members)
    return await start_blockdev_mirror(made.system, device="disk", target="target", request=request)


async def _backup(made: Chain, **members: Any) -> BlockJob:
    target = await made.system.opener.open_blockdev({"driver": "null-co", "node-name": "target", "size": SIZE})
    target.monitor_owned = True
    request = BackupRequest(job_id="j", sync=SyncMode.FULL, **members)
    await perform(made.system, [StartBlockdevBackup(made.system, device="disk", target="target", request=request)])
    return made.system.jobs.find_block_job("j")


KINDS: Final[Mapping[str, Start]] = {
    "stream": lambda made, **members: made.stream(**members),
    "commit": lambda made, **members: made.commit(top_node="mid", **members),
    "active commit": lambda made, **members: made.commit(**members),
    "mirror": _mirror,
    "backup": _backup,
}
BECOME_READY: Final = ("active commit", "mirror")
S = JobStatus
STATUSES: Final = (S.RUNNING, S.PAUSED, S.READY, S.STANDBY, S.PENDING, S.CONCLUDED)
VERBS_TOLD: Final = ("pause", "resume", "cancel", "force-cancel", "complete", "finalize", "dismiss", "set-speed")
CASES = [
    (kind, status)
    for kind in KINDS
    for status in STATUSES
    if kind in BECOME_READY or status not in (S.READY, S.STANDBY)
]


async def brought_to(made: Chain, kind: str, status: JobStatus) -> BlockJob:
    """A job of a kind that rests in a status."""
    slow = status in (S.RUNNING, S.PAUSED)
    job = await KINDS[kind](
        made, speed=1 if slow else 0, auto_finalize=status is not S.PENDING, auto_dismiss=status is not S.CONCLUDED
    )
    if slow:
        await asyncio.sleep(0.01)
    elif kind in BECOME_READY:
        await eventually(lambda: job.is_ready)
    if status in (S.PAUSED, S.STANDBY):
        await made.system.jobs.pause(job)
    elif status in (S.PENDING, S.CONCLUDED) and kind in BECOME_READY:
        made.system.jobs.complete(job)
    await eventually(lambda: job.status is status)
    return job


async def tell(made: Chain, job: BlockJob, verb: str) -> None:
    """Tell the job something, as a command does."""
    jobs = made.system.jobs
    match verb:
        case "cancel" | "force-cancel":
            await jobs.cancel(job, force=verb == "force-cancel")
        case "set-speed":
            jobs.set_speed(job, 0)
        case "complete":
            jobs.complete(job)
        case _:
            await getattr(jobs, verb)(job)


def is_accepted(status: JobStatus, verb: str) -> bool:
    """By the table; and a pause is asked for once, a resume after it, and a paused job is cancelled by force only."""
    is_paused = status in (S.PAUSED, S.STANDBY)
    if verb in ("pause", "cancel") and is_paused:
        return False
    if verb == "resume" and not is_paused:
        return False
    return status in VERBS[JobVerb(verb.removeprefix("force-"))]


@pytest.mark.parametrize("verb", VERBS_TOLD)
@pytest.mark.parametrize(("kind", "status"), CASES, ids=lambda value: getattr(value, "value", value))
def test_a_verb_is_accepted_where_the_table_says(tmp_path: Path, kind: str, status: JobStatus, verb: str) -> None:
    """Whatever is told when: it is done or refused, the job comes to an end, and the guest's data are there."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            job = await brought_to(made, kind, status)
            try:
                await tell(made, job, verb)
            except CommandError:
                assert not is_accepted(status, verb)
                assert job.status is status
            else:
                assert is_accepted(status, verb)
            await asyncio.sleep(0.2)
            if verb == "force-cancel" and is_accepted(status, verb):
                assert job.cancelled
                assert "BLOCK_JOB_CANCELLED" in made.story
            await _ended(made, job)
            if not (kind == "mirror" and made.disk.node is made.node("target")):
                assert await made.disk.read(0, SIZE) == before
            assert made.is_at_rest()

    run(main)


@pytest.mark.parametrize("verb", VERBS_TOLD)
@pytest.mark.parametrize("told", ["the one that waits", "the one that runs"])
def test_a_job_that_waits_for_its_group_takes_a_cancel_only(tmp_path: Path, told: str, verb: str) -> None:
    """Nobody finishes one of a group alone; a cancel of one cancels both, and leaves nothing behind."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            for name in ("target", "other", "other-target"):
                options = {"driver": "null-co", "node-name": name, "size": SIZE, "read-zeroes": True}
                (await made.system.opener.open_blockdev(options)).monitor_owned = True
            pair = (("j", "disk", "target", SyncMode.FULL), ("k", "other", "other-target", SyncMode.NONE))
            actions = [
                StartBlockdevBackup(made.system, device=device, target=target, request=BackupRequest(job_id=job_id, sync=sync))
                for job_id, device, target, sync in pair
            ]
            await perform(made.system, actions, grouped=True)
            waiting, running = (made.system.jobs.find_block_job(job_id) for job_id in ("j", "k"))
            await eventually(lambda: waiting.status is S.WAITING)
            job = waiting if told == "the one that waits" else running
            status = job.status
            try:
                await tell(made, job, verb)
            except CommandError:
                assert not is_accepted(status, verb)
                assert waiting.status is S.WAITING
            else:
                assert is_accepted(status, verb)
            if not waiting.concluded.done():
                await made.system.jobs.cancel(running)
            for one in (waiting, running):
                await made.system.jobs.wait(one)
                assert one.cancelled
                assert one.status is S.NULL
            assert made.is_at_rest()

    run(main)


async def _ended(made: Chain, job: BlockJob) -> None:
    """Bring the job to its end."""
    for verb in ("resume", "set-speed", "complete", "finalize", "dismiss"):
        if job.status is not S.NULL:
            try:
                await tell(made, job, verb)
            except QBlockError:
                continue
            await asyncio.sleep(0.2)
    if job.is_ready:
        await tell(made, job, "complete")
    if not job.concluded.done():
        await made.system.jobs.wait(job)
    if job.status is S.CONCLUDED:
        await tell(made, job, "dismiss")
    assert job.status is S.NULL


def test_a_backup_that_is_woken_goes_no_faster_than_its_speed(tmp_path: Path) -> None:
    """A pause, a resume and a speed that is hardly another one make no hole in the limit; a higher speed does at once."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            job, jobs = await brought_to(made, "backup", S.RUNNING), made.system.jobs
            done = job.progress_done
            await jobs.pause(job)
            await jobs.resume(job)
            jobs.set_speed(job, 2)
            await asyncio.sleep(1)
            assert job.progress_done == done > 0
            jobs.set_speed(job, 0)
            await jobs.wait(job)
            assert job.error is None

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_job_whose_request_fails_ends_at_once(kind: str, tmp_path: Path) -> None:
    """It does not sleep for hours first, for what it was about to copy."""

    async def main() -> None:
        async with chain(tmp_path) as made:
            for name in NAMES:
                Faulty(made.node(name))
            before = asyncio.get_running_loop().time()
            job = await KINDS[kind](made, speed=1)
            await made.system.jobs.wait(job)
            assert isinstance(job.error, OSError)
            assert asyncio.get_running_loop().time() - before < 1

    run(main)
