"""The filters that change how a format stores: packed clusters, and files that grow in large steps."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any, ClassVar

import pytest

import qblock
from qblock.backend import BlockBackend
from qblock.drivers.memory import MemoryDriver
from qblock.errors import BlockIOError, CommandError, InvalidParameter
from qblock.extents import Compressed
from qblock.node import BlockDriverState
from qblock.opening import Opener, OpenPolicy
from qblock.permissions import Perm
from qblock.registry import DriverRegistry
from qblock.requests import block_status
from qblock.testing.nodes import NodeBench
from qblock.testing.schedules import Seeded
from qblock.testing.simloop import run
from qblock.units import KiB, MiB


class Place:
    """A bench with an opener."""

    def __init__(self) -> None:
        self.bench = NodeBench()
        self.opener = Opener(self.bench.graph, DriverRegistry(), self.bench.env, OpenPolicy.deny())

    async def open(self, **options: Any) -> BlockDriverState:
        return await self.opener.open_blockdev({key.replace("_", "-"): value for key, value in options.items()})

    async def close(self) -> None:
        for backend in list(self.bench.graph.backends):
            backend.close()
        await self.opener.close_orphans()
        assert not self.bench.graph.nodes and not self.bench.warnings


def qcow2(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "node-name": "image", "file": {"driver": "file", "filename": str(path)}}


# ------------------------------------------------------------------------------------------------------------- compress


def test_what_is_written_through_compress_is_stored_packed(tmp_path: Path) -> None:
    """Also a part of a cluster, and the last cluster, which ends in the middle."""
    qblock.create(tmp_path / "i.qcow2", 200 * KiB)

    async def main() -> None:
        place = Place()
        backend = place.bench.backend(await place.open(node_name="c", driver="compress", file=qcow2(tmp_path / "i.qcow2")))
        await backend.write(70 * KiB, b"part")
        await backend.write(192 * KiB, b"end " * 2048)
        image = place.bench.graph.nodes["image"]
        for offset in (64 * KiB, 192 * KiB):
            assert isinstance(await block_status(image, offset, 1), Compressed)
        assert await backend.read(70 * KiB - 1, 6) == b"\0part\0"
        await backend.write_zeroes(0, 64 * KiB)
        with pytest.raises(BlockIOError) as refused:
            await backend.write(70 * KiB, b"more")
        assert refused.value.errno == errno.EIO, "a cluster is stored there already"
        await place.close()

    run(main)


def test_compress_needs_a_child_that_can() -> None:
    """A raw file has no packed clusters; nor does a second compress take compressed writes."""

    async def main() -> None:
        place = Place()
        with pytest.raises(CommandError, match="memory"):
            await place.open(node_name="c", driver="compress", file={"driver": "memory"})
        assert not place.bench.graph.nodes

    run(main)


def test_filters_pass_compressed_writes_on(tmp_path: Path) -> None:
    """Throttling and copying on reads do not unpack anything."""
    qblock.create(tmp_path / "i.qcow2", MiB)

    async def main() -> None:
        place = Place()
        place.bench.env.throttle_groups.create("g")
        below = {"driver": "throttle", "throttle-group": "g", "file": qcow2(tmp_path / "i.qcow2")}
        backend = place.bench.backend(await place.open(node_name="c", driver="copy-on-read", file=below))
        await backend.write_compressed(0, memoryview(b"x" * 64 * KiB))
        assert isinstance(await block_status(place.bench.graph.nodes["image"], 0, 1), Compressed)
        await place.close()

    run(main)


# ---------------------------------------------------------------------------------------------------------- preallocate

STEP = {"prealloc-align": 64 * KiB, "prealloc-size": MiB}


def growing(path: Path, **more: Any) -> dict[str, Any]:
    return {"driver": "preallocate", "node-name": "grow", **STEP, **more,
            "file": {"driver": "file", "filename": str(path), "node-name": "file"}}  # fmt: skip


def test_a_format_above_gets_room_in_large_steps_and_the_surplus_is_cut_at_the_end(tmp_path: Path) -> None:
    """The image is no longer than without the filter when it is closed, and whole."""
    path = tmp_path / "i.qcow2"
    qblock.create(path, 64 * MiB)

    async def main() -> None:
        place = Place()
        backend = place.bench.backend(await place.open(node_name="q", driver="qcow2", file=growing(path)))
        sizes = set()
        for number in range(40):
            await backend.write(number * 64 * KiB, bytes([number + 1]) * 64 * KiB)
            sizes.add(path.stat().st_size)
            assert place.bench.graph.nodes["grow"].length <= (number + 7) * 64 * KiB
        assert len(sizes) == 3 and all(size % (64 * KiB) == 0 for size in sizes)
        await place.close()
        assert path.stat().st_size == 45 * 64 * KiB

    run(main)
    with qblock.open(path) as image:
        assert image.read(39 * 64 * KiB, 64 * KiB) == bytes([40]) * 64 * KiB
    assert path.stat().st_size == 45 * 64 * KiB


def test_without_the_permission_to_resize_nothing_is_preallocated(tmp_path: Path) -> None:
    """A guest on a raw disk never writes behind the end."""

    async def main() -> None:
        path = tmp_path / "r.raw"
        path.write_bytes(b"x" * MiB)
        place = Place()
        node = await place.open(node_name="r", driver="raw", file=growing(path))
        place.bench.backend(node, perm=Perm.CONSISTENT_READ | Perm.WRITE)
        backend = next(iter(place.bench.graph.backends))
        await backend.write(0, b"y" * MiB)
        assert path.stat().st_size == MiB
        await place.close()

    run(main)


def test_growing_on_purpose_uses_the_surplus_only_for_falloc(tmp_path: Path) -> None:
    """An area that was asked for as a hole must not be allocated because the filter was there first."""

    async def main() -> None:
        path = tmp_path / "r.raw"
        path.write_bytes(b"x" * MiB)
        place = Place()
        node = await place.open(**growing(path))
        backend = place.bench.backend(node)
        await write_behind(backend, MiB)
        assert path.stat().st_size == 2 * MiB + 64 * KiB
        await backend.truncate(MiB + 128 * KiB, preallocation="falloc")
        assert (node.length, path.stat().st_size) == (MiB + 128 * KiB, 2 * MiB + 64 * KiB)
        await backend.truncate(MiB + 192 * KiB)
        assert node.length == path.stat().st_size == MiB + 192 * KiB
        await write_behind(backend, MiB + 192 * KiB)
        await backend.truncate(512 * KiB)
        assert node.length == path.stat().st_size == 512 * KiB
        await place.close()

    run(main)


async def write_behind(backend: BlockBackend, offset: int, length: int = 4 * KiB) -> None:
    """A write that lets the node grow, as formats write to their files."""
    assert backend.root is not None
    await qblock.requests.write_from(backend.root, offset, memoryview(b"z" * length))


def test_writers_that_grow_the_file_together_do_not_zero_each_other(tmp_path: Path) -> None:
    """Room is made once, and only where nobody writes."""

    async def main() -> None:
        place = Place()
        node = await place.open(node_name="grow", driver="preallocate", prealloc_align=4096, prealloc_size=8192,
                                file={"driver": "memory", "size": 4096})  # fmt: skip
        backend = place.bench.backend(node)
        async with asyncio.TaskGroup() as tasks:
            for number in range(30):
                tasks.create_task(write_behind(backend, 4096 * (number * 7 % 30), 4096))
        assert await backend.read(0, 30 * 4096) == b"z" * 30 * 4096
        assert node.length == 30 * 4096 < place.bench.graph.nodes["grow"].children["file"].node.length
        await place.close()

    for seed in range(5):
        run(main, Seeded(seed))


class CannotZero(MemoryDriver):
    """Storage that has no cheap zeroes."""

    name: ClassVar[str] = "plain"
    supports_write_zeroes: ClassVar[bool] = False


def test_storage_without_cheap_zeroes_grows_by_the_writes_themselves() -> None:
    """Preallocating must not cost a second write of everything."""

    async def main() -> None:
        place = Place()
        place.opener.registry.register(CannotZero)
        node = await place.open(node_name="grow", driver="preallocate", file={"driver": "plain", "size": 4096})
        backend = place.bench.backend(node)
        async with asyncio.TaskGroup() as tasks:
            for number in range(10):
                tasks.create_task(write_behind(backend, 4096 * number, 4096))
        assert node.length == node.children["file"].node.length == 40960
        assert await backend.read(0, 40960) == b"z" * 40960
        await place.close()

    run(main)


def test_the_surplus_goes_when_the_last_writer_goes_and_when_the_node_becomes_read_only(tmp_path: Path) -> None:
    """Others may look at the file then."""

    async def main() -> None:
        path = tmp_path / "r.raw"
        path.write_bytes(b"x" * MiB)
        place = Place()
        below = await place.open(driver="file", filename=str(path), node_name="file")
        below.monitor_owned = True
        given = {**STEP, "driver": "preallocate", "node-name": "grow", "file": "file"}
        node = await place.opener.open_blockdev(given)
        node.monitor_owned = True
        backend = place.bench.backend(node)
        await write_behind(backend, MiB)
        backend.close()
        await place.opener.close_orphans()
        assert path.stat().st_size == MiB + 4 * KiB and not below.perm
        backend = place.bench.backend(node)
        await write_behind(backend, MiB + 4 * KiB)
        assert path.stat().st_size > 2 * MiB
        backend.set_permissions(Perm.CONSISTENT_READ, Perm.ALL)
        await place.opener.reopen_described([{**given, "prealloc-size": 0, "read-only": True}])
        assert path.stat().st_size == MiB + 8 * KiB and node.read_only
        node.monitor_owned = below.monitor_owned = False
        await place.close()

    run(main)


def test_another_file_below_gets_no_surplus_of_the_old_one() -> None:
    """The old file is left as long as its data, and the new one is looked at anew."""

    async def main() -> None:
        place = Place()
        disks = []
        for name, size in (("old", 4096), ("new", 65536)):
            disks.append(await place.open(driver="memory", size=size, node_name=name))
            disks[-1].monitor_owned = True
        given = {**STEP, "driver": "preallocate", "node-name": "grow"}
        node = await place.opener.open_blockdev({**given, "file": "old"})
        node.monitor_owned = True
        backend = place.bench.backend(node)
        await write_behind(backend, 4096)
        assert disks[0].length > MiB
        await place.opener.reopen_described([{**given, "file": "new"}])
        assert (disks[0].length, node.length, disks[1].length) == (8192, 65536, 65536)
        await write_behind(backend, 65536)
        assert node.length == 69632 and disks[1].length > MiB
        for one in (node, *disks):
            one.monitor_owned = False
        await place.close()

    run(main)


@pytest.mark.parametrize(
    "options", [{"prealloc_align": 100}, {"prealloc_align": 0}, {"prealloc_align": -512}, {"prealloc_size": -1}]
)
def test_sizes_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    """QEMU takes an alignment of 0, and divides by it later."""

    async def main() -> None:
        place = Place()
        with pytest.raises(InvalidParameter):
            await place.open(node_name="grow", driver="preallocate", file={"driver": "memory"}, **options)
        assert not place.bench.graph.nodes

    run(main)
