"""The commands of the monitor, one module per subject; `table` collects those that a dialect has."""

from __future__ import annotations

from qblock.monitor.command import CommandTable
from qblock.monitor.commands import (
    backup,
    bitmaps,
    blkmirror_2012,
    blockdev,
    chardevs,
    commit,
    control,
    devices,
    drive_reopen,
    emulator,
    hmp,
    jobs,
    jobs_1_1,
    machine,
    media,
    memory,
    migration,
    mirror,
    qom,
    query,
    rfc_2012,
    snapshots,
    stream,
    throttle,
    tracing,
    transaction,
)
from qblock.monitor.dialects import Dialect

MODULES = (
    backup,
    bitmaps,
    blkmirror_2012,
    blockdev,
    chardevs,
    commit,
    control,
    devices,
    drive_reopen,
    emulator,
    hmp,
    jobs,
    jobs_1_1,
    machine,
    media,
    memory,
    migration,
    mirror,
    qom,
    query,
    rfc_2012,
    snapshots,
    stream,
    throttle,
    tracing,
    transaction,
)


def table(dialect: Dialect) -> CommandTable:
    """All commands of ``dialect``."""
    return CommandTable.of_modules(dialect, MODULES)
