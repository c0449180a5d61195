"""What query-block, query-named-block-nodes and query-blockstats tell of nodes and devices.

Models QEMU 7.2 (semantics.md sections 3.5, 7, 14.2): implicit filters are left out where QEMU leaves them out, a flat list does
not look down the backing chain, and counters belong to devices while ``wr_highest_offset`` belongs to nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import attrs

from qblock.chain import chain_edge, skip_implicit, snapshot_node
from qblock.driver import SupportsSnapshots
from qblock.filenames import combine_filename
from qblock.monitor.replies import (
    BlockdevCacheInfo,
    BlockDeviceInfo,
    BlockDeviceStats,
    BlockDirtyInfo,
    BlockStats,
    ImageInfo,
    ImageInfoSpecific,
    LatencyHistogramInfo,
    SnapshotInfo,
    TimedStatsInfo,
    snapshot_info,
)
from qblock.naming import Names, link_of
from qblock.options import fields, visit
from qblock.throttle_limits import DRIVE_NAMES, RATES

if TYPE_CHECKING:
    from qblock.accounting import DeviceAccounting
    from qblock.backend import BlockBackend
    from qblock.devices.device import GuestDevice
    from qblock.dirty import DirtyBitmap
    from qblock.driver import Json
    from qblock.graph import Graph
    from qblock.node import BlockDriverState
    from qblock.system import BlockSystem

_COUNTERS: Final = tuple(
    field.attribute
    for field in fields(BlockDeviceStats)
    if field.type is int and field.attribute != "wr_highest_offset"
)


def nodes_oldest_first(graph: Graph) -> list[BlockDriverState]:
    """All nodes in QEMU's order of creation, but for those that are being opened or closed."""
    return [node for node in graph.nodes.values() if not node.closed]


def _below(node: BlockDriverState, *, for_device: bool) -> BlockDriverState | None:
    """The next node of the chain; users of a device do not see implicit filters."""
    edge = chain_edge(node)
    return None if edge is None else skip_implicit(edge.node) if for_device else edge.node


@attrs.define(eq=False)
class NodeReports:
    """What is told of nodes in the answer to one question; what several nodes of a chain have in common is worked out once."""

    _names: Names = attrs.field(factory=Names, init=False)
    _images: dict[tuple[BlockDriverState, bool], tuple[ImageInfo, int]] = attrs.field(factory=dict, init=False)

    def image(self, node: BlockDriverState, *, flat: bool, for_device: bool) -> tuple[ImageInfo, int]:
        """``ImageInfo`` of a node, with the nodes below it in its chain unless ``flat``, and how many these are."""
        if flat:
            return self._image(node, None), 0
        chain = [node]
        while (below := _below(chain[-1], for_device=for_device)) is not None and (below, for_device) not in self._images:
            chain.append(below)
        info, depth = (None, -1) if below is None else self._images[below, for_device]
        for image in reversed(chain):
            info, depth = self._image(image, info), depth + 1
            self._images[image, for_device] = info, depth
        assert info is not None
        return info, depth

    def _image(self, node: BlockDriverState, backing_image: ImageInfo | None) -> ImageInfo:
        driver = node.driver
        facts = driver.info()
        name = self._names.filename_of(node)
        link = link_of(node)
        specific = driver.specific_info()
        return ImageInfo(
            filename=name,
            format=driver.name,
            dirty_flag=facts.dirty,
            actual_size=driver.allocated_size(),
            virtual_size=node.length,
            cluster_size=facts.cluster_size or None,
            encrypted=driver.encrypted or None,
            backing_filename=None if link is None else link.filename,
            full_backing_filename=None if link is None else combine_filename(name, link.filename),
            backing_filename_format=None if link is None else link.format,
            snapshots=_snapshots_of(node),
            backing_image=backing_image,
            format_specific=None
            if specific is None
            else ImageInfoSpecific(type=specific["type"], data=dict(specific["data"])),
        )

    def device(self, node: BlockDriverState, *, backend: BlockBackend | None, flat: bool) -> BlockDeviceInfo:
        """``BlockDeviceInfo`` of a node, as a node of its own or as the medium of ``backend``."""
        image, depth = self.image(node, flat=flat, for_device=backend is not None)
        return BlockDeviceInfo(
            file=self._names.filename_of(node),
            node_name=node.node_name,
            ro=node.read_only,
            drv=node.driver.name,
            backing_file=None if node.backing is None else self._names.filename_of(node.backing.node),
            backing_file_depth=depth,
            encrypted=node.driver.encrypted,
            detect_zeroes=cast(Literal["off", "on", "unmap"], node.detect_zeroes),
            **_limits(backend),
            image=image,
            cache=BlockdevCacheInfo(
                writeback=backend is None or not backend.writethrough,
                direct=node.cache_direct,
                no_flush=node.cache_no_flush,
            ),
            write_threshold=_as_signed(node.write_threshold),
            dirty_bitmaps=[bitmap_info(bitmap) for bitmap in reversed(node.dirty_bitmaps)] or None,
        )


def _as_signed(number: int) -> int:
    """A number of 64 bits as QMP shows it, which has a sign."""
    return number - (1 << 64) if number >> 63 else number


def _snapshots_of(node: BlockDriverState) -> list[SnapshotInfo] | None:
    """The internal snapshots, oldest first; None when there are none, as QEMU leaves the member out then."""
    driver = snapshot_node(node).driver
    kept = driver.snapshots() if isinstance(driver, SupportsSnapshots) else ()
    return [snapshot_info(snapshot) for snapshot in kept] or None


def bitmap_info(bitmap: DirtyBitmap) -> BlockDirtyInfo:
    """``BlockDirtyInfo`` of a dirty bitmap."""
    return BlockDirtyInfo(
        name=bitmap.name,
        count=bitmap.count,
        granularity=bitmap.granularity,
        recording=bitmap.recording,
        busy=bitmap.busy or bitmap.successor is not None,
        persistent=bitmap.persistent,
        inconsistent=bitmap.inconsistent or None,
    )


def _limits(backend: BlockBackend | None) -> dict[str, Any]:
    """What a device's limits are, in the members of `BlockDeviceInfo`: averages always, the others when they are set."""
    throttle = None if backend is None else backend.throttle
    if throttle is None:
        return dict.fromkeys((DRIVE_NAMES[name] for name in RATES), 0)
    limits = throttle.group.limits
    shown: dict[str, Any] = {"group": throttle.group.name}
    for name in RATES:
        rate, drive_name = limits.rate(name), DRIVE_NAMES[name]
        shown[drive_name] = rate.average
        if rate.burst:
            shown |= {f"{drive_name}_max": rate.burst, f"{drive_name}_max_length": rate.seconds}
    return shown | ({"iops_size": limits.iops_size} if limits.iops_size else {})


# ----------------------------------------------------------------------------------------------------------- statistics


def node_stats(node: BlockDriverState, *, below: bool) -> BlockStats:
    """The statistics of a node; ``below``: with its backing chain (implicit filters skipped), as for a device."""
    node = skip_implicit(node) if below else node
    storage = node.storage or (next(iter(node.children.values())) if len(node.children) == 1 else None)
    backing = node.backing
    return BlockStats(
        node_name=node.node_name,
        stats=_counters(None, node),
        driver_specific=_driver_specific(node),
        parent=None if storage is None else node_stats(storage.node, below=below),
        backing=node_stats(backing.node, below=True) if below and backing is not None else None,
    )


def shown_backends(system: BlockSystem) -> Iterator[BlockBackend]:
    """The backends that have a name or a guest device, in the order of their creation."""
    return (backend for backend in system.graph.backends if backend.name or backend.device is not None)


def device_stats(backend: BlockBackend) -> BlockStats:
    """The statistics of a device with those of its nodes."""
    device: GuestDevice | None = backend.device
    node = None if backend.root is None else skip_implicit(backend.root.node)
    of_node = None if node is None else node_stats(node, below=True)
    return BlockStats(
        device=backend.name,
        qdev=None if device is None else device.name,
        node_name=None if of_node is None else of_node.node_name,
        stats=_counters(backend.accounting, node),
        driver_specific=None if of_node is None else of_node.driver_specific,
        parent=None if of_node is None else of_node.parent,
        backing=None if of_node is None else of_node.backing,
    )


def _counters(accounting: DeviceAccounting | None, node: BlockDriverState | None) -> BlockDeviceStats:
    """What ``accounting`` has counted, if there is one, and what the node tells of itself."""
    counters = {} if accounting is None else accounting.snapshot()
    values: dict[str, Any] = {name: counters.get(name, 0) for name in _COUNTERS}
    if "idle_time_ns" in counters:
        values["idle_time_ns"] = counters["idle_time_ns"]
    for kind, histogram in ({} if accounting is None else accounting.histograms).items():
        shown = LatencyHistogramInfo(boundaries=list(histogram.boundaries), bins=list(histogram.bins))
        values[f"{kind}_latency_histogram"] = shown
    timed = [] if accounting is None else accounting.timed_stats()
    return BlockDeviceStats(
        **values,
        wr_highest_offset=0 if node is None else node.wr_highest_offset,
        account_invalid=accounting is not None and accounting.account_invalid,
        account_failed=accounting is not None and accounting.account_failed,
        timed_stats=[visit(TimedStatsInfo, shown) for shown in timed],
    )


def _driver_specific(node: BlockDriverState) -> dict[str, Json] | None:
    statistics = getattr(node.driver, "statistics", None)
    return None if statistics is None else {"driver": node.driver.name, **statistics()}
