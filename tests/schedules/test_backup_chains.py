"""A backup chain under load: a full backup, then increments by a bitmap. It restores what the disk held at every point in time.

Increments fail, are cancelled and stopped by errors in between; the guest never stops writing; the machine is restarted, with
the bitmap kept in its image. A copy of the disk is kept at each point; in the end each image of the chain has to show its own.
"""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import attrs
import pytest

from qblock.actions.action import Action, perform
from qblock.actions.backups import StartBlockdevBackup
from qblock.actions.bitmaps import AddBitmap, BitmapName
from qblock.backend import BlockBackend
from qblock.errors import QBlockError
from qblock.jobs.backup import BackupRequest
from qblock.jobs.backup_job import BackupJob
from qblock.jobs.backup_plan import BitmapMode
from qblock.jobs.new_copy import SyncMode
from qblock.jobs.state import OnError
from qblock.node import BlockDriverState
from qblock.permissions import Perm
from qblock.testing.jobbench import BusyGuest, Faults, JobBench, driver_of
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB

SIZE = 20 * 64 * KiB - 1536
POINTS = 7


class TakePicture(Action):
    """Keeps what a guest sees at the moment of the transaction."""

    kind: ClassVar[str] = "picture"

    def __init__(self, bench: JobBench, disk: BlockBackend) -> None:
        super().__init__(bench.system)
        self.disk = disk
        self.picture = b""

    async def prepare(self) -> None:
        await self.drain(self.disk.node)
        reader = BlockBackend(self.system.graph, perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
        reader.disable_queuing = True
        reader.insert(self.disk.node)
        self.picture = await reader.read(0, reader.length)
        reader.close()

    def commit(self) -> None:
        pass

    async def abort(self) -> None:
        pass


@attrs.define(eq=False)
class Chain:
    """The images of a chain, oldest first, and what the disk held at the points in time that they are to restore."""

    bench: JobBench
    random: Random
    directory: Path | None
    nodes: list[BlockDriverState] = attrs.field(factory=list)
    points: list[tuple[BlockDriverState, bytes]] = attrs.field(factory=list)
    attempts: int = 0

    async def storage(self, name: str) -> Any:
        """The options of the storage of an image: a file where others are to read it, shaky memory otherwise."""
        if self.directory is not None:
            filename = str(self.directory / f"{name}.img")
            await self.bench.system.opener.create_image("file", {"filename": filename, "size": 0})
            return {"driver": "file", "filename": filename}
        return (await self.bench.node(f"{name}-file", 0)).node_name

    async def image(self, name: str, below: BlockDriverState | None, **creation: Any) -> BlockDriverState:
        """A new image, open."""
        file = await self.storage(name)
        if below is not None and self.directory is not None:
            creation |= {"backing-file": f"{below.node_name}.img", "backing-fmt": "qcow2"}
        opener = self.bench.system.opener
        await opener.create_image("qcow2", {"file": file, "size": SIZE, **creation})
        return await self.open(name, file, below)

    async def open(self, name: str, file: Any, below: BlockDriverState | None) -> BlockDriverState:
        """An image that exists."""
        options = {"driver": "qcow2", "node-name": name, "file": file, "backing": below.node_name if below else None}
        node = await self.bench.system.opener.open_blockdev(options)
        node.monitor_owned = True
        return node

    async def new_target(self) -> BlockDriverState:
        """An empty image over the last one of the chain; its clusters are smaller or larger than those of the job."""
        self.attempts += 1
        below = self.nodes[-1] if self.nodes else None
        cluster = self.random.choice((4, 64, 128)) * KiB
        return await self.image(f"inc{self.attempts}", below, **{"cluster-size": cluster})

    async def drop(self, target: BlockDriverState) -> None:
        """A failed increment is thrown away."""
        target.monitor_owned = False
        await self.bench.system.opener.close_orphans()

    async def content(self, node: BlockDriverState) -> bytes:
        """What an image of the chain shows."""
        reader = self.bench.disk(node)
        try:
            return await reader.read(0, reader.length)
        finally:
            reader.close()


async def attempt(chain: Chain, disk: BlockBackend, *, spoil: bool, mode: BitmapMode) -> None:
    """One increment (the first time a full backup, with the bitmap's beginning), which perhaps does not end well."""
    bench, random = chain.bench, chain.random
    target = await chain.new_target()
    picture = TakePicture(bench, disk)
    if chain.nodes:
        request = BackupRequest(
            sync=SyncMode.BITMAP, job_id="j", bitmap="b", bitmap_mode=mode,
            on_target_error=random.choice((OnError.REPORT, OnError.STOP)),
        )  # fmt: skip
        actions: list[Action] = [picture]
    else:
        request = BackupRequest(sync=SyncMode.FULL, job_id="j")
        node = disk.node.node_name
        grain = random.choice((512, 4096, 65536))
        actions = [picture, AddBitmap(bench.system, BitmapName(node, "b"), granularity=grain, persistent=True)]
    start = StartBlockdevBackup(bench.system, device="d", target=target.node_name, request=request)
    await perform(bench.system, [*actions, start])
    job = start.job
    if spoil:
        await spoil_it(chain, job, target)
    await see_to_its_end(chain, job)
    if job.error is None:
        chain.nodes.append(target)
        chain.points.append((target, picture.picture))
    elif mode is BitmapMode.ALWAYS and chain.nodes:
        chain.nodes.append(target)  # a part of the next point in time
    else:
        await chain.drop(target)
        if not chain.nodes:
            disk.node.dirty_bitmaps.clear()


async def spoil_it(chain: Chain, job: BackupJob, target: BlockDriverState) -> None:
    """Let writes of the target fail from some time on, or cancel the job."""
    bench, random = chain.bench, chain.random
    await asyncio.sleep(random.choice((0, 0.0002, 0.001, 0.004)))
    if chain.directory is None and random.random() < 0.5:
        storage = target.children["file"].node
        driver_of(storage).faults = Faults("write", random.randrange(1, 6), 1 << 30)
        return
    try:
        await bench.jobs.cancel(job)
    except QBlockError:
        pass  # it is over already


async def see_to_its_end(chain: Chain, job: BackupJob) -> None:
    """Wait; when errors stop the job, end it, or make room so that it can go on."""
    while not job.concluded.done():
        if job.user_paused and job.paused:
            if chain.random.random() < 0.5:
                await chain.bench.jobs.cancel(job)
            else:
                driver_of(job.target.children["file"].node).faults = Faults()
                await chain.bench.jobs.resume(job)
        await chain.bench.system.clock.sleep_ns(1_000_000)
    if job.error is not None and chain.directory is None:
        driver_of(job.target.children["file"].node).faults = Faults()


class PatientGuest(BusyGuest):
    """A guest that goes on after writes that failed because the old data could not be kept."""

    async def _write(self, index: int, random: Random) -> None:
        try:
            await super()._write(index, random)
        except OSError:
            pass


async def write_until(guest: BusyGuest, over: asyncio.Event) -> None:
    """Never stop writing."""
    while not over.is_set():
        await guest.run(4)


async def make_chain(chain: Chain, *, mode: BitmapMode) -> bytes:
    """Make `POINTS` attempts under a guest; gives what the disk holds in the end."""
    disk = chain.bench.disk(await chain.image("disk", None), "d")
    guest = PatientGuest(disk, chain.random.randrange(1 << 30))
    await guest.fill()
    over = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(write_until(guest, over))
        for number in range(POINTS):
            await attempt(chain, disk, spoil=0 < number < POINTS - 1 and chain.random.random() < 0.6, mode=mode)
            await asyncio.sleep(chain.random.choice((0, 0.002, 0.02)))
        over.set()
    assert await disk.read(0, SIZE - SIZE % 512) == bytes(guest.model[: SIZE - SIZE % 512])
    (bitmap,) = disk.node.dirty_bitmaps
    assert bitmap.recording and not bitmap.busy
    return bytes(guest.model)


@pytest.mark.parametrize("mode", [BitmapMode.ON_SUCCESS, BitmapMode.ALWAYS])
@pytest.mark.parametrize("seed", range(20))
def test_a_chain_restores_every_point_in_time(seed: int, mode: BitmapMode) -> None:
    """With mode always a failed increment stays in the chain, as a part of the next one; otherwise it is thrown away."""

    async def main() -> None:
        chain = Chain(JobBench(seed), Random(seed), None)
        await make_chain(chain, mode=mode)
        assert len(chain.points) >= 2
        for node, picture in chain.points:
            assert await chain.content(node) == picture, node.node_name
        await chain.bench.close()

    run(main, Seeded(seed))


@pytest.mark.qemu
@pytest.mark.parametrize("seed", range(3))
def test_the_real_program_restores_every_point_in_time(seed: int, tmp_path: Path) -> None:
    """Who restores has perhaps nothing but qemu-img: each image of the chain becomes a plain disk, after all is closed."""
    points: list[tuple[str, bytes]] = []

    async def main() -> None:
        chain = Chain(JobBench(seed), Random(seed), tmp_path)
        await make_chain(chain, mode=BitmapMode.ON_SUCCESS)
        points.extend((node.node_name, picture) for node, picture in chain.points)
        await chain.bench.close()

    run(main, Seeded(seed))
    assert len(points) >= 2
    for name, picture in points:
        subprocess.run(["qemu-img", "check", "-q", f"{name}.img"], cwd=tmp_path, check=True)
        subprocess.run(["qemu-img", "convert", "-O", "raw", f"{name}.img", "disk.raw"], cwd=tmp_path, check=True)
        assert (tmp_path / "disk.raw").read_bytes() == picture


def test_increments_go_on_after_a_restart(tmp_path: Path) -> None:
    """The bitmap is in the image: after a clean shutdown the next increment is as small as it was to be, and right."""
    points: list[tuple[str, bytes]] = []
    for start in range(3):
        run(lambda start=start: one_life(tmp_path, start, points), Seeded(start))  # type: ignore[misc]
    run(lambda: compare_all(tmp_path, points), Seeded(0))


async def one_life(directory: Path, start: int, points: list[tuple[str, bytes]]) -> None:
    """Open the disk, write, make an increment, write, and close it."""
    chain = Chain(JobBench(start), Random(start), directory, attempts=start)
    if start:
        disk = chain.bench.disk(await chain.open("disk", {"driver": "file", "filename": str(directory / "disk.img")}, None), "d")
        (bitmap,) = disk.node.dirty_bitmaps
        assert bitmap.enabled and bitmap.persistent and 0 < bitmap.count <= 2 * 64 * KiB
        chain.nodes.append(await open_chain(chain, points))
    else:
        disk = chain.bench.disk(await chain.image("disk", None), "d")
        await disk.write(0, Random(1).randbytes(600 * KiB))
    await disk.write(start * 100 * KiB + 5, b"before the increment" * 10)
    await attempt(chain, disk, spoil=False, mode=BitmapMode.ON_SUCCESS)
    points.extend((node.node_name, picture) for node, picture in chain.points)
    await disk.write(start * 100 * KiB + 64 * KiB, b"after it" * 10)
    await chain.bench.close()


async def open_chain(chain: Chain, points: list[tuple[str, bytes]]) -> BlockDriverState:
    """The newest image, over all others."""
    node = None
    for name, _ in points:
        assert chain.directory is not None
        node = await chain.open(name, {"driver": "file", "filename": str(chain.directory / f"{name}.img")}, node)
    assert node is not None
    return node


async def compare_all(directory: Path, points: list[tuple[str, bytes]]) -> None:
    """Each image shows what the disk held then."""
    chain = Chain(JobBench(0), Random(0), directory)
    await open_chain(chain, points)
    assert len(points) == 3
    for name, picture in points:
        assert await chain.content(chain.bench.graph.find_node(name)) == picture
    await chain.bench.close()
