"""The image tools of both sides: the real ones as programs, ours in this process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qblock.tools.img import main as our_img
from qblock.tools.io import main as our_io

Run = Callable[..., tuple[int, str]]
"""Runs qblock-img: its exit code, and what it prints on standard output. The fixture `ours` is one."""


def qemu(*args: str) -> tuple[int, str]:
    """Exit code and standard output of the real qemu-img."""
    result = subprocess.run(["qemu-img", *args], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    return result.returncode, result.stdout.decode()


def qemu_io(image: str, *commands: str, fmt: str = "qcow2") -> None:
    """Run commands of the real qemu-io, which must succeed."""
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", fmt, *words, image], check=True, stdout=subprocess.DEVNULL)


class TwoDirectories:
    """Two directories in which the same commands run: ``real`` with the real programs, ``ours`` with those of qblock."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd
        self.real, self.ours = tmp_path / "real", tmp_path / "ours"
        self.real.mkdir()
        self.ours.mkdir()

    def theirs(self, where: Path, *words: str) -> tuple[int, str]:
        """Run a real program."""
        done = subprocess.run(words, cwd=where, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    def own(self, where: Path, *words: str) -> tuple[int, str]:
        """Run ours of that name."""
        self.monkeypatch.chdir(where)
        self.capfd.readouterr()
        code = {"qemu-img": our_img, "qemu-io": our_io}[words[0]](list(words[1:]))
        return code, self.capfd.readouterr().out

    def both(self, *words: str) -> tuple[str, str]:
        """Run on both sides; the exit codes agree. Gives what was printed."""
        code, text = self.theirs(self.real, *words)
        own, ours = self.own(self.ours, *words)
        assert own == code, (words, text, ours)
        return text, ours

    def content(self, image: str) -> bytes:
        """The disk of ``image``, which is the same in both directories and for both programs."""
        contents = []
        for where in (self.real, self.ours):
            for run in (self.theirs, self.own):
                code, _ = run(where, "qemu-img", "convert", "-O", "raw", image, "content.out")
                assert code == 0
                contents.append((where / "content.out").read_bytes())
        assert len(set(contents)) == 1
        return contents[0]
