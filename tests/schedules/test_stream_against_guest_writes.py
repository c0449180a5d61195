"""A stream copies data up under a writing guest, on storage that takes its time: the guest's view never changes."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from qblock.errors import QBlockError
from qblock.jobs.state import OnError
from qblock.jobs.stream import StreamRequest, start_stream
from qblock.node import BlockDriverState
from qblock.testing.jobbench import BusyGuest, Faults, JobBench, ShakyMemory, driver_of
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SIZE = 1024 * KiB
CLUSTER = 4 * KiB
LAYERS = ("base", "low", "mid", "top")


async def layer(bench: JobBench, name: str, below: str | None, random: Random) -> BlockDriverState:
    """A qcow2 node over shaky memory, with some content."""
    storage = await bench.node(f"{name}-file", 0)
    slow, driver_of(storage).random = driver_of(storage).random, None
    await bench.system.opener.create_image(
        "qcow2", {"file": storage.node_name, "size": SIZE, "cluster-size": CLUSTER}
    )
    options = {"driver": "qcow2", "node-name": name, "file": storage.node_name, "backing": below}
    node = await bench.system.opener.open_blockdev(options)
    node.monitor_owned = True
    writer = bench.disk(node)
    for _ in range(40):
        start = random.randrange(SIZE // 512) * 512
        data = random.randbytes(min(random.choice((512, 4096, 20 * KiB)), SIZE - start))
        await writer.write(start, data)
    writer.close()
    driver_of(storage).random = slow
    return node


async def chain(bench: JobBench, random: Random) -> BlockDriverState:
    """Four layers; returns the top."""
    below: str | None = None
    for name in LAYERS:
        top = await layer(bench, name, below, random)
        below = name
    return top


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_under_a_writing_guest_changes_nothing_it_sees(seed: int) -> None:
    """Sometimes cancelled, sometimes paused, to any base: the disk is what the guest wrote over what was there."""

    async def main() -> None:
        bench, random = JobBench(seed), Random(seed)
        disk = bench.disk(await chain(bench, random), "d")
        guest = BusyGuest(disk, seed)
        guest.model[:] = await disk.read(0, SIZE)
        base = random.choice((None, "base", "low"))
        async with asyncio.TaskGroup() as group:
            group.create_task(guest.run(25))
            # qcow2 on a node has no file name for the header, so one is given.
            text = None if base is None else f"{base}.qcow2"
            job = await start_stream(
                bench.system, device="d", request=StreamRequest(base_node=base, backing_file=text)
            )
            await asyncio.sleep(random.choice((0, 0.001, 0.01)))
            try:
                await bench.jobs.pause(job)
                await asyncio.sleep(0.002)
                await bench.jobs.resume(job)
                if random.random() < 0.2:
                    await bench.jobs.cancel(job)
            except QBlockError:
                pass  # it is over already
            await bench.jobs.wait(job)
        cancelled = job.force_cancelled
        assert (job.error is None) == (not cancelled)
        assert await disk.read(0, SIZE) == bytes(guest.model)
        if not cancelled:
            below = disk.node.backing
            assert (below.node.node_name if below else None) == base
        assert not any(edge.frozen for edge in disk.node.children.values())
        assert len(bench.graph.nodes) == 2 * len(LAYERS)
        await bench.close()

    run(main, Seeded(seed))


@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.IGNORE, OnError.STOP])
@pytest.mark.parametrize("nth", [1, 2, 3, 5, 9, 17, 30])
def test_a_failing_read_below_ends_as_the_policy_says(nth: int, policy: OnError) -> None:
    """The n-th read of a lower image fails: nothing hangs, the guest's view stays, and stop continues after resume."""

    async def main() -> None:
        bench, random = JobBench(nth), Random(nth)
        disk = bench.disk(await chain(bench, random), "d")
        before = await disk.read(0, SIZE)
        storage = bench.graph.find_node("low-file").driver
        assert isinstance(storage, ShakyMemory)
        storage.faults = Faults("read", nth, nth)
        job = await start_stream(bench.system, device="d", request=StreamRequest(on_error=policy))
        while not job.concluded.done():
            if job.paused:
                await bench.jobs.resume(job)
            await bench.system.clock.sleep_ns(1_000_000)
        failed = storage.faults.seen >= nth
        assert (job.error is not None) == (failed and policy is not OnError.STOP)
        assert (disk.node.backing is not None) == (job.error is not None)
        storage.faults = Faults()
        assert await disk.read(0, SIZE) == before
        await bench.close()

    run(main, Seeded(nth))
