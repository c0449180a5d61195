"""Block jobs and statistics as the monitor of QEMU 1.1 had them, for the dialects of 2011 and 2012.

Models the members that these commands and replies had before 1.3: a job is named by its device, it cannot be paused, and
``block-job-cancel`` has no ``force``. Which jobs there are is the dialect's affair.
"""

from __future__ import annotations

import attrs

from qblock.jobs.stream import StreamRequest, start_stream
from qblock.monitor.command import CommandContext, NoArguments, command
from qblock.monitor.commands.jobs import BlockJobArguments
from qblock.monitor.dialects import HISTORIC, Dialect
from qblock.monitor.nodeinfo import device_stats, shown_backends
from qblock.monitor.replies import BlockStats
from qblock.options import option, required


@attrs.frozen
class BlockStreamOf11:
    """Arguments of block-stream."""

    device: str = required(doc="device to copy into")
    base: str | None = option(None, doc="file name of the image that stays below")
    speed: int = option(0, doc="bytes per second, 0 for no limit")


@attrs.frozen
class BlockJobOf11:
    """Entry of query-block-jobs. A mirror is in sync when ``offset`` equals ``len``."""

    type: str = required(doc="type of the job")
    device: str = required(doc="device that it works on")
    len: int = required(doc="progress that means done")
    offset: int = required(doc="present progress")
    speed: int = required(doc="limit in bytes per second, 0 for none")


@command("block-stream", since="1.1", dialects=HISTORIC - {Dialect.BLKMIRROR_2012})
async def block_stream(ctx: CommandContext, args: BlockStreamOf11) -> None:
    """Copy the data of backing images up into a device, so that it no longer needs them."""
    await start_stream(ctx.system, device=args.device, request=StreamRequest(base=args.base, speed=args.speed))


@command("block-job-cancel", since="1.1", dialects=HISTORIC)
async def block_job_cancel(ctx: CommandContext, args: BlockJobArguments) -> None:
    """Tell a device's job to end; the event tells how it did. A mirror in sync leaves the two sides equal, and completes."""
    await ctx.system.jobs.cancel(ctx.system.jobs.find_block_job(args.device), force=True)


@command("query-block-jobs", since="1.1", returns=list[BlockJobOf11], dialects=HISTORIC)
async def query_block_jobs(ctx: CommandContext, args: NoArguments) -> list[BlockJobOf11]:
    """List the block jobs, newest first."""
    del args
    wanted = [field.name for field in attrs.fields(BlockJobOf11)]
    return [BlockJobOf11(**{name: job[name] for name in wanted}) for job in ctx.system.jobs.query_block_jobs()]


@command("query-blockstats", since="0.14", returns=list[BlockStats], dialects=HISTORIC)
async def query_blockstats(ctx: CommandContext, args: NoArguments) -> list[BlockStats]:
    """Tell how much the devices have read and written."""
    del args
    return [device_stats(backend) for backend in shown_backends(ctx.system)]
