"""Random histories of a chain: jobs of all kinds, snapshots, bitmaps and faults, under a guest that always writes.

A history is made from its seed: the images, what the guest writes, which operation comes when, what fails, and the schedule of
the tasks. A model knows what the disk must hold, and what each image must show as long as nobody writes below it. Run many::

    python tests/schedules/job_histories.py 0 2000
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, ClassVar

import attrs

from qblock.actions.action import Action, perform
from qblock.actions.backups import StartBlockdevBackup
from qblock.actions.snapshots import Snapshot
from qblock.backend import BlockBackend
from qblock.chain import backing_chain, contains
from qblock.dirty import DirtyBitmap
from qblock.errors import QBlockError
from qblock.jobs.active_commit import start_commit
from qblock.jobs.backup import BackupRequest
from qblock.jobs.commit_plan import CommitRequest
from qblock.jobs.job import BlockJob
from qblock.jobs.mirror import CopyMode, MirrorRequest, start_blockdev_mirror
from qblock.jobs.new_copy import SyncMode
from qblock.jobs.state import OnError
from qblock.jobs.stream import StreamRequest, start_stream
from qblock.node import BlockDriverState
from qblock.permissions import Perm
from qblock.system import BlockSystem
from qblock.testing.graphs import assert_consistent
from qblock.testing.jobbench import Faults, JobBench, driver_of
from qblock.units import KiB
from random_histories import bring_jobs_to_their_ends, live_many, live_one

SIZE = 192 * KiB
CLUSTER = 4 * KiB
BLOCK = 1536
LAYERS = ("base", "low", "mid", "top")
SPARES = ("s0", "s1", "s2")
OVERLAYS = ("o0", "o1")


@attrs.frozen
class View:
    """What a disk showed at one moment; a write of a ``loose`` block was under way, so it holds the old or the new data."""

    data: bytes
    loose: frozenset[int]

    def agrees(self, seen: bytes) -> bool:
        """Whether ``seen`` is this view."""
        return len(seen) == len(self.data) and all(
            index in self.loose or seen[index * BLOCK : (index + 1) * BLOCK] == self.data[index * BLOCK : (index + 1) * BLOCK]
            for index in range(-(-len(seen) // BLOCK))
        )


class Guest:
    """Writers that never stop until told, each on blocks of its own; a failed write is tried again.

    Only where the image takes no writes any more, since its metadata could not be written, they end with it.
    """

    def __init__(self, disk: BlockBackend, random: Random) -> None:
        self.disk = disk
        self.random = random
        self.model = bytearray(SIZE)
        self.under_way: set[int] = set()
        self.told: dict[str, set[int]] = {}
        """Blocks written since a bitmap was added to the node that was active meanwhile, by the bitmap's name."""
        self.running = True

    def capture(self) -> View:
        """What the disk shows now."""
        return View(bytes(self.model), frozenset(self.under_way))

    async def writer(self, number: int) -> None:
        """One writer."""
        random, blocks = Random(self.random.random()), range(number, SIZE // BLOCK, 3)
        while self.running:
            index, kind = random.choice(blocks), random.random()
            data = random.randbytes(BLOCK) if kind < 0.8 else bytes(BLOCK)
            before, bitmaps = self.disk.node, self.disk.node.dirty_bitmaps.copy()
            self.under_way.add(index)
            if not await self._write(index, data, zero=kind >= 0.9):
                return
            self.model[index * BLOCK : (index + 1) * BLOCK] = data
            self.under_way.discard(index)
            if before is self.disk.node:
                for bitmap in bitmaps:
                    if bitmap.name in self.told:
                        self.told[bitmap.name].add(index)
            await asyncio.sleep(random.choice((0, 0.0005, 0.003)))

    async def _write(self, index: int, data: bytes, *, zero: bool) -> bool:
        while True:
            try:
                if zero:
                    await self.disk.write_zeroes(index * BLOCK, BLOCK, may_unmap=True)
                else:
                    await self.disk.write_from(index * BLOCK, memoryview(data))
            except QBlockError:
                if self.disk.node.poisoned is not None:
                    return False
                await asyncio.sleep(0.001)
            else:
                return True


class Note(Action):
    """A part of a transaction that takes down what the disk shows while what was prepared before keeps it at rest."""

    kind: ClassVar[str] = "note"

    def __init__(self, system: BlockSystem, guest: Guest) -> None:
        super().__init__(system)
        self._guest = guest
        self.view: View | None = None

    async def prepare(self) -> None:
        """See `Action`."""
        self.view = self._guest.capture()

    def commit(self) -> None:
        """See `Action`."""

    async def abort(self) -> None:
        """See `Action`."""


class History:
    """One history. ``views`` has what each image must show, None where nobody can know."""

    def __init__(self, seed: int) -> None:
        self.bench = JobBench(seed)
        self.random = Random(seed)
        self.system = self.bench.system
        self.graph = self.bench.graph
        self.views: dict[str, View | None] = {}
        self.outcomes: dict[str, Callable[[View | None], None]] = {}
        """What a job's good end means for the views, by its id; called with what the disk showed when it was pending."""
        self.pending: dict[str, View] = {}
        self.starts: dict[str, View] = {}
        self.log: list[str] = []
        self.count = 0
        self.spares = list(SPARES)
        self.overlays = list(OVERLAYS)
        self.bench.listeners.append(self._heard)

    # ------------------------------------------------------------------------------------------------------------- making

    async def image(self, name: str, below: str | None, *, content: int) -> BlockDriverState:
        """A qcow2 node over shaky memory, with some content."""
        storage = await self.bench.node(f"{name}-file", 0)
        slow, driver_of(storage).random = driver_of(storage).random, None
        options = {"file": storage.node_name, "size": SIZE, "cluster-size": CLUSTER}
        await self.system.opener.create_image("qcow2", options)
        node = await self.system.opener.open_blockdev(
            {"driver": "qcow2", "node-name": name, "file": storage.node_name, "backing": below, "discard": "unmap"}
        )
        node.monitor_owned = True
        writer = self.bench.disk(node)
        for _ in range(content):
            start = self.random.randrange(SIZE // 512) * 512
            await writer.write(start, self.random.randbytes(min(self.random.choice((512, 4096, 9000)), SIZE - start)))
        writer.close()
        driver_of(storage).random = slow
        return node

    async def make(self) -> None:
        """The chain, the spare images, the guest."""
        below: str | None = None
        for name in LAYERS:
            top = await self.image(name, below, content=12)
            self.views[name] = View(await self.shown(top) or b"", frozenset())
            below = name
        for name in (*SPARES, *OVERLAYS):
            await self.image(name, None, content=0)
        self.disk = self.bench.disk(top, "d")
        self.guest = Guest(self.disk, Random(self.random.random()))
        self.guest.model[:] = await self.disk.read(0, SIZE)

    async def shown(self, node: BlockDriverState) -> bytes | None:
        """What a node shows, if somebody may look."""
        reader = BlockBackend(self.graph, perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
        try:
            reader.insert(node)
            return await reader.read(0, SIZE)
        except QBlockError:
            return None
        finally:
            reader.close()

    # ---------------------------------------------------------------------------------------------------------- the model

    def _heard(self, event: str, data: Mapping[str, Any]) -> None:
        job = str(data.get("id", data.get("device", "")))
        if event == "JOB_STATUS_CHANGE" and data["status"] == "pending":
            self.pending[job] = self.guest.capture()
        elif event == "JOB_STATUS_CHANGE" and data["status"] == "running":
            self.starts.setdefault(job, self.guest.capture())
        elif event == "BLOCK_JOB_COMPLETED" and "error" not in data and job in self.outcomes:
            self.outcomes[job](self.pending.get(job))

    def written_below(self, node: BlockDriverState, *, hidden_by: BlockDriverState | None = None) -> None:
        """Somebody may write to ``node``: nobody knows what the images over it show, unless ``hidden_by`` lies between."""
        for name in self.views:
            image = self.graph.nodes.get(name)
            if image is None or image is node or not contains(image, node):
                continue
            if hidden_by is None or not contains(image, hidden_by):
                self.views[name] = None

    def moved(self) -> None:
        """The guest's disk is another image now."""
        active = next(iter(backing_chain(self.disk.node)))
        self.views.pop(active.node_name, None)
        self.written_below(active)

    # ----------------------------------------------------------------------------------------------------------- the steps

    @property
    def chain(self) -> list[BlockDriverState]:
        """The images of the disk, top first."""
        return list(backing_chain(self.disk.node))

    def job_id(self) -> str:
        """A new id."""
        self.count += 1
        return f"j{self.count}"

    def policy(self) -> OnError:
        """Any policy."""
        return self.random.choice(tuple(OnError))

    def speed(self) -> int:
        """None, or slow enough to last."""
        return self.random.choice((0, 0, 512 * KiB, 4096 * KiB))

    async def commit(self) -> None:
        """Inner layers or the active one, any pair of the chain."""
        job, chain = self.job_id(), self.chain
        if len(chain) < 2:
            return
        high, low = sorted(self.random.sample(range(len(chain)), 2))
        top, base = chain[high], chain[low]
        active = top is chain[0]
        known = self.views.get(top.node_name)

        def ended(at_end: View | None) -> None:
            if not active:
                self.views[base.node_name] = known
            elif self.chain[0] is base:
                self.views[top.node_name] = None
                self.moved()
            else:
                self.views[base.node_name] = at_end

        self.outcomes[job] = ended
        await start_commit(
            self.system, device="d",
            request=CommitRequest(
                job_id=job, top_node=top.node_name, base_node=base.node_name, speed=self.speed(), on_error=self.policy(),
                backing_file=None if active else "x", auto_finalize=self.random.random() < 0.8,
            ),
        )  # fmt: skip
        self.views[base.node_name] = None
        self.written_below(base, hidden_by=top)

    async def stream(self) -> None:
        """Into any image of the chain, down to any base."""
        chain = self.chain
        high = self.random.randrange(len(chain))
        base = self.random.choice([None, *chain[high + 1 :]])
        await start_stream(
            self.system, device=chain[high].node_name if high else "d",
            request=StreamRequest(
                job_id=self.job_id(), base_node=base.node_name if base is not None else None, speed=self.speed(),
                backing_file="x" if base is not None else None, on_error=self.policy(),
                auto_finalize=self.random.random() < 0.8,
            ),
        )  # fmt: skip

    async def mirror(self) -> None:
        """Everything, to a spare image."""
        if not self.spares:
            return
        job, target, source = self.job_id(), self.spares[-1], self.chain[0].node_name

        def ended(at_end: View | None) -> None:
            if self.chain[0].node_name == target:
                self.views[source] = at_end
                self.moved()
            else:
                self.views[target] = at_end

        self.outcomes[job] = ended
        await start_blockdev_mirror(
            self.system, device="d", target=target,
            request=MirrorRequest(
                job_id=job, sync=SyncMode.FULL, granularity=CLUSTER, buf_size=4 * CLUSTER, speed=self.speed(),
                copy_mode=self.random.choice((CopyMode.BACKGROUND, CopyMode.WRITE_BLOCKING)),
                on_source_error=self.policy(), on_target_error=self.policy(), auto_finalize=self.random.random() < 0.8,
            ),
        )  # fmt: skip
        self.spares.pop()

    async def backup(self) -> None:
        """Everything as it is at the start, to a spare image."""
        if not self.spares:
            return
        job, target = self.job_id(), self.spares[-1]
        self.outcomes[job] = lambda at_end: self.views.update({target: self.starts[job]})
        request = BackupRequest(
            sync=SyncMode.FULL, job_id=job, speed=self.speed(), on_source_error=self.policy(), on_target_error=self.policy()
        )
        await perform(self.system, [StartBlockdevBackup(self.system, device="d", target=target, request=request)])
        self.spares.pop()

    async def snapshot(self) -> None:
        """A new image on top; what was the active one must not change any more."""
        if not self.overlays:
            return
        frozen, note = self.chain[0].node_name, Note(self.system, self.guest)
        await perform(self.system, [Snapshot(self.system, node="d", overlay=self.overlays[-1]), note])
        self.overlays.pop()
        self.views[frozen] = note.view

    async def bitmap(self) -> None:
        """A bitmap on the active image: all that the guest writes there must be in it."""
        name = f"b{len(self.guest.told)}"
        self.guest.told[name] = set()
        self.chain[0].dirty_bitmaps.append(DirtyBitmap(SIZE, CLUSTER, name=name))

    async def verb(self) -> None:
        """Somebody tells some job something."""
        jobs = self.bench.jobs
        if not jobs.jobs:
            return
        job = self.random.choice(jobs.jobs)
        match self.random.randrange(7):
            case 0:
                await jobs.pause(job)
            case 1:
                await jobs.resume(job)
            case 2:
                await jobs.cancel(job, force=self.random.random() < 0.5)
            case 3 | 4:
                jobs.complete(job)
            case 5:
                await jobs.finalize(job)
            case 6 if isinstance(job, BlockJob):
                jobs.set_speed(job, self.speed())

    async def fault(self) -> None:
        """Some requests of some file fail."""
        name = self.random.choice((*LAYERS, *SPARES)) + "-file"
        driver = driver_of(self.graph.find_node(name))
        first = self.random.randrange(1, 12)
        operation = self.random.choice(("read", "write", "flush"))
        active = self.chain[0].storage
        if operation != "flush" or active is None or driver.node is not active.node:
            driver.faults = Faults(operation, first, first + self.random.randrange(4), self.random.choice((5, 28)))

    async def _step(self) -> None:
        steps = (self.commit, self.commit, self.stream, self.stream, self.mirror, self.backup, self.snapshot, self.bitmap,
                 self.verb, self.verb, self.verb, self.fault)  # fmt: skip
        step = self.random.choice(steps)
        try:
            await step()
            self.log.append(step.__name__)
        except QBlockError as error:
            self.log.append(f"{step.__name__}: {error}")
        await asyncio.sleep(self.random.choice((0, 0.001, 0.01, 0.1)))

    # ----------------------------------------------------------------------------------------------------------- the whole

    async def run(self) -> None:
        """Make it, live it, end it, and look."""
        await self.make()
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(self.guest.writer(number))
            for _ in range(self.random.randrange(4, 16)):
                await self._step()
            await self._end_jobs()
            self.guest.running = False
        await self._look()
        await self.bench.close()

    async def _end_jobs(self) -> None:
        """Everything works again, and every job comes to its end; not well where a failed flush has spoilt an image."""
        for name in self.graph.nodes:
            if name.endswith("-file"):
                driver_of(self.graph.nodes[name]).faults = Faults()
        await bring_jobs_to_their_ends(self.bench, self.random)

    async def _look(self) -> None:
        graph = self.graph
        assert self.guest.capture().agrees(await self.disk.read(0, SIZE)), "the guest's disk is not what it wrote"
        assert_consistent(graph)
        assert [backend.name for backend in graph.backends] == ["d"]
        wanted = {f"{name}{end}" for name in (*LAYERS, *SPARES, *OVERLAYS) for end in ("", "-file")}
        assert set(graph.nodes) == wanted, "nodes that a job has left behind, or taken away"
        for node in graph.nodes.values():
            assert not node.blockers and not node.quiesce_counter, node
            assert not any(edge.frozen for edge in node.children.values()), node
            assert all(bitmap.name in self.guest.told for bitmap in node.dirty_bitmaps), node
            for bitmap in node.dirty_bitmaps:
                lost = [block for block in self.guest.told[bitmap.name or ""] if not bitmap.get(block * BLOCK)]
                assert not lost, f"{bitmap.name} has forgotten {lost}"
        for name, view in self.views.items():
            node = graph.find_node(name)
            if view is not None and node is not self.chain[0] and node.poisoned is None:
                seen = await self.shown(node)
                assert seen is not None and view.agrees(seen), f"{name} does not show what it must"


def live(seed: int) -> list[str]:
    """Live the history of ``seed``; returns its steps. A failure says which one it is."""
    return live_one(History, seed)


if __name__ == "__main__":
    live_many(live)
