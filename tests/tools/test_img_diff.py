"""``qblock-img diff``: which ranges of two disks differ, and which layer holds them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qblock.tools.io import main as io_main

Run = Callable[..., tuple[int, str, str]]
SECTOR = 512


def write(image: str, *commands: str) -> None:
    """Run qblock-io commands on an image."""
    assert io_main([word for command in commands for word in ("-c", command)] + [image]) == 0


@pytest.fixture
def family(img: Run) -> Run:
    """``base`` with 1 MiB of data, and its overlays ``left`` and ``right``, written in different places."""
    assert img("create", "-q", "-f", "qcow2", "base", "4M")[0] == 0
    write("base", "write -q -P 1 0 1M")
    for name in ("left", "right"):
        assert img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", name)[0] == 0
    write("left", "write -q -P 2 512k 64k", "write -q -P 1 0 64k")
    write("right", "write -q -z 768k 64k", "write -q -P 9 2M 512")
    return img


def found(img: Run, *args: str) -> Any:
    return json.loads(img("diff", "--output=json", *args)[1])


def test_each_range_names_the_layer_of_each_side(family: Run) -> None:
    """What was rewritten with the same bytes is no difference; zeroes over data are one."""
    code, out, err = family("diff", "left", "right")
    assert (code, err) == (1, "")
    assert out.splitlines() == [
        "Offset          Length          First               Second",
        "0x80000         0x10000         data in left        data in base",
        "0xc0000         0x10000         data in base        zero in right",
        "0x200000        0x200           held by no layer    data in right",
        "3 ranges, 128 KiB (131584 bytes)",
    ]


def test_json_tells_the_same(family: Run) -> None:
    """Sides with depth, file and kind; sums at the end."""
    told = found(family, "left", "right")
    assert told["a"] == {"virtual-size": 4 << 20, "layers": ["left", "base"]}
    assert told["differences"][1] == {
        "start": 768 << 10,
        "length": 64 << 10,
        "a": {"depth": 1, "filename": "base", "kind": "data"},
        "b": {"depth": 0, "filename": "right", "kind": "zero"},
    }
    assert (told["different-bytes"], told["identical"]) == ((128 << 10) + 512, False)


def test_equal_disks_end_with_zero(family: Run) -> None:
    """Whatever the formats and layers are; -q says nothing."""
    assert family("convert", "-O", "raw", "left", "flat")[0] == 0
    assert family("diff", "left", "flat") == (0, "Images are identical.\n", "")
    assert family("diff", "-q", "left", "flat") == (0, "", "")
    assert family("diff", "-q", "left", "right") == (1, "", "")
    told = found(family, "left", "flat")
    assert (told["differences"], told["identical"]) == ([], True)


def test_a_surplus_counts_when_it_is_not_zero_or_with_s(img: Run) -> None:
    """As compare has it; the shorter side has nothing there."""
    for name, size in (("short", "1M"), ("long", "2M")):
        assert img("create", "-q", "-f", "raw", name, size)[0] == 0
    words = ("-f", "raw", "-F", "raw", "short", "long")
    code, out, _ = img("diff", *words)
    assert code == 0 and "different sizes" in out and out.endswith("identical.\n")
    assert img("diff", "-s", "-q", *words)[0] == 1
    assert found(img, "-s", *words)["identical"] is False
    write("long", "write -q -P 5 1536k 512")
    told = found(img, *words)["differences"]
    assert [(each["start"], each["length"], each["a"]) for each in told] == [(1536 << 10, 512, None)]


def test_data_that_both_take_from_one_file_are_not_read(family: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise two overlays of a big base would cost reading it twice."""
    from qblock.backend import BlockBackend

    places = []
    genuine = BlockBackend.read_into

    async def noting(self: BlockBackend, offset: int, buffer: memoryview) -> None:
        places.append(offset >> 10)
        await genuine(self, offset, buffer)

    monkeypatch.setattr(BlockBackend, "read_into", noting)
    assert family("diff", "left", "right")[0] == 1
    assert sorted(set(places)) == [0, 512, 768, 2048]


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_random_disks_differ_where_their_sectors_do(img: Run, seed: int, tmp_path: Path) -> None:
    """Against a comparison of the plain contents."""
    rng = random.Random(seed)
    size = 1 << 20
    assert img("create", "-q", "-f", "qcow2", "base", str(size))[0] == 0
    write("base", *(_random_write(rng, size) for _ in range(8)))
    for name in ("a", "b"):
        cluster = rng.choice([512, 4096, 65536])
        options = ("-o", f"cluster_size={cluster}", "-b", "base", "-F", "qcow2")
        assert img("create", "-q", "-f", "qcow2", *options, name)[0] == 0
        write(name, *(_random_write(rng, size) for _ in range(8)))
        assert img("convert", "-O", "raw", name, f"{name}.raw")[0] == 0
    plain = [(tmp_path / f"{name}.raw").read_bytes() for name in "ab"]
    expected = {at for at in range(0, size, SECTOR) if plain[0][at : at + SECTOR] != plain[1][at : at + SECTOR]}
    told = found(img, "a", "b")["differences"]
    sectors = [at for each in told for at in range(each["start"], each["start"] + each["length"], SECTOR)]
    assert len(sectors) == len(set(sectors)) and set(sectors) == expected and expected


def _random_write(rng: random.Random, size: int) -> str:
    offset = rng.randrange(size // SECTOR) * SECTOR
    length = min(size - offset, rng.randrange(1, 200) * SECTOR)
    return f"write -q {rng.choice(['-z', '-P 1', '-P 2'])} {offset} {length}"


@pytest.mark.parametrize(
    ("words", "code"),
    [(["left"], 1), (["left", "nothing"], 2), (["--output=xml", "left", "left"], 1), (["-z", "left", "right"], 1)],
)
def test_what_cannot_be_compared_is_refused(family: Run, words: list[str], code: int) -> None:
    """The exit codes of compare, with a line that says why."""
    ended, out, err = family("diff", *words)
    assert (ended, out) == (code, "") and err.startswith("qblock-img: ")
