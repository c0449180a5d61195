"""The options of an open qcow2 image: both daemons take the same values; the tools let them overrule -t and -d."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qblock.tools.img import main as img
from qblock.tools.io import main as io
from qblock.units import GiB, KiB, MiB

from .qmp_pair import DAEMONS, both, do

pytestmark = pytest.mark.qemu

IMAGES = {"v3": "cluster_size=64k", "v2": "compat=0.10", "small": "cluster_size=512", "sub": "extended_l2=on"}
SIZES = (-1, 0, 1, 511, 512, 513, 4 * KiB, 64 * KiB, MiB, 3 * MiB, 1 << 32, 1 << 62)
TOGETHER: tuple[tuple[int | None, int | None, int | None], ...] = (
    (0, 0, 0), (64 * KiB, 64 * KiB, 64 * KiB), (MiB, MiB, None), (MiB, None, MiB), (MiB, MiB, 0), (MiB, None, 2 * MiB),
    (MiB, 2 * MiB, None), (None, 0, 0), (64 * KiB, 0, None), (MiB, 0, 64 * KiB),
)  # fmt: skip
CHECKS: tuple[Any, ...] = (
    "none", "constant", "cached", "all", "bogus", "", True, {}, {"template": "all"}, {"template": "none", "active-l2": True},
    {"template": "bogus"}, {"main-header": True}, {"bitmap-directory": False}, {"foo": True},
)  # fmt: skip
FLAGS = ("lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other")


def option_sets() -> list[dict[str, Any]]:
    """What is tried on each image."""
    names = ("cache-size", "l2-cache-size", "refcount-cache-size")
    sets: list[dict[str, Any]] = [{name: size} for size in SIZES for name in (*names, "l2-cache-entry-size")]
    sets += [{name: size for name, size in zip(names, sizes, strict=True) if size is not None} for sizes in TOGETHER]
    sets += [{"cache-clean-interval": seconds} for seconds in (-1, 0, 1, (1 << 32) - 1, 1 << 32, 1 << 62)]
    sets += [{"l2-cache-entry-size": 4096, "l2-cache-size": size} for size in (4096, 8192)]
    sets += [{"overlap-check": check} for check in CHECKS]
    return sets + [{flag: value} for flag in FLAGS for value in (True, False, None, "on")]


@pytest.mark.parametrize("name", IMAGES)
def test_options_are_taken_and_changed_alike(name: str, tmp_path: Path) -> None:
    """blockdev-add with each set, then a reopen to the defaults and back."""
    script: list[Any] = [do("blockdev-add", driver="file", node_name="f", filename="image")]
    for options in option_sets():
        node = {"driver": "qcow2", "node-name": "q", "file": "f"}
        script += [
            do("blockdev-add", {**node, **options}), do("blockdev-reopen", {"options": [node]}),
            do("blockdev-reopen", {"options": [{**node, **options}]}), do("blockdev-del", {"node-name": "q"}),
        ]  # fmt: skip
    make = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", IMAGES[name], "image", str(GiB))
    real, ours = both(DAEMONS, tmp_path, script, [make])
    for theirs, mine in zip(real, ours, strict=True):
        assert mine == theirs


Program = Callable[[list[str]], int]


def blocks_after(tmp_path: Path, run: Program, *words: str) -> int:
    """KiB that a megabyte of data takes after a discard, with these options of the program and of the image."""
    image = tmp_path / "image"
    image.unlink(missing_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 1 0 4M", image], check=True, stdout=subprocess.DEVNULL)
    assert run([*words[:-1], "--image-opts", "-c", "discard 0 4M", f"driver=qcow2,file.filename={image}{words[-1]}"]) == 0
    return image.stat().st_blocks // 2 // KiB


@pytest.mark.parametrize(
    "words", [("",), (",discard=ignore",), ("-d", "ignore", ""), ("-d", "ignore", ",discard=unmap"), (",discard=off",)]
)
def test_options_of_the_image_overrule_those_of_the_program(words: tuple[str, ...], tmp_path: Path) -> None:
    """Who writes discard=ignore into --image-opts means it, whatever -d is by default."""

    def real(line: list[str]) -> int:
        return subprocess.run(["qemu-io", *line], check=False, stdout=subprocess.DEVNULL).returncode

    assert blocks_after(tmp_path, io, *words) == blocks_after(tmp_path, real, *words)


def test_a_cache_mode_in_the_options_overrules_that_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no-flush in the options nothing is flushed, although -t says writeback."""
    image = tmp_path / "image"
    image.write_bytes(bytes(MiB))
    synced = []
    monkeypatch.setattr("os.fdatasync", synced.append)
    options = f"driver=raw,file.filename={image},cache.no-flush="
    for flushes in (0, 1):
        synced.clear()
        word = "off" if flushes else "on"
        assert img(["bench", "-w", "-c", "1", "-t", "writeback", "--image-opts", f"{options}{word}"]) == 0
        assert bool(synced) is bool(flushes)
