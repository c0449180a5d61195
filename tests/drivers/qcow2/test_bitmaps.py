"""Persistent bitmaps of the qcow2 driver: stored, loaded, never too clean, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import struct
from pathlib import Path
from random import Random
from typing import Any

import attrs
import pytest

from qblock import requests
from qblock.backend import BlockBackend
from qblock.bitmaps import freeze
from qblock.dirty import DirtyBitmap
from qblock.drivers.file.driver import FileDriver, FileOptions
from qblock.drivers.qcow2 import header as head
from qblock.drivers.qcow2.bitmap_directory import (
    BitmapEntry,
    Directory,
    encode_directory,
    parse_directory,
    parse_extension,
)
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.drivers.qcow2.header import Extension, encode_header, parse_header
from qblock.drivers.qcow2.options import Qcow2Options
from qblock.errors import BlockIOError, CommandError, CorruptImage, ImageError
from qblock.permissions import ChildRole
from qblock.testing.formats import FormatBench
from qblock.testing.nodes import NodeBench
from qblock.testing.simloop import run
from qblock.units import KiB, MiB

SIZE = 256 * KiB
CLUSTER = 4 * KiB
READ_ONLY = {"read_only": True}


async def made(**options: Any) -> FormatBench:
    bench = FormatBench(Qcow2Driver)
    await bench.create(**{"size": SIZE, "cluster_size": CLUSTER, **options})
    return bench


def driver_of(bench: FormatBench) -> Qcow2Driver:
    driver = bench.node.driver
    assert isinstance(driver, Qcow2Driver)
    return driver


def add(bench: FormatBench, name: str, granularity: int = 512, **state: Any) -> DirtyBitmap:
    bitmap = DirtyBitmap(bench.node.length, granularity, name, persistent=True, **state)
    driver_of(bench).check_new_bitmap(bitmap)
    bench.node.dirty_bitmaps.append(bitmap)
    return bitmap


async def written(bench: FormatBench, *names: str) -> BlockBackend:
    """The open image, with bitmaps of these names and one write at 8 KiB recorded, after a close."""
    disk = await bench.open()
    for name in names:
        add(bench, name)
    await disk.write(8 * KiB, b"w" * 1000)
    await bench.close()
    return await bench.open()


async def reopen(bench: FormatBench, *, read_only: bool) -> None:
    driver = bench.node.driver
    await driver.prepare_reopen(driver.options, read_only=read_only)
    bench.node.read_only = read_only
    driver.commit_reopen(driver.options, read_only=read_only)
    await driver.settle_reopen()


async def clean(bench: FormatBench) -> None:
    result = await bench.check()
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.findings


def directory(image: bytes) -> tuple[int, int]:
    """File offsets of the header extension's content and of the directory."""
    at = struct.unpack_from(">I", image, 100)[0]
    while struct.unpack_from(">I", image, at)[0] != head.EXT_BITMAPS:
        at += 8 + -(-struct.unpack_from(">I", image, at + 4)[0] // 8) * 8
    return at + 8, struct.unpack_from(">Q", image, at + 24)[0]


def patched(image: bytes, offset: int, code: str, value: int) -> bytes:
    changed = bytearray(image)
    struct.pack_into(">" + code, changed, offset, value)
    return bytes(changed)


# ------------------------------------------------------------------------------------------------------ store and load


@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
@pytest.mark.parametrize("granularity", [512, 4096, 1 << 31])
def test_what_a_bitmap_recorded_is_there_when_the_image_is_opened_again(cluster_bits: int, granularity: int) -> None:
    """The point of it all: another program, days later, asks what has changed."""

    async def main() -> None:
        bench = await made(size=64 * MiB, cluster_size=1 << cluster_bits)
        random = Random(cluster_bits + granularity)
        disk = await bench.open()
        recorded = add(bench, "recorded", granularity)
        off = add(bench, "off", granularity, enabled=False)
        off.mark(MiB, 5 * MiB)
        for _ in range(60):
            await disk.write(random.randrange(64 * MiB - 5000), random.randbytes(random.randrange(1, 5000)))
        before = {bitmap.name: (bitmap.sha256(), bitmap.enabled, bitmap.granularity) for bitmap in (recorded, off)}
        await bench.close()
        await clean(bench)
        for flags in (READ_ONLY, {}):
            await bench.open(flags=dict(flags))
            found = bench.node.dirty_bitmaps
            assert {bitmap.name: (bitmap.sha256(), bitmap.enabled, bitmap.granularity) for bitmap in found} == before
            assert [bitmap.name for bitmap in found] == ["off", "recorded"]  # new ones are stored newest first
            assert all(bitmap.persistent and not bitmap.inconsistent for bitmap in found)
            assert all(bitmap.readonly == bool(flags) for bitmap in found)

    run(main)


def test_storing_again_and_again_reuses_the_space() -> None:
    """Each closing writes bitmaps to fresh clusters; those of the time before become free."""

    async def main() -> None:
        bench = await made()
        await written(bench, "a", "b")
        for _ in range(6):
            await bench.close()
            await clean(bench)
            await bench.open()
        length = len(bench.content)
        for _ in range(6):
            await bench.close()
            await bench.open()
        assert len(bench.content) <= length

    run(main)


def test_an_image_killed_while_open_has_inconsistent_bitmaps_that_can_only_be_removed() -> None:
    """Nobody knows what was written since they were stored: they must not look usable."""

    async def main() -> None:
        bench = await made()
        await written(bench, "a", "b")
        killed = bytes(bench.storage.live)
        await bench.open(content=killed)
        assert [(b.inconsistent, b.enabled, b.count) for b in bench.node.dirty_bitmaps] == [(True, False, 0)] * 2
        bench.node.dirty_bitmaps.pop()
        await driver_of(bench).forget_bitmap("a")
        await bench.close()
        await clean(bench)
        await bench.open()
        assert [(b.name, b.inconsistent) for b in bench.node.dirty_bitmaps] == [("b", True)]

    run(main)


def test_removing_the_last_bitmap_leaves_no_trace() -> None:
    """The header extension goes, and the autoclear bit with it."""

    async def main() -> None:
        bench = await made()
        before = parse_header(bench.content, "image")
        await written(bench, "a")
        bench.node.dirty_bitmaps.clear()
        await driver_of(bench).forget_bitmap("a")
        await bench.close()
        await clean(bench)
        header = parse_header(bench.content, "image")
        assert header.extension(head.EXT_BITMAPS) is None and not header.autoclear
        assert header.incompatible == before.incompatible

    run(main)


def test_a_node_made_read_only_stores_its_bitmaps_and_one_made_writable_marks_them() -> None:
    """blockdev-reopen: the file is right while the node is read-only, and says that it may not be from then on."""

    async def main() -> None:
        bench = await made()
        disk = await written(bench, "a")
        bitmap = bench.node.dirty_bitmaps[0]
        await disk.write(100 * KiB, b"x")
        await reopen(bench, read_only=True)
        assert bitmap.readonly
        with pytest.raises(BlockIOError):
            await disk.write(0, b"x")
        image = bytes(bench.storage.live)
        other = FormatBench(Qcow2Driver)
        await other.open(content=image, flags=READ_ONLY)
        assert [(b.sha256(), b.inconsistent) for b in other.node.dirty_bitmaps] == [(bitmap.sha256(), False)]
        await reopen(bench, read_only=False)
        assert not bitmap.readonly
        await other.open(content=bytes(bench.storage.live), flags=READ_ONLY)
        assert other.node.dirty_bitmaps[0].inconsistent
        await disk.write(0, b"x")
        await bench.close()
        await clean(bench)
        await bench.open()
        assert bench.node.dirty_bitmaps[0].sha256() == bitmap.sha256() and bitmap.get(0)

    run(main)


def test_a_reopen_that_fails_after_storing_marks_the_bitmaps_again() -> None:
    """The node goes on being written to: what was stored for the change is not true any more."""

    async def main() -> None:
        bench = await made()
        disk = await written(bench, "a")
        driver = bench.node.driver
        await driver.prepare_reopen(driver.options, read_only=True)
        driver.abort_reopen()
        await driver.settle_reopen()
        await disk.write(0, b"x")
        await disk.flush()
        await bench.open(content=bytes(bench.storage.live), flags=READ_ONLY)
        assert bench.node.dirty_bitmaps[0].inconsistent

    run(main)


def test_a_bitmap_in_use_is_stored_with_what_its_successor_recorded() -> None:
    """A job that is still there when the image is closed must not cost a single write."""

    async def main() -> None:
        bench = await made()
        disk = await written(bench, "a")
        freeze(bench.node, bench.node.dirty_bitmaps[0])
        await disk.write(40 * KiB, b"x")
        await bench.close()
        await bench.open()
        bitmap = bench.node.dirty_bitmaps[0]
        assert bitmap.get(40 * KiB) and bitmap.get(8 * KiB) and bitmap.enabled

    run(main)


def test_a_bitmap_follows_the_size_of_the_disk() -> None:
    """What is added is clean, what is cut off is gone; a bitmap that nobody may use stands in the way."""

    async def main() -> None:
        bench = await made()
        disk = await written(bench, "a")
        await disk.write(SIZE - 512, b"e" * 512)
        await disk.truncate(3 * SIZE)
        await disk.write(3 * SIZE - 512, b"e" * 512)
        await bench.close()
        await clean(bench)
        disk = await bench.open()
        bitmap = bench.node.dirty_bitmaps[0]
        assert bitmap.size == 3 * SIZE and [run.offset for run in bitmap.iterate()] == [8 * KiB, SIZE - 512, 3 * SIZE - 512]
        await disk.truncate(SIZE // 2)
        await bench.close()
        await clean(bench)
        disk = await bench.open()
        assert [run.offset for run in bench.node.dirty_bitmaps[0].iterate()] == [8 * KiB]
        disk = await bench.open(content=bytes(bench.storage.live))
        with pytest.raises(BlockIOError, match="inconsistent"):
            await disk.truncate(SIZE)

    run(main)


@pytest.mark.parametrize(
    ("options", "granularity", "words"),
    [({"version": "v2"}, 512, "version 2"), ({"size": 1 << 42}, 512, "larger granularity"), ({}, 1 << 32, "granularities")],
)
def test_what_could_not_be_stored_is_refused_when_it_is_added(options: dict[str, Any], granularity: int, words: str) -> None:
    """Learning that at the end, when the recording is lost, would be too late."""

    async def main() -> None:
        bench = await made(**{"cluster_size": 64 * KiB, **options})
        await bench.open()
        with pytest.raises(CommandError, match=words):
            add(bench, "a", granularity)

    run(main)


@pytest.mark.parametrize("failing", range(14))
def test_storing_fails_at_any_write_without_harm(failing: int) -> None:
    """A full disk: what was claimed is given back and storing can be tried again, or the image is left as after a crash."""

    async def main() -> None:
        bench = await made()
        disk = await written(bench, "a", "b")
        await disk.write(0, b"x" * 512)
        await disk.flush()
        hashes = [bitmap.sha256() for bitmap in bench.node.dirty_bitmaps]
        bench.storage.failure, bench.storage.fail_writes = errno.ENOSPC, failing
        failed = False
        try:
            await driver_of(bench).store_bitmaps()
        except BlockIOError:
            failed = True
        bench.storage.fail_writes = None
        assert failed or failing > 8
        if bench.node.poisoned is None:
            await disk.write(4096, b"y" * 512)
            hashes = [bitmap.sha256() for bitmap in bench.node.dirty_bitmaps]
            await bench.close()
            await clean(bench)
        image = bytes(bench.storage.live)
        result = await bench.check(content=image)
        assert (result.corruptions, result.check_errors) == (0, 0), result.findings
        poisoned = bench.node.poisoned
        await bench.open(content=image, flags=READ_ONLY)
        for bitmap, expected in zip(bench.node.dirty_bitmaps, hashes, strict=True):
            assert bitmap.sha256() == expected or (bitmap.inconsistent and poisoned)

    run(main)


def test_a_node_that_is_healed_by_reopening_keeps_its_bitmaps() -> None:
    """A snapshot that fails half-way poisons the node; what its bitmaps recorded is still right, and stored at the end."""

    async def main() -> None:
        bench = await made()
        disk = await written(bench, "a")
        await disk.write(100 * KiB, b"x")
        for bench.storage.fail_writes in range(100):
            with contextlib.suppress(BlockIOError):
                await driver_of(bench).create_snapshot("s")
            if bench.node.poisoned is not None:
                break
            bench.storage.fail_writes = None
        bench.storage.fail_writes = None
        await reopen(bench, read_only=False)
        await disk.write(200 * KiB, b"y")
        bitmap = bench.node.dirty_bitmaps[0]
        assert bitmap.get(8 * KiB) and bitmap.get(100 * KiB) and bitmap.get(200 * KiB)
        await bench.close()
        result = await bench.check()
        assert (result.corruptions, result.check_errors) == (0, 0), result.findings
        await bench.open(flags=READ_ONLY)
        assert bench.node.dirty_bitmaps[0].sha256() == bitmap.sha256()

    run(main)


def test_a_guest_cannot_write_over_the_bitmap_directory() -> None:
    """A damaged L2 entry that points there: the write is stopped, and the image marked corrupt."""

    async def main() -> None:
        bench = await made()
        disk = await written(bench, "a")
        await bench.close()
        _, at = directory(bench.content)
        header = parse_header(bench.content, "image")
        table = struct.unpack_from(">Q", bench.content, header.l1_offset)[0] & ((1 << 56) - 512)
        image = patched(bench.content, table + 8 * (8 * KiB // CLUSTER), "Q", 1 << 63 | at)
        disk = await bench.open(content=image)
        with pytest.raises(BlockIOError, match="bitmap-directory"):
            await disk.write(8 * KiB, b"x" * CLUSTER)
        assert parse_header(bytes(bench.storage.live), "image").has(head.CORRUPT)

    run(main)


# ------------------------------------------------------------------------------------------------------------ crashes


async def history(bench: FormatBench, random: Random) -> dict[str, bytes]:
    """Openings and closings with writes and changes of bitmaps; gives each bitmap's content of the disk when it was added."""
    bases: dict[str, bytes] = {}
    disk = await bench.open()
    effects = bench.storage
    for session in range(4):
        for step in range(6):
            await _step(bench, disk, random, f"b{session}.{step}", bases)
        if random.random() < 0.5:
            await reopen(bench, read_only=True)
            await reopen(bench, read_only=False)
        else:
            await bench.node.driver.close()
            bench.node.dirty_bitmaps.clear()
            driver = Qcow2Driver(bench.node, bench.node.driver.options, bench.env)
            bench.node.driver = driver
            await driver.open()
        assert bench.storage is effects
    await bench.node.driver.close()
    return bases


async def _step(bench: FormatBench, disk: BlockBackend, random: Random, name: str, bases: dict[str, bytes]) -> None:
    dice, bitmaps = random.random(), bench.node.dirty_bitmaps
    if dice < 0.5:
        offset = random.randrange(SIZE - 9000)
        await disk.write(offset, random.randbytes(random.randrange(1, 9000)))
    elif dice < 0.6:
        await disk.flush()
    elif dice < 0.7:
        offset = random.randrange(SIZE // CLUSTER) * CLUSTER
        await disk.discard(offset, min(SIZE - offset, 4 * CLUSTER))
    elif dice < 0.75:
        driver = driver_of(bench)
        if driver.snapshots() and random.random() < 0.5:
            await driver.delete_snapshot(driver.snapshots()[0])
        else:
            await driver.create_snapshot(name)
    elif dice < 0.9 or not bitmaps:
        bases[name] = bytes(await disk.read(0, SIZE))
        add(bench, name, random.choice([512, 4096]))
    else:
        gone = random.choice(bitmaps)
        bitmaps.remove(gone)
        await driver_of(bench).forget_bitmap(str(gone.name))


@pytest.mark.parametrize("seed", range(6))
def test_after_a_crash_no_bitmap_claims_less_than_what_was_written(seed: int) -> None:
    """Whatever reached the medium: no errors but leaks, and where a usable bitmap is clean the disk is as it was at its start."""

    async def main() -> None:
        random = Random(seed)
        bench = await made(cluster_size=random.choice([512, 4096]))
        bases = await history(bench, random)
        storage = bench.storage
        moments = range(len(storage.effects) + 1)
        for moment in random.sample(moments, min(len(moments), 40)):
            for image in (storage.after_kill(moment), storage.after_power_cut(moment, random)):
                await _survived(image, bases)

    run(main)


async def _survived(image: bytes, bases: dict[str, bytes]) -> None:
    crashed = FormatBench(Qcow2Driver)
    disk = await crashed.open(content=image, flags=READ_ONLY)
    result = await crashed.check(content=image)
    assert (result.corruptions, result.check_errors) == (0, 0), result.findings
    disk = await crashed.open(content=image, flags=READ_ONLY)
    content = await disk.read(0, SIZE)
    for bitmap in crashed.node.dirty_bitmaps:
        if bitmap.inconsistent:
            continue
        base, step = bases[str(bitmap.name)], bitmap.granularity
        for at in range(0, SIZE, step):
            assert bitmap.get(at) or content[at : at + step] == base[at : at + step], (bitmap.name, at)


# ------------------------------------------------------------------------------------------------------- odd and hostile


def test_bitmaps_that_a_program_without_them_left_behind_are_ignored_and_dropped() -> None:
    """The autoclear bit is gone: somebody wrote without recording. Reading warns; writing drops the reference."""

    async def main() -> None:
        bench = await made()
        await written(bench, "a")
        await bench.close()
        image = patched(bench.content, 88, "Q", 0)
        await bench.open(content=image, flags=READ_ONLY)
        assert bench.node.dirty_bitmaps == [] and bytes(bench.storage.live) == image
        await bench.open(content=image)
        assert bench.node.dirty_bitmaps == []
        await bench.close()
        assert parse_header(bench.content, "image").extension(head.EXT_BITMAPS) is None
        result = await bench.check()
        assert result.corruptions == 0 and result.leaks == 3

    run(main)


@pytest.mark.parametrize("compatible", [True, False])
def test_extra_data_of_a_bitmap_is_kept_and_decides_whether_it_may_be_used(compatible: bool) -> None:
    """The format has a flag for it: without the flag somebody who does not understand the data must leave the bitmap alone."""

    async def main() -> None:
        bench = await made()
        await written(bench, "12345678")
        await bench.close()
        extension, at = directory(bench.content)
        image = bytearray(bench.content)
        entry = image[at : at + 32]
        struct.pack_into(">I", entry, 12, 2 | 4 * compatible)
        struct.pack_into(">I", entry, 20, 8)
        image[at : at + 40] = entry[:24] + b"\1\2\3\4\5\6\7\x08" + b"12345678"
        struct.pack_into(">Q", image, extension + 8, 40)
        await bench.open(content=bytes(image))
        bitmap = bench.node.dirty_bitmaps[0]
        assert (bitmap.name, bitmap.inconsistent, bitmap.get(8 * KiB)) == ("12345678", not compatible, compatible)
        await bench.close()
        _, at = directory(bench.content)
        kept = parse_directory(bench.content[at : at + 40], 1, CLUSTER, "image")[0]
        assert kept.extra == b"\1\2\3\4\5\6\7\x08" and kept.usable == compatible
        await clean(bench)

    run(main)


def test_clusters_of_ones_without_an_offset_are_all_dirty() -> None:
    """A table entry of 1 stands for a cluster full of ones; QEMU reads such tables, so they may exist."""

    async def main() -> None:
        bench = await made(size=64 * MiB)
        await written(bench, "a")
        await bench.close()
        _, at = directory(bench.content)
        table = struct.unpack_from(">Q", bench.content, at)[0]
        image = patched(bench.content, table + 8, "Q", 1)
        await bench.open(content=image, flags=READ_ONLY)
        bitmap = bench.node.dirty_bitmaps[0]
        covered = CLUSTER * 8 * 512
        assert [(run.offset, run.length) for run in bitmap.iterate()] == [(8 * KiB, KiB), (covered, covered)]

    run(main)


DAMAGES: dict[str, tuple[str, int, str, int]] = {
    "type": ("entry", 16, "B", 2),
    "unknown flag": ("entry", 12, "I", 8),
    "granularity too small": ("entry", 17, "B", 8),
    "granularity too large": ("entry", 17, "B", 32),
    "no name": ("entry", 18, "H", 0),
    "name too long": ("entry", 18, "H", 2000),
    "table not aligned": ("entry", 0, "Q", 512),
    "table behind the end": ("entry", 0, "Q", 1 << 40),
    "no table": ("entry", 0, "Q", 0),
    "table too long": ("entry", 8, "I", 2),
    "table far too long": ("entry", 8, "I", (1 << 32) - 1),
    "table of nothing": ("entry", 8, "I", 0),
    "extra data without end": ("entry", 20, "I", (1 << 32) - 1),
    "no bitmaps": ("extension", 0, "I", 0),
    "more bitmaps": ("extension", 0, "I", 3),
    "too many bitmaps": ("extension", 0, "I", 1 << 31),
    "reserved field": ("extension", 4, "I", 1),
    "directory too short": ("extension", 8, "Q", 24),
    "directory too long": ("extension", 8, "Q", 1 << 40),
    "directory not aligned": ("extension", 16, "Q", 512),
    "directory behind the end": ("extension", 16, "Q", 1 << 40),
    "directory on the header": ("extension", 16, "Q", 0),
    "table entry reserved": ("table", 0, "Q", 2),
    "table entry not aligned": ("table", 0, "Q", 512),
    "table entry both": ("table", 0, "Q", CLUSTER * 3 | 1),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_bitmap_metadata_is_refused(name: str) -> None:
    """An image whose bitmaps cannot be trusted is not opened, with a word on what is wrong."""

    async def main() -> None:
        bench = await made()
        await written(bench, "a", "b")
        await bench.close()
        extension, at = directory(bench.content)
        places = {"extension": extension, "entry": at, "table": struct.unpack_from(">Q", bench.content, at)[0]}
        place, offset, code, value = DAMAGES[name]
        image = patched(bench.content, places[place] + offset, code, value)
        for flags in (READ_ONLY, {}):
            with pytest.raises(CorruptImage):
                await bench.open(content=image, flags=dict(flags))

    run(main)


def test_bitmaps_that_share_their_clusters_without_end_are_refused() -> None:
    """Sixty thousand names for one table would be read sixty thousand times."""

    async def main() -> None:
        bench = await made(size=1024 * MiB)
        await written(bench, *(f"b{number:03}" for number in range(100)))
        bench.node.dirty_bitmaps[0].mark(0, 1024 * MiB)
        name = bench.node.dirty_bitmaps[0].name
        await bench.close()
        extension, at = directory(bench.content)
        count, _, size, _ = struct.unpack_from(">IIQQ", bench.content, extension)
        entries = parse_directory(bench.content[at : at + size], count, CLUSTER, "image")
        table = next(entry.table_offset for entry in entries if entry.name == name)
        image = bytearray(bench.content)
        for number in range(count):
            struct.pack_into(">Q", image, at + 32 * number, table)
        with pytest.raises(CorruptImage, match="more clusters"):
            await bench.open(content=bytes(image), flags=READ_ONLY)

    run(main)


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bits_in_bitmap_metadata_raise_image_errors_only(seed: int) -> None:
    """Open, write, resize, close: a clear error or correct work, never an exception of another kind."""

    async def main() -> None:
        random = Random(seed)
        bench = await made()
        await written(bench, "a", "b")
        await bench.close()
        extension, at = directory(bench.content)
        parse_extension(bench.content[extension : extension + 24], CLUSTER, len(bench.content), "image")
        table = struct.unpack_from(">Q", bench.content, at)[0]
        image = bytearray(bench.content)
        for _ in range(random.randrange(1, 6)):
            start, length = random.choice([(extension, 24), (at, 64), (table, 8), (88, 8)])
            image[start + random.randrange(length)] ^= 1 << random.randrange(8)
        try:
            disk = await bench.open(content=bytes(image))
            await disk.write(random.randrange(SIZE - 600), b"x" * 600)
            await disk.truncate(2 * SIZE)
            await bench.close()
            await bench.open(flags=READ_ONLY)
        except (ImageError, BlockIOError):
            pass

    run(main)


def test_a_flush_of_the_node_does_not_store_bitmaps() -> None:
    """Only closing does: a flush is frequent, and the file says 'in use' until then."""

    async def main() -> None:
        bench = await made()
        disk = await written(bench, "a")
        await disk.write(0, b"x")
        await requests.flush(bench.node)
        await bench.open(content=bytes(bench.storage.live), flags=READ_ONLY)
        assert bench.node.dirty_bitmaps[0].inconsistent

    run(main)


def test_a_small_file_with_a_terabyte_of_holes_is_not_read_through(tmp_path: Path) -> None:
    """Tables of ten thousand bitmaps that lie in holes cost nothing to make, and would take long to read."""

    async def main() -> None:
        bench = await made(size=1 << 36)
        count, length = 11000, 1 << 15
        entries = tuple(BitmapEntry(f"b{number}", (1 << 30) + number * length, length // 8, 9, 2) for number in range(count))
        raw, place = encode_directory(entries), 1 << 29
        extension = Extension(head.EXT_BITMAPS, Directory(count, len(raw), place).encode())
        header = attrs.evolve(parse_header(bench.content, "image"), autoclear=1, extensions=(extension,))
        path = tmp_path / "image"
        with path.open("wb") as file:
            file.write(bench.content)
            file.seek(0)
            file.write(encode_header(header))
            file.seek(place)
            file.write(raw)
            file.truncate(1 << 40)
        nodes = NodeBench()
        storage = await nodes.add(FileDriver, FileOptions(filename=str(path)), read_only=True)
        with pytest.raises(ImageError, match="more clusters"):
            await nodes.add(
                Qcow2Driver, Qcow2Options(file="x"), children={"file": (storage, ChildRole.STORAGE)}, read_only=True
            )

    run(main)
