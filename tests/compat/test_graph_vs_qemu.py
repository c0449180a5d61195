"""Changes of the graph beside the real programs: blockdev-reopen and internal snapshots, accepted, refused and undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmp_pair import DAEMONS, SYSTEMS, both, do, io, together, wait, wire

IMAGES = [
    ["qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "1M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "top.qcow2", "1M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "other.qcow2", "1M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "ov.qcow2"],
    ["qemu-img", "create", "-q", "-f", "raw", "r.raw", "1M"],
]


def file(filename: str, **members: Any) -> dict[str, Any]:
    """Options of a file node."""
    return {"driver": "file", "filename": filename} | wire(members)


def qcow2(name: str, storage: str | dict[str, Any], **members: Any) -> dict[str, Any]:
    """Options of a qcow2 node."""
    return {"driver": "qcow2", "node-name": name, "file": storage} | wire(members)


def add(options: dict[str, Any]) -> dict[str, Any]:
    """blockdev-add."""
    return do("blockdev-add", options)


def reopen(*options: dict[str, Any]) -> dict[str, Any]:
    """blockdev-reopen."""
    return do("blockdev-reopen", options=list(options))


NODES = do("query-named-block-nodes", flat=True)
TOP: dict[str, Any] = {"driver": "qcow2", "node-name": "top", "file": "tf"}
BACKING = [
    add(file("top.qcow2", node_name="tf")), add(file("base.qcow2", node_name="bf", read_only=True)),
    add(qcow2("base", "bf", read_only=True)), add(qcow2("other", file("other.qcow2"))),
    add({**TOP, "backing": None}), reopen({**TOP, "backing": "base"}), NODES,
    reopen(TOP), reopen({**TOP, "backing": "top"}), reopen({**TOP, "backing": "nope"}), reopen({**TOP, "backing": 5}),
    reopen({"driver": "raw", "node-name": "top", "file": "tf"}), reopen({"driver": "qcow2", "file": "tf"}),
    reopen(qcow2("zz", "tf")), reopen({**TOP, "file": file("top.qcow2"), "backing": "base"}),
    reopen({**TOP, "backing": "other"}), NODES, reopen({**TOP, "backing": None}), NODES,
    reopen({**TOP, "backing": "other"}, qcow2("other", "bf")), NODES, do("x-debug-query-block-graph"),
    reopen({**TOP, "backing": "base"}, qcow2("other", "tf")), NODES,
    reopen({**TOP, "backing": None, "lazy-refcounts": True, "l2-cache-size": 1 << 20}),
    reopen({**TOP, "backing": None, "overlap-check": "all", "pass-discard-other": True}),
    reopen({**TOP, "backing": None, "detect-zeroes": "unmap"}), reopen({**TOP, "backing": None, "nope": 1}),
    reopen({**TOP, "backing": None, "detect-zeroes": "on", "cache": {"no-flush": True}}), NODES,
    reopen(file("r.raw", node_name="tf")), reopen(file("top.qcow2", node_name="tf", read_only=True)),
    reopen(file("top.qcow2", node_name="tf", locking="off")), do("blockdev-del", node_name="bf"),
    do("blockdev-del", node_name="base"), add(qcow2("ov", file("ov.qcow2", node_name="of"))), NODES,
    reopen(qcow2("ov", "of", backing="top")), NODES, reopen(qcow2("ov", "tf", backing="top")),
    do("block-stream", job_id="j", device="ov", speed=1), wait("JOB_STATUS_CHANGE", status="null"),
    reopen(qcow2("ov", "of", backing=None)), NODES, do("blockdev-snapshot", node="top", overlay="ov"), NODES,
]  # fmt: skip
FLAGS = [
    add(qcow2("top", file("top.qcow2", node_name="tf"), read_only=True)), NODES, reopen(TOP), NODES,
    reopen({**TOP, "read-only": False}), NODES, reopen({**TOP, "cache": {"no-flush": True}}), NODES,
    reopen({**TOP, "read-only": True}), NODES, reopen({**TOP, "read-only": True, "auto-read-only": True}), NODES,
    add(file("ov.qcow2", node_name="c", aio="threads")), add(qcow2("q", "c", discard="unmap", backing=None)),
    reopen(qcow2("q", "c", backing=None, discard="ignore"), file("ov.qcow2", node_name="c", aio="threads", read_only=True)),
    reopen(
        qcow2("q", "c", backing=None, read_only=True), file("ov.qcow2", node_name="c", aio="threads", read_only=True)
    ), NODES,
    reopen(qcow2("q", "c", backing=None), file("ov.qcow2", node_name="c", aio="threads")), NODES,
    reopen(file("ov.qcow2", node_name="c", aio="threads", read_only=False, force_share=True)),
    add({"driver": "null-co", "node-name": "n", "size": 1 << 20}),
    reopen({"driver": "null-co", "node-name": "n", "size": 1 << 21}), reopen({"driver": "null-co", "node-name": "n"}),
    add({"driver": "copy-on-read", "node-name": "cor", "file": "q"}),
    reopen({"driver": "copy-on-read", "node-name": "cor", "file": "n"}),
    add({"driver": "blkdebug", "node-name": "bd", "image": "n"}),
    reopen({"driver": "blkdebug", "node-name": "bd", "image": "n"}), NODES,
    reopen({"driver": "blkdebug", "node-name": "bd", "image": "q"}),
    add({"driver": "raw", "node-name": "w", "file": "n"}), reopen({"driver": "raw", "node-name": "w", "file": "q"}), NODES,
    reopen({"driver": "raw", "node-name": "w", "file": "q", "size": 1 << 30}),
    do("x-debug-query-block-graph"), reopen({"driver": "raw", "node-name": "w", "file": "n", "size": 4096}), NODES,
]  # fmt: skip


def keep(device: str, name: str) -> dict[str, Any]:
    """blockdev-snapshot-internal-sync."""
    return do("blockdev-snapshot-internal-sync", device=device, name=name)


def drop(device: str, **members: Any) -> dict[str, Any]:
    """blockdev-snapshot-delete-internal-sync."""
    return do("blockdev-snapshot-delete-internal-sync", device=device, **members)


def kept(device: str, name: str) -> tuple[str, dict[str, Any]]:
    """The action."""
    return "blockdev-snapshot-internal-sync", {"device": device, "name": name}


INTERNAL = [
    add(qcow2("top", file("top.qcow2"))), add(qcow2("ro", file("base.qcow2"), read_only=True)),
    add(qcow2("ov", file("ov.qcow2"), backing="ro")), add({"driver": "raw", "node-name": "r", "file": file("r.raw")}),
    add(qcow2("alone", file("other.qcow2"), read_only=True)),
    keep("top", ""), keep("top", "one"), keep("top", "one"), keep("top", "two"), keep("nope", "x"), keep("r", "x"),
    keep("ro", "x"), keep("alone", "x"), keep("ov", "x" * 255), NODES,
    drop("top"), drop("top", id="9"), drop("top", name="zz"), drop("top", id="1", name="two"),
    drop("top", id="1", name="one"), keep("top", "three"), keep("top", "1"), drop("top", id="two"), drop("top", name="two"),
    drop("nope", name="x"), drop("r"), drop("r", name="q"), drop("ro", name="q"), drop("ov"),
    together(kept("top", "t"), ("abort", {})), NODES, together(kept("top", "t"), kept("ov", "t")), NODES,
    together(kept("top", "u"), kept("top", "u")), NODES, together(kept("top", "v"), completion_mode="grouped"),
    do("block_resize", node_name="top", size=2 << 20), NODES, do("block_resize", node_name="top", size=1 << 20),
    do("block-dirty-bitmap-add", node="top", name="b", persistent=True), keep("top", "wb"), drop("top", name="wb"), NODES,
    add({"driver": "copy-on-read", "node-name": "c", "file": "ov"}), add({"driver": "raw", "node-name": "w", "file": "c"}),
    add({"driver": "copy-before-write", "node-name": "b", "file": "w", "target": "r"}),
    keep("c", "filtered"), keep("w", "raw"), keep("b", "x"), NODES, drop("w", name="filtered"), drop("b", name="raw"), NODES,
    *(do("blockdev-del", node_name=name) for name in ("b", "w", "c")),
    do("blockdev-mirror", job_id="m", device="top", target="r", sync="full"),
    wait("BLOCK_JOB_READY"), keep("top", "busy"), drop("top", name="t"),
    together(("blockdev-snapshot", {"node": "top", "overlay": "ov"}), kept("ov", "late")), NODES,
]  # fmt: skip


def change(parent: str, **members: Any) -> dict[str, Any]:
    """x-blockdev-change."""
    return do("x-blockdev-change", parent=parent, **members)


def quorum(name: str, *children: str, **members: Any) -> dict[str, Any]:
    """Options of a quorum of which two must agree."""
    return {"driver": "quorum", "node-name": name, "children": list(children), "vote-threshold": 2} | wire(members)


QUORUM = [
    *(add({"driver": "null-co", "node-name": f"n{number}", "size": 1 << 20}) for number in range(6)),
    add(quorum("q", "n0", "n1", "n2")),
    add(quorum("v", "n4", "n5", blkverify=True)), change("q"), change("q", child="children.0", node="n3"),
    change("nope", node="n3"), change("q", node="nope"), change("n0", node="n3"), change("n0", child="file"),
    change("q", child="nope"), change("q", node="n3"), NODES, change("q", node="n3"), change("q", node="q"),
    change("q", node="n2"), NODES, change("q", child="children.1"), NODES, change("q", node="n1"), NODES,
    change("q", child="children.0"), change("q", child="children.2"), change("q", child="children.3"), NODES,
    change("q", child="children.4"), change("v", child="children.0"), change("v", node="n2"), NODES,
    do("blockdev-del", node_name="n3"), do("blockdev-del", node_name="n0"), do("x-debug-query-block-graph"),
    add(qcow2("top", file("top.qcow2"))), change("top", child="file"), change("top", node="n2"),
]  # fmt: skip


def null(name: str, **members: Any) -> dict[str, Any]:
    """A node without an image."""
    return add({"driver": "null-co", "node-name": name, "size": 1 << 20} | wire(members))


def over(driver: str, name: str, **members: Any) -> dict[str, Any]:
    """A node over others."""
    return add({"driver": driver, "node-name": name} | wire(members))


def snapshot(node: str, overlay: str) -> dict[str, Any]:
    """blockdev-snapshot."""
    return do("blockdev-snapshot", node=node, overlay=overlay)


GRAPH = do("x-debug-query-block-graph")
USED_OVERLAYS = [
    null("a"), null("b"), null("c"), null("t"), add(qcow2("top", file("top.qcow2"))), over("raw", "r", file="top"),
    snapshot("a", "top"), NODES, GRAPH, add(qcow2("base", file("base.qcow2"))),
    add(qcow2("other", file("other.qcow2"), backing="base")), snapshot("b", "base"), NODES, GRAPH,
    add(qcow2("ov", file("ov.qcow2"), backing=None)),
    do("blockdev-mirror", job_id="m", device="c", target="ov", sync="none"), wait("BLOCK_JOB_READY"), snapshot("b", "ov"),
    GRAPH, add(file("r.raw", node_name="short", read_only=True)),
    add({"driver": "raw", "node-name": "w", "file": "short", "read-only": True}),
    add({"driver": "copy-on-read", "node-name": "x", "file": "w", "read-only": True}),
    do("block_resize", node_name="base", size=2 << 20), snapshot("short", "base"), NODES,
    do("blockdev-mirror", job_id="n", device="r", target="t", sync="none", auto_finalize=False),
    snapshot("c", "r"),
]  # fmt: skip
PASSED_ON = [
    null("n"), do("object-add", qom_type="throttle-group", id="g"), add(qcow2("top", file("top.qcow2"))),
    over("raw", "r", file="top"), over("throttle", "f", file="r", throttle_group="g"), over("blkdebug", "e", image="f"),
    over("quorum", "q", children=["n"], vote_threshold=1), over("blklogwrites", "w", file="r", log="n"), NODES,
    do("query-blockstats", query_nodes=True), keep("top", "s0"), NODES, keep("f", "s1"), keep("e", "s2"),
    keep("q", "s3"), keep("w", "s3"), NODES,
    do("blockdev-snapshot-delete-internal-sync", device="e", name="s1"), NODES,
    over("copy-on-read", "c", file="w"), GRAPH, add(qcow2("base", file("base.qcow2"), backing="n")),
    over("blkdebug", "d", image="base"), NODES,
]  # fmt: skip
REFUSALS = [
    null("a", force_share=False), null("b", read_only=True), null("c", cache={}), null("c", cache={"direct": False}),
    null("z", size=(1 << 63) - 1), null("z", size=(1 << 63) - (1 << 30) + 1), null("z", size=(1 << 63) - (1 << 30)), NODES,
    *(
        reopen({"driver": "null-co", "node-name": name, "size": 1 << 20, "read-only": True, **more})
        for name in ("a", "b")
        for more in ({}, {"force-share": True}, {"force-share": False}, {"cache": {}}, {"cache": {"no-flush": True}})
    ), NODES, over("copy-before-write", "cbw", file="a", target="c"), over("snapshot-access", "s", file="cbw"),
    reopen({"driver": "copy-before-write", "node-name": "cbw", "file": "a", "target": "c"}),
    reopen({"driver": "snapshot-access", "node-name": "s", "file": "cbw"}),
    add(file("r.raw", node_name="f", x_check_cache_dropped=True)), reopen(file("r.raw", node_name="f")),
    *(
        step
        for value in (-1, 5, -(1 << 63), (1 << 63) - 1, 0)
        for step in (do("block-set-write-threshold", node_name="f", write_threshold=value), NODES)
    ),
]  # fmt: skip


def raw(storage: Any, **members: Any) -> dict[str, Any]:
    """Options of a raw node."""
    return {"driver": "raw", "node-name": "r", "file": storage} | wire(members)


OPENED = file("r.raw", node_name="f")
BELOW: dict[str, Any] = {"driver": "qcow2", "node-name": "b", "file": file("base.qcow2")}
DESCRIBED_CHILDREN = [
    add(raw(OPENED)), add(file("top.qcow2", node_name="tf")), add({**TOP, "backing": BELOW}), NODES,
    *(
        reopen(raw(storage))
        for storage in (
            OPENED, {**OPENED, "read-only": True}, {**OPENED, "locking": "auto"}, file("r.raw"), OPENED, file("other.qcow2"),
            {"driver": "file"}, {}, "f", "tf", None,
        )
    ), NODES, reopen(raw("f", size=512)), reopen(raw("f")), NODES,
    *(
        step
        for backing in (
            BELOW, {**BELOW, "lazy-refcounts": True}, {**BELOW, "read-only": False}, {"driver": "qcow2", "file": BELOW["file"]},
            {**BELOW, "node-name": "x"}, {**BELOW, "driver": "raw"}, {}, "b", None,
        )
        for step in (reopen({**TOP, "backing": backing}), NODES)
    ), add({**BELOW, "node-name": "e", "backing": ""}),
    *(add({"driver": "null-co", "node-name": f"n{size}"} | ({"size": size} if size else {})) for size in (0, 1 << 30)),
    *(
        reopen({"driver": "null-co", "node-name": name} | options)
        for name in ("n0", f"n{1 << 30}") for options in ({}, {"size": 1 << 30}, {"read-zeroes": False})
    ),
    *(reopen(file("r.raw", node_name="f", **options)) for options in ({"locking": "auto"}, {"drop_cache": False}, {})),
]  # fmt: skip
FOUND: dict[str, Any] = {"driver": "qcow2", "file": file("base.qcow2")}
NAMED_BY_IMAGES = [
    add(qcow2("ov", file("ov.qcow2"))), NODES,
    *(
        step
        for backing in (
            FOUND, {**FOUND, "lazy-refcounts": True}, {**FOUND, "detect-zeroes": "on"}, {**FOUND, "read-only": False}, FOUND,
            {**FOUND, "node-name": "x"}, {**FOUND, "driver": "raw"}, {**FOUND, "file": file("other.qcow2")}, {},
            {**FOUND, "file": file("./base.qcow2")}, {**FOUND, "file": file("base.qcow2", aio="threads")},
        )
        for step in (reopen(qcow2("ov", file("ov.qcow2"), backing=backing)), NODES)
    ),
]  # fmt: skip


def _comparable(value: Any) -> Any:
    if isinstance(value, dict):
        if value.get("format") == "file":
            value = value | {"virtual-size": "…"}  # how an image lies in its file is up to the allocator
        return {key: _comparable(item) for key, item in value.items() if key not in _TIMES}
    return [_comparable(item) for item in value] if isinstance(value, list) else value


_TIMES = {"date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"}


@pytest.mark.qemu
@pytest.mark.parametrize(
    "script", [BACKING, FLAGS, INTERNAL, QUORUM, USED_OVERLAYS, PASSED_ON, REFUSALS, DESCRIBED_CHILDREN, NAMED_BY_IMAGES],
    ids=[
        "other backing and file", "flags and options", "internal snapshots", "children of a quorum", "overlays in use",
        "snapshots through filters", "odd options", "children by their options",
        "children that images name",
    ],
)
def test_both_answer_alike(script: list[dict[str, Any]], tmp_path: Path) -> None:
    """Replies, events, the nodes that there are afterwards and what they say of themselves."""
    real, ours = both(DAEMONS, tmp_path, script, IMAGES)
    for expected, got in zip(_comparable(real), _comparable(ours), strict=True):
        assert got == expected


@pytest.mark.qemu
def test_neither_monitor_waits_for_a_node_that_a_pending_mirror_holds(tmp_path: Path) -> None:
    """aio requests on the source are answered, and so is what reads the target; the job can be finalized."""
    script = [
        *(add(qcow2(name, file(f"{name}.qcow2"))) for name in ("base", "other")),
        do("blockdev-mirror", job_id="j", device="base", target="other", sync="full", auto_finalize=False),
        wait("BLOCK_JOB_READY"), do("job-complete", id="j"), wait("JOB_STATUS_CHANGE", status="pending"),
        *(io("base", line) for line in ("aio_write 0 4k", "aio_read 0 4k", "aio_flush", "length")),
        *(io("other", line) for line in ("read 0 4k", "aio_read 0 4k", "flush")),
        do("job-finalize", id="j"), wait("JOB_STATUS_CHANGE", status="null"), io("other", "read -P 0 0 4k"),
    ]  # fmt: skip
    real, ours = both(SYSTEMS, tmp_path, script, IMAGES)
    assert ours == real
