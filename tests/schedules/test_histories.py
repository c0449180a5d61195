"""Random histories: nothing is lost, nothing hangs, nothing is left behind. More: `job_histories`, `machine_histories`."""

from __future__ import annotations

import pytest

import machine_histories
from job_histories import live


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_to_a_chain_the_guest_keeps_its_data(seed: int) -> None:
    """Commits, streams, mirrors, backups, snapshots, bitmaps and faults in any order, and people who change their minds."""
    assert live(seed)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_management_software_tells_a_machine_no_disk_loses_anything(seed: int) -> None:
    """Jobs in groups, bitmaps, backups, snapshots, filters, devices and kills at any moment, on three disks."""
    assert machine_histories.live(seed)
