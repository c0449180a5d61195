"""What qemu-system prints to its standard output while a client works with it, and what qblock prints there."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from qmp_pair import SYSTEMS, Connection, Json, hmp, running

DISKS = (
    "-S", "-drive", "if=none,id=d0,file=base.qcow2,format=qcow2", "-drive", "if=none,id=d1,file=other.qcow2,format=qcow2",
)  # fmt: skip


STEPS: Sequence[Json] = (
    {"execute": "query-status"},
    {"execute": "stop"},
    hmp("info status"),
    hmp("drive_mirror -f d1 copy.qcow2"),
    {"execute": "drive-mirror", "arguments": {"device": "d0", "job-id": "j", "target": "c.raw", "format": "raw", "sync": "full"}},
    hmp("drive_mirror -n d0 copy.qcow2"),
    {"execute": "block-job-cancel", "arguments": {"device": "j", "force": True}},
    {"execute": "cont"},
    hmp("info status"),
    hmp("snapshot_blkdev d0 nowhere/snap.qcow2"),
    hmp("snapshot_blkdev d0 snap,1.qcow2 qcow2"),
    hmp("snapshot_blkdev d0 snap.raw raw"),
    hmp('qemu-io d0 "write -q -P 1 0 4k"'),
    hmp('qemu-io d0 "read -P 2 0 4k"'),
    hmp('qemu-io d0 "length"'),
    {"execute": "blockdev-create",
     "arguments": {"job-id": "c", "options": {"driver": "file", "filename": "new.raw", "size": 4096}}},
)  # fmt: skip


def perform(argv: Sequence[str], place: Path) -> tuple[list[Json], list[str]]:
    """The replies without their texts, and the lines on standard output without rates."""
    place.mkdir()
    for name in ("base.qcow2", "other.qcow2"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", name, "1M"], cwd=place, check=True)
    printed = place / "printed"
    command = [*argv, *DISKS]
    shell = ["sh", "-c", f'exec "$@" > {printed}', "sh", *command]
    with running(shell, place) as connection:
        connection.execute({"execute": "qmp_capabilities"})
        replies = [reply_to(connection, step) for step in STEPS]
    lines = [re.sub(r"; .*|, \d+ ops.*", "", line) for line in printed.read_text().splitlines()]
    return replies, lines


def reply_to(connection: Connection, step: Json) -> Json:
    """The reply; of errors only that they are."""
    reply = connection.execute(step)[1]
    said = reply.get("return")
    return "error" if "error" in reply else "Error" if isinstance(said, str) and said.startswith("Error") else said


@pytest.mark.qemu
def test_both_print_the_same_lines(tmp_path: Path) -> None:
    """Also when the file cannot be made; and nothing for images that exist, nor for blockdev-create."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    theirs, ours = perform(SYSTEMS.real, tmp_path / "real"), perform(SYSTEMS.ours, tmp_path / "ours")
    assert ours == theirs
    assert sum(line.startswith("Formatting '") for line in ours[1]) == 4
