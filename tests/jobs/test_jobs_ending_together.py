"""Jobs on one disk that come to their end at the same moment: each has its drained section, and none waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qblock.monitor.machine import MachineOptions
from qblock.testing.graphs import describe_graph
from qblock.testing.images import make_chain, make_image
from qblock.testing.machines import LocalMachine, drive_text
from qblock.testing.schedules import Seeded
from qblock.units import MiB

SIZE = 1 * MiB


@pytest.fixture(params=range(6))
def local(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalMachine]:
    """A disk d, a chain of two, and four empty disks to copy to, under a schedule of its own."""
    *_, top = make_chain(tmp_path, SIZE, [("base", {0: b"b" * 4096}), ("top", {SIZE // 2: b"t" * 4096})])
    options = MachineOptions(drives=[drive_text(top, "d", "qcow2") + ",node-name=top"], seed=request.param)
    with LocalMachine(Seeded(request.param), options) as machine:
        for number in range(4):
            path = make_image(tmp_path / f"copy{number}", SIZE)
            storage = {"driver": "file", "filename": str(path)}
            machine.qmp.execute("blockdev-add", driver="qcow2", node_name=f"copy{number}", file=storage)
        yield machine


def backup(number: int) -> dict[str, Any]:
    """Arguments of a backup of the disk."""
    return {"job-id": f"b{number}", "device": "top", "target": f"copy{number}", "sync": "full"}


def ends(local: LocalMachine, *jobs: str) -> None:
    """Every one of ``jobs`` completes, and leaves nothing behind."""
    for job in jobs:
        local.qmp.wait_event("JOB_STATUS_CHANGE", id=job, status="null")
    assert local.qmp.execute("query-jobs") == []
    graph = local.machine.system.graph
    describe_graph(graph)  # checks that the drained sections are balanced
    assert not any(node.quiesce_counter or node.blockers for node in graph.nodes.values())


def test_a_stream_and_a_backup_of_one_disk_finalized_at_once_both_end(local: LocalMachine) -> None:
    """Both drain the disk for their last step; each used to wait for the other's section."""
    local.qmp.execute("blockdev-backup", backup(0) | {"auto-finalize": False})
    local.qmp.execute("block-stream", {"job-id": "s", "device": "top", "auto-finalize": False})
    for job in ("b0", "s"):
        local.qmp.wait_event("JOB_STATUS_CHANGE", id=job, status="pending")
    runner = local.machine.system.jobs

    async def finalize_both() -> None:
        await asyncio.gather(*(runner.finalize(runner.find(job)) for job in ("b0", "s")))

    local.run(finalize_both())
    ends(local, "b0", "s")


@pytest.mark.parametrize("mode", ["individual", "grouped"])
def test_backups_of_one_disk_that_end_together_all_end(local: LocalMachine, mode: str) -> None:
    """Whether or not the transaction that started them makes them one group."""
    actions = [{"type": "blockdev-backup", "data": backup(number)} for number in range(4)]
    local.qmp.execute("transaction", {"actions": actions, "properties": {"completion-mode": mode}})
    ends(local, *(f"b{number}" for number in range(4)))
