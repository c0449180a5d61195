"""External data files beside the real programs: the same commands on both, each reading what the other has made."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest

from image_tools import TwoDirectories
from qblock.errors import CommandError, CorruptImage, OpenDenied, QBlockError
from qblock.opening import OpenPolicy
from qblock.policy import Mention
from qblock.tools.images import ImageArguments, ImageSession, run_session
from qblock.units import KiB, MiB


class Pair(TwoDirectories):
    """That, and what must agree."""

    def same_json(self, *words: str, without: tuple[str, ...] = ()) -> Any:
        answers = []
        texts = self.both(*words)
        for text in texts:
            answer = json.loads(text)
            for key in without:
                answer.pop(key, None)
            answers.append(answer)
        assert answers[0] == answers[1], (words, *texts)
        return answers[0]

    def agree(self, image: str) -> bytes:
        """Both sides have the same map, info and check, and each reads the other's image as its own; gives the content."""
        self.same_json("qemu-img", "map", "--output=json", image)
        self.same_json("qemu-img", "info", "--output=json", image, without=("actual-size",))
        self.same_json("qemu-img", "check", "--output=json", image, without=("image-end-offset", "fragmented-clusters"))
        return self.content(image)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pair:
    return Pair(tmp_path, monkeypatch, capfd)


def commands(random: Random, size: int, count: int) -> list[str]:
    """Random qemu-io commands."""
    words = []
    for _ in range(count):
        verb = random.choice(["write -P {p}", "write -P {p}", "write -z", "write -z -u", "discard", "read"])
        if random.random() < 0.5:
            unit = random.choice([64 * KiB, 16 * KiB])
            offset = random.randrange(size // unit) * unit
            length = min(random.randrange(1, 5) * unit, size - offset)
        else:
            offset = random.randrange(size // 512) * 512
            length = min(random.randrange(1, 200) * 512, size - offset)
        words.append(f"{verb.format(p=random.randrange(1, 255))} {offset} {length}")
    return words


@pytest.mark.parametrize("seed", range(8))
def test_the_same_commands_leave_the_same_images(pair: Pair, seed: int) -> None:
    """Random geometry, with and without backing file and raw data: map, info, check and content agree after every round."""
    random = Random(seed)
    raw, bits = seed % 3 == 2, random.choice([9, 12, 16, 18])
    size = random.choice([MiB, 3 * MiB + 512, 2 * MiB - 512])
    options = f"data_file=data,cluster_size={1 << bits}" + (",data_file_raw=on" if raw else "")
    backing: tuple[str, ...] = ()
    if not raw and random.random() < 0.6:
        pair.both("qemu-img", "create", "-f", "qcow2", "base", str(size - random.choice([0, 512 * KiB])))
        pair.both("qemu-io", "-c", "write -P 99 0 320k", "-c", "write -z 100k 64k", "base")
        backing = ("-b", "base", "-F", "qcow2")
    real, ours = pair.both("qemu-img", "create", "-f", "qcow2", "-o", options, *backing, "image", str(size))
    assert real == ours
    for _ in range(4):
        for command in commands(random, size, 8):
            pair.both("qemu-io", *(("-d", "unmap") if random.random() < 0.3 else ()), "-c", command, "image")
        content = pair.agree("image")
        if raw:
            assert (pair.ours / "data").read_bytes()[:size] == content
        if random.random() < 0.5:
            size = random.choice([size + 512 * KiB, size + 1536, size // 2 // 512 * 512])
            pair.both("qemu-img", "resize", "--shrink", "-f", "qcow2", "image", str(size))
            pair.agree("image")


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("raw", ["on", "off"])
def test_preallocated_data_files_are_laid_out_alike(pair: Pair, mode: str, raw: str) -> None:
    """Length of the data file, map, and what growing makes of it."""
    options = f"data_file=data,data_file_raw={raw},preallocation={mode}"
    pair.both("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "image", "1000k")
    pair.agree("image")
    assert (pair.real / "data").stat().st_size == (pair.ours / "data").stat().st_size
    if mode in ("falloc", "full"):
        assert (pair.ours / "data").stat().st_blocks * 512 >= 1000 * KiB
    pair.both("qemu-img", "resize", "-q", "-f", "qcow2", "image", "2M")
    assert pair.agree("image") == bytes(2 * MiB)
    assert (pair.real / "data").stat().st_size == (pair.ours / "data").stat().st_size


def test_converting_to_and_from_data_files(pair: Pair) -> None:
    """As target, as source, and refused for compressed clusters."""
    content = b"".join(Random(5).choice([bytes(64 * KiB), b"x" * (64 * KiB)]) for _ in range(30))
    for where in (pair.real, pair.ours):
        (where / "source").write_bytes(content)
    for options in ("data_file=d1", "data_file=d2,data_file_raw=on"):
        pair.both("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", options, "source", "image")
        assert pair.agree("image") == content
    pair.both("qemu-img", "convert", "-O", "qcow2", "image", "plain")
    assert pair.agree("plain") == content
    pair.both("qemu-img", "measure", "--output=json", "-O", "qcow2", "image")


@pytest.mark.parametrize(
    "options",
    ["data_file_raw=on", "data_file=d,compat=0.10", "data_file=d,data_file_raw=on,backing_file=b,backing_fmt=raw"],
)
def test_options_that_contradict_are_refused_alike(pair: Pair, options: str) -> None:
    """Nothing is left of what was begun."""
    for where in (pair.real, pair.ours):
        (where / "b").write_bytes(bytes(MiB))
    pair.both("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "image", "1M")
    assert not (pair.ours / "image").exists() and not (pair.ours / "d").exists()


def damaged(image: bytes, entry: int, index: int = 1) -> bytes:
    """The image with another L2 entry."""
    raw = bytearray(image)
    (l1,) = struct.unpack_from(">Q", raw, 40)
    table = struct.unpack_from(">Q", raw, l1)[0] & 0x00FFFFFFFFFFFE00
    struct.pack_into(">Q", raw, table + 8 * index, entry)
    return bytes(raw)


@pytest.mark.parametrize(
    ("name", "entry"),
    [("elsewhere", 1 << 63 | 0x30000), ("compressed", 1 << 62 | 0x10000), ("not marked copied", 0x10000)],
)
def test_damaged_entries_are_met_as_the_real_one_meets_them(pair: Pair, name: str, entry: int) -> None:
    """Reads fail or not alike, the check tells, and a repair mends what can be mended."""
    pair.both("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "image", "4M")
    pair.both("qemu-io", "-c", "write -P 3 64k 128k", "image")
    for where in (pair.real, pair.ours):
        (where / "image").write_bytes(damaged((where / "image").read_bytes(), entry))
    pair.both("qemu-io", "-r", "-c", "read -P 3 64k 4k", "image")
    pair.both("qemu-io", "-r", "-c", "read -P 3 128k 4k", "image")
    assert pair.own(pair.ours, "qemu-img", "check", "image")[0] == 2
    if name == "not marked copied":
        pair.both("qemu-img", "check", "-r", "all", "image")
        pair.agree("image")


def test_a_missing_data_file_fails_everything_but_info(pair: Pair) -> None:
    """And one that is too short reads as zeroes, and grows."""
    pair.both("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "image", "4M")
    pair.both("qemu-io", "-c", "write -P 3 1M 2M", "image")
    for where in (pair.real, pair.ours):
        (where / "data").rename(where / "away")
    for words in (("qemu-img", "map"), ("qemu-img", "check"), ("qemu-io", "-c", "read 0 512")):
        assert pair.theirs(pair.real, *words, "image")[0] == pair.own(pair.ours, *words, "image")[0] == 1
    pair.same_json("qemu-img", "info", "--output=json", "image", without=("actual-size",))
    for where in (pair.real, pair.ours):
        (where / "data").write_bytes((where / "away").read_bytes()[: 3 * MiB // 2])
    pair.agree("image")
    pair.both("qemu-io", "-c", "write -P 4 2M 64k", "image")
    pair.agree("image")


def test_the_data_file_can_be_given_in_the_options(pair: Pair) -> None:
    """It is used instead of the one that the header names, and refused for images that have none."""
    pair.both("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data", "image", "1M")
    pair.both("qemu-img", "create", "-q", "-f", "qcow2", "plain", "1M")
    for where in (pair.real, pair.ours):
        (where / "data").rename(where / "moved")
    options = "driver=qcow2,file.driver=file,file.filename={},data-file.driver=file,data-file.filename=moved"
    pair.both("qemu-io", "--image-opts", "-c", "write -P 9 0 64k", options.format("image"))
    assert (pair.ours / "moved").read_bytes()[: 64 * KiB] == b"\x09" * (64 * KiB)
    pair.both("qemu-io", "--image-opts", "-c", "read 0 64k", options.format("plain"))


def opened(name: str, policy: OpenPolicy | None = None) -> str:
    """Open an image for reading; gives what is said when that fails."""

    async def body(session: ImageSession) -> None:
        if policy is not None:
            session.opener.policy = policy
        await session.open(ImageArguments(name))

    try:
        run_session(body)
    except QBlockError as error:
        cause = getattr(error, "cause", error)
        assert isinstance(cause, (OpenDenied, CorruptImage, CommandError))
        return str(cause)
    return ""


def named(image: Path, name: str) -> None:
    """Give the image another data file name of the same length, padded by slashes."""
    raw = image.read_bytes()
    at = raw.index(b"DATA") + 8
    length = int.from_bytes(raw[at - 4 : at], "big")
    new = name.encode().rjust(length, b"/") if name.startswith("/") else name.encode().ljust(length, b" ")
    assert len(new) == length
    image.write_bytes(raw[:at] + new + raw[at + length :])


def test_what_a_header_names_is_opened_as_the_policy_says_and_never_in_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image itself, a name that describes another image, no name at all, and a policy that says no."""
    monkeypatch.chdir(tmp_path)
    long = "d" * 200
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={long}", "image", "1M"], check=True)
    asked: list[Mention] = []

    def allows(mention: Mention) -> bool:
        asked.append(mention)
        return False

    assert "data file" in opened("image", OpenPolicy.ask(allows))
    assert [(mention.what, mention.filename) for mention in asked] == [("data file", long)]
    assert opened("image") == ""
    named(image, str(image))
    assert "itself" in opened("image")
    inner = {"driver": "qcow2", "file": {"driver": "file", "filename": "image"}}
    named(image, "json:" + json.dumps(inner))
    assert "an image itself" in opened("image")
    raw = image.read_bytes()
    image.write_bytes(raw.replace(b"DATA", b"XATA", 1))
    assert "give it by 'data-file'" in opened("image")
