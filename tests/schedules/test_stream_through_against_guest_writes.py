"""Streaming through a blkmirror under a writing guest: in the end the target is the guest's disk, and no write is ever lost."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from qblock.drivers.blkmirror import BlkmirrorDriver
from qblock.errors import BlockIOError, QBlockError
from qblock.jobs.state import JobStatus, OnError
from qblock.jobs.stream import StreamRequest
from qblock.jobs.stream_through import start_stream_2012
from qblock.node import BlockDriverState
from qblock.testing.jobbench import BusyGuest, Faults, JobBench, driver_of
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SIZE = 512 * KiB
SOURCE_CLUSTER = 4 * KiB


async def image(
    bench: JobBench, name: str, random: Random, *, backing: str | None = None, cluster: int = SOURCE_CLUSTER, writes: int = 0
) -> BlockDriverState:
    """A qcow2 node over shaky memory, with some content; ``backing`` None: it has no backing node."""
    storage = await bench.node(f"{name}-file", 0)
    slow, driver_of(storage).random = driver_of(storage).random, None
    await bench.system.opener.create_image(
        "qcow2", {"file": storage.node_name, "size": SIZE, "cluster-size": cluster}
    )
    options = {"driver": "qcow2", "node-name": name, "file": storage.node_name, "backing": backing, "discard": "unmap"}
    node = await bench.system.opener.open_blockdev(options)
    node.monitor_owned = True
    writer = bench.disk(node)
    for _ in range(writes):
        start = random.randrange(SIZE // 512) * 512
        await writer.write(start, random.randbytes(min(random.choice((512, 4096, 20 * KiB)), SIZE - start)))
    writer.close()
    driver_of(storage).random = slow
    return node


async def mirrored(bench: JobBench, random: Random, *, old_content: int) -> BlockDriverState:
    """A mirror of a chain of three images; the target has larger clusters, and ``old_content`` writes that are not to stay."""
    await image(bench, "base", random, writes=30)
    await image(bench, "mid", random, backing="base", writes=20)
    await image(bench, "top", random, backing="mid", writes=10)
    await image(bench, "copy", random, cluster=16 * KiB, writes=old_content)
    options = {"driver": "blkmirror", "node-name": "m", "file": "top", "target": "copy", "discard": "unmap"}
    node = await bench.system.opener.open_blockdev(options)
    node.monitor_owned = True
    return node


async def content(bench: JobBench, name: str) -> bytes:
    """What a node shows; read as quietly as possible."""
    node = bench.graph.find_node(name)
    data = bytearray(SIZE)
    await node.driver.read_into(0, memoryview(data))
    return bytes(data)


@pytest.mark.parametrize("seed", range(24))
def test_the_target_becomes_the_guests_disk(seed: int) -> None:
    """Paused, sometimes slow, with or without a base, over a target that is fresh or holds old content."""

    async def main() -> None:
        bench, random = JobBench(seed), Random(seed)
        disk = bench.disk(await mirrored(bench, random, old_content=random.choice((0, 25))), "d")
        guest = BusyGuest(disk, seed)
        guest.model[:] = await disk.read(0, SIZE)
        base = random.choice((None, None, "base", "mid"))
        request = StreamRequest(
            base_node=base, backing_file=base and f"{base}.qcow2", speed=random.choice((0, 0, 64 * KiB))
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(guest.run(20))
            job = await start_stream_2012(bench.system, device="d", request=request)
            await asyncio.sleep(random.choice((0, 0.001, 0.01)))
            if job.status is JobStatus.RUNNING:
                await bench.jobs.pause(job)
                await asyncio.sleep(0.002)
                await bench.jobs.resume(job)
            await bench.jobs.wait(job)
        assert job.error is None and job.progress_done == job.progress_total == SIZE
        below = bench.graph.find_node("top").backing
        assert (below.node.node_name if below else None) == base
        await guest.run(2)
        assert await content(bench, "m") == bytes(guest.model)
        assert await content(bench, "copy") == bytes(guest.model)
        assert not any(edge.frozen for node in bench.graph.nodes.values() for edge in node.parents)
        await bench.close()

    run(main, Seeded(seed))


@pytest.mark.parametrize("seed", range(8))
def test_a_cancelled_stream_leaves_the_mirror_and_the_guests_disk(seed: int) -> None:
    """Streaming again completes the target."""

    async def main() -> None:
        bench, random = JobBench(seed), Random(seed)
        disk = bench.disk(await mirrored(bench, random, old_content=0), "d")
        guest = BusyGuest(disk, seed)
        guest.model[:] = await disk.read(0, SIZE)
        async with asyncio.TaskGroup() as group:
            group.create_task(guest.run(15))
            job = await start_stream_2012(bench.system, device="d", request=StreamRequest(speed=4 * KiB))
            await asyncio.sleep(random.random() / 100)
            await bench.jobs.cancel(job)
            await bench.jobs.wait(job)
        assert job.cancelled and bench.graph.find_node("top").backing is not None
        assert isinstance(disk.node.driver, BlkmirrorDriver)
        assert await content(bench, "m") == bytes(guest.model)
        again = await start_stream_2012(bench.system, device="d", request=StreamRequest())
        await bench.jobs.wait(again)
        assert await content(bench, "copy") == bytes(guest.model)
        await bench.close()

    run(main, Seeded(seed))


@pytest.mark.parametrize("side", ["top-file", "mid-file", "copy-file"])
@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.STOP])
def test_a_failure_ends_or_stops_the_job_and_is_not_passed_over(side: str, operation: str, policy: OnError) -> None:
    """The third request of a kind at one of the images fails: either the job fails and the chain stays, or the part is done
    again after resume and the target is complete."""

    async def main() -> None:
        bench, random = JobBench(5), Random(5)
        disk = bench.disk(await mirrored(bench, random, old_content=0), "d")
        expected = await disk.read(0, SIZE)
        faults = driver_of(bench.graph.find_node(side)).faults = Faults(operation, 3, 3)
        job = await start_stream_2012(bench.system, device="d", request=StreamRequest(on_error=policy))
        stops = 0
        while not job.concluded.done():
            if job.paused:
                stops += 1
                await (bench.jobs.resume(job) if stops < 5 else bench.jobs.cancel(job))
            await bench.system.clock.sleep_ns(1_000_000)
        failed = faults.seen >= 3
        driver_of(bench.graph.find_node(side)).faults = Faults()
        if job.error is not None:
            assert failed and (isinstance(job.error, QBlockError) or stops == 5), "an image may be poisoned for good"
            assert bench.graph.find_node("top").backing is not None
        else:
            assert await content(bench, "copy") == expected
        if policy is OnError.STOP and operation == "read":
            assert job.error is None and stops == failed
        if policy is OnError.REPORT and failed:
            assert isinstance(job.error, BlockIOError)
        await bench.close()

    run(main, Seeded(5))
