"""``block_set_io_throttle``: the limits of a drive."""

from __future__ import annotations

from typing import Any

import attrs

from qblock.backend import BlockBackend
from qblock.errors import CommandError
from qblock.monitor.command import CommandContext, command
from qblock.monitor.dialects import SYSTEM_ONLY
from qblock.options import option, required
from qblock.throttle_limits import DRIVE_NAMES, ThrottleLimits, check_limits


def _limit(name: str, doc: str) -> Any:
    return required(doc=doc, name=name)


def _more(name: str, default: int | None, doc: str) -> Any:
    return option(default, doc=doc, name=name)


@attrs.frozen
class BlockIoThrottle:
    """Arguments of block_set_io_throttle. All six rates 0: no limits."""

    device: str | None = option(None, doc="device to limit")
    id: str | None = option(None, doc="guest device to limit, by id or path")
    bps: int = required(doc="bytes per second")
    bps_rd: int = _limit("bps_rd", "bytes read per second")
    bps_wr: int = _limit("bps_wr", "bytes written per second")
    iops: int = required(doc="requests per second")
    iops_rd: int = _limit("iops_rd", "reads per second")
    iops_wr: int = _limit("iops_wr", "writes per second")
    bps_max: int = _more("bps_max", 0, "bytes per second in bursts")
    bps_rd_max: int = _more("bps_rd_max", 0, "bytes read per second in bursts")
    bps_wr_max: int = _more("bps_wr_max", 0, "bytes written per second in bursts")
    iops_max: int = _more("iops_max", 0, "requests per second in bursts")
    iops_rd_max: int = _more("iops_rd_max", 0, "reads per second in bursts")
    iops_wr_max: int = _more("iops_wr_max", 0, "writes per second in bursts")
    bps_max_length: int = _more("bps_max_length", 1, "longest burst of bytes in seconds")
    bps_rd_max_length: int = _more("bps_rd_max_length", 1, "longest burst of bytes read in seconds")
    bps_wr_max_length: int = _more("bps_wr_max_length", 1, "longest burst of bytes written in seconds")
    iops_max_length: int = _more("iops_max_length", 1, "longest burst of requests in seconds")
    iops_rd_max_length: int = _more("iops_rd_max_length", 1, "longest burst of reads in seconds")
    iops_wr_max_length: int = _more("iops_wr_max_length", 1, "longest burst of writes in seconds")
    iops_size: int = _more("iops_size", 0, "a request of more bytes counts as several")
    group: str | None = option(None, doc="the throttle group to join; by default one of the device's own name")

    def limits(self) -> ThrottleLimits:
        """The same as limits, not checked."""
        return ThrottleLimits(**{attribute: getattr(self, name) for attribute, name in DRIVE_NAMES.items()})


@command("block_set_io_throttle", since="1.1", dialects=SYSTEM_ONLY)
async def block_set_io_throttle(ctx: CommandContext, args: BlockIoThrottle) -> None:
    """Limit how much a device reads and writes per second, or lift the limits."""
    backend = _backend(ctx, args)
    if backend.root is None:
        raise CommandError(f"The device '{args.device or args.id}' has no medium")
    limits = args.limits()
    check_limits(limits)
    groups = ctx.system.env.throttle_groups
    if not limits.are_set:
        backend.limit(None)
        return
    present = None if backend.throttle is None else backend.throttle.group.name
    name = args.group if args.group is not None else present or args.device or args.id or ""
    if name != present:
        backend.limit(groups.join(name))
    groups.find(name).set_limits(limits)


def _backend(ctx: CommandContext, args: BlockIoThrottle) -> BlockBackend:
    if (args.device is None) == (args.id is None):
        raise CommandError("A device must be named in one way: by 'device' or by 'id'")
    if args.device is not None:
        return ctx.system.graph.find_backend(args.device)
    return ctx.system.devices.find_disk(str(args.id)).backend
