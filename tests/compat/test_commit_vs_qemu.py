"""block-commit on the real QEMU programs and on qblock: the same replies, events, graphs and files, in every phase."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmp_pair import DAEMONS, SYSTEMS, Pair, both, do, hmp, wait
from test_jobs_vs_qemu import CHAIN, CONCLUDED, GONE, GRAPH, IMAGES, LOOK, PENDING, READY, Script

_DRIVE = ("-drive", "if=virtio,id=d,file=top.qcow2,format=qcow2")
GUESTS = Pair(
    real=("qemu-system-x86_64", "-S", *SYSTEMS.real[3:], *_DRIVE),
    ours=(*SYSTEMS.ours, *_DRIVE),
)
"""With a guest's disk on the chain, whose layers below are opened read-only."""
ERROR, PAUSED = wait("BLOCK_JOB_ERROR"), wait("JOB_STATUS_CHANGE", status="paused")
COMPLETE = do("job-complete", id="j")
LAYERS = ("base", "mid", "top")


def commit(**members: Any) -> dict[str, Any]:
    """block-commit of the chain of top, or as said."""
    usual: dict[str, Any] = {"job_id": "j", "device": "top"}
    return do("block-commit", **(usual | members))


def faulty(layer: str, event: str, errno: int) -> Script:
    """The chain, in which the first request of a kind that goes to the file of ``layer`` fails."""
    script = []
    for step in CHAIN:
        arguments = step["arguments"]
        if arguments["node-name"] == layer:
            rule = {"event": event, "errno": errno, "once": True}
            file = {"driver": "blkdebug", "image": arguments["file"], "inject-error": [rule]}
            step = step | {"arguments": arguments | {"file": file}}
        script.append(step)
    return script


def sizes(base: str, mid: str, top: str) -> list[list[str]]:
    """Images of these sizes, with data at both ends of each layer."""
    lines = []
    below: list[str] = []
    for name, size in zip(LAYERS, (base, mid, top), strict=True):
        file, last = f"{name}.qcow2", f"{int(size[:-1]) * 1024 - 64}k"
        lines.append(["qemu-img", "create", "-q", "-f", "qcow2", *below, file, size])
        lines.append(["qemu-io", "-c", f"write -P {ord(name[0])} 0 64k", "-c", f"write -P {ord(name[1])} {last} 64k", file])
        below = ["-b", file, "-F", "qcow2"]
    return lines


_ACCEPTED = (READY, COMPLETE, CONCLUDED)
OTHERS: Script = [
    *(do("block-stream", job_id="k", device=name) for name in ("top", "mid", "base")),
    *(commit(job_id="k", **members) for members in ({}, {"top_node": "mid"}, {"base_node": "mid"})),
    *(do("blockdev-mirror", job_id="k", device=name, target="base", sync="full") for name in ("top", "mid")),
    do("blockdev-snapshot-sync", node_name="top", snapshot_file="s.qcow2", snapshot_node_name="s"),
    *(do("blockdev-del", node_name=name) for name in LAYERS),
    *(do("block_resize", node_name=name, size=8 << 20) for name in LAYERS),
    do("change-backing-file", device="top", image_node_name="mid", backing_file="base.qcow2"),
    do("blockdev-snapshot-internal-sync", device="top", name="x"),
    do("blockdev-add", driver="copy-on-read", node_name="c", file="mid"),
    *(do("block-dirty-bitmap-add", node=name, name="b") for name in LAYERS), do("query-jobs"), GRAPH,
]  # fmt: skip
"""What others may try meanwhile."""
AFTER = [
    GRAPH, do("query-named-block-nodes"), do("blockdev-del", node_name="mid"), do("block_resize", node_name="base", size=1 << 23),
    do("block-stream", job_id="k", device="top", auto_finalize=False),
]  # fmt: skip
SCRIPTS: dict[str, Script] = {
    "inner": [
        *CHAIN, commit(top_node="mid", base_node="base", auto_finalize=False), PENDING, *LOOK,
        do("block-job-finalize", id="j"), *LOOK,
    ],
    "inner by file names": [
        *CHAIN, commit(top="mid.qcow2", base="base.qcow2", backing_file="x", filter_node_name="f", auto_finalize=False),
        PENDING, *LOOK, do("job-finalize", id="j"), *LOOK,
    ],
    "inner, and a stream, with an empty text for the header": [
        *CHAIN, commit(top_node="mid", backing_file="", auto_dismiss=False), CONCLUDED, do("job-dismiss", id="j"), GRAPH,
        do("query-named-block-nodes"), do("block-stream", job_id="s", device="top", bottom="top", backing_file="base.qcow2"),
    ],
    "inner, cancelled while pending": [
        *CHAIN, commit(top_node="mid", auto_finalize=False, auto_dismiss=False), PENDING, do("job-cancel", id="j"),
        CONCLUDED, *LOOK,
    ],
    "inner, concluded": [*CHAIN, commit(top_node="mid", auto_dismiss=False), CONCLUDED, *AFTER[:-1], do("job-dismiss", id="j")],
    "active": [*CHAIN, commit(auto_dismiss=False), READY, *LOOK, COMPLETE, CONCLUDED, *LOOK],
    "active to the middle": [
        *CHAIN, commit(base_node="mid", filter_node_name="f", auto_finalize=False), READY, COMPLETE, PENDING, *LOOK,
        do("job-finalize", id="j"), *LOOK,
    ],
    "active, cancelled when ready": [*CHAIN, commit(), READY, do("block-job-cancel", device="j"), GONE, *LOOK],
    "active, cancelled by force": [*CHAIN, commit(), READY, do("job-cancel", id="j"), GONE, *LOOK],
    "active, paused when ready": [
        *CHAIN, commit(), READY, do("job-pause", id="j"), wait("JOB_STATUS_CHANGE", status="standby"), COMPLETE,
        do("query-block-jobs"), do("job-resume", id="j"), GONE, GRAPH,
    ],
    "a filter on top": [
        *CHAIN, do("blockdev-add", driver="copy-on-read", node_name="f", file="top"), commit(), commit(device="f"), READY,
        *LOOK, COMPLETE, GONE, GRAPH,
    ],
    "refused": [
        *CHAIN, *[
            commit(**members) for members in (
                {"device": "nope"}, {"device": "base"}, {"device": "mid"}, {"top": "nofile"}, {"base": "nofile"},
                {"top_node": "nope"}, {"base_node": "nope"}, {"top": "mid.qcow2", "top_node": "mid"},
                {"base": "base.qcow2", "base_node": "base"}, {"top_node": "base"}, {"top_node": "mid", "base_node": "mid"},
                {"top_node": "mid", "base_node": "top"}, {"top_node": "base", "base_node": "mid"}, {"base_node": "top"},
                {"backing_file": "x"}, {"speed": -1}, {"job_id": "9"}, {"job_id": ""}, {"filter_node_name": "top"},
                {"filter_node_name": ""}, {"on_error": "x"}, {"top_node": "mid", "speed": -1},
                {"top_node": "mid", "job_id": "9"}, {"top_node": "mid", "filter_node_name": "9"},
                {"top_node": "mid", "filter_node_name": "mid"},
            )
        ], GRAPH,
    ],
    **{
        f"others while {name} is pending": [*CHAIN, step, PENDING, *OTHERS]
        for name, step in (
            ("an inner commit", commit(top_node="mid", auto_finalize=False)),
            ("a stream", do("block-stream", job_id="j", device="top", base_node="base", auto_finalize=False)),
        )
    },
    "busy": [
        *CHAIN, do("block-stream", job_id="s", device="mid", auto_finalize=False), PENDING, commit(), commit(top_node="mid"),
        do("job-finalize", id="s"), commit(), READY, commit(job_id="k"), do("block-stream", job_id="k", device="mid"),
        do("blockdev-del", node_name="mid"), do("blockdev-snapshot-sync", node_name="top", snapshot_file="s.qcow2"),
        do("change-backing-file", device="top", image_node_name="mid", backing_file="x"), COMPLETE, GONE,
    ],
    "what filters show": [
        *CHAIN, do("blockdev-add", driver="copy-on-read", node_name="f", file="top"), commit(device="f", base_node="top"),
        commit(device="f", base_node="mid", top_node="top", backing_file="x"),
        commit(device="f", base_node="mid", top_node="top"), READY, GRAPH, COMPLETE, GONE, GRAPH,
        commit(device="f", base_node="mid"),
    ],
}  # fmt: skip
ERRORS: dict[str, Script] = {
    f"{kind} {errno} {policy}": [
        *faulty("mid" if kind == "read" else "base", f"{kind}_aio", errno),
        commit(top_node="mid", on_error=policy, auto_dismiss=False),
        *([PAUSED, do("query-block-jobs"), GRAPH, do("block-job-cancel", device="j"), do("job-resume", id="j")] if stops else []),
        CONCLUDED, do("query-jobs"), do("query-block-jobs"),
    ]
    for kind, errno, policy, stops in (
        ("read", 5, "report", False), ("read", 28, "enospc", True), ("read", 5, "auto", False), ("write", 5, "ignore", False),
        ("write", 28, "auto", True), ("write", 5, "stop", True), ("write", 28, "report", False),
    )
}  # fmt: skip
ERRORS["cancelled after an error"] = [
    *faulty("base", "write_aio", 5), commit(top_node="mid", on_error="stop", auto_dismiss=False), PAUSED,
    do("block-job-cancel", device="j", force=True), CONCLUDED, do("query-block-jobs"), GRAPH,
]  # fmt: skip
SIZES = {
    "a shorter base": ("2M", "4M", "6M"), "a longer base": ("8M", "4M", "4M"), "a longer middle": ("4M", "8M", "4M"),
    "a shorter middle": ("8M", "2M", "8M"),
}  # fmt: skip


def same_content(place: Path) -> None:
    """All layers hold the same in both directories, are sound, and name the same backing file."""
    for name in LAYERS:
        real, ours = (place / who / f"{name}.qcow2" for who in ("real", "ours"))
        subprocess.run(["qemu-img", "check", "-q", ours], check=True)
        subprocess.run(["qemu-img", "compare", "-q", real, ours], check=True)
        info = [json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", file])) for file in (real, ours)]
        assert info[0].get("backing-filename") == info[1].get("backing-filename")
        assert info[0]["virtual-size"] == info[1]["virtual-size"]


def compare(pair: Pair, place: Path, script: Script, images: list[list[str]] = IMAGES) -> None:
    """Run the script on both, and compare all that can be seen."""
    real, ours = both(pair, place, script, images)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_tell_the_same_of_a_commit(name: str, tmp_path: Path) -> None:
    """Management relies on what it knows from QEMU."""
    compare(DAEMONS, tmp_path, SCRIPTS[name])
    if name != "inner by file names":  # the header names a file that is not there
        same_content(tmp_path)


@pytest.mark.parametrize("name", ERRORS)
def test_both_tell_the_same_of_a_commit_in_trouble(name: str, tmp_path: Path) -> None:
    """What failed, what is done about it, how far the job was, and how it ends."""
    compare(DAEMONS, tmp_path, ERRORS[name])


@pytest.mark.parametrize("top", ["mid", "top"])
@pytest.mark.parametrize("name", SIZES)
def test_both_do_the_same_to_layers_of_different_sizes(name: str, top: str, tmp_path: Path) -> None:
    """A shorter base grows, a longer one stays."""
    ending = _ACCEPTED if top == "top" else (CONCLUDED,)
    script = [*CHAIN, commit(top_node=top, auto_dismiss=False), *ending, do("query-named-block-nodes", flat=True)]
    compare(DAEMONS, tmp_path, script, sizes(*SIZES[name]))
    same_content(tmp_path)


@pytest.mark.parametrize(
    "script",
    [
        [commit(device="d", top="mid.qcow2", auto_finalize=False), PENDING, *LOOK, do("query-block"), hmp("info block-jobs"),
         hmp("commit all"), do("job-finalize", id="j"), *LOOK],
        [commit(device="d", base="mid.qcow2"), READY, *LOOK, do("query-block"), hmp("info block"), COMPLETE, GONE, *LOOK,
         do("query-block")],
        [do("block-commit", device="d"), READY, do("job-cancel", id="d"), GONE, *LOOK],
        [hmp("commit d"), *LOOK, hmp('qemu-io d "write -P 9 3M 64k"'), hmp("commit all"), do("query-named-block-nodes")],
    ],
    ids=["inner", "active", "cancelled", "human monitor"],
)  # fmt: skip
def test_both_tell_the_same_of_a_commit_under_a_guest(script: Script, tmp_path: Path) -> None:
    """Backing files that were opened read-only are switched, and the guest's device moves."""

    def without_replies_of_hmp(result: Any) -> Any:
        return [step for step in result if "hmp" not in str(step) and "commit all" not in str(step["step"])]

    real, ours = both(GUESTS, tmp_path, script, IMAGES)
    for expected, got in zip(without_replies_of_hmp(real), without_replies_of_hmp(ours), strict=True):
        assert got == expected
    same_content(tmp_path)


def test_the_human_monitor_refuses_a_commit_in_the_same_cases(tmp_path: Path) -> None:
    """An unknown drive, one without a backing file, one at which a job is at work: something is printed, nothing is done."""
    script = [
        hmp("drive_add 0 if=none,id=e,file=out.qcow2,format=qcow2"), hmp("commit nope"), hmp("commit e"), hmp("commit all"),
        commit(device="d"), READY, hmp("commit d"), hmp("commit all"),
    ]  # fmt: skip
    real, ours = both(GUESTS, tmp_path, script, IMAGES)
    printed = [[bool(step["reply"].get("return")) for step in result if "reply" in step] for result in (real, ours)]
    assert printed[1] == printed[0]
