"""Commands that steer and list jobs: the ``block-job-*`` and ``job-*`` families.

Models semantics.md sections 3.2, 3.5 to 3.8. The two families differ in how a job is looked up (class DeviceNotActive against
GenericError), and in ``job-cancel`` always being forced.
"""

from __future__ import annotations

import attrs

from qblock.driver import Json
from qblock.monitor.command import CommandContext, NoArguments, command
from qblock.monitor.replies import BlockJobInfo, JobInfo
from qblock.options import option, required


@attrs.frozen
class BlockJobArguments:
    """Names a block job."""

    device: str = required(doc="id of the job")


@attrs.frozen
class BlockJobCancelArguments:
    """Arguments of block-job-cancel."""

    device: str = required(doc="id of the job")
    force: bool = option(False, doc="end at once, even if the job is ready or paused")


@attrs.frozen
class BlockJobSetSpeedArguments:
    """Arguments of block-job-set-speed."""

    device: str = required(doc="id of the job")
    speed: int = required(doc="bytes per second, 0 for no limit")


@attrs.frozen
class JobArguments:
    """Names a job of any kind."""

    id: str = required(doc="id of the job")


@command("block-job-pause", since="1.3")
async def block_job_pause(ctx: CommandContext, args: BlockJobArguments) -> None:
    """Pause a block job until somebody resumes it."""
    job = ctx.system.jobs.find_block_job(args.device)
    if (hit := ctx.system.env.trace.qmp_block_job_pause) is not None:
        hit(job=job.id)
    await ctx.system.jobs.pause(job)


@command("block-job-resume", since="1.3")
async def block_job_resume(ctx: CommandContext, args: BlockJobArguments) -> None:
    """Let a paused block job go on; its I/O status becomes ok again."""
    job = ctx.system.jobs.find_block_job(args.device)
    if (hit := ctx.system.env.trace.qmp_block_job_resume) is not None:
        hit(job=job.id)
    await ctx.system.jobs.resume(job)


@command("block-job-cancel", since="1.1")
async def block_job_cancel(ctx: CommandContext, args: BlockJobCancelArguments) -> None:
    """Stop a block job; a ready mirror ends with a consistent copy unless the cancel is forced."""
    job = ctx.system.jobs.find_block_job(args.device)
    if (hit := ctx.system.env.trace.qmp_block_job_cancel) is not None:
        hit(job=job.id)
    await ctx.system.jobs.cancel(job, force=args.force)


@command("block-job-complete", since="1.3")
async def block_job_complete(ctx: CommandContext, args: BlockJobArguments) -> None:
    """Tell a ready job to switch over to its target and end."""
    job = ctx.system.jobs.find_block_job(args.device)
    if (hit := ctx.system.env.trace.qmp_block_job_complete) is not None:
        hit(job=job.id)
    ctx.system.jobs.complete(job)


@command("block-job-finalize", since="2.12")
async def block_job_finalize(ctx: CommandContext, args: JobArguments) -> None:
    """Let a pending block job make its graph changes and end."""
    job = ctx.system.jobs.find_block_job(args.id)
    if (hit := ctx.system.env.trace.qmp_block_job_finalize) is not None:
        hit(job=job.id)
    await ctx.system.jobs.finalize(job)


@command("block-job-dismiss", since="2.12")
async def block_job_dismiss(ctx: CommandContext, args: JobArguments) -> None:
    """Forget a concluded block job."""
    job = ctx.system.jobs.find_block_job(args.id)
    if (hit := ctx.system.env.trace.qmp_block_job_dismiss) is not None:
        hit(job=job.id)
    await ctx.system.jobs.dismiss(job)


@command("block-job-set-speed", since="1.1")
async def block_job_set_speed(ctx: CommandContext, args: BlockJobSetSpeedArguments) -> None:
    """Limit how many bytes per second a block job copies."""
    ctx.system.jobs.set_speed(ctx.system.jobs.find_block_job(args.device), args.speed)


@command("query-block-jobs", since="1.1", returns=list[BlockJobInfo])
async def query_block_jobs(ctx: CommandContext, args: NoArguments) -> list[dict[str, Json]]:
    """List the block jobs, newest first."""
    del args
    return ctx.system.jobs.query_block_jobs()


@command("job-pause", since="3.0")
async def job_pause(ctx: CommandContext, args: JobArguments) -> None:
    """Pause a job until somebody resumes it."""
    job = ctx.system.jobs.find(args.id)
    if (hit := ctx.system.env.trace.qmp_job_pause) is not None:
        hit(job=job.id)
    await ctx.system.jobs.pause(job)


@command("job-resume", since="3.0")
async def job_resume(ctx: CommandContext, args: JobArguments) -> None:
    """Let a paused job go on."""
    job = ctx.system.jobs.find(args.id)
    if (hit := ctx.system.env.trace.qmp_job_resume) is not None:
        hit(job=job.id)
    await ctx.system.jobs.resume(job)


@command("job-cancel", since="3.0")
async def job_cancel(ctx: CommandContext, args: JobArguments) -> None:
    """End a job at once."""
    job = ctx.system.jobs.find(args.id)
    if (hit := ctx.system.env.trace.qmp_job_cancel) is not None:
        hit(job=job.id)
    await ctx.system.jobs.cancel(job, force=True)


@command("job-complete", since="3.0")
async def job_complete(ctx: CommandContext, args: JobArguments) -> None:
    """Tell a ready job to switch over to its target and end."""
    job = ctx.system.jobs.find(args.id)
    if (hit := ctx.system.env.trace.qmp_job_complete) is not None:
        hit(job=job.id)
    ctx.system.jobs.complete(job)


@command("job-finalize", since="3.0")
async def job_finalize(ctx: CommandContext, args: JobArguments) -> None:
    """Let a pending job make its graph changes and end."""
    job = ctx.system.jobs.find(args.id)
    if (hit := ctx.system.env.trace.qmp_job_finalize) is not None:
        hit(job=job.id)
    await ctx.system.jobs.finalize(job)


@command("job-dismiss", since="3.0")
async def job_dismiss(ctx: CommandContext, args: JobArguments) -> None:
    """Forget a concluded job."""
    job = ctx.system.jobs.find(args.id)
    if (hit := ctx.system.env.trace.qmp_job_dismiss) is not None:
        hit(job=job.id)
    await ctx.system.jobs.dismiss(job)


@command("query-jobs", since="3.0", returns=list[JobInfo])
async def query_jobs(ctx: CommandContext, args: NoArguments) -> list[dict[str, Json]]:
    """List the jobs of all kinds, newest first."""
    del args
    return ctx.system.jobs.query_jobs()
