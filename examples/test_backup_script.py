"""The backup script, tested against a machine that exists only in the test: no QEMU, no guest system, no waiting.

`qblock_served` is a machine behind a real unix socket, on virtual time. The script runs in a thread, as it would run in a process
of its own; the test decides when time passes. See docs/testing-your-software.md.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import backup_script
import pytest

import qblock
from qblock.testing.machines import ServedMachine

MiB = 1 << 20


@pytest.fixture
def machine(qblock_served: ServedMachine, qblock_image: Callable[..., Path]) -> ServedMachine:
    """A machine with one disk of 16 MiB, half of it full."""
    disk = qblock_image("disk.qcow2", "16M", {0: b"\x11" * 8 * MiB})
    qblock_served.add_drive(disk, device="virtio0")
    return qblock_served


def test_the_backup_is_the_disk_at_the_moment_when_the_copy_was_in_step(machine: ServedMachine, tmp_path: Path) -> None:
    """What the guest writes while the copy runs is in it; what it writes afterwards is not."""
    target = tmp_path / "backup.qcow2"
    with ThreadPoolExecutor() as pool:
        running = pool.submit(backup_script.backup, machine.socket_path, "virtio0", str(target), speed=MiB)
        machine.await_event("JOB_STATUS_CHANGE", status="running")  # the script has started its job
        machine.advance("2s")  # the copy is under way
        machine.guest_write("virtio0", 10 * MiB, 512, 0x22)
        machine.advance_until("BLOCK_JOB_COMPLETED")  # eight seconds of copying pass at once
        machine.guest_write("virtio0", 12 * MiB, 512, 0x33)
        assert running.result() >= 8 * MiB
    with qblock.open(target) as image:
        assert image.read(0, 8 * MiB) == b"\x11" * 8 * MiB
        assert image.read(10 * MiB, 512) == b"\x22" * 512
        assert image.read(12 * MiB, 512) == bytes(512)


def test_a_backup_that_somebody_cancels_leaves_no_file(machine: ServedMachine, tmp_path: Path) -> None:
    """Half a backup would be taken for one."""
    target = tmp_path / "backup.qcow2"
    with ThreadPoolExecutor() as pool:
        running = pool.submit(backup_script.backup, machine.socket_path, "virtio0", str(target), speed=MiB)
        machine.await_event("JOB_STATUS_CHANGE", status="running")
        machine.advance("1s")
        machine.qmp("job-cancel", id="backup-virtio0")
        with pytest.raises(backup_script.BackupFailed, match="somebody cancelled"):
            running.result()
    assert not target.exists()


def test_a_refused_backup_says_why(machine: ServedMachine, tmp_path: Path) -> None:
    """The machine's own words reach the person who reads the log."""
    with pytest.raises(backup_script.BackupFailed, match="virtio9"):
        backup_script.backup(machine.socket_path, "virtio9", str(tmp_path / "backup.qcow2"))
    (tmp_path / "old.qcow2").touch()
    with pytest.raises(backup_script.BackupFailed, match="exists already"):
        backup_script.backup(machine.socket_path, "virtio0", str(tmp_path / "old.qcow2"))
