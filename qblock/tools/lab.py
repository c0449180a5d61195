"""``qblock lab``: experiments with the block layer, one sub-command each. See docs/labs.md.

An experiment lives in `qblock.lab`; its command line is a module beside this one, imported when it is chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Final

from qblock.tools.console import complain

PROGRAM: Final = "qblock lab"

EXPERIMENTS: Final = {
    "witness": "kill management, the machine or both at every step of drive-reopen's witness protocol",
    "compare": "one guest, and every way of moving its disk: time, cost, latency, what a crash leaves",
}

HELP: Final = """usage: qblock lab EXPERIMENT [OPTIONS]
Experiments with live block operations, on real image files and virtual time.

{experiments}

  -h, --help            show this; after the name of an experiment: what it takes

Exit code: 0 the experiment shows what it should, 1 it does not, 2 the command line is wrong."""


def main(argv: Sequence[str]) -> int:
    """The sub-command; returns the exit code."""
    name, rest = (argv[0] if argv else ""), list(argv[1:])
    if name in ("-h", "--help", "-help"):
        print(help_text())
        return 0
    if name not in EXPERIMENTS:
        what = f"there is no experiment '{name}'" if name else "name an experiment"
        complain(PROGRAM, f"{what}; there are {' and '.join(EXPERIMENTS)}\nTry '{PROGRAM} --help' for more information")
        return 2
    return _program(name)(rest)


def help_text() -> str:
    """What ``--help`` prints."""
    width = max(map(len, EXPERIMENTS))
    return HELP.format(experiments="\n".join(f"  {name:{width}}  {text}" for name, text in EXPERIMENTS.items()))


def _program(name: str) -> Callable[[Sequence[str]], int]:
    """The command line of an experiment."""
    if name == "compare":
        from qblock.tools import lab_compare

        return lab_compare.main
    assert name == "witness"
    from qblock.tools import lab_witness

    return lab_witness.main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
