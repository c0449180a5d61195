"""qblock-io beside the real qemu-io: same commands, same output apart from times, same exit codes, same bytes on disk."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qblock.tools.io import main

Both = Callable[..., None]

RATES = re.compile(r"\(.*/sec and .* ops/sec\)|(?<=,)[0-9:.]+,[0-9.]+,[0-9.]+$", re.MULTILINE)
TIMES = re.compile(r"\d\d\.\d\d sec")


def without_times(text: str) -> str:
    """Output with everything that depends on how long a request took replaced."""
    return TIMES.sub("<time>", RATES.sub("<rates>", text))


def qemu(*args: str, script: str | None = None) -> tuple[int, str]:
    """Exit code and standard output of the real qemu-io."""
    result = subprocess.run(["qemu-io", *args], input=script or "", capture_output=True, text=True, check=False)
    return result.returncode, without_times(result.stdout)


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Both:
    """Runs the same commands with both programs on equal images, and compares output, exit codes and content."""
    monkeypatch.chdir(tmp_path)

    def create(name: str, fmt: str) -> None:
        Path(name).unlink(missing_ok=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", fmt, name, "8M"], check=True)

    def run(*commands: str, fmt: str = "qcow2", options: tuple[str, ...] = ()) -> None:
        words = [word for command in commands for word in ("-c", command)]
        create("image", fmt)
        expected = qemu("-f", fmt, *options, *words, "image")
        Path("image").rename("theirs")
        create("image", fmt)
        capfd.readouterr()
        code = main(["-f", fmt, *options, *words, "image"])
        assert (code, without_times(capfd.readouterr().out)) == expected
        compared = subprocess.run(
            ["qemu-img", "compare", "-f", fmt, "-F", fmt, "image", "theirs"], capture_output=True, text=True, check=False
        )
        assert compared.returncode == 0, compared.stdout

    return run


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "commands",
    [
        ("write 0 64k", "read -P 0xcd 0 64k", "read -P 1 0 64k"),
        ("write -P 7 1000 3000", "read -v 990 40", "read -P 7 1000 3000"),
        ("write 0 1536", "read -P 0xcd -s 512 -l 512 0 1k", "read -P 1 -s 512 0 4k", "read -P 1 -l 512 0 4k"),
        ("write -P 010 0 5", "read -v 0 5"),
        ("writev 64k 4k 8k 1k", "readv -P 0xcd 64k 4k 8k 1k", "readv -P 1 64k 4k 8k 1k", "readv -v 64k 16 16"),
        ("write 0 1M", "write -z 256k 256k", "read -P 0 256k 256k", "write -z -u 512k 64k", "read -P 0 512k 64k"),
        ("write -q 0 4k", "read -q 0 4k", "write -C 0 4k", "read -C 0 4k", "write -f 0 4k"),
        ("aio_write 0 4k", "aio_flush", "aio_read -P 0xcd 0 4k", "aio_flush", "aio_read -v 0 16", "aio_flush"),
        ("aio_read 99M 4k", "aio_flush"),
        ("discard 0 64k", "discard -q 0 64k", "discard -C 64k 64k"),
        ("flush", "length", "sleep 1"),
        ("read 0 0", "write 0 0"),
        ("read 7M 4M", "write 7M 4M", "discard 7M 2M", "read 99M 1"),
        ("write -s source 100 1000", "read -v 100 64"),
        ("truncate 12M", "length", "truncate -m off 16M", "length", "read -P 0 8M 8M"),
        ("length", "quit", "length"),
        ("q", "length"),
        ("r 0 1", "w 0 1", "l", "f"),
        ("write 1t 1", "read 0 0x10", "read 1k 1b"),
    ],
    ids=" / ".join,
)
def test_commands_do_and_print_the_same(commands: tuple[str, ...], fmt: str, both: Both) -> None:
    """Scripts written for qemu-io work."""
    Path("source").write_bytes(b"some bytes to repeat")
    both(*commands, fmt=fmt)


@pytest.mark.parametrize(
    "command",
    [
        "read", "read 0", "read -x 0 1", "read 0 1 2", "write -u 0 64k", "write -n 0 1k", "write -P 1 -z 0 1k",
        "write -P 300 0 512", "write -P a 0 512", "read -s 512 0 4k", "read -P 1 -s 4k -l 512 0 4k", "read 0 3G",
        "write -s missing 0 512", "nonsense", "length x", "flush 1", "alloc", "alloc 0 1 2", "sleep", "sleep x", "sleep -1",
        "truncate", "truncate x", "truncate -m nonsense 1M", "aio_read 0", "aio_write -z 0 4k 4k", "aio_flush 1", "map 1",
        "help nonsense", "read -1 5", "read a 5", "read 0 a", "discard 0", "discard -x 0 1", "write -z 0 4G", "open",
    ],
)  # fmt: skip
def test_mistakes_end_with_status_1(command: str, both: Both, capfd: pytest.CaptureFixture[str]) -> None:
    """And nothing is written, and something is said."""
    both("write -q 0 512")
    capfd.readouterr()
    assert main(["-f", "qcow2", "-c", command, "image"]) == qemu("-f", "qcow2", "-c", command, "theirs")[0] == 1
    captured = capfd.readouterr()
    assert captured.out or captured.err


@pytest.mark.parametrize(
    "commands",
    [
        ("write -q 0 128k", "map", "alloc 0", "alloc 0 1M", "alloc 64k 256k", "alloc 7M 4M", "alloc 10M", "alloc 100 100"),
        ("map",),
        ("write -q 3M 100k", "write -q -z 1M 1M", "map"),
        ("info",),
    ],
    ids=" / ".join,
)
def test_the_map_of_a_qcow2_image_is_the_same(commands: tuple[str, ...], both: Both) -> None:
    """Allocation in units of clusters, layouts to the byte."""
    both(*commands)


def test_options_of_the_program(both: Both) -> None:
    """Cache modes, discard modes and read-only."""
    for options in (("-r",), ("-n",), ("-t", "writethrough"), ("-t", "unsafe"), ("-d", "ignore"), ("-d", "unmap")):
        both("length", "read 0 4k", options=options)
    both("write 0 64k", "discard 0 64k", "read -P 0 0 64k", options=("-d", "unmap"))
    both("write 0 64k", options=("-t", "directsync"))
    both("write 0 64k", options=("-r",))


def test_program_mistakes(both: Both) -> None:
    """Same exit codes for wrong command lines and images that cannot be opened."""
    both("length")
    for args in (
        ["-t", "nonsense", "-c", "length", "image"],
        ["-d", "nonsense", "-c", "length", "image"],
        ["-x"],
        ["-c", "length"],
        ["-c", "length", "missing"],
        ["-f", "nonsense", "-c", "length", "image"],
        ["-c", "length", "image", "image"],
        ["-U", "-c", "length", "image"],
        ["-r", "-U", "-c", "length", "image"],
        ["--image-opts", "-c", "length", "driver=qcow2,file.filename=image"],
        ["-C", "-c", "length", "image"],
    ):
        assert main(args) == qemu(*args)[0], args


def test_scripts_on_standard_input(both: Both, tmp_path: Path) -> None:
    """Prompts and all: what is piped in gives the same transcript."""
    both("length")
    script = "length\nwrite -P 5 0 4k\nread -P 5 0 4k\n\nnonsense\nread -P 6 0 512\nq\nlength\n"
    ours = subprocess.run(
        [sys.executable, "-m", "qblock.tools.io", "image"], input=script, capture_output=True, text=True, check=False
    )
    assert (ours.returncode, without_times(ours.stdout)) == qemu("theirs", script=script)
    short = subprocess.run(
        [sys.executable, "-m", "qblock.tools.io", "image"], input="length", capture_output=True, text=True, check=False
    )
    assert (short.returncode, short.stdout) == qemu("theirs", script="length")


def test_copy_on_read_fills_the_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-C: what was read once is in the image, and the chain is as the real program sees it."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "base", "1M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -q -P 4 0 1M", "base"], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"], check=True)
    assert main(["-C", "-c", "read -q -P 4 64k 128k", "top"]) == 0
    assert qemu("-c", "alloc 0 1M", "top") == (0, "131072/1048576 bytes allocated at offset 0 bytes\n")
