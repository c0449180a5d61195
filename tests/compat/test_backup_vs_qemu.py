"""Backups, copy-before-write filters and snapshot access on the real QEMU programs and on qblock: the same replies and events.

Left out of the comparison is what `qmp_pair.comparable` leaves out.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmp_pair import DAEMONS, SYSTEMS, add, both, do, hmp, io, wait
from test_jobs_vs_qemu import CONCLUDED, GONE, LOOK, OUT, PENDING, TOP, Script

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
DRIVE = hmp("drive_add 0 if=none,id=d,file=top.qcow2,format=qcow2,node-name=top")


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


# ------------------------------------------------------------------------------------------------ bitmaps and their ends


SHA = do("x-debug-block-dirty-bitmap-sha256", node="top", name="b")
NODES = do("query-named-block-nodes", flat=True)
ENDS = [
    (sync, mode, end)
    for sync in ("full", "top", "bitmap", "incremental")
    for mode in ("always", "never", "on-success")
    for end in ("job-finalize", "job-cancel")
    if not (mode == "never" and sync != "bitmap") and not (sync == "incremental" and mode != "on-success")
]


@pytest.mark.parametrize(("sync", "mode", "end"), ENDS)
def test_a_bitmap_has_the_same_bits_after_every_end(sync: str, mode: str, end: str, tmp_path: Path) -> None:
    """The next increment is copied by it: before, during and after the job, finalized or cancelled, under writes."""
    script = [
        DRIVE, OUT, ADD_BITMAP, io("d", "write -P 9 1M 64k"), io("d", "write -P 9 3M 4k"), SHA,
        backup(sync=sync, bitmap="b", bitmap_mode=mode, auto_finalize=False, auto_dismiss=False), PENDING,
        io("d", "write -P 7 128k 4k"), io("d", "write -P 7 1M 4k"), io("d", "write -z 3584k 64k"), SHA,
        do("query-block-jobs"), do("block-dirty-bitmap-clear", node="top", name="b"),
        do("block-dirty-bitmap-remove", node="top", name="b"), do(end, id="j"), CONCLUDED, SHA, NODES, do("query-jobs"),
    ]  # fmt: skip
    real, ours = both(SYSTEMS, tmp_path, script, IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected


def failing(name: str, **rule: Any) -> dict[str, Any]:
    """An image whose storage fails as the rule says."""
    image = {"driver": "file", "filename": f"{name}.qcow2"}
    return do("blockdev-add", driver="qcow2", node_name=name, file={"driver": "blkdebug", "image": image, "inject-error": [rule]})


@pytest.mark.parametrize("mode", ["always", "never", "on-success"])
@pytest.mark.parametrize("policy", ["report", "stop", "enospc", "auto"])
def test_a_target_without_space_is_told_and_answered_alike(policy: str, mode: str, tmp_path: Path) -> None:
    """The job fails or waits for somebody to make room; the bitmap gets its bits back. A guest's write fails with it."""
    begin = [
        DRIVE, failing("out", event="write_aio", errno=28), ADD_BITMAP, io("d", "write -P 9 1M 64k"),
        backup(sync="bitmap", bitmap="b", bitmap_mode=mode, auto_dismiss=False, on_target_error=policy),
        wait("BLOCK_JOB_ERROR"),
    ]  # fmt: skip
    end = [CONCLUDED, SHA, do("query-jobs"), do("query-block-jobs")]
    if policy != "report":
        stopped = [wait("JOB_STATUS_CHANGE", status="paused"), do("query-block-jobs"), io("d", "write -P 7 1M 4k")]
        end = [*stopped, do("block-job-resume", device="j"), wait("BLOCK_JOB_ERROR"), stopped[0], do("job-cancel", id="j"), *end]
    real, ours = both(SYSTEMS, tmp_path, [*begin, *end], IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected


# ------------------------------------------------------------------------------------------------------- transactions


SOURCE2 = add("src2", "src2.qcow2")
PAIR = [TOP, OUT, SOURCE2, OUT2]
TWO_DISKS = [*IMAGES, ["qemu-img", "create", "-q", "-f", "qcow2", "src2.qcow2", "4M"]]
JOBS = [do("query-jobs"), do("query-block-jobs")]
ABORT: dict[str, Any] = {"execute": "abort", "arguments": {}}


def first(**members: Any) -> dict[str, Any]:
    """A backup of top, which takes half a second."""
    return backup(**({"job_id": "j1", "speed": 8 << 20} | members))


def second(**members: Any) -> dict[str, Any]:
    """A backup of an empty disk."""
    return backup(**({"job_id": "j2", "device": "src2", "target": "out2"} | members))


def together(*commands: dict[str, Any], mode: str | None = "grouped") -> dict[str, Any]:
    """A transaction of these commands."""
    actions = [{"type": command["execute"], "data": command["arguments"]} for command in commands]
    properties = {} if mode is None else {"properties": {"completion-mode": mode}}
    return {"execute": "transaction", "arguments": {"actions": actions, **properties}}


WAITING2 = wait("JOB_STATUS_CHANGE", status="waiting", id="j2")
BITMAP_VERBS = {
    verb: do(f"block-dirty-bitmap-{verb}", node="top", name="b") for verb in ("add", "clear", "enable", "disable", "remove")
}
GROUPS: dict[str, Script] = {
    "each by itself": [*PAIR, together(first(sync="none"), second(sync="none"), mode=None), *LOOK],
    "the program ends": [TOP, OUT, first(sync="none", auto_dismiss=False), do("quit")],
    "all end well": [*PAIR, together(first(), second()), gone("j1"), *LOOK],
    "one waits for a person": [
        *PAIR, together(first(auto_finalize=False, auto_dismiss=False), second(auto_dismiss=False)), PENDING, *JOBS,
        do("job-finalize", id="j2"), *JOBS,
    ],
    "all wait for a person": [
        *PAIR, together(first(auto_finalize=False), second(auto_finalize=False)), wait("BLOCK_JOB_PENDING", id="j1"), *JOBS,
        do("job-finalize", id="j1"), *JOBS,
    ],
    "one is cancelled while pending": [
        *PAIR, together(first(auto_finalize=False, auto_dismiss=False), second(auto_dismiss=False)), PENDING, *JOBS,
        do("job-cancel", id="j2"), *JOBS,
    ],
    "the one that runs is cancelled": [
        *PAIR, together(first(sync="none"), second()), WAITING2, *JOBS, do("job-cancel", id="j1"), gone("j1"), *JOBS,
    ],
    "the one that waits is cancelled": [
        *PAIR, together(first(sync="none", auto_dismiss=False), second(auto_dismiss=False)), WAITING2, *JOBS,
        do("job-cancel", id="j2"), wait("JOB_STATUS_CHANGE", status="concluded", id="j1"), *JOBS,
    ],
    "the older one fails": [
        TOP, failing("out", event="write_aio", errno=5), SOURCE2, OUT2,
        together(first(speed=0, auto_dismiss=False), second(sync="none", auto_dismiss=False)),
        wait("JOB_STATUS_CHANGE", status="concluded", id="j1"), *JOBS,
    ],
    "the newer one fails": [
        TOP, failing("out", event="write_aio", errno=5), SOURCE2, OUT2,
        together(second(sync="none", auto_dismiss=False), first(speed=0, auto_dismiss=False)),
        wait("JOB_STATUS_CHANGE", status="concluded", id="j2"), *JOBS,
    ],
    "beside changes of bitmaps": [
        *PAIR, OTHER, ADD_BITMAP,
        together(first(sync="bitmap", bitmap="b", bitmap_mode="on-success"), BITMAP_VERBS["clear"], mode=None), *LOOK,
        together(BITMAP_VERBS["remove"], first(sync="bitmap", bitmap="b", bitmap_mode="on-success"), mode=None), *LOOK,
        together(first(bitmap="b", bitmap_mode="on-success"), second(), BITMAP_VERBS["enable"], mode=None), *LOOK,
        together(do("block-dirty-bitmap-add", node="top", name="c"), first(sync="none"), mode=None), *LOOK,
        together(do("block-dirty-bitmap-add", node="src2", name="x"), second()),
        together(second(), do("block-dirty-bitmap-add", node="src2", name="x")), NODES,
    ],
    "failures at every position": [
        *PAIR, OTHER, together(first(), ABORT), together(ABORT, first()), together(first(), second(), ABORT, mode=None),
        together(first(), first(), mode=None), together(first(), first(job_id="j3"), mode=None),
        *[
            together(*actions) for members in (
                {"target": "nope"}, {"speed": -1}, {"target": "other"}, {"sync": "incremental"}, {"device": "nope"},
                {"job_id": ""}, {"filter_node_name": "top"}, {"compress": True, "x_perf": {"max-workers": 0}},
            )
            for actions in ((first(), second(**members)), (second(**members), first()))
        ],
        *LOOK,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_both_end_backups_of_a_transaction_alike(name: str, tmp_path: Path) -> None:
    """Several disks are backed up as they are at one moment, all of them or none."""
    real, ours = both(DAEMONS, tmp_path, GROUPS[name], TWO_DISKS)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected
