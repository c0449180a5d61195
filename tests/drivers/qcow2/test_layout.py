"""Entries and runs: the fast answers are those of a plain loop."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qblock.drivers.qcow2.layout import (
    COMPRESSED,
    COPIED,
    Geometry,
    Kind,
    classify,
    compressed_clusters,
    compressed_location,
    constant_run,
    decode_u64,
    encode_u64,
    find_run,
    ramp_run,
)
from qblock.drivers.qcow2.refcounts import RefcountCodec, find_free

V3 = Geometry(16, 4, 3, 13)
V2 = Geometry(16, 4, 2, 13)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90)), min_size=1, max_size=8), st.integers(0, 400))
def test_runs_are_those_of_a_loop(pieces: list[tuple[int, int]], start: int) -> None:
    """Runs of constants and of consecutive clusters, of any length and from any position."""
    entries = array("Q")
    host = 5 << 16
    for kind, count in pieces:
        for _ in range(count):
            host += 1 << 16
            entries.append((0, 1, host | COPIED, host | 1)[kind])
        host += 7 << 16
    start %= len(entries)
    limit = len(entries) - start
    run = find_run(entries, start, limit, V3)
    step = 1 << 16 if run.kind in (Kind.DATA, Kind.ZERO_ALLOCATED) else 0
    count = 1
    while count < limit and entries[start + count] == entries[start] + count * step:
        count += 1
    assert run == (classify(entries[start], V3), count, entries[start])


@pytest.mark.parametrize("count", [1, 2, 32, 33, 34, 161, 1000, 8192])
def test_a_run_ends_exactly_where_it_is_broken(count: int) -> None:
    """Galloping overshoots, and must come back to the entry."""
    ramp = array("Q", range(1 << 16, (1 << 16) + (count << 16), 1 << 16))
    assert ramp_run(ramp + array("Q", [3]), 0, count + 1, 1 << 16) == count
    assert constant_run(array("Q", [1]) * count + array("Q", [0]), 0, count + 1) == count


@pytest.mark.parametrize(
    ("entry", "geometry", "kind"),
    [
        (0, V3, Kind.UNALLOCATED),
        (1, V3, Kind.ZERO),
        (1, V2, Kind.CORRUPT),
        (1 << 16, V3, Kind.DATA),
        (1 << 16 | COPIED, V3, Kind.DATA),
        (1 << 16 | 1, V3, Kind.ZERO_ALLOCATED),
        (1 << 16 | 512, V3, Kind.CORRUPT),
        (1 << 16 | 2, V3, Kind.CORRUPT),
        (1 << 16 | 1 << 57, V3, Kind.CORRUPT),
        (COMPRESSED | 12345, V2, Kind.COMPRESSED),
    ],
)
def test_entries_mean_what_the_format_says(entry: int, geometry: Geometry, kind: Kind) -> None:
    """All forms of L2 entries, with those that are damage."""
    assert classify(entry, geometry) is kind


def test_compressed_descriptors_give_place_and_length() -> None:
    """The offset is in bytes, the length counts whole sectors from its own; clusters at both ends are users."""
    entry = COMPRESSED | 3 << 54 | (2 << 16) - 100
    assert compressed_location(entry, 16) == ((2 << 16) - 100, 4 * 512 - (((2 << 16) - 100) & 511))
    assert list(compressed_clusters(entry, 16)) == [1, 2]


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_tables_are_big_endian_on_disk(words: list[int]) -> None:
    """To and from bytes."""
    raw = b"".join(word.to_bytes(8, "big") for word in words)
    assert decode_u64(raw).tolist() == words
    assert bytes(encode_u64(array("Q", words))) == raw


@pytest.mark.parametrize("order", range(7))
def test_refcounts_of_every_width_keep_their_values(order: int) -> None:
    """Narrow ones are packed from the low bits of each byte, wide ones are big-endian."""
    codec, top = RefcountCodec(order), (1 << (1 << order)) - 1
    counts = array(codec.typecode, [top if i % 3 == 0 else i % (top + 1) for i in range(64)])
    raw = bytes(codec.encode(counts[:]))
    assert len(raw) == 64 * (1 << order) // 8
    assert codec.decode(raw) == counts
    if order == 0:
        assert raw[0] & 1 == counts[0] and raw[0] >> 7 == counts[7]
    if order == 4:
        assert raw[2:4] == counts[1].to_bytes(2, "big")


@given(st.sampled_from("BHIQ"), st.lists(st.sampled_from([0, 1, 2, 255, 256, 65280]), min_size=1), st.integers(0, 50))
def test_the_first_free_cluster_is_found(typecode: str, values: list[int], start: int) -> None:
    """Zero bytes inside of two counts are no free cluster."""
    counts = array(typecode, [value if typecode != "B" else value & 255 for value in values])
    expected = next((i for i in range(start, len(counts)) if not counts[i]), -1)
    assert find_free(counts, start) == expected
