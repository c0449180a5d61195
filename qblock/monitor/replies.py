"""What commands answer with, as classes: query-qmp-schema, the docs and the tests read the shapes off them.

Names and members are those of QAPI in QEMU 7.2, without the members of features that qblock does not have. Sizes and offsets
are bytes, times nanoseconds unless a name says otherwise.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import attrs

from qblock import snapshots
from qblock.options import option, required, visit

IoStatusName = Literal["ok", "failed", "nospace"]
JobTypeName = Literal[
    "commit", "stream", "mirror", "backup", "create", "amend", "snapshot-load", "snapshot-save", "snapshot-delete",
    "block-copy",
]  # fmt: skip
"""Those of QEMU 7.2, and the live block copy of 2011, which is a job only here."""
JobStatusName = Literal[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]
RunStateName = Literal["prelaunch", "running", "paused", "io-error", "shutdown", "save-vm", "restore-vm"]
PermissionName = Literal["consistent-read", "write", "write-unchanged", "resize"]


def snake(name: str, doc: str) -> Any:
    """A required member whose wire name is spelled with underscores."""
    return required(doc=doc, name=name)


def snake_optional(name: str, doc: str) -> Any:
    """The same for a member that may be absent."""
    return option(None, doc=doc, name=name)


# -------------------------------------------------------------------------------------------------------------- general


@attrs.frozen
class VersionTriple:
    """A version of QEMU."""

    major: int = required(doc="major number")
    minor: int = required(doc="minor number")
    micro: int = required(doc="micro number")


@attrs.frozen
class VersionInfo:
    """Reply of query-version."""

    qemu: VersionTriple = required(doc="the QEMU version whose behaviour is modelled")
    package: str = required(doc="the program that answers")


@attrs.frozen
class CommandInfo:
    """Entry of query-commands."""

    name: str = required(doc="name of the command")


@attrs.frozen
class StatusInfo:
    """Reply of query-status."""

    running: bool = required(doc="whether the guest runs")
    singlestep: bool = required(doc="always false")
    status: RunStateName = required(doc="run state")


@attrs.frozen
class NameInfo:
    """Reply of query-name."""

    name: str | None = option(None, doc="name of the machine, if it has one")


@attrs.frozen
class AddfdInfo:
    """Reply of add-fd."""

    fdset_id: int = required(doc="number of the set")
    fd: int = required(doc="the descriptor in this program")


@attrs.frozen
class FdsetFdInfo:
    """A descriptor of a set."""

    fd: int = required(doc="the descriptor in this program")
    opaque: str | None = option(None, doc="what its owner says of it")


@attrs.frozen
class FdsetInfo:
    """Entry of query-fdsets."""

    fdset_id: int = required(doc="number of the set")
    fds: list[FdsetFdInfo] = required(doc="its descriptors, newest first")


@attrs.frozen
class ChardevInfo:
    """Entry of query-chardev."""

    label: str = required(doc="id of the character device")
    filename: str = required(doc="where it leads")
    frontend_open: bool = required(doc="whether something uses it")


# ----------------------------------------------------------------------------------------------------------------- jobs


@attrs.frozen
class BlockJobInfo:
    """Entry of query-block-jobs."""

    type: str = required(doc="type of the job")
    device: str = required(doc="id of the job")
    len: int = required(doc="progress that means done")
    offset: int = required(doc="present progress")
    busy: bool = required(doc="whether the job is working right now")
    paused: bool = required(doc="whether anything holds the job")
    speed: int = required(doc="limit in bytes per second, 0 for none")
    io_status: IoStatusName = required(doc="the last error that stopped the job")
    ready: bool = required(doc="whether the job may be completed")
    status: JobStatusName = required(doc="state of the job")
    auto_finalize: bool = required(doc="whether it finalizes itself")
    auto_dismiss: bool = required(doc="whether it dismisses itself")
    error: str | None = option(None, doc="why it failed")


@attrs.frozen
class JobInfo:
    """Entry of query-jobs."""

    id: str = required(doc="id of the job")
    type: JobTypeName = required(doc="type of the job")
    status: JobStatusName = required(doc="state of the job")
    current_progress: int = required(doc="present progress")
    total_progress: int = required(doc="progress that means done")
    error: str | None = option(None, doc="why it failed")


# --------------------------------------------------------------------------------------------------------------- images


@attrs.frozen
class ImageInfoSpecific:
    """What only the driver of an image knows."""

    type: str = required(doc="the driver")
    data: dict[str, Any] = required(doc="its facts")


@attrs.frozen
class SnapshotInfo:
    """An internal snapshot."""

    icount: int | None = option(None, doc="instructions that the guest had executed")
    vm_clock_nsec: int = required(doc="nanoseconds of the guest's clock beyond its seconds")
    name: str = required(doc="its name")
    date_sec: int = required(doc="when it was made, in seconds since 1970")
    date_nsec: int = required(doc="nanoseconds beyond these")
    vm_clock_sec: int = required(doc="seconds of the guest's clock")
    id: str = required(doc="its id, unique in the image")
    vm_state_size: int = required(doc="bytes of the machine's state")


def snapshot_info(snapshot: snapshots.SnapshotInfo) -> SnapshotInfo:
    """``SnapshotInfo`` of an internal snapshot."""
    result: SnapshotInfo = visit(SnapshotInfo, snapshot.as_json())
    return result


@attrs.frozen
class ImageInfo:
    """An image as it is in its file."""

    filename: str = required(doc="name from which it can be opened again")
    format: str = required(doc="its driver")
    dirty_flag: bool | None = option(None, doc="whether it was not closed cleanly")
    actual_size: int | None = option(None, doc="bytes taken on the host")
    virtual_size: int = required(doc="bytes that the guest sees")
    cluster_size: int | None = option(None, doc="bytes in a cluster")
    encrypted: bool | None = option(None, doc="whether it is encrypted; absent when not")
    backing_filename: str | None = option(None, doc="backing file as the header names it")
    full_backing_filename: str | None = option(None, doc="the same, resolved against the image's directory")
    backing_filename_format: str | None = option(None, doc="driver of the backing file")
    snapshots: list[SnapshotInfo] | None = option(None, doc="its internal snapshots, if it has any")
    backing_image: ImageInfo | None = option(None, doc="the image below")
    format_specific: ImageInfoSpecific | None = option(None, doc="what only the driver knows")


@attrs.frozen
class BlockdevCacheInfo:
    """Caching of a node or a device."""

    writeback: bool = required(doc="whether writes complete before they are durable")
    direct: bool = required(doc="whether the page cache is bypassed")
    no_flush: bool = required(doc="whether flushes are ignored")


@attrs.frozen
class BlockDirtyInfo:
    """A dirty bitmap."""

    name: str | None = option(None, doc="name, absent for internal ones")
    count: int = required(doc="dirty bytes")
    granularity: int = required(doc="bytes per bit")
    recording: bool = required(doc="whether writes are recorded")
    busy: bool = required(doc="whether a job or an export uses it")
    persistent: bool = required(doc="whether it is stored in the image")
    inconsistent: bool | None = option(None, doc="true: it was not stored in time and can only be removed")


@attrs.frozen
class BlockDeviceInfo:
    """A node, seen by itself or as the medium of a device. Limits are those of the device; a node by itself has none."""

    file: str = required(doc="name of the image")
    node_name: str | None = option(None, doc="name of the node")
    ro: bool = required(doc="whether it is read-only")
    drv: str = required(doc="its driver")
    backing_file: str | None = snake_optional("backing_file", "name of the backing image, filters skipped")
    backing_file_depth: int = snake("backing_file_depth", "backing images below")
    encrypted: bool = required(doc="whether the image is encrypted")
    detect_zeroes: Literal["off", "on", "unmap"] = snake("detect_zeroes", "what becomes of written zeroes")
    bps: int = required(doc="limit in bytes per second")
    bps_rd: int = snake("bps_rd", "the same for reads")
    bps_wr: int = snake("bps_wr", "the same for writes")
    iops: int = required(doc="limit in requests per second")
    iops_rd: int = snake("iops_rd", "the same for reads")
    iops_wr: int = snake("iops_wr", "the same for writes")
    bps_max: int | None = snake_optional("bps_max", "bytes per second in bursts")
    bps_rd_max: int | None = snake_optional("bps_rd_max", "the same for reads")
    bps_wr_max: int | None = snake_optional("bps_wr_max", "the same for writes")
    iops_max: int | None = snake_optional("iops_max", "requests per second in bursts")
    iops_rd_max: int | None = snake_optional("iops_rd_max", "the same for reads")
    iops_wr_max: int | None = snake_optional("iops_wr_max", "the same for writes")
    bps_max_length: int | None = snake_optional("bps_max_length", "longest burst in seconds")
    bps_rd_max_length: int | None = snake_optional("bps_rd_max_length", "the same for reads")
    bps_wr_max_length: int | None = snake_optional("bps_wr_max_length", "the same for writes")
    iops_max_length: int | None = snake_optional("iops_max_length", "longest burst of requests in seconds")
    iops_rd_max_length: int | None = snake_optional("iops_rd_max_length", "the same for reads")
    iops_wr_max_length: int | None = snake_optional("iops_wr_max_length", "the same for writes")
    iops_size: int | None = snake_optional("iops_size", "a request of more bytes counts as several")
    group: str | None = option(None, doc="throttle group that the device is a member of")
    image: ImageInfo = required(doc="the image, with those below it unless the list is flat")
    cache: BlockdevCacheInfo = required(doc="caching")
    write_threshold: int = snake("write_threshold", "0: none is set")
    dirty_bitmaps: list[BlockDirtyInfo] | None = option(None, doc="dirty bitmaps, newest first")


@attrs.frozen
class BlockInfo:
    """Entry of query-block: a named backend, or one with a guest device."""

    device: str = required(doc="name of the backend, possibly empty")
    qdev: str | None = option(None, doc="path or id of the guest device")
    type: str = required(doc="always 'unknown'")
    removable: bool = required(doc="whether the medium can be changed")
    locked: bool = required(doc="whether the guest holds the medium")
    inserted: BlockDeviceInfo | None = option(None, doc="the medium")
    tray_open: bool | None = snake_optional("tray_open", "state of the tray, if there is one")
    io_status: IoStatusName | None = option(None, doc="the last error that stopped the guest, if errors can stop it")


# ----------------------------------------------------------------------------------------------------------- statistics


@attrs.frozen
class LatencyHistogramInfo:
    """How many requests took how long."""

    boundaries: list[int] = required(doc="nanoseconds at which one bin ends and the next one begins")
    bins: list[int] = required(doc="requests in each of them, one more than boundaries")


@attrs.frozen
class TimedStatsInfo:
    """How long requests took over the last ``interval_length`` seconds; times are nanoseconds."""

    interval_length: int = snake("interval_length", "seconds that are looked at")
    min_rd_latency_ns: int = snake("min_rd_latency_ns", "shortest read")
    max_rd_latency_ns: int = snake("max_rd_latency_ns", "longest read")
    avg_rd_latency_ns: int = snake("avg_rd_latency_ns", "mean of the reads")
    min_wr_latency_ns: int = snake("min_wr_latency_ns", "shortest write")
    max_wr_latency_ns: int = snake("max_wr_latency_ns", "longest write")
    avg_wr_latency_ns: int = snake("avg_wr_latency_ns", "mean of the writes")
    min_flush_latency_ns: int = snake("min_flush_latency_ns", "shortest flush")
    max_flush_latency_ns: int = snake("max_flush_latency_ns", "longest flush")
    avg_flush_latency_ns: int = snake("avg_flush_latency_ns", "mean of the flushes")
    avg_rd_queue_depth: float = snake("avg_rd_queue_depth", "how many reads were under way on average")
    avg_wr_queue_depth: float = snake("avg_wr_queue_depth", "how many writes were under way on average")


@attrs.frozen
class BlockDeviceStats:
    """Counters of a device; those of a plain node are 0 except for ``wr_highest_offset``."""

    rd_bytes: int = snake("rd_bytes", "bytes read")
    wr_bytes: int = snake("wr_bytes", "bytes written")
    unmap_bytes: int = snake("unmap_bytes", "bytes discarded")
    rd_operations: int = snake("rd_operations", "reads")
    wr_operations: int = snake("wr_operations", "writes")
    flush_operations: int = snake("flush_operations", "flushes")
    unmap_operations: int = snake("unmap_operations", "discards")
    rd_total_time_ns: int = snake("rd_total_time_ns", "time in reads")
    wr_total_time_ns: int = snake("wr_total_time_ns", "time in writes")
    flush_total_time_ns: int = snake("flush_total_time_ns", "time in flushes")
    unmap_total_time_ns: int = snake("unmap_total_time_ns", "time in discards")
    wr_highest_offset: int = snake("wr_highest_offset", "end of the highest write")
    rd_merged: int = snake("rd_merged", "always 0: reads are not merged")
    wr_merged: int = snake("wr_merged", "always 0: writes are not merged")
    unmap_merged: int = snake("unmap_merged", "always 0: discards are not merged")
    idle_time_ns: int | None = snake_optional("idle_time_ns", "time since the last request")
    failed_rd_operations: int = snake("failed_rd_operations", "failed reads")
    failed_wr_operations: int = snake("failed_wr_operations", "failed writes")
    failed_flush_operations: int = snake("failed_flush_operations", "failed flushes")
    failed_unmap_operations: int = snake("failed_unmap_operations", "failed discards")
    invalid_rd_operations: int = snake("invalid_rd_operations", "reads that were invalid")
    invalid_wr_operations: int = snake("invalid_wr_operations", "writes that were invalid")
    invalid_flush_operations: int = snake("invalid_flush_operations", "flushes that were invalid")
    invalid_unmap_operations: int = snake("invalid_unmap_operations", "discards that were invalid")
    account_invalid: bool = snake("account_invalid", "whether invalid requests reset the idle time")
    account_failed: bool = snake("account_failed", "whether failed requests count for the times")
    rd_latency_histogram: LatencyHistogramInfo | None = snake_optional("rd_latency_histogram", "how long reads took")
    wr_latency_histogram: LatencyHistogramInfo | None = snake_optional("wr_latency_histogram", "how long writes took")
    flush_latency_histogram: LatencyHistogramInfo | None = snake_optional(
        "flush_latency_histogram", "how long flushes took"
    )
    timed_stats: list[TimedStatsInfo] = snake("timed_stats", "times over each of the drive's stats-intervals")


@attrs.frozen
class BlockStats:
    """Entry of query-blockstats: a device, or a node with the nodes below it."""

    device: str | None = option(None, doc="name of the backend")
    qdev: str | None = option(None, doc="path or id of the guest device")
    node_name: str | None = option(None, doc="name of the node")
    stats: BlockDeviceStats = required(doc="the counters")
    driver_specific: dict[str, Any] | None = option(None, doc="counters of the driver's own")
    parent: BlockStats | None = option(None, doc="the storage child")
    backing: BlockStats | None = option(None, doc="the backing image")


# ---------------------------------------------------------------------------------------------------------------- graph


VertexKind: TypeAlias = Literal["block-backend", "block-job", "block-driver"]
"""What a vertex of the graph dump stands for."""


@attrs.frozen
class XDbgBlockGraphNode:
    """A vertex of the graph dump."""

    id: int = required(doc="number within this reply")
    type: VertexKind = required(doc="kind of vertex")
    name: str = required(doc="device name, job id or node name")


@attrs.frozen
class XDbgBlockGraphEdge:
    """An edge of the graph dump."""

    parent: int = required(doc="id of the user")
    child: int = required(doc="id of what is used")
    name: str = required(doc="what the user calls the child")
    perm: list[PermissionName] = required(doc="what the user takes")
    shared_perm: list[PermissionName] = required(doc="what it lets others take")


@attrs.frozen
class XDbgBlockGraph:
    """Reply of x-debug-query-block-graph."""

    nodes: list[XDbgBlockGraphNode] = required(doc="all vertices")
    edges: list[XDbgBlockGraphEdge] = required(doc="all edges")


@attrs.frozen
class BlockDirtyBitmapSha256:
    """Reply of x-debug-block-dirty-bitmap-sha256."""

    sha256: str = required(doc="hash of the bits, in hexadecimal")


@attrs.frozen
class TraceEventInfo:
    """An item of trace-event-get-state's reply."""

    name: str = required(doc="name of the event")
    state: Literal["unavailable", "disabled", "enabled"] = required(doc="whether it is logged")
    vcpu: bool = required(doc="whether each CPU has a state of its own; never so here")
