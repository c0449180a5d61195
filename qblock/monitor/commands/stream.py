"""block-stream; the checks and the job itself are in `qblock.jobs.stream`."""

from __future__ import annotations

import attrs

from qblock.jobs.state import OnError
from qblock.jobs.stream import StreamRequest, start_stream
from qblock.monitor.command import CommandContext, command
from qblock.options import option, required


@attrs.frozen
class BlockStreamArguments:
    """Arguments of block-stream."""

    job_id: str | None = option(None, doc="id of the job; the name of the device if absent")
    device: str = required(doc="device or node to copy into")
    base: str | None = option(None, doc="file name of the image that stays below")
    base_node: str | None = option(None, doc="node that stays below")
    backing_file: str | None = option(None, doc="name of the new backing file for the image's header")
    bottom: str | None = option(None, doc="lowest node to copy from")
    speed: int = option(0, doc="bytes per second, 0 for no limit")
    on_error: OnError = option(OnError.REPORT, doc="what to do when a request fails")
    filter_node_name: str | None = option(None, doc="name for the filter that the job inserts")
    auto_finalize: bool = option(True, doc="make the graph changes without asking")
    auto_dismiss: bool = option(True, doc="forget the job when it has ended")


@command("block-stream", since="1.1")
async def block_stream(ctx: CommandContext, args: BlockStreamArguments) -> None:
    """Copy the data of backing images up into a device, so that it no longer needs them."""
    request = StreamRequest(
        job_id=args.job_id,
        base=args.base,
        base_node=args.base_node,
        bottom=args.bottom,
        backing_file=args.backing_file,
        speed=args.speed,
        on_error=args.on_error,
        filter_node_name=args.filter_node_name,
        auto_finalize=args.auto_finalize,
        auto_dismiss=args.auto_dismiss,
    )
    job = await start_stream(ctx.system, device=args.device, request=request)
    if (hit := ctx.system.env.trace.qmp_block_stream) is not None:
        hit(node=job.device.node_name)
