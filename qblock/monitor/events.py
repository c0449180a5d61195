"""The events that qblock sends, and the shapes of their data, for introspection and the tests.

They are emitted by the block layer itself (``system.emit``); nothing here is needed to send one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs

from qblock.monitor.command import NoArguments
from qblock.monitor.dialects import BOTH, SYSTEM_ONLY, Dialect
from qblock.monitor.replies import JobStatusName, JobTypeName
from qblock.options import option, required

OperationName = Literal["read", "write"]
ActionName = Literal["ignore", "report", "stop"]


@attrs.frozen
class BlockJobEnd:
    """Data of BLOCK_JOB_CANCELLED and BLOCK_JOB_READY."""

    type: JobTypeName = required(doc="type of the job")
    device: str = required(doc="id of the job")
    len: int = required(doc="progress that means done")
    offset: int = required(doc="present progress")
    speed: int = required(doc="limit in bytes per second, 0 for none")


@attrs.frozen
class BlockJobCompleted(BlockJobEnd):
    """Data of BLOCK_JOB_COMPLETED."""

    error: str | None = option(None, doc="why it failed")


@attrs.frozen
class BlockJobError:
    """Data of BLOCK_JOB_ERROR."""

    device: str = required(doc="id of the job")
    operation: OperationName = required(doc="what failed")
    action: ActionName = required(doc="what was done about it")


@attrs.frozen
class BlockJobPending:
    """Data of BLOCK_JOB_PENDING."""

    type: JobTypeName = required(doc="type of the job")
    id: str = required(doc="id of the job")


@attrs.frozen
class JobStatusChange:
    """Data of JOB_STATUS_CHANGE."""

    id: str = required(doc="id of the job")
    status: JobStatusName = required(doc="its new state")


@attrs.frozen
class BlockIoError:
    """Data of BLOCK_IO_ERROR."""

    device: str = required(doc="name of the backend, possibly empty")
    node_name: str | None = option(None, doc="its node")
    operation: OperationName = required(doc="what failed")
    action: ActionName = required(doc="what was done about it")
    nospace: bool | None = option(None, doc="whether the storage is full")
    reason: str = required(doc="the error as a text")


@attrs.frozen
class BlockImageCorrupted:
    """Data of BLOCK_IMAGE_CORRUPTED."""

    device: str = required(doc="name of the backend, possibly empty")
    node_name: str | None = option(None, doc="the node")
    msg: str = required(doc="what was found")
    offset: int | None = option(None, doc="where, in bytes of the image file")
    size: int | None = option(None, doc="how many bytes are concerned")
    fatal: bool = required(doc="whether the image can no longer be used")


@attrs.frozen
class QuorumFailure:
    """Data of QUORUM_FAILURE."""

    reference: str = required(doc="name of the device, or of the node")
    sector_num: int = required(doc="first sector of 512 bytes of the request")
    sectors_count: int = required(doc="how many it touches")


@attrs.frozen
class QuorumReportBad:
    """Data of QUORUM_REPORT_BAD."""

    type: Literal["read", "write", "flush"] = required(doc="what the child was asked for")
    error: str | None = option(None, doc="the error; absent when the child's data differ from the others'")
    node_name: str = required(doc="the child's node")
    sector_num: int = required(doc="first sector of 512 bytes of the request")
    sectors_count: int = required(doc="how many it touches")


@attrs.frozen
class Shutdown:
    """Data of SHUTDOWN."""

    guest: bool = required(doc="whether the guest asked for it")
    reason: Literal["host-qmp-quit", "host-signal", "host-qmp-system-reset"] = required(doc="why")


@attrs.frozen
class DeviceDeleted:
    """Data of DEVICE_DELETED."""

    device: str | None = option(None, doc="id of the device, if it had one")
    path: str = required(doc="its path")


@attrs.frozen
class DeviceTrayMoved:
    """Data of DEVICE_TRAY_MOVED."""

    device: str = required(doc="name of the drive, possibly empty")
    id: str = required(doc="id or path of the guest device")
    tray_open: bool = required(doc="whether the tray is open now")


@attrs.frozen
class BlockWriteThreshold:
    """Data of BLOCK_WRITE_THRESHOLD."""

    node_name: str = required(doc="the node")
    amount_exceeded: int = required(doc="bytes by which the write ends above the threshold")
    write_threshold: int = required(doc="the threshold, which is not in force any more")


@attrs.frozen
class EventKind:
    """An event: the class of its data, and the dialects that send it."""

    data: type[Any]
    dialects: frozenset[Dialect] = BOTH


EVENTS: Final[Mapping[str, EventKind]] = {
    "BLOCK_IMAGE_CORRUPTED": EventKind(BlockImageCorrupted),
    "BLOCK_IO_ERROR": EventKind(BlockIoError),
    "BLOCK_JOB_CANCELLED": EventKind(BlockJobEnd),
    "BLOCK_JOB_COMPLETED": EventKind(BlockJobCompleted),
    "BLOCK_JOB_ERROR": EventKind(BlockJobError),
    "BLOCK_JOB_PENDING": EventKind(BlockJobPending),
    "BLOCK_JOB_READY": EventKind(BlockJobEnd),
    "BLOCK_WRITE_THRESHOLD": EventKind(BlockWriteThreshold),
    "DEVICE_DELETED": EventKind(DeviceDeleted, SYSTEM_ONLY),
    "DEVICE_TRAY_MOVED": EventKind(DeviceTrayMoved, SYSTEM_ONLY),
    "JOB_STATUS_CHANGE": EventKind(JobStatusChange),
    "POWERDOWN": EventKind(NoArguments, SYSTEM_ONLY),
    "QUORUM_FAILURE": EventKind(QuorumFailure),
    "QUORUM_REPORT_BAD": EventKind(QuorumReportBad),
    "RESET": EventKind(Shutdown, SYSTEM_ONLY),
    "RESUME": EventKind(NoArguments, SYSTEM_ONLY),
    "SHUTDOWN": EventKind(Shutdown, SYSTEM_ONLY),
    "STOP": EventKind(NoArguments, SYSTEM_ONLY),
}
