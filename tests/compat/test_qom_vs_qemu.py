"""The properties of devices, as qom-get and `info qtree` show them in qemu-system-x86_64 and in qblock-system."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from qmp_pair import Pair, do, hmp, running, transcript

DISKS: Final = {"n1": 64 << 20, "n2": 1 << 20, "n3": 100 << 30, "n4": 4 << 20, "n5": 1 << 30}
OPTIONS: Final = (
    *(
        word
        for name, size in DISKS.items()
        for word in ("-blockdev", f"driver=null-co,node-name={name},read-zeroes=on,size={size}")
    ),
    "-device", "virtio-blk-pci,id=v,drive=n1,serial=SN1",
    "-device", "virtio-scsi-pci,id=s",
    "-device", "scsi-hd,id=h,drive=n2,bus=s.0,serial=S2,cyls=16,heads=4,secs=32,bootindex=2,write-cache=off",
    "-device", "ide-hd,id=i,drive=n3,bus=ide.0,unit=1",
    "-device", "ide-hd,id=j,drive=n5,bus=ide.1,unit=1,cyls=1030,heads=8,secs=63",
    "-device", "ide-cd,id=c,drive=n4,bus=ide.1,unit=0,serial=CD",
    "-device", "scsi-cd,id=e,bus=s.0",
)  # fmt: skip
LINE: Final = ("-S", "-nodefaults", "-display", "none", "-machine", "pc", *OPTIONS, "-qmp", "unix:{socket},server=on,wait=off")
PROGRAMS: Final = Pair(real=("qemu-system-x86_64", *LINE), ours=(sys.executable, "-m", "qblock.tools.system", *LINE))
BACKEND: Final = "/machine/peripheral/v/virtio-backend"
PATHS: Final = ("v", BACKEND, "s", "h", "i", "j", "c", "e", "/machine/peripheral", "/machine/peripheral-anon")
OTHERWISE: Final = {"parent_bus", "seg_max_adjust"}
"""What depends on what else a board has."""


def _properties(argv: Any, place: Path) -> dict[tuple[str, str], Any]:
    """All properties of all paths, with their types."""
    place.mkdir()
    found = {}
    with running(argv, place) as connection:
        connection.execute({"execute": "qmp_capabilities"})
        for path in PATHS:
            _, listed = connection.execute(do("qom-list", path=path))
            for entry in listed["return"]:
                _, got = connection.execute(do("qom-get", path=path, property=entry["name"]))
                found[path, entry["name"]] = (entry["type"], got.get("return"))
    return found


def test_properties_of_disks_have_the_values_of_the_real_ones(tmp_path: Path) -> None:
    """Serial numbers, geometry, addresses, block sizes: those that were given, and those that nobody has given."""
    real = _properties(PROGRAMS.real, tmp_path / "real")
    ours = _properties(PROGRAMS.ours, tmp_path / "ours")
    assert ours.keys() <= real.keys()
    differing = {key: (real[key], ours[key]) for key in ours if real[key] != ours[key] and key[1] not in OTHERWISE}
    assert not differing
    for path in (BACKEND, "h", "i", "c", "e"):
        mine = {name for owner, name in ours if owner == path}
        assert mine == {name for owner, name in real if owner == path and not name.startswith("legacy-")}


def test_the_tree_of_devices_is_shown_in_the_same_lines(tmp_path: Path) -> None:
    """People read it; what is not about a disk is left out here on both sides."""
    shown = []
    for name, argv in (("real", PROGRAMS.real), ("ours", PROGRAMS.ours)):
        (step,) = transcript(argv, tmp_path / name, [hmp("info qtree")])
        blocks = re.split(r"\n(?= *(?:dev|bus): )", step["reply"]["return"].replace("\r", ""))
        disks = [block for block in blocks if re.search(r"dev: (?:scsi-hd|scsi-cd|ide-hd|ide-cd|virtio-blk-device), ", block)]
        shown.append(sorted(sorted({line.strip() for line in disk.splitlines()}) for disk in disks))
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    "step",
    [
        do("qom-get", path="h", property="nosuch"),
        do("qom-get", path="/machine/nosuch", property="type"),
        do("qom-list", path="nosuch"),
        do("qom-set", path="h", property="serial", value="x"),
        do("qom-set", path="h", property="nosuch", value="x"),
        do("qom-list-properties", typename="nosuch"),
        do("device-list-properties", typename="nosuch"),
        do("device-list-properties", typename="secret"),
        do("query-command-line-options", option="nosuch"),
        do("query-balloon"),
    ],
    ids=lambda step: "-".join([step["execute"], *step.get("arguments", {}).values()]),
)
def test_questions_without_an_answer_are_refused_alike(step: dict[str, Any], tmp_path: Path) -> None:
    """The class of an error is what a client decides by."""
    classes = []
    for name, argv in (("real", PROGRAMS.real), ("ours", PROGRAMS.ours)):
        (seen,) = transcript(argv, tmp_path / name, [step])
        classes.append(seen["reply"]["error"]["class"])
    assert classes[0] == classes[1]


def test_the_parameters_of_options_are_listed_as_by_the_real_program(tmp_path: Path) -> None:
    """Management software looks here for what it may say; displays and shared directories are left out."""
    listed = []
    for name, argv in (("real", PROGRAMS.real), ("ours", PROGRAMS.ours)):
        (seen,) = transcript(argv, tmp_path / name, [do("query-command-line-options")])
        groups = {one["option"]: {p["name"]: p["type"] for p in one["parameters"]} for one in seen["reply"]["return"]}
        listed.append({name: known for name, known in groups.items() if name not in ("", "vnc", "virtfs", "fsdev")})
    assert listed[0] == listed[1]
