"""Runs through many L2 tables: told as by a loop over their entries, wherever they break and however their tables lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qblock.drivers.qcow2.layout import COPIED
from qblock.drivers.qcow2.straight import _run
from qblock.tools.img import main

BITS = 9
PER_TABLE = 1 << BITS - 3
TABLES = 24
CLUSTERS = TABLES * PER_TABLE


@given(st.integers(0, 1 << 40), st.integers(9, 21), st.integers(0, 3000))
def test_a_run_is_what_the_file_holds(cluster: int, bits: int, count: int) -> None:
    """Byte for byte, across the places where the lower halves of the words are full."""
    first = (cluster << bits) % (1 << 55) | COPIED
    entries = [first + (at << bits) for at in range(count)]
    assert _run(first, 1 << bits, count) == struct.pack(f">{count}Q", *entries)


def image(path: Path, breaks: set[int], tables: list[int]) -> list[tuple[int, int]]:
    """An image whose data lie in order but for a gap before each of ``breaks``; its L2 tables lie in the order ``tables``.

    Returns the runs: first guest cluster, first host cluster.
    """
    start = 8 + TABLES
    hosts = [start + guest + sum(at <= guest for at in breaks) for guest in range(CLUSTERS)]
    header = struct.pack(
        ">IIQIIQIIQQIIQQQQII", 0x514649FB, 3, 0, 0, BITS, CLUSTERS << BITS, 0, TABLES, 1 << BITS, 0x600, 1, 0, 0, 0, 0, 0, 4, 104
    )
    words = [0] * PER_TABLE
    words[:TABLES] = [(8 + at) << BITS | COPIED for at in tables]
    content = bytearray(start << BITS)
    content[: len(header)] = header
    content[1 << BITS : 2 << BITS] = struct.pack(f">{PER_TABLE}Q", *words)
    for index, place in enumerate(tables):
        entries = [host << BITS | COPIED for host in hosts[index * PER_TABLE :][:PER_TABLE]]
        content[(8 + place) << BITS : (9 + place) << BITS] = struct.pack(f">{PER_TABLE}Q", *entries)
    with path.open("wb") as file:
        file.write(content)
        file.truncate((hosts[-1] + 1) << BITS)
    return [(guest, hosts[guest]) for guest in range(CLUSTERS) if not guest or hosts[guest] != hosts[guest - 1] + 1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(1, CLUSTERS - 1), max_size=4), st.permutations(range(TABLES)), st.booleans())
def test_the_map_has_every_break(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], breaks: set[int], order: list[int], mixed: bool
) -> None:
    """Breaks inside tables and between them, tables side by side or not."""
    path = tmp_path / "image.qcow2"
    runs = image(path, breaks, order if mixed else list(range(TABLES)))
    capsys.readouterr()
    assert main(["map", "--output=json", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["start"] >> BITS, one["offset"] >> BITS) for one in found] == runs
    assert sum(one["length"] for one in found) == CLUSTERS << BITS
