"""All commands of the image tools beside the real ones: a table of ratios and peak memory.

    python benchmarks/all.py [--size MIB] [--rounds N] [--only TEXT] [--json FILE]

The columns: the best times, how fast ours is as a multiple of the real one's speed, the same of the processor time (user and
system: other programs on the machine disturb it less), and the peak memory of both. `docs/speed.md` explains the numbers.
"""

from __future__ import annotations

import bench
import commit_rebase
import compare
import convert
import metadata
from harness import main

if __name__ == "__main__":
    main(
        __doc__,
        convert.compare_all,
        metadata.compare_all,
        compare.compare_all,
        commit_rebase.compare_all,
        bench.compare_all,
    )
