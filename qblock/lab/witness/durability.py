"""A power cut without pulling a plug: what each file was when it was last made durable, and nothing newer.

A process that is killed leaves its writes with the kernel; a host that dies takes along what was not synced. `watch` keeps a copy
of every file below a directory whenever this process syncs it, and `cut_power` puts these copies in the place of the files. This
is the worst that can happen: of what was not synced, a real host may have written any part.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

COPIES: Final = "durable"
"""The directory of the copies, in the one that is watched."""


def watch(directory: Path) -> None:
    """From now on, when this process syncs a file in ``directory``, keep what it is then."""
    copies = directory / COPIES
    copies.mkdir(exist_ok=True)
    for name in ("fsync", "fdatasync"):
        setattr(os, name, _keeping(getattr(os, name), directory, copies))


def _keeping(sync: Callable[[int], None], directory: Path, copies: Path) -> Callable[[int], None]:
    def sync_and_keep(fd: int) -> None:
        sync(fd)
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.parent == directory and path.is_file():
            shutil.copyfile(path, copies / path.name)

    return sync_and_keep


def cut_power(directory: Path, names: Iterable[str]) -> None:
    """Take back what was not durable of the files ``names`` in ``directory``; one that never was is gone."""
    copies = directory / COPIES
    for name in names:
        (directory / name).unlink(missing_ok=True)
        if (copies / name).exists():
            os.rename(copies / name, directory / name)
    shutil.rmtree(copies)
