"""What the tests of the programs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qblock.tools.img import main


@pytest.fixture
def img(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs qblock-img in an empty directory: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(list(args))
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run
