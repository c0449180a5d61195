"""Backups, copy-before-write filters and snapshot access on the real QEMU programs and on qblock: the same replies and events.

Left out of the comparison is what `qmp_pair.comparable` leaves out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from qmp_pair import DAEMONS, SYSTEMS, both
from test_jobs_vs_qemu import CONCLUDED, GONE, LOOK, OUT, PENDING, TOP, Script
from test_qmp_replies import add, do, wait

IMAGES = [
    ["qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M"],
    ["qemu-io", "-c", "write -P 1 0 64k", "base.qcow2"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"],
    ["qemu-io", "-c", "write -P 3 2M 64k", "top.qcow2"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "out.qcow2", "4M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "out2.qcow2", "4M"],
    ["qemu-img", "create", "-q", "-f", "qcow2", "other.qcow2", "8M"],
]
OUT2, OTHER = add("out2", "out2.qcow2"), add("other", "other.qcow2")
DRIVE = do("human-monitor-command", command_line="drive_add 0 if=none,id=d,file=top.qcow2,format=qcow2,node-name=top")


def hmp(line: str) -> dict[str, Any]:
    """A command of the human monitor."""
    return do("human-monitor-command", command_line=line)


def io(node: str, line: str) -> dict[str, Any]:
    """A command of qemu-io on a node or device."""
    return hmp(f'qemu-io {node} "{line}"')


def backup(**members: Any) -> dict[str, Any]:
    """blockdev-backup from top to out; a member that is None is left out."""
    usual: dict[str, Any] = {"job_id": "j", "device": "top", "target": "out", "sync": "full"}
    return do("blockdev-backup", **{key: value for key, value in (usual | members).items() if value is not None})


def drive_backup(**members: Any) -> dict[str, Any]:
    """drive-backup from d to a new image."""
    usual: dict[str, Any] = {"job_id": "j", "device": "d", "target": "new.qcow2", "sync": "full", "format": "qcow2"}
    return do("drive-backup", **(usual | members))


def gone(job: str) -> dict[str, Any]:
    """Wait for the end of a job."""
    return wait("JOB_STATUS_CHANGE", status="null", id=job)


def cbw(**members: Any) -> dict[str, Any]:
    """A copy-before-write filter over top."""
    usual: dict[str, Any] = {"driver": "copy-before-write", "node_name": "c", "file": "top", "target": "out"}
    return do("blockdev-add", **(usual | members))


ADD_BITMAP = do("block-dirty-bitmap-add", node="top", name="b")
SCRIPTS: dict[str, Script] = {
    "a full backup": [TOP, OUT, backup(), GONE, *LOOK],
    "a backup of the top layer": [TOP, OUT, backup(sync="top"), GONE, *LOOK],
    "finalized by hand": [
        TOP, OUT, backup(auto_finalize=False, auto_dismiss=False), PENDING, *LOOK, do("job-finalize", id="j"), *LOOK,
        do("job-dismiss", id="j"), *LOOK,
    ],
    "cancelled while pending": [
        TOP, OUT, ADD_BITMAP, backup(bitmap="b", bitmap_mode="on-success", auto_finalize=False, auto_dismiss=False), PENDING,
        *LOOK, do("block-job-cancel", device="j"), CONCLUDED, *LOOK, do("job-finalize", id="j"), do("job-dismiss", id="j"),
    ],
    "two backups of one source": [
        TOP, OUT, OUT2, backup(sync="none", filter_node_name="f"), *LOOK, backup(job_id="k", target="out2"), gone("k"),
        *LOOK, backup(job_id="k"), backup(job_id="k", device="f", target="out2"), do("job-cancel", id="j"), gone("j"), *LOOK,
    ],
    "what is refused": [
        TOP, OUT, OTHER, *[
            backup(**members) for members in (
                {"speed": -1}, {"target": "other"}, {"target": "top"}, {"target": "nope"}, {"device": "nope"},
                {"sync": "incremental"}, {"sync": "bitmap"}, {"bitmap_mode": "always"},
                {"bitmap": "nope", "bitmap_mode": "always"}, {"job_id": None}, {"job_id": ""},
                {"compress": True, "speed": -1}, {"filter_node_name": ""}, {"filter_node_name": "top"},
                {"filter_node_name": "x y"}, {"x_perf": {"max-workers": 0}}, {"x_perf": {"max-chunk": 1}},
                {"x_perf": {"max-chunk": -1}}, {"x_perf": {"max-workers": 1 << 40}}, {"x_perf": {"x": 1}}, {"sync": "x"},
            )
        ],
        ADD_BITMAP, *[
            backup(bitmap="b", sync=sync, speed=-1, bitmap_mode=mode)
            for sync in ("full", "top", "none", "incremental", "bitmap")
            for mode in (None, "never", "always", "on-success", "x")
        ],
        *LOOK,
    ],
    "filters of users": [
        TOP, OUT, do("blockdev-add", driver="copy-on-read", node_name="cor", file="top"), cbw(file="cor"),
        cbw(node_name="c2", on_cbw_error="break-snapshot"), cbw(node_name="c3", cbw_timeout=-1),
        cbw(node_name="c3", on_cbw_error="x"), cbw(node_name="c3", bitmap={"node": "nope", "name": "b"}),
        cbw(node_name="c3", bitmap={"node": "top", "name": "b"}), OTHER, do("block-dirty-bitmap-add", node="other", name="b"),
        cbw(node_name="c3", bitmap={"node": "other", "name": "b"}), ADD_BITMAP,
        cbw(node_name="c3", bitmap={"node": "top", "name": "b"}, cbw_timeout=9),
        do("blockdev-add", driver="snapshot-access", node_name="sa", file="c", discard="unmap"),
        do("blockdev-add", driver="raw", node_name="r", file="c"), do("blockdev-add", driver="raw", node_name="s", file="sa"),
        *LOOK, do("blockdev-del", node_name="out"), do("blockdev-del", node_name="c"), do("blockdev-del", node_name="s"),
        do("blockdev-del", node_name="sa"), *LOOK,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_tell_the_same_of_backups(name: str, tmp_path: Path) -> None:
    """Backup software is written against the real one, down to the order of events."""
    real, ours = both(DAEMONS, tmp_path, SCRIPTS[name], IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected


def test_the_human_monitors_backups_make_the_same_images(tmp_path: Path) -> None:
    """drive_backup with each of its flags: same events, same new images."""
    script = [
        DRIVE, hmp("drive_backup d top-only.qcow2"), gone("d"), hmp("drive_backup -f d full.qcow2"), gone("d"),
        hmp("drive_backup -f -c d packed.qcow2 qcow2"), gone("d"), hmp("drive_backup -n d out.qcow2"), gone("d"),
        hmp("drive_backup -f d full.raw raw"), gone("d"), drive_backup(sync="none", target="none.qcow2"), *LOOK,
        do("query-block"), do("job-cancel", id="j"), gone("j"), *LOOK, do("query-block"),
    ]  # fmt: skip
    real, ours = both(SYSTEMS, tmp_path, script, IMAGES)
    assert ours == real
    for image in ("top-only.qcow2", "full.qcow2", "packed.qcow2", "out.qcow2", "full.raw", "none.qcow2"):
        described = [described_image(tmp_path / who / image) for who in ("real", "ours")]
        assert described[1] == described[0], image
        subprocess.run(["qemu-img", "compare", "-q", *(tmp_path / who / image for who in ("real", "ours"))], check=True)


def described_image(image: Path) -> Any:
    """What the real program says of an image and of what is stored in it, but not where."""
    info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", image.name], cwd=image.parent))
    info = {key: value for key, value in info.items() if key not in ("actual-size", "children")}
    mapped = json.loads(subprocess.check_output(["qemu-img", "map", "--output=json", image.name], cwd=image.parent))
    return info, [{key: value for key, value in entry.items() if key != "offset"} for entry in mapped]


