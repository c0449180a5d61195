"""Every verb of both families of commands, told to every kind of job in every status, on the real daemon and on qblock."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from qmp_pair import DAEMONS, both, do, together, wait
from test_jobs_vs_qemu import CHAIN, CONCLUDED, GONE, GRAPH, IMAGES, OUT, PENDING, READY, Script

STARTS: Final[dict[str, Any]] = {
    "stream": lambda **members: do("block-stream", device="top", **members),
    "commit": lambda **members: do("block-commit", device="top", top_node="mid", **members),
    "active commit": lambda **members: do("block-commit", device="top", **members),
    "mirror": lambda **members: do("blockdev-mirror", device="top", target="out", sync="full", **members),
    "backup": lambda **members: do("blockdev-backup", device="top", target="out", sync="full", **members),
}
BECOME_READY: Final = ("active commit", "mirror")
COMPLETE, PAUSE = do("job-complete", id="j"), do("job-pause", id="j")
REFUSED: Final[dict[str, tuple[str, ...]]] = {
    "paused": ("pause", "complete", "finalize", "dismiss", "soft-cancel"),
    "ready": ("resume", "finalize", "dismiss"),
    "standby": ("pause", "finalize", "dismiss", "soft-cancel"),
    "pending": ("pause", "resume", "complete", "dismiss", "set-speed"),
    "concluded": ("pause", "resume", "cancel", "complete", "finalize", "set-speed", "soft-cancel"),
}
"""What must be refused in a status."""
ENDINGS: Final[dict[str, tuple[str, ...]]] = {
    "paused": ("resume", "cancel"), "ready": ("complete", "cancel", "soft-cancel"), "standby": ("resume", "cancel"),
    "pending": ("finalize", "cancel", "soft-cancel"), "concluded": ("dismiss",),
}  # fmt: skip


def verb(name: str) -> Script:
    """The verb by both families of commands."""
    match name:
        case "soft-cancel":
            return [do("block-job-cancel", device="j")]
        case "set-speed":
            return [do("block-job-set-speed", device="j", speed=0)]
        case "finalize" | "dismiss":
            return [do(f"job-{name}", id="j"), do(f"block-job-{name}", id="j")]
        case "cancel":
            return [do("job-cancel", id="j"), do("block-job-cancel", device="j", force=True)]
        case _:
            return [do(f"job-{name}", id="j"), do(f"block-job-{name}", device="j")]


def to(kind: str, status: str) -> Script:
    """Bring a job of a kind to a status."""
    ready: Script = [READY] if kind in BECOME_READY else []
    complete: Script = [COMPLETE] if ready else []
    start = STARTS[kind]
    match status:
        case "paused":
            return [start(job_id="j", speed=1), PAUSE, wait("JOB_STATUS_CHANGE", status="paused")]
        case "ready":
            return [start(job_id="j"), READY]
        case "standby":
            return [start(job_id="j"), READY, PAUSE, wait("JOB_STATUS_CHANGE", status="standby")]
        case "pending":
            return [start(job_id="j", auto_finalize=False), *ready, *complete, PENDING]
        case _:
            return [start(job_id="j", auto_dismiss=False), *ready, *complete, CONCLUDED]


CASES = [
    (kind, status, ending)
    for kind in STARTS
    for status, endings in ENDINGS.items()
    for ending in endings
    if kind in BECOME_READY or status not in ("ready", "standby")
]


@pytest.mark.parametrize(("kind", "status", "ending"), CASES)
def test_both_take_and_refuse_the_same_verbs(kind: str, status: str, ending: str, tmp_path: Path) -> None:
    """What is refused changes nothing; what is taken has the same consequences."""
    refused = [step for name in REFUSED[status] for step in verb(name)]
    last = verb(ending)[:1]
    if ending == "resume":
        last = [do("block-job-set-speed", device="j", speed=0), *last]
        last += [READY] if status == "paused" and kind in BECOME_READY else [] if status == "standby" else [GONE]
    elif ending != "dismiss" and not (status == "pending" and ending == "finalize"):
        last += [GONE]
    script = [*CHAIN, OUT, *to(kind, status), *refused, *last, GRAPH]
    if status == "paused":  # how far it has come by then is a matter of speed
        script[-1:] = []
    real, ours = both(DAEMONS, tmp_path, script, IMAGES)
    if status == "paused":
        for step in (*real, *ours):
            for event in step["events"]:
                event["data"].pop("offset", None)
                event["data"].pop("len", None)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected


@pytest.mark.parametrize("ending", ["j", "k"])
def test_both_take_and_refuse_the_same_verbs_while_a_job_waits_for_its_group(ending: str, tmp_path: Path) -> None:
    """Only a cancel is taken; whichever of the two is cancelled, the other one ends cancelled too."""
    empty = [do("blockdev-add", driver="null-co", node_name=name, size=4 << 20) for name in ("other", "other-out")]
    group = together(
        ("blockdev-backup", {"job-id": "j", "device": "top", "target": "out", "sync": "full"}),
        ("blockdev-backup", {"job-id": "k", "device": "other", "target": "other-out", "sync": "none"}),
        completion_mode="grouped",
    )
    names = ("pause", "resume", "complete", "finalize", "dismiss", "set-speed")
    refused = [step for name in names for step in verb(name)]
    waiting, gone = (wait("JOB_STATUS_CHANGE", status=status, id="j") for status in ("waiting", "null"))
    jobs = [do("query-jobs"), do("query-block-jobs")]
    script = [*CHAIN, OUT, *empty, group, waiting, *jobs, *refused, *jobs, do("job-cancel", id=ending), gone, GRAPH]
    real, ours = both(DAEMONS, tmp_path, script, IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected
