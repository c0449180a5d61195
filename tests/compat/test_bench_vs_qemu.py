"""``qblock-img bench`` beside the real one: the same lines (time apart), exit codes and places written."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from qblock.tools.img import main
from qblock.units import MiB

LINES = (
    "-c 100", "-c 100 -w --pattern 5 -o 1M -S 64k", "-c 100 -q", "-c 100 -w --flush-interval 10", "-c 100 --flush-interval 100",
    "-c 100 --no-drain", "-c 100 -w --no-drain", "-c 100 -w --flush-interval 64", "-c 100 -w -d 8 --flush-interval 20 --no-drain",
    "-c 100 --pattern 10", "-c 100 -w --pattern 256", "-c 100 -w --pattern x", "-c 0", "-c -1", "-c x", "-c 3000000000", "-d x",
    "-c 10 -s 0", "-c 10 -s 3G", "-c 10 -s 1000", "-c 10 -S 0", "-c 10 -o 3M -s 1M", "-c 10 -o 4M -s 1M", "-c 10 -o 5M",
    "-c 10 -s 5M", "-c 7 -w -d 1 -S 3M", "-c 7 -w -S 1500k", "-c 10 -o x", "-c 10 -i threads", "-c 10 -i foo", "-c 10 -t foo",
    "-c 10 -n", "-c 10 -i native", "-c 10 -n -t none", "-c 10 -w -i native -t directsync", "-c 10 -n -i threads",
    "-c 10 -i io_uring", "-c 10 -w -i io_uring -t none", "-c 10 -n -i io_uring", "-c 10 -n -i foo",
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


@pytest.mark.parametrize(
    "line",
    [
        "-i native -f file image", "-i native -t none -f file image", "-n -t none -f file image", "-i io_uring -f file image",
        "-n -f raw json:{'driver':'null-co','size':4096}", "-n --image-opts driver=null-aio,size=1M",
        "-i io_uring --image-opts driver=null-co,size=1M", "-i io_uring --image-opts driver=file,filename=image,aio=threads",
        "--image-opts driver=file,filename=image,aio=native", "-i native --image-opts file.filename=image,file.aio=threads",
        "--image-opts driver=raw,file.filename=image,file.aio=io_uring,file.aio-max-batch=3",
        "--image-opts driver=raw,file.filename=image,file.aio-max-batch=-3",
        "-n --image-opts driver=raw,file.driver=blkdebug,file.image.driver=null-co,file.image.size=1M",
    ],
)  # fmt: skip
def test_bench_takes_aio_modes_where_qemu_does(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The mode is for whatever files there are below; options of a file overrule it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image").write_bytes(bytes(MiB))
    words = ["bench", "-c", "10", *line.split()]
    code = main(words)
    ours = re.sub(r"\d+\.\d{3} seconds", "some seconds", capfd.readouterr().out)
    real = subprocess.run(["qemu-img", *words], check=False, capture_output=True, text=True)
    assert (real.returncode, re.sub(r"\d+\.\d{3} seconds", "some seconds", real.stdout)) == (code, ours)


def test_bench_refuses_to_send_nothing_at_a_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It would never end."""
    (tmp_path / "image").write_bytes(bytes(4096))
    assert main(["bench", "-f", "raw", "-d", "0", str(tmp_path / "image")]) == 1
    assert "Invalid queue depth" in capfd.readouterr().err
