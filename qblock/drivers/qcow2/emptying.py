"""Making an image hold nothing, so that all of its backing file shows through: what follows a commit.

Models ``bdrv_make_empty`` of QEMU's qcow2 driver. The L2 tables of the active disk are dropped whole, none of them is rewritten,
and the end of the file goes back to the host. Internal snapshots keep what is theirs. A crash leaves some of the tables: the disk
then shows in part what it held, which the backing file holds as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qblock.drivers.qcow2.resize import drop_tables
from qblock.drivers.qcow2.shrinking import give_back_end

if TYPE_CHECKING:
    from qblock.drivers.qcow2.allocation import Allocator


async def make_empty(writer: Allocator, *, has_snapshots: bool) -> None:
    """Give up every cluster of the disk. Durable on return; no request may be under way."""
    writer.file.event("empty_image_prepare")
    # Without snapshots nearly all of the file is cut off at its end, and discards before that would be work for nothing.
    await drop_tables(writer, 0, pass_discard=has_snapshots)
    await give_back_end(writer.refcounts, writer.writeback)
