"""The life of jobs: verbs, events and their order, with a job that does only what the test says."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import attrs
import pytest

from qblock.clock import LoopClock
from qblock.errors import BlockIOError, CommandError, DeviceNotActive, DuplicateName, JobStateError
from qblock.graph import Graph
from qblock.jobs.job import BlockJob
from qblock.jobs.runner import JobRunner
from qblock.jobs.state import PAUSED_FORM, TRANSITIONS, VERBS, JobStatus, JobVerb, OnError
from qblock.jobs.txn import JobTransaction
from qblock.testing.simloop import run


class PlayJob(BlockJob):
    """Runs a script; remembers which of its endings were called."""

    type = "stream"

    def __init__(self, runner: JobRunner, job_id: str, script: Callable[[PlayJob], Awaitable[None]], **how: bool) -> None:
        super().__init__(runner, job_id, **how)
        self.script = script
        self.calls: list[str] = []
        self.soft = False
        self.completing = False
        self.prepare_error: Exception | None = None

    async def run(self) -> None:
        await self.script(self)

    async def prepare(self) -> None:
        self.calls.append("prepare")
        if self.prepare_error is not None:
            raise self.prepare_error

    def commit(self) -> None:
        self.calls.append("commit")

    def abort(self) -> None:
        self.calls.append("abort")

    def clean(self) -> None:
        self.calls.append("clean")

    def cancelling(self, *, force: bool) -> bool:
        return force or not (self.soft and self.is_ready)

    def complete(self) -> None:
        self.completing = True


class NoOpener:
    """Stands for the opener: there are no nodes."""

    async def close_orphans(self) -> None:
        return


@attrs.define
class Stage:
    """A runner and the events it sent, as short texts."""

    events: list[str] = attrs.field(factory=list)
    raw: list[tuple[str, Mapping[str, Any]]] = attrs.field(factory=list)
    runner: JobRunner = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.runner = JobRunner(Graph(), LoopClock(), self.emit, NoOpener())  # type: ignore[arg-type]

    def emit(self, name: str, data: Mapping[str, Any]) -> None:
        self.raw.append((name, data))
        who = data.get("id", data.get("device"))
        text = data["status"] if name == "JOB_STATUS_CHANGE" else name.removeprefix("BLOCK_JOB_")
        self.events.append(text if who == "j" else f"{who} {text}")

    def start(self, script: Callable[[PlayJob], Awaitable[None]], job_id: str = "j", **how: bool) -> PlayJob:
        job = PlayJob(self.runner, job_id, script, **how)
        self.runner.create(job)
        self.runner.start(job)
        return job


async def nothing(job: PlayJob) -> None:
    return


async def forever(job: PlayJob) -> None:
    while True:
        await job.sleep_ns(10**9)


async def until_complete(job: PlayJob) -> None:
    job.ready()
    while not (job.completing or job.cancel_requested):
        await job.sleep_ns(10**9)


async def fails(job: PlayJob) -> None:
    raise BlockIOError(errno.EIO)


def test_success_passes_waiting_and_pending() -> None:
    """The order of section 3.3, as management software relies on it."""

    async def main() -> None:
        stage = Stage()
        job = stage.start(nothing)
        assert stage.events == ["created", "running"]
        await stage.runner.wait(job)
        assert stage.events == ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"]
        assert job.calls == ["prepare", "commit", "clean"]
        assert stage.runner.query_jobs() == []

    run(main)


def test_failure_goes_straight_to_aborting() -> None:
    """COMPLETED carries the error; neither waiting nor pending is seen."""

    async def main() -> None:
        stage = Stage()
        job = stage.start(fails, auto_dismiss=False)
        await stage.runner.wait(job)
        assert stage.events == ["created", "running", "aborting", "COMPLETED", "concluded"]
        assert stage.raw[3][1]["error"] == "Input/output error"
        assert job.calls == ["abort", "clean"]
        assert stage.runner.query_block_jobs()[0]["error"] == "Input/output error"
        await stage.runner.dismiss(job)
        assert stage.events[-1] == "null"
        assert stage.runner.query_block_jobs() == []

    run(main)


def test_cancel_wakes_a_sleeper_and_ends_in_cancelled() -> None:
    """A job asleep for a second ends now, not then."""

    async def main() -> None:
        stage = Stage()
        job = stage.start(forever)
        await asyncio.sleep(0.5)
        await stage.runner.cancel(job)
        await stage.runner.cancel(job)
        await stage.runner.wait(job)
        assert asyncio.get_running_loop().time() == 0.5
        assert stage.events == ["created", "running", "aborting", "CANCELLED", "concluded", "null"]
        assert str(job.error) == "Operation canceled"

    run(main)


def test_a_pending_job_waits_for_finalize() -> None:
    """With auto-finalize off nothing is changed until the command, whose reply comes after the events."""

    async def main() -> None:
        stage = Stage()
        job = stage.start(nothing, auto_finalize=False)
        await asyncio.sleep(1)
        assert stage.events == ["created", "running", "waiting", "pending", "PENDING"]
        assert job.calls == []
        assert stage.raw[-1] == ("BLOCK_JOB_PENDING", {"type": "stream", "id": "j"})
        await stage.runner.finalize(job)
        assert stage.events[5:] == ["COMPLETED", "concluded", "null"]
        with pytest.raises(JobStateError):
            await stage.runner.finalize(job)

    run(main)


def test_a_pending_job_can_be_cancelled() -> None:
    """Changing one's mind before finalize leaves everything as it was."""

    async def main() -> None:
        stage = Stage()
        job = stage.start(nothing, auto_finalize=False)
        await asyncio.sleep(1)
        await stage.runner.cancel(job)
        assert job.calls == ["abort", "clean"]
        assert stage.events[5:] == ["aborting", "CANCELLED", "concluded", "null"]

    run(main)


def test_a_failing_prepare_aborts() -> None:
    """Rewriting the backing link can fail: the job then ends with that error."""

    async def main() -> None:
        stage = Stage()
        job = stage.start(nothing, auto_finalize=False)
        job.prepare_error = BlockIOError(errno.ENOSPC)
        await asyncio.sleep(1)
        await stage.runner.finalize(job)
        assert job.calls == ["prepare", "abort", "clean"]
        assert stage.events[5:] == ["aborting", "COMPLETED", "concluded", "null"]

    run(main)


def test_pause_and_resume_are_seen_before_their_replies() -> None:
    """A sleeping job notices at once, so the events come before the reply."""

    async def main() -> None:
        stage = Stage()
        job = stage.start(forever)
        await asyncio.sleep(0.5)
        await stage.runner.pause(job)
        assert stage.events[2:] == ["paused"]
        assert stage.runner.query_block_jobs()[0]["paused"] is True
        with pytest.raises(CommandError, match="already paused"):
            await stage.runner.pause(job)
        await asyncio.sleep(100)
        await stage.runner.resume(job)
        assert stage.events[2:] == ["paused", "running"]
        with pytest.raises(CommandError, match="not paused"):
            await stage.runner.resume(job)
        await stage.runner.cancel(job)
        await stage.runner.wait(job)

    run(main)


def test_a_soft_cancel_of_a_ready_job_completes_it() -> None:
    """After READY an unforced cancel means: finish without switching over."""

    async def main() -> None:
        stage = Stage()
        job = stage.start(until_complete)
        job.soft = True
        await asyncio.sleep(0.5)
        await stage.runner.cancel(job, force=False)
        with pytest.raises(CommandError, match="cancel"):
            stage.runner.complete(job)
        await stage.runner.wait(job)
        assert stage.events[2:] == ["ready", "READY", "waiting", "pending", "COMPLETED", "concluded", "null"]
        assert job.error is None

    run(main)


def test_completing_a_paused_job_is_remembered() -> None:
    """The request is carried out after resume."""

    async def main() -> None:
        stage = Stage()
        job = stage.start(until_complete)
        await asyncio.sleep(0.5)
        await stage.runner.pause(job)
        stage.runner.complete(job)
        await asyncio.sleep(5)
        assert stage.events[4:] == ["standby"]
        with pytest.raises(CommandError, match="paused"):
            await stage.runner.cancel(job, force=False)
        await stage.runner.resume(job)
        await stage.runner.wait(job)
        assert stage.events[4:] == ["standby", "ready", "waiting", "pending", "COMPLETED", "concluded", "null"]

    run(main)


def test_a_forced_cancel_lifts_the_pause_of_a_stopped_job() -> None:
    """Nothing hangs: a job stopped by an error can be got rid of."""

    async def stops(job: PlayJob) -> None:
        job.failed_request(BlockIOError(errno.ENOSPC), OnError.ENOSPC, is_read=False)
        await job.pause_point()

    async def main() -> None:
        stage = Stage()
        job = stage.start(stops)
        await asyncio.sleep(1)
        assert stage.events[2:] == ["ERROR", "paused"]
        assert stage.raw[2][1] == {"device": "j", "operation": "write", "action": "stop"}
        assert stage.runner.query_block_jobs()[0]["io-status"] == "nospace"
        with pytest.raises(CommandError, match="paused"):
            await stage.runner.cancel(job, force=False)
        await stage.runner.cancel(job, force=True)
        await stage.runner.wait(job)
        assert stage.events[4:] == ["running", "aborting", "CANCELLED", "concluded", "null"]

    run(main)


def test_resuming_a_stopped_job_clears_its_io_status() -> None:
    """resume resets io-status to ok and lets the job try again."""

    async def stops(job: PlayJob) -> None:
        job.failed_request(BlockIOError(errno.EIO), OnError.STOP, is_read=True)
        await job.pause_point()
        await forever(job)

    async def main() -> None:
        stage = Stage()
        job = stage.start(stops)
        await asyncio.sleep(1)
        assert stage.runner.query_block_jobs()[0]["io-status"] == "failed"
        await stage.runner.resume(job)
        assert stage.runner.query_block_jobs()[0]["io-status"] == "ok"
        await stage.runner.cancel_all()

    run(main)


def test_quitting_ends_all_jobs_newest_first() -> None:
    """Running, paused, pending: none of them holds up a quit."""

    async def main() -> None:
        stage = Stage()
        stage.start(forever, "a")
        paused = stage.start(forever, "b")
        stage.start(nothing, "c", auto_finalize=False)
        await asyncio.sleep(0.1)
        await stage.runner.pause(paused)
        stage.events.clear()
        await stage.runner.cancel_all()
        assert [event for event in stage.events if event.endswith("null")] == ["c null", "b null", "a null"]
        assert stage.runner.jobs == []

    run(main)


def test_a_drained_section_pauses_and_a_cancel_waits_for_its_end() -> None:
    """The graph must not change under somebody's drained section, so the cancelled job ends behind it."""

    async def main() -> None:
        stage = Stage()
        job = stage.start(forever)
        await asyncio.sleep(0.5)
        job.quiesce()
        assert job.is_busy()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not job.is_busy()
        await stage.runner.cancel(job)
        await asyncio.sleep(1)
        assert stage.events[2:] == ["paused"]
        job.resume()
        await stage.runner.wait(job)
        assert stage.events[2:] == ["paused", "running", "aborting", "CANCELLED", "concluded", "null"]

    run(main)


def test_set_speed_wakes_a_sleeper_when_it_goes_faster() -> None:
    """A job that sleeps off a slow limit notices the new one."""

    async def main() -> None:
        stage = Stage()
        turns: list[float] = []

        async def sleeps(job: PlayJob) -> None:
            while True:
                turns.append(asyncio.get_running_loop().time())
                await job.sleep_ns(10**9)

        job = stage.start(sleeps)
        await asyncio.sleep(0.5)
        stage.runner.set_speed(job, 1000)
        await asyncio.sleep(0.25)
        stage.runner.set_speed(job, 0)
        await asyncio.sleep(0)
        assert turns == [0, 0.5, 0.75] or turns == [0, 0.5]
        await asyncio.sleep(0.1)
        assert turns == [0, 0.5, 0.75]
        with pytest.raises(CommandError, match="negative"):
            stage.runner.set_speed(job, -1)
        await stage.runner.cancel_all()

    run(main)


def test_an_abandoned_job_was_created_and_is_null() -> None:
    """A command that fails late shows created and null, and no BLOCK_JOB event."""

    async def main() -> None:
        stage = Stage()
        job = PlayJob(stage.runner, "j", nothing)
        stage.runner.create(job)
        stage.runner.abandon(job)
        assert stage.events == ["created", "null"]

    run(main)


def test_ids_are_checked_and_unique() -> None:
    """One id space for all jobs of a system."""

    async def main() -> None:
        stage = Stage()
        stage.start(forever)
        for bad in ("", "1j", "a b", "-x"):
            with pytest.raises(CommandError, match="job ID"):
                stage.runner.check_id(bad)
        with pytest.raises(DuplicateName):
            stage.runner.check_id("j")
        with pytest.raises(DeviceNotActive):
            stage.runner.find_block_job("k")
        with pytest.raises(CommandError):
            stage.runner.find("k")
        assert stage.runner.find("j") is stage.runner.find_block_job("j")
        await stage.runner.cancel_all()

    run(main)


def test_grouped_jobs_finish_together() -> None:
    """One waits until the other is done; then both are finalized, newest first."""

    async def main() -> None:
        stage = Stage()
        txn = JobTransaction()

        async def slow(job: PlayJob) -> None:
            await job.sleep_ns(10**9)

        jobs = [PlayJob(stage.runner, name, script) for name, script in (("a", nothing), ("b", slow))]
        for job in jobs:
            stage.runner.create(job, txn)
        for job in jobs:
            stage.runner.start(job)
        await stage.runner.wait(jobs[0])
        assert stage.events[4:] == [
            "a waiting", "b waiting", "b pending", "a pending",
            "b COMPLETED", "b concluded", "b null", "a COMPLETED", "a concluded", "a null",
        ]  # fmt: skip

    run(main)


def test_one_failure_cancels_the_group() -> None:
    """The failing job reports its error, the others were cancelled."""

    async def main() -> None:
        stage = Stage()
        txn = JobTransaction()
        jobs = [PlayJob(stage.runner, name, script) for name, script in (("a", forever), ("b", fails), ("c", nothing))]
        for job in jobs:
            stage.runner.create(job, txn)
        for job in jobs:
            stage.runner.start(job)
        for job in jobs:
            await stage.runner.wait(job)
        ends = [event for event in stage.events if event[2:] in ("COMPLETED", "CANCELLED")]
        assert ends == ["c CANCELLED", "b COMPLETED", "a CANCELLED"]

    run(main)


def test_a_group_is_ended_once_when_a_member_fails_at_the_moment_at_which_another_is_cancelled() -> None:
    """Both end the whole group: whoever comes second leaves that to the first."""

    async def main() -> None:
        stage, txn, go = Stage(), JobTransaction(), asyncio.Event()

        async def fails_later(job: PlayJob) -> None:
            await go.wait()
            await fails(job)

        jobs = [PlayJob(stage.runner, name, script) for name, script in (("a", nothing), ("b", fails_later))]
        for job in jobs:
            stage.runner.create(job, txn)
        for job in jobs:
            stage.runner.start(job)
        await LoopClock().sleep_ns(1)
        assert jobs[0].status is JobStatus.WAITING
        go.set()
        await stage.runner.cancel(jobs[0])
        for job in jobs:
            await stage.runner.wait(job)
        assert sorted(event for event in stage.events if event.endswith("null")) == ["a null", "b null"]

    run(main)


def test_the_tables_are_closed() -> None:
    """Every status is reachable, every paused form returns, every verb has a place."""
    assert set(TRANSITIONS) == set(JobStatus)
    assert set().union(*TRANSITIONS.values()) == set(JobStatus) - {JobStatus.UNDEFINED}
    assert set(VERBS) == set(JobVerb)
    for awake, resting in PAUSED_FORM.items():
        assert resting in TRANSITIONS[awake]
        assert TRANSITIONS[resting] == {awake}
