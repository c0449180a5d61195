"""Extended L2 entries beside the real programs: the same commands on both, each reading what the other has made."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest

from image_tools import TwoDirectories
from qblock.units import KiB, MiB


class Pair(TwoDirectories):
    """That, and what must agree."""

    def layout(self, where: Path, image: str) -> list[dict[str, Any]]:
        """The map of an image as both programs print it, which is the same; offsets are told only as there or not."""
        maps = [json.loads(run(where, "qemu-img", "map", "--output=json", image)[1]) for run in (self.theirs, self.own)]
        shift, told = [[joined(areas, exact=exact) for areas in maps] for exact in (True, False)]
        assert shift[0] == shift[1]
        return told[0]

    def agree(self, image: str) -> bytes:
        """Each side's image is clean, has one map and reads alike for both programs, and maps what the other does."""
        for where in (self.real, self.ours):
            for run in (self.theirs, self.own):
                code, text = run(where, "qemu-img", "check", image)
                assert code == 0, text
        assert self.layout(self.real, image) == self.layout(self.ours, image)
        return self.content(image)


def joined(areas: list[dict[str, Any]], *, exact: bool) -> list[dict[str, Any]]:
    """A map whose adjacent equal areas are one. Offsets count as distances from the start (``exact``), or as there or not.

    Data over a hole of the file is data: when a program looks for holes is up to it.
    """
    result: list[dict[str, Any]] = []
    for area in areas:
        offset = area.get("offset")
        kind = (area["depth"], area["present"], area["zero"] and not area["data"], area["data"])
        place = None if offset is None else offset - area["start"] if exact else 0
        if result and (result[-1]["kind"], result[-1]["place"]) == (kind, place):
            result[-1]["length"] += area["length"]
        else:
            result.append({"start": area["start"], "length": area["length"], "kind": kind, "place": place})
    return result


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pair:
    return Pair(tmp_path, monkeypatch, capfd)


def commands(random: Random, size: int, cluster: int, count: int) -> list[str]:
    """Random qemu-io commands: some for whole clusters or subclusters, some for any sectors."""
    words = []
    for _ in range(count):
        verb = random.choice(["write -P {p}", "write -P {p}", "write -z", "write -z -u", "discard", "read"])
        unit = random.choice([cluster, cluster // 32, cluster // 32, 512])
        offset = random.randrange(size // unit) * unit
        length = min(random.choice([1, 2, 5, 40]) * unit, size - offset)
        words.append(f"{verb.format(p=random.randrange(1, 255))} {offset} {length}")
    return words


@pytest.mark.parametrize("seed", range(10))
def test_the_same_commands_leave_the_same_images(pair: Pair, seed: int) -> None:
    """Random geometry over chains of plain and extended images, with and without a data file, and with changes of size."""
    random = Random(seed)
    bits = random.choice([14, 14, 16, 18, 21])
    cluster = 1 << bits
    size = random.choice([6, 11, 20]) * cluster + random.choice([0, 0, 512, cluster // 2])
    data_file = ",data_file=data" if random.random() < 0.3 else ""
    backing: tuple[str, ...] = ()
    for name in ("base", "middle")[: random.randrange(3)]:
        extended = random.choice(["on", "off"])
        options = f"extended_l2={extended},cluster_size={random.choice([16 * KiB, cluster])}"
        below = size - random.choice([0, 3 * cluster // 2 // 512 * 512])
        pair.both("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, name, str(below))
        for command in commands(random, below, cluster, 3):
            pair.both("qemu-io", "-c", command, name)
        backing = ("-b", name, "-F", "qcow2")
    options = f"extended_l2=on,cluster_size={cluster}{data_file}"
    real, ours = pair.both("qemu-img", "create", "-f", "qcow2", "-o", options, *backing, "image", str(size))
    assert real == ours
    for _ in range(4):
        for command in commands(random, size, cluster, 8):
            pair.both("qemu-io", *(("-d", "unmap") if random.random() < 0.3 else ()), "-c", command, "image")
        pair.agree("image")
        if random.random() < 0.4:
            # What is cut off inside a cluster comes back in 7.2 when the disk grows again, so whole ones are cut off.
            size = random.choice([size + cluster, size + 1536, max(size // 2 // cluster, 2) * cluster])
            pair.both("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", "image", str(size))
            pair.agree("image")


def damaged(image: bytes, entry: int | None, states: int | None, index: int = 1) -> bytes:
    """The image with other words in an L2 entry."""
    raw = bytearray(image)
    (l1,) = struct.unpack_from(">Q", raw, 40)
    table = struct.unpack_from(">Q", raw, l1)[0] & 0x00FFFFFFFFFFFE00
    for at, word in ((table + 16 * index, entry), (table + 16 * index + 8, states)):
        if word is not None:
            struct.pack_into(">Q", raw, at, word)
    return bytes(raw)


@pytest.mark.parametrize(
    ("name", "entry", "states"),
    [
        ("data and zero at once", None, 1 << 32 | 0xFFFFFFFF),
        ("data without a host cluster", 0, 1),
        ("data without a host cluster, further on", 0, 1 << 5),
        ("a compressed cluster with states", 1 << 62 | 0x60000, 1 << 40),
        ("zero without a host cluster", 0, 1 << 40),
        ("nothing, but space", None, 0),
    ],
)
def test_entries_that_contradict_themselves_are_met_as_the_real_one_meets_them(
    pair: Pair, name: str, entry: int | None, states: int | None
) -> None:
    """What can be read is read, what cannot fails, and the check counts as much."""
    pair.both("qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "image", "1M")
    pair.both("qemu-io", "-c", "write -P 3 0 192k", "image")
    image = damaged((pair.real / "image").read_bytes(), entry, states)
    for where in (pair.real, pair.ours):
        (where / "image").write_bytes(image)
    for at in (0, 64 * KiB, 66 * KiB, 74 * KiB, 80 * KiB, 126 * KiB, 128 * KiB):
        code, _ = pair.theirs(pair.real, "qemu-io", "-r", "-c", f"read {at} 2k", "image")
        own, _ = pair.own(pair.ours, "qemu-io", "-r", "-c", f"read {at} 2k", "image")
        assert (at, own) == (at, code)
    code, text = pair.theirs(pair.real, "qemu-img", "check", "--output=json", "image")
    own, ours = pair.own(pair.ours, "qemu-img", "check", "--output=json", "image")
    assert own == code
    keys = ("corruptions", "check-errors")
    assert [json.loads(ours).get(key) for key in keys] == [json.loads(text).get(key) for key in keys]
    pair.both("qemu-io", "-c", "write 64k 64k", "image")


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("backing", ["", "base"])
def test_preallocated_subclusters_show_the_backing_file(pair: Pair, mode: str, backing: str) -> None:
    """Space is there, data are not; without a backing file all of it is data."""
    if backing:
        pair.both("qemu-img", "create", "-q", "-f", "qcow2", "base", "1M")
        pair.both("qemu-io", "-c", "write -P 5 100k 500k", "base")
    words = ("-b", "base", "-F", "qcow2") if backing else ()
    options = f"extended_l2=on,preallocation={mode}"
    pair.both("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *words, "image", "1000k")
    pair.agree("image")
    pair.both("qemu-io", "-c", "write -P 6 90k 30k", "-c", "write -P 7 999k 1k", "image")
    pair.agree("image")


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_clusters_lie_beside_subclusters(pair: Pair, kind: str) -> None:
    """Written by either side, overwritten in parts, which makes all of the cluster data."""
    options = f"extended_l2=on,compression_type={kind}"
    pair.both("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "image", "1M")
    pair.both("qemu-io", "-c", "write -c -P 1 0 192k", "-c", "write -P 2 70k 3k", "-c", "write -z 130k 10k", "image")
    pair.agree("image")
    pair.both("qemu-io", "-c", "write -z 0 64k", "-c", "write -c -P 3 256k 64k", "-c", "discard 256k 64k", "image")
    pair.agree("image")
    source = Random(4).randbytes(300 * KiB) + bytes(MiB)
    for where in (pair.real, pair.ours):
        (where / "source").write_bytes(source)
    pair.both("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "source", "packed")
    assert pair.agree("packed") == source


def test_internal_snapshots_keep_subclusters(pair: Pair) -> None:
    """A snapshot shares clusters: what is written after it moves only the subclusters that hold data."""
    pair.both("qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "image", "1M")
    pair.both("qemu-io", "-c", "write -P 1 10k 10k", "-c", "write -z 40k 10k", "-c", "write -P 2 192k 64k", "image")
    before = pair.agree("image")
    pair.both("qemu-img", "snapshot", "-c", "s", "image")
    pair.agree("image")
    pair.both("qemu-io", "-c", "write -P 3 15k 2k", "-c", "write -P 4 55k 1k", "-c", "write -z 200k 6k", "image")
    after = pair.agree("image")
    assert after != before
    pair.both("qemu-img", "snapshot", "-a", "s", "image")
    assert pair.agree("image") == before
    pair.both("qemu-io", "-c", "discard 192k 64k", "image")
    pair.both("qemu-img", "snapshot", "-d", "s", "image")
    pair.agree("image")


@pytest.mark.parametrize("options", ["extended_l2=on,cluster_size=8k", "extended_l2=on,compat=0.10"])
def test_what_cannot_have_subclusters_is_refused_alike(pair: Pair, options: str) -> None:
    """Nothing is left of it."""
    pair.both("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "image", "1M")
    assert not (pair.ours / "image").exists()


def test_images_say_that_they_have_subclusters(pair: Pair) -> None:
    """In info and in the size that is measured."""
    pair.both("qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k", "image", "100M")
    texts = pair.both("qemu-img", "info", "--output=json", "image")
    answers = [json.loads(text) for text in texts]
    assert answers[0]["format-specific"] == answers[1]["format-specific"]
    assert answers[1]["format-specific"]["data"]["extended-l2"] is True
    for text in ("extended_l2=on", "extended_l2=on,cluster_size=16k"):
        measured = pair.both("qemu-img", "measure", "--output=json", "-O", "qcow2", "-o", text, "--size", "10G")
        assert json.loads(measured[0]) == json.loads(measured[1])
