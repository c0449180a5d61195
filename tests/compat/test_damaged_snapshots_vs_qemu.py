"""Snapshot tables that are damaged in many ways: what the check finds and what repair leaves, beside the real qemu-img."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compat.test_snapshots_vs_qemu import our_io, ours, real

pytestmark = pytest.mark.qemu

Damage = Callable[[bytearray, int], None]


def put(offset: int, code: str, value: int, *, entry: bool = False) -> Damage:
    """Write a number into the header, or into the first entry of the snapshot table."""

    def damage(image: bytearray, table: int) -> None:
        struct.pack_into(">" + code, image, offset + (table if entry else 0), value)

    return damage


def extra(length: int) -> Damage:
    """Give the first entry so much extra data: cut off what it has, or add to it."""

    def damage(image: bytearray, table: int) -> None:
        entry = image[table : table + 40]
        struct.pack_into(">I", entry, 36, length)
        known = bytes(image[table + 40 : table + 64]).ljust(length, b"Z")[:length]
        changed = bytes(entry) + known + b"1s1"
        changed += bytes(-len(changed) % 8) + bytes(image[table + 72 : table + 144])
        image[table : table + len(changed)] = changed

    return damage


DAMAGES: dict[str, Damage] = {
    "table behind the end of the file": put(64, "Q", 0x10000000),
    "one entry too many": put(60, "I", 3),
    "l1 too large": put(8, "I", 0x500000, entry=True),
    "l1 larger than needed": put(8, "I", 1000, entry=True),
    "l1 empty": put(8, "I", 0, entry=True),
    "l1 not aligned": put(0, "Q", 0x70001, entry=True),
    "l1 behind the end of the file": put(0, "Q", 0x70000000, entry=True),
    "extra data of 8 bytes": extra(8),
    "no extra data": extra(0),
    "extra data of 16 bytes": extra(16),
    "extra data of 1000 bytes": extra(1000),
    "two snapshots of one id": put(72 + 64, "B", 0x31, entry=True),
    "disk size odd": put(48, "Q", 0x400100, entry=True),
    "disk size huge": put(48, "Q", 1 << 62, entry=True),
}
REFUSED_BY_THE_REAL_ONE: dict[str, Damage] = {
    "table not aligned": put(64, "Q", 0xB0008),
    "4294967295 entries": put(60, "I", 0xFFFFFFFF),
    "extra data of 1200 bytes": extra(1200),
    "extra data of 4 GiB": put(36, "I", 0xFFFFFFF0, entry=True),
}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image with two snapshots, as the real tools make it."""
    image = tmp_path_factory.mktemp("healthy") / "a.qcow2"
    real("create", "-q", "-f", "qcow2", image, "4M")
    for value, name in ((1, "s1"), (2, "s2")):
        subprocess.run(["qemu-io", "-c", f"write -P {value} 0 64k", str(image)], check=True, stdout=subprocess.DEVNULL)
        real("snapshot", "-c", name, image)
    return image.read_bytes() + bytes(65536)


def damaged(healthy: bytes, damage: Damage, path: Path) -> Path:
    image = bytearray(healthy)
    damage(image, struct.unpack_from(">Q", image, 64)[0])
    path.write_bytes(image)
    return path


def checked(tool: Any, image: Path, *repair: str) -> dict[str, Any]:
    code, out = tool("check", "--output=json", *repair, image)
    found: dict[str, Any] = json.loads(out) if out else {}
    kept = ("corruptions", "leaks", "check-errors", "corruptions-fixed", "leaks-fixed")
    return {"code": code, **{key: found[key] for key in kept if key in found}}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_check_finds_what_the_real_one_finds(name: str, healthy: bytes, tmp_path: Path) -> None:
    """The same verdict without repair; after it, what is left is clean for both, and the same snapshots are there."""
    image = damaged(healthy, DAMAGES[name], tmp_path / "a.qcow2")
    before = checked(real, image)
    found = checked(ours, image)
    assert found["code"] == before["code"]
    assert found.get("corruptions") == before.get("corruptions")
    assert found.get("leaks") == before.get("leaks")
    theirs = damaged(healthy, DAMAGES[name], tmp_path / "b.qcow2")
    assert checked(ours, image, "-r", "all")["code"] == checked(real, theirs, "-r", "all")["code"]
    assert checked(real, image) == checked(real, theirs)
    assert listed(real, image) == listed(real, theirs) == listed(ours, image)


def listed(tool: Any, image: Path) -> Any:
    return json.loads(tool("info", "--output=json", image)[1]).get("snapshots")


@pytest.mark.parametrize("action", ["-a", "-d"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_snapshots_are_used_or_refused_as_the_real_one_does(
    name: str, action: str, healthy: bytes, tmp_path: Path
) -> None:
    """The exit code, and that nothing gets worse by it."""
    image = damaged(healthy, DAMAGES[name], tmp_path / "a.qcow2")
    theirs = damaged(healthy, DAMAGES[name], tmp_path / "b.qcow2")
    before = checked(real, image).get("corruptions", 0)
    code = ours("snapshot", action, "s1", image)[0]
    assert code == real("snapshot", action, "s1", theirs)[0] or (code == 1 and "l1" in name and "behind" in name)
    assert checked(real, image).get("corruptions", 0) <= before


@pytest.mark.parametrize("name", REFUSED_BY_THE_REAL_ONE)
def test_a_table_that_cannot_be_read_to_its_end_still_lets_the_disk_be_read(
    name: str, healthy: bytes, tmp_path: Path
) -> None:
    """The real one does not open such images at all; writing is refused here, too, until they are repaired."""
    image = damaged(healthy, REFUSED_BY_THE_REAL_ONE[name], tmp_path / "a.qcow2")
    raw = tmp_path / "a.raw"
    assert ours("convert", "-O", "raw", image, raw)[0] == 0
    assert raw.read_bytes() == b"\2" * 65536 + bytes(4 * 1024 * 1024 - 65536)
    assert ours("snapshot", "-c", "more", image)[0] == 1
    assert checked(ours, image)["code"] == checked(real, image)["code"] == 1
    assert checked(ours, image, "-r", "leaks")["code"] == 1
    repaired = checked(ours, image, "-r", "all")["code"]
    assert repaired == (1 if name == "table not aligned" else 0)
    if not repaired:
        assert checked(real, image)["code"] == 0
        assert ours("snapshot", "-c", "more", image)[0] == ("entries" in name), "unless there is no room for another one"
        our_io(image, "write -P 3 0 64k")
        assert checked(real, image)["code"] == 0
