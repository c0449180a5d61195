"""The dirty bitmap of a device as proposed in 2012: one bit for each MiB, and a search that starts behind a chunk and wraps."""

from __future__ import annotations

from typing import ClassVar

from hypothesis import given
from hypothesis import strategies as st

from qblock.device_dirty import CHUNK, DeviceDirty
from qblock.testing.jobbench import JobBench, ShakyMemory
from qblock.testing.simloop import run
from qblock.units import MiB

SIZE = 8 * MiB + 512


def test_a_chunk_is_a_mebibyte_and_dirty_as_a_whole() -> None:
    """A single sector makes its whole chunk dirty; a range across a boundary makes two so."""
    dirty = DeviceDirty(SIZE)
    dirty.set(3 * MiB - 512, 1024)
    assert [dirty.get(chunk * CHUNK) for chunk in range(9)] == [False, False, True, True] + 5 * [False]
    assert dirty.get(2 * MiB + 5)
    assert dirty.count == 2 * MiB


def test_reset_cleans_every_chunk_that_it_touches() -> None:
    """As set does, so that a set is undone by a reset of the same range."""
    dirty = DeviceDirty(SIZE)
    dirty.set(0, SIZE)
    dirty.reset(MiB + 512, MiB)
    assert dirty.count == SIZE - 2 * MiB
    dirty.reset(0, 0)
    assert dirty.get(0)
    dirty.reset(8 * MiB, 1)
    assert dirty.count == 6 * MiB


def test_the_last_chunk_counts_to_the_end_of_the_disk() -> None:
    """Or the progress of a copy would be negative."""
    dirty = DeviceDirty(SIZE)
    dirty.set(SIZE - 1, 1)
    assert dirty.count == 512


def test_the_search_begins_behind_the_given_chunk_and_wraps() -> None:
    """So a copier that asks for what follows its last chunk walks over the disk, and comes to that very chunk last."""
    dirty = DeviceDirty(SIZE)
    for chunk in (1, 4, 8):
        dirty.set(chunk * MiB, 1)
    assert dirty.get_next(-1) == MiB
    assert dirty.get_next(MiB) == dirty.get_next(2 * MiB - 1) == 4 * MiB
    assert dirty.get_next(4 * MiB) == 8 * MiB
    assert dirty.get_next(SIZE - 1) == MiB
    dirty.reset(0, 8 * MiB)
    assert dirty.get_next(8 * MiB) == 8 * MiB
    dirty.reset(8 * MiB, 512)
    assert dirty.get_next(0) is None


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, SIZE - 1), st.integers(0, 3 * MiB)), max_size=12),
    st.integers(-1, 8),
)
def test_it_agrees_with_a_set_of_chunk_numbers(changes: list[tuple[bool, int, int]], after: int) -> None:
    """Whatever is set and reset, in whatever order."""
    dirty, model = DeviceDirty(SIZE), set[int]()
    for is_set, offset, length in changes:
        touched = set(range(offset // CHUNK, -(-min(offset + length, SIZE) // CHUNK))) if length else set()
        model = model | touched if is_set else model - touched
        (dirty.set if is_set else dirty.reset)(offset, length)
    assert {chunk for chunk in range(9) if dirty.get(chunk * CHUNK)} == model
    assert dirty.count == sum(min(CHUNK, SIZE - chunk * CHUNK) for chunk in model)
    expected = min(model, key=lambda chunk: (chunk <= after, chunk), default=None)
    assert dirty.get_next(after * CHUNK) == (None if expected is None else expected * CHUNK)


class Looking(ShakyMemory):
    """Memory that looks at a bitmap of its node before and after each write."""

    name: ClassVar[str] = "looking-memory"

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `MemoryDriver`."""
        self.seen = [self._look()]
        await super().write_from(offset, buffer)
        self.seen.append(self._look())

    def _look(self) -> tuple[bytes, bool]:
        return self.content()[:1], self.node.dirty_bitmaps[0].get(0)


def test_the_write_path_sets_bits_after_the_write_has_completed() -> None:
    """A bit that is set before the data are there could be cleared by a copier that then reads the old data."""

    async def main() -> None:
        bench = JobBench()
        bench.system.registry.register(Looking)
        node = await bench.system.opener.open_blockdev({"driver": Looking.name, "node-name": "n", "size": SIZE})
        dirty = DeviceDirty(SIZE)
        node.dirty_bitmaps.append(dirty.bitmap)
        await bench.disk(node, "d").write(0, b"x" * 4096)
        assert isinstance(node.driver, Looking)
        assert node.driver.seen == [(b"\0", False), (b"x", False)]
        assert dirty.get(0)
        await bench.close()

    run(main)
