"""Protection of metadata beside the real one: which writes are stopped by which `overlap-check`, and what is left then."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from damaged import COPIED, OFFSETS, Patch, make_sound
from qblock.tools.io import main

AREAS: dict[str, Callable[[Patch], int]] = {
    "main-header": lambda it: 0,
    "active-l1": lambda it: it.l1,
    "active-l2": lambda it: it.l2,
    "refcount-table": lambda it: it.table,
    "refcount-block": lambda it: it.block,
    "snapshot-table": lambda it: it.get(64),
    "inactive-l1": lambda it: it.get(it.get(64)),
    "inactive-l2": lambda it: it.get(it.get(it.get(64))) & OFFSETS,
}
CRASHES_QEMU = {("table", "active-l2", "none"), ("table", "active-l2", "constant")}


def point(it: Patch, at: int) -> list[str]:
    """A guest cluster is mapped onto metadata."""
    it.put(it.entry(0), COPIED | at)
    return ["write -P 9 0 512", "write -P 9 12288 512", "read 0 512", "read 12288 512"]


def free(it: Patch, at: int) -> list[str]:
    """Metadata are counted as free, so that new data would be put there."""
    it.put(it.count(at), 0, 2)
    return ["write -P 9 409600 4096", "write -P 9 413696 4096", "flush", "write 12288 512"]


def table(it: Patch, at: int) -> list[str]:
    """Metadata are counted as free, and a cluster that a snapshot shares gets a new place."""
    it.put(it.count(at), 0, 2)
    return ["write -P 9 12288 512", "flush", "discard 12288 4096", "write 0 512"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with a snapshot, to be damaged."""
    path = tmp_path_factory.mktemp("sound") / "sound.qcow2"
    make_sound(path, cluster_size=4096, snapshot=True)
    return path


def outcome(text: str, image: Path) -> tuple[list[str], int]:
    """What each request came to, and whether the image is marked corrupt."""
    lines = [line for line in text.splitlines() if " failed: " in line or line.startswith(("wrote ", "read "))]
    return lines, image.read_bytes()[79] & 2


@pytest.mark.parametrize("damage", [point, free, table])
@pytest.mark.parametrize("area", AREAS)
def test_the_same_writes_are_stopped_as_by_the_real_program(
    damage: Callable[[Patch, int], list[str]], area: str, sound: Path, tmp_path: Path, capfd: Any
) -> None:
    """With every template and with a single switch: the first error, the corrupt bit, and that nothing works afterwards."""
    single = f"overlap-check.template=none,overlap-check.{area}=on"
    for checks in ("none", "constant", "cached", "all", single):
        if (damage.__name__, area, checks) in CRASHES_QEMU:
            continue
        option = checks if "=" in checks else f"overlap-check={checks}"
        patch = Patch(sound)
        words = [word for command in damage(patch, AREAS[area](patch)) for word in ("-c", command)]
        theirs, ours = tmp_path / "theirs.qcow2", tmp_path / "ours.qcow2"
        for image in (theirs, ours):
            image.write_bytes(patch.raw)
        real = subprocess.run(
            ["qemu-io", "--image-opts", f"driver=qcow2,file.filename={theirs},{option}", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        capfd.readouterr()
        main(["--image-opts", f"driver=qcow2,file.filename={ours},{option}", *words])
        captured = capfd.readouterr()
        said = captured.out + captured.err
        assert outcome(said, ours) == outcome(real.stdout + real.stderr, theirs), checks
