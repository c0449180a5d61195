"""Whatever somebody has made of an image: our programs do what they are asked to, or say clearly why not."""

from __future__ import annotations

import os

from hostile_images import desk, try_seed

COUNT = int(os.environ.get("QBLOCK_HOSTILE_IMAGES", "60"))


def test_tampered_images_end_no_program_and_take_no_more_than_they_may() -> None:
    """No exception but ours, no more memory, time or space than is allowed, nothing written by reading, and no damage to sound
    images: for opening, checking, repairing, reading, writing and every other command, on images of every kind.
    """
    with desk() as (corpus, work):
        verdicts = [try_seed(seed, corpus, work)[1] for seed in range(COUNT)]
    assert not any(verdicts), "\n".join(filter(None, verdicts))
