"""blockdev-mirror of a three-layer qcow2 chain to a new qcow2, time to READY: the real daemon beside qblock's.

python benchmarks/mirror.py [--size MIB] [--rounds N] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from daemons import OURS, REAL, daemon, node, same_content, size_of
from harness import BULK, MiB, Run, Table, main, qemu
from images import chain


def mirror(program: str, top: Path, folder: Path, *, discard: str) -> Run:
    """One mirror, measured from the command to BLOCK_JOB_READY."""
    target = folder / "target"
    target.unlink(missing_ok=True)
    qemu("create", "-q", "-f", "qcow2", target, str(size_of(top)))
    with daemon(program, folder, node("source", top), node("target", target, f"discard={discard}")) as running:
        members = {"job-id": "copy", "device": "source", "target": "target", "sync": "full"}
        run = running.measure("blockdev-mirror", members, until="BLOCK_JOB_READY")
        running.send("block-job-complete", {"device": "copy"})
        running.wait_for("BLOCK_JOB_COMPLETED")
    same_content(top, target)
    return run


def compare_all(table: Table) -> None:
    """Make the chain, mirror it by both in turns, for each setting of the target."""
    folder = table.folder / "mirror"
    folder.mkdir()
    top = chain(folder, table.size * MiB)
    for discard in ("unmap", "ignore"):
        real, ours = (partial(mirror, program, top, folder, discard=discard) for program in (REAL, OURS))
        table.compare(f"mirror of a chain to READY, discard={discard}", real, ours, required=BULK)


if __name__ == "__main__":
    main(__doc__, compare_all, size=2048)
