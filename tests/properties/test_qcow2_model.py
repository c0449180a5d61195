"""qcow2 against a bytearray: any operations at any geometry, in any order of steps, with crashes at any moment."""

from __future__ import annotations

import asyncio
import errno
import itertools
import shutil
import subprocess
import tempfile
from random import Random

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qblock.drivers.memory import MemoryDriver, MemoryOptions
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.errors import BlockIOError
from qblock.testing.crash import CrashStorage
from qblock.testing.formats import FormatBench
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run

SECTOR = 512


@attrs.frozen
class Shape:
    """An image to try: its creation and open options, and whether it has a backing node."""

    cluster_bits: int
    refcount_order: int
    version: str
    size: int
    backing: bool
    entry_size: int | None
    cache: int
    data_file: bool = False
    raw: bool = False
    compression: str = "zlib"
    extended: bool = False

    @property
    def create(self) -> dict[str, object]:
        options: dict[str, object] = {
            "size": self.size,
            "cluster_size": 1 << self.cluster_bits,
            "refcount_bits": 1 << self.refcount_order,
            "version": self.version,
            "compression_type": self.compression,
            "extended_l2": self.extended,
        }
        return options | ({"data_file": "data", "data_file_raw": self.raw} if self.data_file else {})

    @property
    def options(self) -> dict[str, object]:
        cluster = 1 << self.cluster_bits
        entry = self.entry_size if self.entry_size and self.entry_size <= cluster else None
        return {"l2_cache_entry_size": entry, "l2_cache_size": self.cache, "refcount_cache_size": self.cache}


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    bits = draw(st.sampled_from([9, 9, 10, 12, 14, 16]))
    version = draw(st.sampled_from(["v3", "v3", "v3", "v2"]))
    extended = version == "v3" and draw(st.sampled_from([False, False, True]))
    bits = max(bits, 14) if extended else bits
    clusters = draw(st.integers(1, 300 if bits < 12 else 20))
    data_file = version == "v3" and draw(st.sampled_from([False, False, True]))
    raw = data_file and draw(st.booleans())
    size = (clusters << bits) - draw(st.sampled_from([0, 0, 512])) * (bits > 9)
    return Shape(
        bits,
        draw(st.integers(0, 6)) if version == "v3" else 4,
        version,
        max(size, 512),
        not raw and draw(st.booleans()),
        draw(st.sampled_from([None, 512, 1024])),
        draw(st.sampled_from([1, 4096, 1 << 20])),
        data_file,
        raw,
        draw(st.sampled_from(["zlib", "zstd"])) if version == "v3" else "zlib",
        extended,
    )


async def with_backing(bench: FormatBench, shape: Shape, random: Random) -> tuple[object, bytearray]:
    """A backing node (shorter than the disk, and with holes of zeroes) and what a fresh overlay shows."""
    model = bytearray(shape.size)
    if not shape.backing:
        return None, model
    length = shape.size * 3 // 4 // SECTOR * SECTOR or SECTOR
    node = await bench.bench.add(MemoryDriver, MemoryOptions(size=length))
    content = bytearray(random.randbytes(length))
    content[length // 2 : length // 2 + length // 8] = bytes(length // 8)
    await node.driver.write_from(0, memoryview(content))
    model[:length] = content
    return node, model


# -------------------------------------------------------------------------------------------------------- the model


@settings(max_examples=60)
@given(shapes(), st.integers(0, 1 << 30), st.integers(1, 8))
def test_a_disk_behaves_like_a_bytearray(shape: Shape, seed: int, rounds: int) -> None:
    """Batches of concurrent operations on disjoint ranges, under a random schedule, with the image reopened in between."""
    run(lambda: _model(shape, Random(seed), rounds), Seeded(seed))


async def _model(shape: Shape, random: Random, rounds: int) -> None:
    bench = FormatBench(Qcow2Driver)
    await bench.create(**shape.create)
    backing, model = await with_backing(bench, shape, random)
    disk = await bench.open(backing=backing, **shape.options)
    for _ in range(rounds):
        bench.storage.restless = random.random() < 0.8
        cuts = sorted(random.randrange(shape.size + 1) for _ in range(random.randrange(2, 12)))
        ranges = [(a, b) for a, b in itertools.pairwise(cuts) if a < b]
        flushes = [disk.flush()] if random.random() < 0.5 else []
        await asyncio.gather(*(operate(disk, model, a, b, shape, random.random(), random) for a, b in ranges), *flushes)
        assert await disk.read(0, shape.size) == model
        if shape.raw:
            assert bench.data is not None and bench.data.live[: shape.size] == model
        if random.random() < 0.3:
            await bench.close()
            result = await bench.check()
            assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.findings
            qemu_agrees(bench)
            disk = await bench.open(backing=backing, **shape.options)
            assert await disk.read(0, shape.size) == model
    await bench.close()
    result = await bench.check()
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.findings


async def operate(disk: object, model: bytearray, a: int, b: int, shape: Shape, kind: float, random: Random) -> None:
    """One operation on [a, b), on the disk and in the model."""
    length = b - a
    if kind < 0.15 and not shape.data_file:
        await compress(disk, model, a, b, shape, random)
    elif kind < 0.45:
        data = random.randbytes(length)
        await disk.write(a, data)  # type: ignore[attr-defined]
        model[a:b] = data
    elif kind < 0.7:
        await disk.write_zeroes(a, length, may_unmap=kind < 0.6)  # type: ignore[attr-defined]
        model[a:b] = bytes(length)
    elif kind < 0.9:
        await disk.discard(a, length)  # type: ignore[attr-defined]
        forget(model, a, b, shape)
    else:
        assert await disk.read(a, length) == model[a:b]  # type: ignore[attr-defined]


def whole_clusters(a: int, b: int, shape: Shape) -> tuple[int, int]:
    """The part of [a, b) that is whole clusters; empty if there is none."""
    cluster = 1 << shape.cluster_bits
    end = b if b == shape.size else b // cluster * cluster
    return -(-a // cluster) * cluster, end


def packable(random: Random, length: int) -> bytes:
    """Sectors that can be told apart, and most of which become smaller when they are compressed."""
    return b"".join(
        random.randbytes(8) * (SECTOR // 8) if random.random() < 0.8 else random.randbytes(SECTOR)
        for _ in range(length // SECTOR)
    )


async def compress(disk: object, model: bytearray, a: int, b: int, shape: Shape, random: Random) -> None:
    """A compressed write of the whole clusters of [a, b), which ends where something is stored."""
    a, b = whole_clusters(a, b, shape)
    if a >= b:
        return
    data = packable(random, b - a)
    try:
        await disk.write_compressed(a, memoryview(data))  # type: ignore[attr-defined]
    except BlockIOError as error:
        if error.errno != errno.EIO:
            raise
        cluster = 1 << shape.cluster_bits
        for at in range(a, b, cluster):
            end = min(at + cluster, b)
            found = await disk.read(at, end - at)  # type: ignore[attr-defined]
            assert found in (model[at:end], data[at - a : end - a])
            model[at:end] = found
    else:
        model[a:b] = data


def forget(model: bytearray, a: int, b: int, shape: Shape) -> None:
    """What a discard does: whole clusters read as zeroes, parts stay; version 2 cannot over a backing file."""
    if shape.version == "v2" and shape.backing:
        return
    first, end = whole_clusters(a, b, shape)
    if first < end:
        model[first:end] = bytes(end - first)


def qemu_agrees(bench: FormatBench) -> None:
    """The real qemu-img finds nothing wrong (when it is installed)."""
    if shutil.which("qemu-img") is None:
        return
    with tempfile.NamedTemporaryFile(suffix=".qcow2") as file, tempfile.NamedTemporaryFile(suffix=".raw") as data:
        file.write(bench.content)
        file.flush()
        options = f"driver=qcow2,file.driver=file,file.filename={file.name}"
        if bench.data_content is not None:
            data.write(bench.data_content)
            data.flush()
            options += f",data-file.driver=file,data-file.filename={data.name}"
        command = ["qemu-img", "check", "--image-opts", options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------ crashes


class History:
    """What each sector was given, by operations that began and ended, and what flushes promise of it."""

    def __init__(self, initial: bytes) -> None:
        self.values: list[list[bytes]] = [[initial[at : at + SECTOR]] for at in range(0, len(initial), SECTOR)]
        self.promises: list[tuple[int, list[int]]] = [(0, [0] * len(self.values))]
        self.done = [0] * len(self.values)

    def begin(self, a: int, data: bytes) -> None:
        for i in range(0, len(data), SECTOR):
            self.values[(a + i) // SECTOR].append(data[i : i + SECTOR])

    def end(self, a: int, length: int) -> None:
        for sector in range(a // SECTOR, (a + length) // SECTOR):
            self.done[sector] = len(self.values[sector]) - 1

    def check(self, moment: int, found: bytes) -> None:
        """Every sector holds its last flushed value or a later one."""
        promise = next(values for at, values in reversed(self.promises) if at <= moment)
        for sector, oldest in enumerate(promise):
            value = found[sector * SECTOR : (sector + 1) * SECTOR]
            assert value in self.values[sector][oldest:], f"sector {sector} holds something that it must not at moment {moment}"


@settings(max_examples=25)
@given(shapes(), st.integers(0, 1 << 30))
def test_a_crash_at_any_moment_leaves_at_most_leaks_and_all_flushed_data(shape: Shape, seed: int) -> None:
    """Every prefix of the writes (a killed process) and samples of what a power cut may keep: no corruption, nothing lost."""
    if shape.version == "v2":
        shape = attrs.evolve(shape, version="v3", refcount_order=4)
    run(lambda: _crash(shape, Random(seed)), Seeded(seed))


async def _crash(shape: Shape, random: Random) -> None:
    bench = FormatBench(Qcow2Driver)
    await bench.create(**shape.create)
    backing, model = await with_backing(bench, shape, random)
    disk = await bench.open(backing=backing, **shape.options)
    make_restless(bench)
    history = History(bytes(model))
    for _ in range(random.randrange(3, 9)):
        cuts = sorted({random.randrange(shape.size // SECTOR + 1) * SECTOR for _ in range(random.randrange(2, 8))})
        ranges = list(itertools.pairwise(cuts))
        changes = [change(disk, history, a, b, shape, random) for a, b in ranges]
        await asyncio.gather(*changes, flush(bench, disk, history, random))
    await disk.flush()
    moments = range(len(bench.storage.journal) + 1)
    for moment in random.sample(moments, min(len(moments), 60)):
        await survives(bench, shape, history, moment, backing, None)
        await survives(bench, shape, history, moment, backing, random)


async def change(disk: object, history: History, a: int, b: int, shape: Shape, random: Random) -> None:
    kind = random.random()
    if kind < 0.25 and not shape.data_file:
        a, b = whole_clusters(a, b, shape)
        if a >= b:
            return
        data = packable(random, b - a)
        history.begin(a, data)
        try:
            await disk.write_compressed(a, memoryview(data))  # type: ignore[attr-defined]
        except BlockIOError as error:
            if error.errno != errno.EIO:
                raise
            return
    elif kind < 0.6:
        data = b"".join(random.randbytes(8) * (SECTOR // 8) for _ in range((b - a) // SECTOR))
        history.begin(a, data)
        await disk.write(a, data)  # type: ignore[attr-defined]
    else:
        if kind >= 0.8:
            a, b = whole_clusters(a, b, shape)
            if a >= b:
                return
        history.begin(a, bytes(b - a))
        if kind < 0.8:
            await disk.write_zeroes(a, b - a, may_unmap=kind < 0.7)  # type: ignore[attr-defined]
        else:
            await disk.discard(a, b - a)  # type: ignore[attr-defined]
    history.end(a, b - a)


async def flush(bench: FormatBench, disk: object, history: History, random: Random) -> None:
    for _ in range(random.randrange(3)):
        await asyncio.sleep(0)
    covered = list(history.done)
    await disk.flush()  # type: ignore[attr-defined]
    history.promises.append((len(bench.storage.journal), covered))


def make_restless(bench: FormatBench) -> None:
    for storage in (bench.storage, bench.data):
        if storage is not None:
            storage.restless = True


def crashed(storage: CrashStorage | None, moment: int, random: Random | None) -> bytes | None:
    """What is left of one storage: of a killed process, or with ``random`` after a power cut."""
    if storage is None:
        return None
    own = storage.moment_at(moment)
    return storage.after_kill(own) if random is None else storage.after_power_cut(own, random)


async def survives(
    bench: FormatBench, shape: Shape, history: History, moment: int, backing: object, random: Random | None
) -> None:
    image, data = crashed(bench.storage, moment, random), crashed(bench.data, moment, random)
    assert image is not None
    other = FormatBench(Qcow2Driver)
    other.data_content = data
    result = await other.check(image)
    assert (result.corruptions, result.check_errors) == (0, 0), (moment, result.findings)
    other.bench = bench.bench
    disk = await other.open(content=image, backing=backing, flags={"read_only": True})
    history.check(moment, await disk.read(0, shape.size))


# ---------------------------------------------------------------------------------------------------------- overlaps


@settings(max_examples=60)
@given(shapes(), st.integers(0, 1 << 30))
def test_overlapping_requests_leave_only_what_somebody_wrote_there(shape: Shape, seed: int) -> None:
    """Writes, zeroes, discards, reads and flushes on the same clusters at once: clusters are freed and reused under way, and
    still no sector ever shows what was meant for another place."""
    run(lambda: _overlaps(shape, Random(seed)), Seeded(seed))


async def _overlaps(shape: Shape, random: Random) -> None:
    bench = FormatBench(Qcow2Driver)
    await bench.create(**shape.create)
    backing, model = await with_backing(bench, shape, random)
    disk = await bench.open(backing=backing, **shape.options)
    make_restless(bench)
    history = History(bytes(model))
    sectors = shape.size // SECTOR

    async def one() -> None:
        a = random.randrange(sectors)
        b = random.randrange(a, min(a + 1 + (2 << shape.cluster_bits) // SECTOR, sectors)) + 1
        if random.random() < 0.3:
            found = await disk.read(a * SECTOR, (b - a) * SECTOR)
            for sector in range(a, b):
                assert found[(sector - a) * SECTOR : (sector - a + 1) * SECTOR] in history.values[sector]
        elif random.random() < 0.2:
            await disk.flush()
        else:
            await change(disk, history, a * SECTOR, b * SECTOR, shape, random)

    for _ in range(4):
        await asyncio.gather(*(one() for _ in range(random.randrange(1, 24))))
        found = await disk.read(0, shape.size)
        for sector in range(sectors):
            value = found[sector * SECTOR : (sector + 1) * SECTOR]
            assert value in history.values[sector]
            history.values[sector] = [value]
    await bench.close()
    result = await bench.check()
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), result.findings


# ----------------------------------------------------------------------------------------------------- failing writes


@settings(max_examples=60)
@given(shapes(), st.integers(0, 1 << 30), st.integers(0, 60))
def test_a_failing_storage_never_corrupts_the_image(shape: Shape, seed: int, good: int) -> None:
    """From the n-th write on everything fails: the node refuses what it must, and what is on disk checks without errors."""

    async def main() -> None:
        random = Random(seed)
        bench = FormatBench(Qcow2Driver)
        await bench.create(**shape.create)
        disk = await bench.open(**shape.options)
        make_restless(bench)
        random.choice([storage for storage in (bench.storage, bench.data) if storage is not None]).fail_writes = good
        for _ in range(6):
            a = random.randrange(shape.size)
            length = random.randrange(1, min(shape.size - a, 70000) + 1)
            await asyncio.gather(disk.write(a, random.randbytes(length)), disk.flush(), return_exceptions=True)
        other = FormatBench(Qcow2Driver)
        other.data_content = bytes(bench.data.live) if bench.data is not None else None
        result = await other.check(bytes(bench.storage.live))
        assert (result.corruptions, result.check_errors) == (0, 0), result.findings

    run(main, Seeded(seed))


@pytest.mark.parametrize("bits", [9, 12, 16, 21])
def test_sequential_writing_makes_one_run(bits: int) -> None:
    """Allocation comes in runs: a disk written from front to end lies in few pieces in the file."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        size = 4 << 20
        await bench.create(size=size, cluster_size=1 << bits)
        disk = await bench.open()
        for at in range(0, size, 1 << 20):
            await disk.write(at, b"x" * (1 << 20))
        await bench.close()
        result = await bench.check()
        assert (result.corruptions, result.leaks) == (0, 0)
        assert result.fragmented_clusters is not None and result.fragmented_clusters <= (size >> 20) + (size >> bits) // 50

    run(main)
