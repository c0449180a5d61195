"""Persistent bitmaps beside the real programs: the same commands on both, each reading what the other has stored."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qblock.tools.img import main as img
from qblock.tools.io import main as io
from qmp_pair import DAEMONS, SYSTEMS, add, both, do, hmp, running

MiB = 1 << 20
SIZE = 8 * MiB
NAMES = ("b0", "b1", "b2", "b3")
NODES = do("query-named-block-nodes", flat=True)


def info(path: Path) -> Any:
    """What the real qemu-img says of an image's format, refcount-independent members only."""
    done = subprocess.run(["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True)
    data = json.loads(done.stdout)["format-specific"]["data"]
    return {key: data.get(key) for key in ("bitmaps", "corrupt", "compat")}


def is_clean(path: Path) -> None:
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def hashes(argv: Any, path: Path, place: Path) -> dict[str, str]:
    """The hash of each usable bitmap of an image, asked from a storage daemon that opens it read-only."""
    place.mkdir(exist_ok=True)
    with running(argv, place) as connection:
        connection.execute({"execute": "qmp_capabilities"})
        assert "return" in connection.execute(add("n", str(path), read_only=True))[1]
        found = {}
        for entry in connection.execute(do("query-named-block-nodes", flat=True))[1]["return"]:
            for bitmap in entry.get("dirty-bitmaps", []):
                _, reply = connection.execute(do("x-debug-block-dirty-bitmap-sha256", node="n", name=bitmap["name"]))
                found[bitmap["name"]] = reply["return"]["sha256"] if not bitmap.get("inconsistent") else "inconsistent"
        return found


def same_on_both(path: Path, tmp_path: Path) -> dict[str, str]:
    """The hashes, on which both daemons agree."""
    real = hashes(DAEMONS.real, path, tmp_path / "daemon")
    assert hashes(DAEMONS.ours, path, tmp_path / "daemon") == real
    return real


# --------------------------------------------------------------------------------------------------- random command lines


def step(random: Random) -> tuple[str, list[str]]:
    """A program and its arguments; the image is called IMAGE."""
    dice = random.random()
    if dice < 0.6:
        operations = []
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            kind = random.choice(["add", "add", "add", "remove", "clear", "enable", "disable", "merge"])
            operations += [f"--{kind}", *([random.choice(NAMES)] if kind == "merge" else [])]
        granularity = ["-g", random.choice(["512", "4k", "64k", "1M", "100", "4G"])] if "--add" in operations else []
        return "img", ["bitmap", *operations, *granularity, "IMAGE", random.choice(NAMES)]
    if dice < 0.9:
        offset = random.randrange(SIZE // 2 // 512) * 512
        verb = random.choice(["write", "write", "write -z", "discard"])
        return "io", ["-f", "qcow2", "-c", f"{verb} {offset} {random.randrange(1, 1000) * 512}", "IMAGE"]
    return "img", random.choice(
        [
            ["resize", "IMAGE", str(random.randrange(9, 12) * MiB)],
            ["resize", "--shrink", "IMAGE", str(random.randrange(5, 9) * MiB)],
            ["snapshot", "-c", "s", "IMAGE"],
            ["snapshot", "-a", "s", "IMAGE"],
            ["snapshot", "-d", "s", "IMAGE"],
            ["check", "IMAGE"],
        ]
    )


def on_qemu(program: str, words: list[str], image: Path) -> int:
    argv = [f"qemu-{program}", *(str(image) if word == "IMAGE" else word for word in words)]
    return subprocess.run(argv, capture_output=True, check=False).returncode


def on_ours(program: str, words: list[str], image: Path) -> int:
    main: Callable[[list[str]], int] = img if program == "img" else io
    return main([str(image) if word == "IMAGE" else word for word in words])


@pytest.mark.qemu
@pytest.mark.parametrize("seed", range(8))
def test_random_command_lines_leave_the_same_bitmaps(
    seed: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """bitmap, io, resize, snapshot and check in any order; sometimes each side goes on with the other's image."""
    random = Random(seed)
    images = [tmp_path / "real.qcow2", tmp_path / "ours.qcow2"]
    cluster = random.choice(["512", "4k", "64k", "2M"])
    for image in images:
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", str(image), str(SIZE)], check=True
        )
    history = []
    for _ in range(25):
        program, words = step(random)
        codes = on_qemu(program, words, images[0]), on_ours(program, words, images[1])
        history.append((program, words, codes))
        assert codes[0] == codes[1], (history, capfd.readouterr())
        assert info(images[0]) == info(images[1]), history
        is_clean(images[1])
        if random.random() < 0.3:
            images.reverse()
    assert same_on_both(images[0], tmp_path) == same_on_both(images[1], tmp_path), history


# ----------------------------------------------------------------------------------------------------------- over QMP


def hmp_io(node: str, line: str) -> dict[str, Any]:
    """A qemu-io command on a node, through the human monitor."""
    return hmp(f'qemu-io {node} "{line}"')


def every_hash(node: str) -> list[dict[str, Any]]:
    return [do("x-debug-block-dirty-bitmap-sha256", node=node, name=name) for name in NAMES]


def bitmap(verb: str, name: str, **members: Any) -> dict[str, Any]:
    return do(f"block-dirty-bitmap-{verb}", node="n", name=name, **members)


def without_file_length(value: Any) -> Any:
    """Where clusters are allocated in the file, and whether the last one is written to its end, is each one's own affair."""
    if isinstance(value, list):
        return [without_file_length(item) for item in value]
    if not isinstance(value, dict):
        return value
    skipped = "virtual-size" if value.get("format") == "file" else ""
    return {key: without_file_length(item) for key, item in value.items() if key != skipped}


LIFE = [
    add("n", "image.qcow2"), NODES,
    bitmap("add", "b0", persistent=True), bitmap("add", "b0", persistent=True),
    bitmap("add", "b1", persistent=True, disabled=True, granularity=512),
    bitmap("add", "b2", granularity=4096), bitmap("add", "b3", persistent=True, granularity=1 << 32),
    bitmap("add", "b3", persistent=True, granularity=1 << 31), NODES,
    hmp_io("n", "write 1M 100k"), hmp_io("n", "write -z 3M 64k"), NODES, *every_hash("n"),
    do("block-dirty-bitmap-merge", node="n", target="b1", bitmaps=["b0", "b2"]), bitmap("disable", "b0"),
    hmp_io("n", "write 5M 1k"), *every_hash("n"),
    do("blockdev-del", node_name="n"), add("n", "image.qcow2", read_only=True), NODES, *every_hash("n"),
    bitmap("clear", "b1"), bitmap("enable", "b0"), bitmap("remove", "b0"), bitmap("add", "b2", persistent=True), NODES,
    do("blockdev-del", node_name="n"), add("n", "image.qcow2"), NODES, *every_hash("n"),
    bitmap("remove", "b1"), NODES, bitmap("add", "b1", persistent=True), bitmap("enable", "b0"),
    hmp_io("n", "write 7M 64k"), hmp_io("n", "discard 1M 64k"),
    do("transaction", actions=[
        {"type": "block-dirty-bitmap-add", "data": {"node": "n", "name": "b2", "persistent": True}},
        {"type": "block-dirty-bitmap-disable", "data": {"node": "n", "name": "b0"}},
        {"type": "block-dirty-bitmap-merge", "data": {"node": "n", "target": "b2", "bitmaps": ["b0"]}},
        {"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "b0"}},
    ]),
    do("transaction", actions=[
        {"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "b2"}},
        {"type": "block-dirty-bitmap-remove", "data": {"node": "n", "name": "b1"}},
        {"type": "abort", "data": {}},
    ]),
    do("transaction", actions=[{"type": "block-dirty-bitmap-remove", "data": {"node": "n", "name": "b3"}}]),
    hmp_io("n", "write 2M 1k"), NODES, *every_hash("n"),
    do("block_resize", node_name="n", size=12 * MiB), hmp_io("n", "write 11M 1k"), NODES, *every_hash("n"),
    do("blockdev-del", node_name="n"), add("n", "image.qcow2", read_only=True), NODES, *every_hash("n"),
    do("blockdev-del", node_name="n"),
]  # fmt: skip


@pytest.mark.qemu
@pytest.mark.parametrize("cluster", ["4k", "64k"])
def test_a_life_of_bitmaps_over_qmp(cluster: str, tmp_path: Path) -> None:
    """Add, record, merge, remove, resize, in transactions or not; closed and opened again: every reply and hash is the same."""
    prepare = [["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", "image.qcow2", str(SIZE)]]
    real, ours = both(SYSTEMS, tmp_path, LIFE, prepare)
    for expected, got in zip(real, ours, strict=True):
        assert without_file_length(got) == without_file_length(expected)
    left = [same_on_both(tmp_path / name / "image.qcow2", tmp_path) for name in ("real", "ours")]
    assert left[0] == left[1] and left[0]
    for name in ("real", "ours"):
        is_clean(tmp_path / name / "image.qcow2")


@pytest.mark.qemu
@pytest.mark.parametrize("killed", ["real", "ours"])
def test_a_killed_program_leaves_inconsistent_bitmaps_to_both(killed: str, tmp_path: Path) -> None:
    """kill -9 with bitmaps that recorded: nobody uses them afterwards, and removing and adding again mends it."""
    image = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(SIZE)], check=True)
    assert img(["bitmap", "--add", str(image), "b0"]) == 0
    argv = ["qemu-io"] if killed == "real" else [sys.executable, "-m", "qblock.tools.io"]
    with subprocess.Popen(
        [*argv, "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin and process.stdout
        process.stdin.write("write 1M 64k\nflush\n")
        process.stdin.flush()
        while "ops" not in (line := process.stdout.readline()):
            assert line, "it has ended"
        process.kill()
    assert same_on_both(image, tmp_path) == {"b0": "inconsistent"}
    assert img(["check", "-r", "leaks", str(image)]) == 0  # leaks are allowed: it may have died while it flushed
    is_clean(image)
    for words in (["bitmap", "--clear"], ["bitmap", "--enable"], ["bitmap", "--add"], ["resize"]):
        tail = ["16M"] if words == ["resize"] else ["b0"]
        assert img([*words, str(image), *tail]) == 1
        assert subprocess.run(["qemu-img", *words, str(image), *tail], capture_output=True, check=False).returncode == 1
    assert img(["bitmap", "--remove", "--add", str(image), "b0"]) == 0
    is_clean(image)
    assert set(same_on_both(image, tmp_path)) == {"b0"}
    assert "inconsistent" not in same_on_both(image, tmp_path).values()


# ------------------------------------------------------------------------------------------------------------- convert


@pytest.mark.qemu
def test_convert_copies_bitmaps_as_the_real_one_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Names, order, granularity, whether they record, and what is dirty; exit codes where they cannot be copied."""
    source, broken = tmp_path / "source.qcow2", tmp_path / "broken.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(source), str(SIZE)], check=True)
    for words in (["--add", "-g", "512"], ["--add", "--disable"], ["--add", "-g", "1M"]):
        name = f"b{len(words)}"
        subprocess.run(["qemu-img", "bitmap", *words, str(source), name + words[-1]], check=True)
        subprocess.run(["qemu-io", "-c", f"write {len(words)}M 1M", str(source)], check=True, stdout=subprocess.DEVNULL)
    shutil.copy(source, broken)
    raw = bytearray(broken.read_bytes())
    raw[directory_of(raw) + 15] |= 1
    broken.write_bytes(raw)
    tail = {"copy": ([], source), "skip": (["--skip-broken-bitmaps"], broken), "raw": (["-O", "raw"], source),
            "old": (["-o", "compat=0.10"], source), "broken": ([], broken)}  # fmt: skip
    for case, (more, image) in tail.items():
        words = ["convert", "-O", "qcow2", "--bitmaps", *more, str(image)]
        targets = [tmp_path / f"{case}-real", tmp_path / f"{case}-ours"]
        real = subprocess.run(["qemu-img", *words, str(targets[0])], capture_output=True, check=False).returncode
        assert img([*words, str(targets[1])]) == real, case
        if real == 0:
            assert info(targets[0]) == info(targets[1])
            is_clean(targets[1])
            assert same_on_both(targets[0], tmp_path) == same_on_both(targets[1], tmp_path) != {}
    for words in (["--skip-broken-bitmaps", str(source)], ["--bitmaps", str(source), str(source)]):
        assert img(["convert", "-O", "qcow2", *words, str(tmp_path / "none")]) == 1
    capfd.readouterr()


def directory_of(image: bytes) -> int:
    """File offset of the bitmap directory."""
    at = struct.unpack_from(">I", image, 100)[0]
    while (kind := struct.unpack_from(">I", image, at)[0]) != 0x23852875:
        assert kind, "there is none"
        at += 8 + -(-struct.unpack_from(">I", image, at + 4)[0] // 8) * 8
    return int(struct.unpack_from(">Q", image, at + 24)[0])


@pytest.mark.qemu
def test_info_and_measure_say_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both layouts of info, byte for byte, with bitmaps that record, do not, or are in use; and what they take."""
    image = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(SIZE)], check=True)
    assert img(["bitmap", "--add", str(image), "b0"]) == 0
    assert img(["bitmap", "--add", "--disable", "-g", "4k", str(image), "b1"]) == 0
    raw = bytearray(image.read_bytes())
    raw[directory_of(raw) + 15] |= 1
    image.write_bytes(raw)
    for words in (["info"], ["info", "--output=json"], ["measure", "-O", "qcow2"]):
        capfd.readouterr()
        assert img([*words, str(image)]) == 0
        printed = capfd.readouterr().out
        assert printed == subprocess.run(["qemu-img", *words, str(image)], capture_output=True, text=True, check=True).stdout


# ------------------------------------------------------------------------------------------------------------- hostile

DAMAGES: dict[str, tuple[str, int, str, int]] = {
    "autoclear bit gone": ("header", 88, "Q", 0),
    "type": ("entry", 16, "B", 2),
    "unknown flag": ("entry", 12, "I", 8 | 2),
    "in use": ("entry", 12, "I", 3),
    "not auto": ("entry", 12, "I", 0),
    "granularity too small": ("entry", 17, "B", 8),
    "granularity too large": ("entry", 17, "B", 32),
    "another granularity": ("entry", 17, "B", 10),
    "no name": ("entry", 18, "H", 0),
    "name too long": ("entry", 18, "H", 2000),
    "two of a name": ("entry", 32 + 24, "H", 0x6230),
    "table not aligned": ("entry", 0, "Q", 512),
    "no table": ("entry", 0, "Q", 0),
    "table too long": ("entry", 8, "I", 2),
    "table far too long": ("entry", 8, "I", (1 << 32) - 1),
    "table of nothing": ("entry", 8, "I", 0),
    "extension too short": ("extension", -4, "I", 16),
    "no bitmaps": ("extension", 0, "I", 0),
    "fewer bitmaps": ("extension", 0, "I", 1),
    "more bitmaps": ("extension", 0, "I", 3),
    "reserved field": ("extension", 4, "I", 1),
    "directory too long": ("extension", 8, "Q", 72),
    "directory far too long": ("extension", 8, "Q", 1 << 30),
    "directory not aligned": ("extension", 16, "Q", 512),
    "directory behind the end": ("extension", 16, "Q", 1 << 40),
    "all ones": ("table", 0, "Q", 1),
    "table entry reserved": ("table", 0, "Q", 2),
    "table entry not aligned": ("table", 0, "Q", 512),
}


@pytest.mark.qemu
@pytest.mark.parametrize("name", DAMAGES)
def test_odd_bitmap_metadata_gets_the_same_verdict(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Refused by both or opened by both, with the same bitmaps, to read and to write; and the same is left."""
    image = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(SIZE)], check=True)
    for bitmap_name in ("b0", "b1"):
        subprocess.run(["qemu-img", "bitmap", "--add", str(image), bitmap_name], check=True)
    subprocess.run(["qemu-io", "-c", "write 1M 64k", str(image)], check=True, stdout=subprocess.DEVNULL)
    raw = bytearray(image.read_bytes())
    entry = directory_of(raw)
    extension = raw.index(struct.pack(">II", 0x23852875, 24)) + 8
    places = {"header": 0, "extension": extension, "entry": entry, "table": struct.unpack_from(">Q", raw, entry)[0]}
    place, offset, code, value = DAMAGES[name]
    struct.pack_into(">" + code, raw, places[place] + offset, value)
    images = [tmp_path / "real", tmp_path / "ours"]
    for copy in images:
        copy.write_bytes(raw)
    for program, words in (
        ("img", ["info", "IMAGE"]),
        ("img", ["bitmap", "--disable", "IMAGE", "b1"]),
        ("io", ["-f", "qcow2", "-c", "write 2M 64k", "IMAGE"]),
        ("img", ["bitmap", "--remove", "IMAGE", "b0"]),
    ):
        codes = on_qemu(program, words, images[0]), on_ours(program, words, images[1])
        assert codes[0] == codes[1], (words, capfd.readouterr())
        real = subprocess.run(["qemu-img", "info", str(images[0])], capture_output=True, check=False).returncode
        if real == 0:
            assert info(images[0]) == info(images[1]), words
