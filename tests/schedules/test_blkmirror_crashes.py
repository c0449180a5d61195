"""A crash at any moment of streaming through a blkmirror: the source has what was flushed, the target all of it at the end only.

Source and target lie on storages that remember every write, so that the images which a killed process or a power cut would have
left can be looked at for the moments of one run.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import NamedTuple

import attrs
import pytest

from qblock.backend import BlockBackend
from qblock.driver import CheckFix, SupportsCheck
from qblock.jobs.stream import StreamRequest
from qblock.jobs.stream_through import start_stream_2012
from qblock.node import BlockDriverState
from qblock.testing.crash import CrashStorage
from qblock.testing.jobbench import JobBench
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SIZE = 128 * KiB
BLOCK = 512  # what a power cut does not tear


class Certain(NamedTuple):
    """From the moment ``at`` on (a number of effects) the disk holds ``blocks``, or what ``writes[first:]`` put there."""

    at: int
    blocks: list[bytes]
    first: int


@attrs.define
class Story:
    """What one run did to the storages, and what could be relied upon when. ``writes``: the source's effects, block, data."""

    source: CrashStorage
    target: CrashStorage
    base: bytes
    blocks: list[bytes]
    writes: list[tuple[int, int, bytes]] = attrs.field(factory=list)
    flushes: list[Certain] = attrs.field(factory=list)
    streamed: Certain | None = None

    def allowed(self, known: Certain, until: int) -> list[set[bytes]]:
        """The contents of each block that are right when the source has had ``until`` effects."""
        contents = [{block} for block in known.blocks]
        for began, index, data in self.writes[known.first :]:
            if began <= until:
                contents[index].add(data)
        return contents


async def crash_node(bench: JobBench, name: str, content: bytes = b"") -> CrashStorage:
    if "crash-storage" not in bench.system.registry.names():
        bench.system.registry.register(CrashStorage)
    node = await bench.system.opener.open_blockdev({"driver": "crash-storage", "node-name": name})
    node.monitor_owned = True
    assert isinstance(node.driver, CrashStorage)
    node.driver.fill(content)
    node.length = len(content)
    return node.driver


async def qcow2(bench: JobBench, name: str, file: str, backing: str | None) -> BlockDriverState:
    node = await bench.system.opener.open_blockdev(
        {"driver": "qcow2", "node-name": name, "file": file, "backing": backing}
    )
    node.monitor_owned = True
    return node


async def memory(bench: JobBench, name: str, content: bytes) -> None:
    writer = bench.disk(await bench.node(name, SIZE))
    await writer.write(0, content)
    writer.close()


async def tell(seed: int) -> Story:
    """A guest writes, zeroes and flushes while its disk is mirrored and streamed."""
    bench, random = JobBench(seed), Random(seed)
    base = random.randbytes(SIZE // 2) + bytes(SIZE // 2)
    await memory(bench, "base", base)
    storages = [await crash_node(bench, name) for name in ("source-file", "target-file")]
    for storage in storages:
        options = {"file": storage.node.node_name, "size": SIZE, "cluster-size": 4 * KiB}
        await bench.system.opener.create_image("qcow2", options)
        storage.fill(bytes(storage.live))
        storage.restless = True
    await qcow2(bench, "source", "source-file", "base")
    await qcow2(bench, "target", "target-file", None)
    options = {"driver": "blkmirror", "node-name": "m", "file": "source", "target": "target"}
    disk = bench.disk(await bench.system.opener.open_blockdev(options), "d")
    story = Story(*storages, base, [base[at : at + BLOCK] for at in range(0, SIZE, BLOCK)])
    story.flushes.append(Certain(0, list(story.blocks), 0))

    def done(name: str, members: object) -> None:
        story.streamed = Certain(0, list(story.blocks), len(story.writes))

    bench.system.env.trace.listen("stream_through_done", done)
    async with asyncio.TaskGroup() as group:
        group.create_task(guest(story, disk, random))
        job = await start_stream_2012(bench.system, device="d", request=StreamRequest(speed=256 * KiB))
        await bench.jobs.wait(job)
        assert job.error is None and story.streamed is not None
        story.streamed = story.streamed._replace(at=len(story.target.effects))
    await bench.close()
    return story


async def guest(story: Story, disk: BlockBackend, random: Random) -> None:
    """One request after the other. What is being written is certain only when it is done."""
    for step in range(60):
        index = random.randrange(SIZE // BLOCK)
        data = random.randbytes(BLOCK) if random.random() < 0.8 else bytes(BLOCK)
        story.writes.append((len(story.source.effects), index, data))
        if any(data):
            await disk.write(index * BLOCK, data)
        else:
            await disk.write_zeroes(index * BLOCK, BLOCK)
        story.blocks[index] = data
        if step % 5 == 4:
            known = list(story.blocks)
            await disk.flush()
            story.flushes.append(Certain(len(story.source.effects), known, len(story.writes)))
        await asyncio.sleep(random.choice((0, 0.001, 0.01)))


async def look(image: bytes, base: bytes | None) -> list[bytes]:
    """Open what a crash has left: it must have no errors but leaks. Returns its blocks."""
    bench = JobBench()
    await crash_node(bench, "file", image)
    if base is not None:
        await memory(bench, "base", base)
    node = await qcow2(bench, "image", "file", None if base is None else "base")
    assert isinstance(node.driver, SupportsCheck)
    result = await node.driver.check(CheckFix.NONE)
    assert (result.corruptions, result.check_errors) == (0, 0), result.findings
    disk = bench.disk(node)
    data = await disk.read(0, SIZE)
    await bench.close()
    return [data[at : at + BLOCK] for at in range(0, SIZE, BLOCK)]


def wrong(blocks: list[bytes], allowed: list[set[bytes]]) -> list[int]:
    return [index for index, (block, right) in enumerate(zip(blocks, allowed, strict=True)) if block not in right]


@pytest.mark.parametrize("seed", range(4))
def test_the_source_has_what_was_flushed_and_the_target_all_of_it_from_the_end_on(seed: int) -> None:
    """Until the stream has completed management goes back to the source, whatever happened; afterwards both will do after a
    kill, and the source after a power cut too: the guest's flushes never reach the target."""
    story = run(lambda: tell(seed), Seeded(seed))
    random, streamed = Random(seed), story.streamed
    assert streamed is not None and len(story.flushes) > 5

    def moments(count: int) -> list[int]:
        return sorted({0, count, *(random.randrange(count) for _ in range(25))})

    for moment in moments(len(story.source.effects)):
        known = [flush for flush in story.flushes if flush.at <= moment][-1]
        for image in (story.source.after_kill(moment), story.source.after_power_cut(moment, random)):
            blocks = run(lambda image=image: look(image, story.base))
            assert not wrong(blocks, story.allowed(known, moment)), f"source, moment {moment}"
    incomplete = 0
    for moment in moments(len(story.target.effects)):
        blocks = run(lambda moment=moment: look(story.target.after_kill(moment), None))
        mistakes = wrong(blocks, story.allowed(streamed, len(story.source.effects)))
        assert not mistakes or moment < streamed.at, f"target, moment {moment}"
        incomplete += bool(mistakes)
    assert incomplete > 3, "nobody may rely on the target before"
