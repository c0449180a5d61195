"""block-commit and block-stream in a three-layer qcow2 chain, time from the command to its end: the real daemon beside qblock's.

    python benchmarks/layers.py [--size MIB] [--rounds N] [--only TEXT] [--json FILE]

Measured are a commit of the layer in the middle, one of the active layer (to READY), and a stream of both lower layers into the
top one; the chain is made anew for each run.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from daemons import OURS, REAL, daemon, node
from harness import BULK, MiB, Run, Table, main, qemu
from images import chain

LAYERS = ("base", "middle", "top")


class Case(NamedTuple):
    """One job: a command with its members, and the event that ends the measurement."""

    title: str
    command: str
    members: Mapping[str, object]
    until: str = "BLOCK_JOB_COMPLETED"


CASES = (
    Case("commit of the middle layer", "block-commit", {"top-node": "middle", "base-node": "base"}),
    Case("commit of the active layer to READY", "block-commit", {"base-node": "middle"}, "BLOCK_JOB_READY"),
    Case("stream of two layers into the top", "block-stream", {}),
)


def job(program: str, folder: Path, *, case: Case) -> Run:
    """One job on a fresh copy of the chain."""
    for name in LAYERS:
        shutil.copyfile(folder / f"{name}.kept", folder / name)
    below: tuple[str, ...] = ()
    nodes = []
    for name in LAYERS:
        nodes.append(node(name, folder / name, *below))
        below = (f"backing={name}",)
    with daemon(program, folder, *nodes) as running:
        run = running.measure(case.command, {"job-id": "j", "device": "top", **case.members}, until=case.until)
        if case.until == "BLOCK_JOB_READY":
            running.send("block-job-complete", {"device": "j"})
            running.wait_for("BLOCK_JOB_COMPLETED")
    return run


def compare_all(table: Table) -> None:
    """Make the chain, compare each case."""
    folder = table.folder / "layers"
    folder.mkdir()
    chain(folder, table.size * MiB)
    for name, below in zip(LAYERS[1:], LAYERS, strict=False):
        qemu("rebase", "-u", "-b", below, "-F", "qcow2", folder / name)
    for name in LAYERS:
        (folder / name).rename(folder / f"{name}.kept")
    for case in CASES:
        table.compare(
            case.title,
            functools.partial(job, REAL, folder, case=case),
            functools.partial(job, OURS, folder, case=case),
            required=BULK,
        )


if __name__ == "__main__":
    main(__doc__, compare_all)
