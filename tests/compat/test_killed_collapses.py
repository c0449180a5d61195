"""A process that dies while it collapses a chain leaves a good one, as the real programs see it. More: `killed_collapses.py`."""

from __future__ import annotations

import pytest

from killed_collapses import live


@pytest.mark.parametrize("seed", range(3))
def test_killed_machines_leave_chains_that_hold_what_was_flushed(seed: int) -> None:
    """Commits, streams, mirrors, backups and snapshots under a guest, several at once, and SIGKILL at any moment, four times."""
    assert live(seed)
