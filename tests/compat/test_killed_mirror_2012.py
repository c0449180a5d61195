"""A qblock process killed with SIGKILL while it mirrors as in 2012: what the real qemu-img finds in the target.

Until it has completed the target is an image and no more, also in sync, since its tables may be in the process's memory.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qblock.monitor.client import QmpClient

MiB = 1 << 20
LEAKS = 3


def qemu_img(*arguments: str | Path) -> int:
    """Run the real program; its exit code."""
    return subprocess.run(["qemu-img", *arguments], check=False, stdout=subprocess.DEVNULL).returncode


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An overlay with data in every other MiB, over a base with data in the first ones."""
    base, top = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "16M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 5M", base], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top], check=True)
    writes = [word for chunk in range(0, 16, 2) for word in ("-c", f"write -q -P {chunk + 2} {chunk}M 600k")]
    subprocess.run(["qemu-io", "-f", "qcow2", *writes, top], check=True)
    return top


@pytest.fixture
def machine(disk: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The program with the disk ``d``, ready when its socket is there."""
    socket = tmp_path / "qmp"
    command = ["-m", "qblock", "--dialect", "rfc-2012", "-monitor", "none"]
    command += ["-drive", f"if=virtio,id=d,file={disk},format=qcow2", "-qmp", f"unix:{socket},server=on,wait=off"]
    with subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not socket.exists():
            assert process.poll() is None
            os.sched_yield()
        yield process
        process.kill()


async def client_of(socket: Path) -> QmpClient:
    """A client of the program, which may have made its socket but not listen yet."""
    while True:
        try:
            return await QmpClient.connect(str(socket))
        except ConnectionRefusedError:
            await asyncio.sleep(0)


async def mirror_until(moment: str, directory: Path, *, full: bool) -> None:
    """Start a mirror and bring it to the moment at which the program is to be killed."""
    speed = 4 * MiB if moment == "before it is in sync" else 0
    async with await client_of(directory / "qmp") as qmp:
        await qmp.execute("drive-mirror", device="d", target=str(directory / "copy.qcow2"), full=full, speed=speed)
        while True:
            (job,) = await qmp.execute("query-block-jobs")
            if job["offset"] == job["len"] or (speed and job["offset"] >= 10 * MiB):
                break
        assert (job["offset"] < job["len"]) == (speed > 0)
        if moment == "completed":
            await qmp.execute("block-job-cancel", device="d")
            await qmp.wait_event("BLOCK_JOB_COMPLETED")


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("moment", ["before it is in sync", "in sync", "completed"])
def test_the_target_of_a_killed_mirror_is_whole_and_a_completed_one_is_a_copy(
    moment: str, full: bool, disk: Path, machine: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Clusters may have leaked, nothing else; and the event comes when all of the copy is in its file."""
    asyncio.run(mirror_until(moment, tmp_path, full=full))
    machine.kill()
    machine.wait()
    copy = tmp_path / "copy.qcow2"
    assert qemu_img("check", copy) in ((0,) if moment == "completed" else (0, LEAKS))
    assert qemu_img("check", disk) == 0
    if moment == "completed":
        assert qemu_img("compare", copy, disk) == 0
