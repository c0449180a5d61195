"""`qblock-img rebase` and `commit` beside the real ones: the same random chains and command lines on both."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_tools import Run, qemu, qemu_io


class Chain:
    """Random images in one directory: a chain ``0`` (bottom) to ``top``, and unrelated ``other`` images."""

    def __init__(self, rng: random.Random, folder: Path, *, old_overlays: bool) -> None:
        self.rng, self.folder, self.old_overlays = rng, folder, old_overlays
        folder.mkdir()
        os.chdir(folder)
        self.names: list[str] = []
        for depth in range(rng.randrange(2, 5)):
            self.add(str(depth), below=self.names[-1] if self.names else None)
        self.others = [self.lone("other0"), self.lone("other1")]

    def size(self) -> int:
        return self.rng.randrange(1, 5000) * 512

    def format_of(self, name: str) -> str:
        return "raw" if name.endswith("raw") else "qcow2"

    def add(self, name: str, *, below: str | None) -> str:
        """One image with random content, on top of another one; the lowest may be raw."""
        size = self.size()
        if below is None and self.rng.random() < 0.3:
            name += "raw"
        fmt = self.format_of(name)
        options = []
        if fmt == "qcow2":
            cluster = self.rng.choice(["4k", "64k", "64k"])
            old = (below is None or self.old_overlays) and self.rng.random() < 0.3
            options = ["-o", f"cluster_size={cluster},compat={'0.10' if old else '1.1'}"]
            if below is not None:
                options += ["-b", below, "-F", self.format_of(below)]
        assert qemu("create", "-q", "-f", fmt, *options, name, str(size))[0] == 0
        if below is None and fmt == "qcow2" and self.rng.random() < 0.3:
            self.scribble(name, size)
            assert qemu("convert", "-c", "-f", fmt, "-O", fmt, name, "packed")[0] == 0
            shutil.move("packed", name)
        self.scribble(name, size)
        if below is None or not name.startswith("other"):
            self.names.append(name)
        return name

    def lone(self, name: str) -> str:
        """An image that is in no chain, or a copy of one that is, a little changed."""
        if self.rng.random() < 0.5:
            source = self.rng.choice(self.names)
            if self.format_of(source) == "raw":
                name += "raw"
            shutil.copy(source, name)
            self.scribble(name, json.loads(qemu("info", "--output=json", name)[1])["virtual-size"])
            return name
        self.add(name, below=None)
        return self.names.pop()

    def scribble(self, name: str, size: int) -> None:
        """Random writes, with content that other images are likely to have in the same place."""
        size &= ~511
        commands = []
        for _ in range(self.rng.randrange(1, 7)):
            start = self.rng.randrange(size // 512) * 512
            length = min(self.rng.choice([512, 5120, 65536, 200000, 1 << 20]), size - start) & ~511
            kind = self.rng.choice(["-P 1", "-P 1", "-P 2", "-P 3", "-P 0", "-z", "-z -u"])
            commands.append(f"write -q {kind} {start} {length}")
        qemu_io(name, *commands, fmt=self.format_of(name))

    @property
    def top(self) -> str:
        return self.names[-1]


@pytest.fixture
def twins(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Chain, Path, Path]]:
    """One random chain, twice. 7.2 cannot commit to an overlay of version 2 that must grow over a longer backing file."""
    before, name = Path.cwd(), request.node.name
    chain = Chain(random.Random(name), tmp_path / "theirs", old_overlays="rebases" in name)
    shutil.copytree("../theirs", "../ours")
    yield chain, tmp_path / "theirs", tmp_path / "ours"
    os.chdir(before)


def layers(folder: Path, image: str) -> list[tuple[int, int, int, bool]]:
    """Start, end, layer and presence of everything that an image shows, as the real program sees it."""
    os.chdir(folder)
    code, text = qemu("map", "--output=json", image)
    assert code == 0
    runs: list[tuple[int, int, int, bool]] = []
    for extent in json.loads(text):
        # Zeroes that nobody holds may be told of any layer.
        kind = (extent["depth"] if extent["present"] else 0, extent["present"])
        start = extent["start"]
        if runs and runs[-1][2:] == kind:
            start = runs.pop()[0]
        runs.append((start, extent["start"] + extent["length"], *kind))
    return runs


def content(folder: Path, image: str, fmt: str, target: Path) -> bytes:
    os.chdir(folder)
    assert qemu("convert", "-f", fmt, "-O", "raw", image, str(target))[0] == 0
    return target.read_bytes()


def links(folder: Path, image: str) -> dict[str, object]:
    os.chdir(folder)
    info = json.loads(qemu("info", "--output=json", image)[1])
    return {key: info.get(key) for key in ("virtual-size", "backing-filename", "backing-filename-format", "format")}


def both(ours: Run, theirs_in: Path, ours_in: Path, *words: str) -> tuple[tuple[int, str], tuple[int, str]]:
    os.chdir(theirs_in)
    expected = qemu(*words)
    os.chdir(ours_in)
    return ours(*words), expected


@pytest.mark.parametrize("seed", range(30))
def test_random_rebases_do_what_qemu_does(
    seed: int, ours: Run, twins: tuple[Chain, Path, Path], tmp_path: Path
) -> None:
    """Down the own chain, onto unrelated images, onto none: same codes and links; what the guest sees stays what it was."""
    chain, theirs_in, ours_in = twins
    rng = random.Random(seed)
    scratch = tmp_path / "raw"
    before = content(theirs_in, chain.top, "qcow2", scratch)
    for turn in range(3):
        backing = rng.choice([*chain.names[:-1], *chain.others, *chain.others, ""])
        words = ["rebase", *rng.choice([[], ["-f", "qcow2"], ["-q", "-t", "none"], ["-T", "writeback"]]), "-b", backing]
        if backing:
            words += ["-F", chain.format_of(backing)]
        result, expected = both(ours, theirs_in, ours_in, *words, chain.top)
        assert result == expected, (turn, words)
        assert links(ours_in, chain.top) == links(theirs_in, chain.top), (turn, words)
        assert content(ours_in, chain.top, "qcow2", scratch) == before, (turn, words)
        if content(theirs_in, chain.top, "qcow2", scratch) != before:
            return  # 7.2 loses data where the old backing file ends inside a cluster of the overlay, and the new one does not
        assert layers(ours_in, chain.top) == layers(theirs_in, chain.top), (turn, words)
        os.chdir(ours_in)
        assert qemu("check", "-q", chain.top) == (0, ""), (turn, words)
        assert ours("compare", "-q", chain.top, str(theirs_in / chain.top))[0] == 0


@pytest.mark.parametrize("seed", range(30))
def test_random_commits_do_what_qemu_does(
    seed: int, ours: Run, twins: tuple[Chain, Path, Path], tmp_path: Path
) -> None:
    """Into the backing file or further down, emptying or not: every image of the chain shows the same in the end."""
    chain, theirs_in, ours_in = twins
    rng = random.Random(seed)
    scratch = tmp_path / "raw"
    before = content(theirs_in, chain.top, "qcow2", scratch)
    words = ["commit", *rng.choice([[], ["-f", "qcow2"], ["-q"], ["-t", "none"]])]
    base = None
    if rng.random() < 0.4:
        base = rng.choice(chain.names[:-1])
        words += ["-b", base]
    elif rng.random() < 0.3:
        words.append("-d")
    result, expected = both(ours, theirs_in, ours_in, *words, chain.top)
    assert result == expected, words
    for name in chain.names:
        fmt = chain.format_of(name)
        assert links(ours_in, name) == links(theirs_in, name), (words, name)
        assert content(ours_in, name, fmt, scratch) == content(theirs_in, name, fmt, tmp_path / "raw2"), (words, name)
        os.chdir(ours_in)
        assert fmt == "raw" or qemu("check", "-q", name) == (0, ""), (words, name)
        assert fmt == "raw" or layers(ours_in, name) == layers(theirs_in, name), (words, name)
    assert content(ours_in, chain.top, "qcow2", scratch) == before
    assert (
        content(ours_in, base or chain.names[-2], chain.format_of(base or chain.names[-2]), scratch)[: len(before)]
        == before
    )


REBASES = (
    ("-b", "base"), ("-b", "base", "-F", "qcow2"), ("-u", "-b", "base"), ("-u", "-b", "gone", "-F", "qcow2"), ("-u", "-b", ""),
    ("-u",), (), ("-b", ""), ("-b", "", "-F", "raw"), ("-b", "base", "-F", "nonsense"), ("-u", "-b", "base", "-F", "nonsense"),
    ("-b", "gone", "-F", "qcow2"), ("-b", "top", "-F", "qcow2"), ("-U", "-b", "base", "-F", "qcow2"),
    ("-t", "nonsense", "-b", "base", "-F", "qcow2"), ("-T", "nonsense", "-b", "base", "-F", "qcow2"), ("-x", "-b", "base"),
    ("-t", "writethrough", "-T", "none", "-b", "base", "-F", "qcow2"), ("-q", "-p", "-b", "other", "-F", "qcow2"),
    ("-f", "raw", "-b", "base", "-F", "qcow2"), ("-b", "other", "-F", "raw"), ("-f", "qcow2", "--image-opts", "-b", ""),
    ("--object", "secret,id=s,data=x", "-b", "middle", "-F", "qcow2"), ("-b", "sub/far", "-F", "qcow2"),
)  # fmt: skip
COMMITS = (
    (), ("-q",), ("-d",), ("-b", "base"), ("-b", "middle"), ("-b", "gone"), ("-b", "top"), ("-b", "other"), ("-r", "1G"),
    ("-r", "nonsense"), ("-t", "nonsense"), ("-t", "unsafe"), ("-x",), ("second",), ("-f", "raw"),
    ("-f", "qcow2", "--image-opts"), ("-q", "-p", "-d", "-b", "base"), ("--object", "secret,id=s,data=x"), ("-t", "writethrough"),
    ("-f", "nonsense"),
)  # fmt: skip


@pytest.mark.parametrize(
    "words", [("rebase", *rest) for rest in REBASES] + [("commit", *rest) for rest in COMMITS], ids=" ".join
)
def test_command_lines_end_as_those_of_qemu(
    words: tuple[str, ...], ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right and wrong ones: the exit code, what is printed, and what each image is afterwards."""
    outcomes = []
    for folder, run in (("theirs", qemu), ("ours", ours)):
        (tmp_path / folder / "sub").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / folder)
        for name, *options in (
            ("base",), ("other",), ("sub/far",), ("middle", "-b", "base", "-F", "qcow2"), ("top", "-b", "middle", "-F", "qcow2"),
        ):  # fmt: skip
            qemu("create", "-q", "-f", "qcow2", *options, name, "1M")
            qemu_io(name, f"write -q -P {len(name)} {65536 * len(name)} 64k")
        code = run(*words, "top")
        outcomes.append((code, [links(tmp_path / folder, name) for name in ("base", "middle", "top")]))
    assert outcomes[1] == outcomes[0]


@pytest.mark.parametrize("command", [("commit", "-p"), ("rebase", "-p", "-b", "", "-q"), ("rebase", "-p", "-b", "")])
def test_progress_is_shown_to_the_end(
    command: tuple[str, ...], ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the real ones: percentages over one another, 100 last, then a line of its own; nothing with -q."""
    monkeypatch.chdir(tmp_path)
    qemu("create", "-q", "-f", "qcow2", "base", "8M")
    qemu("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top")
    qemu_io("base", "write -q -P 1 0 8M")
    qemu_io("top", "write -q -P 1 0 3M")
    code, text = ours(*command, "top")
    assert code == 0
    if "-q" in command:
        assert not text
        return
    *shown, last = text.removesuffix("Image committed.\n").split("\r")
    assert shown[-1] == "    (100.00/100%)"
    assert all(part.startswith("    (") and part.endswith("/100%)") for part in shown)
    assert last == "\n"


@pytest.mark.parametrize("where", ["base", "top"])
@pytest.mark.parametrize("command", [("commit",), ("rebase", "-b", "")])
def test_images_in_use_are_left_alone(
    command: tuple[str, ...], where: str, ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program has one of them open for writing."""
    monkeypatch.chdir(tmp_path)
    qemu("create", "-q", "-f", "qcow2", "base", "1M")
    qemu("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top")
    qemu_io("top", "write -q -P 1 0 64k")
    with subprocess.Popen(["qemu-io", "-f", "qcow2", where], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"write 512k 512\n")
        holder.stdin.flush()
        holder.stdout.readline()
        assert ours(*command, "top") == (1, "")
        assert qemu(*command, "top") == (1, "")
        holder.communicate(b"quit\n")
    assert links(tmp_path, "top")["backing-filename"] == "base"
    assert layers(tmp_path, "top")[0] == (0, 65536, 0, True)


def test_a_base_that_another_reader_has_open_is_not_written(
    ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest runs on another overlay of the same base: committing into it would change what that guest sees."""
    monkeypatch.chdir(tmp_path)
    qemu("create", "-q", "-f", "qcow2", "base", "1M")
    for name in ("top", "sibling"):
        qemu("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", name)
    qemu_io("top", "write -q -P 1 0 64k")
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "sibling"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"read 0 512\n")
        holder.stdin.flush()
        holder.stdout.readline()
        assert ours("commit", "top") == (1, "")
        assert qemu("commit", "top") == (1, "")
        holder.communicate(b"quit\n")
    qemu_io("base", "read -q -P 0 0 1M")


def test_an_emptied_overlay_is_small_and_keeps_its_snapshots(
    ours: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file goes back to the host, but for what internal snapshots hold."""
    monkeypatch.chdir(tmp_path)
    qemu("create", "-q", "-f", "qcow2", "base", "16M")
    qemu("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "base", "-F", "qcow2", "top")
    qemu_io("top", "write -q -P 1 0 16M")
    assert ours("commit", "top") == (0, "Image committed.\n")
    assert os.path.getsize("top") < 65536
    qemu_io("top", "write -q -P 2 1M 1M")
    qemu("snapshot", "-c", "one", "top")
    qemu_io("top", "write -q -P 3 2M 8M")
    assert ours("commit", "top")[0] == 0
    assert qemu("check", "-q", "top") == (0, "")
    assert os.path.getsize("top") < 2 << 20
    qemu_io("top", "read -q -P 1 0 1M", "read -q -P 2 1M 1M", "read -q -P 3 2M 8M")
    assert qemu("snapshot", "-a", "one", "top")[0] == 0
    qemu_io("top", "read -q -P 2 1M 1M")
