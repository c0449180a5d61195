"""How HMP shows the replies of queries to a person.

Models hmp-block.md sections 2 and 3 to the letter; texts come from the JSON of the QMP replies alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qblock.imageinfo import human_lines

if TYPE_CHECKING:
    from qblock.driver import Json

_STATS: Final = (
    "rd_bytes",
    "wr_bytes",
    "rd_operations",
    "wr_operations",
    "flush_operations",
    "wr_total_time_ns",
    "rd_total_time_ns",
    "flush_total_time_ns",
    "rd_merged",
    "wr_merged",
    "idle_time_ns",
)
"""The counters that ``info blockstats`` shows, in its order."""


def block_devices(devices: Sequence[Mapping[str, Json]], wanted: str | None, *, verbose: bool) -> Iterator[str]:
    """``info block``: the reply of query-block; only the device ``wanted`` if given.

    As in QEMU, an empty line parts two entries even when the first was skipped.
    """
    for index, info in enumerate(devices):
        if wanted is not None and wanted != info["device"]:
            continue
        if index:
            yield ""
        yield from _stanza(info, info.get("inserted"), verbose=verbose)


def named_nodes(nodes: Sequence[Mapping[str, Json]], wanted: str | None, *, verbose: bool) -> Iterator[str]:
    """``info block -n``: the reply of query-named-block-nodes; only the node ``wanted`` if given."""
    shown = [node for node in nodes if wanted is None or node.get("node-name") == wanted]
    for index, node in enumerate(shown):
        if index:
            yield ""
        yield from _stanza(None, node, verbose=verbose)


def _stanza(info: Mapping[str, Json] | None, inserted: Mapping[str, Json] | None, *, verbose: bool) -> Iterator[str]:
    yield _head(info, inserted)
    if info is not None:
        yield from _device_lines(info)
    if inserted is None:
        return
    yield _row("Cache mode", _cache_mode(inserted["cache"]))
    if "backing_file" in inserted:
        yield _row("Backing file", f"{inserted['backing_file']} (chain depth: {inserted['backing_file_depth']})")
    if inserted["detect_zeroes"] != "off":
        yield _row("Detect zeroes", inserted["detect_zeroes"])
    if any(inserted[name] for name in _AVERAGES):
        yield _row("I/O throttling", _limits(inserted))
    if verbose:
        yield from ("", "Images:")
        image: Mapping[str, Json] | None = inserted["image"]
        while image is not None:
            yield from human_lines(image)
            image = image.get("backing-image")


def _head(info: Mapping[str, Json] | None, inserted: Mapping[str, Json] | None) -> str:
    node_name = (inserted or {}).get("node-name", "")
    if info is not None and info["device"]:
        name = info["device"] + (f" ({node_name})" if node_name else "")
    else:
        name = node_name or (info or {}).get("qdev") or "<anonymous>"
    if inserted is None:
        return f"{name}: [not inserted]"
    mode = (", read-only" if inserted["ro"] else "") + (", encrypted" if inserted["encrypted"] else "")
    return f"{name}: {inserted['file']} ({inserted['drv']}{mode})"


def _device_lines(info: Mapping[str, Json]) -> Iterator[str]:
    if info.get("qdev"):
        yield _row("Attached to", info["qdev"])
    if info.get("io-status", "ok") != "ok":
        yield _row("I/O status", info["io-status"])
    if info["removable"]:
        lock = "" if info["locked"] else "not "
        yield _row("Removable device", f"{lock}locked, tray {'open' if info.get('tray_open') else 'closed'}")


def _row(label: str, value: str) -> str:
    return f"    {label + ':':<17} {value}"


def _limits(inserted: Mapping[str, Json]) -> str:
    """``bps=… bps_rd=… …``: all limits of a device, those that are not set as 0."""
    names = [name for unit in ("bps", "iops") for tail in ("", "_max") for name in _kinds(unit, tail)]
    values = [f"{name}={inserted.get(name, 0)}" for name in (*names, "iops_size")]
    return " ".join([*values, f"group={inserted['group']}"])


def _kinds(unit: str, tail: str = "") -> tuple[str, ...]:
    return tuple(f"{unit}{kind}{tail}" for kind in ("", "_rd", "_wr"))


_AVERAGES: Final = (*_kinds("bps"), *_kinds("iops"))


def _cache_mode(cache: Mapping[str, bool]) -> str:
    mode = "writeback" if cache["writeback"] else "writethrough"
    return mode + (", direct" if cache["direct"] else "") + (", ignore flushes" if cache["no-flush"] else "")


def block_jobs(jobs: Sequence[Mapping[str, Json]]) -> Iterator[str]:
    """``info block-jobs``: the reply of query-block-jobs."""
    if not jobs:
        yield "No active jobs"
    for job in jobs:
        what = "Streaming device" if job["type"] == "stream" else f"Type {job['type']}, device"
        yield (
            f"{what} {job['device']}: Completed {job['offset']} of {job['len']} bytes, "
            f"speed limit {job['speed']} bytes/s"
        )


def block_stats(stats: Iterable[Mapping[str, Json]]) -> Iterator[str]:
    """``info blockstats``: the reply of query-blockstats."""
    for entry in stats:
        counters = " ".join(f"{name}={entry['stats'].get(name, 0)}" for name in _STATS)
        yield f"{entry.get('device', '')}: {counters}"
