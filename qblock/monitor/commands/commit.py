"""block-commit; the checks and the jobs are in `qblock.jobs`: `commit_plan`, `commit` and `active_commit`."""

from __future__ import annotations

import attrs

from qblock.jobs.active_commit import start_commit
from qblock.jobs.commit_plan import CommitRequest
from qblock.jobs.state import OnError
from qblock.monitor.command import CommandContext, command
from qblock.options import option, required


@attrs.frozen
class BlockCommitArguments:
    """Arguments of block-commit."""

    job_id: str | None = option(None, doc="id of the job; the name of the device if absent")
    device: str = required(doc="device or root node whose chain it is about")
    base_node: str | None = option(None, doc="node to commit into; the lowest one of the chain if absent")
    base: str | None = option(None, doc="file name of the image to commit into")
    top_node: str | None = option(None, doc="topmost node to commit; the active layer if absent")
    top: str | None = option(None, doc="file name of the topmost image to commit")
    backing_file: str | None = option(None, doc="name of the new backing file for the header of the image above the top")
    speed: int = option(0, doc="bytes per second, 0 for no limit")
    on_error: OnError = option(OnError.REPORT, doc="what to do when a request fails")
    filter_node_name: str | None = option(None, doc="name for the filter that the job inserts")
    auto_finalize: bool = option(True, doc="make the graph changes without asking")
    auto_dismiss: bool = option(True, doc="forget the job when it has ended")


@command("block-commit", since="1.3")
async def block_commit(ctx: CommandContext, args: BlockCommitArguments) -> None:
    """Move what upper images of a chain hold down into a lower one, so that the upper ones are no longer needed."""
    members = attrs.asdict(args)
    device = members.pop("device")
    await start_commit(ctx.system, device=device, request=CommitRequest(**members))
    if (hit := ctx.system.env.trace.qmp_block_commit) is not None:
        hit(node=device)
