"""snapshot-save, -load and -delete beside the real ones: replies, the order of events, what the disks hold afterwards."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qmp_pair import Pair, add, both, do, hmp, io, transcript, wait

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]

LINE = ("-machine", "pc", "-m", "16", "-nodefaults", "-display", "none", "-qmp", "unix:{socket},server=on,wait=off")
SYSTEMS = Pair(
    real=("qemu-system-x86_64", *LINE), ours=(sys.executable, "-m", "qblock.tools.system", *LINE)
)
IMAGES = [
    ("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"),
    ("qemu-img", "create", "-q", "-f", "qcow2", "b.qcow2", "1M"),
    ("qemu-img", "create", "-q", "-f", "raw", "r.raw", "1M"),
]
DISKS = [
    add("a", "a.qcow2"),
    add("b", "b.qcow2"),
    do("blockdev-add", driver="raw", node_name="r", file={"driver": "file", "filename": "r.raw"}),
]


def job(kind: str, **members: Any) -> list[dict[str, Any]]:
    """One of the jobs, from its command to its end."""
    return [
        do(f"snapshot-{kind}", job_id="j", **members),
        wait("JOB_STATUS_CHANGE", id="j", status="concluded"),
        do("query-jobs"),
        do("query-status"),
        do("job-dismiss", id="j"),
    ]


SAVED = [*DISKS, *job("save", tag="t", vmstate="a", devices=["a", "b"])]
SCENARIOS: dict[str, list[dict[str, Any]]] = {
    "saved, loaded, deleted": [
        *SAVED, *job("load", tag="t", vmstate="a", devices=["b", "a"]), *job("delete", tag="t", devices=["a", "b"]),
    ],
    "of a stopped machine": [
        do("stop"), *SAVED, *job("load", tag="t", vmstate="a", devices=["a", "b"]),
        *job("load", tag="u", vmstate="a", devices=["a"]), do("cont"),
    ],
    "cannot be saved": [
        *SAVED, *job("save", tag="t", vmstate="a", devices=["a"]), *job("save", tag="u", vmstate="nx", devices=["a"]),
        *job("save", tag="u", vmstate="a", devices=["nx"]), *job("save", tag="u", vmstate="a", devices=["b"]),
        *job("save", tag="u", vmstate="r", devices=["a", "r"]), *job("save", tag="u", vmstate="a", devices=[]),
    ],
    "cannot be loaded: no such snapshot": [*SAVED, *job("load", tag="u", vmstate="a", devices=["a"]), do("cont")],
    "cannot be loaded: of the disk alone": [*SAVED, *job("load", tag="t", vmstate="b", devices=["a", "b"]), do("cont")],
    "cannot be loaded: not among them": [*SAVED, *job("load", tag="t", vmstate="a", devices=["b"]), do("system_reset")],
    "cannot be loaded: bitmaps": [
        *SAVED, do("block-dirty-bitmap-add", node="b", name="m"), *job("load", tag="t", vmstate="a", devices=["a", "b"]),
    ],
    "deleted where there is one": [
        *SAVED, *job("delete", tag="u", devices=["a"]), *job("delete", tag="t", devices=["nx"]),
        *job("delete", tag="t", devices=["r"]), *job("delete", tag="t", devices=[]), *job("delete", tag="t", devices=["b"]),
    ],
    "ids": [
        *SAVED, do("snapshot-save", job_id="", tag="u", vmstate="a", devices=["a"]), do("snapshot-delete", job_id="j", tag="u"),
    ],
    "trays": [
        *DISKS, do("device_add", driver="virtio-scsi", id="s"), do("device_add", driver="scsi-cd", id="cd", bus="s.0"),
        do("blockdev-open-tray", id="cd"), *job("save", tag="t", vmstate="a", devices=["a"]), do("blockdev-close-tray", id="cd"),
        do("query-block"), *job("load", tag="t", vmstate="a", devices=["a"]), do("query-block"),
    ],
    "at the human monitor": [
        *DISKS, hmp("savevm x"), do("blockdev-del", node_name="r"), hmp("savevm x"), hmp("savevm x"), hmp("loadvm x"),
        do("query-status"), hmp("delvm nope"), hmp("loadvm nope"), do("query-status"), hmp("delvm x"), hmp("info snapshots"),
        hmp("loadvm x"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_replies_and_events_are_the_same(name: str, tmp_path: Path) -> None:
    """For success and for each way to fail; what texts say is our own."""
    real, ours = both(SYSTEMS, tmp_path, SCENARIOS[name], IMAGES)
    for step in (*real, *ours):
        if isinstance(text := step.get("reply", {}).get("return"), str):
            step["reply"]["return"] = text.partition(":")[0]
    assert ours == real


@pytest.mark.parametrize("side", ["real", "ours"])
def test_disks_go_back(side: str, tmp_path: Path) -> None:
    """Both of them, to the same moment; the images are sound, and the state is no longer in the disk's own tables."""
    for line in IMAGES:
        subprocess.run(line, cwd=tmp_path, check=True)
    write = [io(node, f"write -P {value} 0 128k") for node, value in (("a", 1), ("b", 2))]
    spoil = [io(node, "write -P 9 64k 128k") for node in ("a", "b")]
    names = ["a", "b"]
    script = [
        *DISKS[:2], *write, *job("save", tag="t", vmstate="a", devices=names), *spoil,
        *job("load", tag="t", vmstate="a", devices=names), do("quit"),
    ]  # fmt: skip
    transcript(getattr(SYSTEMS, side), tmp_path, script)
    for name, value in (("a.qcow2", 1), ("b.qcow2", 2)):
        subprocess.run(["qemu-img", "check", "-q", name], cwd=tmp_path, check=True)
        reads = ["-c", f"read -P {value} 0 128k", "-c", "read -P 0 128k 896k"]
        found = subprocess.run(["qemu-io", *reads, name], cwd=tmp_path, check=True, capture_output=True, text=True)
        assert "verification failed" not in found.stdout
    listed = subprocess.run(["qemu-img", "snapshot", "-l", "a.qcow2"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert " t " in listed.stdout


def test_a_snapshot_of_a_real_machine_puts_the_disks_back(tmp_path: Path) -> None:
    """Its processor's state says nothing to ours, and the disks are those of that moment."""
    for line in IMAGES:
        subprocess.run(line, cwd=tmp_path, check=True)
    saved = [*DISKS[:1], io("a", "write -P 1 0 64k"), *job("save", tag="t", vmstate="a", devices=["a"])]
    transcript(SYSTEMS.real, tmp_path, [*saved, io("a", "write -P 2 0 64k"), do("quit")])
    loaded = transcript(SYSTEMS.ours, tmp_path, [*DISKS[:1], *job("load", tag="t", vmstate="a", devices=["a"]), do("quit")])
    assert loaded[3]["reply"]["return"][0].get("error") is None
    subprocess.run(["qemu-img", "check", "-q", "a.qcow2"], cwd=tmp_path, check=True)
    found = subprocess.run(
        ["qemu-io", "-c", "read -P 1 0 64k", "a.qcow2"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "verification failed" not in found.stdout
