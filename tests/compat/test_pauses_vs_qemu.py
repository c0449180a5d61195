"""What a job that only waits shows of the work of others below it, on the real daemon and on qblock: sections as pauses."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmp_pair import DAEMONS, both, do, wait
from test_jobs_vs_qemu import CHAIN, GRAPH, IMAGES, OUT, READY, mirror, stream

STARTED, GONE = wait("BLOCK_JOB_PENDING", id="s"), wait("JOB_STATUS_CHANGE", status="null", id="s")
BELOW = {
    "streams": [
        stream(device="mid"), STARTED, do("job-cancel", id="s"), GONE, stream(device="mid"), STARTED,
        do("job-finalize", id="s"), GONE, stream(device="base"), STARTED, do("job-finalize", id="s"), GONE,
        stream(device="mid", job_id="j"), stream(device="mid", speed=-1), stream(device="mid", filter_node_name="mid"),
    ],
    "backups": [
        do("blockdev-add", driver="null-co", node_name="copy", size=4 << 20),
        do("blockdev-backup", job_id="s", device="base", target="copy", sync="full", auto_finalize=False), STARTED,
        do("job-cancel", id="s"), GONE,
    ],
    "nodes": [
        do("blockdev-add", driver="copy-on-read", node_name="c", file="mid"),
        do("blockdev-add", driver="raw", node_name="r", file={"driver": "copy-on-read", "file": "base"}),
        do("blockdev-add", driver="throttle", node_name="t", file="mid", throttle_group="nope"),
        do("blockdev-add", driver="qcow2", node_name="q", file="mid"),
    ],
}  # fmt: skip


@pytest.mark.qemu
@pytest.mark.parametrize("what", BELOW)
def test_a_mirror_that_is_ready_shows_as_many_pauses(what: str, tmp_path: Path) -> None:
    """Management that follows two jobs at once must not be told of other states than by QEMU."""
    after = [do("query-named-block-nodes", flat=True), GRAPH, do("job-cancel", id="j")]
    script = [*CHAIN, OUT, mirror(), READY, *BELOW[what], *after]
    real, ours = both(DAEMONS, tmp_path, script, IMAGES)
    for expected, got in zip(real, ours, strict=True):
        assert got == expected
