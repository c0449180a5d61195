"""The driver as a whole: concurrency that random tests would seldom meet, hostile images, refusals, options."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qblock import requests
from qblock.backend import BlockBackend
from qblock.driver import BackingLink, CheckFix
from qblock.drivers.file.driver import FileDriver, FileOptions
from qblock.drivers.qcow2.driver import Qcow2Driver
from qblock.drivers.qcow2.header import parse_header
from qblock.drivers.qcow2.options import Encryption, EncryptionCreate, OverlapChecks, Qcow2Options
from qblock.errors import BlockIOError, CorruptImage, ImagePoisoned, InvalidParameter, QBlockError
from qblock.extents import Data, Unallocated, Zero
from qblock.permissions import ChildRole
from qblock.testing.formats import FormatBench
from qblock.testing.nodes import NodeBench
from qblock.testing.simloop import run
from qblock.units import GiB, KiB, MiB

CLUSTER = 65536


async def made(**options: Any) -> FormatBench:
    bench = FormatBench(Qcow2Driver)
    await bench.create(**{"size": 4 * MiB, **options})
    return bench


def hold(bench: FormatBench, matches: Any) -> asyncio.Event:
    """Let writes to the storage whose data match wait until the event is set."""
    gate, write = asyncio.Event(), bench.storage.write_from

    async def held(offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        if matches(bytes(buffer)):
            await gate.wait()
        await write(offset, buffer)

    bench.storage.write_from = held  # type: ignore[method-assign]
    return gate


# --------------------------------------------------------------------------------------------------------- concurrency


def test_a_cluster_is_not_reused_while_an_old_overwrite_is_still_under_way() -> None:
    """An overwrite hangs in the storage; its cluster is discarded and everything flushed; what is written next must not be
    hit when the overwrite at last arrives."""

    async def main() -> None:
        bench = await made()
        disk = await bench.open()
        await disk.write(0, b"a" * CLUSTER)
        gate = hold(bench, lambda data: data[:1] == b"b")
        late = asyncio.ensure_future(disk.write(0, b"b" * CLUSTER))
        await asyncio.sleep(1)
        await disk.discard(0, CLUSTER)
        await disk.flush()
        await disk.flush()
        await disk.write(MiB, b"c" * CLUSTER)
        gate.set()
        await late
        assert await disk.read(MiB, CLUSTER) == b"c" * CLUSTER
        assert await disk.read(0, CLUSTER) == bytes(CLUSTER)
        await bench.close()
        assert (await bench.check()).leaks == 0

    run(main)


def test_two_first_writes_into_one_cluster_wait_for_each_other() -> None:
    """Both would copy the rest of the cluster; the second finds the first one's place."""

    async def main() -> None:
        bench = await made()
        disk = await bench.open()
        gate = hold(bench, lambda data: data[:1] == b"b")
        first = asyncio.ensure_future(disk.write(0, b"b" * 512))
        await asyncio.sleep(1)
        second = asyncio.ensure_future(disk.write(512, b"c" * 512))
        zero = asyncio.ensure_future(disk.write_zeroes(1024, CLUSTER - 1024))
        await asyncio.sleep(1)
        assert not second.done()
        gate.set()
        await asyncio.gather(first, second, zero)
        assert await disk.read(0, 1536) == b"b" * 512 + b"c" * 512 + bytes(512)
        await bench.close()
        assert (await bench.check()).allocated_clusters == 1

    run(main)


def test_the_refcount_structure_grows_while_many_write() -> None:
    """64-bit counts in 512-byte clusters: a block covers 32 KiB, a table cluster 2 MiB; a crash at any moment is survived."""

    async def main() -> None:
        bench, random = await made(cluster_size=512, refcount_bits=64, size=6 * MiB), Random(5)
        disk = await bench.open(refcount_cache_size=4096)
        bench.storage.restless = True
        chunks = [(at, random.randbytes(40 * KiB)) for at in range(0, 5 * MiB, 40 * KiB)]
        random.shuffle(chunks)
        for i in range(0, len(chunks), 16):
            await asyncio.gather(*(disk.write(at, data) for at, data in chunks[i : i + 16]), disk.flush())
        storage = bench.storage
        for moment in random.sample(range(len(storage.effects)), 25):
            for image in (storage.after_kill(moment), storage.after_power_cut(moment, random)):
                result = await bench.check(image)
                assert (result.corruptions, result.check_errors) == (0, 0), result.findings[:5]
        for at, data in chunks:
            assert await disk.read(at, len(data)) == data
        await bench.close()
        result = await bench.check()
        assert (result.corruptions, result.leaks) == (0, 0), result.findings[:5]

    run(main)


def test_a_big_l1_table_finds_room_in_small_clusters() -> None:
    """Growing to 40 MiB needs an L1 table of 10 KiB in 512-byte clusters whose refcount blocks cover 64 of them."""

    async def main() -> None:
        bench = await made(cluster_size=512, refcount_bits=64, size=MiB)
        disk = await bench.open()
        await disk.write(0, b"x" * MiB)
        await disk.truncate(300 * MiB)
        await disk.write(299 * MiB, b"y" * 1000)
        await bench.close()
        assert (await bench.check()).corruptions == 0
        disk = await bench.open()
        assert await disk.read(299 * MiB, 1000) == b"y" * 1000 and await disk.read(0, MiB) == b"x" * MiB
        await bench.close()
        assert ((await bench.check()).leaks, (await bench.check()).corruptions) == (0, 0)

    run(main)


# ------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("failing", range(4))
def test_metadata_that_cannot_be_written_is_written_later(failing: int) -> None:
    """A storage that fails for a while, at any step of a write-back: flushes fail, all else goes on; then nothing is missing."""

    async def main() -> None:
        bench = await made()
        disk = await bench.open()
        await disk.write(0, b"a" * 100)
        bench.storage.fail_writes, bench.storage.failure = failing, errno.ENOSPC
        with pytest.raises(BlockIOError) as full:
            await disk.flush()
        assert full.value.errno == errno.ENOSPC
        assert await disk.read(0, 100) == b"a" * 100
        with pytest.raises(BlockIOError):
            await disk.flush()
        bench.storage.fail_writes = None
        await disk.write(MiB, b"b")
        await disk.discard(0, CLUSTER)
        await disk.flush()
        assert (await bench.check(content=bytes(bench.storage.live))).corruptions == 0
        await bench.close()
        result = await bench.check()
        assert (result.corruptions, result.leaks, result.allocated_clusters) == (0, 0, 1)

    run(main)


def test_a_write_that_may_have_changed_what_the_image_means_poisons_the_node() -> None:
    """What is on disk is not known then: reads go on from memory, writes and flushes are refused with the cause."""

    async def main() -> None:
        for failing in range(100):
            bench = await made()
            disk = await bench.open()
            await disk.write(0, b"a" * 100)
            bench.storage.fail_writes = failing
            with contextlib.suppress(BlockIOError):
                await bench.node.driver.create_snapshot("s")
            bench.storage.fail_writes = None
            if bench.node.poisoned is not None:
                break
            await bench.close()
        assert await disk.read(0, 100) == b"a" * 100
        for attempt in (disk.write(0, b"b"), disk.write(MiB, b"b"), disk.flush(), disk.discard(0, CLUSTER)):
            with pytest.raises(ImagePoisoned):
                await attempt
        await bench.close()
        assert (await bench.check()).corruptions == 0

    run(main)


def test_a_disk_that_is_full_gives_the_space_back_and_goes_on_later() -> None:
    """ENOSPC for data is no damage: the write fails, the next one may work."""

    async def main() -> None:
        bench = await made()
        disk = await bench.open()
        await disk.write(0, b"a")
        bench.storage.fail_writes, bench.storage.failure = 0, errno.ENOSPC
        for _ in range(3):
            with pytest.raises(BlockIOError) as full:
                await disk.write(MiB, b"b" * CLUSTER)
            assert full.value.errno == errno.ENOSPC
        bench.storage.fail_writes = None
        await disk.write(MiB, b"b" * CLUSTER)
        assert await disk.read(MiB, CLUSTER) == b"b" * CLUSTER
        await bench.close()
        result = await bench.check()
        assert (result.corruptions, result.leaks, result.allocated_clusters) == (0, 0, 2)

    run(main)


# --------------------------------------------------------------------------------------------------------- hostile


def with_entry(image: bytes, offset: int, value: int) -> bytes:
    return image[:offset] + struct.pack(">Q", value) + image[offset + 8 :]


async def tables(bench: FormatBench) -> tuple[int, int]:
    """File offsets of the L1 table and of the first L2 table of an image with data at 0."""
    disk = await bench.open()
    await disk.write(0, b"a" * CLUSTER)
    await bench.close()
    l1 = struct.unpack_from(">Q", bench.content, 40)[0]
    return l1, struct.unpack_from(">Q", bench.content, l1)[0] & ((1 << 56) - 1)


@pytest.mark.parametrize("value", [1 << 57 | CLUSTER * 9, CLUSTER * 5 + 512, 1 << 40, 1 << 60])
@pytest.mark.parametrize("level", ["l1", "l2"])
def test_damaged_entries_fail_the_read_and_are_reported_once(level: str, value: int) -> None:
    """EIO and one BLOCK_IMAGE_CORRUPTED, not fatal; what lies elsewhere stays readable."""
    if level == "l2" and value == 1 << 40:
        return  # a cluster behind the end of the file reads as zeroes

    async def main() -> None:
        bench = await made(size=GiB)
        l1, l2 = await tables(bench)
        disk = await bench.open(content=with_entry(bench.content, l1 if level == "l1" else l2, value))
        for _ in range(3):
            with pytest.raises(BlockIOError) as failed:
                await disk.read(0, 10)
            assert failed.value.errno == errno.EIO
        assert await disk.read(600 * MiB, 100) == bytes(100)
        assert [(name, data["fatal"]) for name, data in bench.bench.events] == [("BLOCK_IMAGE_CORRUPTED", False)]
        with pytest.raises(BlockIOError):
            await disk.write(0, b"x")
        assert bench.bench.events[-1][1]["fatal"] and bench.node.poisoned is not None
        assert bench.storage.live[79] & 2, "the corrupt bit is set"

    run(main)


@pytest.mark.parametrize("target", [CLUSTER, 2 * CLUSTER, 3 * CLUSTER, 4 * CLUSTER, 1 << 45])
def test_a_guest_cannot_write_over_metadata(target: int) -> None:
    """An entry that maps guest data onto refcounts or tables, or far behind the file: the write is stopped, the image marked."""

    async def main() -> None:
        bench = await made()
        _, l2 = await tables(bench)
        content = with_entry(bench.content, l2, target | 1 << 63)
        disk = await bench.open(content=content)
        before = bytes(bench.storage.live[target : target + CLUSTER])
        for at in (0, 100):
            with pytest.raises(BlockIOError):
                await disk.write(at, b"evil")
        assert bytes(bench.storage.live[target : target + CLUSTER]) == before
        assert bench.bench.events[0][1]["fatal"]

    run(main)


def test_a_refcount_that_calls_metadata_free_does_not_lead_to_its_loss() -> None:
    """Allocation would take the cluster of a table."""

    async def main() -> None:
        bench = await made()
        image = bytearray(bench.content)
        image[2 * CLUSTER + 6 : 2 * CLUSTER + 8] = b"\0\0"
        disk = await bench.open(content=bytes(image))
        with pytest.raises(BlockIOError):
            await disk.write(0, b"x" * CLUSTER)
        assert bench.node.poisoned is not None
        bench = await made()
        disk = await bench.open(content=bytes(image), overlap_check=OverlapChecks(template="cached", active_l1=False))
        await disk.write(0, b"x" * CLUSTER)

    run(main)


@settings(max_examples=150)
@given(st.integers(0, 1 << 30), st.integers(1, 12), st.booleans())
def test_flipped_bits_and_cut_files_raise_errors_of_ours_only(seed: int, flips: int, cut: bool) -> None:
    """Open, read everything, write, discard, resize and check: whatever is damaged, no other exception comes out."""

    async def main() -> None:
        random = Random(seed)
        bench = await made(cluster_size=512, size=40 * KiB)
        disk = await bench.open()
        for _ in range(6):
            await disk.write(random.randrange(36 * KiB), random.randbytes(2000))
        await bench.close()
        image = bytearray(bench.content)
        for _ in range(flips):
            at = random.randrange(600) if random.random() < 0.3 else random.randrange(len(image))
            image[at] ^= 1 << random.randrange(8)
        if cut:
            del image[random.randrange(len(image)) :]
        await provoke(bench, bytes(image), random)

    run(main)


async def provoke(bench: FormatBench, image: bytes, random: Random) -> None:
    for read_only in (True, False):
        try:
            disk = await bench.open(content=image, flags={"read_only": read_only})
        except QBlockError:
            continue
        size = min(disk.length, MiB)
        attempts = [disk.read(0, size)]
        if not read_only:
            at = random.randrange(max(size - 3000, 1))
            attempts += [
                disk.write(at, b"z" * min(3000, size - at)),
                disk.write_zeroes(0, min(size, 5000)),
                disk.discard(0, min(size, 9000)),
                disk.truncate(80 * KiB),
                disk.flush(),
            ]
        for outcome in await asyncio.gather(*attempts, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, QBlockError):
                raise outcome
    try:
        await bench.check(image)
    except QBlockError:
        pass


# ------------------------------------------------------------------------------------------------------- the rest


def test_block_status_gives_long_runs() -> None:
    """One answer for many tables, and exact ends where the kind changes."""

    async def main() -> None:
        bench = await made(size=64 * MiB, cluster_size=4096)
        disk = await bench.open()
        await disk.write(10 * MiB, b"x" * (7 * MiB))
        await disk.write_zeroes(20 * MiB, 9 * MiB)
        driver = bench.node.driver
        assert await driver.block_status(0, 64 * MiB) == Unallocated(10 * MiB)
        data = await driver.block_status(10 * MiB + 100, 64 * MiB)
        assert isinstance(data, Data) and data.length > MiB and data.offset is not None
        assert await driver.block_status(20 * MiB, 44 * MiB) == Zero(9 * MiB)
        assert await driver.block_status(29 * MiB, 35 * MiB) == Unallocated(35 * MiB)

    run(main)


async def on_file(bench: NodeBench, path: Path, content: bytes) -> BlockBackend:
    """An image in a real file, open for writing."""
    path.write_bytes(content)
    storage = await bench.add(FileDriver, FileOptions(filename=str(path)), discard_unmap=True)
    node = await bench.add(Qcow2Driver, Qcow2Options(file="x"), children={"file": (storage, ChildRole.STORAGE)})
    return bench.backend(node)


def test_copies_between_images_go_through_the_storage(tmp_path: Path) -> None:
    """copy_range: plain data go from file to file, zeroes stay zeroes, and clusters written in part keep their rest."""

    async def main() -> None:
        fresh, bench = (await made(cluster_size=4096)).content, NodeBench()
        source, target = [await on_file(bench, tmp_path / name, fresh) for name in ("source", "target")]
        data = Random(1).randbytes(300_000)
        await source.write(1000, data)
        await source.write_zeroes(100_000, 50_000)
        await target.write(0, b"t" * 600_000)
        assert source.root is not None and target.root is not None
        await requests.copy_range(source.root, 500, target.root, 7777, 310_000)
        assert await target.read(7777, 310_000) == await source.read(500, 310_000)
        assert await target.read(7000, 777) == b"t" * 777 and await target.read(317_777, 100) == b"t" * 100
        for backend in (source, target):
            await backend.node.driver.close()
            assert backend.node.storage is not None
            await backend.node.storage.node.driver.close()
        result = await FormatBench(Qcow2Driver).check((tmp_path / "target").read_bytes())
        assert (result.corruptions, result.leaks) == (0, 0)

    run(main)


def test_the_header_is_rewritten_with_what_has_moved_meanwhile() -> None:
    """Refcount and L1 tables may lie elsewhere than when the image was opened; a new backing link must not bring them back."""

    async def main() -> None:
        bench = await made(cluster_size=512, refcount_bits=64, size=MiB)
        disk = await bench.open()
        await disk.truncate(6 * MiB)
        await disk.write(0, b"x" * (5 * MiB))
        driver = bench.node.driver
        assert isinstance(driver, Qcow2Driver)
        await asyncio.gather(
            driver.change_backing_link(BackingLink("b", "raw")), disk.write(5 * MiB, b"y" * (MiB // 2))
        )
        assert ((await driver.check(CheckFix.NONE)).leaks, (await driver.check(CheckFix.NONE)).corruptions) == (0, 0)
        await bench.close()
        assert ((await bench.check()).leaks, (await bench.check()).corruptions) == (0, 0)
        disk = await bench.open()
        assert disk.length == 6 * MiB and await disk.read(4 * MiB, MiB + 10) == b"x" * MiB + b"y" * 10

    run(main)


def test_the_backing_link_is_changed_durably_and_unknown_extensions_stay() -> None:
    """Rewriting the header keeps what it does not understand."""

    async def main() -> None:
        bench = await made(backing_file="old.img", backing_fmt="raw")
        await bench.open()
        driver = bench.node.driver
        assert isinstance(driver, Qcow2Driver)
        assert driver.backing_link() == BackingLink("old.img", "raw")
        await driver.change_backing_link(BackingLink("/a/new.qcow2", "qcow2"))
        assert bench.storage.effects[-1].kind == "flush"
        await bench.close()
        await bench.open()
        driver = bench.node.driver
        assert isinstance(driver, Qcow2Driver) and driver.backing_link() == BackingLink("/a/new.qcow2", "qcow2")
        with pytest.raises(BlockIOError):
            await driver.change_backing_link(BackingLink("x" * 1024, None))
        await driver.change_backing_link(None)
        assert driver.backing_link() is None and b"qcow2" not in bytes(bench.storage.live[:CLUSTER])

    run(main)


@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize(
    "link",
    [None, BackingLink("n", None), BackingLink("/a/longer/new/name.qcow2", "qcow2"), BackingLink("x" * 300, "raw")],
)
def test_power_cuts_while_the_link_changes_leave_the_old_or_the_new_one(
    version: str, cluster_bits: int, link: BackingLink | None
) -> None:
    """A torn header would make the whole image unreadable: what is parsed lies in one sector, and names do not overlap."""

    async def main() -> None:
        old = BackingLink("/some/where/old-backing-file.img", "raw")
        bench = await made(
            version=version, cluster_size=1 << cluster_bits, backing_file=old.filename, backing_fmt=old.format
        )
        await bench.open()
        driver = bench.node.driver
        assert isinstance(driver, Qcow2Driver)
        started = len(bench.storage.effects)
        await driver.change_backing_link(link)
        for moment in range(started, len(bench.storage.effects) + 1):
            for seed in range(20):
                image = bench.storage.after_power_cut(moment, Random(seed))
                header = parse_header(image[: 1 << cluster_bits], "image")
                found = header.backing_file and BackingLink(header.backing_file, header.backing_format)
                assert found in (old, link)
        assert found == link

    run(main)


def test_unknown_autoclear_bits_are_cleared_before_the_first_write() -> None:
    """Their features may become untrue by writing; reading leaves them alone."""

    async def main() -> None:
        bench = await made()
        image = bytearray(bench.content)
        image[88] |= 0x40
        await bench.open(content=bytes(image), flags={"read_only": True})
        assert bench.storage.live[88] == 0x40
        await bench.open(content=bytes(image))
        assert bench.storage.live[88] == 0

    run(main)


async def reopen(bench: FormatBench, *, read_only: bool) -> None:
    driver = bench.node.driver
    driver.check_reopen(driver.options, read_only=read_only)
    await driver.prepare_reopen(driver.options, read_only=read_only)
    bench.node.read_only = read_only
    driver.commit_reopen(driver.options, read_only=read_only)


def test_a_node_can_be_reopened_for_writing_and_back() -> None:
    """As commit and stream do with backing images; nothing is written before the first write."""

    async def main() -> None:
        bench = await made()
        disk = await bench.open()
        await disk.write(0, b"a" * 1000)
        await reopen(bench, read_only=True)
        written = len(bench.storage.effects)
        with pytest.raises(BlockIOError):
            await bench.node.driver.write_from(0, memoryview(b"x"))
        await reopen(bench, read_only=False)
        assert len(bench.storage.effects) == written or bench.storage.effects[-1].kind == "flush"
        await disk.write(MiB, b"b" * 1000)
        await bench.close()
        assert ((await bench.check()).leaks, (await bench.check()).corruptions) == (0, 0)
        disk = await bench.open()
        assert await disk.read(MiB, 1000) == b"b" * 1000 and await disk.read(0, 1000) == b"a" * 1000

    run(main)


BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "entry size": {"l2_cache_entry_size": 1000},
    "entry larger than a cluster": {"l2_cache_entry_size": 2 * CLUSTER},
    "all three sizes": {"cache_size": MiB, "l2_cache_size": 1, "refcount_cache_size": 1},
    "parts larger than the whole": {"cache_size": 1, "l2_cache_size": MiB},
    "negative": {"cache_clean_interval": -1},
    "encryption": {"encrypt": Encryption(format="luks")},
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_that_cannot_be_honoured_are_refused(name: str) -> None:
    """Never accepted and ignored."""

    async def main() -> None:
        bench = await made()
        with pytest.raises(InvalidParameter):
            await bench.open(**BAD_OPTIONS[name])

    run(main)


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 1000},
        {"cluster_size": 4 * MiB},
        {"size": 1000},
        {"refcount_bits": 3},
        {"refcount_bits": 128},
        {"version": "v2", "refcount_bits": 8},
        {"version": "v2", "lazy_refcounts": True},
        {"version": "v2", "compression_type": "zstd"},
        {"preallocation": "full", "backing_file": "x"},
        {"extended_l2": True, "version": "v2"},
        {"extended_l2": True, "cluster_size": 8192},
        {"data_file": "data", "version": "v2"},
        {"data_file": "data", "data_file_raw": True, "backing_file": "x"},
        {"data_file_raw": True},
        {"encrypt": EncryptionCreate(format="luks")},
        {"cluster_size": 512, "size": 1 << 40},
    ],
    ids=str,
)
def test_creation_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    """Before the file is touched."""

    async def main() -> None:
        bench = FormatBench(Qcow2Driver)
        with pytest.raises(InvalidParameter):
            await bench.create(**{"size": MiB, **options})
        assert not hasattr(bench, "storage")

    run(main)


def test_caches_stay_within_their_limits() -> None:
    """A disk whose tables are far larger than the caches: memory is bounded, also when every write allocates."""

    async def main() -> None:
        bench = await made(cluster_size=512, size=32 * MiB)
        disk = await bench.open(l2_cache_size=4096, refcount_cache_size=4096, l2_cache_entry_size=512)
        random = Random(1)
        for _ in range(3000):
            await disk.write(random.randrange(32 * MiB // 512) * 512, b"x" * 512)
        driver = bench.node.driver
        assert isinstance(driver, Qcow2Driver)
        assert driver.cached_bytes() <= 4 * 4096
        await bench.close()
        assert ((await bench.check()).leaks, (await bench.check()).corruptions) == (0, 0)

    run(main)


def test_a_dirty_repair_is_refused_where_entries_are_damaged() -> None:
    """Refcounts cannot be trusted then, so the disk opens read-only only."""

    async def main() -> None:
        bench = await made()
        _, l2 = await tables(bench)
        image = bytearray(with_entry(bench.content, l2, 1 << 57))
        image[79] |= 1
        with pytest.raises(CorruptImage):
            await bench.open(content=bytes(image))
        await bench.open(content=bytes(image), flags={"read_only": True})

    run(main)
