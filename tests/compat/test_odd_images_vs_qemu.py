"""Devices, files of odd sizes and old versions as images: the same exit codes and output as the real programs."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qblock.tools.img import main as img
from qblock.tools.io import main as io
from qblock.units import MiB

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed"),
]
Both = Callable[..., None]


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Both:
    """Runs one command line with both programs, in two directories that ``prepare`` has filled alike."""

    def run(program: str, *words: str, prepare: Callable[[Path], object] = lambda place: None) -> None:
        results = []
        for side in ("real", "ours"):
            place = tmp_path / side
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            prepare(place)
            monkeypatch.chdir(place)
            capfd.readouterr()
            if side == "real":
                code = subprocess.run([f"qemu-{program}", *words], check=False, timeout=60).returncode
            else:
                code = {"img": img, "io": io}[program](list(words))
            results.append((code, re.sub(r"; .*ops/sec\)", "", capfd.readouterr().out)))
        assert results[0] == results[1], words

    return run


def odd(place: Path) -> None:
    (place / "odd").write_bytes(bytes(1000))


def old(place: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", place / "old", "1M"], check=True)


def new(place: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", place / "new", "1M"], check=True)


@pytest.mark.parametrize(
    "line",
    [
        "img info /dev/null", "img info -f raw --output=json /dev/null",
        "img info -f raw /dev/zero",
        "img check -f raw /dev/null", "img map -f raw /dev/null", "img map --output=json /dev/null",
        "img measure -O qcow2 /dev/null",
        "img convert -O qcow2 /dev/null copy", "img compare -f raw -F raw /dev/null /dev/null", "img dd if=/dev/null of=x bs=1M",
        "img create -f raw /dev/null 1M", "img create -f raw /dev/null 0", "img resize -f raw /dev/null 1M",
        "img info -f raw --image-opts driver=file,filename=/dev/null,cache.direct=on", "io -f raw -c length /dev/null",
        "io -f raw -r -n -c length /dev/null",
    ],
)  # fmt: skip
def test_a_character_device_is_an_empty_image(line: str, both: Both) -> None:
    """Scripts give /dev/null where an empty source is wanted."""
    both(*line.split())


@pytest.mark.parametrize("line", ["check -r all -T none odd", "check -f raw -r leaks -T none odd", "check -T none odd"])
def test_a_file_of_an_odd_size_is_opened_to_be_checked(line: str, both: Both) -> None:
    """Past the page cache it cannot be written without growing, but that is no reason to fail otherwise than as raw."""
    both("img", *line.split(), prepare=odd)


@pytest.mark.parametrize("line", ["--bitmaps -O qcow2 old x", "--bitmaps -f qcow2 -O raw old x", "-O qcow2 old x"])
def test_bitmaps_are_not_asked_of_images_that_cannot_have_them(line: str, both: Both) -> None:
    """Even though there is none to copy."""
    both("img", "convert", *line.split(), prepare=old)


def test_bitmaps_are_not_copied_to_an_image_that_cannot_have_them(both: Both) -> None:
    """Version 2 has none."""
    both("img", "convert", "--bitmaps", "-O", "qcow2", "-o", "compat=0.10", "new", "x", prepare=new)


def test_bitmaps_are_lost_with_the_version_that_has_them(both: Both, tmp_path: Path) -> None:
    """What was asked for is done; unlike the real program ours says what is lost, and leaves no leaks."""

    def prepare(place: Path) -> None:
        new(place)
        for name in ("a", "b"):
            subprocess.run(["qemu-img", "bitmap", "--add", place / "new", name], check=True)

    both("img", "amend", "-o", "compat=0.10", "new", prepare=prepare)
    both("img", "info", "-f", "raw", "new", prepare=new)
    new(tmp_path)
    subprocess.run(["qemu-img", "bitmap", "--add", tmp_path / "new", "a"], check=True)
    assert img(["amend", "-o", "compat=0.10", str(tmp_path / "new")]) == 0
    checked = subprocess.run(["qemu-img", "check", tmp_path / "new"], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A block device of 4 MiB that ``disk`` is behind."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(range(256)) * (4 * MiB // 256))
    losetup = shutil.which("losetup")
    if losetup is None:
        pytest.skip("there is no losetup")
    made = subprocess.run([losetup, "--find", "--show", disk], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"there are no loop devices: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device
    subprocess.run([losetup, "--detach", device], check=True)


def test_a_block_device_keeps_its_size(loop_device: str, both: Both) -> None:
    """Making an image on it overwrites what told its format, and what does not fit is refused."""
    for line in (
        "img create -f raw {} 1M", "img info {}", "img create -f raw {} 8M", "img create -f raw -o preallocation=full {} 1M",
        "img create -f qcow2 {} 64M", "img info {}", "img create -f qcow2 -o preallocation=metadata {} 1M", "img check {}",
        "img resize -f raw {} 8M", "img resize -f raw {} 4M", "img convert -f raw -O raw {} copy",
    ):  # fmt: skip
        both(*line.format(loop_device).split())
    for command in ("write -P 3 0 1M", "read -P 3 0 1M", "write -z 64k 64k", "discard 0 64k", "length", "truncate 2M", "map"):
        both("io", "-f", "raw", "-c", command, loop_device)
