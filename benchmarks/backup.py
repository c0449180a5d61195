"""blockdev-backup of a three-layer qcow2 chain, time from the command to its end: the real daemon beside qblock's.

    python benchmarks/backup.py [--size MIB] [--rounds N] [--only TEXT] [--json FILE]

Measured are a full backup, the same next to 20 bitmaps, a compressed one, and an increment: 256 KiB of every MiB are dirty in its
bitmap.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from daemons import OURS, REAL, daemon, node, same_content, size_of
from harness import BULK, MiB, Run, Table, main, qemu
from images import chain

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


def backup(program: str, top: Path, folder: Path, *, case: Case) -> Run:
    """One backup, measured from the command to BLOCK_JOB_COMPLETED."""
    target = folder / "target"
    target.unlink(missing_ok=True)
    qemu("create", "-q", "-f", "qcow2", target, str(size_of(top)))
    with daemon(program, folder, node("source", top), node("target", target)) as running:
        for number in range(case.bitmaps):
            running.send("block-dirty-bitmap-add", {"node": "source", "name": f"b{number}"})
            running.next()
        members = {"job-id": "j", "device": "source", "target": "target", "sync": "full", **case.members}
        run = running.measure("blockdev-backup", members, until="BLOCK_JOB_COMPLETED")
    if case.full:
        same_content(top, target)
    return run


def add_dirty_bitmap(top: Path) -> None:
    """Give the image a persistent bitmap in which 256 KiB of every MiB are dirty."""
    qemu("bitmap", "--add", "-f", "qcow2", top, "dirty")
    writes = [word for at in range(0, size_of(top), MiB) for word in ("-c", f"write -q -P 7 {at} 256k")]
    for start in range(0, len(writes), 1000):
        subprocess.run(["qemu-io", "-f", "qcow2", *writes[start : start + 1000], top], check=True, stdout=subprocess.DEVNULL)


def compare_all(table: Table) -> None:
    """Make the chain, back it up by both in turns, a line for each case."""
    folder = table.folder / "backup"
    folder.mkdir()
    top = chain(folder, table.size * MiB)
    add_dirty_bitmap(top)
    for case in CASES:
        real, ours = (partial(backup, program, top, folder, case=case) for program in (REAL, OURS))
        table.compare(case.title, real, ours, required=BULK)


if __name__ == "__main__":
    main(__doc__, compare_all)
