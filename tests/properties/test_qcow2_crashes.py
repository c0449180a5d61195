"""Long histories in which everything happens to one qcow2 image, and crashes at any moment of them.

Writes of all kinds, several at a time; snapshots made, applied and deleted; sizes that change, with every preallocation; amended
versions, widths and flags; persistent bitmaps added, stored and removed; an overlay that is emptied. A kill leaves every write
that was done, a power cut any part of those that no flush covered. What is left opens, has no error beyond leaks, and shows in
every sector what was there when it was last made durable, or something later; snapshots are whole; a bitmap that claims to be
true has recorded every change.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import attrs
import pytest

from qblock import requests
from qblock.backend import BlockBackend
from qblock.dirty import DirtyBitmap
from qblock.driver import CheckFix
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.errors import BlockIOError, CommandError, NodeBusy
from qblock.snapshots import SnapshotInfo
from qblock.testing.formats import FormatBench
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from tests.properties.test_qcow2_model import (
    SECTOR,
    Shape,
    change,
    crashed,
    make_restless,
    with_backing,
)

SEEDS = int(os.environ.get("QBLOCK_CRASH_SEEDS", "30"))
"""How many histories are lived; each is crashed at `MOMENTS` moments. ``QBLOCK_CRASH_FIRST`` is the first one's number."""
FIRST = int(os.environ.get("QBLOCK_CRASH_FIRST", "0"))
MOMENTS = 25
STEPS = 14


def shape_of(random: Random) -> Shape:
    """Any image, of version 3 for the most part."""
    bits = random.choice((9, 9, 10, 12, 14))
    version = random.choice(("v3", "v3", "v3", "v2"))
    extended = version == "v3" and random.random() < 0.25
    bits = 14 if extended else bits
    data_file = version == "v3" and random.random() < 0.2
    raw = data_file and random.random() < 0.4
    clusters = random.randrange(1, 250 if bits < 12 else 24)
    return Shape(
        bits,
        random.randrange(7) if version == "v3" else 4,
        version,
        clusters << bits,
        not raw and random.random() < 0.4,
        random.choice((None, 512, 1024)),
        random.choice((1, 4096, 1 << 20)),
        data_file,
        raw,
        random.choice(("zlib", "zstd")) if version == "v3" else "zlib",
        extended,
    )


@attrs.frozen
class State:
    """What was durable after a step: how many effects had happened, and what the image held."""

    moment: int
    size: int
    snapshots: dict[str, bytes]


class History:
    """What each sector was given, and what flushes promise; a sector that was never there holds zeroes."""

    def __init__(self, initial: bytes) -> None:
        self.values: list[list[bytes]] = []
        self.done: list[int] = []
        for at in range(0, len(initial), SECTOR):
            self._add(initial[at : at + SECTOR])
        self.promises: list[tuple[int, list[int]]] = [(0, list(self.done))]

    def _add(self, value: bytes) -> None:
        self.values.append([value])
        self.done.append(0)

    def begin(self, a: int, data: bytes) -> None:
        """These bytes are being written."""
        while len(self.values) * SECTOR < a + len(data):
            self._add(bytes(SECTOR))
        for i in range(0, len(data), SECTOR):
            self.values[(a + i) // SECTOR].append(data[i : i + SECTOR])

    def end(self, a: int, length: int) -> None:
        """And that has ended."""
        for sector in range(a // SECTOR, (a + length) // SECTOR):
            self.done[sector] = len(self.values[sector]) - 1

    def promise(self, moment: int, covered: list[int]) -> None:
        """From this moment on, sectors hold these values or later ones."""
        self.promises.append((moment, covered))

    def check(self, moment: int, found: bytes) -> None:
        """Does every sector hold what it must?"""
        promised = next(values for at, values in reversed(self.promises) if at <= moment)
        for sector in range(len(found) // SECTOR):
            oldest = promised[sector] if sector < len(promised) else 0
            value = found[sector * SECTOR : (sector + 1) * SECTOR]
            assert value in self.values[sector][oldest:], f"sector {sector} at moment {moment} holds {value[:16]!r}"


class Life:
    """One image, from its creation on."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.shape = shape_of(self.random)
        self.bench = FormatBench(Qcow2Driver)
        self.size = self.shape.size
        self.kept: dict[str, bytes] = {}
        self.states: list[State] = []
        self.bases: dict[str, bytes] = {}
        """What the disk held when a bitmap was added."""
        self.backing: Any = None
        self.disk: BlockBackend
        self.history: History
        self.below = b""

    @property
    def driver(self) -> Qcow2Driver:
        driver = self.bench.node.driver
        assert isinstance(driver, Qcow2Driver)
        return driver

    async def start(self) -> None:
        random, shape = self.random, self.shape
        lazy = shape.version == "v3" and random.random() < 0.3
        preallocation = "off" if shape.backing else random.choice(("off", "off", "metadata", "full"))
        await self.bench.create(**shape.create, lazy_refcounts=lazy, preallocation=preallocation)
        self.backing, model = await with_backing(self.bench, shape, random)
        options: dict[str, Any] = {
            **shape.options,
            "pass_discard_request": random.choice((None, True, False)),
            "pass_discard_other": random.random() < 0.5,
            "discard_no_unref": shape.version == "v3" and random.random() < 0.4,
        }
        self.disk = await self.bench.open(backing=self.backing, **options)
        make_restless(self.bench)
        self.below = bytes(model)
        self.history = History(self.below)
        self.note()

    def note(self) -> None:
        """All that is there now is durable."""
        moment = len(self.bench.storage.journal)
        self.states.append(State(moment, self.size, dict(self.kept)))
        self.history.promise(moment, list(self.history.done))

    async def content(self) -> bytes:
        return await self.disk.read(0, self.size)

    # ----------------------------------------------------------------------------------------------------------- steps

    async def step(self) -> None:
        """Something happens; sometimes all of it is made durable."""
        steps: list[Callable[[], Awaitable[None]]] = [self.write] * 6 + [self.snapshot] * 2 + [self.apply, self.delete]
        steps += [self.resize] * 2 + [self.amend, self.add_bitmap, self.add_bitmap, self.store, self.remove_bitmap, self.empty]
        await self.random.choice(steps)()
        if self.random.random() < 0.5:
            await self.disk.flush()
            self.note()

    async def write(self) -> None:
        """Several changes at once to parts of the disk, while somebody flushes."""
        await asyncio.gather(*self.changes(), self.flush())

    def changes(self) -> list[Awaitable[None]]:
        """Changes to parts of the disk that do not overlap."""
        sectors = self.size // SECTOR
        cuts = sorted({self.random.randrange(sectors + 1) * SECTOR for _ in range(self.random.randrange(2, 8))})
        shape = attrs.evolve(self.shape, size=self.size)
        return [
            change(self.disk, self.history, a, b, shape, self.random)
            for a, b in itertools.pairwise(cuts)
            if not (self.shape.version == "v2" and self.shape.backing)
        ]

    async def write_in_trouble(self) -> None:
        """As `write`, on storage that soon fails at everything, for a while; a flush may be tried in vain."""
        troubled = [storage for storage in (self.bench.storage, self.bench.data) if storage is not None]
        storage = self.random.choice(troubled)
        storage.fail_writes, storage.failure = self.random.randrange(12), self.random.choice((errno.EIO, errno.ENOSPC))
        try:
            await asyncio.gather(*map(survived, (*self.changes(), self.flush())))
            await survived(self.flush())
        finally:
            storage.fail_writes = None

    async def flush(self) -> None:
        for _ in range(self.random.randrange(3)):
            await asyncio.sleep(0)
        covered = list(self.history.done)
        await self.disk.flush()
        self.history.promise(len(self.bench.storage.journal), covered)

    async def snapshot(self) -> None:
        with contextlib.suppress(BlockIOError):
            kept = await self.content()
            info = await self.driver.create_snapshot(f"s{len(self.states)}")
            self.kept[info.id] = kept
            self.note()

    def pick(self) -> SnapshotInfo | None:
        known = self.driver.snapshots()
        return self.random.choice(known) if known else None

    async def apply(self) -> None:
        if (found := self.pick()) is None:
            return
        new = self.kept[found.id]
        self.history.begin(0, new.ljust(self.size, b"\0"))
        try:
            await self.driver.apply_snapshot(found)
        except (BlockIOError, NodeBusy):
            return
        self.size = len(new)
        self.history.end(0, self.size)
        self.note()

    async def delete(self) -> None:
        if (found := self.pick()) is not None:
            await self.driver.delete_snapshot(found)
            del self.kept[found.id]
            self.note()

    async def resize(self) -> None:
        """Sometimes to a part of a cluster."""
        size = max(SECTOR, self.random.randrange(2 * self.shape.size // SECTOR) * SECTOR)
        preallocation = self.random.choice(("off", "off", "metadata", "falloc", "full")) if size > self.size else "off"
        old, longest = self.size, max(size, self.size)
        if size == old:
            return  # nothing happens, so nothing becomes durable
        if size < old:
            # What is being cut off shows the backing node until the size has changed.
            self.history.begin(size, self.below[size:old].ljust(old - size, b"\0"))
        self.history.begin(min(size, old), bytes(longest - min(size, old)))
        try:
            await self.disk.truncate(size, preallocation=preallocation)
        except BlockIOError as error:
            if error.errno not in (errno.ENOTSUP, errno.EFBIG):
                raise
            return
        self.size = size
        self.history.end(min(size, old), longest - min(size, old))
        # What a disk gains is clean, also where it once was cut off.
        self.bases = {name: base[:size] for name, base in self.bases.items()}
        self.note()

    async def amend(self) -> None:
        options = self.random.choice(
            (
                {"refcount_bits": 1 << self.random.randrange(7)},
                {"refcount_bits": 1 << self.random.randrange(7)},
                {"compat": "1.1"},
                {"compat": "0.10", "refcount_bits": 16},
                {"lazy_refcounts": self.random.random() < 0.5},
            )
        )
        if self.backing is not None and options.get("compat") == "0.10":
            return
        try:
            await self.driver.amend(options, lambda done, total: None)
        except (CommandError, BlockIOError):
            return
        version = {"1.1": "v3", "0.10": "v2"}.get(str(options.get("compat")), self.shape.version)
        self.shape = attrs.evolve(self.shape, version=version)

    # --------------------------------------------------------------------------------------------------------- bitmaps

    async def add_bitmap(self) -> None:
        name = f"b{len(self.bench.storage.journal)}"
        bitmap = DirtyBitmap(self.bench.node.length, self.random.choice((512, 4096)), name, persistent=True)
        with contextlib.suppress(CommandError):
            self.driver.check_new_bitmap(bitmap)
            self.bases[name] = await self.content()
            self.bench.node.dirty_bitmaps.append(bitmap)

    async def store(self) -> None:
        await self.driver.store_bitmaps()

    async def remove_bitmap(self) -> None:
        bitmaps = self.bench.node.dirty_bitmaps
        if bitmaps:
            gone = self.random.choice(bitmaps)
            bitmaps.remove(gone)
            await self.driver.forget_bitmap(str(gone.name))

    async def empty(self) -> None:
        """Nothing is left but what the backing node shows."""
        if self.bench.node.dirty_bitmaps:
            return
        shows = self.below[: self.size].ljust(self.size, b"\0") if self.backing is not None else bytes(self.size)
        self.history.begin(0, shows)
        await self.driver.make_empty()
        self.history.end(0, self.size)
        self.note()

    # --------------------------------------------------------------------------------------------------------- crashes

    async def survives(self, moment: int, random: Random | None) -> None:
        """What a crash at this moment leaves is good."""
        image, data = crashed(self.bench.storage, moment, random), crashed(self.bench.data, moment, random)
        assert image is not None
        other = FormatBench(Qcow2Driver)
        other.data_content = data
        result = await other.check(image)
        assert (result.corruptions, result.check_errors) == (0, 0), (moment, result.findings)
        other.bench = self.bench.bench
        disk = await other.open(content=image, backing=self.backing, flags={"read_only": True})
        done = max(i for i, state in enumerate(self.states) if state.moment <= moment)
        possible = self.states[done : done + 2]
        assert disk.length in {state.size for state in possible}, moment
        content = await disk.read(0, disk.length)
        self.history.check(moment, content)
        for bitmap in other.node.dirty_bitmaps:
            self.check_bitmap(bitmap, content)
        await self.check_snapshots(other, [state.snapshots for state in possible])
        await self.goes_on(image, data, random or Random(moment))

    def check_bitmap(self, bitmap: DirtyBitmap, content: bytes) -> None:
        """What a usable bitmap calls clean is as it was when the bitmap was added."""
        if bitmap.inconsistent:
            return
        base, step = self.bases[str(bitmap.name)], bitmap.granularity
        for at in range(0, min(len(base), len(content)), step):
            end = min(at + step, len(base), len(content))
            assert bitmap.get(at) or content[at:end] == base[at:end], (bitmap.name, at)

    async def check_snapshots(self, image: FormatBench, possible: list[dict[str, bytes]]) -> None:
        """They are those before or after what was being done, and hold what they must."""
        driver = image.node.driver
        assert isinstance(driver, Qcow2Driver)
        infos = driver.snapshots()
        assert [info.id for info in infos] in [list(one) for one in possible]
        kept = {key: value for one in possible for key, value in one.items()}
        for info in infos:
            await driver.view_snapshot(info)
            requests.refresh_length(image.node)
            length = image.node.length
            assert length == len(kept[info.id])
            buffer = bytearray(length)
            await driver.read_into(0, memoryview(buffer))
            assert buffer == kept[info.id]

    async def goes_on(self, image: bytes, data: bytes | None, random: Random) -> None:
        """It can be written again, and repaired to the last leak."""
        other = FormatBench(Qcow2Driver)
        other.data_content = data
        other.bench = self.bench.bench
        disk = await other.open(content=image, backing=self.backing)
        at = random.randrange(disk.length // SECTOR) * SECTOR
        await disk.write(at, b"again" * 100 + bytes(12))
        await other.close()
        repaired = FormatBench(Qcow2Driver)
        repaired.data_content = other.data_content
        await repaired.check(other.content, CheckFix.LEAKS | CheckFix.ERRORS)
        result = await repaired.check()
        assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.findings


async def survived(work: Awaitable[None]) -> None:
    """Let it fail for a reason that storage may have."""
    with contextlib.suppress(BlockIOError):
        await work


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS // 2))
def test_storage_that_failed_for_a_while_is_written_as_if_it_had_not(seed: int) -> None:
    """No room, or no answer: what fails is told, nothing durable is lost, a crash leaves leaks at most, and once storage works
    again all goes on, without reopening.
    """

    async def main() -> None:
        life = Life(seed)
        await life.start()
        for _ in range(STEPS // 2):
            await life.write_in_trouble()
            assert life.bench.node.poisoned is None
            await life.step()
        await life.disk.flush()
        life.note()
        life.history.check(len(life.bench.storage.journal), await life.content())
        random = Random(seed)
        moments = range(len(life.bench.storage.journal) + 1)
        for moment in random.sample(moments, min(len(moments), MOMENTS // 2)):
            await life.survives(moment, None)
            await life.survives(moment, random)

    run(main, Seeded(seed))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_whatever_was_going_on_a_crash_leaves_at_most_leaks_and_all_that_was_durable(seed: int) -> None:
    """See the module."""

    async def main() -> None:
        life = Life(seed)
        await life.start()
        for _ in range(STEPS):
            await life.step()
            assert life.bench.node.poisoned is None
        await life.disk.flush()
        life.note()
        life.history.check(len(life.bench.storage.journal), await life.content())
        random = Random(seed)
        moments = range(len(life.bench.storage.journal) + 1)
        for moment in random.sample(moments, min(len(moments), MOMENTS)):
            await life.survives(moment, None)
            await life.survives(moment, random)

    run(main, Seeded(seed))
