"""What a backup job is to do: values that the starting command (`backup.py`) checks and completes, and the job reads.

Models the arguments of QEMU's backup job (semantics.md section 4.5).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import attrs

from qblock.jobs.new_copy import SyncMode
from qblock.jobs.state import OnError

if TYPE_CHECKING:
    from qblock.dirty import DirtyBitmap


class BitmapMode(enum.Enum):
    """What becomes of the bitmap at the end, as ``BitmapSyncMode`` on the wire."""

    ON_SUCCESS = "on-success"
    NEVER = "never"
    ALWAYS = "always"


@attrs.frozen(kw_only=True)
class BackupPlan:
    """What to copy. ``max_chunk`` (0: no limit) is the most that one request of the job copies, in bytes, whole clusters;
    ``max_workers`` is how many there may be at a time.
    """

    sync: SyncMode
    bitmap: DirtyBitmap | None = None
    bitmap_mode: BitmapMode = BitmapMode.ON_SUCCESS
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT
    max_workers: int = 64
    max_chunk: int = 0
