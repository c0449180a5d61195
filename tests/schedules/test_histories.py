"""Random histories of jobs on one chain: nothing is lost, nothing hangs, nothing is left behind. More: `job_histories.py`."""

from __future__ import annotations

import pytest

from job_histories import live


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_to_a_chain_the_guest_keeps_its_data(seed: int) -> None:
    """Commits, streams, mirrors, backups, snapshots, bitmaps and faults in any order, and people who change their minds."""
    assert live(seed)
