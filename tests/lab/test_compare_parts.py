"""The parts of the comparison against cases that can be worked out by hand: disks, latencies, promises, crashes."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qblock.clock import LoopClock
from qblock.errors import BlockIOError
from qblock.image import create
from qblock.lab.compare.crashes import choose_moments
from qblock.lab.compare.disks import DISKS, Disk, DiskModel
from qblock.lab.compare.history import (
    NO_BYTES,
    Answered,
    Entered,
    Flushed,
    Issued,
    Made,
    Read,
    Record,
    Recorder,
    Resized,
    Told,
    Witnessed,
    Wrote,
    phases,
    read_history,
)
from qblock.lab.compare.judging import Promise, State, judge
from qblock.lab.compare.load import (
    BLOCK,
    FIRST_TAG,
    FLUSH,
    GARBAGE,
    READ,
    WRITE,
    GuestRequest,
    LabGuest,
    WrongAnswer,
    initial_tags,
    marked,
    requests_of,
    tag_of,
)
from qblock.lab.compare.measuring import Traffic, Waited, distribution, longest_pause, rank, traffic, waits
from qblock.lab.compare.replaying import KILL, POWER, Replay
from qblock.lab.compare.running import (
    AFTER,
    BEFORE,
    COPYING,
    IN_STEP,
    SWITCHING,
    Settings,
    lay_out,
    make_start,
    running_machine,
)
from qblock.lab.compare.storage import Storage, modelled_file
from qblock.lab.compare.strategies import DEVICE, GaveUp
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import Machine, MachineOptions
from qblock.permissions import Perm
from qblock.system import BlockSystem
from qblock.testing.machines import drive_text
from qblock.testing.simloop import run
from qblock.units import MILLISECOND_NS, KiB, MiB

MS = MILLISECOND_NS
PACE = DISKS["ssd"].pace


def disk_model(*, depth: int = 1, latency: int = 0, seek: int = 0, bandwidth: int = 1000 * MiB, flush: int = 0) -> DiskModel:
    return DiskModel(
        name="test", summary="", depth=depth, latency_ns=latency, seek_ns=seek, bandwidth=bandwidth, flush_ns=flush,
        pace=PACE, size=MiB,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the disk


def test_a_disk_seeks_unless_a_request_begins_where_the_last_one_ended() -> None:
    """10 ms to seek and 1 MiB in 10 ms: 20 for the first, 10 for the one behind it, 20 for one elsewhere."""

    async def main() -> list[int]:
        clock = LoopClock()
        disk = Disk(disk_model(seek=10 * MS, bandwidth=100 * MiB), clock)
        times = []
        for file, offset in (("a", 0), ("a", MiB), ("a", 8 * MiB), ("b", 9 * MiB)):
            before = clock.now_ns()
            await disk.write(file, offset, MiB)
            times.append((clock.now_ns() - before) // MS)
        return times

    assert run(main) == [20, 10, 20, 20]


def test_requests_share_the_channel_but_wait_their_latency_side_by_side() -> None:
    """Two at a time: both wait 5 ms together, then move one after the other; the third waits for a free place."""

    async def main() -> list[int]:
        clock = LoopClock()
        disk = Disk(disk_model(depth=2, latency=5 * MS, bandwidth=100 * MiB), clock)
        ends = [disk.end_of_transfer("a", 0, MiB) for _ in range(3)]
        return [end // MS for end in ends]

    assert run(main) == [15, 25, 35]


def test_a_flush_waits_for_what_was_before_and_holds_up_what_comes_after() -> None:
    """And it is cheap when nothing was written since the last one."""

    async def main() -> list[int]:
        clock = LoopClock()
        disk = Disk(disk_model(depth=4, latency=MS, flush=7 * MS), clock)
        times = []

        async def timed(work: Coroutine[Any, Any, None]) -> None:
            await work
            times.append(clock.now_ns() // MS)

        async with asyncio.TaskGroup() as group:
            for work in (disk.write("a", 0, 0), disk.flush(), disk.read("a", 0, 0), disk.flush()):
                group.create_task(timed(work))
        return times

    assert run(main) == [1, 8, 9, 10]


# ------------------------------------------------------------------------------------------------------ latency accounting


def test_latency_counts_from_when_a_request_came_and_also_while_it_waits_for_another(tmp_path: Path) -> None:
    """Writes take 10 ms. The second, to the same block, comes 4 ms after the first, waits 6 and takes 10: 16 in all."""
    requests = [
        GuestRequest(0, 0, WRITE, 0, BLOCK),
        GuestRequest(1, 4 * MS, WRITE, 0, BLOCK),
        GuestRequest(2, 5 * MS, READ, 8 * BLOCK, BLOCK),
        GuestRequest(3, 40 * MS, FLUSH, 0, 0),
        GuestRequest(4, 50 * MS, READ, 0, BLOCK),
    ]
    (tmp_path / "source").mkdir()
    create(tmp_path / "source" / "disk.raw", MiB, fmt="raw")

    async def main() -> list[Record]:
        clock = LoopClock()
        recorder = Recorder(tmp_path, clock)
        machine = await Machine.open(MachineOptions(seed=0), clock=clock)
        disk = Disk(disk_model(depth=8, latency=10 * MS, bandwidth=1 << 60, flush=3 * MS), clock)
        storage = Storage(tmp_path, {"source": disk}, recorder)
        machine.system.registry.register(modelled_file(storage))
        await machine.add_drive(drive_text(tmp_path / "source" / "disk.raw", "disk", "raw"))
        began = clock.now_ns()
        guest = LabGuest(machine.system.graph, "disk", clock, recorder, tags={})
        await guest.run(GuestRequest(r.number, began + r.arrival_ns, r.op, r.offset, r.length) for r in requests)
        await machine.close()
        recorder.close()
        return recorder.records

    records = run(main)
    found = {(wait.op, wait.latency_ns // MS) for wait in waits(records)}
    assert found == {(WRITE, 10), (WRITE, 16), (READ, 10), (FLUSH, 3)}
    assert len(waits(records)) == len(requests)
    counted = traffic(records, until_ns=records[-1].ns)["source"]
    assert (counted.writes, counted.written) == (2, 2 * BLOCK)
    assert (counted.reads, counted.read) == (2, 2 * BLOCK)


def test_all_that_happens_to_a_file_is_recorded_so_that_it_can_be_made_again(tmp_path: Path) -> None:
    """Zeroes, discards, growth, durable writes and new files, not only what a qcow2 disk happens to use."""
    (tmp_path / "source").mkdir()
    create(tmp_path / "source" / "disk.raw", MiB, fmt="raw")

    async def main() -> tuple[list[Record], str]:
        clock = LoopClock()
        recorder = Recorder(tmp_path, clock)
        system = BlockSystem.create(clock=clock)
        disk = Disk(disk_model(latency=MS, flush=MS), clock)
        system.registry.register(modelled_file(Storage(tmp_path, {"source": disk, "target": disk}, recorder)))
        backend = await system.drive_add(drive_text(tmp_path / "source" / "disk.raw", "disk", "raw") + ",discard=unmap")
        backend.set_permissions(backend.perm | Perm.RESIZE, backend.shared)
        await backend.write(0, b"\x11" * 256 * KiB)
        await backend.write_from(0, memoryview(b"\x22" * 4096), fua=True)
        await backend.write_zeroes(64 * KiB, 64 * KiB)
        await backend.write_zeroes(8 * KiB, 4 * KiB, may_unmap=True, fua=True)
        await backend.discard(128 * KiB, 64 * KiB)
        await backend.truncate(2 * MiB)
        await backend.flush()
        new = str(tmp_path / "target" / "new.raw")
        await system.opener.create_image("file", {"filename": new, "size": 12345})
        refusal = ""
        try:
            await backend.copy_range(0, backend, MiB, 4096)
        except BlockIOError as error:
            refusal = errno.errorcode[error.errno or 0]
        await system.close()
        recorder.close()
        return recorder.records, refusal

    (tmp_path / "target").mkdir()
    places = {crash: tmp_path / crash for crash in (KILL, POWER)}
    for place in places.values():
        (place / "target").mkdir(parents=True)
        (place / "source").mkdir()
        create(place / "source" / "disk.raw", MiB, fmt="raw")
    records, refusal = run(main)
    assert refusal == "ENOTSUP"
    assert {type(record) for record in records} == {Wrote, Resized, Flushed, Made}
    Replay(tmp_path, records, places).advance(len(records))
    left = tmp_path / "source" / "disk.raw"
    assert left.stat().st_size == 2 * MiB
    for place in places.values():
        assert (place / "source" / "disk.raw").read_bytes() == left.read_bytes()
    assert (places[KILL] / "target" / "new.raw").read_bytes() == bytes(12345)


def test_management_gives_up_after_its_patience_and_on_errors(tmp_path: Path) -> None:
    """A strategy that does not work ends as a row that says so, not as a hang."""
    settings = Settings(seed=1, disk="ssd", size=8 * MiB)
    make_start(settings, tmp_path)
    lay_out(tmp_path / "start", tmp_path / "run")

    async def main() -> list[str]:
        async with running_machine(settings, tmp_path / "run", Dialect.SYSTEM) as site:
            management, texts = site.management, []
            for attempt in (
                management.event("BLOCK_JOB_READY"), management.hmp("drive_mirror nothing t.qcow2 qcow2"),
                management.offset_is_len(),
            ):  # fmt: skip
                with pytest.raises(GaveUp) as caught:
                    await attempt
                texts.append(str(caught.value))
            await management.execute("drive-mirror", {"device": DEVICE, "target": management.target, "sync": "full"})
            await management.execute("block-job-cancel", {"device": DEVICE})
            with pytest.raises(GaveUp, match="BLOCK_JOB_CANCELLED"):
                await management.event("BLOCK_JOB_CANCELLED")
            return texts

    late, error, ended = run(main)
    assert late == "BLOCK_JOB_READY did not come within 6.4s"
    assert error.startswith("Error:")
    assert ended == "the job has ended"


def test_a_guest_notices_when_it_reads_what_it_did_not_write(tmp_path: Path) -> None:
    """Otherwise a strategy that loses data while the guest runs would look fast."""
    (tmp_path / "source").mkdir()
    create(tmp_path / "source" / "disk.raw", MiB, fmt="raw")

    async def main() -> None:
        clock = LoopClock()
        machine, recorder = await Machine.open(MachineOptions(seed=0), clock=clock), Recorder(tmp_path, clock)
        try:
            await machine.add_drive(drive_text(tmp_path / "source" / "disk.raw", "disk", "raw"))
            guest = LabGuest(machine.system.graph, "disk", clock, recorder, tags={3: 77})
            await guest.run(iter([GuestRequest(0, 0, READ, 3 * BLOCK, BLOCK)]))
        finally:
            await machine.close()
            recorder.close()

    with pytest.raises(ExceptionGroup) as caught:
        run(main)
    assert [str(error) for error in caught.value.exceptions] == ["block 3 holds tag 0, and 77 was written there"]
    assert isinstance(caught.value.exceptions[0], WrongAnswer)


def test_percentiles_are_by_nearest_rank_and_left_out_where_they_mean_nothing() -> None:
    """Of 1 to 200, half are at most 100; a 99.9th percentile of 200 requests is none."""
    values = list(range(1, 201))
    random.Random(1).shuffle(values)
    found = distribution(values)
    assert found.percentiles == {"p50": 100, "p90": 180, "p99": 198}
    assert (found.count, found.longest_ns) == (200, 200)
    assert found.curve[-1] == (1.0, 200)
    assert [ns for _, ns in found.curve] == sorted(ns for _, ns in found.curve)
    assert rank([5], 0.5) == rank([5], 1.0) == 5
    assert distribution([]).percentiles == {}


def test_the_longest_pause_is_the_longest_wait_without_any_answer() -> None:
    """Three requests wait from 10 on; answers at 30 and 90: 60 is the pause, not the 80 that the slowest took."""
    all_waits = [Waited(0, READ, 5), Waited(10, READ, 20), Waited(10, READ, 80), Waited(200, READ, 15)]
    assert longest_pause(all_waits, 0, 1000) == 60
    assert longest_pause(all_waits, 100, 1000) == 15
    assert longest_pause(all_waits, 0, 50) == 20


def test_traffic_of_zeroes_is_not_written() -> None:
    """A hole costs a request, not bytes; what comes after the end of the operation does not count."""
    records: list[Record] = [
        Wrote(1, "source/a", 0, 100, 0), Wrote(2, "target/b", 0, 500, NO_BYTES), Wrote(3, "target/b", 0, 7, 100),
        Flushed(4, "target/b", 0), Read(5, "source/a", 0, 9), Wrote(11, "target/b", 0, 1000, 107),
    ]  # fmt: skip
    found = traffic(records, until_ns=10)
    assert found["source"] == Traffic(read=9, written=100, reads=1, writes=1)
    assert found["target"] == Traffic(written=7, writes=1, flushes=1)
    assert found["source"].minus(Traffic(read=10)).read == -1


# ----------------------------------------------------------------------------------------------------------------- the load


def test_the_load_is_the_same_for_the_same_seed_and_stays_on_the_disk() -> None:
    """Reads all the time, writes and flushes in bursts, in the order of their arrival."""
    one, other = requests_of(3, 8 * MiB, PACE), requests_of(3, 8 * MiB, PACE)
    first = [next(one) for _ in range(3000)]
    assert first == [next(other) for _ in range(3000)]
    assert [r.number for r in first] == list(range(3000))
    assert all(a.arrival_ns <= b.arrival_ns for a, b in pairwise(first))
    assert all(r.offset >= 0 and r.offset + r.length <= 8 * MiB for r in first)
    in_bursts = [r.arrival_ns % PACE.burst_every_ns for r in first if r.op != READ]
    assert in_bursts
    assert max(in_bursts) <= PACE.burst_lasts_ns
    spread = [next(requests) for requests in [requests_of(3, 8 * MiB, PACE.steady())] for _ in range(3000)]
    late = [r for r in spread if r.op == WRITE and r.arrival_ns % PACE.burst_every_ns > PACE.burst_lasts_ns]
    assert late


def test_a_block_tells_who_wrote_it_and_where() -> None:
    """A block of another place, or half of two writes, is garbage."""
    assert tag_of(marked(99, 5), 5) == 99
    assert tag_of(marked(99, 5), 6) == GARBAGE
    assert tag_of(marked(99, 5)[: BLOCK // 2] + marked(98, 5)[BLOCK // 2 :], 5) == GARBAGE
    assert tag_of(bytes(BLOCK), 7) == 0
    assert tag_of(bytes(16) + marked(99, 5)[16:], 5) == GARBAGE


# ------------------------------------------------------------------------------------------------------------- the promise


def written(number: int, block: int, *, ns: int = 0) -> Issued:
    return Issued(ns, number, 0, WRITE, block * BLOCK, BLOCK)


def broken(promise: Promise, *blocks: bytes) -> int:
    return promise.broken_blocks(0, b"".join(blocks))


def test_a_flush_promises_what_was_answered_before_it_was_sent() -> None:
    """A write under way when the flush was sent may be missing; the one that it follows may not."""
    records: list[Record] = [
        written(0, 0), Answered(0, 0, ""),  # covered
        written(1, 1),  # under way when the flush is sent
        Issued(0, 2, 0, FLUSH, 0, 0),
        Answered(0, 1, ""), Answered(0, 2, ""),
    ]  # fmt: skip
    promise = Promise.of(2 * BLOCK, {1: 1})
    promise.advance(records, 5)
    assert broken(promise, bytes(BLOCK), marked(1, 1)) == 0, "no flush was answered yet"
    promise.advance(records, 6)
    assert broken(promise, marked(FIRST_TAG, 0), marked(1, 1)) == 0
    assert broken(promise, marked(FIRST_TAG, 0), marked(FIRST_TAG + 1, 1)) == 0
    assert broken(promise, bytes(BLOCK), marked(1, 1)) == 1, "the flushed write is missing"
    assert broken(promise, marked(FIRST_TAG, 0), bytes(BLOCK)) == 1, "neither the old nor the new content"


def test_after_a_newer_write_was_flushed_the_older_one_is_a_loss() -> None:
    """Going back in time is a loss, also where the block did hold that once."""
    records: list[Record] = [
        written(0, 0), Answered(0, 0, ""), written(1, 0), Answered(0, 1, ""),
        Issued(0, 2, 0, FLUSH, 0, 0), Answered(0, 2, ""), written(3, 0),
    ]  # fmt: skip
    promise = Promise.of(BLOCK, {})
    promise.advance(records, len(records))
    assert broken(promise, marked(FIRST_TAG, 0)) == 1
    assert broken(promise, marked(FIRST_TAG + 1, 0)) == 0
    assert broken(promise, marked(FIRST_TAG + 3, 0)) == 0, "sent, not answered: it may be there"


def test_a_failed_write_or_flush_promises_nothing() -> None:
    """The guest was told."""
    records: list[Record] = [
        written(0, 0), Answered(0, 0, ""), Issued(0, 1, 0, FLUSH, 0, 0), Answered(0, 1, "I/O error"),
        written(2, 1), Answered(0, 2, "I/O error"), Issued(0, 3, 0, FLUSH, 0, 0),
    ]  # fmt: skip
    promise = Promise.of(2 * BLOCK, {})
    promise.advance(records, len(records))
    assert broken(promise, bytes(BLOCK), bytes(BLOCK)) == 0


def test_an_image_is_judged_by_whether_it_opens_and_what_it_holds(tmp_path: Path) -> None:
    """Absent, unreadable, incomplete, good."""
    promise = Promise.of(MiB, {})
    assert judge(tmp_path / "none.qcow2", promise).state is State.ABSENT
    (tmp_path / "junk.qcow2").write_bytes(b"junk" * 1000)
    assert judge(tmp_path / "junk.qcow2", promise).state is State.UNREADABLE
    create(tmp_path / "empty.qcow2", MiB)
    assert judge(tmp_path / "empty.qcow2", promise).good
    create(tmp_path / "small.qcow2", MiB // 2)
    assert judge(tmp_path / "small.qcow2", promise).lost == 128
    damaged = bytearray((tmp_path / "empty.qcow2").read_bytes())
    damaged[0x20000:0x20002] = b"\0\0"  # the first refcount: the header's own cluster is free
    (tmp_path / "damaged.qcow2").write_bytes(damaged)
    assert judge(tmp_path / "damaged.qcow2", promise).state is State.CORRUPT


# ---------------------------------------------------------------------------------------------------- crashes and history


def test_a_kill_leaves_what_was_written_and_a_power_cut_what_was_flushed(tmp_path: Path) -> None:
    """A flush covers what was written before it began, not what came while it ran."""
    clock = LoopClock()
    recorder = Recorder(tmp_path, clock)
    one, two = (recorder.keep(memoryview(text)) for text in (b"one", b"two"))
    for record in (
        Made(0, "target/f"), Resized(0, "target/f", 8), Wrote(0, "target/f", 0, 3, one), Wrote(0, "target/f", 4, 3, two),
        Flushed(0, "target/f", 3), Wrote(0, "target/f", 0, 2, NO_BYTES),
    ):  # fmt: skip
        recorder.add(record)
    recorder.close()
    places = {crash: tmp_path / crash for crash in (KILL, POWER)}
    for place in places.values():
        (place / "target").mkdir(parents=True)
    replay = Replay(tmp_path, read_history(tmp_path), places)

    def content(crash: str) -> bytes:
        return (places[crash] / "target/f").read_bytes()

    replay.advance(4)
    assert (content(KILL), content(POWER)) == (b"one\0two\0", b"")
    replay.advance(5)
    assert content(POWER) == b"one" + bytes(5)
    replay.advance(6)
    assert (content(KILL), content(POWER)) == (b"\0\0e\0two\0", b"one" + bytes(5))


def test_a_history_is_read_back_as_it_was_taken_down(tmp_path: Path) -> None:
    """Every kind of record; and the witness is noticed before whatever comes next."""

    async def main() -> list[Record]:
        recorder = Recorder(tmp_path, LoopClock())
        (tmp_path / "witness").touch()
        recorder.witness = tmp_path / "witness"
        recorder.add(Entered(1, COPYING))
        (tmp_path / "witness").write_bytes(b"!")
        for record in (
            Told(2, "sent", 'a "command" with \n'), Made(3, "a"), Wrote(4, "a", 1, 2, NO_BYTES), Resized(5, "a", 6),
            Flushed(6, "a", 2), Read(7, "a", 8, 9), Issued(8, 0, 7, READ, 0, 1), Answered(9, 0, "no"),
        ):  # fmt: skip
            recorder.add(record)
        recorder.close()
        return recorder.records

    records = run(main)
    assert records[1] == Witnessed(0)
    assert read_history(tmp_path) == records


def test_phases_end_where_the_next_begins() -> None:
    """And the last one at the end."""
    records: list[Record] = [Entered(5, BEFORE), Read(6, "a", 0, 1), Entered(9, COPYING), Read(20, "a", 0, 1)]
    assert phases(records) == {BEFORE: (5, 9), COPYING: (9, 20)}


def test_moments_right_after_an_answered_flush_are_looked_at() -> None:
    """There a target that lags behind is found out."""
    records: list[Record] = [Entered(0, BEFORE), Entered(1, COPYING), Told(1, "sent", "go"), Entered(2, IN_STEP)]
    for number in range(3):
        records += [written(2 * number, 0), Answered(3, 2 * number, "")]
        records += [Issued(3, 2 * number + 1, 0, FLUSH, 0, 0), Answered(4, 2 * number + 1, "")]
    records += [Entered(5, SWITCHING), Told(5, "sent", "switch"), Told(6, "reply", "{}"), Entered(6, AFTER)]
    chosen = choose_moments(records)
    after_flushes = {8, 12, 16}
    assert after_flushes <= {moment for moment, phase in chosen if phase == IN_STEP}
    assert [moment for moment, phase in chosen if phase == SWITCHING] == [18, 19]
    assert not any(phase == BEFORE for _, phase in chosen)


def test_the_images_begin_with_two_layers_that_overlap() -> None:
    """So that copying has a chain to collapse."""
    base, top = initial_tags(1, 8 * MiB)
    assert set(base.values()) == {1}
    assert set(top.values()) == {2}
    assert set(base) & set(top)
    assert 0 < len(set(base) | set(top)) * BLOCK < 8 * MiB
