"""drive-mirror and blockdev-mirror on real qcow2 files: what is copied, what the graph looks like, what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from qblock.backend import BlockBackend
from qblock.blockers import OpType
from qblock.clock import LoopClock
from qblock.driver import BackingLink, SupportsBacking
from qblock.errors import CommandError, DuplicateName, NodeBusy, NodeNotFound, PermissionConflict, QBlockError
from qblock.jobs.mirror import CopyMode, MirrorRequest, start_blockdev_mirror, start_drive_mirror
from qblock.jobs.mirror_job import MirrorJob
from qblock.jobs.mirror_plan import MirrorPlan
from qblock.jobs.new_copy import NewImageMode, SyncMode, TargetFile
from qblock.jobs.state import JobStatus
from qblock.node import BlockDriverState
from qblock.opening import OpenPolicy
from qblock.permissions import ChildRole, Perm
from qblock.status import ChainExtent
from qblock.system import BlockSystem
from qblock.testing.jobbench import eventually
from qblock.testing.simloop import run
from qblock.transaction import Transaction
from qblock.units import KiB, MiB

SIZE = 4 * MiB
R, W, U, Z = Perm.CONSISTENT_READ, Perm.WRITE, Perm.WRITE_UNCHANGED, Perm.RESIZE


@attrs.define
class Desk:
    """A system with a qcow2 disk (1 MiB of data) over a qcow2 base (2 MiB of data), and the events."""

    system: BlockSystem
    disk: BlockBackend
    directory: Path
    events: list[tuple[str, Mapping[str, Any]]]

    def node(self, name: str) -> BlockDriverState:
        return self.system.graph.find_node(name)

    def path(self, name: str) -> str:
        return str(self.directory / f"{name}.qcow2")

    async def create(self, name: str, **options: Any) -> None:
        await self.system.opener.create_image("file", {"filename": self.path(name), "size": 0})
        file = {"driver": "file", "filename": self.path(name)}
        await self.system.opener.create_image("qcow2", {"file": file, "size": SIZE, **options})

    async def open(self, name: str, **options: Any) -> BlockDriverState:
        node = await self.system.opener.open_blockdev(
            {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": self.path(name)}, **options}
        )
        node.monitor_owned = True
        return node

    async def fill(self, name: str, offset: int, byte: int, length: int) -> None:
        writer = BlockBackend(self.system.graph, perm=W, shared=Perm.ALL)
        writer.insert(self.node(name))
        await writer.write(offset, bytes([byte]) * length)
        writer.close()

    async def mirror(self, target: str = "t", sync: str = "full", **members: Any) -> MirrorJob:
        request = MirrorRequest(job_id=members.pop("job_id", "j"), sync=SyncMode(sync), **members)
        return await start_blockdev_mirror(self.system, device="disk", target=target, request=request)

    async def drive_mirror(self, sync: str = "full", *, target: Mapping[str, Any] | None = None, **members: Any) -> MirrorJob:
        where = TargetFile(filename=self.path("new"), **(target or {}))
        request = MirrorRequest(sync=SyncMode(sync), **members)
        return await start_drive_mirror(self.system, device="disk", target=where, request=request)

    async def ready(self, job: MirrorJob) -> None:
        while not job.is_ready:
            assert not job.run_ended, job.error
            await asyncio.sleep(0.01)

    async def complete(self, job: MirrorJob) -> None:
        await self.ready(job)
        self.system.jobs.complete(job)
        await self.system.jobs.wait(job)
        assert job.error is None

    @property
    def story(self) -> list[str]:
        return [data["status"] if name == "JOB_STATUS_CHANGE" else name for name, data in self.events]


@asynccontextmanager
async def desk(directory: Path) -> AsyncIterator[Desk]:
    async with BlockSystem.create(clock=LoopClock(), policy=OpenPolicy.follow()) as system:
        events: list[tuple[str, Mapping[str, Any]]] = []
        system.events.subscribe(lambda name, data, when: events.append((name, data)))
        disk = BlockBackend(system.graph, "disk", perm=R | W, shared=R | U)
        made = Desk(system, disk, directory, events)
        await made.create("base")
        await made.open("base")
        await made.fill("base", 0, 1, 2 * MiB)
        await made.create("s", **{"backing-file": "base.qcow2", "backing-fmt": "qcow2"})
        source = await made.open("s", backing="base")
        await made.fill("s", MiB + 512, 2, MiB)
        disk.insert(source)
        yield made


def link(node: BlockDriverState) -> BackingLink | None:
    assert isinstance(node.driver, SupportsBacking)
    return node.driver.backing_link()


# ---------------------------------------------------------------------------------------------------------- copying


@pytest.mark.parametrize("mode", CopyMode)
@pytest.mark.parametrize("discard", ["ignore", "unmap"])
def test_a_full_mirror_replaces_the_chain(tmp_path: Path, discard: str, mode: CopyMode) -> None:
    """With discard=unmap only what is allocated counts in len; without it everything is copied."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.create("t")
            target = await made.open("t", discard=discard)
            await made.fill("t", 3 * MiB, 9, MiB)  # must vanish
            before = await made.disk.read(0, SIZE)
            job = await made.mirror(copy_mode=mode)
            await made.ready(job)
            expected = SIZE if discard == "ignore" else 2 * MiB + 64 * KiB
            assert (job.progress_done, job.progress_total) == (expected, expected)
            await made.complete(job)
            assert made.disk.node is target
            assert await made.disk.read(0, SIZE) == before

    run(main)


@pytest.mark.parametrize("mode", CopyMode)
def test_progress_counts_guest_writes_by_copy_mode(tmp_path: Path, mode: CopyMode) -> None:
    """A 1 KiB write adds a granule, in write-blocking mode exactly the bytes written."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.create("t")
            await made.open("t")
            job = await made.mirror(sync="none", copy_mode=mode)
            assert job.is_ready
            assert job.progress_total == 0
            await made.disk.write(5 * KiB, b"x" * KiB)
            await asyncio.sleep(0.2)
            size = KiB if mode is CopyMode.WRITE_BLOCKING else 64 * KiB
            assert (job.progress_done, job.progress_total) == (size, size)

    run(main)


def test_a_guest_that_writes_during_every_flush_does_not_put_ready_off(tmp_path: Path) -> None:
    """On a slow disk with a busy guest there may be no flush without a write; the copy was equal before it."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.create("t")
            target = await made.open("t")
            flush_to_disk = target.driver.flush

            async def slow_flush() -> None:
                await asyncio.sleep(0.1)
                await made.disk.write(0, b"y" * KiB)
                await flush_to_disk()

            target.driver.flush = slow_flush  # type: ignore[method-assign]
            job = await made.mirror()
            async with asyncio.timeout(10):
                await made.ready(job)
            target.driver.flush = flush_to_disk  # type: ignore[method-assign]
            await made.complete(job)
            assert made.disk.node is target and await made.disk.read(0, KiB) == b"y" * KiB

    run(main)


@pytest.mark.parametrize("mode", CopyMode)
@pytest.mark.parametrize("sync", ["top", "none"])
def test_a_shallow_mirror_keeps_what_is_below(tmp_path: Path, sync: str, mode: CopyMode) -> None:
    """The backing is attached when the copy is done, and shows wherever nothing was copied; so guest writes that are smaller
    than the target's clusters must not leave zeroes in the rest of these.
    """

    async def main() -> None:
        async with desk(tmp_path) as made:
            model = bytearray(await made.disk.read(0, SIZE))
            await made.create("t", **{"cluster-size": 2 * MiB})
            target = await made.open("t")
            job = await made.mirror(sync=sync, copy_mode=mode, granularity=4096)
            await made.ready(job)
            for offset in (100 * KiB, 512, 3 * MiB + 1024):
                await made.disk.write(offset, b"z" * 1536)
                model[offset : offset + 1536] = b"z" * 1536
            await made.complete(job)
            assert made.disk.node is target
            with Transaction() as change:
                made.system.graph.set_backing(target, made.node({"top": "base", "none": "s"}[sync]), change)
            assert await made.disk.read(0, SIZE) == bytes(model)

    run(main)


@pytest.mark.parametrize(("sync", "below"), [("full", None), ("top", "base"), ("none", "s")])
def test_drive_mirror_makes_an_image_like_the_source(tmp_path: Path, sync: str, below: str | None) -> None:
    """absolute-paths: same format and size; the header names what the mode leaves out; the graph links to the same node."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            job = await made.drive_mirror(sync, target={"node_name": "n"})
            assert job.id == "disk"
            node = made.node("n")
            assert node.backing is None
            assert link(node) == (None if below is None else BackingLink(made.path(below), "qcow2"))
            await made.complete(job)
            assert made.disk.node is node
            assert (node.backing.node.node_name if node.backing else None) == below
            assert await made.disk.read(0, SIZE) == before

    run(main)


def test_drive_mirror_to_an_existing_image_opens_its_backing_at_the_end(tmp_path: Path) -> None:
    """mode existing: the backing file of the header, as nodes of its own."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.create("low")
            await made.create("new", **{"backing-file": "low.qcow2", "backing-fmt": "qcow2"})
            job = await made.drive_mirror(target={"mode": NewImageMode.EXISTING})
            await made.complete(job)
            backing = made.disk.node.backing
            assert backing is not None
            assert backing.node.driver.filename() == made.path("low")

    run(main)


def test_a_soft_cancel_when_ready_leaves_a_copy_and_the_source_in_place(tmp_path: Path) -> None:
    """COMPLETED without a switch; the file that drive-mirror opened is closed again."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            before = await made.disk.read(0, SIZE)
            job = await made.drive_mirror()
            await made.ready(job)
            await made.system.jobs.cancel(job, force=False)
            await made.system.jobs.wait(job)
            assert made.story[-3:] == ["BLOCK_JOB_COMPLETED", "concluded", "null"]
            assert made.disk.node is made.node("s")
            copy = await made.system.opener.open_image(made.path("new"))
            reader = BlockBackend(made.system.graph, perm=R, shared=Perm.ALL)
            reader.insert(copy)
            assert await reader.read(0, SIZE) == before

    run(main)


def test_a_soft_cancel_after_complete_does_not_take_the_switch_back(tmp_path: Path) -> None:
    """Seen on the real program: complete was accepted first, so the disk moves; complete cannot be said again."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            job = await made.drive_mirror(target={"node_name": "n"})
            await made.ready(job)
            made.system.jobs.complete(job)
            await made.system.jobs.cancel(job, force=False)
            with pytest.raises(CommandError, match="cancel"):
                made.system.jobs.complete(job)
            await made.system.jobs.wait(job)
            assert job.error is None
            assert made.disk.node is made.node("n")

    run(main)


@pytest.mark.parametrize("mode", NewImageMode)
def test_a_new_target_needs_no_zeroing(tmp_path: Path, mode: NewImageMode) -> None:
    """Seen on the real program: an existing target is written as a whole, a new one gets what is allocated."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.create("new")
            job = await made.drive_mirror(target={"mode": mode})
            await made.ready(job)
            assert job.progress_total == (SIZE if mode is NewImageMode.EXISTING else 2 * MiB + 64 * KiB)

    run(main)


def test_a_pending_mirror_holds_guest_writes_until_finalized(tmp_path: Path) -> None:
    """Between the end of the copy and the switch nothing may part the two sides."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            job = await made.drive_mirror(target={"node_name": "n"}, auto_finalize=False)
            await made.ready(job)
            made.system.jobs.complete(job)
            await eventually(lambda: job.status is JobStatus.PENDING)
            write = asyncio.ensure_future(made.disk.write(0, b"late"))
            await asyncio.sleep(1)
            assert not write.done()
            assert made.disk.node is not made.node("n")
            await made.system.jobs.finalize(job)
            await write
            assert made.disk.node is made.node("n")
            assert await made.disk.read(0, 4) == b"late"

    run(main)


def test_speed_limits_real_copying_only(tmp_path: Path) -> None:
    """2 MiB of data at 1 MiB/s take two seconds, the rest of the disk none."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            job = await made.drive_mirror(speed=MiB)
            await made.ready(job)
            passed = asyncio.get_running_loop().time()
            assert 1.9 < passed < 2.5

    run(main)


# ------------------------------------------------------------------------------------------------------------ the graph


def test_edges_are_those_of_the_real_program(tmp_path: Path) -> None:
    """The table of section 4.8, as dumped from the real daemon."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            made.disk.close()
            await made.create("t")
            await made.open("t")
            job = await start_blockdev_mirror(
                made.system, device="s", target="t",
                request=MirrorRequest(job_id="j", sync=SyncMode.FULL, filter_node_name="f"),
            )  # fmt: skip
            edges = {
                (edge.name, edge.node.node_name): (edge.perm, edge.shared)
                for node in made.system.graph.nodes.values()
                for edge in node.parents
                if edge.role in (ChildRole.JOB, ChildRole.ROOT, ChildRole.FILTERED)
            }
            assert edges == {
                ("backing", "s"): (R, R | W | U),
                ("main node", "f"): (R, R | W | U),
                ("source", "s"): (Perm.NONE, R | W | U),
                ("target", "t"): (Perm.NONE, Perm.ALL),
                ("root", "t"): (W, U),
            }
            assert not made.node("f").implicit
            assert [bitmap.name for bitmap in made.node("s").dirty_bitmaps] == [None]
            with pytest.raises(NodeBusy, match="mirror"):
                made.system.graph.check_op(made.node("s"), OpType.STREAM)
            await made.system.jobs.cancel(job)
            await made.system.jobs.wait(job)
            made.system.graph.check_op(made.node("s"), OpType.STREAM)
            assert "f" not in made.system.graph.nodes

    run(main)


def test_replaces_puts_the_copy_below_a_filter(tmp_path: Path) -> None:
    """The user's filter stays on top; what it filters is exchanged."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            made.disk.remove()
            top = await made.system.opener.open_blockdev({"driver": "copy-on-read", "node-name": "cor", "file": "s"})
            top.monitor_owned = True
            made.disk.insert(top)
            await made.create("t")
            target = await made.open("t")
            before = await made.disk.read(0, SIZE)
            job = await made.mirror(replaces="s")
            await made.complete(job)
            assert made.disk.node is top
            assert top.filtered is not None
            assert top.filtered.node is target
            assert await made.disk.read(0, SIZE) == before

    run(main)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_sizes_that_differ_fail_the_job_not_the_command(tmp_path: Path) -> None:
    """As the real program: created, running, aborting, COMPLETED with an error, len 0."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.create("t", size=SIZE * 2)
            await made.open("t")
            job = await made.mirror()
            await made.system.jobs.wait(job)
            assert made.story == ["created", "running", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]
            assert made.events[3][1]["len"] == 0
            assert "the same size" in str(job.error)
            assert made.disk.node is made.node("s")

    run(main)


WRONG: list[tuple[dict[str, Any], type[QBlockError]]] = [
    ({"granularity": 100}, CommandError),
    ({"granularity": 1000}, CommandError),
    ({"granularity": 128 * MiB}, CommandError),
    ({"buf_size": -1}, CommandError),
    ({"sync": "incremental"}, CommandError),
    ({"sync": "bitmap"}, CommandError),
    ({"target": "s"}, CommandError),
    ({"target": "base"}, NodeBusy),
    ({"target": "nope"}, NodeNotFound),
    ({"replaces": "nope"}, NodeNotFound),
    ({"replaces": "base"}, CommandError),
    ({"job_id": "1j"}, CommandError),
    ({"job_id": ""}, CommandError),
    ({"filter_node_name": "base"}, DuplicateName),
    ({"filter_node_name": "9x"}, CommandError),
]
"""What is refused before a job exists."""


def test_wrong_members_are_refused_and_change_nothing(tmp_path: Path) -> None:
    """No job, no event, no node, no backend, no blocker is left."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.create("t")
            target = await made.open("t")
            graph = made.system.graph
            nodes, backends = set(graph.nodes), len(graph.backends)
            for members, error in WRONG:
                with pytest.raises(error):
                    await made.mirror(**members)
            assert made.events == []
            with pytest.raises(CommandError, match="negative"):
                await made.mirror(speed=-1)
            guest = BlockBackend(graph, perm=R | W, shared=R)
            guest.insert(target)
            with pytest.raises(PermissionConflict):
                await made.mirror()
            assert made.story == ["created", "null"] * 2
            guest.close()
            assert (set(graph.nodes), len(graph.backends)) == (nodes, backends)
            assert made.disk.node is made.node("s")
            assert not made.node("s").blockers
            assert not target.blockers
            assert not made.node("s").quiesce_counter
            assert made.system.jobs.jobs == []

    run(main)


def test_a_read_only_target_shows_created_and_null(tmp_path: Path) -> None:
    """That it cannot be written comes out when the job takes it."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.create("t")
            await made.open("t", **{"read-only": True})
            with pytest.raises(CommandError, match="read-only"):
                await made.mirror()
            assert made.story == ["created", "null"]

    run(main)


def test_a_source_in_use_by_nodes_or_jobs_is_refused(tmp_path: Path) -> None:
    """Only a root can be mirrored; a second mirror of the same disk finds a filter above it."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            with pytest.raises(CommandError, match="root"):
                await start_drive_mirror(
                    made.system, device="base", target=TargetFile(filename=made.path("x")),
                    request=MirrorRequest(job_id="k", sync=SyncMode.FULL),
                )  # fmt: skip
            job = await made.drive_mirror()
            with pytest.raises(CommandError, match="root"):
                await made.drive_mirror()
            assert made.system.jobs.jobs == [job]
            assert not Path(made.path("x")).exists()

    run(main)


def test_a_rejected_drive_mirror_closes_the_image_it_made(tmp_path: Path) -> None:
    """The file stays, as with the real program; the node does not."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            with pytest.raises(CommandError):
                await made.drive_mirror(granularity=100, target={"node_name": "n"})
            assert Path(made.path("new")).exists()
            assert "n" not in made.system.graph.nodes
            with pytest.raises(CommandError, match="node-name"):
                await made.drive_mirror(replaces="s")

    run(main)


def test_quit_while_copying_closes_everything(tmp_path: Path) -> None:
    """A slow mirror does not hold up the end of the system."""

    async def main() -> None:
        async with desk(tmp_path) as made:
            await made.drive_mirror(speed=1000)
        assert asyncio.get_running_loop().time() < 1
        assert made.story[-4:] == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]

    run(main)


def test_a_mirror_copies_granules_whole_and_zeroes_only_whole_clusters_of_the_target() -> None:
    """What the source has at 0, and what is asked of the target: which decides how small the copy is."""
    plan = MirrorPlan(scan=True, base=None, granularity=64 * KiB, buf_size=MiB)

    def asked(kind: str, length: int, offset: int = 0, *, cluster: int = 64 * KiB) -> tuple[int, str]:
        present, zero, data = {"data": (True, False, True), "zero": (True, True, False), "space": (True, True, True),
                               "nothing": (False, True, False), "undefined": (False, False, False)}[kind]  # fmt: skip
        extent = ChainExtent(length, 0, present, zero, data)
        count, method = plan.next_request(extent, offset, piece=256 * KiB, target_cluster=cluster)
        return count, method.value

    assert asked("data", MiB) == (256 * KiB, "copy")
    assert asked("space", MiB) == (256 * KiB, "copy")
    assert asked("data", 100 * KiB) == (64 * KiB, "copy")
    assert asked("zero", MiB + 512) == (MiB, "zero")
    assert asked("nothing", MiB) == (MiB, "zero")
    assert asked("undefined", MiB) == (MiB, "discard")
    assert asked("zero", 60 * KiB) == (64 * KiB, "copy")
    assert asked("zero", MiB, cluster=2 * MiB) == (256 * KiB, "copy")
    assert asked("zero", 2 * MiB, cluster=2 * MiB) == (2 * MiB, "zero")
    assert asked("zero", MiB, 64 * KiB, cluster=0) == (MiB, "zero")
    assert asked("zero", MiB, 4 * KiB) == (60 * KiB, "copy")
