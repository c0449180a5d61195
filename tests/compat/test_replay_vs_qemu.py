"""One script, two servers; and what the real qemu-img says of the demo's result."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qblock.__main__ import main

DOCUMENT = Path(__file__).parents[2] / "docs" / "replay.md"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script that docs/replay.md shows."""
    found = re.search(r"^```qmp\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    path = tmp_path / "mirror.qmp"
    path.write_text(found[1])
    return path


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Path]:
    """The socket of a real qemu-storage-daemon."""
    path = tmp_path / "qmp"
    chardev = f"socket,id=c,path={path},server=on,wait=off"
    with subprocess.Popen(["qemu-storage-daemon", "--chardev", chardev, "--monitor", "c"]) as process:
        try:
            while not _listening(path):
                assert process.poll() is None
                time.sleep(0.01)
            yield path
        finally:
            process.terminate()


def _listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def outcome(text: str) -> list[str]:
    """A transcript without times, without the content of replies, and without events (when they come is a matter of luck)."""
    lines = [line.partition("] ")[2] for line in text.splitlines()]
    return [re.sub(r"^<- .*?\"(return|error|QMP)\".*", r"<- \1", line) for line in lines if '"event"' not in line[:120]]


def test_the_script_in_the_document_runs_on_the_real_daemon_too(
    script: Path, daemon: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every expectation is met, every event awaited comes: the document may say so."""
    assert main(["replay", "--socket", str(daemon), str(script)]) == 0
    theirs = outcome(capsys.readouterr().out)
    assert main(["replay", str(script)]) == 0
    ours = outcome(capsys.readouterr().out)
    assert ours == theirs


def test_the_real_qemu_img_confirms_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """It checks clean and equals what the guest has written, also by the program that wrote the format."""
    assert main(["demo", "--clock", "virtual", "--size", "4M"]) == 0
    text = capsys.readouterr().out
    assert "qemu-img check finds nothing either" in text
    assert "Images are identical." in text
    assert "all 8 proofs hold" in text
