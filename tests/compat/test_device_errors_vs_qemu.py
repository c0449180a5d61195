"""A guest's request fails, in qemu-system-x86_64 with a guest that boots from the disk and in qblock-system with ours.

The guest of the real one is a boot sector: it writes (or reads) the sector at 2048 once. Compared are the events, the run state
and the I/O status, before and after ``cont``, and what a ready job shows of the stop. Left out is virtio-scsi, whose controller
brings all disks to rest once more, before STOP.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from qmp_pair import Connection, do, hmp, running

pytestmark = pytest.mark.qemu

BOOT: Final = bytes.fromhex(
    "31c08ed88ec08ed0bc0070"  # segments 0, the stack below 0x7000
    "be247c"                  # SI: the request at 0x7c24
    "b43f"                    # AH: what to do, by BIOS call 0x13
    "b000"                    # AL: without verifying
    "cd13"
    "f4ebfd"                  # halt, for ever
).ljust(0x24, b"\0") + bytes.fromhex("10000100" "00800000" "0400000000000000")  # fmt: skip
"""Asks the BIOS for one sector, number 4, from or to memory at 0x8000; on the disk that it was loaded from (DL)."""
_WHAT: Final = BOOT.index(b"\xb4\x3f") + 1
CALLS: Final = {"read": b"\x42", "write": b"\x43"}
SECTOR: Final = 4
SIZE: Final = 4 << 20
MODELS: Final[dict[str, Sequence[str]]] = {
    "virtio": ("-device", "virtio-blk-pci,id=disk"),
    "scsi": ("-device", "lsi53c895a", "-device", "scsi-hd,id=disk"),
    "ide": ("-device", "ide-hd,id=disk"),
    "usb": ("-device", "qemu-xhci", "-device", "usb-storage,id=disk"),
}
MIRROR: Final = do("blockdev-mirror", job_id="j", device="s", target="t", sync="full")


def disk(operation: str) -> bytes:
    """A disk with the guest on it."""
    code = BOOT[:_WHAT] + CALLS[operation] + BOOT[_WHAT + 1 :]
    return (code.ljust(510, b"\0") + b"\x55\xaa").ljust(SIZE, b"\0")


def line(model: str, *, operation: str, code: int, policy: str, drive: bool) -> list[str]:
    """The common part of both command lines: a disk on which the request fails once, and two nodes for a job."""
    rule = {"event": "none", "iotype": operation, "sector": SECTOR, "errno": code, "once": True}
    *before, device = MODELS[model]
    device += ",bootindex=1,drive=d"
    made = ["-S", "-nodefaults", "-display", "none", "-qmp", "unix:{socket},server=on,wait=off"]
    for name in ("s", "t"):
        made += ["-blockdev", f"null-co,node-name={name},size=1048576,read-zeroes=on"]
    if drive:
        rules = "".join(f",file.inject-error.0.{key}={'on' if value is True else value}" for key, value in rule.items())
        image = "file.driver=blkdebug,file.image.driver=file,file.image.filename=disk.raw"
        made += ["-drive", f"if=none,id=d,node-name=n,format=raw,{policy},{image}{rules}", *before, device]
    else:
        file = {"driver": "blkdebug", "image": {"driver": "file", "filename": "disk.raw"}, "inject-error": [rule]}
        node = json.dumps({"driver": "raw", "node-name": "d", "file": file}).replace("{", "{{").replace("}", "}}")
        made += ["-blockdev", node, *before, f"{device},{policy}"]
    return made


def told(connection: Connection, seen: list[Any], *, until: str) -> list[tuple[str, Any]]:
    """The events up to one that is called or says ``until``; ``seen`` have come already."""
    while all(until not in (event["event"], event.get("data", {}).get("status")) for event in seen):
        seen.append(connection.receive())
    return [(event["event"], event.get("data")) for event in seen]


def look(connection: Connection) -> list[Any]:
    """The run state, and the I/O status of the disk."""
    disks = connection.execute(do("query-block"))[1]["return"]
    status = connection.execute(do("query-status"))[1]["return"]
    return [status, *((disk["device"], disk["qdev"], disk.get("io-status")) for disk in disks)]


def life(argv: list[str], place: Path, *, request: dict[str, Any] | None, stops: bool) -> list[Any]:
    """What is told of the request that fails, and of what comes after it; ``request`` makes our guest send it."""
    with running(argv, place) as connection:
        connection.execute({"execute": "qmp_capabilities"})
        story: list[Any] = [told(connection, connection.execute(MIRROR)[0], until="BLOCK_JOB_READY")]
        events, _ = connection.execute(do("cont"))
        if request is not None:
            events += connection.execute(request)[0]
        story += [told(connection, events, until="ready" if stops else "BLOCK_IO_ERROR"), look(connection)]
        connection.execute(do("cont"))
        return [*story, look(connection)]


@pytest.mark.parametrize(
    ("model", "operation", "code", "policy", "drive"),
    [
        ("virtio", "write", 5, "werror=stop", False), ("scsi", "write", 28, "werror=enospc", True),
        ("ide", "write", 5, "werror=report", False), ("usb", "read", 123, "rerror=stop", True),
        ("scsi", "read", 28, "rerror=ignore", False), ("virtio", "write", 1, "werror=enospc", True),
    ],
)  # fmt: skip
def test_both_do_the_same_about_a_failed_request(
    model: str, operation: str, code: int, policy: str, drive: bool, tmp_path: Path
) -> None:
    """Who can never be stopped by errors has no I/O status; who is stopped comes to rest; ``cont`` forgives drives only."""
    common = line(model, operation=operation, code=code, policy=policy, drive=drive)
    word = "write disk 2048 512 1" if operation == "write" else "read disk 2048 512"
    stories = []
    for who, program, request in (
        ("real", ["qemu-system-x86_64", "-M", "pc", "-m", "32"], None),
        ("ours", [sys.executable, "-m", "qblock.tools.system"], hmp(f"guest {word}")),
    ):
        place = tmp_path / who
        place.mkdir()
        (place / "disk.raw").write_bytes(disk(operation))
        stops = policy.endswith("stop") or (policy.endswith("enospc") and code == 28)
        stories.append(life(program + common, place, request=request, stops=stops))
    assert stories[1] == stories[0]
