"""``qblock-img bench`` beside the real one: the same lines (time apart), exit codes and places written."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from qblock.tools.img import main

LINES = (
    "-c 100", "-c 100 -w --pattern 5 -o 1M -S 64k", "-c 100 -q", "-c 100 -w --flush-interval 10", "-c 100 --flush-interval 100",
    "-c 100 --no-drain", "-c 100 -w --no-drain", "-c 100 -w --flush-interval 64", "-c 100 -w -d 8 --flush-interval 20 --no-drain",
    "-c 100 --pattern 10", "-c 100 -w --pattern 256", "-c 100 -w --pattern x", "-c 0", "-c -1", "-c x", "-c 3000000000", "-d x",
    "-c 10 -s 0", "-c 10 -s 3G", "-c 10 -s 1000", "-c 10 -S 0", "-c 10 -o 3M -s 1M", "-c 10 -o 4M -s 1M", "-c 10 -o 5M",
    "-c 10 -s 5M", "-c 7 -w -d 1 -S 3M", "-c 7 -w -S 1500k", "-c 10 -o x", "-c 10 -i threads", "-c 10 -i foo", "-c 10 -t foo",
    "-c 10 -n", "-c 10 -i native", "-c 10 -n -t none", "-c 10 -w -i native -t directsync", "-c 10 -n -i threads",
    "-c 10 -t none", "-c 10 -w -t writethrough", "-c 10 -U", "-c 10 -U -w", "-w --flush-interval x", "-w --flush-interval -3",
    "-c 10 --object secret,id=x,data=y", "-p", "-c 10 -S 3G", "-c 3 extra", "-c 2 -w -d 1 -o 3968k -S 200k -s 64k",
    "-c 1 -w -d 1 -o 4032k -s 128k",
)  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_bench_says_and_does_what_qemu_does(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Scripts parse the lines; where writes go can be seen in the image."""
    monkeypatch.chdir(tmp_path)
    results = []
    for side in ("real", "ours"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "image", "4M"], check=True)
        words = ["bench", "-f", "qcow2", *line.split(), "image"]
        capfd.readouterr()
        code = main(words) if side == "ours" else subprocess.run(["qemu-img", *words], check=False).returncode
        captured = capfd.readouterr()
        assert not code or captured.err, "a failure must say why"
        subprocess.run(["qemu-img", "convert", "-O", "raw", "image", "content"], check=True)
        out = re.sub(r"\d+\.\d{3} seconds", "some seconds", captured.out)
        results.append((code, out, (tmp_path / "content").read_bytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("option", ["-i io_uring", "-t none -i io_uring", "-d 0"])
def test_what_bench_cannot_do_is_refused_by_name(
    option: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A number that was measured with something else than what was asked for would mislead."""
    (tmp_path / "image").write_bytes(bytes(4096))
    assert main(["bench", "-f", "raw", *option.split(), str(tmp_path / "image")]) == 1
    assert re.search("not supported|Invalid queue depth", capfd.readouterr().err)
