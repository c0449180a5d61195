"""Dirty bitmaps that are busy, read-only or moved on by other commands, on the real QEMU programs and on qblock.

What may be done with them, with what error, and which bits they have. Left out: merging an empty list, of which QEMU 7.2 dies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmp_pair import DAEMONS, SYSTEMS, add, both, do, hmp, io, wait
from test_backup_vs_qemu import DRIVE, IMAGES, JOBS, NODES, OTHER, OUT, TOP, drive_backup
from test_backup_vs_qemu import backup as blockdev_backup
from test_bitmaps_vs_qemu import without_file_length
from test_jobs_vs_qemu import GRAPH, PENDING, READY, Script


def bitmap(verb: str, name: str, node: str = "top", **members: Any) -> dict[str, Any]:
    """A command on a bitmap."""
    return do(f"block-dirty-bitmap-{verb}", node=node, name=name, **members)


def merge(target: str, *sources: Any, node: str = "top") -> dict[str, Any]:
    """block-dirty-bitmap-merge."""
    return do("block-dirty-bitmap-merge", node=node, target=target, bitmaps=list(sources))


def sha(name: str, node: str = "top") -> dict[str, Any]:
    """The hash of a bitmap's bits."""
    return do("x-debug-block-dirty-bitmap-sha256", node=node, name=name)


def verbs(name: str, other: str) -> Script:
    """Everything that can be wanted of a bitmap but its removal, and its merging with another one, both ways."""
    each = [bitmap(verb, name) for verb in ("clear", "enable", "disable", "add")]
    return [*each, merge(name, other), merge(other, name), sha(name)]


def reopened(*, read_only: bool) -> tuple[str, dict[str, Any]]:
    """blockdev-reopen of top, whose file is the node store."""
    return "blockdev-reopen", {"options": [{"driver": "qcow2", "node-name": "top", "file": "store", "read-only": read_only}]}


THREE = [
    DRIVE, bitmap("add", "p", persistent=True), bitmap("add", "q"),
    bitmap("add", "o", persistent=True, disabled=True, granularity=512), io("d", "write -P 9 1M 64k"),
    io("d", "write -P 9 4000k 1k"),
]  # fmt: skip
HASHES = [sha("p"), sha("q"), sha("o")]
ODD_NAMES = [
    bitmap("add", "x" * 1023), bitmap("add", "x" * 1024), bitmap("add", "x" * 1023, persistent=True), bitmap("add", "é"),
    *(bitmap("add", "k", granularity=size) for size in (513, 256, -512, 1 << 32, 1 << 31)),
]  # fmt: skip
IN_DAEMON: dict[str, Script] = {
    "merging between nodes": [
        TOP, OUT, OTHER, bitmap("add", "a"), bitmap("add", "b", granularity=512), bitmap("add", "c", "out"),
        bitmap("add", "o", "other"), merge("a", "b", {"node": "out", "name": "c"}), merge("a", {"node": "other", "name": "o"}),
        merge("a", "a"), merge("a", "b", "nope"), merge("a", {"node": "nope", "name": "c"}), merge("nope", "a"),
        merge("a", {"node": "out"}), merge("a", 5), sha("a"), sha("nope"), bitmap("remove", "a", "nope"),
        bitmap("clear", "zz"), *ODD_NAMES, bitmap("add", "r", "out", persistent=True), NODES,
    ],
    "closed, and opened read-only": [
        TOP, bitmap("add", "p", persistent=True), do("blockdev-del", node_name="top"), add("top", "top.qcow2", read_only=True),
        NODES, bitmap("add", "m", persistent=True), bitmap("add", "n"), bitmap("remove", "p"), *verbs("p", "n"), NODES,
        do("blockdev-del", node_name="top"), TOP, NODES, bitmap("remove", "p"), do("blockdev-del", node_name="top"), TOP, NODES,
    ],
    "added to what stays read-only": [
        do("blockdev-add", driver="file", node_name="store", filename="top.qcow2"),
        do("blockdev-add", driver="qcow2", node_name="top", file="store", read_only=True), bitmap("add", "p", persistent=True),
        do(*reopened(read_only=True)), NODES, bitmap("add", "q"), bitmap("remove", "p"),
        do(*reopened(read_only=True)), bitmap("add", "p", persistent=True), do(*reopened(read_only=False)),
        do(*reopened(read_only=True)), NODES, do("blockdev-del", node_name="top"), TOP, NODES,
    ],
}  # fmt: skip
IN_SYSTEM: dict[str, Script] = {
    "busy in a backup": [
        DRIVE, bitmap("add", "b"), bitmap("add", "p", persistent=True),
        drive_backup(sync="incremental", bitmap="b", auto_finalize=False), PENDING, *verbs("b", "p"), bitmap("remove", "b"),
        merge("p", {"node": "top", "name": "b"}), drive_backup(job_id="k", target="k.qcow2", sync="incremental", bitmap="b"),
        do("job-cancel", id="j"), *verbs("b", "p"), NODES,
    ],
    "below an overlay, and committed into": [
        *THREE, NODES, do("blockdev-snapshot-sync", node_name="top", snapshot_file="s.qcow2", snapshot_node_name="s"), NODES,
        *verbs("p", "q"), *HASHES, bitmap("remove", "p"), OUT,
        blockdev_backup(sync="bitmap", bitmap="p", bitmap_mode="on-success"),
        blockdev_backup(sync="bitmap", bitmap="p", bitmap_mode="always"),
        blockdev_backup(sync="bitmap", bitmap="p", bitmap_mode="never"), wait("JOB_STATUS_CHANGE", status="null", id="j"),
        bitmap("add", "z", "s"), io("d", "write -P 4 2M 64k"),
        merge("z", {"node": "top", "name": "q"}, {"node": "top", "name": "p"}, node="s"), sha("z", "s"), NODES,
        do("block-commit", job_id="c", device="d"), READY, do("job-complete", id="c"),
        wait("JOB_STATUS_CHANGE", status="null", id="c"), NODES, *verbs("p", "q"), *HASHES,
    ],
    "resized": [
        *THREE, do("block_resize", device="d", size=6 << 20), *HASHES, io("d", "write -P 4 5M 64k"), *HASHES,
        do("block_resize", device="d", size=2 << 20), NODES, *HASHES, do("block_resize", device="d", size=4 << 20), *HASHES,
    ],
    "what is refused to drive-backup": [
        DRIVE, drive_backup(target="ex.qcow2", mode="existing", sync="top"), drive_backup(target="other.qcow2", mode="existing"),
        *[drive_backup(target=f"n{number}.img", **members) for number, members in enumerate((
            {"sync": "incremental"}, {"speed": -1}, {"format": "nope"}, {"compress": True, "format": "raw"},
            {"device": "nope"}, {"format": "raw", "sync": "none"}, {"bitmap": "nope", "bitmap_mode": "always"},
        ))],
        drive_backup(target="/nope/x.qcow2"), *JOBS, NODES,
    ],
    "what is refused beside a backup": [
        DRIVE, OUT, blockdev_backup(sync="none", filter_node_name="f"), do("block_resize", device="d", size=8 << 20),
        do("block_resize", node_name="top", size=8 << 20), hmp("drive_del d"),
        *(do("blockdev-del", node_name=name) for name in ("top", "f", "out")), hmp("snapshot_blkdev d s.qcow2 qcow2"),
        do("blockdev-mirror", job_id="m", device="d", target="out", sync="full"), GRAPH,
        do("blockdev-snapshot-sync", node_name="top", snapshot_file="s3.qcow2", snapshot_node_name="s3"), GRAPH,
        io("d", "read 2M 4k"), do("query-block-jobs"), do("job-cancel", id="j"),
        wait("JOB_STATUS_CHANGE", status="null", id="j"), do("query-block"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", [*IN_DAEMON, *IN_SYSTEM])
def test_both_allow_and_refuse_the_same(name: str, tmp_path: Path) -> None:
    """Management tools ask for what they may not do, and must be told so in the same way."""
    pair, script = (DAEMONS, IN_DAEMON[name]) if name in IN_DAEMON else (SYSTEMS, IN_SYSTEM[name])
    real, ours = both(pair, tmp_path, script, IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert without_file_length(got) == without_file_length(expected)
    if name == "what is refused to drive-backup":
        made = [{path.name for path in (tmp_path / who).iterdir() if not path.name.startswith("qmp")} for who in ("real", "ours")]
        assert made[1] == made[0]
