"""What the comparisons with the real programs share."""

from __future__ import annotations

import pytest

from image_tools import Run
from qblock.tools.img import main


@pytest.fixture
def ours(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs qblock-img in this process."""

    def run(*args: str) -> tuple[int, str]:
        capfd.readouterr()
        code = main(list(args))
        captured = capfd.readouterr()
        if code and "-q" not in args:
            told = captured.err or (captured.out if args[0] in ("check", "compare") else "")
            assert told, "a failure must say why"
        return code, captured.out

    return run
