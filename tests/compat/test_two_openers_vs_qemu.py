"""Two programs and one image: whoever holds it, and whatever the second one wants, it is refused or let in as QEMU would."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qblock.tools import img
from qblock.tools import io as io_tool

REAL_IO = ("qemu-io",)
OUR_IO = (sys.executable, "-m", "qblock.tools.io")
HOLDERS = [
    # how the first one opens which image
    ("raw", ()), ("raw", ("-r",)), ("raw", ("-r", "-U")), ("disk", ()), ("disk", ("-r",)), ("disk", ("-r", "-U")),
    ("overlay", ()), ("overlay", ("-r",)), ("split", ()),
]  # fmt: skip
SECOND: dict[str, list[str]] = {
    "raw": ["raw"],
    "disk": ["disk"],
    "overlay": ["overlay", "base", "sister"],
    "split": ["split", "split.data"],
}
"""What the second one wants, if the first one has this: the image itself, what lies below it, or another overlay of that."""
COMMANDS = [
    "io -c 'read 0 512'", "io -r -c 'read 0 512'", "io -r -U -c 'read 0 512'", "io -U -c 'read 0 512'",
    "img info", "img info -U", "img map", "img check -U", "img check -r all", "img compare -U {} {}",
    "img convert -O raw {} copy", "img convert -U -O raw {} copy", "img convert -n -O {fmt} source {}",
    "img resize -f {fmt} {} 1M", "img snapshot -l", "img snapshot -a none", "img amend -o lazy_refcounts=off",
    "img create -f {fmt} {} 1M", "img commit", "img bench -c 1 -w", "img dd if={} of=copy", "img dd if=source of={}",
    "img rebase -u -b base -F qcow2",
]  # fmt: skip
PAIRS = [(held, mode, wanted) for held, mode in HOLDERS for wanted in SECOND[held]]


def make_images() -> None:
    """All images, in the current directory."""

    def create(*words: str) -> None:
        subprocess.run(["qemu-img", "create", "-q", "-f", *words], check=True)

    create("raw", "raw", "1M")
    create("raw", "source", "1M")
    create("qcow2", "disk", "1M")
    create("qcow2", "base", "1M")
    create("qcow2", "-b", "base", "-F", "qcow2", "overlay")
    create("qcow2", "-b", "base", "-F", "qcow2", "sister")
    create("qcow2", "-o", "data_file=split.data", "split", "1M")


@contextlib.contextmanager
def held(program: tuple[str, ...], image: str, mode: tuple[str, ...]) -> Iterator[None]:
    """Somebody has an image open."""
    words = [*program, *mode, "-f", "raw" if image == "raw" else "qcow2", image]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write("read 0 512\n")
        holder.stdin.flush()
        assert "read 512/512" in holder.stdout.readline()
        yield
        holder.communicate("quit\n")


def words_of(command: str, wanted: str) -> tuple[str, list[str]]:
    """The program and the words of a command for an image."""
    fmt = "raw" if wanted in ("raw", "split.data") else "qcow2"
    filled = command.replace("{fmt}", fmt)
    filled = filled.replace("{}", wanted) if "{}" in command else f"{filled} {wanted}"
    program, *words = [word for part in filled.split("'")[::2] for word in part.split()]
    if "'" in filled:
        words.insert(words.index("-c") + 1, filled.split("'")[1])
    if program == "io":
        words = ["-f", fmt, *words]
    return program, words


def real(command: str, wanted: str) -> int:
    """The exit code of a real program."""
    program, words = words_of(command, wanted)
    return subprocess.run([f"qemu-{program}", *words], capture_output=True, check=False, stdin=subprocess.DEVNULL).returncode


def ours(command: str, wanted: str) -> int:
    """The exit code of one of ours."""
    program, words = words_of(command, wanted)
    main = io_tool.main if program == "io" else img.main
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(words)


@pytest.mark.parametrize(("image", "mode", "wanted"), PAIRS)
def test_the_second_one_fares_as_with_qemu(
    image: str, mode: tuple[str, ...], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the first or the second one is ours: every command ends as it does among the real programs."""
    outcomes = []
    for first, second in ((REAL_IO, real), (REAL_IO, ours), (OUR_IO, real)):
        folder = tmp_path / str(len(outcomes))
        folder.mkdir()
        monkeypatch.chdir(folder)
        make_images()
        with held(first, image, mode):
            outcomes.append({command: second(command, wanted) for command in COMMANDS})
    expected, ours_second, ours_first = outcomes
    assert ours_second == expected
    assert ours_first == expected
