"""A guest's disk is pulled out while a job is at work on it, in qemu-system-x86_64 and in qblock-system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from qmp_pair import Pair, both, outside, transcript
from test_jobs_vs_qemu import GONE, GRAPH, IMAGES, PENDING, READY, THREE, Script
from test_qmp_replies import do, wait

SCSI: Final = ("-device", "virtio-scsi-pci,id=scsi", "-device", "scsi-hd,id=disk,drive=top")
VIRTIO: Final = ("-device", "virtio-blk-pci,id=disk,drive=top")
NVME: Final = ("-device", "nvme,id=disk,drive=top,serial=x")
USB: Final = ("-device", "qemu-xhci,id=usb", "-device", "usb-storage,id=disk,drive=top")
IDE: Final = ("-device", "ide-hd,id=disk,drive=top")
STARTS: Final[dict[str, dict[str, Any]]] = {
    "mirror": do("blockdev-mirror", job_id="j", device="top", target="out", sync="full"),
    "active commit": do("block-commit", job_id="j", device="top"),
}
DELETE, RESET = do("device_del", id="disk"), do("system_reset")
DELETED, COMPLETE = wait("DEVICE_DELETED", device="disk"), do("job-complete", id="j")
AFTER: Final = [do("query-block"), do("query-jobs"), GRAPH]


def systems(*devices: str) -> Pair:
    """Both programs with a chain, a node to copy to, and these devices; stopped before the guest's first step."""
    nodes = [("base", ""), ("mid", ",backing=base"), ("top", ",backing=mid"), ("out", "")]
    line = ["-S", "-nodefaults", "-display", "none", "-qmp", "unix:{socket},server=on,wait=off"]
    for name, below in nodes:
        line += ["-blockdev", f"qcow2,node-name={name},file.driver=file,file.filename={name}.qcow2{below}"]
    return Pair(
        real=("qemu-system-x86_64", *line, *devices),
        ours=(sys.executable, "-m", "qblock.tools.system", *line, *devices),
    )


def compare(place: Path, devices: tuple[str, ...], script: Script) -> None:
    """All replies and events are the same."""
    real, ours = both(systems(*devices), place, script, IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize(
    ("devices", "steps"),
    [
        (SCSI, [DELETE, DELETED]), (USB, [DELETE, DELETED]), (VIRTIO, [DELETE, *AFTER, RESET, DELETED]),
        (NVME, [DELETE, RESET, DELETED]), (SCSI, [RESET]), (IDE, [RESET]),
    ],
    ids=["scsi", "usb", "virtio", "nvme", "reset", "reset of ide"],
)  # fmt: skip
def test_a_ready_job_shows_when_the_device_waits_for_its_requests(
    devices: tuple[str, ...], steps: Script, kind: str, tmp_path: Path
) -> None:
    """Each drained section is a short standby, in the same number and place among the other events."""
    compare(tmp_path, devices, [STARTS[kind], READY, *steps, *AFTER, COMPLETE, GONE, *AFTER])


HELD: Final[dict[str, dict[str, Any]]] = STARTS | {
    "stream": do("block-stream", job_id="j", device="top", speed=1),
    "commit": do("block-commit", job_id="j", device="top", top_node="mid", speed=1),
    "backup": do("blockdev-backup", job_id="j", device="top", target="out", sync="full", speed=1),
}
"""Jobs that are not over before a person pauses them."""
PAUSE: Final = do("job-pause", id="j")


def resting(kind: str) -> Script:
    """What pauses a job of a kind that has been started."""
    if kind in STARTS:
        return [READY, PAUSE, wait("JOB_STATUS_CHANGE", status="standby")]
    return [PAUSE, wait("JOB_STATUS_CHANGE", status="paused")]


def without_progress(transcript: list[Any]) -> list[Any]:
    """How far a job had come when it was paused is a matter of speed."""
    for step in transcript:
        for event in step["events"]:
            event["data"].pop("offset", None)
        for job in step.get("reply", {}).get("return", ()) if step["step"].get("execute") == "query-jobs" else ():
            del job["current-progress"]
    return transcript


@pytest.mark.parametrize(
    ("kind", "devices", "steps"),
    [
        ("stream", SCSI, [DELETE, DELETED]), ("commit", VIRTIO, [DELETE, *AFTER, RESET, DELETED]),
        ("backup", SCSI, [DELETE, DELETED]), ("mirror", SCSI, [DELETE, DELETED]), ("active commit", SCSI, [RESET]),
    ],
)  # fmt: skip
def test_a_paused_job_stays_when_the_device_goes(
    kind: str, devices: tuple[str, ...], steps: Script, tmp_path: Path
) -> None:
    """The node stays, and so does the job; it can be cancelled afterwards."""
    script = [HELD[kind], *resting(kind), *steps, *AFTER, do("job-cancel", id="j"), GONE, *AFTER]
    real, ours = both(systems(*devices), tmp_path, script, IMAGES)
    for expected, got in zip(without_progress(real), without_progress(ours), strict=True):
        assert got == expected


@pytest.mark.parametrize(("kind", "held"), [("mirror", "paused"), ("backup", "paused"), ("mirror", "pending")])
def test_the_job_of_a_drive_goes_with_the_device(kind: str, held: str, tmp_path: Path) -> None:
    """What ``-drive`` made is taken away with its device: the job, though paused, is cancelled, or ends without a switch.

    Only one that waits to be finalized stays: its work is done, and a person is to say whether it counts.
    """
    drive = ("-drive", "if=none,id=d,file=src.qcow2,format=qcow2,node-name=source", "-device", "virtio-scsi-pci,id=scsi")
    pair = systems(*drive, "-device", "scsi-hd,id=disk,drive=d")
    start = do(HELD[kind]["execute"], HELD[kind]["arguments"] | {"device": "d", "auto-finalize": held != "pending"})
    hold = resting(kind) if held == "paused" else [READY, COMPLETE, PENDING]
    source = [["qemu-img", "create", "-q", "-f", "qcow2", "src.qcow2", "4M"], ["qemu-io", "-c", "write 0 2M", "src.qcow2"]]
    real, ours = both(pair, tmp_path, [start, *hold, DELETE, DELETED, *AFTER], IMAGES + source)
    events = [
        [event for step in without_progress(transcript) for event in step["events"]] for transcript in (real, ours)
    ]
    assert events[1] == events[0]
    assert [step["reply"] for step in ours[-3:]] == [step["reply"] for step in real[-3:]]


@pytest.mark.parametrize("kind", ["mirror", "backup", "paused", "three"])
def test_stop_lets_all_requests_end_whether_the_guest_runs_or_not(kind: str, tmp_path: Path) -> None:
    """A job shows it as a short pause, each time; one that is paused shows nothing."""
    start = HELD["mirror"] if kind != "backup" else do(
        "blockdev-backup", job_id="j", device="top", target="out", sync="none"
    )  # fmt: skip
    held = {"mirror": [READY], "backup": [], "paused": resting("mirror"), "three": [READY, *THREE]}[kind]
    stop = do("stop")
    compare(tmp_path, (), [start, *held, stop, stop, do("query-status"), do("query-block-jobs"), do("cont"), do("cont"), stop])


def test_stop_makes_all_images_durable(tmp_path: Path) -> None:
    """Management that stops a machine may copy its files, and even kill it."""
    write = do("human-monitor-command", command_line='qemu-io out "write -P 9 1M 64k"')
    for who, argv in (("real", systems().real), ("ours", systems().ours)):
        place = tmp_path / who
        place.mkdir()
        for line in IMAGES:
            subprocess.run(line, cwd=place, check=True, stdout=subprocess.DEVNULL)
        copy = outside("cp", "out.qcow2", "copy.qcow2")
        transcript(argv, place, [write, do("stop"), copy])
        read = ["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 9 1M 64k", place / "copy.qcow2"]
        assert b"failed" not in subprocess.run(read, check=True, capture_output=True).stdout, who
