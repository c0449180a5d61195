"""The guest: its model of what a disk must hold, its workload, and that its proofs notice a single wrong byte."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qblock.backend import BlockBackend
from qblock.clock import LoopClock
from qblock.errors import BlockIOError, CommandError
from qblock.guest import SECTOR, UNKNOWN, ContentMap, Guest, GuestMismatch, Workload, byte_tag, expected_bytes
from qblock.permissions import Perm
from qblock.system import BlockSystem
from qblock.testing.simloop import run
from qblock.units import KiB, MiB

SIZE = MiB


def with_guest(work: Callable[[BlockSystem, Guest], Awaitable[None]], *, seed: int = 1, driver: str = "memory") -> None:
    """Run ``work`` with a guest on a new disk of 1 MiB of zeroes, on virtual time."""

    async def main() -> None:
        async with BlockSystem.create(clock=LoopClock(), random=Random(0)) as system:
            disk = await system.drive_add(
                f"if=virtio,id=d0,format=raw,discard=on,file.driver={driver},file.size={SIZE}"
            )
            guest = Guest(disk, system.clock, Random(seed))
            guest.expect(0, SIZE, byte_tag(0))
            await work(system, guest)

    run(main)


@given(st.lists(st.tuples(st.integers(0, 31), st.integers(0, 31), st.integers(-3, 5)), max_size=30))
def test_the_content_map_agrees_with_a_list_of_sectors(changes: list[tuple[int, int, int]]) -> None:
    """Runs are split and replaced in every way; a plain list tells what is right."""
    content = ContentMap(32 * SECTOR)
    plain = [0] * 32
    for one, other, tag in changes:
        start, end = min(one, other), max(one, other)
        content.assign(start * SECTOR, (end - start) * SECTOR, tag)
        plain[start:end] = [tag] * (end - start)
        runs = list(content.runs())
        assert [tag for run, tag in runs for _ in range(run.length // SECTOR)] == plain
        assert runs[0][0].offset == 0 and runs[-1][0].end == 32 * SECTOR


def test_content_can_be_computed_again_and_differs_by_tag_and_place() -> None:
    """A block that landed in the wrong place, or is of an older write, is told from the right one."""
    assert expected_bytes(3, 4096, 1024)[512:] == expected_bytes(3, 4608, 512)
    assert len({expected_bytes(tag, offset, 512) for tag in (1, 2) for offset in (0, 512)}) == 4
    assert expected_bytes(byte_tag(0xAB), 0, 512) == b"\xab" * 512
    assert expected_bytes(byte_tag(0), 0, 512) == bytes(512)


def test_a_disk_that_holds_what_was_written_is_proved_byte_for_byte() -> None:
    """All of the known content is compared, zeroes included."""

    async def work(system: BlockSystem, guest: Guest) -> None:
        await guest.write(4096, 8192)
        await guest.write(6144, 512, 0x5A)
        await guest.write_zeroes(5120, 512)
        assert await guest.read(6144, 512) == b"\x5a" * 512
        assert await guest.verify(guest.disk.read_into) == SIZE
        await guest.discard(0, 4096)
        assert await guest.verify(guest.disk.read_into) == SIZE - 4096

    with_guest(work)


@pytest.mark.parametrize("offset", [0, 4096, 12287, SIZE - 1])
def test_one_wrong_byte_anywhere_is_found_and_its_place_told(offset: int) -> None:
    """The proof of a proof: damage behind the guest's back."""

    async def work(system: BlockSystem, guest: Guest) -> None:
        await guest.write(4096, 8192)
        (right,) = await guest.disk.read(offset, 1)
        await guest.disk.write(offset, bytes([right ^ 1]))
        with pytest.raises(GuestMismatch) as found:
            await guest.verify(guest.disk.read_into)
        assert found.value.offset == offset
        with pytest.raises(GuestMismatch):
            await guest.read(offset - offset % SECTOR, SECTOR)

    with_guest(work)


def test_a_workload_is_the_same_for_the_same_seed_and_proves_its_disk() -> None:
    """Failures can be repeated; on virtual time a minute of work takes no time."""
    seen = []

    async def work(system: BlockSystem, guest: Guest) -> None:
        guest.start(Workload(interval_ns=1_000_000))
        assert guest.running
        with pytest.raises(CommandError):
            guest.start()
        await system.clock.sleep_ns(500_000_000)
        await guest.stop()
        assert not guest.running and guest.counters.writes > 100 and not guest.counters.failed
        assert await guest.verify(guest.disk.read_into) > SIZE // 2
        seen.append((guest.counters, list(guest.content.runs())))

    for seed in (7, 7, 8):
        with_guest(work, seed=seed)
    assert seen[0] == seen[1] != seen[2]


def test_a_failed_write_leaves_the_content_unknown_and_the_guest_goes_on() -> None:
    """After an error either content is right; what was promised before elsewhere still counts."""

    async def main() -> None:
        async with BlockSystem.create(clock=LoopClock()) as system:
            rule = "file.inject-error.0.event=none,file.inject-error.0.iotype=write,file.inject-error.0.sector=16"
            image = f"file.driver=blkdebug,{rule},file.image.driver=memory,file.image.size=64k"
            guest = Guest(await system.drive_add(f"if=virtio,format=raw,{image}"), system.clock, Random(1))
            await guest.write(0, 4096)
            with pytest.raises(BlockIOError):
                await guest.write(4096, 8192)
            assert guest.counters.failed == 1 and guest.last_error is not None
            assert {tag for _, tag in guest.content.runs(4096, 8192)} == {UNKNOWN}
            assert await guest.verify(guest.disk.read_into) == 4096
            guest.start(Workload(interval_ns=1_000_000, sizes=(4 * KiB,)))
            await system.clock.sleep_ns(100_000_000)
            await guest.stop()
            assert guest.counters.failed > 1
            await guest.verify(guest.disk.read_into)

    run(main)


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 100), (0, 0), (SIZE, 512), (-512, 512)])
def test_requests_that_no_disk_would_take_are_refused(offset: int, length: int) -> None:
    """Whole sectors inside the disk, as for hardware."""

    async def work(system: BlockSystem, guest: Guest) -> None:
        with pytest.raises(BlockIOError):
            await guest.write(offset, length)
        assert await guest.verify(guest.disk.read_into) == SIZE

    with_guest(work)


def test_the_guest_follows_its_device_to_another_node() -> None:
    """After a pivot requests go where the device leads; what was copied is still what must be there."""

    async def work(system: BlockSystem, guest: Guest) -> None:
        await guest.write(0, 65536)
        other = await system.opener.open_blockdev({"driver": "memory", "node-name": "other", "size": SIZE})
        other.monitor_owned = True
        data = await guest.disk.read(0, SIZE)
        disk: BlockBackend = guest.disk
        disk.remove()
        disk.insert(other)
        await disk.write(0, data)
        await guest.write(4096, 4096)
        assert await guest.verify(disk.read_into) == SIZE

    with_guest(work)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 5)), max_size=20))
def test_the_content_map_follows_the_size_of_its_disk(changes: list[tuple[int, int, int]]) -> None:
    """What is cut off is forgotten, what is added are zeroes; a plain list tells what is right."""
    content, plain = ContentMap(8), [0] * 8
    for size, start, tag in changes:
        content.resize(size)
        plain = (plain + [0] * size)[:size]
        length = max(0, min(4, size - start))
        content.assign(min(start, size), length, tag)
        plain[start : start + length] = [tag] * length
        shown = [tag for run, tag in content.runs() for _ in range(run.length)]
        assert shown == plain


def test_the_guest_uses_what_its_disk_has_gained_and_forgets_what_was_cut_off() -> None:
    """After block_resize the new area is the guest's, and holds zeroes also where there was data once."""

    async def resize(system: BlockSystem, guest: Guest, size: int) -> None:
        backend = BlockBackend(system.graph, perm=Perm.RESIZE, shared=Perm.ALL)
        backend.insert(guest.disk.node)
        await backend.truncate(size)
        backend.close()
        guest.notice_size()

    async def work(system: BlockSystem, guest: Guest) -> None:
        await guest.write(SIZE - 4096, 4096, 7)
        await resize(system, guest, SIZE // 2)
        with pytest.raises(BlockIOError):
            await guest.write(SIZE - 4096, 4096)
        await resize(system, guest, 2 * SIZE)
        assert await guest.read(SIZE - 4096, 4096) == bytes(4096)
        await guest.write(2 * SIZE - 512, 512)
        guest.start()
        await system.clock.sleep_ns(1_000_000_000)
        await guest.stop()
        assert guest.content.size == 2 * SIZE
        await guest.verify(guest.disk.read_into)

    with_guest(work)
