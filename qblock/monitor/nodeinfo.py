"""What query-block, query-named-block-nodes and query-blockstats tell of nodes and devices.

Models QEMU 7.2 (semantics.md sections 3.5, 7, 14.2): implicit filters are left out where QEMU leaves them out, a flat list does
not look down the backing chain, and counters belong to devices while ``wr_highest_offset`` belongs to nodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from qblock.chain import chain_next, skip_implicit
from qblock.driver import BackingLink, SupportsBacking
from qblock.filenames import combine_filename
from qblock.monitor.replies import (
    BlockdevCacheInfo,
    BlockDeviceInfo,
    BlockDeviceStats,
    BlockDirtyInfo,
    BlockStats,
    ImageInfo,
    ImageInfoSpecific,
)
from qblock.nodespec import CommonOptions
from qblock.options import fields

if TYPE_CHECKING:
    from qblock.backend import BlockBackend
    from qblock.devices import GuestDevice
    from qblock.dirty import DirtyBitmap
    from qblock.driver import Json
    from qblock.node import BlockDriverState

_COMMON: Final = frozenset(field.wire for field in fields(CommonOptions)) - {"driver"}
_COUNTERS: Final = tuple(
    field.attribute
    for field in fields(BlockDeviceStats)
    if field.type is int and field.attribute != "wr_highest_offset"
)


def filename_of(node: BlockDriverState) -> str:
    """The plain name from which ``node`` can be opened again, or its options as a ``json:`` name."""
    name = node.driver.filename()
    return name if name is not None else "json:" + json.dumps(_options_of(node))


def _options_of(node: BlockDriverState) -> dict[str, Json]:
    """The options from which ``node`` can be opened again, without those that do not change what it shows."""
    own = {key: value for key, value in node.options_given.items() if key not in _COMMON and key not in node.children}
    options = {"driver": node.driver.name} | own
    for name, edge in node.children.items():
        if edge is not node.backing or name in node.options_given:
            options[name] = _options_of(edge.node)
    return options


def backing_node(node: BlockDriverState) -> BlockDriverState | None:
    """The image below, looked for through filters."""
    return chain_next(node)


def image_info(node: BlockDriverState, *, flat: bool) -> ImageInfo:
    """``ImageInfo`` of a node, with its backing images unless ``flat``."""
    driver = node.driver
    facts = driver.info()
    name = filename_of(node)
    link: BackingLink | None = driver.backing_link() if isinstance(driver, SupportsBacking) else None
    specific = driver.specific_info()
    below = None if flat else backing_node(node)
    return ImageInfo(
        filename=name,
        format=driver.name,
        dirty_flag=facts.dirty,
        actual_size=driver.allocated_size(),
        virtual_size=node.length,
        cluster_size=facts.cluster_size or None,
        backing_filename=None if link is None else link.filename,
        full_backing_filename=None if link is None else combine_filename(name, link.filename),
        backing_filename_format=None if link is None else link.format,
        backing_image=None if below is None else image_info(below, flat=False),
        format_specific=None
        if specific is None
        else ImageInfoSpecific(type=specific["type"], data=dict(specific["data"])),
    )


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


def block_device_info(node: BlockDriverState, *, backend: BlockBackend | None, flat: bool) -> BlockDeviceInfo:
    """``BlockDeviceInfo`` of a node, as a node of its own or as the medium of ``backend``."""
    below = backing_node(node)
    depth, image = 0, below
    while image is not None and not flat:
        depth, image = depth + 1, backing_node(image)
    return BlockDeviceInfo(
        file=filename_of(node),
        node_name=node.node_name,
        ro=node.read_only,
        drv=node.driver.name,
        backing_file=None if below is None else filename_of(below),
        backing_file_depth=depth,
        encrypted=False,
        detect_zeroes=cast(Literal["off", "on", "unmap"], node.detect_zeroes),
        bps=0,
        bps_rd=0,
        bps_wr=0,
        iops=0,
        iops_rd=0,
        iops_wr=0,
        image=image_info(node, flat=flat),
        cache=BlockdevCacheInfo(
            writeback=backend is None or not backend.writethrough,
            direct=node.cache_direct,
            no_flush=node.cache_no_flush,
        ),
        write_threshold=node.write_threshold,
        dirty_bitmaps=[bitmap_info(bitmap) for bitmap in reversed(node.dirty_bitmaps)] or None,
    )


# ----------------------------------------------------------------------------------------------------------- statistics


def node_stats(node: BlockDriverState, *, below: bool) -> BlockStats:
    """The statistics of a node; ``below``: with its backing chain (implicit filters skipped), as for a device."""
    node = skip_implicit(node) if below else node
    storage = node.storage
    backing = node.backing
    return BlockStats(
        node_name=node.node_name,
        stats=_counters({}, node, counted=False),
        driver_specific=_driver_specific(node),
        parent=None if storage is None else node_stats(storage.node, below=below),
        backing=node_stats(backing.node, below=True) if below and backing is not None else None,
    )


def device_stats(backend: BlockBackend) -> BlockStats:
    """The statistics of a device with those of its nodes."""
    device: GuestDevice | None = backend.device
    node = None if backend.root is None else skip_implicit(backend.root.node)
    counters = {} if device is None else device.accounting.snapshot()
    of_node = None if node is None else node_stats(node, below=True)
    return BlockStats(
        device=backend.name,
        qdev=None if device is None else device.path,
        node_name=None if of_node is None else of_node.node_name,
        stats=_counters(counters, node, counted=True),
        driver_specific=None if of_node is None else of_node.driver_specific,
        parent=None if of_node is None else of_node.parent,
        backing=None if of_node is None else of_node.backing,
    )


def _counters(counters: Mapping[str, int], node: BlockDriverState | None, *, counted: bool) -> BlockDeviceStats:
    values: dict[str, Any] = {name: counters.get(name, 0) for name in _COUNTERS}
    if "idle_time_ns" in counters:
        values["idle_time_ns"] = counters["idle_time_ns"]
    return BlockDeviceStats(
        **values,
        wr_highest_offset=0 if node is None else node.wr_highest_offset,
        account_invalid=counted,
        account_failed=counted,
        timed_stats=[],
    )


def _driver_specific(node: BlockDriverState) -> dict[str, Json] | None:
    statistics = getattr(node.driver, "statistics", None)
    return None if statistics is None else {"driver": node.driver.name, **statistics()}
