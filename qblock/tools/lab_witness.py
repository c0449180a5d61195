"""``qblock lab witness``: the command line around `qblock.lab.witness`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qblock.tools.arguments import UsageError
from qblock.tools.command_line import HELP_FLAGS, parse_command_line
from qblock.tools.console import complain, ending_quietly

PROGRAM: Final = "qblock lab witness"

HELP: Final = """usage: qblock lab witness [OPTIONS]
  -h, --help            show this"""


def main(argv: Sequence[str]) -> int:
    """The sub-command; returns the exit code."""
    return ending_quietly(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    try:
        parse_command_line(argv, valued=frozenset(), flags=HELP_FLAGS)
        print(HELP)
    except UsageError as error:
        complain(PROGRAM, f"{error}\nTry '{PROGRAM} --help' for more information")
        return 2
    return 0
