"""A crash at any moment while a chain is collapsed, in any direction: the files are a valid chain with all that was flushed.

Every layer lies on a storage that remembers its writes, all in one journal, so that the files which a killed process or a power
cut would have left together can be looked at for the moments of one run. They are opened again as their headers say.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from random import Random
from typing import Any, NamedTuple

import attrs
import pytest

from qblock.backend import BlockBackend
from qblock.driver import CheckFix, SupportsBacking, SupportsCheck
from qblock.jobs.active_commit import start_commit
from qblock.jobs.commit_plan import CommitRequest
from qblock.jobs.job import BlockJob
from qblock.jobs.mirror import MirrorRequest, start_blockdev_mirror
from qblock.jobs.new_copy import SyncMode
from qblock.jobs.state import JobStatus
from qblock.jobs.stream import StreamRequest, start_stream
from qblock.node import BlockDriverState
from qblock.testing.crash import CrashStorage
from qblock.testing.jobbench import JobBench
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SIZE = 64 * KiB
BLOCK = 512  # what a power cut does not tear
LAYERS = ("base", "low", "mid", "top")
PAIRS = list(itertools.combinations(reversed(LAYERS), 2))
MOMENTS = 14


class Certain(NamedTuple):
    """From the moment ``at`` on (a place in the journal) the disk holds ``blocks``, or what ``writes[first:]`` put there."""

    at: int
    blocks: list[bytes]
    first: int


@attrs.define
class Story:
    """What one run did, and what could be relied upon when. ``writes``: moment, block, data. ``active``: since when the disk is
    on which image."""

    storages: dict[str, CrashStorage]
    journal: list[CrashStorage]
    blocks: list[bytes] = attrs.field(factory=list)
    writes: list[tuple[int, int, bytes]] = attrs.field(factory=list)
    flushes: list[Certain] = attrs.field(factory=list)
    active: list[tuple[int, str]] = attrs.field(factory=list)

    def flushed(self, at: int) -> None:
        """All that is written is certain; ``at`` is when it has been."""
        self.flushes.append(Certain(at, list(self.blocks), len(self.writes)))

    def allowed(self, moment: int) -> list[set[bytes]]:
        """The contents of each block that are right at a moment."""
        known = [flush for flush in self.flushes if flush.at <= moment][-1]
        contents = [{block} for block in known.blocks]
        for began, index, data in self.writes[known.first :]:
            if began <= moment:
                contents[index].add(data)
        return contents


async def image(bench: JobBench, name: str, content: bytes | None, backing: str | None) -> BlockDriverState:
    """A qcow2 node on a crash storage: a new image whose header names its backing, or the one that ``content`` is."""
    if "crash-storage" not in bench.system.registry.names():
        bench.system.registry.register(CrashStorage)
    storage = await bench.system.opener.open_blockdev({"driver": "crash-storage", "node-name": f"{name}-file"})
    storage.monitor_owned = True
    assert isinstance(storage.driver, CrashStorage)
    if content is None:
        link = {} if backing is None else {"backing-file": backing, "backing-fmt": "qcow2"}
        options = {"file": f"{name}-file", "size": SIZE, "cluster-size": 4 * KiB, **link}
        await bench.system.opener.create_image("qcow2", options)
    else:
        storage.driver.fill(content)
        storage.length = len(content)
    node = await bench.system.opener.open_blockdev(
        {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": backing}
    )
    node.monitor_owned = True
    return node


async def tell(kind: str, high: str, low: str, seed: int) -> Story:
    """A guest writes, zeroes and flushes while its chain is collapsed."""
    bench, random = JobBench(seed), Random(seed)
    below: str | None = None
    for name in (*LAYERS, "copy"):
        node = await image(bench, name, None, below if name != "copy" else None)
        writer = bench.disk(node)
        for _ in range(0 if name == "copy" else 8):
            at = random.randrange(SIZE // BLOCK) * BLOCK
            await writer.write(at, random.randbytes(min(random.choice((512, 4096)), SIZE - at)))
        await writer.flush()
        writer.close()
        below = name if name != "copy" else below
    journal: list[CrashStorage] = []
    storages = {}
    for name in (*LAYERS, "copy"):
        driver = bench.graph.find_node(f"{name}-file").driver
        assert isinstance(driver, CrashStorage)
        driver.fill(bytes(driver.live))
        driver.journal, driver.restless = journal, True
        storages[name] = driver
    disk = bench.disk(bench.graph.find_node("top"), "d")
    data = await disk.read(0, SIZE)
    story = Story(storages, journal, [data[at : at + BLOCK] for at in range(0, SIZE, BLOCK)])
    story.flushed(0)
    story.active.append((0, "top"))

    def heard(event: str, members: Mapping[str, Any]) -> None:
        if event == "JOB_STATUS_CHANGE" and members["status"] == "concluded":
            story.active.append((len(journal), disk.node.node_name))

    bench.listeners.append(heard)
    async with asyncio.TaskGroup() as group:
        group.create_task(guest(story, disk, random))
        job = await start(bench, kind, high, low)
        await bench.until(job)
        assert job.error is None
    await bench.close()
    return story


async def start(bench: JobBench, kind: str, high: str, low: str) -> BlockJob:
    """Begin to collapse; one that becomes ready is told to complete when it is."""
    job: BlockJob
    match kind:
        case "stream":
            job = await start_stream(
                bench.system, device=high, request=StreamRequest(job_id="j", base_node=low, backing_file=low, speed=2048 * KiB)
            )
        case "commit":
            text = None if high == "top" else low
            request = CommitRequest(job_id="j", top_node=high, base_node=low, backing_file=text, speed=2048 * KiB)
            job = await start_commit(bench.system, device="d", request=request)
        case _:
            mirror = MirrorRequest(job_id="j", sync=SyncMode.FULL, granularity=4 * KiB)
            job = await start_blockdev_mirror(bench.system, device="d", target="copy", request=mirror)
    if kind == "mirror" or (kind, high) == ("commit", "top"):
        await bench.until(job, JobStatus.READY)
        await asyncio.sleep(0.02)
        bench.jobs.complete(job)
    return job


async def guest(story: Story, disk: BlockBackend, random: Random) -> None:
    """One request after the other. What is being written is certain only when a flush has ended."""
    for step in range(40):
        index = random.randrange(SIZE // BLOCK)
        data = random.randbytes(BLOCK) if random.random() < 0.8 else bytes(BLOCK)
        story.writes.append((len(story.journal), index, data))
        if any(data):
            await disk.write(index * BLOCK, data)
        else:
            await disk.write_zeroes(index * BLOCK, BLOCK)
        story.blocks[index] = data
        if step % 4 == 3:
            await disk.flush()
            story.flushed(len(story.journal))
        await asyncio.sleep(random.choice((0, 0.001, 0.01)))


async def look(files: Mapping[str, bytes], active: str) -> list[bytes]:
    """Open what a crash has left, from the active image down as the headers say: no errors but leaks. Returns the blocks."""
    names = [active]
    while (below := await _backing_named_in(files[names[-1]])) is not None:
        assert below not in names
        names.append(below)
    bench = JobBench()
    lower: str | None = None
    for name in reversed(names):
        node = await image(bench, name, files[name], lower)
        lower = name
    disk = bench.disk(node)
    data = await disk.read(0, SIZE)
    await bench.close()
    return [data[at : at + BLOCK] for at in range(0, SIZE, BLOCK)]


async def _backing_named_in(content: bytes) -> str | None:
    """What the header says; the image must have no errors."""
    bench = JobBench()
    node = await image(bench, "image", content, None)
    driver = node.driver
    assert isinstance(driver, SupportsBacking) and isinstance(driver, SupportsCheck)
    result = await driver.check(CheckFix.NONE)
    assert (result.corruptions, result.check_errors) == (0, 0), result.findings
    link = driver.backing_link()
    await bench.close()
    return None if link is None else link.filename


CASES = [
    # Between neighbours there is nothing to stream.
    *(("stream", high, low) for high, low in PAIRS if LAYERS.index(high) > LAYERS.index(low) + 1),
    *(("commit", high, low) for high, low in PAIRS),
    ("mirror", "top", "base"),
]


@pytest.mark.parametrize(("kind", "high", "low"), CASES)
def test_the_files_are_a_valid_chain_at_every_moment(kind: str, high: str, low: str) -> None:
    """Whoever starts the machine again, from the image that management knows to be the active one, has all that was flushed."""
    seed = CASES.index((kind, high, low))
    story = run(lambda: tell(kind, high, low, seed), Seeded(seed))
    random, count = Random(seed), len(story.journal)
    (ended, active), *_ = story.active[1:]
    assert len(story.flushes) > 5
    assert active == {"mirror": "copy", "commit": low if high == "top" else "top", "stream": "top"}[kind]
    moments = {0, count, *range(max(0, ended - 5), ended + 2), *(random.randrange(count) for _ in range(MOMENTS))}
    for moment in sorted(moments):
        files: list[dict[str, bytes]] = [{}, {}]
        for name, storage in story.storages.items():
            at = storage.moment_at(moment)
            files[0][name], files[1][name] = storage.after_kill(at), storage.after_power_cut(at, random)
        start_from = active if moment >= ended else "top"
        for how, left in zip(("kill", "power cut"), files, strict=True):
            blocks = run(lambda left=left, start_from=start_from: look(left, start_from))
            pairs = enumerate(zip(blocks, story.allowed(moment), strict=True))
            wrong = [index for index, (block, right) in pairs if block not in right]
            assert not wrong, f"{how} at {moment} of {count} (the job ended at {ended}): blocks {wrong}"
