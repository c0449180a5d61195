"""Which two jobs may be at work on one chain: every pair on the real daemon and on qblock, each told the same way.

Speed limits and pauses hold the jobs where they are, so that nothing depends on how fast a machine is.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from qmp_pair import DAEMONS, Connection, comparable, running
from test_jobs_vs_qemu import GRAPH, Script
from test_qmp_replies import add, do

LAYERS: Final = ("base", "low", "mid", "top")
COPIES: Final = ("out", "out2")


def _images() -> list[list[str]]:
    lines: list[list[str]] = []
    below: list[str] = []
    for number, name in enumerate((*LAYERS, *COPIES)):
        backing = below if name in LAYERS else []
        lines.append(["qemu-img", "create", "-q", "-f", "qcow2", *backing, f"{name}.qcow2", "16M"])
        if name in LAYERS:
            lines.append(["qemu-io", "-c", f"write -P {number + 1} {4 * number}M 4M", f"{name}.qcow2"])
        below = ["-b", f"{name}.qcow2", "-F", "qcow2"]
    return lines


NODES: Final[Script] = [
    *(
        add(name, f"{name}.qcow2", **({} if below is None else {"backing": below}))
        for name, below in zip(LAYERS, (None, *LAYERS), strict=False)
    ),
    *(add(name, f"{name}.qcow2") for name in COPIES),
]
JOBS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "stream into top": ("block-stream", {"device": "top"}),
    "stream of mid into top": ("block-stream", {"device": "top", "base-node": "low"}),
    "stream into mid": ("block-stream", {"device": "mid"}),
    "stream of base into low": ("block-stream", {"device": "low"}),
    "commit of top": ("block-commit", {"device": "top"}),
    "commit of top into mid": ("block-commit", {"device": "top", "base-node": "mid"}),
    "commit of mid": ("block-commit", {"device": "top", "top-node": "mid"}),
    "commit of mid into low": ("block-commit", {"device": "top", "top-node": "mid", "base-node": "low"}),
    "commit of low into base": ("block-commit", {"device": "top", "top-node": "low"}),
    "mirror of top": ("blockdev-mirror", {"device": "top", "target": "out", "sync": "full"}),
    "mirror of the top layer": ("blockdev-mirror", {"device": "top", "target": "out", "sync": "top"}),
    "mirror of mid": ("blockdev-mirror", {"device": "mid", "target": "out", "sync": "full"}),
    "mirror of top into base": ("blockdev-mirror", {"device": "top", "target": "base", "sync": "full"}),
    "backup of top": ("blockdev-backup", {"device": "top", "target": "out", "sync": "full"}),
    "backup of writes to top": ("blockdev-backup", {"device": "top", "target": "out", "sync": "none"}),
    "backup of mid": ("blockdev-backup", {"device": "mid", "target": "out", "sync": "top"}),
    "backup of base": ("blockdev-backup", {"device": "base", "target": "out", "sync": "full"}),
    "backup of base into top": ("blockdev-backup", {"device": "base", "target": "top", "sync": "full"}),
}

ALWAYS_REFUSED: Final = ("mirror of mid", "mirror of top into base")
"""What cannot be started on a chain at all: its source is no root, or its target is used."""


def started(connection: Connection, kind: str, job: str, **members: str) -> Any:
    """Start a job that does not get on, and pause the first one: its error, or what jobs say of themselves, and the graph."""
    command, usual = JOBS[kind]
    _, reply = connection.execute(do(command, usual | {"job-id": job, "speed": 1} | members))
    if "error" in reply:
        return reply["error"]["class"]
    if job == "j":  # drained sections would let it copy on
        connection.execute(do("block-job-pause", device=job))
    jobs = connection.execute(do("query-block-jobs"))[1]["return"]
    return [(entry["device"], entry["type"], entry["speed"], entry["paused"]) for entry in jobs], graph(connection)


def ended(connection: Connection, job: str) -> None:
    """Cancel a job and wait until it has gone."""
    events, reply = connection.execute(do("job-cancel", id=job))
    assert "return" in reply
    gone = {"id": job, "status": "null"}
    while not any(event.get("data") == gone for event in events):
        events = [connection.receive()]


def graph(connection: Connection) -> Any:
    """All nodes and edges with their permissions."""
    return comparable([{"reply": connection.execute(GRAPH)[1]}], Path())


def table(argv: Sequence[str], place: Path, kind: str) -> dict[str, Any]:
    """What becomes of each job that is started next to one of ``kind``: into a copy of its own, and into the same."""
    place.mkdir()
    for line in _images():
        subprocess.run(line, cwd=place, check=True, stdout=subprocess.DEVNULL)
    with running(argv, place) as connection:
        for step in (do("qmp_capabilities"), *NODES):
            assert "return" in connection.execute(step)[1]
        shown = {"alone": started(connection, kind, "j")}
        for second, (_, usual) in JOBS.items():
            for target in reversed(COPIES) if usual.get("target") == "out" else ("",):
                answer = started(connection, second, "k", **({"target": target} if target else {}))
                shown[f"{second} {target}"] = answer
                if not isinstance(answer, str):
                    ended(connection, "k")
        ended(connection, "j")
        shown["none"] = graph(connection)
    return shown


@pytest.mark.parametrize("kind", [kind for kind in JOBS if kind not in ALWAYS_REFUSED])
def test_both_take_and_refuse_the_same_second_jobs(kind: str, tmp_path: Path) -> None:
    """While one job is at work, another one may be started on a disjoint part of the chain, and on no other."""
    real, ours = (table(argv, tmp_path / who, kind) for who, argv in (("real", DAEMONS.real), ("ours", DAEMONS.ours)))
    different = [name for name in real if ours[name] != real[name]]
    assert {name: ours[name] for name in different} == {name: real[name] for name in different}
    assert all(real[name] == "GenericError" for name in real if name.startswith(ALWAYS_REFUSED))
