"""The mirror job of April 2012 by itself: how long it sleeps, what it holds, and how it ends when something fails."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qblock import requests
from qblock.backend import BlockBackend
from qblock.drain import drained
from qblock.errors import (
    BlockIOError,
    CommandError,
    DeviceInUse,
    DeviceNotFound,
    InvalidParameter,
    JobCancelled,
    NodeBusy,
)
from qblock.extents import Extent
from qblock.jobs.copying import SLICE_NS
from qblock.jobs.mirror_2012 import Mirror2012Job, Mode2012, Target2012, prepare_mirror_2012, start_mirror_2012
from qblock.jobs.state import JobStatus
from qblock.jobs.stream import StreamRequest, start_stream
from qblock.jobs.txn import JobTransaction
from qblock.monitor.client import QmpError
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import MachineOptions
from qblock.node import BlockDriverState
from qblock.permissions import Perm
from qblock.testing.images import make_chain, make_image
from qblock.testing.jobbench import Faults, JobBench, ShakyMemory, driver_of, eventually
from qblock.testing.machines import LocalMachine
from qblock.testing.simloop import run
from qblock.tools.img import main as qblock_img
from qblock.units import MiB

ONTO_T = Target2012(filename='json:{"driver": "raw", "file": "t"}', mode=Mode2012.EXISTING)


class Diary:
    """What the job traces: the sleeps as (in sync, dirty bytes, nanoseconds), and the other events' names in between."""

    def __init__(self, bench: JobBench) -> None:
        self.entries: list[Any] = []
        bench.system.env.trace.listen("mirror_*", self._note)

    def _note(self, name: str, members: Mapping[str, object]) -> None:
        if name == "mirror_before_sleep":
            self.entries.append((members["synced"], members["dirty"], members["delay_ns"]))
        elif name == "mirror_one_iteration":
            self.entries.append(members["offset"])
        else:
            self.entries.append(name.removeprefix("mirror_"))

    def take(self) -> list[Any]:
        """The entries since the last look."""
        taken, self.entries = self.entries, []
        return taken


async def disk_of(bench: JobBench, size: int = 3 * MiB) -> BlockBackend:
    """A disk ``d`` on the node ``s``, all of which counts as allocated, and an empty node ``t`` of the same size."""
    disk = bench.disk(await bench.node("s", size), "d")
    await bench.node("t", size)
    await disk.write(512, b"data" * (size // 8))
    return disk


async def in_sync(bench: JobBench, **options: Any) -> Mirror2012Job:
    """A full mirror of ``d`` onto ``t``, in sync."""
    job = await start_mirror_2012(bench.system, device="d", target=ONTO_T, full=True, **options)
    await eventually(lambda: job.progress_done == job.progress_total)
    return job


# --------------------------------------------------------------------------------------------------- copying and sleeping


def test_it_copies_a_chunk_and_sleeps_and_in_sync_it_sleeps_for_100_ms_when_all_is_clean() -> None:
    """0 ns before it is in sync, so that there is a moment without I/O; 100 ms in sync and clean; 0 in sync and dirty."""

    async def main() -> None:
        bench = JobBench()
        disk, diary = await disk_of(bench), Diary(bench)
        job = await in_sync(bench)
        assert diary.take() == [
            "start", 0, (False, 2 * MiB, 0), MiB, (False, MiB, 0), 2 * MiB, (False, 0, 0), (True, 0, SLICE_NS)
        ]  # fmt: skip
        await disk.write(MiB, b"x" * 2 * MiB)
        assert (job.progress_done, job.dirty.count) == (3 * MiB, 2 * MiB), "it stays in sync"
        await eventually(lambda: not job.dirty.count)
        assert diary.take() == [MiB, (True, MiB, 0), 2 * MiB, (True, 0, SLICE_NS)]
        await disk.write(0, b"x" * 3 * MiB)
        await eventually(lambda: not job.dirty.count)
        assert [entry for entry in diary.take() if isinstance(entry, int)] == [0, MiB, 2 * MiB], "behind the last one"
        await bench.close()

    run(main)


def test_once_cancelled_it_never_sleeps_again() -> None:
    """In sync it drains, copies what is left, makes the target durable, and all of that in one moment of a disk that is quick."""

    async def main() -> None:
        bench = JobBench()
        disk, diary = await disk_of(bench), Diary(bench)
        job = await in_sync(bench)
        diary.take()
        await disk.write(MiB, b"x" * 2 * MiB)
        before = bench.system.clock.now_ns()
        assert await bench.jobs.cancel_sync(job) is None
        assert diary.take() == ["before_drain", MiB, 2 * MiB, "before_flush"]
        assert bench.system.clock.now_ns() == before
        assert driver_of(bench.graph.find_node("t")).content() == driver_of(disk.node).content()
        await bench.close()

    run(main)


def test_the_speed_limit_holds_until_it_is_in_sync_and_not_after() -> None:
    """At 4 MiB/s a chunk takes 250 ms; eight of them are there after 2 s, and what follows takes no time."""

    async def main() -> None:
        bench = JobBench()
        disk, diary = await disk_of(bench, 8 * MiB), Diary(bench)
        job = await in_sync(bench, speed=4 * MiB)
        delays = [entry[2] for entry in diary.take() if isinstance(entry, tuple) and not entry[0]]
        assert 1_750_000_000 <= sum(delays) <= 2_250_000_000
        await disk.write(0, b"y" * 8 * MiB)
        await eventually(lambda: not job.dirty.count)
        assert {entry[2] for entry in diary.take() if isinstance(entry, tuple)} <= {0, SLICE_NS}
        await bench.close()

    run(main)


def test_the_offset_is_the_length_less_what_is_dirty_up_to_the_end_of_the_disk() -> None:
    """A last chunk that is cut off by the end of the disk counts for what there is of it, and the offset may fall."""

    async def main() -> None:
        bench = JobBench()
        size = 3 * MiB + 512
        disk = await disk_of(bench, size)
        job = await start_mirror_2012(bench.system, device="d", target=ONTO_T, full=True, speed=MiB)
        seen = set()
        while job.progress_done != size - 512:
            seen.add((job.progress_done, job.progress_total))
            await bench.system.clock.sleep_ns(SLICE_NS)
        assert seen == {(MiB, size), (2 * MiB, size)}
        await disk.write(0, b"x" * 3 * MiB)
        await eventually(lambda: job.progress_done != size - 512)
        assert job.progress_done == MiB + 512, "the short last chunk and one other are copied, two are dirty again"
        await bench.close()

    run(main)


def test_a_job_that_has_not_begun_does_not_look_like_one_that_is_in_sync() -> None:
    """Nothing done of nothing to do would be read as ready."""

    async def main() -> None:
        bench = JobBench()
        await disk_of(bench)
        job = await prepare_mirror_2012(bench.system, device="d", target=ONTO_T, full=True)
        assert (job.progress_done, job.progress_total) == (0, 3 * MiB)
        await job.give_up()
        await bench.close()

    run(main)


def test_the_target_is_flushed_once_and_that_at_the_end() -> None:
    """It ignores flushes while it is a target; COMPLETED promises a copy that a power cut does not take back."""

    async def main() -> None:
        bench = JobBench()
        disk = await disk_of(bench)
        inline = f'json:{{"driver": "raw", "file": {{"driver": "shaky-memory", "size": {3 * MiB}}}}}'
        job = await start_mirror_2012(
            bench.system, device="d", target=Target2012(filename=inline, mode=Mode2012.EXISTING), full=True
        )
        await eventually(lambda: job.progress_done == job.progress_total)
        assert job.target.storage is not None
        flushes = Faults(operation="flush")
        driver_of(job.target.storage.node).faults = flushes
        await disk.flush()
        await requests.flush(job.target)  # as its format does to order writes
        await bench.system.clock.sleep_ns(10 * SLICE_NS)
        assert flushes.seen == 0
        assert await bench.jobs.cancel_sync(job) is None
        assert flushes.seen == 1
        await bench.close()

    run(main)


# ------------------------------------------------------------------------------------------------------------ its ending


def test_a_cancel_before_it_is_in_sync_ends_it_and_a_forced_one_in_sync_completes_it() -> None:
    """The two sides are left equal once they were, whoever asks and however."""

    async def main() -> None:
        bench = JobBench()
        await disk_of(bench)
        job = await start_mirror_2012(bench.system, device="d", target=ONTO_T, full=True, speed=1)
        assert isinstance(await bench.jobs.cancel_sync(job), JobCancelled)
        assert bench.story[-3:] == ["CANCELLED", "concluded", "null"]
        job = await in_sync(bench)
        assert await bench.jobs.cancel_sync(job, force=True) is None
        assert bench.story[-3:] == ["COMPLETED", "concluded", "null"]
        assert "READY" not in bench.story
        await bench.close()

    run(main)


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_failed_request_ends_the_job_and_nothing_of_it_stays(operation: str) -> None:
    """Whichever request it is: the job has completed, with an error; the guest goes on."""

    async def main(number: int) -> bool:
        bench = JobBench()
        disk = await disk_of(bench)
        where = bench.graph.find_node("s" if operation == "read" else "t")
        driver_of(where).faults = Faults(operation=operation, first=number, last=number, errno=errno.ENOSPC)
        job = await start_mirror_2012(bench.system, device="d", target=ONTO_T, full=True)
        for _ in range(3):
            await bench.system.clock.sleep_ns(SLICE_NS)
        if failed := job.status is JobStatus.NULL:
            (name, data) = next(event for event in bench.events if event[0] == "BLOCK_JOB_COMPLETED")
            assert "error" in data and data["offset"] < data["len"], name
            assert isinstance(job.error, BlockIOError) and job.error.errno == errno.ENOSPC
            assert disk.node.dirty_bitmaps == [] and disk.node.blockers == []
            await disk.write(0, b"goes on")
            assert len(bench.graph.nodes) == 2
        else:
            assert await bench.jobs.cancel_sync(job) is None
        await bench.close()
        return failed

    assert [run(lambda n=n: main(n)) for n in range(1, 5)] == [True, True, True, False]


def test_a_failure_to_make_the_target_durable_is_an_error_of_the_job() -> None:
    """The job must not say that it has completed what a power cut could undo."""

    async def main() -> None:
        bench = JobBench()
        disk = await disk_of(bench)
        job = await in_sync(bench)
        driver_of(bench.graph.find_node("t")).faults = Faults(operation="flush", first=1, last=1)
        assert isinstance(await bench.jobs.cancel_sync(job), BlockIOError)
        await disk.write(0, b"goes on")
        await bench.close()

    run(main)


class Unmapped(ShakyMemory):
    """Memory that cannot tell what is stored at the end of it."""

    name: ClassVar[str] = "unmapped-memory"

    async def block_status(self, offset: int, length: int, *, want_zero: bool) -> Extent:
        """See `Driver`: fails behind the first MiB."""
        if offset >= MiB:
            raise BlockIOError(errno.EIO, "there is no map of this")
        return await super().block_status(offset, min(length, MiB - offset), want_zero=want_zero)


def test_a_failed_first_phase_ends_the_job() -> None:
    """A literal copy of the proposal would go on and call the target in sync without the rest."""

    async def main() -> None:
        bench = JobBench()
        bench.system.registry.register(Unmapped)
        source = await bench.system.opener.open_blockdev({"driver": Unmapped.name, "node-name": "s", "size": 2 * MiB})
        await bench.node("t", 2 * MiB)
        await bench.disk(source, "d").write(0, b"x")
        diary = Diary(bench)
        job = await start_mirror_2012(bench.system, device="d", target=ONTO_T, full=True)
        await bench.jobs.wait(job)
        assert isinstance(job.error, BlockIOError)
        assert bench.story[-3:] == ["COMPLETED", "concluded", "null"]
        assert diary.take() == ["start"]
        await bench.close()

    run(main)


# ----------------------------------------------------------------------------------------------------- set up and undone


def test_a_job_that_is_given_up_leaves_nothing_behind() -> None:
    """transaction prepares several jobs and starts all of them or none."""

    async def main() -> None:
        bench = JobBench()
        disk = await disk_of(bench)
        group = JobTransaction()
        job = await prepare_mirror_2012(bench.system, device="d", target=ONTO_T, full=True, txn=group)
        assert group.jobs == [job] and disk.node.dirty_bitmaps == [job.dirty.bitmap]
        with pytest.raises(NodeBusy):
            await prepare_mirror_2012(bench.system, device="d", target=ONTO_T, full=True)
        await job.give_up()
        assert bench.story == ["created", "null"] and group.jobs == [] and bench.jobs.jobs == []
        assert disk.node.dirty_bitmaps == [] and disk.node.blockers == [] and len(bench.graph.nodes) == 2
        async with drained(disk.node):
            pass
        assert await bench.jobs.cancel_sync(await in_sync(bench)) is None
        await bench.close()

    run(main)


def test_what_is_refused_changes_nothing() -> None:
    """No device, a negative speed, a part of another device, a target of another size or in use, and the source itself."""

    async def main() -> None:
        bench = JobBench()
        disk = await disk_of(bench)
        await bench.node("short", MiB)
        filtered = await bench.system.opener.open_blockdev(
            {"driver": "copy-on-read", "node-name": "f", "file": "short"}
        )
        filtered.monitor_owned = True

        async def refused(error: type[Exception], filename: str = "t", *, device: str = "d", speed: int = 0) -> None:
            target = Target2012(filename=f'json:{{"driver": "raw", "file": "{filename}"}}', mode=Mode2012.EXISTING)
            with pytest.raises(error):
                await start_mirror_2012(bench.system, device=device, target=target, full=True, speed=speed)

        await refused(DeviceNotFound, device="none")
        await refused(InvalidParameter, speed=-1)
        await refused(DeviceInUse, device="short")
        await refused(CommandError, "short")
        await refused(CommandError, "s")
        assert bench.jobs.jobs == [] and disk.node.dirty_bitmaps == [] and disk.node.blockers == []
        assert sorted(bench.graph.nodes) == ["f", "s", "short", "t"]
        await bench.close()

    run(main)


def test_a_chain_that_is_shortened_while_the_target_is_opened_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is above the old base is not what is above the new one, and the new image's header names the old one."""
    _, top = make_chain(tmp_path, 4 * MiB, [("base", {0: b"base"}), ("top", {MiB: b"top"})])
    with rfc_2012() as machine:
        machine.add_drive(top)
        system, node = machine.machine.system, machine.machine.system.graph.find_backend("virtio0").node
        opened = system.opener.open_image

        async def meanwhile(filename: str, **options: Any) -> BlockDriverState:
            monkeypatch.undo()
            await system.jobs.wait(await start_stream(system, device="virtio0", request=StreamRequest()))
            return await opened(filename, **options)

        monkeypatch.setattr(system.opener, "open_image", meanwhile)
        with pytest.raises(QmpError, match="its images have changed meanwhile"):
            machine.qmp.execute("drive-mirror", device="virtio0", target=str(tmp_path / "copy"), full=False)
        assert (system.jobs.jobs, node.dirty_bitmaps, node.backing) == ([], [], None)


def test_writes_below_the_filters_of_a_device_do_not_escape_it() -> None:
    """The bitmap lies on the image, where all writes come by, and a drained section there holds all writers."""

    async def main() -> None:
        bench = JobBench()
        source = await bench.node("s", 4 * MiB)
        await bench.node("t", 4 * MiB)
        filtered = await bench.system.opener.open_blockdev({"driver": "blkdebug", "node-name": "f", "image": "s"})
        disk = BlockBackend(bench.graph, "d", perm=Perm.CONSISTENT_READ | Perm.WRITE, shared=Perm.ALL)
        disk.insert(filtered)
        beside = BlockBackend(bench.graph, perm=Perm.CONSISTENT_READ | Perm.WRITE, shared=Perm.ALL)
        beside.insert(source)
        job = await in_sync(bench)
        await disk.write(0, b"through the filter")
        await beside.write(2 * MiB, b"beside it")
        assert job.dirty.count == 2 * MiB
        assert await bench.jobs.cancel_sync(job) is None
        assert driver_of(bench.graph.find_node("t")).content() == driver_of(source).content()
        assert source.dirty_bitmaps == [] and filtered.blockers == [] and source.blockers == []
        await bench.close()

    run(main)


def target_names(node: BlockDriverState) -> set[str]:
    """The node and what it is stored on."""
    return {node.node_name} | ({node.storage.node.node_name} if node.storage else set())


# ------------------------------------------------------------------------------------------------------------ on images


def rfc_2012() -> LocalMachine:
    """A machine of April 2012."""
    return LocalMachine(options=MachineOptions(seed=0, dialect=Dialect.RFC_2012))


def test_the_target_is_a_black_box(tmp_path: Path) -> None:
    """Nothing that can be asked tells of its node."""
    make_image(tmp_path / "disk", "4M", {0: b"x"})
    with rfc_2012() as machine:
        machine.add_drive(tmp_path / "disk")
        machine.qmp.execute("drive-mirror", device="virtio0", target=str(tmp_path / "the-copy"), full=True)
        (job,) = machine.machine.system.jobs.jobs
        assert isinstance(job, Mirror2012Job)
        queries = [name for name in machine.machine.hub.commands if name.startswith("query-")]
        assert {"query-block", "query-blockstats", "query-block-jobs"} <= set(queries)
        answers = str([machine.qmp.execute(name) for name in queries if name not in ("query-qmp-schema", "query-balloon")])
        assert "the-copy" not in answers
        assert not any(name in answers for name in target_names(job.target))
        assert "the-copy" not in machine.qmp.hmp("info block -v") + machine.qmp.hmp("info blockstats")


@pytest.mark.parametrize(
    ("name", "fmt", "refusal"),
    [
        ("old:copy", "raw", "begins with a protocol"),
        ("json:copy", "raw", "begins with a protocol"),
        ("blkdebug::copy", "raw", "'blkdebug' cannot make new images"),
        ("copy", "none", "There is no driver 'none'"),
        ("copy", "copy-on-read", "'copy-on-read' cannot make new images"),
    ],
)
def test_a_target_that_cannot_be_made_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fmt: str, refusal: str
) -> None:
    """Nor is anything said to be formatted."""
    monkeypatch.chdir(tmp_path)
    make_image(tmp_path / "disk", "4M", {0: b"x"})
    with rfc_2012() as machine:
        machine.add_drive(tmp_path / "disk")
        before = sorted(tmp_path.iterdir())
        with pytest.raises(QmpError, match=refusal):
            machine.qmp.execute("drive-mirror", device="virtio0", target=name, format=fmt, full=True)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("fmt", ["raw", "qcow2", "file"])
def test_a_target_may_be_named_with_the_protocol_of_files(tmp_path: Path, fmt: str) -> None:
    """It is made where it is opened afterwards."""
    make_image(tmp_path / "disk", "4M", {0: b"x"})
    with rfc_2012() as machine:
        machine.add_drive(tmp_path / "disk")
        machine.qmp.execute("drive-mirror", device="virtio0", target=f"file:{tmp_path}/copy", format=fmt, full=True)
        assert (tmp_path / "copy").exists()


def test_large_clusters_of_a_target_over_a_backing_file_are_copied_whole(tmp_path: Path) -> None:
    """A chunk of 1 MiB in a new cluster of 2 MiB would hide the other half of the cluster behind zeroes."""
    base, disk = make_chain(tmp_path, "6M", [("base", {0: b"a" * 6 * MiB}), ("disk", {"1M": b"b"})])
    copy = make_image(tmp_path / "copy", "6M", backing=base, cluster_size=2 * MiB)
    with rfc_2012() as machine:
        machine.add_drive(disk)
        machine.qmp.execute("drive-mirror", device="virtio0", target=str(copy), full=False, mode="existing")
        machine.advance("1s")
        machine.guest_write("virtio0", 4 * MiB, 512, 7)
        machine.qmp.execute("block-job-cancel", device="virtio0")
        machine.qmp.wait_event("BLOCK_JOB_COMPLETED")
    assert qblock_img(["compare", str(copy), str(disk)]) == 0


def test_a_full_copy_hides_what_the_backing_file_of_its_target_holds(tmp_path: Path) -> None:
    """The target is opened without it, so that it seems to be empty; when it is used it would show through."""
    make_image(tmp_path / "base", "4M", {0: b"a" * 4 * MiB})
    disk = make_image(tmp_path / "disk", "4M", {"1M": b"b"})
    copy = make_image(tmp_path / "copy", "4M", backing=tmp_path / "base")
    with rfc_2012() as machine:
        machine.add_drive(disk)
        machine.qmp.execute("drive-mirror", device="virtio0", target=str(copy), full=True, mode="existing")
        machine.advance("1s")
        machine.qmp.execute("quit")
    assert qblock_img(["compare", str(copy), str(disk)]) == 0
