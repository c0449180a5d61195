"""The throttle filter, and the limits of a backend: what waits, what does not, and who is in a group."""

from __future__ import annotations

import asyncio

import pytest

from qblock.clock import LoopClock
from qblock.drain import drained
from qblock.errors import BlockIOError, CommandError
from qblock.opening import Opener, OpenPolicy
from qblock.registry import DriverRegistry
from qblock.testing.nodes import NodeBench
from qblock.testing.simloop import run
from qblock.throttle_limits import ThrottleLimits
from qblock.throttling import ThrottleGroup
from qblock.units import SECOND_NS, KiB

FILTER = {
    "driver": "throttle", "node-name": "t", "throttle-group": "g", "discard": "unmap",
    "file": {"driver": "memory", "size": 64 * KiB, "node-name": "below"},
}  # fmt: skip


class Place:
    """A bench with an opener, and a group ``g`` of ten requests a second."""

    def __init__(self) -> None:
        self.bench = NodeBench()
        self.opener = Opener(self.bench.graph, DriverRegistry(), self.bench.env, OpenPolicy.deny())
        self.group = self.make_group("g", iops_total=10)

    def make_group(self, name: str, **limits: int) -> ThrottleGroup:
        """A group that stays."""
        group = self.bench.env.throttle_groups.create(name)
        group.set_limits(ThrottleLimits(**limits))
        return group


def seconds() -> float:
    """Virtual time."""
    return LoopClock().now_ns() / SECOND_NS


async def started() -> None:
    """Let the tasks that were made just now come to their first wait."""
    for _ in range(3):
        await asyncio.sleep(0)


def test_everything_but_flushes_waits_for_the_limits() -> None:
    """Zero writes and discards count as writes."""

    async def main() -> None:
        place = Place()
        backend = place.bench.backend(await place.opener.open_blockdev(FILTER))
        place.group.set_limits(ThrottleLimits(bps_write=1024, bps_read=4096))
        for work, until in (
            (backend.write(0, b"a" * 1024), 0.0),
            (backend.flush(), 0.0),
            (backend.write_zeroes(0, 1024), 0.9),
            (backend.discard(0, 1024), 1.9),
            (backend.write(0, b"b" * 512), 2.9),
            (backend.read(0, 4096), 2.9),
            (backend.read(0, 512), 3.8),
        ):
            await work
            assert seconds() == pytest.approx(until, abs=0.001)

    run(main)


def test_a_drained_section_does_not_wait_for_the_limits() -> None:
    """Neither one on the filter nor one below it; afterwards the limits hold again."""

    async def main() -> None:
        for drained_node in ("t", "below"):
            place = Place()
            place.group.set_limits(ThrottleLimits(iops_total=1))
            backend = place.bench.backend(await place.opener.open_blockdev(FILTER))
            requests = [asyncio.create_task(backend.write(0, b"x")) for _ in range(20)]
            await started()
            start = seconds()
            async with drained(place.bench.graph.nodes[drained_node]):
                assert seconds() == start and all(request.done() for request in requests)
            await backend.write(0, b"y")
            assert seconds() - start > 15
            backend.close()
            await place.opener.close_orphans()

    run(main)


def test_a_filter_opened_in_a_drained_section_does_not_wait() -> None:
    """Its child is drained, so it is."""

    async def main() -> None:
        place = Place()
        below = await place.opener.open_blockdev({"driver": "memory", "node-name": "m"})
        below.monitor_owned = True
        place.group.set_limits(ThrottleLimits(iops_total=1))
        async with drained(below):
            node = await place.opener.open_blockdev({**FILTER, "file": "m"})
            assert node.quiesce_counter
            (member,) = place.group.members
            assert member.drained
        assert not member.drained

    run(main)


def test_a_group_must_be_there_and_is_left_on_close() -> None:
    """Groups of drives will do as well."""

    async def main() -> None:
        place = Place()
        with pytest.raises(CommandError, match="nope"):
            await place.opener.open_blockdev({**FILTER, "throttle-group": "nope"})
        drive = place.bench.env.throttle_groups.join("drive")
        node = await place.opener.open_blockdev({**FILTER, "throttle-group": "drive"})
        assert len(drive.group.members) == 2
        drive.leave()
        backend = place.bench.backend(node)
        backend.close()
        await place.opener.close_orphans()
        with pytest.raises(CommandError):
            place.bench.env.throttle_groups.find("drive")

    run(main)


def test_the_group_can_be_changed_while_the_node_is_open() -> None:
    """An unknown one is refused, and then the old one still holds."""

    async def main() -> None:
        place = Place()
        other = place.make_group("other")
        below = await place.opener.open_blockdev({"driver": "memory", "node-name": "m"})
        below.monitor_owned = True
        node = await place.opener.open_blockdev({**FILTER, "file": "m"})
        node.monitor_owned = True
        with pytest.raises(CommandError):
            await place.opener.reopen_described([{**FILTER, "file": "m", "throttle-group": "nope"}])
        assert len(place.group.members) == 1
        await place.opener.reopen_described([{**FILTER, "file": "m", "throttle-group": "other"}])
        assert (len(place.group.members), len(other.members)) == (0, 1)
        assert not other.members[0].drained

    run(main)


def test_limits_of_a_backend_hold_for_reads_and_writes_and_not_for_discards() -> None:
    """QEMU counts no discards here, unlike in the filter."""

    async def main() -> None:
        place = Place()
        backend = place.bench.backend(await place.opener.open_blockdev(FILTER["file"]))
        backend.limit(place.group.join())
        for _ in range(100):
            await backend.discard(0, 512)
            await backend.flush()
        assert seconds() == 0.0
        for _ in range(6):
            await backend.write(0, b"x")
            await backend.write_zeroes(0, 512)
            await backend.read(0, 512)
        assert seconds() == pytest.approx(1.6, abs=0.01)

    run(main)


def test_a_drained_section_lets_requests_pass_that_wait_for_the_limits_of_their_backend() -> None:
    """They are under way: the section waits for them, and new ones wait for its end."""

    async def main() -> None:
        place = Place()
        node = await place.opener.open_blockdev(FILTER["file"])
        backend = place.bench.backend(node)
        backend.limit(place.group.join())
        requests = [asyncio.create_task(backend.write(0, b"x")) for _ in range(50)]
        await started()
        async with drained(node):
            assert seconds() == 0.0 and all(request.done() for request in requests)
            late = asyncio.create_task(backend.write(0, b"x"))
            await started()
        await late
        assert seconds() > 4

    run(main)


def test_a_request_that_has_waited_finds_the_medium_that_is_there_then() -> None:
    """The drive may have been emptied; and lifting the limits lets everything go on."""

    async def main() -> None:
        place = Place()
        node = await place.opener.open_blockdev(FILTER["file"])
        node.monitor_owned = True
        backend = place.bench.backend(node)
        backend.limit(place.group.join())
        requests = [asyncio.create_task(backend.write(0, b"x")) for _ in range(5)]
        await started()
        backend.remove()
        backend.limit(None)
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(result) for result in results] == [type(None)] * 2 + [BlockIOError] * 3
        assert not backend.in_flight

    run(main)
