"""convert while somebody asks how far it is, with a limit of speed, and from storage that has gone bad in places."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qblock.tools.img import main

MiB = 1 << 20
PROGRAM = [sys.executable, "-c", "import sys; from qblock.tools.img import main; sys.exit(main(sys.argv[1:]))"]


@pytest.mark.parametrize("options", [[], ["-q"]])
def test_a_signal_asks_how_far_the_copy_is(options: list[str], tmp_path: Path) -> None:
    """A copy at 4 MiB/s of 6 MiB lasts long enough to be asked; the answer goes to stderr, with -q too."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(6 * MiB))
    words = ["convert", *options, "-r", "4M", "-m", "1", "-f", "raw", "-O", "raw", str(source), str(tmp_path / "target")]
    with subprocess.Popen([*PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # The output is made when the images are open; from the first byte of it on the signal is understood.
        while process.poll() is None and not (tmp_path / "target").exists():
            pass
        while process.poll() is None and (tmp_path / "target").stat().st_blocks == 0:
            pass
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == ""
    assert re.fullmatch(r"    \(\d+\.\d\d/100%\)\n", err)
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def bad_sectors(tmp_path: Path, sectors: list[int]) -> list[str]:
    """Options of an image of 1 MiB, each byte 7, in which reading these sectors fails."""
    (tmp_path / "disk").write_bytes(b"\7" * MiB)
    rule = '[inject-error]\nevent = "none"\nsector = "{}"\niotype = "read"\nerrno = "5"\nonce = "off"\n'
    rules = "".join(rule.format(sector) for sector in sectors)
    (tmp_path / "rules").write_text(rules)
    return ["--image-opts", f"driver=raw,file.driver=blkdebug,file.config={tmp_path / 'rules'},file.image.driver=file,"
            f"file.image.filename={tmp_path / 'disk'}"]  # fmt: skip


@pytest.mark.parametrize("options", [[], ["-c"]])
def test_salvaging_puts_zeroes_where_nothing_can_be_read(
    options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only the bad sectors are lost, and each is told."""
    words = [*bad_sectors(tmp_path, [3, 700]), "-O", "qcow2"]
    target = str(tmp_path / "target")
    assert main(["convert", *options, *words, target]) == 1
    assert main(["convert", *options, "--salvage", *words, target]) == 0
    err = capfd.readouterr().err
    assert [f"byte {sector * 512}:" in err for sector in (3, 700, 4)] == [True, True, False]
    assert main(["convert", "-O", "raw", target, str(tmp_path / "flat")]) == 0
    expected = bytearray(b"\7" * MiB)
    for sector in (3, 700):
        expected[sector * 512 : (sector + 1) * 512] = bytes(512)
    assert (tmp_path / "flat").read_bytes() == expected
    assert main(["convert", "-q", *options, "--salvage", *words, target]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.qemu
def test_salvaging_loses_what_qemu_loses(tmp_path: Path) -> None:
    """The same image comes out."""
    words = [*bad_sectors(tmp_path, [0, 9, 10, 2047]), "-O", "raw"]
    assert main(["convert", "-q", "--salvage", *words, str(tmp_path / "ours")]) == 0
    subprocess.run(["qemu-img", "convert", "-q", "--salvage", *words, tmp_path / "real"], check=True)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "real").read_bytes()
