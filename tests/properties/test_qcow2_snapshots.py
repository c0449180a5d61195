"""Internal snapshots of qcow2 against a list of bytearrays: any geometry, any order of operations, crashes at any moment."""

from __future__ import annotations

from random import Random

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qblock import requests
from qblock.backend import BlockBackend
from qblock.driver import SupportsSnapshots
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.errors import BlockIOError
from qblock.snapshots import SnapshotInfo
from qblock.testing.formats import FormatBench
from qblock.testing.simloop import run
from tests.properties.test_qcow2_model import qemu_agrees

SECTOR = 512


@attrs.frozen
class Shape:
    """An image to try."""

    cluster_bits: int
    refcount_order: int
    version: str
    size: int

    @property
    def create(self) -> dict[str, object]:
        return {
            "size": self.size,
            "cluster_size": 1 << self.cluster_bits,
            "refcount_bits": 1 << self.refcount_order,
            "version": self.version,
        }


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    bits = draw(st.sampled_from([9, 9, 10, 12, 16]))
    version = draw(st.sampled_from(["v3", "v3", "v3", "v2"]))
    clusters = draw(st.integers(1, 200 if bits < 12 else 12))
    order = draw(st.integers(0, 6)) if version == "v3" else 4
    return Shape(bits, order, version, (clusters << bits) - draw(st.sampled_from([0, 0, 512])) * (bits > 9))


class Lab:
    """An image with its snapshots, and what all of them must hold."""

    def __init__(self, shape: Shape, random: Random) -> None:
        self.shape, self.random = shape, random
        self.bench = FormatBench(Qcow2Driver)
        self.model = bytearray(shape.size)
        self.kept: dict[str, bytes] = {}
        self.disk: BlockBackend

    @property
    def driver(self) -> SupportsSnapshots:
        driver = self.bench.node.driver
        assert isinstance(driver, SupportsSnapshots)
        return driver

    async def start(self) -> None:
        await self.bench.create(**self.shape.create)
        self.disk = await self.bench.open()

    async def write(self) -> None:
        """A write, zeroes or a discard somewhere."""
        size = len(self.model)
        a, b = sorted(self.random.randrange(size // SECTOR + 1) * SECTOR for _ in range(2))
        if a == b:
            return
        kind = self.random.random()
        if kind < 0.6:
            data = self.random.randbytes(8) * ((b - a) // 8)
            await self.disk.write(a, data)
            self.model[a:b] = data
        elif kind < 0.8:
            await self.disk.write_zeroes(a, b - a, may_unmap=kind < 0.7)
            self.model[a:b] = bytes(b - a)
        else:
            cluster = 1 << self.shape.cluster_bits
            a, b = -(-a // cluster) * cluster, size if b == size else b // cluster * cluster
            if a < b:
                await self.disk.discard(a, b - a)
                self.model[a:b] = bytes(b - a)

    async def resize(self) -> None:
        if self.shape.version == "v2" and self.kept:
            return
        size = self.random.randrange(1, self.shape.size * 2 // SECTOR + 2) * SECTOR
        await self.disk.truncate(size)
        self.model = self.model[:size] + bytes(max(0, size - len(self.model)))

    async def snapshot(self) -> None:
        try:
            info = await self.driver.create_snapshot(f"s{self.random.randrange(9)}")
        except BlockIOError:
            assert self.shape.refcount_order < 3, "a wide refcount does not overflow"
            return
        assert info.id not in self.kept
        self.kept[info.id] = bytes(self.model)

    def pick(self) -> SnapshotInfo | None:
        known = self.driver.snapshots()
        return self.random.choice(known) if known else None

    async def apply(self) -> None:
        if (found := self.pick()) is not None:
            try:
                await self.driver.apply_snapshot(found)
            except BlockIOError:
                assert self.shape.refcount_order < 3
                return
            self.model = bytearray(self.kept[found.id])

    async def delete(self) -> None:
        if (found := self.pick()) is not None:
            await self.driver.delete_snapshot(found)
            del self.kept[found.id]

    async def step(self) -> None:
        kinds = [self.write, self.write, self.write, self.snapshot, self.snapshot, self.apply, self.delete, self.resize]
        await self.random.choice(kinds)()

    async def verify(self, *, real: bool) -> None:
        assert self.disk.length == len(self.model)
        assert await self.disk.read(0, len(self.model)) == self.model
        assert [info.id for info in self.driver.snapshots()] == list(self.kept)
        await self.bench.close()
        result = await self.bench.check()
        assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.findings
        if real:
            qemu_agrees(self.bench)
        for number in range(len(self.kept)):
            await verify_snapshot(self.bench.content, number, self.kept)
        self.disk = await self.bench.open()


async def verify_snapshot(content: bytes, number: int, kept: dict[str, bytes]) -> None:
    """A snapshot, opened read-only, shows what the disk held when it was made."""
    other = FormatBench(Qcow2Driver)
    disk = await other.open(content=content, flags={"read_only": True})
    driver = other.node.driver
    assert isinstance(driver, SupportsSnapshots)
    info = driver.snapshots()[number]
    await driver.view_snapshot(info)
    assert disk.length == len(kept[info.id])
    assert await disk.read(0, disk.length) == kept[info.id]
    await other.close()


@settings(max_examples=60)
@given(shapes(), st.integers(0, 1 << 30))
def test_snapshots_keep_what_the_disk_held(shape: Shape, seed: int) -> None:
    """Whatever is written, resized, applied and deleted: snapshots and disk show what they must, and no cluster is lost."""

    async def main() -> None:
        lab = Lab(shape, Random(seed))
        await lab.start()
        for number in range(12):
            await lab.step()
            if lab.random.random() < 0.4:
                await lab.verify(real=number % 4 == 0)
        await lab.verify(real=True)

    run(main)


@pytest.mark.parametrize("clusters", [3840, 3842, 3872, 3902, 3904, 3960, 4020])
def test_the_refcount_table_may_grow_while_a_snapshot_is_made(clusters: int) -> None:
    """Places for the new refcount structure are claimed by the old one, which may need a larger table for that."""

    async def main() -> None:
        lab = Lab(Shape(9, 6, "v3", 512 * 8000), Random(clusters))
        await lab.start()
        await lab.disk.write(0, b"x" * (512 * clusters))
        lab.model[: 512 * clusters] = b"x" * (512 * clusters)
        await lab.snapshot()
        await lab.verify(real=True)
        await lab.delete()
        await lab.verify(real=True)

    run(main)


@settings(max_examples=30)
@given(shapes(), st.integers(0, 1 << 30))
def test_a_crash_around_snapshots_leaves_at_most_leaks(shape: Shape, seed: int) -> None:
    """At any moment, with any part of what was not flushed: no corruption, and the snapshots and disks of before or after."""

    async def main() -> None:
        random = Random(seed)
        lab = Lab(shape, random)
        await lab.start()
        states: list[tuple[int, dict[str, bytes], bytes]] = [(0, {}, bytes(lab.model))]
        for _ in range(6):
            await lab.step()
            await lab.disk.flush()
            states.append((len(lab.bench.storage.effects), dict(lab.kept), bytes(lab.model)))
        total = len(lab.bench.storage.effects)
        for moment in random.sample(range(total + 1), min(total + 1, 40)):
            for content in (
                lab.bench.storage.after_kill(moment),
                lab.bench.storage.after_power_cut(moment, random),
            ):
                await survives(content, states, moment)

    run(main)


async def survives(content: bytes, states: list[tuple[int, dict[str, bytes], bytes]], moment: int) -> None:
    """The content opens, has no error, and all snapshots that it lists are whole."""
    bench = FormatBench(Qcow2Driver)
    result = await bench.check(content)
    assert (result.corruptions, result.check_errors) == (0, 0), result.findings
    done = max(i for i, (at, _, _) in enumerate(states) if at <= moment)
    possible = states[done : done + 2]
    await bench.open(content=content, flags={"read_only": True})
    driver = bench.node.driver
    assert isinstance(driver, SupportsSnapshots)
    ids = [info.id for info in driver.snapshots()]
    assert ids in [list(kept) for _, kept, _ in possible]
    kept = {key: value for _, one, _ in possible for key, value in one.items()}
    for number in range(len(ids)):
        await verify_snapshot(content, number, kept)
    await bench.close()


@settings(max_examples=25)
@given(shapes(), st.integers(0, 1 << 30), st.integers(0, 25))
def test_a_failing_storage_during_a_snapshot_does_no_harm(shape: Shape, seed: int, good: int) -> None:
    """A write that fails while tables are switched leaves the image as it was, or poisoned and with leaks only."""

    async def main() -> None:
        random = Random(seed)
        lab = Lab(shape, random)
        await lab.start()
        for _ in range(6):
            await lab.step()
        await lab.disk.flush()
        lab.bench.storage.fail_writes = good
        try:
            await random.choice([lab.snapshot, lab.apply, lab.delete])()
        except (BlockIOError, AssertionError):
            pass
        lab.bench.storage.fail_writes = None
        content = bytes(lab.bench.storage.live)
        result = await FormatBench(Qcow2Driver).check(content)
        assert (result.corruptions, result.check_errors) == (0, 0), result.findings
        if lab.bench.node.poisoned is None:
            requests.refresh_length(lab.bench.node)
            await lab.verify(real=False)

    run(main)
