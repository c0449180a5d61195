"""`qblock-img resize` beside the real one: the same random images and command lines on both, each readable by the other."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from image_tools import Run, qemu, qemu_io


def present(image: str, fmt: str) -> list[tuple[int, int, int, bool]]:
    """Start, end, layer and presence of everything in the image, as the real program sees it."""
    code, text = qemu("map", "--output=json", "-f", fmt, image)
    assert code == 0
    runs: list[tuple[int, int, int, bool]] = []
    for extent in json.loads(text):
        start, kind = extent["start"], (extent["depth"], extent["present"])
        if runs and runs[-1][2:] == kind:
            start = runs.pop()[0]
        runs.append((start, extent["start"] + extent["length"], *kind))
    return runs


def size_of(image: str, fmt: str) -> Any:
    return json.loads(qemu("info", "-f", fmt, "--output=json", image)[1])["virtual-size"]


def content(image: str, fmt: str) -> bytes:
    """All that the disk shows."""
    assert qemu("convert", "-f", fmt, "-O", "raw", image, "content")[0] == 0
    return Path("content").read_bytes()


def make_pair(rng: random.Random, fmt: str, size: int) -> int:
    """The images ``theirs`` and ``ours``, the same to the byte, perhaps on a backing file that may be longer or shorter.

    Returns their cluster size.
    """
    options, cluster = [], 512
    if fmt == "qcow2":
        cluster = rng.choice([512, 4096, 65536])
        version = rng.choice(["0.10", "1.1", "1.1"])
        options = ["-o", f"cluster_size={cluster},compat={version}"]
        if version == "1.1" and rng.random() < 0.6:  # over a longer file 7.2 cannot let version 2 grow
            below = rng.choice([size // 2, size, 2 * size]) & ~511
            assert qemu("create", "-q", "-f", "qcow2", "base", str(below))[0] == 0
            qemu_io("base", f"write -q -P 9 0 {below}")
            options += ["-b", "base", "-F", "qcow2"]
    assert qemu("create", "-q", "-f", fmt, *options, "theirs", str(size))[0] == 0
    Path("ours").write_bytes(Path("theirs").read_bytes())
    return cluster


def scribble(rng: random.Random, fmt: str, size: int) -> None:
    """The same writes to both."""
    commands = []
    for turn in range(rng.randrange(4)):
        start = rng.randrange(size // 512) * 512
        length = min(rng.choice([512, 5120, 70000, 300000]), size - start) & ~511
        zero = "-z" if rng.random() < 0.2 else f"-P {turn + 1}"
        commands.append(f"write -q {zero} {start} {length}")
    if commands:
        for image in ("theirs", "ours"):
            qemu_io(image, *commands, fmt=fmt)


def random_words(rng: random.Random, size: int, unit: int) -> list[str]:
    """The options and the size of one resize; a disk shrinks to whole clusters (of what 7.2 does otherwise, see below)."""
    words = []
    if rng.random() < 0.7:
        words.append("--shrink")
    if rng.random() < 0.5:
        words.append("--preallocation=" + rng.choice(["off", "metadata", "falloc", "full", "none"]))
    if rng.random() < 0.3:
        words.append("-q")
    length = rng.choice([size, rng.randrange(1, 3000) * 512, max(size + rng.randrange(-2000, 2000) * 512, 0)])
    if length < size:
        length = min(size, -(-length // unit) * unit)
    sign = rng.choice(["", "+" if length >= size else "-"])
    return [*words, f"{sign}{abs(length - size) if sign else length}"]


@pytest.mark.parametrize(
    ("fmt", "seed"), [("qcow2", seed) for seed in range(14)] + [("raw", seed) for seed in range(4)]
)
def test_random_resizes_do_what_qemu_does(
    fmt: str, seed: int, request: pytest.FixtureRequest, ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten resizes between random writes: same exit codes, output, size, content and layers; no error and no leak."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(request.node.name)
    unit = make_pair(rng, fmt, rng.randrange(1, 3000) * 512)
    for turn in range(10):
        scribble(rng, fmt, size_of("theirs", fmt))
        *options, size = random_words(rng, size_of("theirs", fmt), unit)
        words = ("-f", fmt, *options)
        before = content("ours", fmt)
        expected = qemu("resize", *words, "theirs", size)
        assert ours("resize", *words, "ours", size) == expected, (turn, words, size)
        assert size_of("ours", fmt) == size_of("theirs", fmt), (turn, words, size)
        length = size_of("ours", fmt)
        assert content("ours", fmt) == before[:length] + bytes(max(0, length - len(before))), (turn, words, size)
        if "--preallocation=metadata" in words and content("theirs", fmt) != content("ours", fmt):
            return  # 7.2 maps clusters that were used before without emptying them
        assert qemu("compare", "-f", fmt, "-F", fmt, "theirs", "ours")[0] == 0, (turn, words, size)
        assert ours("compare", "-f", fmt, "-F", fmt, "theirs", "ours")[0] == 0, (turn, words, size)
        if fmt == "qcow2":
            assert present("ours", fmt) == present("theirs", fmt), (turn, words, size)
            assert qemu("check", "-q", "ours") == (0, ""), (turn, words, size)
            assert ours("check", "-q", "ours")[0] == 0


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_what_was_cut_off_inside_a_cluster_does_not_come_back(
    compat: str, ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk shrunk to no whole cluster, by either program, shows zeroes when ours lets it grow again (7.2: the old data)."""
    monkeypatch.chdir(tmp_path)
    for shrink in (ours, qemu):
        assert qemu("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", "a.q", "256k")[0] == 0
        qemu_io("a.q", "write -q -P 5 0 256k")
        assert shrink("resize", "-q", "--shrink", "a.q", "100k")[0] == 0
        assert ours("resize", "-q", "a.q", "256k")[0] == 0
        qemu_io("a.q", "read -q -P 5 0 100k", "read -q -P 0 100k 156k")


@pytest.mark.parametrize("cluster", ["512", "4k", "64k"])
def test_a_shrunken_image_is_as_short_as_qemus(
    cluster: str, ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the file goes back to the host, with refcount blocks that count nothing any more."""
    monkeypatch.chdir(tmp_path)
    assert qemu("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", "theirs", "16M")[0] == 0
    qemu_io("theirs", "write -q -P 1 0 16M")
    Path("ours").write_bytes(Path("theirs").read_bytes())
    for size in ("9M", "1M", "512"):
        assert ours("resize", "--shrink", "ours", size) == qemu("resize", "--shrink", "theirs", size)
        assert os.path.getsize("ours") <= os.path.getsize("theirs"), size
        assert qemu("check", "-q", "ours") == (0, "")
        assert qemu("compare", "ours", "theirs")[0] == 0


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_preallocated_growth_takes_the_space(
    mode: str, ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the host promised is really there, for both formats, also in clusters that were used before."""
    monkeypatch.chdir(tmp_path)
    for fmt in ("raw", "qcow2"):
        assert qemu("create", "-q", "-f", fmt, fmt, "4M")[0] == 0
        qemu_io(fmt, "write -q -P 1 0 4M", fmt=fmt)
        assert ours("resize", "-q", "--shrink", "-f", fmt, fmt, "1M")[0] == 0
        assert ours("resize", f"--preallocation={mode}", "-f", fmt, fmt, "4M") == (0, "Image resized.\n")
        assert os.stat(fmt).st_blocks * 512 >= 4 << 20
        qemu_io(fmt, "read -q -P 1 0 1M", "read -q -P 0 1M 3M", fmt=fmt)
    assert qemu("check", "-q", "qcow2") == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        (), ("a.q",), ("a.q", "x"), ("a.q", "+x"), ("a.q", ""), ("a.q", "+"), ("a.q", "0"), ("a.q", "-1M"), ("a.q", "-512k"),
        ("a.q", "512k"), ("--shrink", "a.q", "-512k"), ("--", "a.q", "+0"), ("a.q", "+0"), ("a.q", "1000001"),
        ("a.q", "8E"), ("a.q", "1E"), ("a.q", "1.5M"), ("a.q", "0x200000"), ("a.q", "b", "2M"), ("a.q", "2M", "-q"),
        ("--preallocation=", "a.q", "2M"), ("--preallocation=some", "a.q", "2M"), ("--preallocation=full", "a.q", "1M"),
        ("--preallocation=falloc", "--shrink", "a.q", "512k"), ("-f", "raw", "--preallocation=metadata", "a.q", "2M"),
        ("missing", "2M"), ("--image-opts", "driver=qcow2,file.filename=a.q", "2M"), ("--nonsense", "a.q", "2M"),
        ("--image-opts", "-f", "qcow2", "a.q", "2M"), ("--object", "secret,id=s,data=x", "a.q", "2M"), ("-q", "a.q", "2M"),
        ("orphan.q", "4M"), ("a.q/", "4M"), ("old.q", "4M"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_command_lines_end_as_those_of_qemu(
    words: tuple[str, ...], ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right and wrong ones: the exit code, what is printed, and the size afterwards."""
    outcomes = []
    for folder, run in (("theirs", qemu), ("ours", ours)):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        qemu("create", "-q", "-f", "qcow2", "a.q", "1M")
        qemu("create", "-q", "-f", "qcow2", "-u", "-b", "gone", "-F", "qcow2", "orphan.q", "1M")
        qemu("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.q", "1M")
        qemu("snapshot", "-c", "one", "old.q")
        code = run("resize", *words)
        sizes = [json.loads(qemu("info", "--output=json", name)[1])["virtual-size"] for name in ("a.q", "old.q")]
        outcomes.append((code, sizes))
    assert outcomes[1] == outcomes[0]


def test_an_image_in_use_is_not_resized(ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program has it open for writing."""
    monkeypatch.chdir(tmp_path)
    qemu("create", "-q", "-f", "qcow2", "a.q", "1M")
    with subprocess.Popen(["qemu-io", "-f", "qcow2", "a.q"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"write 0 512\n")
        holder.stdin.flush()
        holder.stdout.readline()
        assert ours("resize", "a.q", "2M") == (1, "")
        holder.communicate(b"quit\n")
    assert size_of("a.q", "qcow2") == 1 << 20


def test_snapshots_keep_their_content_when_the_disk_shrinks(
    ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a snapshot holds behind the new end stays; going back to it brings all of it back."""
    monkeypatch.chdir(tmp_path)
    qemu("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "a.q", "4M")
    qemu_io("a.q", "write -q -P 1 0 4M")
    qemu("snapshot", "-c", "one", "a.q")
    qemu_io("a.q", "write -q -P 2 1M 3M")
    assert ours("resize", "--shrink", "a.q", "1536k")[0] == 0
    assert qemu("check", "-q", "a.q") == (0, "")
    assert ours("resize", "--preallocation=metadata", "a.q", "3M")[0] == 0
    assert qemu("check", "-q", "a.q") == (0, "")
    qemu_io("a.q", "read -q -P 1 0 1M", "read -q -P 2 1M 512k", "read -q -P 0 1536k 1536k")
    assert qemu("snapshot", "-a", "one", "a.q")[0] == 0
    qemu_io("a.q", "read -q -P 1 0 4M")
