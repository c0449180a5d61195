"""Commands of the human monitor that were different in 2012: mirrors and jobs, and removing a device that has one.

Models the HMP side of the proposal of April 2012 and of QEMU 1.1 (rfc-2012.md, "Commands, by dialect").
"""

from __future__ import annotations

from qblock.errors import DeviceNotFound, NodeBusy
from qblock.monitor import drives
from qblock.monitor.commands.rfc_2012 import RFC_2012
from qblock.monitor.dialects import HISTORIC
from qblock.monitor.hmp_command import HmpCall, PlainError, hmp_command


@hmp_command(
    "drive_mirror",
    "reuse:-n,full:-f,device:B,target:s,format:s?",
    "[-n] [-f] device target [format]",
    "copy a device to a new image and keep the copy up to date (-n: the image exists; -f: copy the whole disk, "
    "not only the top image)",
    since="1.1",
    dialects=RFC_2012,
)
async def drive_mirror(call: HmpCall) -> None:
    """drive-mirror."""
    await call.qmp(
        "drive-mirror", device=call.text("device"), target=call.text("target"), format=call.text("format"),
        full=call.flag("full"), mode="existing" if call.flag("reuse") else "absolute-paths",
    )  # fmt: skip


@hmp_command(
    "block_stream",
    "device:B,speed:o?,base:s?",
    "device [speed [base]]",
    "copy data of backing images into a device",
    since="1.1",
    dialects=HISTORIC,
)
async def block_stream(call: HmpCall) -> None:
    """block-stream."""
    await call.qmp(
        "block-stream", device=call.text("device"), base=call.text("base"), speed=call.number("speed") or 0
    )  # fmt: skip


@hmp_command("block_job_cancel", "device:B", "device", "stop a block job", since="1.1", dialects=HISTORIC)
async def block_job_cancel(call: HmpCall) -> None:
    """block-job-cancel."""
    await call.qmp("block-job-cancel", device=call.text("device"))


@hmp_command(
    "drive_del",
    "id:B",
    "device",
    "take a drive away; its job is cancelled first, and the guest's device stays, without a medium",
    dialects=HISTORIC,
)
async def drive_del(call: HmpCall) -> None:
    """Removes a drive by name; an unknown or busy one is reported without ``Error:``."""
    try:
        await drives.delete_with_jobs(call.context, call.text("id") or "")
    except (DeviceNotFound, NodeBusy) as error:
        raise PlainError(str(error)) from error
