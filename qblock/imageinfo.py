"""What an image says of itself: QMP's ``ImageInfo``, and its layout for a person.

Layout and order of members are those of qemu-img 7.2. QEMU prints members in the order of its hash table; the order here
is a literal, so that output can be compared byte for byte. All sizes are bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from qblock.chain import skip_filters, snapshot_node
from qblock.driver import BackingLink, SupportsBacking, SupportsSnapshots
from qblock.filenames import combine_filename
from qblock.naming import filename_of
from qblock.snapshots import SnapshotInfo, list_lines
from qblock.units import format_size

if TYPE_CHECKING:
    from qblock.node import BlockDriverState

ORDER: Final = (
    "ivgen-alg", "hash-alg", "cipher-alg", "uuid", "ivgen-hash-alg",
    "snapshots", "backing-filename-format", "virtual-size", "filename", "cluster-size", "format", "actual-size",
    "format-specific", "encrypted", "full-backing-filename", "backing-filename", "dirty-flag",
    "type", "data",
    "compat", "compression-type", "lazy-refcounts", "bitmaps", "refcount-bits", "encrypt", "data-file", "data-file-raw",
    "corrupt", "extended-l2", "flags", "icount", "vm-clock-nsec", "name", "granularity", "date-sec", "date-nsec",
    "vm-clock-sec", "id", "vm-state-size",
)  # fmt: skip
_EMPTY_LIST: Final = re.compile(r'^( *)("[^"\\]*": )\[\](,?)$', re.MULTILINE)
"""No string can look like it: a line that ends in a string ends in its quote."""
_RANK: Final = {key: rank for rank, key in enumerate(ORDER)}


def in_order(value: Any, rank: Mapping[str, int] = _RANK) -> Any:
    """JSON with the members of all objects in QEMU's order; members unknown to it come last."""
    if isinstance(value, Mapping):
        return {key: in_order(value[key], rank) for key in sorted(value, key=lambda key: rank.get(key, len(rank)))}
    if isinstance(value, (list, tuple)):
        return [in_order(item, rank) for item in value]
    return value


def json_text(value: Any) -> str:
    """JSON in the layout of the real tools, which end the line inside of an empty list as well."""
    text = json.dumps(value, indent=4, ensure_ascii=False)
    return _EMPTY_LIST.sub(r"\1\2[\n\1]\3", text)


def specific_lines(data: Mapping[str, Any]) -> list[str]:
    """Nested JSON as lines for a person, indented by four blanks."""
    lines: list[str] = []
    for key, value in data.items():
        lines += _entry(key.replace("-", " "), value)
    return lines


def _entry(title: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        inner = specific_lines(value)
    elif isinstance(value, (list, tuple)):
        inner = [line for index, item in enumerate(value) for line in _entry(f"[{index}]", item)]
    else:
        return [f"{title}: {str(value).lower() if isinstance(value, bool) else value}"]
    return [f"{title}:", *(f"    {line}" for line in inner)]


def image_info(node: BlockDriverState) -> dict[str, Any]:
    """QMP's ``ImageInfo`` of one image, without its backing image's."""
    node = skip_filters(node)
    driver = node.driver
    info = driver.info()
    link: BackingLink | None = driver.backing_link() if isinstance(driver, SupportsBacking) else None
    result: dict[str, Any] = {
        "virtual-size": node.length,
        "filename": filename if (filename := driver.filename()) is not None else filename_of(node),
        "format": driver.name,
    }
    if info.dirty is not None:
        result["dirty-flag"] = info.dirty
    if driver.encrypted:
        result["encrypted"] = True
    if (size := driver.allocated_size()) is not None:
        result["actual-size"] = size
    if info.cluster_size:
        result["cluster-size"] = info.cluster_size
    keeper = snapshot_node(node).driver
    if isinstance(keeper, SupportsSnapshots) and (snapshots := keeper.snapshots()):
        result["snapshots"] = [snapshot.as_json() for snapshot in snapshots]
    if (specific := driver.specific_info()) is not None:
        result["format-specific"] = specific
    if link is not None:
        result["backing-filename"] = link.filename
        result["full-backing-filename"] = combine_filename(result["filename"], link.filename)
        if link.format:
            result["backing-filename-format"] = link.format
    ordered: dict[str, Any] = in_order(result)
    return ordered


def human_lines(info: Mapping[str, Any]) -> Iterable[str]:
    """The report for a person on one image."""
    yield f"image: {info['filename']}"
    yield f"file format: {info['format']}"
    yield f"virtual size: {format_size(info['virtual-size'])} ({info['virtual-size']} bytes)"
    yield f"disk size: {format_size(info['actual-size']) if 'actual-size' in info else 'unavailable'}"
    if info.get("encrypted"):
        yield "encrypted: yes"
    if "cluster-size" in info:
        yield f"cluster_size: {info['cluster-size']}"
    if info.get("dirty-flag"):
        yield "cleanly shut down: no"
    if "backing-filename" in info:
        name, full = info["backing-filename"], info["full-backing-filename"]
        yield f"backing file: {name}" + (f" (actual path: {full})" if full != name else "")
        if "backing-filename-format" in info:
            yield f"backing file format: {info['backing-filename-format']}"
    yield from list_lines(map(SnapshotInfo.of_json, info.get("snapshots", ())))
    if "format-specific" in info:
        yield "Format specific information:"
        for line in specific_lines(info["format-specific"]["data"]):
            yield f"    {line}"
