"""qblock-img by itself: what it prints, how it ends, what it leaves behind. (tests/compat holds it against the real one.)"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qblock.tools.img import SUBCOMMANDS
from qblock.tools.io import main as io_main

Run = Callable[..., tuple[int, str, str]]


def write(image: str, *commands: str) -> None:
    """Run qblock-io commands on an image."""
    assert io_main([word for command in commands for word in ("-c", command)] + [image]) == 0


def test_create_info_check_map_and_compare_tell_one_story(img: Run) -> None:
    """The life of an overlay, seen through each sub-command."""
    assert img("create", "-f", "qcow2", "base", "4M")[0] == 0
    write("base", "write -q -P 1 0 1M")
    code, out, _ = img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top")
    assert (code, out.split()[:2]) == (0, ["Formatting", "'top',"])
    write("top", "write -q -P 2 512k 64k")
    info = json.loads(img("info", "--output=json", "top")[1])
    assert (info["virtual-size"], info["backing-filename"], info["format"]) == (4 << 20, "base", "qcow2")
    areas = json.loads(img("map", "--output=json", "top")[1])
    assert [(area["length"] >> 10, area["depth"], area["data"]) for area in areas] == [
        (512, 1, True), (64, 0, True), (448, 1, True), (3072, 1, False),
    ]  # fmt: skip
    assert img("check", "top")[0] == 0
    assert img("convert", "-O", "raw", "top", "flat")[0] == 0
    assert img("compare", "top", "flat")[:2] == (0, "Images are identical.\n")
    assert img("compare", "top", "base")[:2] == (1, "Content mismatch at offset 524288!\n")


@pytest.mark.parametrize(
    "options",
    [("-O", "raw", "-c"), ("-C", "-c", "-O", "qcow2"), ("-C", "--salvage"), ("-c", "-O", "qcow2", "-o", "preallocation=full")],
)
def test_convert_refuses_what_it_cannot_do_and_leaves_nothing(options: tuple[str, ...], img: Run) -> None:
    """An option that was accepted and ignored would be a lie."""
    img("create", "-q", "source", "1M")
    code, _, err = img("convert", *options, "source", "target")
    assert code == 1
    assert "-c" in err or "-C" in err
    assert not Path("target").exists()


def test_hints_for_the_file_system_are_taken_with_every_format(img: Run) -> None:
    """Most file systems do not know them, which is told and does no harm."""
    code, out, _ = img("create", "-f", "qcow2", "-o", "extent_size_hint=1M,nocow=on", "new", "1M")
    assert code == 0
    assert out.endswith(" nocow=on extent_size_hint=1048576\n")
    assert img("check", "new")[0] == 0


def test_help_and_version(img: Run) -> None:
    """Both go to standard output and succeed; every sub-command is in the help."""
    code, out, err = img("--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {name} " in out for name in SUBCOMMANDS)
    assert "7.2" in img("--version")[1]


def test_a_failed_convert_removes_the_file_that_it_made(img: Run) -> None:
    """Half a copy looks like a whole one; what was there before is not removed."""
    img("create", "-q", "-f", "qcow2", "base", "4M")
    write("base", "write -q 0 4M")
    broken = bytearray(Path("base").read_bytes())
    Path("broken").write_bytes(broken[: len(broken) // 2 + 100])
    table = int.from_bytes(broken[40:48], "big")
    broken[table : table + 8] = (0x8000_0000_0000_0000 | (1 << 40)).to_bytes(8, "big")
    Path("broken").write_bytes(broken)
    code, _, err = img("convert", "-O", "raw", "broken", "copy")
    assert code == 1
    assert err.startswith("qblock-img: ")
    assert not Path("copy").exists()
    Path("copy").write_bytes(b"precious")
    assert img("convert", "-n", "-O", "raw", "base", "copy")[0] == 1
    assert Path("copy").read_bytes() == b"precious"


def test_convert_without_zero_detection_writes_everything(img: Run) -> None:
    """-S 0 is for those who want no holes."""
    img("create", "-q", "source", "3M")
    assert img("convert", "-S", "0", "-O", "raw", "source", "full")[0] == 0
    assert os.stat("full").st_blocks * 512 >= 3 << 20
    assert img("convert", "-O", "raw", "source", "sparse")[0] == 0
    assert os.stat("sparse").st_blocks * 512 < 1 << 20


def test_progress_ends_at_hundred_percent_on_a_line_of_its_own(img: Run) -> None:
    """-p shows how far it is; -q silences it."""
    img("create", "-q", "source", "10M")
    Path("source").write_bytes(random.Random(1).randbytes(10 << 20))
    out = img("convert", "-p", "-O", "qcow2", "source", "target")[1]
    assert out.startswith("    (0.00/100%)\r")
    assert out.endswith("    (100.00/100%)\r\n")
    assert img("convert", "-p", "-q", "-O", "qcow2", "source", "target")[1] == ""


@pytest.mark.parametrize("workers", ["1", "2", "16"])
@pytest.mark.parametrize("order", [(), ("-W",)])
def test_any_number_of_workers_makes_the_same_copy(workers: str, order: tuple[str, ...], img: Run) -> None:
    """Order and parallelism are about speed, never about content."""
    rng = random.Random(3)
    content = bytearray(9_000_000)
    for _ in range(200):
        start = rng.randrange(len(content) - 70000)
        content[start : start + rng.choice([1, 4096, 70000])] = b"\x55"
    Path("source").write_bytes(content)
    assert img("convert", "-f", "raw", "-m", workers, *order, "-O", "qcow2", "source", "target")[0] == 0
    assert img("compare", "-f", "raw", "source", "target")[0] == 0
    assert img("check", "target")[0] == 0


def test_speed_limit_is_taken(img: Run) -> None:
    """-r spreads the copy; with a high limit it only must not get in the way."""
    img("create", "-q", "source", "2M")
    Path("source").write_bytes(b"x" * (2 << 20))
    assert img("convert", "-r", "1G", "-O", "raw", "source", "target")[0] == 0
    assert img("compare", "source", "target")[0] == 0


def test_an_image_cannot_be_converted_onto_itself(img: Run) -> None:
    """The locks notice; the source stays what it was."""
    img("create", "-q", "-f", "qcow2", "a", "1M")
    write("a", "write -q -P 7 0 1M")
    assert img("convert", "-f", "qcow2", "-O", "qcow2", "a", "a")[0] == 1
    assert io_main(["-r", "-c", "read -q -P 7 0 1M", "a"]) == 0


def test_the_installed_program_ends_quietly_when_its_reader_has_gone(tmp_path: Path) -> None:
    """`qblock-img map ... | head -1` prints no traceback."""
    image = tmp_path / "a"
    with image.open("wb") as file:
        for block in range(3000):
            file.seek(block * 8192)
            file.write(b"x" * 4096)
    program = [sys.executable, "-m", "qblock.tools.img", "map", "--output=json", "-f", "raw", str(image)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_memory_stays_bounded_whatever_the_size(tmp_path: Path) -> None:
    """A 200 MiB copy with 16 workers stays far below 150 MiB of memory."""
    block = random.Random(1).randbytes(1 << 20)
    with (tmp_path / "source").open("wb") as file:
        for _ in range(200):
            file.write(block)
    script = (
        "import sys; from qblock.tools.img import main; code = main(sys.argv[1:]);"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))); sys.exit(code)"
    )
    words = ["convert", "-f", "raw", "-W", "-m", "16", "-O", "qcow2", str(tmp_path / "source"), str(tmp_path / "target")]
    result = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 150 << 10


def test_info_loads_no_more_than_it_needs() -> None:
    """Start-up time is import time: no jobs, no monitor, no prompt, no compression for a look at an image."""
    script = (
        "import sys; from qblock.tools.img import main; main(['info', sys.argv[1]]);"
        "print([name for name in sys.modules if name.split('.')[0] in ('prompt_toolkit', 'zstandard', 'argparse')"
        " or name.startswith(('qblock.jobs', 'qblock.monitor', 'qblock.system', 'qblock.testing'))])"
    )
    result = subprocess.run([sys.executable, "-c", script, __file__], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
