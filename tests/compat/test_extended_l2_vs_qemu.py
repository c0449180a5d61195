"""Extended L2 entries beside the real programs: the same commands on both, each reading what the other has made."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qblock.tools.img import main as our_img
from qblock.tools.io import main as our_io
from qblock.units import KiB, MiB


class Pair:
    """Two directories in which the same commands run: ``real`` with the real programs, ``ours`` with those of qblock."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd
        self.real, self.ours = tmp_path / "real", tmp_path / "ours"
        self.real.mkdir()
        self.ours.mkdir()

    def theirs(self, where: Path, *words: str) -> tuple[int, str]:
        done = subprocess.run(words, cwd=where, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    def own(self, where: Path, *words: str) -> tuple[int, str]:
        self.monkeypatch.chdir(where)
        self.capfd.readouterr()
        code = {"qemu-img": our_img, "qemu-io": our_io}[words[0]](list(words[1:]))
        return code, self.capfd.readouterr().out

    def both(self, *words: str) -> tuple[str, str]:
        """Run on both sides; the exit codes agree. Gives what was printed."""
        code, text = self.theirs(self.real, *words)
        own, ours = self.own(self.ours, *words)
        assert own == code, (words, text, ours)
        return text, ours

    def layout(self, where: Path, image: str) -> list[dict[str, Any]]:
        """The map of an image as both programs print it, which is the same; offsets are told only as there or not."""
        maps = [json.loads(run(where, "qemu-img", "map", "--output=json", image)[1]) for run in (self.theirs, self.own)]
        shift, told = [[joined(areas, exact=exact) for areas in maps] for exact in (True, False)]
        assert shift[0] == shift[1]
        return told[0]

    def agree(self, image: str) -> bytes:
        """Each side's image is clean, has one map and reads alike for both programs, and maps what the other does."""
        contents = []
        for where in (self.real, self.ours):
            for run in (self.theirs, self.own):
                code, text = run(where, "qemu-img", "check", image)
                assert code == 0, text
                code, _ = run(where, "qemu-img", "convert", "-O", "raw", image, "content.out")
                assert code == 0
                contents.append((where / "content.out").read_bytes())
        assert len(set(contents)) == 1
        assert self.layout(self.real, image) == self.layout(self.ours, image)
        return contents[0]


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
            size = random.choice([size + cluster, size + 1536, size // 2 // 512 * 512])
            pair.both("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", "image", str(size))
            pair.agree("image")
