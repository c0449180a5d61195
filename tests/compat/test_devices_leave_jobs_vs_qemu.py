"""A guest's disk is pulled out while a job is at work on it, in qemu-system-x86_64 and in qblock-system."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import pytest

from qmp_pair import Pair, both
from test_jobs_vs_qemu import GONE, GRAPH, IMAGES, READY, Script
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
