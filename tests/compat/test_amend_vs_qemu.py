"""`qblock-img amend` beside the real one: the same command lines on the same images, and what they leave."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qblock.tools.img import main

SIZE = 4 << 20
CASES = [
    # creation options, whether there is a snapshot, what is amended one after the other
    ("", False, ["compat=0.10"]),
    ("compat=0.10", False, ["compat=1.1", "lazy_refcounts=on,refcount_bits=1", "refcount_bits=64"]),
    ("cluster_size=512", False, ["refcount_bits=1", "refcount_bits=2", "refcount_bits=32", "refcount_bits=16", "compat=0.10"]),
    ("cluster_size=16k", False, ["refcount_bits=8", "refcount_bits=64", "compat=v2,refcount_bits=16", "compat=v3"]),
    ("cluster_size=4k,refcount_bits=8", True, ["refcount_bits=4", "refcount_bits=1", "compat=0.10"]),
    ("cluster_size=512,refcount_bits=64", True, ["refcount_bits=2", "size=8M", "size=2M"]),
    ("cluster_size=4k,compat=0.10", True, ["compat=1.1", "compat=0.10", "refcount_bits=8", "size=8M"]),
    ("lazy_refcounts=on", False, ["lazy_refcounts=off", "lazy_refcounts=on", "compat=0.10"]),
    ("", False, ["backing_file=x", "backing_fmt=raw", "compat=1.2", "refcount_bits=3", "refcount_bits=0", "nonsense=1"]),
    ("", False, ["cluster_size=4k", "preallocation=off", "data_file=x", "data_file_raw=on", "data_file_raw=off"]),
    ("compat=0.10", False, ["refcount_bits=8", "lazy_refcounts=on", "compat=0.10", "compat=1.1,refcount_bits=8"]),
    ("extended_l2=on", False, ["compat=0.10", "refcount_bits=8"]),
    ("refcount_bits=8", False, ["compat=0.10", "compat=0.10,refcount_bits=16"]),
]  # fmt: skip


def qemu(*words: str | Path) -> tuple[int, str]:
    result = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
    return result.returncode, result.stdout


def fill(image: Path, seed: int, *, zeroes: bool) -> None:
    """Random writes, and zeroes where the version has them."""
    source = random.Random(seed)
    words = []
    for _ in range(12):
        at, length = source.randrange(SIZE // 512 - 256) * 512, source.randrange(1, 256) * 512
        command = f"write -P {source.randrange(1, 255)}" if source.random() < 0.7 or not zeroes else "write -z"
        words += ["-c", f"{command} {at} {length}"]
    subprocess.run(["qemu-io", *words, image], check=True, stdout=subprocess.DEVNULL)


def state(image: Path) -> tuple[Any, ...]:
    """What amending may change, as the real program sees it; the image must be sound."""
    code, text = qemu("check", image)
    assert not code, text
    info = json.loads(qemu("info", "--output=json", image)[1])
    return info["virtual-size"], info["format-specific"]["data"], info.get("snapshots") is None


@pytest.mark.parametrize(("options", "snapshot", "amendments"), CASES)
def test_amending_leaves_what_the_real_program_leaves(
    options: str, snapshot: bool, amendments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit codes, what info tells, and the content agree after every step; qemu-img check is clean."""
    theirs, ours, kept = tmp_path / "theirs.qcow2", tmp_path / "ours.qcow2", tmp_path / "kept.qcow2"
    assert not qemu("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), theirs, str(SIZE))[0]
    fill(theirs, 1, zeroes=False)
    if snapshot:
        qemu("snapshot", "-c", "before", theirs)
        fill(theirs, 2, zeroes=False)
    elif "0.10" not in options:
        fill(theirs, 3, zeroes=True)
    shutil.copy(theirs, ours)
    for amendment in amendments:
        shutil.copy(ours, kept)
        code = qemu("amend", "-f", "qcow2", "-o", amendment, theirs)[0]
        assert main(["amend", "-f", "qcow2", "-o", amendment, str(ours)]) == code, amendment
        assert bool(capfd.readouterr().err) is bool(code)
        assert state(ours) == state(theirs), amendment
        assert not qemu("compare", theirs, ours)[0]
        if code:
            assert ours.read_bytes() == kept.read_bytes(), "what is refused changes nothing"
    if snapshot:
        for image in (theirs, ours):
            subprocess.run(["qemu-img", "snapshot", "-a", "before", image], check=True)
        assert not qemu("compare", theirs, ours)[0]


def test_zero_clusters_over_a_backing_file_become_data(tmp_path: Path) -> None:
    """Version 2 has no zero clusters: without that, what the guest zeroed would show the backing file again."""
    base, theirs, ours = tmp_path / "base.qcow2", tmp_path / "theirs.qcow2", tmp_path / "ours.qcow2"
    qemu("create", "-q", "-f", "qcow2", base, str(SIZE))
    fill(base, 5, zeroes=False)
    qemu("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", "-o", "cluster_size=4k", theirs, str(SIZE - 1536))
    fill(theirs, 6, zeroes=True)
    subprocess.run(
        ["qemu-io", "-c", f"write -z {SIZE - 65536} {65536 - 1536}", theirs], check=True, stdout=subprocess.DEVNULL
    )
    shutil.copy(theirs, ours)
    assert not qemu("amend", "-o", "compat=0.10", theirs)[0]
    assert not main(["amend", "-o", f"compat=0.10,backing_file={base},backing_fmt=qcow2", str(ours)])
    assert state(ours) == state(theirs)
    assert not qemu("compare", theirs, ours)[0]


def test_a_data_file_gets_another_name(tmp_path: Path) -> None:
    """The name in the header is changed, and the promise to be raw can be taken back, as by the real program."""
    image, data, moved = tmp_path / "image.qcow2", tmp_path / "data.raw", tmp_path / "moved.raw"
    qemu("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", image, str(SIZE))
    fill(image, 7, zeroes=False)
    assert main(["amend", "-o", "compat=0.10", str(image)]) == 1
    assert not main(["amend", "-o", f"data_file={moved},data_file_raw=off", str(image)])
    data.rename(moved)
    _size, info, _ = state(image)
    assert (info["data-file"], info["data-file-raw"]) == (str(moved), False)


def test_progress_is_printed_as_percentages(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """-p works as everywhere: from 0 to 100, in one line."""
    image = tmp_path / "image.qcow2"
    qemu("create", "-q", "-f", "qcow2", image, str(SIZE))
    assert not main(["amend", "-p", "-o", "refcount_bits=8", str(image)])
    steps = capfd.readouterr().out.rstrip("\n").split("\r")
    assert steps[0].strip() == "(0.00/100%)"
    assert steps[-1].strip() == "(100.00/100%)" or steps[-2].strip() == "(100.00/100%)"


def test_what_can_be_amended_is_listed(capfd: pytest.CaptureFixture[str]) -> None:
    """`-o help` names the same options as the real program."""
    assert not main(["amend", "-f", "qcow2", "-o", "help"])
    ours = [line.split("=")[0].strip() for line in capfd.readouterr().out.splitlines()]
    theirs = [line.split("=")[0].strip() for line in qemu("amend", "-f", "qcow2", "-o", "help")[1].splitlines()]
    assert ours == theirs


def test_large_clusters_are_amended_in_no_time(tmp_path: Path) -> None:
    """With clusters of 2 MiB a refcount block counts millions of clusters, few of which are there. The real one takes minutes."""
    image = tmp_path / "image.qcow2"
    qemu("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", image, str(SIZE))
    fill(image, 8, zeroes=True)
    for amendment in ("refcount_bits=1", "refcount_bits=64", "compat=0.10,refcount_bits=16", "compat=1.1"):
        assert not main(["amend", "-o", amendment, str(image)])
        state(image)
