"""Random histories of whole image chains, lived by the real programs and by ours: see `image_histories`."""

from __future__ import annotations

import os

import pytest

from image_histories import live

COUNT = int(os.environ.get("QBLOCK_HISTORIES", "10"))


@pytest.mark.parametrize("seed", range(COUNT))
def test_both_programs_make_the_same_of_the_same_commands(seed: int) -> None:
    """Exit codes, content, and what info, map, check and measure tell agree, and each side reads the other's images."""
    assert not (trouble := live(seed, 6)), trouble
