"""Tables counted as a whole: the answers are those of a loop over entries, and the checks of whole images do not change."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qblock.drivers.qcow2.lanes import plain_entries, plain_pieces
from qblock.drivers.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO, Geometry, Kind, classify
from qblock.tools.img import main

BITS = 16
CLUSTERS = 5000
V3 = Geometry(BITS, 4, 3, 13)

ORDINARY = st.one_of(
    st.just(0),
    st.builds(lambda at: at << BITS | COPIED, st.integers(1, CLUSTERS - 1)),
    st.builds(lambda at: at << BITS, st.integers(1, CLUSTERS - 1)),
)
NEARBY = st.builds(lambda at: at << BITS, st.integers(1, 4))
ODD = st.one_of(
    st.just(COPIED),
    st.just(ZERO),
    st.just(1 << 55 | COPIED),
    st.just(CLUSTERS << BITS | COPIED),
    st.just((7 << BITS) + 512),
    st.just(COMPRESSED | 123),
    st.integers(0, (1 << 64) - 1),
)


@given(st.lists(ORDINARY, min_size=1, max_size=40), st.lists(ODD, max_size=1), st.randoms(use_true_random=False))
def test_a_table_of_plain_data_is_understood_as_by_a_loop(words: list[int], odd: list[int], rng: random.Random) -> None:
    """Whatever is not plain data in the file or nothing makes the table one for the loop."""
    for word in odd:
        words.insert(rng.randrange(len(words) + 1), word)
    plain = plain_entries(array("Q", words), BITS, clusters=CLUSTERS)
    kinds = {classify(word, V3) for word in words}
    hosts = [(word & OFFSET_MASK) >> BITS for word in words if word]
    if not hosts or COPIED in words or not kinds <= {Kind.DATA, Kind.UNALLOCATED} or max(hosts) >= CLUSTERS:
        assert plain is None
        return
    assert plain is not None
    assert plain.clusters.tolist() == hosts
    assert plain.copied is all(word & COPIED for word in words if word)
    follows = [before + 1 == host for before, host in itertools.pairwise(hosts)]
    assert plain.breaks == bytes([0x80, *(0 if yes else 0x80 for yes in follows)])
    assert [first + i for first, count in plain.runs() for i in range(count)] == hosts
    assert len(plain.runs()) == plain.breaks.count(b"\x80")


@given(st.lists(st.one_of(ORDINARY, NEARBY, ODD), max_size=40), st.integers(0, 5))
def test_plain_data_in_a_row_is_told_in_pieces(words: list[int], start: int) -> None:
    """From any entry on, up to the first that is no plain data; each piece ends where the next one lies elsewhere."""
    row: list[int] = []
    for word in words[start:]:
        if classify(word, V3) is not Kind.DATA:
            break
        row.append(word & OFFSET_MASK)
    limit = max(len(words) - start, 0)
    pieces = plain_pieces(array("Q", words), start, limit, BITS)
    assert [place + (i << BITS) for _, count, place in pieces for i in range(count)] == row
    assert [first for first, _, _ in pieces] == [0, *itertools.accumulate(count for _, count, _ in pieces)][: len(pieces)]
    assert all(place + (count << BITS) != after for (_, count, place), (_, _, after) in itertools.pairwise(pieces))
    assert plain_pieces(array("Q", words), start, min(limit, 1), BITS) == [(0, 1, place) for place in row[:1]]


@given(st.lists(st.one_of(st.just(0), st.just(COPIED), ORDINARY, NEARBY, ODD), max_size=40))
def test_pieces_may_have_gaps_between_them(words: list[int]) -> None:
    """Entries without a place are passed by, up to the first that is neither data nor unallocated."""
    row: list[int] = []
    for word in words:
        if classify(word, V3) not in (Kind.DATA, Kind.UNALLOCATED):
            break
        row.append(word & OFFSET_MASK)
    pieces = plain_pieces(array("Q", words), 0, len(words), BITS, gaps=True)
    told = [0] * len(row)
    for first, count, place in pieces:
        told[first : first + count] = range(place, place + (count << BITS), 1 << BITS)
    assert told == row
    joined = [a for a, b in itertools.pairwise(pieces) if a[0] + a[1] == b[0] and a[2] + (a[1] << BITS) == b[2]]
    assert not joined


@pytest.mark.qemu
@pytest.mark.parametrize(("unit", "size"), [(512, 1 << 18), (4096, 1 << 22)])
def test_scattered_images_are_judged_as_by_the_real_check(
    unit: int, size: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Clusters in random order, with a snapshot and writes after it, and then with references that clash; and mapped alike."""
    image = tmp_path / "image"
    rng = random.Random(unit)
    options = ["-o", f"cluster_size={unit}", image, str(size)]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options], check=True)
    order = list(range(size // unit))
    rng.shuffle(order)
    write(image, [f"write -q {at * unit} {unit}" for at in order])
    compare_checks(image, capfd)
    subprocess.run(["qemu-img", "snapshot", "-c", "before", image], check=True)
    write(image, [f"write -q {at * unit} {unit}" for at in order[:300]])
    compare_checks(image, capfd)
    overlay = tmp_path / "overlay"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay], check=True)
    write(overlay, [f"write -q {at * unit} {unit}" for at in order[400:403]])
    compare_answers(overlay, capfd)
    overlay.unlink()
    raw = bytearray(image.read_bytes())
    l1 = int.from_bytes(raw[40:48], "big")
    table = int.from_bytes(raw[l1 : l1 + 8], "big") & OFFSET_MASK
    for _ in range(5):
        source, target = (table + 8 * rng.randrange(unit // 8) for _ in range(2))
        raw[target : target + 8] = raw[source : source + 8]
    image.write_bytes(raw)
    compare_checks(image, capfd)


@pytest.mark.qemu
def test_scattered_data_over_holes_of_the_file_is_mapped_as_by_the_real_program(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the file has lost its blocks clusters read as zeroes: each program asks the file, ours remembers what it heard."""
    image, unit, rng = tmp_path / "image", 4096, random.Random(7)
    options = ["-o", f"cluster_size={unit}", image, "4M"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options], check=True)
    order = list(range(1024))
    rng.shuffle(order)
    write(image, [f"write -q {at * unit} {unit}" for at in order[:900]])
    found = json.loads(subprocess.check_output(["qemu-img", "map", "--output=json", image]))
    for part in found:
        if part["data"] and rng.random() < 0.7:
            hole = ["-o", str(part["offset"]), "-l", str(part["length"])]
            subprocess.run(["fallocate", "--punch-hole", *hole, image], check=True)
    compare_answers(image, capfd)


def write(image: Path, commands: list[str]) -> None:
    script = "\n".join(commands).encode()
    subprocess.run(["qemu-io", "-f", "qcow2", image], input=script, check=True, stdout=subprocess.DEVNULL)


def compare_checks(image: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compare(["check", "--output=json", str(image)], capfd)
    compare_answers(image, capfd)


def compare_answers(image: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["map", "--output=json"], ["map"], ["map", "-s", "70000", "-l", "90000"], ["measure", "-O", "qcow2"]):
        compare([*words, str(image)], capfd)


def compare(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    real = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
    capfd.readouterr()
    code = main(words)
    assert (code, capfd.readouterr().out) == (real.returncode, real.stdout)
