"""qcow2 images both ways: what the real tools make is read right, what qblock writes is clean and equal to them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qblock.driver import CheckFix, CheckResult, SupportsCheck
from qblock.drivers.file.driver import FileDriver, FileOptions
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.drivers.qcow2.options import Qcow2Options
from qblock.errors import CorruptImage
from qblock.permissions import ChildRole, Perm
from qblock.testing.formats import FormatBench
from qblock.testing.nodes import NodeBench
from qblock.testing.simloop import run
from qblock.units import KiB, MiB


def qemu_img(*args: str | Path, status: int = 0) -> str:
    done = subprocess.run(["qemu-img", *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def qemu_io(path: Path, *commands: str) -> None:
    args = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *args, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr


class Opened:
    """A chain of image files, opened; ``disk`` is a backend on the top."""

    async def open(self, *paths: Path, read_only: bool = True, **options: Any) -> Opened:
        self.bench = NodeBench()
        node = None
        for path in reversed(paths):
            top = path == paths[0]
            storage = await self.bench.add(
                FileDriver, FileOptions(filename=str(path)), read_only=read_only or not top, discard_unmap=True
            )
            children = {"file": (storage, ChildRole.STORAGE)}
            if node is not None:
                children["backing"] = (node, ChildRole.BACKING)
            given = Qcow2Options(file="x", **(options if top else {}))
            node = await self.bench.add(
                Qcow2Driver, given, children=children, read_only=read_only or not top, discard_unmap=True
            )
        assert node is not None
        self.node = node
        writing = Perm.NONE if read_only else Perm.WRITE | Perm.RESIZE
        self.disk = self.bench.backend(node, perm=Perm.CONSISTENT_READ | writing)
        return self

    async def close(self) -> None:
        await self.node.driver.close()
        for node in self.bench.graph.nodes.values():
            if node.driver.is_protocol:
                await node.driver.close()


def content(path: Path, tmp_path: Path) -> bytes:
    """What the real tools read from an image."""
    raw = tmp_path / "content.raw"
    qemu_img("convert", "-O", "raw", path, raw)
    return raw.read_bytes()


def read_by_us(*paths: Path) -> bytes:
    async def main() -> bytes:
        image = await Opened().open(*paths)
        try:
            return await image.disk.read(0, image.disk.length)
        finally:
            await image.close()

    return run(main)


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("cluster", [512, 4096, 65536, 2 * MiB])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_images_of_qemu_read_back_right(tmp_path: Path, cluster: int, compat: str) -> None:
    """Plain, zero and discarded areas, over a backing file, in both versions and all sizes of clusters."""
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster},compat={compat}", base, "6M")
    qemu_io(base, "write -P 1 0 3M", "write -P 2 4100k 333k")
    shape = f"cluster_size={cluster},compat={compat}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", shape, "-b", base, "-F", "qcow2", top, "7M")
    qemu_io(top, "write -P 3 1000k 70k", "write -z 2M 512k", "discard 256k 128k", "write -P 4 6500k 100k")
    assert read_by_us(top, base) == content(top, tmp_path)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", [512, 4096, 65536, 2 * MiB])
def test_compressed_images_read_back_right_and_can_be_overwritten(tmp_path: Path, kind: str, cluster: int) -> None:
    """Compressed clusters share host clusters; writing over one must not harm its neighbours."""
    raw, image = tmp_path / "raw", tmp_path / "image"
    random = Random(cluster)
    data = bytearray(b"".join(random.randbytes(64) * 64 for _ in range(1024)))
    data[MiB : MiB + 300 * KiB] = random.randbytes(300 * KiB)
    raw.write_bytes(data)
    qemu_img("convert", "-c", "-O", "qcow2", "-o", f"cluster_size={cluster},compression_type={kind}", raw, image)
    assert read_by_us(image) == data

    async def main() -> None:
        opened = await Opened().open(image, read_only=False)
        for _ in range(40):
            at, length = random.randrange(3 * MiB), random.randrange(1, 5000)
            piece = random.randbytes(length)
            await opened.disk.write(at, piece)
            data[at : at + length] = piece
        await opened.disk.write_zeroes(3 * MiB, MiB, may_unmap=True)
        data[3 * MiB :] = bytes(len(data) - 3 * MiB)
        await opened.close()

    run(main)
    qemu_img("check", image)
    assert content(image, tmp_path) == data


# ----------------------------------------------------------------------------------------------------------- snapshots


@pytest.mark.parametrize("cluster", [512, 65536])
def test_internal_snapshots_survive_everything_written_later(tmp_path: Path, cluster: int) -> None:
    """Clusters and tables that snapshots share are copied before they are changed; reverting shows the old content."""
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", image, "4M")
    qemu_io(image, "write -P 1 0 1M", "write -P 2 2M 300k")
    qemu_img("snapshot", "-c", "one", image)
    qemu_io(image, "write -P 3 512k 64k")
    qemu_img("snapshot", "-c", "two", image)
    before = content(image, tmp_path)
    expected = bytearray(before)

    async def main() -> None:
        opened, random = await Opened().open(image, read_only=False, overlap_check="all"), Random(cluster)
        for _ in range(60):
            at, length = random.randrange(4 * MiB - 9000), random.randrange(1, 9000)
            data = random.randbytes(length)
            await opened.disk.write(at, data)
            expected[at : at + length] = data
        await opened.disk.discard(2 * MiB, 128 * KiB)
        expected[2 * MiB : 2 * MiB + 128 * KiB] = bytes(128 * KiB)
        await opened.disk.write_zeroes(3 * MiB, 128 * KiB, may_unmap=True)
        expected[3 * MiB : 3 * MiB + 128 * KiB] = bytes(128 * KiB)
        await opened.disk.truncate(9 * MiB)
        await opened.close()

    run(main)
    qemu_img("check", image)
    assert content(image, tmp_path) == expected + bytes(5 * MiB)
    qemu_img("snapshot", "-a", "two", image)
    assert content(image, tmp_path)[: 4 * MiB] == before
    qemu_img("check", image)
    qemu_img("snapshot", "-d", "one", image)
    qemu_img("check", image)


# ------------------------------------------------------------------------------------------------------------ creating

CREATED = [
    {},
    {"size": 512},
    {"size": 0},
    {"cluster_size": 4096, "size": 20 * MiB},
    {"cluster_size": 512},
    {"cluster_size": 2 * MiB, "size": 1 << 40},
    {"version": "v2"},
    {"refcount_bits": 1},
    {"refcount_bits": 64, "lazy_refcounts": True},
    {"compression_type": "zstd"},
    {"backing_file": "base.img", "backing_fmt": "raw"},
    {"size": 1 << 44},
]


@pytest.mark.parametrize("options", CREATED, ids=lambda given: ",".join(f"{k}={v}" for k, v in given.items()) or "default")
def test_a_new_image_equals_that_of_qemu_img_byte_for_byte(tmp_path: Path, options: dict[str, Any]) -> None:
    """Same header, extensions, tables and file length for all options that both have."""
    ours = created(options)
    theirs = tmp_path / "theirs"
    args = {"compat": {"v2": "0.10", "v3": "1.1"}[options.get("version", "v3")]}
    args |= {key: str(value) for key, value in options.items() if key not in ("size", "version")}
    args |= {"lazy_refcounts": "on"} if options.get("lazy_refcounts") else {}
    words = ",".join(f"{key}={value}" for key, value in args.items())
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-o", words, theirs, str(options.get("size", 4 * MiB)))
    assert ours == theirs.read_bytes()


def created(options: dict[str, Any]) -> bytes:
    async def main() -> bytes:
        bench = FormatBench(Qcow2Driver)
        await bench.create(**{"size": 4 * MiB, **options})
        return bench.content

    return run(main)


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocated_images_are_clean_and_empty(tmp_path: Path, cluster: int, mode: str) -> None:
    """All clusters are mapped, the file is as long as that of qemu-img, and everything reads as zeroes."""
    image, theirs = tmp_path / "image", tmp_path / "theirs"
    image.write_bytes(created({"cluster_size": cluster, "preallocation": mode}))
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster},preallocation={mode}", theirs, "4M")
    qemu_img("check", image)
    assert content(image, tmp_path) == bytes(4 * MiB)
    report = json.loads(qemu_img("check", "--output=json", image))
    assert report["allocated-clusters"] == report["total-clusters"]
    assert abs(image.stat().st_size - theirs.stat().st_size) <= 2 * cluster


# ------------------------------------------------------------------------------------------------------------ checking


def check_by_us(path: Path, fix: CheckFix = CheckFix.NONE) -> CheckResult:
    async def main() -> CheckResult:
        opened = await Opened().open(path, read_only=fix is CheckFix.NONE)
        driver = opened.node.driver
        assert isinstance(driver, SupportsCheck)
        result = await driver.check(fix)
        await opened.close()
        return result

    return run(main)


def agrees(ours: CheckResult, path: Path) -> None:
    """Our numbers are those of qemu-img check."""
    command = ["qemu-img", "check", "--output=json", "-f", "qcow2", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    theirs = json.loads(done.stdout)
    found = {
        "corruptions": ours.corruptions,
        "leaks": ours.leaks,
        "check-errors": ours.check_errors,
        "image-end-offset": ours.image_end_offset,
        "total-clusters": ours.total_clusters,
        "allocated-clusters": ours.allocated_clusters,
        "fragmented-clusters": ours.fragmented_clusters,
        "compressed-clusters": ours.compressed_clusters,
    }
    assert found == {key: theirs.get(key, 0) for key in found}, (found, theirs, ours.findings, done.stderr)


def written(tmp_path: Path, cluster: int = 65536) -> Path:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, "4M")
    qemu_io(path, "write -P 1 0 1M", "write -z 2M 256k", "write -P 2 3M 100k", "write -P 3 1500k 100k")
    qemu_io(path, "discard 100k 300k")
    return path


DAMAGE = {
    "nothing": (0, 0),
    "a leak": (2 * 65536 + 2 * 40, 1),
    "a refcount too low": (2 * 65536 + 2 * 6, 0),
    "a refcount too high": (2 * 65536 + 2 * 6, 7),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_counts_what_qemu_img_counts(tmp_path: Path, name: str) -> None:
    """Leaks, corruptions, allocation and fragmentation, in images with damaged refcounts."""
    path, (offset, value) = written(tmp_path), DAMAGE[name]
    if offset:
        raw = bytearray(path.read_bytes())
        raw[offset : offset + 2] = value.to_bytes(2, "big")
        path.write_bytes(raw)
    agrees(check_by_us(path), path)


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
def test_check_agrees_on_images_with_snapshots_and_compression(tmp_path: Path, cluster: int) -> None:
    """Shared and compressed clusters are counted as often as they are used."""
    path, packed = written(tmp_path, cluster), tmp_path / "packed"
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 9 500k 200k")
    agrees(check_by_us(path), path)
    qemu_img("convert", "-c", "-O", "qcow2", "-o", f"cluster_size={cluster}", path, packed)
    agrees(check_by_us(packed), packed)


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("blind", [False, True])
def test_repaired_images_are_clean_for_qemu_img(tmp_path: Path, name: str, blind: bool) -> None:
    """Repairing in place, and (with the refcount table lost) by a new refcount structure, keeps the content."""
    path, (offset, value) = written(tmp_path), DAMAGE[name]
    before = content(path, tmp_path)
    raw = bytearray(path.read_bytes())
    if offset:
        raw[offset : offset + 2] = value.to_bytes(2, "big")
    if blind:
        raw[65536 : 65536 + 8] = bytes(8)
    path.write_bytes(raw)
    check_by_us(path, CheckFix.LEAKS | CheckFix.ERRORS)
    qemu_img("check", path)
    assert content(path, tmp_path) == before


def test_an_image_that_was_not_shut_down_is_repaired_when_opened_for_writing(tmp_path: Path) -> None:
    """With lazy refcounts and the dirty bit the stored counts are worth nothing."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "4M")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 5 0 1M", "-c", "flush", "-c", "sigraise 9", str(path)],
        capture_output=True,
        check=False,
    )
    assert json.loads(qemu_img("info", "--output=json", path))["dirty-flag"]

    async def main() -> None:
        opened = await Opened().open(path, read_only=False)
        await opened.disk.write(MiB, b"\6" * MiB)
        assert await opened.disk.read(0, 2 * MiB) == b"\5" * MiB + b"\6" * MiB
        await opened.close()

    run(main)
    assert not json.loads(qemu_img("info", "--output=json", path))["dirty-flag"]
    qemu_img("check", path)


# ------------------------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
def test_resized_disks_are_clean_and_grow_zeroes(tmp_path: Path, cluster: int) -> None:
    """Growing needs a bigger L1 table elsewhere, shrinking gives clusters up; what comes back reads as zeroes."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, "1M")
    expected = bytearray()

    async def main() -> None:
        opened, random = await Opened().open(path, read_only=False), Random(cluster)
        disk = opened.disk
        length = MiB
        model = bytearray(length)
        for new in (3 * MiB + 512, 700 * KiB + 512, 5 * MiB, 70 * MiB, 2 * MiB, 2 * MiB + 1024):
            data = random.randbytes(min(length, 200 * KiB))
            await disk.write(length - len(data), data)
            model[length - len(data) :] = data
            await disk.truncate(new)
            model = model[:new] + bytes(max(0, new - length))
            length = new
            assert disk.length == new and await disk.read(0, new) == model
        await opened.close()
        expected[:] = model

    run(main)
    qemu_img("check", path)
    assert content(path, tmp_path) == expected


# -------------------------------------------------------------------------------------------------------------- refusing


def test_images_with_features_of_others_are_refused_by_name(tmp_path: Path) -> None:
    """What nobody knows is said by the number of its bit, as the real one does."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    raw = bytearray(path.read_bytes())
    raw[72:80] = (1 << 40).to_bytes(8, "big")
    path.write_bytes(raw)
    with pytest.raises(Exception, match="10000000000"):
        read_by_us(path)
    qemu_img("info", path, status=1)


def test_a_corrupt_image_opens_read_only(tmp_path: Path) -> None:
    """The corrupt bit forbids writing until a repair."""
    path = written(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[79] |= 2
    path.write_bytes(raw)
    assert len(read_by_us(path)) == 4 * MiB
    with pytest.raises(CorruptImage):
        run(lambda: Opened().open(path, read_only=False))
