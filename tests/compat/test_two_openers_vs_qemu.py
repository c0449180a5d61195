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

from .qmp_pair import DAEMONS, Pair, running

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


# ----------------------------------------------------------------------------------------------- programs that go on running

SYSTEM = ("-S", "-display", "none", "-nodefaults", "-qmp", "unix:{socket},server=on,wait=off")
SYSTEMS = Pair(real=("qemu-system-x86_64", *SYSTEM), ours=(sys.executable, "-m", "qblock.tools.system", *SYSTEM))
NODE = "driver=qcow2,node-name=n,file.driver=file,file.filename=disk"
LASTING = [
    # a program, how it holds which image, what the second one wants
    (DAEMONS, ("--blockdev", NODE), "disk"),
    (DAEMONS, ("--blockdev", f"{NODE},read-only=on"), "disk"),
    (DAEMONS, ("--blockdev", f"{NODE},auto-read-only=on,read-only=on,force-share=on"), "disk"),
    (DAEMONS, ("--blockdev", "driver=file,node-name=n,filename=raw"), "raw"),
    (DAEMONS, ("--blockdev", "driver=file,node-name=n,filename=raw,locking=off"), "raw"),
    (SYSTEMS, ("-drive", "if=none,id=d,file=disk"), "disk"),
    (SYSTEMS, ("-drive", "if=virtio,id=d,file=overlay"), "overlay"),
    (SYSTEMS, ("-drive", "if=virtio,id=d,file=overlay"), "base"),
    (SYSTEMS, ("-drive", "if=virtio,file=raw,format=raw,readonly=on"), "raw"),
    (SYSTEMS, ("-drive", "if=none,id=d,file=raw,format=raw", "-device", "virtio-blk,drive=d,share-rw=on"), "raw"),
    (SYSTEMS, ("-drive", "if=none,id=d,file=disk", "-device", "virtio-blk,drive=d,share-rw=on"), "disk"),
    (SYSTEMS, ("-drive", "if=virtio,snapshot=on,file=disk"), "disk"),
]  # fmt: skip
WISHES = [
    "io -c 'read 0 512'", "io -r -c 'read 0 512'", "io -r -U -c 'read 0 512'", "img info", "img info -U", "img check -r all",
    "img convert -O raw {} copy", "img resize -f {fmt} {} 1M", "img snapshot -l", "img bench -c 1 -w",
    "img create -f {fmt} {} 1M",
]  # fmt: skip


@pytest.mark.parametrize(("programs", "options", "wanted"), LASTING)
def test_an_image_of_a_daemon_or_a_machine_is_kept_as_qemu_keeps_it(
    programs: Pair, options: tuple[str, ...], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that nobody uses, a drive without a device, a guest's disk, one that may be shared: all as with the real ones."""
    outcomes = []
    for first, second in ((programs.real, real), (programs.real, ours), (programs.ours, real)):
        folder = tmp_path / str(len(outcomes))
        folder.mkdir()
        monkeypatch.chdir(folder)
        make_images()
        with running((*first, *options), folder) as connection:
            connection.execute({"execute": "qmp_capabilities"})  # QEMU greets before it has opened everything
            outcomes.append({command: second(command, wanted) for command in WISHES})
    expected, ours_second, ours_first = outcomes
    assert ours_second == expected
    assert ours_first == expected
