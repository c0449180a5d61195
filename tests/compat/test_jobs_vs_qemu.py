"""Jobs in unusual moments on the real QEMU programs and on qblock: the same replies, events and permissions.

Left out of the comparison is what `qmp_pair.comparable` leaves out.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmp_pair import DAEMONS, SYSTEMS, Pair, add, both, do, hmp, wait

IMAGES = [
    ["qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M"],
    ["qemu-io", "-c", "write -P 1 0 64k", "base.qcow2"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2"],
    ["qemu-io", "-c", "write -P 2 1M 64k", "mid.qcow2"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"],
    ["qemu-io", "-c", "write -P 3 2M 64k", "top.qcow2"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "out.qcow2", "4M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "other.qcow2", "8M"],
]
GRAPH = do("x-debug-query-block-graph")
LOOK = [do("query-jobs"), do("query-block-jobs"), do("query-named-block-nodes"), GRAPH]
TOP, OUT = add("top", "top.qcow2"), add("out", "out.qcow2")
READY, PENDING = wait("BLOCK_JOB_READY"), wait("BLOCK_JOB_PENDING")
CONCLUDED, GONE = wait("JOB_STATUS_CHANGE", status="concluded"), wait("JOB_STATUS_CHANGE", status="null")
Script = list[dict[str, Any]]


def mirror(**members: Any) -> dict[str, Any]:
    """blockdev-mirror from top to out."""
    usual: dict[str, Any] = {"job_id": "j", "device": "top", "target": "out", "sync": "full"}
    return do("blockdev-mirror", **(usual | members))


def stream(**members: Any) -> dict[str, Any]:
    """block-stream into top, or as said."""
    usual: dict[str, Any] = {"job_id": "s", "device": "top", "auto_finalize": False}
    return do("block-stream", **(usual | members))


_LAYERS: tuple[tuple[str, dict[str, Any]], ...] = (("base", {}), ("mid", {"backing": "base"}), ("top", {"backing": "mid"}))
CHAIN = [
    do("blockdev-add", driver="qcow2", node_name=name, file={"driver": "file", "filename": f"{name}.qcow2"}, **below)
    for name, below in _LAYERS
]  # fmt: skip
THREE = [
    step
    for number in range(3)
    for step in (
        *(do("blockdev-add", driver="null-co", node_name=f"{side}{number}", size=1 << 20) for side in "st"),
        do("blockdev-mirror", job_id=f"j{number}", device=f"s{number}", target=f"t{number}", sync="full"),
        wait("BLOCK_JOB_READY", device=f"j{number}"),
    )
]
"""Three jobs that are ready."""
SCRIPTS: dict[str, Script] = {
    "three jobs rest when all nodes are drained, and go one after the other": [
        *THREE, OUT, do("blockdev-snapshot-sync", node_name="out", snapshot_file="s.qcow2", snapshot_node_name="s"),
        do("job-pause", id="j1"), wait("JOB_STATUS_CHANGE", id="j1", status="standby"), do("quit"),
    ],
    "cancelled while pending": [
        TOP, OUT, mirror(auto_finalize=False, auto_dismiss=False), READY, do("job-complete", id="j"), PENDING, *LOOK,
        do("block-job-cancel", device="j"), CONCLUDED, *LOOK, do("job-finalize", id="j"), mirror(),
        do("job-dismiss", id="j"), *LOOK,
    ],
    "finished without a switch": [
        TOP, OUT, mirror(auto_finalize=False, auto_dismiss=False, filter_node_name="f"), READY,
        do("block-job-cancel", device="j"), PENDING, *LOOK, do("block-job-finalize", id="j"), *LOOK,
    ],
    "quit with a ready job": [TOP, OUT, mirror(auto_dismiss=False), READY, do("quit")],
    "quit with a pending job": [
        TOP, OUT, mirror(auto_finalize=False, auto_dismiss=False), READY, do("job-complete", id="j"), PENDING,
        do("quit"),
    ],
    "quit with a concluded job": [
        TOP, OUT, mirror(auto_dismiss=False), READY, do("job-complete", id="j"), CONCLUDED, do("quit"),
    ],
    "snapshots drain all jobs": [
        TOP, OUT, add("other", "other.qcow2"), mirror(), READY,
        do("blockdev-snapshot-sync", node_name="other", snapshot_file="s.qcow2", snapshot_node_name="s"),
        do("blockdev-snapshot", node="nope", overlay="s"), do("blockdev-snapshot", node="top", overlay="s"),
        do("blockdev-snapshot-sync", node_name="top", snapshot_file="s2.qcow2", snapshot_node_name="s2"), *LOOK,
    ],
    "a read-only source": [
        add("top", "top.qcow2", read_only=True), OUT, mirror(), READY, *LOOK, do("job-complete", id="j"), GONE, *LOOK,
    ],
    "a target of another size": [
        TOP, add("other", "other.qcow2"), mirror(target="other", auto_dismiss=False), CONCLUDED, *LOOK,
    ],
    "a stream to a base": [
        *CHAIN, stream(base_node="base"), PENDING, *LOOK, do("block_resize", node_name="top", size=1 << 20),
        do("blockdev-del", node_name="mid"), do("job-finalize", id="s"), *LOOK,
    ],
    "a stream to a base right below a filter": [
        CHAIN[0], do("blockdev-add", driver="blkdebug", node_name="f", image="base"),
        do("blockdev-add", driver="qcow2", node_name="mid", file={"driver": "file", "filename": "mid.qcow2"}, backing="f"),
        stream(device="mid", base_node="base"), PENDING, do("job-finalize", id="s"), GONE, *LOOK,
    ],
    "a stream to the image itself, seen through a filter": [
        *CHAIN, do("blockdev-add", driver="blkdebug", node_name="f", image="top"),
        stream(device="f", base_node="top", backing_file="x"), stream(device="f", base_node="f"), *LOOK,
    ],
    "a stream in the middle": [
        *CHAIN, stream(device="mid", filter_node_name="f", backing_file="x"), stream(device="mid", filter_node_name="f"),
        PENDING, *LOOK, do("job-finalize", id="s"), *LOOK,
    ],
    "streams that are refused": [
        *CHAIN, *[
            stream(**members) for members in (
                {"filter_node_name": ""}, {"filter_node_name": "mid"}, {"speed": -1}, {"backing_file": "x"},
                {"bottom": "mid", "base": "base.qcow2"}, {"base": "top.qcow2"}, {"base_node": "top"}, {"bottom": "nope"},
                {"on_error": "x"}, {"device": ""}, {"device": "mid", "base_node": "top"},
            )
        ], GRAPH,
    ],
    "copy-on-read": [
        TOP, do("blockdev-add", driver="copy-on-read", node_name="c", file="top"),
        do("blockdev-add", driver="copy-on-read", node_name="d", file="top", read_only=True),
        add("out", "out.qcow2", read_only=True), do("blockdev-add", driver="copy-on-read", node_name="e", file="out"),
        GRAPH,
    ],
    "a target under a filter": [
        TOP, do("blockdev-add", driver="copy-on-read", node_name="c", file="top"), OUT, mirror(device="top"),
        mirror(device="c", target="top"), mirror(device="c", replaces="out"), mirror(device="c", replaces="top"), READY,
        GRAPH, do("job-complete", id="j"), GONE, *LOOK,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_tell_the_same_of_jobs_in_unusual_moments(name: str, tmp_path: Path) -> None:
    """A management tool looks at the machine, or changes its mind, when it is least convenient."""
    real, ours = both(DAEMONS, tmp_path, SCRIPTS[name], IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected


def test_a_guest_that_writes_zeroes_leaves_the_copy_as_small_as_in_qemu(tmp_path: Path) -> None:
    """In write-blocking mode zeroes reach the target as zeroes, also where whole clusters have to be written."""
    pair: Pair = SYSTEMS
    zeroes = hmp('qemu-io d "write -z 1M 512k"')
    script = [
        hmp("drive_add 0 if=none,id=d,file=top.qcow2,format=qcow2"), OUT,
        mirror(device="d", sync="none", copy_mode="write-blocking"), READY, zeroes, do("query-block-jobs"),
        do("job-cancel", id="j"), GONE,
    ]  # fmt: skip
    real, ours = both(pair, tmp_path, script, IMAGES)
    assert ours == real
    maps = [
        json.loads(subprocess.check_output(["qemu-img", "map", "--output=json", tmp_path / who / "out.qcow2"]))
        for who in ("real", "ours")
    ]
    assert maps[1] == maps[0]


def test_a_drive_with_a_job_is_not_deleted(tmp_path: Path) -> None:
    """HMP's drive_del says so, the drive and the job stay, and once the job has gone it works."""
    delete = hmp("drive_del d")
    script = [
        hmp("drive_add 0 if=none,id=d,file=top.qcow2,format=qcow2"), OUT,
        mirror(device="d"), READY, delete, *LOOK, do("query-block"), do("job-cancel", id="j"), GONE, delete, *LOOK,
        do("query-block"),
    ]  # fmt: skip
    real, ours = both(SYSTEMS, tmp_path, script, IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected
