"""blockdev-backup of a three-layer qcow2 chain, time from the command to its end: the real daemon beside qblock's.

    python benchmarks/backup.py [--size MIB] [--rounds N]

Measured are a full backup, the same next to 20 bitmaps, a compressed one, and an increment: 256 KiB of every MiB are dirty in its
bitmap.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from harness import BIN, Comparison, MiB, Run, best_of, chain, compiled_once, need_qemu, workspace
from mirror import Monitor, processor_seconds

BITMAPS = 20


class Case(NamedTuple):
    """One backup. ``members`` are further ones of the command, ``bitmaps`` how many the source has."""

    title: str
    members: Mapping[str, object] = {}
    bitmaps: int = 0
    full: bool = True


CASES = (
    Case("full backup of a chain"),
    Case(f"full backup next to {BITMAPS} bitmaps", bitmaps=BITMAPS),
    Case("compressed backup of a chain", {"compress": True}),
    Case("increment by a bitmap", {"sync": "bitmap", "bitmap": "dirty", "bitmap-mode": "never"}, full=False),
)


def backup(daemon: str | Path, top: Path, folder: Path, *, case: Case, size: int) -> Run:
    """One backup: seconds to BLOCK_JOB_COMPLETED, and the daemon's peak memory and processor time until then."""
    target, path = folder / "target", folder / "qmp"
    target.unlink(missing_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", target, str(size)], check=True)
    words = [
        str(daemon),
        "--blockdev", f"driver=qcow2,node-name=source,file.driver=file,file.filename={top}",
        "--blockdev", f"driver=qcow2,node-name=target,file.driver=file,file.filename={target}",
        "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c",
    ]  # fmt: skip
    process = subprocess.Popen(words, env=compiled_once())
    while not path.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    monitor = Monitor(path)
    for number in range(case.bitmaps):
        monitor.send("block-dirty-bitmap-add", {"node": "source", "name": f"b{number}"})
        monitor.next()
    started, processor = time.perf_counter(), processor_seconds(process.pid)
    monitor.send("blockdev-backup", {"job-id": "j", "device": "source", "target": "target", "sync": "full", **case.members})
    monitor.wait_for("BLOCK_JOB_COMPLETED")
    seconds = time.perf_counter() - started
    processor = processor_seconds(process.pid) - processor
    status = Path(f"/proc/{process.pid}/status").read_text()
    memory = int(status.split("VmHWM:")[1].split()[0]) * 1024
    monitor.send("quit")
    process.wait(60)
    monitor.socket.close()
    path.unlink(missing_ok=True)
    if case.full and subprocess.run(["qemu-img", "compare", "-q", top, target], check=False).returncode:
        raise SystemExit(f"{daemon}: the copy differs")
    return Run(seconds, memory, processor)


def with_dirty_bitmap(top: Path) -> None:
    """Give the image a persistent bitmap in which 256 KiB of every MiB are dirty."""
    subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", top, "dirty"], check=True)
    writes = [word for at in range(0, top_size(top), MiB) for word in ("-c", f"write -q -P 7 {at} 256k")]
    for start in range(0, len(writes), 1000):
        subprocess.run(["qemu-io", "-f", "qcow2", *writes[start : start + 1000], top], check=True, stdout=subprocess.DEVNULL)


def top_size(top: Path) -> int:
    """The size of the disk in an image, in bytes."""
    return int(subprocess.check_output(["qemu-img", "info", top], text=True).partition("(")[2].partition(" ")[0])


def main() -> None:
    """Make the chain, back it up by both in turns, print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of the disk (default 1024)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    need_qemu("qemu-img", "qemu-io", "qemu-storage-daemon")
    with workspace() as folder:
        top = chain(folder, options.size * MiB)
        with_dirty_bitmap(top)
        for case in CASES:
            compare(top, folder, case=case, size=options.size, rounds=options.rounds)


def compare(top: Path, folder: Path, *, case: Case, size: int, rounds: int) -> None:
    """One line of the table."""
    real, ours = best_of(
        lambda: backup("qemu-storage-daemon", top, folder, case=case, size=size * MiB),
        lambda: backup(BIN / "qblock-storage-daemon", top, folder, case=case, size=size * MiB),
        rounds=rounds,
    )
    Comparison(case.title, real, ours, size if case.full else size / 4, "MiB/s").show()


if __name__ == "__main__":
    main()
