"""``block_copy`` of the human monitor: the live block copy of June 2011, which had no QMP command.

Models the proposal's command line (rfc-2012.md, "What it is compared with"); the copy itself is in `qblock.jobs.block_copy`.
"""

from __future__ import annotations

from qblock.errors import CommandError
from qblock.jobs.block_copy import start_block_copy
from qblock.monitor.dialects import Dialect
from qblock.monitor.hmp_command import HmpCall, hmp_command


@hmp_command(
    "block_copy",
    "device:B,filename:F,incremental:-i",
    "device filename [-i]",
    "copy a device to an image file and continue on it by itself (-i: only the top image, the base is shared)",
    dialects=frozenset({Dialect.BLOCK_COPY_2011}),
)
async def block_copy(call: HmpCall) -> None:
    """Starts the copy; it goes on in the background."""
    filename = call.text("filename") or ""
    if filename.startswith("-"):  # or a disk would end up in a file called -i
        raise CommandError(f"The file name comes first, then -i; write './{filename}' for a file of that name")
    await start_block_copy(
        call.context.system,
        device=call.text("device") or "",
        filename=filename,
        incremental=call.flag("incremental"),
    )
