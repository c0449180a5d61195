"""`qblock-img check` beside the real one on damaged images: verdict, exit code, and what repair leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from damaged import DAMAGES, Patch, make_sound
from qblock.tools.img import main

Outcome = tuple[int, dict[str, Any] | None]
Check = Callable[..., Outcome]

NOT_LIKE_QEMU = {
    # It frees everything that only the lost L1 table knows of; we repair nothing.
    ("l1-table-beyond", "leaks"), ("l1-table-beyond", "all"),
    # It gives up; we say that only '-r all' helps, which is no report either.
    ("table-on-l1", "leaks"), ("table-on-l2", "leaks"),
}  # fmt: skip
CASES = [
    (name, image)
    for name in DAMAGES
    for image in ("plain", "snapshot")
    if (name, image) != ("table-too-long", "snapshot")
]
"""We read no snapshot table that lies inside of the refcount table."""
ENDS_DIFFER = {"table-on-l2", "table-on-l1", "table-on-data", "block-unaligned"}
"""Where refcounts cannot be read at all, so that it does not know how far the image is in use. We go by the references."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images to be damaged."""
    directory = tmp_path_factory.mktemp("sound")
    images = {"plain": directory / "plain.qcow2", "snapshot": directory / "snapshot.qcow2"}
    make_sound(images["plain"])
    make_sound(images["snapshot"], cluster_size=4096, snapshot=True)
    return images


def report_of(text: str) -> dict[str, Any] | None:
    report: dict[str, Any] | None = json.loads(text) if text.strip() else None
    return {key: value for key, value in report.items() if key != "filename"} if report else None


def qemu_check(path: Path, *options: str) -> Outcome:
    result = subprocess.run(
        ["qemu-img", "check", "--output=json", *options, path], capture_output=True, text=True, check=False
    )
    return result.returncode, report_of(result.stdout)


@pytest.fixture
def our_check(capfd: pytest.CaptureFixture[str]) -> Check:
    """Runs qblock-img check in this process."""

    def run(path: Path, *options: str) -> Outcome:
        capfd.readouterr()
        code = main(["check", "--output=json", *options, str(path)])
        return code, report_of(capfd.readouterr().out)

    return run


def damaged(sound: Path, name: str, directory: Path) -> tuple[Path, Path]:
    """Two copies of an image with this damage: for the real program, and for ours."""
    patch = Patch(sound)
    DAMAGES[name](patch)
    theirs, ours = directory / "theirs.qcow2", directory / "ours.qcow2"
    theirs.write_bytes(patch.raw)
    shutil.copy(theirs, ours)
    return theirs, ours


def comparable(name: str, report: dict[str, Any] | None) -> dict[str, Any] | None:
    if report is None or name not in ENDS_DIFFER:
        return report
    return {key: value for key, value in report.items() if key != "image-end-offset"}


@pytest.mark.parametrize(("name", "image"), CASES)
def test_the_verdict_is_that_of_the_real_program(
    name: str, image: str, sound: dict[str, Path], tmp_path: Path, our_check: Check
) -> None:
    """Exit code and every number of the report agree, whatever is wrong; and looking changes nothing."""
    theirs, ours = damaged(sound[image], name, tmp_path)
    before = ours.read_bytes()
    code, report = qemu_check(theirs)
    our_code, our_report = our_check(ours)
    assert (our_code, comparable(name, our_report)) == (code, comparable(name, report))
    assert ours.read_bytes() == before


@pytest.mark.parametrize(("name", "image"), CASES)
def test_repairing_leaks_does_what_the_real_program_does(
    name: str, image: str, sound: dict[str, Path], tmp_path: Path, our_check: Check
) -> None:
    """Also with -r leaks, which lets everything else alone; what is left has the same verdict."""
    if (name, "leaks") in NOT_LIKE_QEMU:
        pytest.skip("see the table")
    theirs, ours = damaged(sound[image], name, tmp_path)
    expected = qemu_check(theirs, "-r", "leaks")
    code, report = our_check(ours, "-r", "leaks")
    assert (code, comparable(name, report)) == (expected[0], comparable(name, expected[1]))
    assert qemu_check(ours)[0] == qemu_check(theirs)[0]


@pytest.mark.parametrize(("name", "image"), CASES)
def test_repair_mends_all_that_the_real_program_mends(
    name: str, image: str, sound: dict[str, Path], tmp_path: Path, our_check: Check
) -> None:
    """After -r all both programs find in our image no more than in theirs, and the disk reads the same."""
    if (name, "all") in NOT_LIKE_QEMU:
        pytest.skip("see the table")
    theirs, ours = damaged(sound[image], name, tmp_path)
    code, report = qemu_check(theirs, "-r", "all")
    our_code, our_report = our_check(ours, "-r", "all")
    left, our_left = qemu_check(theirs), qemu_check(ours)
    assert our_code in (code, 0)
    if report is not None and our_report is not None:
        assert our_report.get("corruptions", 0) == report.get("corruptions", 0)
        assert our_report.get("leaks", 0) == report.get("leaks", 0)
    assert our_left[0] in (left[0], 0)
    if not our_left[0]:
        assert our_left[1] is not None
        assert our_check(ours) == our_left
        assert not ours.read_bytes()[79] & 3, "the dirty and corrupt bits are cleared"
    if not left[0]:
        content = subprocess.run(["qemu-img", "compare", "-q", theirs, ours], check=False)
        assert content.returncode != 1, "2 and more: what was cut off can be read by nobody"


def test_explain_names_the_guest_range_and_the_users(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`--explain` says which part of the disk a wrong refcount concerns: the question that numbers leave open."""
    image = tmp_path / "image.qcow2"
    make_sound(image, cluster_size=4096, snapshot=True)
    patch = Patch(image)
    host = patch.host(3)
    patch.put(patch.count(host), 1, 2)
    image.write_bytes(patch.raw)
    assert main(["check", "--explain", "--output=json", str(image)]) == 2
    captured = capfd.readouterr()
    assert not captured.err
    low = next(one for one in json.loads(captured.out)["findings"] if one["kind"] == "refcount-too-low")
    assert low["place"] == {"start": host, "length": 4096}
    assert low["guest"] == [{"start": 3 * 4096, "length": 4096}]
    assert low["users"] == ["data", "data of snapshot 1 (before)"]
    assert not low["repaired"]
    assert main(["check", "--explain", "-r", "all", str(image)]) == 0
    text = capfd.readouterr().out
    assert "concerns:  0x3000 to 0x4000 (4096 bytes) of the disk" in text
    assert "This has been repaired." in text
