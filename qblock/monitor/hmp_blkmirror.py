"""Commands of the human monitor as proposed in March 2012 (rfc-2012.md, "Commands, by dialect")."""

from __future__ import annotations

from qblock.monitor.commands.blkmirror_2012 import BLKMIRROR_2012
from qblock.monitor.hmp_command import HmpCall, hmp_command


@hmp_command(
    "drive_mirror",
    "reuse:-n,streaming:-s,device:B,target:s,format:s",
    "[-n] [-s] device target format",
    "write what is written to a device to a second image as well (-n: the image exists; -s: the new image gets no backing "
    "file, so that everything can be streamed into it)",
    since="1.1",
    dialects=BLKMIRROR_2012,
)
async def drive_mirror(call: HmpCall) -> None:
    """drive-mirror; with both flags the image exists, which leaves nothing to say of its backing file."""
    mode = "existing" if call.flag("reuse") else "no-backing-file" if call.flag("streaming") else "absolute-paths"
    await call.qmp(
        "drive-mirror", device=call.text("device"), target=call.text("target"), format=call.text("format"), mode=mode
    )
