"""Quorum: who wins, what is reported, what is written over, and how many must succeed; blkverify, which wants two to be alike."""

from __future__ import annotations

import errno
from typing import Any

import attrs
import pytest

from qblock.backend import BlockBackend
from qblock.driver import SupportsChildren
from qblock.errors import BlockIOError, CommandError, PermissionConflict
from qblock.extents import Data, Zero
from qblock.node import BlockDriverState
from qblock.opening import Opener, OpenPolicy
from qblock.permissions import Perm
from qblock.registry import DriverRegistry
from qblock.requests import block_status, read_into, write_from
from qblock.testing.nodes import NodeBench
from qblock.testing.simloop import run
from qblock.units import KiB

SIZE = 64 * KiB
DISK = {"driver": "memory", "size": SIZE}


class Place:
    """A bench with an opener; disks ``d0``, ``d1``, … for the quorum."""

    def __init__(self) -> None:
        self.bench = NodeBench()
        self.opener = Opener(self.bench.graph, DriverRegistry(), self.bench.env, OpenPolicy.deny())

    @property
    def events(self) -> list[tuple[str, str]]:
        """Kind and child (or reference) of the events so far."""
        return [
            (data.get("type", name), data.get("node-name") or data["reference"]) for name, data in self.bench.events
        ]

    async def disks(self, content: str) -> list[str]:
        """A disk for each letter, which is its byte 5000; names of the disks."""
        names = []
        for number, letter in enumerate(content):
            node = await self.opener.open_blockdev({**DISK, "node-name": f"d{number}"})
            node.monitor_owned = True
            backend = self.bench.backend(node)
            await backend.write(5000, letter.encode())
            backend.close()
            names.append(node.node_name)
        return names

    async def quorum(self, children: list[Any], threshold: int, **options: Any) -> BlockBackend:
        """A quorum ``q`` over ``children``."""
        given = {key.replace("_", "-"): value for key, value in options.items()}
        base = {"driver": "quorum", "node-name": "q", "children": children, "vote-threshold": threshold}
        node = await self.opener.open_blockdev({**base, **given})
        return self.bench.backend(node, perm=Perm.CONSISTENT_READ | Perm.WRITE)

    async def byte_of(self, name: str) -> bytes:
        """Byte 5000 of a disk, past its users."""
        backend = BlockBackend(self.bench.graph, perm=Perm.NONE, shared=Perm.ALL)
        backend.insert(self.bench.graph.nodes[name])
        buffer = bytearray(1)
        assert backend.root is not None
        await read_into(backend.root, 5000, memoryview(buffer))
        backend.close()
        return bytes(buffer)


def failing(**errors: int) -> dict[str, Any]:
    """A disk that fails requests of these types."""
    rules = [{"event": "none", "iotype": kind.replace("_", "-"), "errno": number} for kind, number in errors.items()]
    return {"driver": "blkdebug", "image": DISK, "inject-error": rules}


@pytest.mark.parametrize(
    ("content", "threshold", "winner", "losers"),
    [
        ("xxx", 3, "x", ""), ("xxy", 2, "x", "2"), ("yxx", 2, "x", "0"), ("xxyy", 2, "y", "10"), ("xyxy", 2, "y", "20"),
        ("xyzzz", 3, "z", "10"), ("xzzzy", 2, "z", "40"), ("xxy", 3, None, ""), ("xyz", 2, None, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rewrite", [False, True])
def test_votes(content: str, threshold: int, winner: str | None, losers: str, rewrite: bool) -> None:
    """What most have wins; losers are reported, latest first, and made alike if that is asked for."""

    async def main() -> None:
        place = Place()
        names = await place.disks(content)
        backend = await place.quorum(names, threshold, rewrite_corrupted=rewrite)
        if winner is None:
            with pytest.raises(BlockIOError) as failed:
                await backend.read(4096, 4096)
            assert failed.value.errno == errno.EIO
            assert place.events == [("QUORUM_FAILURE", "q")]
        else:
            assert (await backend.read(4990, 20))[10:11] == winner.encode()
            assert place.events == [("read", f"d{number}") for number in losers]
        now = [await place.byte_of(name) for name in names]
        changed = winner is not None and rewrite
        assert now == [(winner if changed else letter).encode() for letter in content]  # type: ignore[union-attr]

    run(main)


def test_a_report_tells_sectors_and_errors() -> None:
    """Sectors are those that the request touches; a difference has no error."""

    async def main() -> None:
        place = Place()
        backend = await place.quorum([failing(read=28), DISK, DISK], 2)
        await backend.read(1000, 600)
        ((name, data),) = place.bench.events
        assert name == "QUORUM_REPORT_BAD"
        assert (data["sector-num"], data["sectors-count"], data["error"]) == (1, 3, "No space left on device")

    run(main)


@pytest.mark.parametrize(
    ("children", "threshold", "expected", "events"),
    [
        ([failing(write=28), DISK], 1, None, ["write"]),
        ([failing(write=28), DISK], 2, 28, ["write", "QUORUM_FAILURE"]),
        ([failing(write=28), failing(write=5), failing(write=28)], 2, 28, ["write"] * 3 + ["QUORUM_FAILURE"]),
        ([failing(write=28), failing(write=5)], 1, 5, ["write", "write", "QUORUM_FAILURE"]),
    ],
)
def test_writes_need_as_many_successes_as_votes(
    children: list[Any], threshold: int, expected: int | None, events: list[str]
) -> None:
    """The error is that which most children had, the last one among equals."""

    async def main() -> None:
        place = Place()
        backend = await place.quorum(children, threshold)
        if expected is None:
            await backend.write(0, b"x")
        else:
            with pytest.raises(BlockIOError) as failed:
                await backend.write(0, b"x")
            assert failed.value.errno == expected
        assert [kind for kind, _ in place.events] == events

    run(main)


def test_flushes_are_reported_without_a_failure_of_the_quorum() -> None:
    """As in QEMU; sectors make no sense there."""

    async def main() -> None:
        place = Place()
        backend = await place.quorum([failing(flush=5), DISK, failing(flush=28)], 2)
        await backend.write(0, b"x")
        with pytest.raises(BlockIOError) as failed:
            await backend.flush()
        assert failed.value.errno == errno.ENOSPC
        assert [kind for kind, _ in place.events] == ["flush", "flush"]
        assert place.bench.events[0][1]["sectors-count"] == 0

    run(main)


def test_fifo_asks_the_next_child_only_when_one_fails() -> None:
    """The error is the last child's; a difference is never noticed."""

    async def main() -> None:
        place = Place()
        backend = await place.quorum([*(await place.disks("xy"))], 2, read_pattern="fifo")
        assert await backend.read(5000, 1) == b"x" and not place.events
        place = Place()
        backend = await place.quorum([failing(read=5), failing(read=28)], 1, read_pattern="fifo")
        with pytest.raises(BlockIOError) as failed:
            await backend.read(0, 1)
        assert failed.value.errno == errno.ENOSPC and [kind for kind, _ in place.events] == ["read", "read"]

    run(main)


def test_zero_only_where_all_children_are() -> None:
    """A child that cannot tell may have data."""

    async def main() -> None:
        place = Place()
        await place.quorum(await place.disks("xx"), 1)
        node = place.bench.graph.nodes["q"]
        assert isinstance(await block_status(node, 5000, 1), Data)
        place = Place()
        await place.quorum([DISK, DISK], 1)
        assert await block_status(place.bench.graph.nodes["q"], 0, SIZE) == Zero(SIZE)
        place = Place()
        await place.quorum([failing(block_status=5), DISK], 1)
        assert await block_status(place.bench.graph.nodes["q"], 0, SIZE) == Data(SIZE)
        assert [kind for kind, _ in place.events] == ["read"]

    run(main)


def test_nobody_else_writes_to_a_child() -> None:
    """Children that differ by somebody's write would be outvoted."""

    async def main() -> None:
        place = Place()
        names = await place.disks("xx")
        await place.quorum(names, 2)
        with pytest.raises(PermissionConflict):
            place.bench.backend(place.bench.graph.nodes["d0"])

    run(main)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"threshold": 3}), (2, {"threshold": 0}), (0, {"threshold": 1}), (3, {"threshold": 2, "blkverify": True}),
        (2, {"threshold": 1, "blkverify": True}), (2, {"threshold": 2, "blkverify": True, "rewrite_corrupted": True}),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(count: int, options: dict[str, Any]) -> None:
    """Nothing stays open."""

    async def main() -> None:
        place = Place()
        with pytest.raises(CommandError):
            await place.quorum([DISK] * count, **options)
        assert not place.bench.graph.nodes

    run(main)


def test_children_of_different_lengths_are_refused() -> None:
    """They are no copies of one disk; a child cannot be left out either."""

    async def main() -> None:
        place = Place()
        with pytest.raises(BlockIOError):
            await place.quorum([DISK, {**DISK, "size": 4096}], 1)
        with pytest.raises(CommandError):
            await place.quorum([DISK, None], 1)
        assert not place.bench.graph.nodes

    run(main)


def test_children_that_come_get_the_next_number_and_needed_ones_stay() -> None:
    """What x-blockdev-change relies on."""

    async def main() -> None:
        place = Place()
        await place.quorum([DISK] * 3, 2)
        driver = place.bench.graph.nodes["q"].driver
        assert isinstance(driver, SupportsChildren)
        node = driver.node.children["children.0"].node
        assert driver.new_child(node)[0] == "children.3"
        driver.check_child_can_go("children.1")
        del driver.node.children["children.1"]
        with pytest.raises(CommandError):
            driver.check_child_can_go("children.0")
        assert driver.new_child(node)[0] == "children.3"
        node.length += 512
        with pytest.raises(CommandError, match="has 66048 bytes"):
            driver.new_child(node)

    run(main)


# ------------------------------------------------------------------------------------------- two that must be alike


class Ended(Exception):
    """The program would have ended."""


def ending(place: Place) -> None:
    """Let `Environment.fatal` raise."""

    def fatal(text: str) -> None:
        raise Ended(text)

    place.bench.env = place.opener.env = attrs.evolve(place.bench.env, fatal=fatal)


@pytest.mark.parametrize(
    "options",
    [
        {"driver": "quorum", "children": ["d0", "d1"], "vote-threshold": 2, "blkverify": True},
        {"driver": "blkverify", "test": "d0", "raw": "d1"},
    ],
    ids=["quorum", "blkverify"],
)
@pytest.mark.parametrize("in_a_program", [True, False])
def test_a_difference_ends_the_program_or_fails_the_read(options: dict[str, Any], in_a_program: bool) -> None:
    """The text tells where it is."""

    async def main() -> None:
        place = Place()
        if in_a_program:
            ending(place)
        await place.disks("xy")
        node = await place.opener.open_blockdev({**options, "node-name": "two"})
        backend = place.bench.backend(node, perm=Perm.CONSISTENT_READ | Perm.WRITE)
        await backend.read(0, 4096)
        with pytest.raises(Ended if in_a_program else BlockIOError, match="5000"):
            await backend.read(4096, 4096)
        await backend.write(4096, b"z" * 4096)
        assert await backend.read(4096, 4096) == b"z" * 4096

    run(main)


def test_blkverify_compares_errors_too_and_passes_on_those_that_are_alike() -> None:
    """A disk under test must fail where the trusted one does."""

    async def main() -> None:
        for test, raw, alike in ((failing(write=5), failing(write=5), True), (failing(write=5), DISK, False)):
            place = Place()
            ending(place)
            node = await place.opener.open_blockdev({"driver": "blkverify", "node-name": "v", "test": test, "raw": raw})
            backend = place.bench.backend(node)
            with pytest.raises(BlockIOError if alike else Ended):
                await backend.write(0, b"x")

    run(main)


def test_blkverify_is_as_long_as_what_it_tests_and_flushes_only_that() -> None:
    """The raw file may be longer."""

    async def main() -> None:
        place = Place()
        raw = {"driver": "blkdebug", "image": {**DISK, "size": 2 * SIZE}, "inject-error": [{"event": "none", "iotype": "flush"}]}
        node = await place.opener.open_blockdev({"driver": "blkverify", "node-name": "v", "test": DISK, "raw": raw})
        backend = place.bench.backend(node)
        assert backend.length == SIZE
        await backend.write_zeroes(0, 4096)
        await backend.discard(0, 4096)
        await backend.flush()

    run(main)


def test_blkverify_says_that_raw_is_too_short_for_a_write() -> None:
    """That is a difference as any other; QEMU 7.2 ends with a failed assertion."""

    async def main() -> None:
        for in_a_program in (True, False):
            place = Place()
            if in_a_program:
                ending(place)
            raw = {**DISK, "size": SIZE // 2}
            node = await place.opener.open_blockdev({"driver": "blkverify", "node-name": "v", "test": DISK, "raw": raw})
            backend = place.bench.backend(node)
            await backend.write(SIZE // 2 - 512, bytes(512))
            with pytest.raises(Ended if in_a_program else BlockIOError, match="beyond the end"):
                await backend.write(SIZE // 2 - 512, bytes(1024))

    run(main)


def test_names_of_blkverify(tmp_path: Any) -> None:
    """``blkverify:RAW:TEST`` opens both, the latter with its format found out."""

    async def main() -> None:
        for name in ("raw", "test"):
            (tmp_path / name).write_bytes(b"a" * SIZE)
        place = Place()
        name = f"blkverify:{tmp_path}/raw:{tmp_path}/test"
        node: BlockDriverState = await place.opener.open_image(name, fmt="raw", read_only=False)
        assert node.driver.filename() == name
        backend = place.bench.backend(node)
        assert await backend.read(0, 1) == b"a"
        assert backend.root is not None
        await write_from(backend.root, 0, memoryview(b"b" * 512))
        backend.close()
        await place.opener.close_orphans()
        assert (tmp_path / "raw").read_bytes() == (tmp_path / "test").read_bytes()
        for wrong in ("blkverify:a", "blkverify::a", "blkverify:a:"):
            with pytest.raises(CommandError):
                await place.opener.open_image(wrong)

    run(main)
