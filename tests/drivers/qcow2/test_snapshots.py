"""Internal snapshots of one driver: taken while a guest writes, refused when they cannot be, and hostile tables."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable
from random import Random

import pytest

from qblock.drain import drained
from qblock.driver import CheckFix, SupportsCheck, SupportsSnapshots
from qblock.drivers.memory import MemoryDriver, MemoryOptions
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.drivers.qcow2.snapshots import Snapshot, encode_snapshot_table
from qblock.drivers.qcow2.snapshotting import next_id
from qblock.errors import BlockIOError, CommandError, CorruptImage
from qblock.snapshots import SnapshotInfo, find_by_id_or_name, find_described, find_snapshot, list_lines
from qblock.testing.formats import FormatBench
from qblock.testing.jobbench import Faults, JobBench, driver_of
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB, MiB
from tests.drivers.qcow2.test_driver import made, reopen
from tests.properties.test_qcow2_snapshots import verify_snapshot

CLUSTER = 65536


def snapshots_of(bench: FormatBench) -> SupportsSnapshots:
    driver = bench.node.driver
    assert isinstance(driver, SupportsSnapshots)
    return driver


# ------------------------------------------------------------------------------------------------------ an image in use


@pytest.mark.parametrize("seed", range(12))
def test_a_snapshot_of_a_drained_node_is_what_the_guest_had_written(seed: int) -> None:
    """The guest writes block after block; snapshots taken in between hold a beginning of them, each longer than the last."""

    async def main() -> None:
        bench, random = await made(cluster_size=4096), Random(seed)
        disk = await bench.open()
        bench.storage.restless = True
        driver = snapshots_of(bench)

        async def guest() -> None:
            for number in range(100):
                await disk.write(number * 6000, bytes([1 + number]) * 6000)

        writing = asyncio.create_task(guest())
        for number in range(4):
            for _ in range(random.randrange(200)):
                await asyncio.sleep(0)
            async with drained(bench.node):
                await driver.create_snapshot(f"s{number}")
        await writing
        expected = b"".join(bytes([1 + number]) * 6000 for number in range(100))
        assert await disk.read(0, 600_000) == expected
        await bench.close()
        result = await bench.check()
        assert (result.corruptions, result.leaks) == (0, 0)
        longest = 0
        for number in range(4):
            done = await filled(bench.content, number)
            assert done % 6000 == 0 and done >= longest
            await verify_snapshot(bench.content, number, {str(number + 1): expected[:done].ljust(4 * MiB, b"\0")})
            longest = done

    run(main, Seeded(seed))


async def filled(content: bytes, number: int) -> int:
    """How many bytes at the beginning of a snapshot were written."""
    bench = FormatBench(Qcow2Driver)
    disk = await bench.open(content=content, flags={"read_only": True})
    driver = snapshots_of(bench)
    await driver.view_snapshot(driver.snapshots()[number])
    return len((await disk.read(0, disk.length)).rstrip(b"\0"))


@pytest.mark.parametrize("action", ["create", "apply", "delete"])
def test_a_read_that_fails_while_a_snapshot_changes_loses_nothing(action: str) -> None:
    """The header may be switched already when the new tables cannot be read: nobody may go on with the old ones then."""

    async def main(nth: int) -> bool:
        bench = JobBench(None)
        storage = await bench.node("storage", 0)
        await bench.system.opener.create_image("qcow2", {"file": "storage", "size": 64 * KiB, "cluster-size": 4096})
        options = {"driver": "qcow2", "node-name": "image", "file": "storage"}
        node = await bench.system.opener.open_blockdev(options)
        driver, disk, kept = node.driver, bench.disk(node), b"1" * 8192
        assert isinstance(driver, SupportsSnapshots)
        await disk.write(0, kept)
        first = await driver.create_snapshot("first")
        await disk.write(4096, b"2" * 4096)
        await disk.flush()
        now = await disk.read(0, 8192)
        driver_of(storage).faults = Faults("read", nth, nth)
        failed = False
        try:
            await {"create": driver.create_snapshot, "apply": driver.apply_snapshot, "delete": driver.delete_snapshot}[action](
                "second" if action == "create" else first  # type: ignore[arg-type]
            )
        except BlockIOError:
            failed = True
        driver_of(storage).faults, written = Faults(), False
        with contextlib.suppress(BlockIOError):
            await disk.write(12288, b"3" * 4096)
            await disk.flush()
            written = True
        disk.close()
        await bench.system.opener.close_node(node)
        node = await bench.system.opener.open_blockdev(options)
        assert isinstance(node.driver, SupportsCheck)
        assert not (await node.driver.check(CheckFix.NONE)).corruptions
        content = await (again := bench.disk(node)).read(0, 64 * KiB)
        again.close()
        assert content[:8192] in ((kept, now) if action == "apply" else (now,))
        assert not written or content[12288:16384] == b"3" * 4096
        await bench.close()
        return failed

    nth = 1
    while run(lambda number=nth: main(number)):  # type: ignore[misc]
        nth += 1
    assert nth > 3


def test_unallocated_parts_of_a_snapshot_show_the_backing_node() -> None:
    """Snapshots of an overlay know nothing of what lies below; discards hide it in the disk only."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        await bench.create(size=MiB)
        below = await bench.bench.add(MemoryDriver, MemoryOptions(size=MiB))
        await below.driver.write_from(0, memoryview(b"b" * MiB))
        disk = await bench.open(backing=below)
        await disk.write(0, b"top" * 100)
        driver = snapshots_of(bench)
        info = await driver.create_snapshot("one")
        await disk.discard(0, MiB)
        assert await disk.read(0, MiB) == bytes(MiB)
        await driver.apply_snapshot(info)
        assert await disk.read(0, MiB) == b"top" * 100 + b"b" * (MiB - 300)

    run(main)


def test_discards_reach_the_file_only_when_nobody_needs_the_clusters() -> None:
    """A discarded cluster that a snapshot has stays; deleting the snapshot discards it in the file, unless told otherwise."""

    async def main(*, wanted: bool) -> None:
        bench = await made()
        disk = await bench.open(pass_discard_snapshot=wanted)
        await disk.write(0, b"\1" * CLUSTER)
        driver = snapshots_of(bench)
        info = await driver.create_snapshot("one")
        await disk.discard(0, CLUSTER)
        await disk.flush()
        assert b"\1" * CLUSTER in bench.storage.live
        await driver.delete_snapshot(info)
        assert (b"\1" * CLUSTER in bench.storage.live) is not wanted
        assert (b"\xdd" * CLUSTER in bench.storage.live) is wanted

    run(lambda: main(wanted=True))
    run(lambda: main(wanted=False))


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_snapshot_that_the_refcounts_cannot_count_changes_nothing() -> None:
    """Not one byte is written, and the disk goes on as before."""

    async def main() -> None:
        bench = await made(refcount_bits=1)
        disk = await bench.open()
        await disk.write(0, b"x" * 1000)
        await disk.flush()
        before = bytes(bench.storage.live)
        with pytest.raises(BlockIOError, match="refcounts of 1 bits"):
            await snapshots_of(bench).create_snapshot("one")
        assert bytes(bench.storage.live) == before
        assert snapshots_of(bench).snapshots() == ()
        await disk.write(0, b"y" * 1000)
        await bench.close()
        assert (await bench.check()).leaks == 0

    run(main)


def test_snapshots_of_images_that_are_only_read_cannot_be_changed() -> None:
    """They can be looked at; and a node that shows one can be neither written to nor checked."""

    async def main() -> None:
        bench = await made()
        disk = await bench.open()
        await disk.write(0, b"old")
        info = await snapshots_of(bench).create_snapshot("one")
        await disk.write(0, b"new")
        with pytest.raises(CommandError, match="read-only"):
            await snapshots_of(bench).view_snapshot(info)
        await bench.close()
        disk = await bench.open(flags={"read_only": True})
        driver = snapshots_of(bench)
        for change in (driver.create_snapshot("two"), driver.apply_snapshot(info), driver.delete_snapshot(info)):
            with pytest.raises(BlockIOError):
                await change
        assert await disk.read(0, 3) == b"new"
        await driver.view_snapshot(info)
        assert await disk.read(0, 3) == b"old"
        with pytest.raises(CommandError, match="shows the snapshot"):
            await reopen(bench, read_only=False)
        assert isinstance(driver, SupportsCheck)
        with pytest.raises(CommandError, match="shows the snapshot"):
            await driver.check(CheckFix.NONE)

    run(main)


def test_a_snapshot_that_is_not_there_is_named() -> None:
    """Whoever holds a `SnapshotInfo` of something deleted gets an error, not another snapshot."""

    async def main() -> None:
        bench = await made()
        await bench.open()
        driver = snapshots_of(bench)
        info = await driver.create_snapshot("one")
        await driver.delete_snapshot(info)
        with pytest.raises(CommandError, match="no snapshot 'one'"):
            await driver.apply_snapshot(info)

    run(main)


def test_the_next_id_is_one_more_than_the_largest_number() -> None:
    """Other programs may have used ids that are no numbers, or absurd ones."""
    table = [Snapshot(id=text, name="", l1_offset=0, l1_size=0, date_sec=0, date_nsec=0) for text in ("7", "x", "12a", "9" * 30)]
    assert next_id(table) == "13"
    assert next_id([]) == "1"


# ------------------------------------------------------------------------------------------------------- hostile tables


def with_table(image: bytes, snapshots: list[Snapshot], count: int | None = None) -> bytes:
    """The image with this snapshot table behind everything."""
    place = -(-len(image) // CLUSTER) * CLUSTER
    raw = bytearray(image.ljust(place, b"\0")) + encode_snapshot_table(snapshots, 4 * MiB)
    struct.pack_into(">IQ", raw, 60, len(snapshots) if count is None else count, place)
    return bytes(raw)


def hostile(l1_offset: int, l1_size: int) -> Snapshot:
    return Snapshot(id="1", name="bad", l1_offset=l1_offset, l1_size=l1_size, date_sec=0, date_nsec=0, disk_size=4 * MiB)


def l1_of(image: bytes) -> int:
    return int.from_bytes(image[40:48], "big")


HOSTILE: dict[str, Callable[[bytes], Snapshot]] = {
    "the header": lambda image: hostile(0, 100),
    "the refcount table": lambda image: hostile(CLUSTER, 10),
    "a refcount block": lambda image: hostile(2 * CLUSTER, 10),
    "the active L1 table": lambda image: hostile(l1_of(image), 1),
    "data": lambda image: hostile(image.index(b"\7" * CLUSTER), 4096),
    "far away": lambda image: hostile(1 << 55, 10),
    "huge": lambda image: hostile(l1_of(image), (1 << 32) - 1),
    "largest that there can be": lambda image: hostile(l1_of(image), 4 * MiB),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("action", ["apply", "delete", "create", "view"])
def test_a_snapshot_whose_tables_are_something_else_destroys_nothing(name: str, action: str) -> None:
    """Its L1 table is said to be the header, other tables, data: using it is refused, and the disk keeps its content."""

    async def main() -> None:
        bench = await made()
        disk = await bench.open()
        await disk.write(0, b"\7" * (2 * CLUSTER))
        await bench.close()
        image = with_table(bench.content, [HOSTILE[name](bench.content)])
        await bench.open(content=image, flags={"read_only": action == "view"})
        driver = snapshots_of(bench)
        bad = driver.snapshots()[0]
        try:
            match action:
                case "apply":
                    await driver.apply_snapshot(bad)
                case "delete":
                    await driver.delete_snapshot(bad)
                case "create":
                    await driver.create_snapshot("more")
                case _:
                    await driver.view_snapshot(bad)
        except (BlockIOError, CorruptImage):
            pass
        await bench.close()
        disk = await bench.open(flags={"read_only": True})
        assert await disk.read(0, 2 * CLUSTER) == b"\7" * (2 * CLUSTER)

    run(main)


def test_l1_tables_that_overlap_are_looked_at_once() -> None:
    """Sixty thousand snapshots share one huge table: opening, writing and checking must not take sixty thousand times as long."""

    async def main() -> None:
        bench = await made()
        table = [hostile(2 * MiB + CLUSTER * (n % 3), 8192 + n % 8192) for n in range(60_000)]
        image = with_table(bench.content.ljust(4 * MiB, b"\0"), table)
        disk = await bench.open(content=image)
        await disk.write(0, b"x")
        await bench.close()
        result = await bench.check()
        assert result.corruptions >= 59_000

    run(main)


@pytest.mark.parametrize("count", [1, 2, 1000, 65536, 65537, (1 << 32) - 1])
@pytest.mark.parametrize("filler", [b"\xff", b"\0", b"\1"])
def test_tables_of_garbage_can_be_opened_for_reading(count: int, filler: bytes) -> None:
    """However many entries are said to be there, and whatever they say."""

    async def main() -> None:
        bench = await made()
        raw = bytearray(bench.content.ljust(8 * CLUSTER, b"\0")) + filler * (3 * CLUSTER)
        struct.pack_into(">IQ", raw, 60, count, 8 * CLUSTER)
        disk = await bench.open(content=bytes(raw), flags={"read_only": True})
        assert await disk.read(0, 4 * MiB) == bytes(4 * MiB)
        assert len(snapshots_of(bench).snapshots()) <= 65536
        try:
            await bench.open(content=bytes(raw))
        except CorruptImage:
            return
        await bench.check(bytes(raw))

    run(main)


# ---------------------------------------------------------------------------------------------------- what programs see


INFOS = (
    SnapshotInfo("1", "one", 37645, 86400, 5000, 3_723_004_000_000, icount=None),
    SnapshotInfo("2", "1", 0, 86400, 0, 0, icount=0),
    SnapshotInfo("3", "one", 5 * KiB, 86400, 0, 0, icount=77),
)


def test_an_id_goes_before_a_name() -> None:
    """As in QEMU: a snapshot called '1' is not found by '1' while there is one with that id."""
    assert find_by_id_or_name(INFOS, "1") is INFOS[0]
    assert find_snapshot(INFOS, name="1") is INFOS[1]
    assert find_snapshot(INFOS, id="3", name="one") is INFOS[2]
    assert find_snapshot(INFOS, id="3", name="two") is None
    assert find_described(INFOS, "snapshot.name=one") is INFOS[0]
    assert find_described(INFOS, "snapshot.id=3,snapshot.name=one") is INFOS[2]
    for text in ("", "none", "snapshot.date=3", "snapshot.id=9"):
        with pytest.raises(CommandError):
            find_described(INFOS, text)


def test_the_list_has_the_layout_of_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Column by column; dates are those of the place where the program runs."""
    monkeypatch.setenv("TZ", "UTC")
    assert list_lines(()) == []
    assert list_lines(INFOS) == [
        "Snapshot list:",
        "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT",
        "1         one              36.8 KiB 1970-01-02 00:00:00 01:02:03.004           ",
        "2         1                     0 B 1970-01-02 00:00:00 00:00:00.000          0",
        "3         one                 5 KiB 1970-01-02 00:00:00 00:00:00.000         77",
    ]
    assert [SnapshotInfo.of_json(info.as_json()) for info in INFOS] == list(INFOS)
