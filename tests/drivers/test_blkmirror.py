"""The blkmirror filter: its names, where its requests go, how they end, and what a target with a hidden backing file gets."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from random import Random

import pytest

import qblock
from qblock.drivers.blkmirror import BlkmirrorDriver, parse_blkmirror_name
from qblock.drivers.memory import MemoryDriver
from qblock.errors import BlockIOError, CommandError, InvalidParameter, PermissionConflict
from qblock.node import BlockDriverState
from qblock.permissions import Perm
from qblock.registry import UnknownDriver
from qblock.requests import refresh_length
from qblock.testing.images import make_chain
from qblock.testing.jobbench import Faults, JobBench, driver_of
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.transaction import Transaction
from qblock.units import KiB

SIZE = 256 * KiB


async def mirror(bench: JobBench, *, target_size: int = SIZE, **options: object) -> BlockDriverState:
    """A mirror called ``m`` of the nodes ``source`` and ``target``."""
    await bench.node("source", SIZE, discard="unmap")
    await bench.node("target", target_size, discard="unmap")
    described = {"driver": "blkmirror", "node-name": "m", "file": "source", "target": "target", "discard": "unmap"}
    node = await bench.system.opener.open_blockdev({**described, **options})
    node.monitor_owned = True
    return node


def content(bench: JobBench, name: str) -> bytes:
    return driver_of(bench.graph.find_node(name)).content()


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "fmt", "target"),
    [
        ("blkmirror:qcow2:/images/copy.img", "qcow2", "/images/copy.img"),
        ("blkmirror:raw:copy.img", "raw", "copy.img"),
        ("blkmirror:/images/copy.img", None, "/images/copy.img"),
        ("blkmirror:copy.img", None, "copy.img"),
        ("blkmirror:/images/day:1/copy.img", None, "/images/day:1/copy.img"),
        ("blkmirror:./day:1", None, "./day:1"),
        ("blkmirror:qcow2:/images/day:1", "qcow2", "/images/day:1"),
        ("blkmirror:qcow2:day:1", "qcow2", "day:1"),
        ('blkmirror:json:{"driver": "null-co"}', None, 'json:{"driver": "null-co"}'),
        ('blkmirror:raw:json:{"driver": "null-co"}', "raw", 'json:{"driver": "null-co"}'),
    ],
)
def test_a_name_is_taken_apart(name: str, fmt: str | None, target: str) -> None:
    """A colon separates the format only when no slash comes before it."""
    parsed = parse_blkmirror_name(name)
    assert (parsed.format, parsed.target) == (fmt, target)


@pytest.mark.parametrize("name", ["blkmirror:", "blkmirror:qcow2:", "blkmirror::copy.img", "copy.img"])
def test_a_name_without_a_target_is_refused(name: str) -> None:
    """And the message shows the form."""
    with pytest.raises(CommandError, match=r"blkmirror:|format"):
        parse_blkmirror_name(name)


def test_a_name_gives_a_mirror_that_can_be_put_over_its_source(tmp_path: Path) -> None:
    """With the format or without it; the target's own backing file is not opened, though its header names it."""
    make_chain(tmp_path, SIZE, [("base.qcow2", {0: b"base"}), ("copy.qcow2", {})])

    async def main(name: str) -> None:
        bench = JobBench()
        source = await bench.node("source", SIZE // 2)
        disk = bench.disk(source, "d")
        await disk.write(0, b"source" * 100)
        node = await bench.system.opener.open_image(name, read_only=False)
        early = bench.disk(node)
        with pytest.raises(BlockIOError) as failure:
            await early.read(0, 512)
        assert failure.value.errno == errno.ENOMEDIUM
        early.close()
        with Transaction() as change:
            bench.graph.append(node, onto=source, change=change)
        refresh_length(node)
        assert isinstance(node.driver, BlkmirrorDriver) and node.driver.target.node.backing is None
        assert disk.node is node and disk.length == SIZE // 2
        await disk.write(KiB, b"both" * 128)
        assert (await disk.read(0, 6), await disk.read(KiB, 4)) == (b"source", b"both")
        await bench.close()

    for name in (f"blkmirror:qcow2:{tmp_path}/copy.qcow2", f"blkmirror:{tmp_path}/copy.qcow2"):
        run(lambda name=name: main(name))
    with qblock.open(tmp_path / "copy.qcow2", backing=True) as copy:
        assert copy.read(KiB, 4) == b"both"


def test_an_unknown_format_is_told_by_name(tmp_path: Path) -> None:
    """Not taken for a part of the path."""

    async def main() -> None:
        bench = JobBench()
        with pytest.raises(UnknownDriver, match="'cow3'"):
            await bench.system.opener.open_image(f"blkmirror:cow3:{tmp_path}/copy", read_only=False)
        assert not bench.graph.nodes

    run(main)


# ------------------------------------------------------------------------------------------------- where requests go


def test_reads_and_flushes_go_to_the_source_and_changes_to_both() -> None:
    """What the proposal says of each kind of request."""

    async def main() -> None:
        bench = JobBench()
        disk = bench.disk(await mirror(bench), "d")
        counts = {"source": Faults("read"), "target": Faults("read")}
        for name, faults in counts.items():
            driver_of(bench.graph.find_node(name)).faults = faults
        await disk.write(0, b"x" * 4096)
        await disk.write_zeroes(1024, 512)
        await disk.discard(2048, 512)
        await disk.read(0, 4096)
        assert [faults.seen for faults in counts.values()] == [1, 0]
        expected = b"x" * 1024 + bytes(512) + b"x" * 512 + bytes(512) + b"x" * 1536
        assert content(bench, "source")[:4096] == content(bench, "target")[:4096] == expected
        for name, faults in counts.items():
            faults = counts[name] = Faults("flush")
            driver_of(bench.graph.find_node(name)).faults = faults
        await disk.flush()
        assert [faults.seen for faults in counts.values()] == [1, 0]
        await bench.close()

    run(main)


@pytest.mark.parametrize("failing", ["source", "target"])
def test_a_failure_on_either_side_is_the_guests_and_the_other_side_ends_first(failing: str) -> None:
    """The request is done when both are; the other side has the data then."""

    async def main() -> None:
        bench = JobBench(3)
        disk = bench.disk(await mirror(bench), "d")
        driver_of(bench.graph.find_node(failing)).faults = Faults("write", 1, 1, errno.ENOSPC)
        with pytest.raises(BlockIOError) as failure:
            await disk.write(0, b"x" * 8192)
        assert failure.value.errno == errno.ENOSPC
        other = "target" if failing == "source" else "source"
        assert content(bench, other)[:8192] == b"x" * 8192
        assert not any(node.in_flight for node in bench.graph.nodes.values())
        await disk.write(0, b"y" * 8192)
        assert content(bench, "source") == content(bench, "target")
        await bench.close()

    run(main, Seeded(3))


def test_of_two_failures_the_first_one_is_reported() -> None:
    """The order is that of their happening, not of the sides."""

    class Failing(MemoryDriver):
        name = "failing"
        delay_ns = 0
        failure = 0

        async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
            await self.env.clock.sleep_ns(self.delay_ns)
            raise BlockIOError(self.failure)

    async def main(source_ns: int, target_ns: int) -> int | None:
        bench = JobBench()
        bench.system.registry.register(Failing)
        for name, delay_ns, failure in (("source", source_ns, errno.EIO), ("target", target_ns, errno.ENOSPC)):
            node = await bench.system.opener.open_blockdev({"driver": "failing", "node-name": name, "size": SIZE})
            node.monitor_owned = True
            assert isinstance(node.driver, Failing)
            node.driver.delay_ns, node.driver.failure = delay_ns, failure
        options = {"driver": "blkmirror", "node-name": "m", "file": "source", "target": "target"}
        disk = bench.disk(await bench.system.opener.open_blockdev(options))
        before = bench.system.clock.now_ns()
        with pytest.raises(BlockIOError) as failed:
            await disk.write(0, bytes(512))
        assert bench.system.clock.now_ns() - before == max(source_ns, target_ns)
        await bench.close()
        return failed.value.errno

    assert run(lambda: main(1000, 2000)) == errno.EIO
    assert run(lambda: main(2000, 1000)) == errno.ENOSPC


@pytest.mark.parametrize("seed", range(15))
def test_of_writes_that_overlap_the_same_one_wins_on_both_sides(seed: int) -> None:
    """A guest that does this reads one of the two, and must not read the other one after it has moved to the target."""

    async def main() -> None:
        bench, random = JobBench(seed), Random(seed)
        disk = bench.disk(await mirror(bench), "d")

        async def writer(number: int) -> None:
            for _ in range(8):
                offset = random.randrange(0, 16 * KiB, 512)
                if random.random() < 0.8:
                    await disk.write(offset, bytes([number]) * random.randrange(512, 8 * KiB, 512))
                else:
                    await disk.write_zeroes(offset, 4096)

        async with asyncio.TaskGroup() as group:
            for number in range(1, 5):
                group.create_task(writer(number))
        assert content(bench, "source") == content(bench, "target")
        await bench.close()

    run(main, Seeded(seed))


def test_a_request_that_is_cancelled_leaves_the_range_to_others() -> None:
    """One that waits, and one that is waited for: nobody waits for them afterwards."""

    async def main() -> None:
        bench = JobBench(1)
        disk = bench.disk(await mirror(bench), "d")
        first, second = (asyncio.ensure_future(disk.write(0, letters)) for letters in (b"a" * 4096, b"b" * 8192))
        behind_second = asyncio.ensure_future(disk.write(4096, b"c" * 4096))
        await asyncio.sleep(0.000_001)
        for task in (second, first):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        async with asyncio.timeout(1):
            await behind_second
            await disk.write(0, b"d" * 4096)
        assert content(bench, "source")[:8192] == content(bench, "target")[:8192] == b"d" * 4096 + b"c" * 4096
        await bench.close()

    run(main, Seeded(1))


# -------------------------------------------------------------------------------------------------- what it lies on


def test_the_target_is_written_by_the_mirror_alone() -> None:
    """Others may look at it, and nobody else may write; without a writer above the mirror takes nothing."""

    async def main() -> None:
        bench = JobBench()
        node = await mirror(bench)
        assert isinstance(node.driver, BlkmirrorDriver)
        edge = node.driver.target
        assert (edge.perm, edge.shared) == (Perm.NONE, Perm.CONSISTENT_READ)
        disk = bench.disk(node, "d")
        assert edge.perm is Perm.WRITE
        with pytest.raises(PermissionConflict, match="target"):
            bench.disk(edge.node, "other")
        disk.close()
        assert edge.perm is Perm.NONE
        await bench.close()

    run(main)


def test_the_target_follows_when_the_disk_is_resized() -> None:
    """Or a write at the new end would have no place there."""

    async def main() -> None:
        bench = JobBench()
        node = await mirror(bench)
        disk = bench.disk(node, "d")
        disk.set_permissions(disk.perm | Perm.RESIZE, disk.shared)
        for length in (2 * SIZE, SIZE // 2, SIZE):
            await disk.truncate(length)
            await disk.write(length - 512, bytes([length >> 16]) * 512)
            assert disk.length == length
            assert content(bench, "source") == content(bench, "target")
        await bench.close()

    run(main)


@pytest.mark.parametrize(("failing", "length"), [("target", 2 * SIZE), ("source", SIZE // 2)])
def test_a_failed_resize_leaves_no_target_that_is_shorter_than_its_source(
    failing: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target grows first and shrinks last."""

    async def main() -> None:
        bench = JobBench()
        disk = bench.disk(await mirror(bench), "d")
        disk.set_permissions(disk.perm | Perm.RESIZE, disk.shared)

        async def fail(length: int, *, exact: bool = True, preallocation: str = "off") -> None:
            raise BlockIOError(errno.ENOSPC, "no room")

        monkeypatch.setattr(driver_of(bench.graph.find_node(failing)), "truncate", fail)
        with pytest.raises(BlockIOError, match="no room"):
            await disk.truncate(length)
        assert len(content(bench, "source")) == len(content(bench, "target")) == SIZE
        await bench.close()

    run(main)


def test_a_target_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    """Too short, or open together with its backing image; nothing stays open."""
    make_chain(tmp_path, SIZE, [("base.qcow2", {}), ("copy.qcow2", {})])
    copy = {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "copy.qcow2")}}

    async def main() -> None:
        bench = JobBench()
        opener = bench.system.opener
        with pytest.raises(CommandError, match="too few"):
            await mirror(bench, target_size=SIZE - 512)
        chain = await opener.open_blockdev({"node-name": "chain", **copy})
        chain.monitor_owned = True
        before = set(bench.graph.nodes)
        with pytest.raises(CommandError, match="backing null"):
            await opener.open_blockdev({"driver": "blkmirror", "node-name": "m", "file": "source", "target": "chain"})
        with pytest.raises(InvalidParameter, match=r"target\.backing"):
            await opener.open_blockdev(
                {"driver": "blkmirror", "node-name": "m", "file": "source", "target": {**copy, "backing": "target"}}
            )
        assert set(bench.graph.nodes) == before
        await bench.close()

    run(main)


# ---------------------------------------------------------------------------------------- a backing file that is hidden


@pytest.mark.parametrize("seed", range(6))
def test_clusters_of_a_target_over_a_shared_backing_file_are_never_half(seed: int, tmp_path: Path) -> None:
    """Both sides begin as empty overlays of one base, with clusters of different sizes, and must look the same when the target
    is opened with its base: a cluster completed with zeroes would hide the base, one given up would uncover it."""
    fill = Random(99).randbytes(SIZE)
    make_chain(tmp_path, SIZE, [("base.qcow2", {0: fill})])
    for name, cluster in (("source.qcow2", 4096), ("copy.qcow2", 65536)):
        qblock.create(tmp_path / name, SIZE, backing="base.qcow2", backing_fmt="qcow2", cluster_size=cluster)
    allowed = [{fill[at : at + 512]} for at in range(0, SIZE, 512)]

    async def main() -> None:
        bench, random = JobBench(), Random(seed)
        files = {
            name: {"driver": "qcow2", "discard": "unmap", "file": {"driver": "file", "filename": str(tmp_path / path)}}
            for name, path in (("file", "source.qcow2"), ("target", "copy.qcow2"))
        }
        options = {"driver": "blkmirror", "node-name": "m", "discard": "unmap", **files}
        disk = bench.disk(await bench.system.opener.open_blockdev(options), "d")
        for _ in range(12):
            first, count = random.randrange(0, SIZE // 512 - 160), random.randrange(1, 160)
            sectors = range(first, first + count)
            match random.choice(("write", "write", "zero", "discard")):
                case "zero":
                    await disk.write_zeroes(512 * first, 512 * count, may_unmap=random.random() < 0.5)
                    allowed[first : first + count] = [{bytes(512)} for _ in sectors]
                case "discard":
                    await disk.discard(512 * first, 512 * count)
                    allowed[first : first + count] = [allowed[at] | {bytes(512)} for at in sectors]
                case "write":
                    data = random.randbytes(512 * count)
                    await disk.write(512 * first, data)
                    allowed[first : first + count] = [{data[at : at + 512]} for at in range(0, len(data), 512)]
        await bench.close()

    run(main)
    for name in ("source.qcow2", "copy.qcow2"):
        with qblock.open(tmp_path / name, backing=True) as image:
            data = image.read(0, SIZE)
        wrong = [at for at, contents in enumerate(allowed) if data[512 * at : 512 * (at + 1)] not in contents]
        assert not wrong, f"{name}: sectors {wrong}"


@pytest.mark.parametrize("written", [True, False])
def test_a_discard_does_not_uncover_the_backing_file_of_the_target(written: bool, tmp_path: Path) -> None:
    """Whoever has discarded finds zeroes there, and never what was there years ago, not even where nothing was written."""
    make_chain(tmp_path, SIZE, [("base.qcow2", {0: b"ancient!" * (SIZE // 8)}), ("copy.qcow2", {})])

    async def main() -> None:
        bench = JobBench()
        copy = {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "copy.qcow2")}}
        disk = bench.disk(await mirror(bench, target=copy), "d")
        if written:
            await disk.write(0, b"new!" * (SIZE // 4))
        await disk.discard(0, SIZE)
        await bench.close()

    run(main)
    with qblock.open(tmp_path / "copy.qcow2", backing=True) as image:
        assert image.read(0, SIZE) == bytes(SIZE)


def test_what_it_does_is_traced() -> None:
    """Each request with its place, and which side failed."""

    async def main() -> None:
        bench = JobBench()
        disk = bench.disk(await mirror(bench), "d")
        seen: list[tuple[str, object]] = []
        bench.system.env.trace.listen("blkmirror_*", lambda name, members: seen.append((name, members.get("side"))))
        await disk.write(0, b"x" * 512)
        await disk.write_zeroes(0, 512)
        await disk.discard(0, 512)
        await disk.flush()
        driver_of(bench.graph.find_node("target")).faults = Faults("write", 1, 1)
        with pytest.raises(BlockIOError):
            await disk.write(0, b"x" * 512)
        assert seen == [
            ("blkmirror_write", None), ("blkmirror_write_zeroes", None), ("blkmirror_discard", None),
            ("blkmirror_flush", None), ("blkmirror_write", None), ("blkmirror_error", "target"),
        ]  # fmt: skip
        await bench.close()

    run(main)
