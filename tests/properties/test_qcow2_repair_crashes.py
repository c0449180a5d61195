"""Crashes in the middle of amending and repairing qcow2 images: the image is as it was, or as it was to become."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from qblock.driver import CheckFix, CheckResult
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.testing.crash import CrashStorage
from qblock.testing.formats import FormatBench
from qblock.testing.simloop import run

SIZE = 96 << 10
BOTH = CheckFix.LEAKS | CheckFix.ERRORS


async def made(random: Random, *, snapshot: bool, **options: Any) -> tuple[FormatBench, bytes]:
    """An image of 512-byte clusters with random content, closed; and what its disk holds."""
    bench = FormatBench(Qcow2Driver)
    await bench.create(size=SIZE, cluster_size=512, **options)
    disk = await bench.open()
    model = bytearray(SIZE)
    for turn in range(40):
        at, length = random.randrange(SIZE // 512 - 16) * 512, random.randrange(1, 16) * 512
        if random.random() < 0.8:
            data = random.randbytes(length)
            await disk.write(at, data)
            model[at : at + length] = data
        else:
            await disk.discard(at, length)
            model[at : at + length] = bytes(length)
        if snapshot and turn == 20:
            driver: Any = bench.node.driver
            await driver.create_snapshot("before")
    await bench.close()
    return bench, bytes(model)


async def content_of(image: bytes) -> bytes:
    other = FormatBench(Qcow2Driver)
    disk = await other.open(content=image, flags={"read_only": True})
    return await disk.read(0, disk.length)


def crashes(storage: CrashStorage, random: Random) -> list[bytes]:
    """The images that kills and power cuts would have left at any moment."""
    moments = range(len(storage.effects) + 1)
    kills = [storage.after_kill(moment) for moment in moments]
    return kills + [storage.after_power_cut(moment, random) for moment in moments for _ in range(3)]


AMENDMENTS = [
    ({"refcount_bits": 1}, {}, False),
    ({"refcount_bits": 2}, {"refcount_bits": 64}, True),
    ({"refcount_bits": 64}, {"refcount_bits": 8}, True),
    ({"refcount_bits": 16, "compat": "0.10"}, {"refcount_bits": 4}, False),
    ({"compat": "1.1", "refcount_bits": 8, "lazy_refcounts": True}, {"version": "v2"}, True),
    ({"compat": "0.10"}, {}, False),
    ({"compat": "1.1", "size": SIZE * 4}, {"version": "v2"}, False),
]


@pytest.mark.parametrize(("amendments", "options", "snapshot"), AMENDMENTS)
def test_a_crash_while_amending_leaves_an_image_that_is_whole(
    amendments: dict[str, Any], options: dict[str, Any], snapshot: bool
) -> None:
    """After a kill or a power cut at any moment there are leaks at most, and the disk holds what it held."""

    async def main() -> None:
        for seed in range(3):
            random = Random(seed)
            bench, model = await made(random, snapshot=snapshot, **options)
            await bench.open()
            driver: Any = bench.node.driver
            await driver.amend(amendments, lambda done, total: None)
            await bench.close()
            size = amendments.get("size", SIZE)
            assert await content_of(bench.content) == model + bytes(size - SIZE)
            result = await bench.check()
            assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.findings
            for image in crashes(bench.storage, random):
                result = await bench.check(image)
                assert (result.corruptions, result.check_errors) == (0, 0), result.findings
                assert (await content_of(image))[:SIZE] == model

    run(main)


def broken(content: bytes, random: Random) -> bytes:
    """An image with wrong refcounts, wrong COPIED flags and perhaps without its refcount table."""
    image = bytearray(content)

    def number(at: int, size: int = 8) -> int:
        return int.from_bytes(image[at : at + size], "big")

    table, l1 = number(48), number(40)
    blocks = [offset for index in range(number(56, 4) * 64) if (offset := number(table + 8 * index))]
    for _ in range(12):
        at = random.choice(blocks) + 2 * random.randrange(256)
        image[at : at + 2] = random.choice((0, 1, 2, 7)).to_bytes(2, "big")
    for index in range(number(36, 4)):
        l2 = number(l1 + 8 * index) & 0x00FFFFFFFFFFFE00
        for at in range(l2, l2 + 512 if l2 else 0, 8):
            if number(at) and random.random() < 0.1:
                image[at] ^= 0x80
    if random.random() < 0.4:
        image[table : table + 8] = random.choice(
            (bytes(8), (len(image) + 4096).to_bytes(8, "big"), b"\0" * 6 + b"\2\1")
        )
    return bytes(image)


def dangers(result: CheckResult) -> set[tuple[str, int]]:
    """What endangers data, by kind and place. Leaks and COPIED flags follow from other damage as it is mended."""
    found = {(one.kind, one.place.offset) for one in result.details if one.place is not None and not one.fixed}
    return {(kind, at) for kind, at in found if kind not in ("leak", "copied-flag")}


def test_a_crash_during_repair_leaves_no_damage_that_was_not_there() -> None:
    """Each write of a repair mends something by itself: what a crash leaves was wrong before, and a second repair ends it."""

    async def main() -> None:
        for seed in range(12):
            random = Random(seed)
            bench, model = await made(random, snapshot=seed % 2 == 0)
            damaged = broken(bench.content, random)
            before = await bench.check(damaged)
            repairing = FormatBench(Qcow2Driver)
            await repairing.open(content=damaged, flags={"to_check": True})
            driver: Any = repairing.node.driver
            await driver.check(BOTH)
            await repairing.close()
            after = await repairing.check()
            assert (after.corruptions, after.leaks, after.check_errors) == (0, 0, 0), after.findings
            assert await content_of(repairing.content) == model
            for image in crashes(repairing.storage, random):
                result = await bench.check(image)
                assert dangers(result) <= dangers(before), seed
                assert await content_of(image) == model
                last = FormatBench(Qcow2Driver)
                result = await last.check(image, BOTH)
                assert (result.corruptions, result.leaks) == (result.corruptions_fixed, result.leaks_fixed)
                assert await content_of(last.content) == model

    run(main)
