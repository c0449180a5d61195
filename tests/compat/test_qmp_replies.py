"""The same QMP scripts on the real QEMU programs and on qblock: the same replies and events.

Left out of the comparison: message texts, times, versions, allocated sizes, and the numbers in automatic node names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmp_pair import DAEMONS, SYSTEMS, Pair, add, both, do, hmp, wait

IMAGES = [
    ["qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "8M"],
    ["qemu-io", "-c", "write -P 1 0 1M", "base.qcow2"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"],
    ["qemu-img", "create", "-q", "-f", "raw", "r.raw", "1M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "out.qcow2", "8M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "ov.qcow2", "8M"],
]


NODES = [
    add("top", "top.qcow2"), do("query-named-block-nodes"), do("query-named-block-nodes", flat=True), do("query-block"),
    do("query-blockstats"), do("query-blockstats", query_nodes=True), do("x-debug-query-block-graph"),
    add("top", "top.qcow2"), add("9x", "out.qcow2"), do("blockdev-add", driver="qcow2", file="top"),
    do("blockdev-add", driver="nope", node_name="x"), do("blockdev-add", driver="null-co", node_name="n0", bogus=1),
    do("blockdev-add", driver="raw", node_name="n0", file={"driver": "file", "filename": "r.raw"}, offset=512),
    add("q2", "mid.qcow2", backing=None, read_only=True),
    do("query-named-block-nodes", flat=True), do("blockdev-del", node_name="nope"), do("blockdev-del", node_name="n0"),
    do("blockdev-del", node_name="n0"), do("blockdev-del", node_name="top", bogus=1), do("query-named-block-nodes"),
]  # fmt: skip
BITMAPS = [
    add("top", "top.qcow2"), do("block-dirty-bitmap-add", node="top", name="b0"),
    do("block-dirty-bitmap-add", node="top", name="b0"), do("block-dirty-bitmap-add", node="top", name=""),
    do("block-dirty-bitmap-add", node="top", name="b1", granularity=1000),
    do("block-dirty-bitmap-add", node="top", name="b1", granularity=256),
    do("block-dirty-bitmap-add", node="nope", name="b1"),
    do("block-dirty-bitmap-add", node="top", name="b1", disabled=True, granularity=512),
    do("block-dirty-bitmap-clear", node="top", name="nope"), do("block-dirty-bitmap-remove", node="nope", name="b1"),
    do("block-dirty-bitmap-merge", node="top", target="b0", bitmaps=["b1", {"node": "top", "name": "b1"}]),
    do("block-dirty-bitmap-merge", node="top", target="b0", bitmaps=["b1", "nope"]),
    do("block-dirty-bitmap-merge", node="top", target="b0", bitmaps=[5]),
    do("block-dirty-bitmap-enable", node="top", name="b1"), do("block-dirty-bitmap-disable", node="top", name="b0"),
    do("x-debug-block-dirty-bitmap-sha256", node="top", name="b0"), do("query-named-block-nodes", flat=True),
    do("block-dirty-bitmap-remove", node="top", name="b0"), do("query-named-block-nodes", flat=True),
]  # fmt: skip
MIRROR = [
    add("top", "top.qcow2"), add("out", "out.qcow2"),
    do("blockdev-mirror", device="top", target="out", sync="full"),
    do("blockdev-mirror", job_id="9j", device="top", target="out", sync="full"),
    do("blockdev-mirror", job_id="j", device="top", target="out", sync="incremental"),
    do("blockdev-mirror", job_id="j", device="top", target="out"),
    do("blockdev-mirror", job_id="j", device="top", target="out", sync="x"),
    do("blockdev-mirror", job_id="j", device="top", target="out", sync="full", granularity=100),
    do("blockdev-mirror", job_id="j", device="top", target="out", sync="full", speed=-1),
    do("blockdev-mirror", job_id="j", device="top", target="out", sync="full"), wait("BLOCK_JOB_READY"),
    do("query-jobs"), do("query-block-jobs"), do("x-debug-query-block-graph"), do("query-named-block-nodes", flat=True),
    do("blockdev-del", node_name="out"), do("block_resize", node_name="top", size=1 << 20),
    do("block-job-cancel", device="nope"), do("job-cancel", id="nope"), do("block-job-pause", device="j"),
    wait("JOB_STATUS_CHANGE", status="standby"), do("query-block-jobs"), do("block-job-pause", device="j"),
    do("block-job-cancel", device="j"), do("block-job-resume", device="j"), do("block-job-resume", device="j"),
    do("job-dismiss", id="j"), do("job-finalize", id="j"), do("block-job-set-speed", device="j", speed=-5),
    do("block-job-set-speed", device="j", speed=5000000), do("block-job-complete", device="j"),
    wait("JOB_STATUS_CHANGE", status="null"), do("query-named-block-nodes", flat=True), do("query-jobs"),
    do("quit"),
]  # fmt: skip
STREAM_AND_SNAPSHOTS = [
    add("top", "top.qcow2"), do("block-stream", device="top"), do("block-stream", job_id="s", device="nope"),
    do("block-stream", job_id="s", device="top", auto_finalize=False, auto_dismiss=False), wait("BLOCK_JOB_PENDING"),
    do("query-block-jobs"), do("query-jobs"), do("job-finalize", id="s"), do("query-jobs"), do("job-dismiss", id="s"),
    do("query-named-block-nodes"), add("ov", "ov.qcow2"), do("blockdev-snapshot", node="top", overlay="top"),
    do("blockdev-snapshot", node="top", overlay="nope"), do("blockdev-snapshot", node="nope", overlay="nope"),
    do("blockdev-snapshot", node="top", overlay="ov"), do("query-named-block-nodes"), do("x-debug-query-block-graph"),
    do("blockdev-del", node_name="top"),
    do("blockdev-snapshot-sync", node_name="ov", snapshot_file="s.qcow2"),
    do("blockdev-snapshot-sync", node_name="ov", snapshot_file="s.qcow2", snapshot_node_name="top"),
    do("blockdev-snapshot-sync", node_name="ov", snapshot_file="s.qcow2", snapshot_node_name="sn", format="raw"),
    do("blockdev-snapshot-sync", node_name="ov", snapshot_file="s.qcow2", snapshot_node_name="sn"),
    do("query-named-block-nodes", flat=True), do("block_resize", node_name="ov", size=1 << 20),
    do("block_resize", node_name="sn", size=16 << 20), do("block_resize", node_name="sn", size=-1),
    do("block_resize", size=1), do("block_resize", node_name="sn", size=1000), do("block_resize", device="sn", size=1024),
    do("query-named-block-nodes", flat=True), do("quit"),
]  # fmt: skip
CHANGE_BACKING = [
    add("top", "top.qcow2"),
    do("change-backing-file", device="nope", image_node_name="top", backing_file="x"),
    do("change-backing-file", device="top", image_node_name="nope", backing_file="x"),
    do("change-backing-file", device="top", backing_file="x"), add("ov", "ov.qcow2"),
    do("change-backing-file", device="ov", image_node_name="ov", backing_file="x"),
    do("change-backing-file", device="top", image_node_name="ov", backing_file="x"),
    do("change-backing-file", device="top", image_node_name="top", backing_file="mid.qcow2"),
    do("query-named-block-nodes", flat=True),
    do("change-backing-file", device="top", image_node_name="top", backing_file="base.qcow2"),
    do("query-named-block-nodes", flat=True),
]  # fmt: skip
CREATE = [
    do("blockdev-create", job_id="c", options={"driver": "file", "filename": "new.raw", "size": 1 << 20}),
    wait("JOB_STATUS_CHANGE", status="concluded"), do("query-jobs"), do("query-block-jobs"),
    do("block-job-dismiss", device="c"), do("block-job-dismiss", id="c"), do("job-dismiss", id="c"),
    do("blockdev-create", job_id="c", options={"driver": "file", "filename": "new.raw"}),
    do("blockdev-create", job_id="c", options={"driver": "nope"}),
    do("blockdev-create", job_id="c", options={"driver": "null-co"}),
    do("blockdev-create", options={"driver": "file", "filename": "new.raw", "size": 1}),
    do("blockdev-create", job_id="c", options={"driver": "qcow2", "file": "nope", "size": 1 << 20}),
    wait("JOB_STATUS_CHANGE", status="concluded"), do("query-jobs"), do("job-dismiss", id="c"),
    do("query-status"), do("nosuch"), hmp("info block"), do("getfd", fdname="a"),
]  # fmt: skip
MACHINE = [
    do("query-status"), do("query-name"), do("query-block"), do("stop"), do("stop"), do("query-status"), do("cont"),
    do("getfd", fdname="a"), do("closefd", fdname="a"), do("block_resize", device="nope", size=5),
    hmp("info block -v"),
    hmp("nosuch"), hmp("info block x y"),
    hmp("drive_add 0 if=none,id=d,file=top.qcow2,format=qcow2"),
    hmp("info block"), hmp("info block -n"),
    hmp("info block-jobs"), do("query-block"),
    do("drive-mirror", device="d", target="m.qcow2", sync="full"), wait("BLOCK_JOB_READY"),
    do("query-block"), hmp("info block-jobs"),
    do("block-job-complete", device="d"), wait("JOB_STATUS_CHANGE", status="null"), do("query-block"),
    hmp("snapshot_blkdev d s.qcow2"), do("query-block"),
    hmp("drive_del d"), do("query-block"), do("query-named-block-nodes"),
    do("object-add", qom_type="secret", id="s", data="x"), do("object-add", qom_type="secret", id="s", data="x"),
    do("object-del", id="s"), do("object-del", id="s"), do("quit"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("pair", "script"),
    [
        (DAEMONS, NODES), (DAEMONS, BITMAPS), (DAEMONS, MIRROR), (DAEMONS, STREAM_AND_SNAPSHOTS), (DAEMONS, CREATE),
        (DAEMONS, CHANGE_BACKING),
        (SYSTEMS, MACHINE),
    ],
    ids=["nodes", "bitmaps", "mirror", "stream and snapshots", "create", "change backing file", "machine"],
)  # fmt: skip
def test_both_answer_alike(pair: Pair, script: list[dict[str, Any]], tmp_path: Path) -> None:
    """A client that was written for QEMU cannot tell the difference."""
    real, ours = both(pair, tmp_path, script, IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected
