"""Two disks of one guest, which writes to one and then to the other: a transaction catches both at one moment.

The guest writes block n of the log, waits until that is done, and then writes block n of the data, as a database does. A copy of
both disks is of use only if it could have been made while the guest was stopped: with as many blocks of data as of log, or with
one less.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import ClassVar

import pytest

from qblock.actions.action import Action, perform
from qblock.actions.bitmaps import AddBitmap, BitmapName, DisableBitmap
from qblock.actions.mirrors import StartBlockdevMirror
from qblock.actions.snapshots import Snapshot
from qblock.backend import BlockBackend
from qblock.jobs.mirror import CopyMode, MirrorRequest
from qblock.jobs.mirror_job import MirrorJob
from qblock.jobs.new_copy import SyncMode
from qblock.jobs.state import JobStatus
from qblock.system import BlockSystem
from qblock.testing.graphs import assert_consistent
from qblock.testing.jobbench import JobBench, driver_of
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SEEDS = range(40)
BLOCK = 4 * KiB
COUNT = 60
SIZE = COUNT * BLOCK
DISKS = ("log", "data")
MODES = (CopyMode.BACKGROUND, CopyMode.WRITE_BLOCKING)


class OrderedGuest:
    """Writes block after block, first of the log, then of the data."""

    def __init__(self, bench: JobBench, random: Random) -> None:
        self.random = random
        self.disks: list[BlockBackend] = [bench.disk(bench.graph.find_node(f"{name}-n"), name) for name in DISKS]

    async def run(self) -> None:
        for number in range(COUNT):
            for disk in self.disks:
                await disk.write(number * BLOCK, bytes([1 + number % 255]) * BLOCK)
            await asyncio.sleep(self.random.choice((0, 0, 0.0001, 0.001)))


class Slow(Action):
    """Takes its time when it is prepared, as one does that makes a file."""

    kind: ClassVar[str] = "slow"
    joins_groups: ClassVar[bool] = True

    async def prepare(self) -> None:
        await asyncio.sleep(self.system.env.random.choice((0, 0.001, 0.003)))

    def commit(self) -> None:
        """Nothing to do."""

    async def abort(self) -> None:
        """Nothing to undo."""


def slowed(system: BlockSystem, actions: list[Action]) -> list[Action]:
    """The actions, with time between them."""
    return [each for action in actions for each in (action, Slow(system))]


def blocks(bench: JobBench, node: str) -> list[int]:
    """The numbers of the blocks that a node in memory holds."""
    content = driver_of(bench.graph.find_node(node)).content().ljust(SIZE, b"\0")
    return [number for number in range(COUNT) if content[number * BLOCK] == 1 + number % 255]


def could_be_one_moment(log: int, data: int) -> bool:
    """Whether the guest can have done so many writes to each when it was stopped."""
    return data <= log <= data + 1


async def with_guest(
    seed: int, transact: Callable[[JobBench, Random], Awaitable[None]], *extra: str
) -> JobBench:
    """Let the guest write, and somewhere in between ``transact``; the ``extra`` nodes are made beside the two disks."""
    bench, random = JobBench(seed), Random(seed)
    for name in ("log-n", "data-n", *extra):
        await bench.node(name, SIZE)
    guest = OrderedGuest(bench, random)
    async with asyncio.TaskGroup() as group:
        writing = group.create_task(guest.run())
        await asyncio.sleep(random.random() * 0.03)
        await transact(bench, random)
        assert_consistent(bench.graph)
        await writing
    return bench


async def overlays(bench: JobBench) -> None:
    """An empty qcow2 overlay for each disk, in memory."""
    for name in DISKS:
        file = await bench.system.opener.open_blockdev({"driver": "memory", "node-name": f"{name}-file", "size": 0})
        file.monitor_owned = True
        await bench.system.opener.create_image("qcow2", {"file": file.node_name, "size": SIZE})
        overlay = await bench.system.opener.open_blockdev(
            {"driver": "qcow2", "node-name": f"{name}-top", "file": file.node_name, "backing": None}
        )
        overlay.monitor_owned = True


@pytest.mark.parametrize("seed", SEEDS)
def test_snapshots_of_one_transaction_are_of_one_moment(seed: int) -> None:
    """The two images below can be backed up, and the backup be restored."""

    async def transact(bench: JobBench, random: Random) -> None:
        await overlays(bench)
        order = random.sample(DISKS, 2)
        actions = [Snapshot(bench.system, node=name, overlay=f"{name}-top") for name in order]
        await perform(bench.system, slowed(bench.system, actions))

    async def main() -> None:
        bench = await with_guest(seed, transact)
        log, data = (blocks(bench, f"{name}-n") for name in DISKS)
        assert log == list(range(len(log))) and data == list(range(len(data)))
        assert could_be_one_moment(len(log), len(data))
        for name in DISKS:
            disk = bench.graph.find_backend(name)
            assert disk.node.node_name == f"{name}-top"
            for number in range(COUNT):
                assert await disk.read(number * BLOCK, BLOCK) == bytes([1 + number % 255]) * BLOCK
        await bench.close()

    run(main, Seeded(seed))


def mirrors(bench: JobBench, sync: SyncMode, mode: CopyMode, order: list[str]) -> list[Action]:
    """Mirrors of both disks to nodes in memory."""
    return [
        StartBlockdevMirror(
            bench.system, device=name, target=f"{name}-copy",
            request=MirrorRequest(sync=sync, job_id=name, copy_mode=mode, granularity=BLOCK),
        )
        for name in order
    ]  # fmt: skip


async def end(bench: JobBench, order: list[str]) -> None:
    """Tell the mirrors to end when they are ready, without a switch."""
    jobs = [bench.jobs.find_block_job(name) for name in order]
    for job in jobs:
        await bench.until(job, JobStatus.READY)
    for job in jobs:
        await bench.jobs.cancel(job, force=False)
    for job in jobs:
        assert isinstance(job, MirrorJob)
        await bench.jobs.wait(job)
        assert job.error is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", SEEDS)
def test_mirrors_of_one_transaction_begin_at_one_moment(seed: int, mode: CopyMode) -> None:
    """With sync none the copies hold what was written since: on both disks since the same moment."""

    async def transact(bench: JobBench, random: Random) -> None:
        order = random.sample(DISKS, 2)
        await perform(bench.system, slowed(bench.system, mirrors(bench, SyncMode.NONE, mode, order)))

    async def main() -> None:
        bench = await with_guest(seed, transact, "log-copy", "data-copy")
        await end(bench, list(DISKS))
        log, data = (blocks(bench, f"{name}-copy") for name in DISKS)
        assert log == list(range(COUNT - len(log), COUNT)) and data == list(range(COUNT - len(data), COUNT))
        assert could_be_one_moment(COUNT - len(log), COUNT - len(data))
        await bench.close()

    run(main, Seeded(seed))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", SEEDS)
def test_mirrors_of_a_group_end_at_one_moment(seed: int, mode: CopyMode) -> None:
    """The copies are a backup of both disks, though the guest has never stopped."""

    async def transact(bench: JobBench, random: Random) -> None:
        order = random.sample(DISKS, 2)
        await perform(bench.system, mirrors(bench, SyncMode.FULL, mode, order), grouped=True)
        await end(bench, random.sample(DISKS, 2))

    async def main() -> None:
        bench = await with_guest(seed, transact, "log-copy", "data-copy")
        log, data = (blocks(bench, f"{name}-copy") for name in DISKS)
        assert log == list(range(len(log))) and data == list(range(len(data)))
        assert could_be_one_moment(len(log), len(data))
        await bench.close()

    run(main, Seeded(seed))


def test_two_commands_are_two_moments() -> None:
    """What the transaction is for: by themselves, mirrors begin and end when they do."""

    async def main(seed: int) -> bool:
        async def transact(bench: JobBench, random: Random) -> None:
            for action in mirrors(bench, SyncMode.FULL, CopyMode.BACKGROUND, ["log", "data"]):
                await perform(bench.system, [action])
            await end(bench, ["log", "data"])

        bench = await with_guest(seed, transact, "log-copy", "data-copy")
        log, data = (len(blocks(bench, f"{name}-copy")) for name in DISKS)
        await bench.close()
        return could_be_one_moment(log, data)

    assert not all(run(lambda seed=seed: main(seed), Seeded(seed)) for seed in SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_write_is_lost_between_two_bitmaps(seed: int) -> None:
    """One bitmap takes over from another one while a file is made in between: each write is in exactly one of them."""

    before = []

    async def transact(bench: JobBench, random: Random) -> None:
        system = bench.system
        AddBitmap(system, BitmapName("log", "old"), granularity=BLOCK).perform_alone()
        before.extend(blocks(bench, "log-n"))
        await asyncio.sleep(random.random() * 0.01)
        old, new = BitmapName("log", "old"), BitmapName("log", "new")
        actions = [DisableBitmap(system, old), AddBitmap(system, new, granularity=BLOCK)]
        await perform(system, slowed(system, actions))

    async def main() -> None:
        bench = await with_guest(seed, transact)
        old, new = bench.graph.find_node("log-n").dirty_bitmaps
        for number in range(len(before) + 1, COUNT):
            assert old.get(number * BLOCK) is not new.get(number * BLOCK), number
        await bench.close()

    run(main, Seeded(seed))
