"""Random histories of dirty bitmaps, lived by the real machine and by ours: see `bitmap_histories`."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitmap_histories import live


@pytest.mark.qemu
@pytest.mark.parametrize("seed", range(4))
def test_both_machines_keep_the_same_account_of_writes(seed: int, tmp_path: Path) -> None:
    """Replies, events, hashes and what is stored agree, through transactions that fail, backups, restarts and kills."""
    live(seed, tmp_path)
