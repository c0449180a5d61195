"""``qblock-img bitmap`` and ``convert --bitmaps`` by themselves. (tests/compat holds them against the real ones.)"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qblock.tools.io import main as io_main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def img(img: Run) -> Run:
    """Runs qblock-img in an empty directory that has an image ``disk``: exit code, standard output, standard error."""
    assert img("create", "-q", "-f", "qcow2", "disk", "8M")[0] == 0
    return img


def bitmaps(img: Run, image: str = "disk") -> Any:
    return json.loads(img("info", "--output=json", image)[1])["format-specific"]["data"].get("bitmaps")


def test_operations_are_done_in_the_order_given(img: Run) -> None:
    """Add, then switch off, in one call; removing and adding again gives an empty one of another granularity."""
    assert img("bitmap", "--add", "--disable", "-g", "4k", "disk", "a") == (0, "", "")
    assert bitmaps(img) == [{"flags": [], "name": "a", "granularity": 4096}]
    assert img("bitmap", "--remove", "--add", "--granularity=1M", "disk", "a")[0] == 0
    assert bitmaps(img) == [{"flags": ["auto"], "name": "a", "granularity": 1 << 20}]


def test_what_was_done_before_a_failure_stays_done(img: Run) -> None:
    """As with the real one: an operation that fails ends the call, not the ones before it."""
    code, _, err = img("bitmap", "--add", "--merge", "nope", "--remove", "disk", "a")
    assert code == 1 and "Operation merge on bitmap a failed" in err and "'nope'" in err
    assert [bitmap["name"] for bitmap in bitmaps(img)] == ["a"]


@pytest.mark.parametrize(
    "words",
    [
        ["disk", "a"],
        ["--add", "disk"],
        ["--add", "disk", "a", "b"],
        ["--clear", "-g", "4k", "disk", "a"],
        ["--clear", "-b", "disk", "disk", "a"],
        ["--merge", "x", "-F", "qcow2", "disk", "a"],
        ["--add", "-f", "qcow2", "--image-opts", "driver=qcow2,file.filename=disk", "a"],
        ["--add", "-g", "100", "disk", "a"],
        ["--add", "-g", "4x", "disk", "a"],
        ["--add", "disk", ""],
        ["--add", "disk", "x" * 1024],
        ["--add", "-f", "raw", "disk", "a"],
        ["--add", "nothing", "a"],
        ["--bogus", "disk", "a"],
        *[[operation, "disk", "missing"] for operation in ("--remove", "--clear", "--enable", "--disable")],
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(img: Run, words: list[str]) -> None:
    """Exit code 1 and a line that says why."""
    code, out, err = img("bitmap", *words)
    assert code == 1 and not out and err.startswith("qblock-img: ")
    assert bitmaps(img) is None


def test_a_bitmap_is_merged_from_another_image(img: Run) -> None:
    """-b names the file with the source; sizes must agree."""
    assert img("create", "-q", "-f", "qcow2", "other", "8M")[0] == 0
    assert img("create", "-q", "-f", "qcow2", "longer", "9M")[0] == 0
    for name in ("disk", "other", "longer"):
        assert img("bitmap", "--add", name, "a")[0] == 0
    assert io_main(["-c", "write -q 1M 1M", "other"]) == 0
    assert img("bitmap", "--merge", "a", "-b", "other", "-F", "qcow2", "disk", "a")[0] == 0
    assert img("bitmap", "--merge", "a", "-b", "longer", "disk", "a")[0] == 1
    assert img("convert", "--bitmaps", "-O", "qcow2", "disk", "copy")[0] == 0
    assert bitmaps(img, "copy") == bitmaps(img)
    assert img("check", "copy")[0] == img("check", "disk")[0] == 0


def test_an_inconsistent_bitmap_is_shown_and_refused_until_it_is_removed(img: Run) -> None:
    """What a killed program leaves; here its mark is set by hand."""
    assert img("bitmap", "--add", "disk", "a")[0] == 0
    image = Path("disk")
    raw = bytearray(image.read_bytes())
    flags_to_name = b"\0\0\0\2" + b"\1\x10" + b"\0\1" + b"\0\0\0\0" + b"a"
    raw[raw.index(flags_to_name) + 3] |= 1
    image.write_bytes(raw)
    assert bitmaps(img)[0]["flags"] == ["in-use", "auto"]
    for operation in ("--clear", "--enable", "--disable", "--add"):
        assert img("bitmap", operation, "disk", "a")[0] == 1
    assert img("resize", "disk", "16M")[0] == 1
    code, _, err = img("convert", "--bitmaps", "-O", "qcow2", "disk", "copy")
    assert code == 1 and "--skip-broken-bitmaps" in err and not Path("copy").exists()
    code, _, err = img("convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "disk", "copy")
    assert code == 0 and "'a'" in err and bitmaps(img, "copy") is None
    assert img("bitmap", "--remove", "--add", "disk", "a")[0] == 0
    assert bitmaps(img)[0]["flags"] == ["auto"]
    assert img("check", "disk")[0] == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--skip-broken-bitmaps", "disk", "copy"],
        ["--bitmaps", "disk", "disk", "copy"],
        ["--bitmaps", "-O", "raw", "disk", "copy"],
        ["--bitmaps", "-f", "raw", "disk", "copy"],
        ["--bitmaps", "-o", "compat=0.10", "disk", "copy"],
    ],
)
def test_bitmaps_that_cannot_be_copied_end_convert_before_it_copies(img: Run, words: list[str]) -> None:
    """Nothing is left of the output."""
    assert img("bitmap", "--add", "disk", "a")[0] == 0
    code, _, err = img("convert", *(["-O", "qcow2"] if "-O" not in words else []), *words)
    assert code == 1 and err and not Path("copy").exists()
