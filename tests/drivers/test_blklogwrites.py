"""The log of blklogwrites: its entries, its superblock, going on with an old one; a disk can be made again from it."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest

from qblock.backend import BlockBackend
from qblock.drivers.blklogwrites import ENTRY, MAGIC, SUPER, EntryFlag
from qblock.errors import BlockIOError, CommandError, CorruptImage, InvalidParameter
from qblock.opening import Opener, OpenPolicy
from qblock.permissions import Perm
from qblock.registry import DriverRegistry
from qblock.testing.nodes import NodeBench
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SIZE = 64 * KiB


class Place:
    """A bench with an opener, a disk and a log."""

    def __init__(self, log: bytes = b"") -> None:
        self.bench = NodeBench()
        self.opener = Opener(self.bench.graph, DriverRegistry(), self.bench.env, OpenPolicy.deny())
        self.old_log = log

    async def open(self, **options: Any) -> BlockBackend:
        """The filter, with options whose names have ``_`` for ``-``."""
        log = await self.opener.open_blockdev({"driver": "memory", "size": len(self.old_log), "node-name": "log"})
        log.monitor_owned = True
        if self.old_log:
            backend = self.bench.backend(log)
            await backend.write(0, self.old_log)
            backend.close()
        given = {key.replace("_", "-"): value for key, value in options.items()}
        base = {"driver": "blklogwrites", "node-name": "l", "log": "log", "discard": "unmap"}
        disk = {"driver": "memory", "size": SIZE, "node-name": "disk", "discard": "unmap"}
        node = await self.opener.open_blockdev({**base, "file": disk, **given})
        return self.bench.backend(node)

    async def log(self) -> bytes:
        """What the log holds now."""
        backend = BlockBackend(self.bench.graph, perm=Perm.NONE, shared=Perm.ALL)
        backend.insert(self.bench.graph.nodes["log"])
        content = await backend.read(0, backend.length)
        backend.close()
        return content


def entries(log: bytes, count: int | None = None) -> list[tuple[int, int, int, bytes]]:
    """Sector, number of sectors, flags and data of each entry; ``count`` is that of the superblock by default."""
    magic, version, written, size = SUPER.unpack_from(log)
    assert (magic, version) == (MAGIC, 1)
    result, at = [], 1
    for _ in range(written if count is None else count):
        sector, sectors, flags, mark = ENTRY.unpack_from(log, at * size)
        assert mark == 0
        data = b"" if flags & EntryFlag.DISCARD else log[(at + 1) * size : (at + 1 + sectors) * size]
        result.append((sector, sectors, flags, data))
        at += 1 + len(data) // size
    return result


def test_every_kind_of_request_has_its_entry() -> None:
    """Zero writes are logged as writes of zeroes, discards without data, reads not at all."""

    async def main() -> None:
        place = Place()
        backend = await place.open()
        await backend.write(1024, b"a" * 1024)
        await backend.write_zeroes(4096, 512)
        await backend.discard(8192, 2048)
        await backend.read(0, 4096)
        await backend.flush()
        await backend.flush()
        assert entries(await place.log()) == [
            (2, 2, 0, b"a" * 1024), (8, 1, 0, bytes(512)), (16, 4, EntryFlag.DISCARD, b""), (0, 0, EntryFlag.FLUSH, b""),
        ]  # fmt: skip

    run(main)


def test_requests_are_made_of_whole_sectors_of_the_log() -> None:
    """Whoever replays the log knows no bytes."""

    async def main() -> None:
        place = Place()
        backend = await place.open(log_sector_size=4096)
        await backend.write(100, b"x")
        await backend.flush()
        (sector, sectors, _, data), _ = entries(await place.log())
        assert (sector, sectors) == (0, 1) and data == bytes(100) + b"x" + bytes(3995)

    run(main)


def test_the_superblock_is_written_after_so_many_entries() -> None:
    """What comes after it is lost in a crash, and no more."""

    async def main() -> None:
        place = Place()
        backend = await place.open(log_super_update_interval=3)
        for number in range(1, 8):
            await backend.write(0, bytes([number]) * 512)
            assert len(await place.log()) > number * 1024
            assert (number < 3) or len(entries(await place.log())) == number // 3 * 3

    run(main)


def test_an_old_log_goes_on_at_its_end() -> None:
    """Its sector size holds; an empty file begins a new log."""

    async def main() -> None:
        old = b""
        for expected in (2, 4, 6):
            place = Place(old)
            backend = await place.open(log_append=True)
            await backend.write(512, bytes([expected]) * 512)
            await backend.flush()
            old = await place.log()
            assert len(entries(old)) == expected
        assert [data[:1] for _, _, flags, data in entries(old) if not flags] == [b"\2", b"\4", b"\6"]

    run(main)


def log_of(count: int, *, magic: int = MAGIC, version: int = 1, size: int = 512, flags: int = 0) -> bytes:
    """A log that claims ``count`` entries and has one, a write of a sector."""
    return b"".join(
        part.ljust(512, b"\0") for part in (SUPER.pack(magic, version, count, size), ENTRY.pack(0, 1, flags, 0), b"x")
    )


@pytest.mark.parametrize(
    "log",
    [
        log_of(1, magic=1), log_of(1, version=2), log_of(1, size=0), log_of(1, size=100), log_of(1, size=1 << 25),
        log_of(1, flags=16), log_of(2), log_of(1 << 60), b"x" * 512,
    ],
)  # fmt: skip
def test_a_log_that_is_broken_is_not_gone_on_with(log: bytes) -> None:
    """Its end is not known, so anything could be overwritten."""

    async def main() -> None:
        with pytest.raises(CorruptImage):
            await Place(log).open(log_append=True)

    run(main)


@pytest.mark.parametrize(
    "options",
    [
        {"log_sector_size": 0}, {"log_sector_size": 511}, {"log_sector_size": 16}, {"log_sector_size": 1 << 24},
        {"log_sector_size": -512}, {"log_super_update_interval": 0}, {"log_append": True, "log_sector_size": 512},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    """The log stays as it is."""

    async def main() -> None:
        with pytest.raises(InvalidParameter):
            await Place().open(**options)

    run(main)


def test_a_request_fails_when_it_cannot_be_logged() -> None:
    """A log with holes is worth nothing."""

    async def main() -> None:
        place = Place()
        log = {"driver": "blkdebug", "image": {"driver": "memory", "size": 1 << 20},
               "inject-error": [{"event": "none", "iotype": "write", "errno": 28}]}  # fmt: skip
        options = {"driver": "blklogwrites", "node-name": "l", "file": {"driver": "memory", "size": SIZE}, "log": log}
        backend = place.bench.backend(await place.opener.open_blockdev(options))
        with pytest.raises(BlockIOError) as failed:
            await backend.write(0, b"x" * 512)
        assert failed.value.errno == 28
        with pytest.raises(CommandError):
            await place.opener.open_blockdev({**options, "node-name": "m", "log-append": "x"})

    run(main)


@pytest.mark.parametrize("seed", range(5))
def test_the_disk_can_be_made_again_from_its_log(seed: int) -> None:
    """Requests that overlap in time are not ordered, so they do not overlap in place here."""

    async def main() -> None:
        place = Place()
        backend = await place.open(log_super_update_interval=5)
        random = Random(seed)

        async def work(number: int) -> None:
            for _ in range(20):
                at = 512 * (random.randrange(8) * 8 + number)
                kind = random.choice((backend.write, backend.write_zeroes, backend.flush, backend.discard))
                if kind == backend.write:
                    await backend.write(at, random.randbytes(512))
                elif kind == backend.flush:
                    await backend.flush()
                else:
                    await backend.write_zeroes(at, 512) if kind == backend.write_zeroes else await backend.discard(at, 512)

        async with asyncio.TaskGroup() as tasks:
            for number in range(8):
                tasks.create_task(work(number))
        await backend.flush()
        disk = bytearray(SIZE)
        for sector, sectors, flags, data in entries(await place.log()):
            if not flags & EntryFlag.FLUSH:
                disk[sector * 512 : (sector + sectors) * 512] = data or bytes(sectors * 512)
        assert await backend.read(0, SIZE) == disk

    run(main, Seeded(seed))
