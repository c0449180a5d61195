"""A writer who came below a job's filter, where QEMU lets it come, and may not be there without the filter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qblock.monitor.machine import MachineOptions
from qblock.testing.images import make_chain, make_image
from qblock.testing.machines import LocalMachine, drive_text
from qblock.units import MiB

SIZE = 1 * MiB


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalMachine]:
    """A guest's disk d, a chain of two, and a disk aside."""
    *_, top = make_chain(tmp_path, SIZE, [("base", {0: b"b" * 4096}), ("top", {SIZE // 2: b"t" * 4096})])
    options = MachineOptions(drives=[drive_text(top, "d", "qcow2") + ",node-name=top"], seed=0)
    with LocalMachine(options=options) as machine:
        aside = {"driver": "file", "filename": str(make_image(tmp_path / "aside", SIZE))}
        machine.qmp.execute("blockdev-add", driver="qcow2", node_name="aside", file=aside)
        yield machine


@pytest.mark.parametrize("verb", ["job-complete", "job-cancel"])
def test_a_commit_whose_filter_keeps_two_writers_apart_ends_and_leaves_it(local: LocalMachine, verb: str) -> None:
    """The job fails, or is cancelled, and lets go of all; it used to stay aborting for ever."""
    local.qmp.execute("block-commit", job_id="j", device="d")
    local.qmp.wait_event("BLOCK_JOB_READY")
    keeper = {"driver": "copy-before-write", "node-name": "keeper", "file": "aside", "target": "top"}
    local.qmp.execute("blockdev-add", keeper)
    local.guest_write("d", 0, 4096, 9)
    local.qmp.execute(verb, id="j")
    local.qmp.wait_event("JOB_STATUS_CHANGE", id="j", status="null")
    node = local.machine.system.graph.find_node("top")
    assert not node.blockers and not node.quiesce_counter and not node.dirty_bitmaps
    local.guest_write("d", 4096, 4096, 7)
    assert local.guest_read("d", 0, 8192) == b"\x09" * 4096 + b"\x07" * 4096
    local.qmp.execute("blockdev-del", node_name="keeper")
    local.qmp.execute("block-commit", job_id="again", device="d")
    local.qmp.wait_event("BLOCK_JOB_READY")
    local.qmp.execute("job-complete", id="again")
    local.qmp.wait_event("BLOCK_JOB_COMPLETED", device="again")
    assert local.guest_read("d", 0, 8192) == b"\x09" * 4096 + b"\x07" * 4096
