"""The copy-before-write filter and snapshot-access: readers see the disk of one moment while a guest goes on writing."""

from __future__ import annotations

import asyncio
import errno
from random import Random
from typing import Any

import attrs
import pytest

from qblock.actions.bitmaps import AddBitmap, BitmapName
from qblock.backend import BlockBackend
from qblock.errors import CommandError, InvalidParameter, NodeNotFound, PermissionConflict, ReadOnlyNode
from qblock.node import BlockDriverState
from qblock.permissions import Perm
from qblock.testing.jobbench import BusyGuest, Faults, JobBench, driver_of
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import SECOND_NS, KiB

CLUSTER = 64 * KiB
SIZE = 9 * CLUSTER + 512


@attrs.define(eq=False)
class Fleecing:
    """A guest's disk through a filter, where old data go, and a reader of the snapshot."""

    bench: JobBench
    source: BlockDriverState
    target: BlockDriverState
    disk: BlockBackend
    snapshot: BlockBackend
    picture: bytes


async def fleece(bench: JobBench, *, fill: int = 1, **options: Any) -> Fleecing:
    """Put the filter over a disk with content, and snapshot-access over the filter."""
    source, target = await bench.node("source", SIZE), await bench.node("target", SIZE)
    writer = bench.disk(source)
    await writer.write(0, Random(fill).randbytes(SIZE))
    writer.close()
    opener = bench.system.opener
    filter_node = await opener.open_blockdev(
        {"driver": "copy-before-write", "node-name": "cbw", "file": "source", "target": "target", **options}
    )
    filter_node.monitor_owned = True
    access = await opener.open_blockdev(
        {"driver": "snapshot-access", "node-name": "access", "file": "cbw", "discard": "unmap"}
    )
    access.monitor_owned = True
    reader = BlockBackend(bench.graph, perm=Perm.CONSISTENT_READ | Perm.WRITE, shared=Perm.ALL)
    reader.insert(access)
    return Fleecing(
        bench, source, target, bench.disk(filter_node, "d"), reader, driver_of(source).content()
    )


@pytest.mark.parametrize("seed", range(20))
def test_readers_see_the_disk_as_it_was(seed: int) -> None:
    """On slow storage, with writes, zeroes and reads crossing one another in every order."""

    async def main() -> None:
        made = await fleece(JobBench(seed), fill=seed)
        guest = BusyGuest(made.disk, seed)
        guest.model[:] = made.picture
        async with asyncio.TaskGroup() as group:
            group.create_task(guest.run(30))
            for number in range(3):
                group.create_task(read_at_random(made.snapshot, made.picture, Random(100 * seed + number), 40))
        assert await made.snapshot.read(0, SIZE) == made.picture
        assert driver_of(made.source).content() == bytes(guest.model)
        await made.bench.close()

    run(main, Seeded(seed))


async def read_at_random(reader: BlockBackend, picture: bytes, random: Random, count: int) -> None:
    """What is read is the picture, at all times."""
    for _ in range(count):
        start = random.randrange(SIZE)
        length = min(random.choice((512, 5000, 2 * CLUSTER)), SIZE - start)
        assert await reader.read(start, length) == picture[start : start + length]
        await asyncio.sleep(random.choice((0, 0.0001, 0.001)))


@pytest.mark.parametrize("seed", range(20))
def test_an_overlay_of_the_source_can_be_the_target_and_be_read(seed: int) -> None:
    """The older way to fleece: what the target lacks shows through from the source, and no write may slip in under a reader."""

    async def main() -> None:
        bench = JobBench(seed)
        source = await bench.node("source", SIZE - SIZE % CLUSTER)
        storage = await bench.node("target-file", 0)
        writer = bench.disk(source)
        await writer.write(0, Random(seed).randbytes(source.length))
        writer.close()
        opener = bench.system.opener
        await opener.create_image("qcow2", {"file": storage.node_name, "size": source.length})
        options = {"driver": "qcow2", "node-name": "target", "file": storage.node_name, "backing": "source"}
        target = await opener.open_blockdev(options)
        target.monitor_owned = True
        cbw = await opener.open_blockdev(
            {"driver": "copy-before-write", "node-name": "cbw", "file": "source", "target": "target"}
        )
        disk = bench.disk(cbw, "d")
        reader = BlockBackend(bench.graph, perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
        reader.insert(target)
        picture = driver_of(source).content()
        guest = BusyGuest(disk, seed)
        guest.model[:] = picture
        async with asyncio.TaskGroup() as group:
            group.create_task(guest.run(30))
            for number in range(3):
                group.create_task(read_overlay(reader, picture, Random(100 * seed + number)))
        assert await reader.read(0, len(picture)) == picture
        assert driver_of(source).content() == bytes(guest.model)
        await bench.close()
        assert not target.read_watchers and not target.tracked_reads

    run(main, Seeded(seed))


async def read_overlay(reader: BlockBackend, picture: bytes, random: Random) -> None:
    """As `read_at_random`, for a disk of another size."""
    for _ in range(40):
        start = random.randrange(len(picture))
        length = min(random.choice((512, 5000, 2 * CLUSTER)), len(picture) - start)
        assert await reader.read(start, length) == picture[start : start + length]
        await asyncio.sleep(random.choice((0, 0.0001, 0.001)))


def test_a_failed_copy_is_the_guests_failure() -> None:
    """break-guest-write: nothing is overwritten that is not kept, and when there is room again all goes on."""

    async def main() -> None:
        made = await fleece(JobBench())
        driver_of(made.target).faults = Faults("write", 1, 1, errno.ENOSPC)
        assert await error_of(made.disk.write(CLUSTER, b"new")) == errno.ENOSPC
        assert await made.snapshot.read(0, SIZE) == made.picture == await made.disk.read(0, SIZE)
        await made.disk.write(CLUSTER, b"new")
        assert await made.snapshot.read(0, SIZE) == made.picture != await made.disk.read(0, SIZE)
        await made.bench.close()

    run(main)


def test_a_failed_copy_can_break_the_snapshot_instead() -> None:
    """break-snapshot: the guest does not notice; whoever reads the snapshot does, everywhere, and nothing is copied any more."""

    async def main() -> None:
        made = await fleece(JobBench(), **{"on-cbw-error": "break-snapshot"})
        await made.disk.write(0, b"kept before")
        driver_of(made.target).faults = faults = Faults("write", 1, 1, errno.ENOSPC)
        await made.disk.write(CLUSTER, b"new")
        assert (await made.disk.read(CLUSTER, 3)) == b"new"
        for offset in (0, CLUSTER, 3 * CLUSTER):
            assert await error_of(made.snapshot.read(offset, 512)) == errno.EACCES
        await made.disk.write(3 * CLUSTER, b"newer")
        assert faults.seen == 1
        await made.bench.close()

    run(main)


async def error_of(request: Any) -> int | None:
    """The errno that a request fails with."""
    try:
        await request
    except OSError as error:
        return error.errno
    return None


@pytest.mark.parametrize("how", ["break-guest-write", "break-snapshot"])
def test_a_copy_that_takes_too_long_counts_as_failed(how: str) -> None:
    """A target that hangs must not hang the guest for longer than allowed; what is under way ends before the node is closed."""

    async def main() -> None:
        made = await fleece(JobBench(), **{"on-cbw-error": how, "cbw-timeout": 3})
        clock, target = made.bench.system.clock, driver_of(made.target)
        slow = target.write_from

        async def much_later(offset: int, buffer: memoryview, *, fua: bool = False) -> None:
            await clock.sleep_ns(10 * SECOND_NS)
            await slow(offset, buffer, fua=fua)

        target.write_from = much_later  # type: ignore[method-assign]
        started = clock.now_ns()
        failed = await error_of(made.disk.write(0, b"new"))
        assert clock.now_ns() - started == 3 * SECOND_NS
        read = await error_of(made.snapshot.read(0, 512))
        if how == "break-guest-write":
            assert (failed, read) == (errno.ETIMEDOUT, None)
            assert await made.snapshot.read(0, SIZE) == made.picture
        else:
            assert (failed, read) == (None, errno.EACCES)
        await made.bench.close()
        assert clock.now_ns() - started == 10 * SECOND_NS

    run(main)


def test_a_bitmap_limits_what_is_kept() -> None:
    """Only what an increment needs: the rest can be overwritten without a copy, and cannot be read."""

    async def main() -> None:
        bench = JobBench()
        source = await bench.node("source", SIZE)
        AddBitmap(bench.system, BitmapName("source", "b"), granularity=CLUSTER).perform_alone()
        source.dirty_bitmaps[0].mark(2 * CLUSTER, 1)
        target = await bench.node("target", SIZE)
        options = {"driver": "copy-before-write", "node-name": "cbw", "file": "source", "target": "target"}
        cbw = await bench.system.opener.open_blockdev(options | {"bitmap": {"node": "source", "name": "b"}})
        access = await bench.system.opener.open_blockdev({"driver": "snapshot-access", "node-name": "a", "file": "cbw"})
        reader = BlockBackend(bench.graph, perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
        reader.insert(access)
        disk = bench.disk(cbw)
        driver_of(target).faults = faults = Faults("write", 9, 9)
        await disk.write(0, b"x" * CLUSTER)
        assert faults.seen == 0
        await disk.write(2 * CLUSTER, b"x")
        assert faults.seen == 1
        assert await reader.read(2 * CLUSTER, CLUSTER) == bytes(CLUSTER)
        for offset, length in ((0, 512), (2 * CLUSTER - 512, 1024), (3 * CLUSTER - 512, 1024)):
            assert await error_of(reader.read(offset, length)) == errno.EACCES
        await bench.close()

    run(main)


def test_what_the_reader_discards_is_not_kept_any_longer() -> None:
    """A backup of a snapshot frees the space of what it has; parts of clusters stay."""

    async def main() -> None:
        made = await fleece(JobBench())
        await made.snapshot.discard(CLUSTER - 512, 2 * CLUSTER)
        driver_of(made.target).faults = faults = Faults("write", 9, 9)
        await made.disk.write(CLUSTER, b"x" * CLUSTER)
        assert faults.seen == 0
        assert await error_of(made.snapshot.read(CLUSTER, 512)) == errno.EACCES
        assert await made.snapshot.read(0, CLUSTER) == made.picture[:CLUSTER]
        assert await made.snapshot.read(2 * CLUSTER, CLUSTER) == made.picture[2 * CLUSTER : 3 * CLUSTER]
        await made.bench.close()

    run(main)


def test_a_snapshot_cannot_be_written_nor_read_where_nobody_keeps_one() -> None:
    """snapshot-access opens over anything, as in QEMU; it works over copy-before-write only."""

    async def main() -> None:
        made = await fleece(JobBench())
        assert await error_of(made.snapshot.write(0, b"x")) == errno.ENOTSUP
        assert await error_of(made.snapshot.write_zeroes(0, 512)) == errno.ENOTSUP
        other = await made.bench.system.opener.open_blockdev(
            {"driver": "snapshot-access", "node-name": "other", "file": "target"}
        )
        reader = BlockBackend(made.bench.graph, perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
        reader.insert(other)
        assert await error_of(reader.read(0, 512)) == errno.ENOTSUP
        await made.bench.close()

    run(main)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"cbw-timeout": -1}, InvalidParameter),
        ({"cbw-timeout": 1 << 32}, InvalidParameter),
        ({"on-cbw-error": "ignore"}, InvalidParameter),
        ({"bitmap": {"node": "source", "name": "b"}}, CommandError),
        ({"bitmap": {"node": "nope", "name": "b"}}, NodeNotFound),
        ({"bitmap": "b"}, InvalidParameter),
        ({"target": "fixed"}, ReadOnlyNode),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    """By name, with nothing left behind."""

    async def main() -> None:
        bench = JobBench()
        await bench.node("source", SIZE)
        await bench.node("target", SIZE)
        await bench.node("fixed", SIZE, **{"read-only": True})
        usual = {"driver": "copy-before-write", "node-name": "cbw", "file": "source", "target": "target"}
        with pytest.raises(error):
            await bench.system.opener.open_blockdev(usual | options)
        assert set(bench.graph.nodes) == {"source", "target", "fixed"}
        assert not bench.graph.find_node("source").dirty_bitmaps
        await bench.close()

    run(main)


def test_nobody_else_may_write_below_a_filter_in_use() -> None:
    """A write that the filter does not see would be in the snapshot."""

    async def main() -> None:
        made = await fleece(JobBench())
        with pytest.raises(PermissionConflict):
            made.bench.disk(made.source)
        await made.bench.close()

    run(main)


def test_a_target_that_is_too_short_fails_the_copy_not_the_program() -> None:
    """A user's filter may have a target of any size; QEMU 7.2 dies of a write behind its end."""

    async def main() -> None:
        bench = JobBench()
        await bench.node("source", SIZE)
        await bench.node("target", 2 * CLUSTER)
        cbw = await bench.system.opener.open_blockdev(
            {"driver": "copy-before-write", "node-name": "cbw", "file": "source", "target": "target"}
        )
        disk = bench.disk(cbw)
        await disk.write(CLUSTER, b"x")
        assert await error_of(disk.write(3 * CLUSTER, b"x")) == errno.ENOSPC
        await bench.close()

    run(main)
