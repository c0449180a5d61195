"""Quorum on the real programs and on qblock: options, graphs, names, votes, errors, events, children that come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmp_pair import DAEMONS, both, do, io, wait
from test_filters_vs_qemu import LOOK, NULL, add, file, machine

pytestmark = pytest.mark.qemu

FILES = [["truncate", "-s", "1M", "a", "b", "c"], ["truncate", "-s", "2M", "d"]]


def raw(name: str, **members: Any) -> dict[str, Any]:
    return {"driver": "raw", "file": file(name), **members}


def quorum(*children: Any, vote_threshold: int = 2, **members: Any) -> dict[str, Any]:
    """blockdev-add of ``q``."""
    return add("quorum", "q", children=list(children), vote_threshold=vote_threshold, **members)


GONE = do("blockdev-del", node_name="q")
OPTIONS = [
    quorum(file("a"), file("b"), file("c")), *LOOK, do("query-blockstats", query_nodes=True), GONE,
    quorum(raw("a"), raw("b"), raw("c"), rewrite_corrupted=True, read_pattern="fifo"), *LOOK, GONE,
    quorum(raw("a"), raw("b"), blkverify=True, read_pattern="quorum", rewrite_corrupted=False), *LOOK, GONE,
    quorum(raw("a"), raw("b"), read_pattern="fifo", read_only=True), *LOOK, GONE,
    quorum(raw("a"), raw("b"), vote_threshold=3), quorum(raw("a"), vote_threshold=0), quorum(raw("a"), vote_threshold=-1),
    quorum(vote_threshold=1), quorum(raw("a"), vote_threshold=1), GONE, quorum(raw("a"), raw("b"), raw("c"), blkverify=True),
    quorum(raw("a"), raw("b"), vote_threshold=1, blkverify=True),
    quorum(raw("a"), raw("b"), rewrite_corrupted=True, blkverify=True),
    quorum(raw("a"), raw("b"), rewrite_corrupted=True, read_pattern="fifo"), GONE, quorum(raw("a"), raw("d")),
    quorum(raw("a"), None), quorum("nope", "nope"), quorum({"driver": "null-co", "bogus": 1}),
    quorum(raw("a"), raw("b"), read_pattern="x"), add("quorum", "q", children=[NULL]), add("quorum", "q", vote_threshold=1),
    do("query-named-block-nodes", flat=True), add("null-co", "n1"), add("null-co", "n2"),
    quorum("n1", "n2", vote_threshold=1), add("quorum", "q2", children=["n1", "n2"], vote_threshold=1), *LOOK,
    do("blockdev-reopen", options=[{"driver": "quorum", "node-name": "q", "children": ["n1", "n2"], "vote-threshold": 1}]),
    do("block_resize", node_name="q", size=1 << 20),
]  # fmt: skip


def test_options_and_graphs(tmp_path: Path) -> None:
    """What can be asked for, what is refused, and whom the quorum lets change its children."""
    real, ours = both(DAEMONS, tmp_path, OPTIONS, FILES)
    assert real == ours


def content(letters: str) -> list[list[str]]:
    """Files ``a``, ``b``, … whose byte 5000 is one of ``letters`` each."""
    lines = [
        f"truncate -s 64k {name}; printf {letter} | dd of={name} bs=1 seek=5000 conv=notrunc status=none"
        for name, letter in zip("abcdefgh", letters, strict=False)
    ]
    return [["sh", "-c", "; ".join(lines)]]


def kids(letters: str) -> list[dict[str, Any]]:
    """Their nodes: ``ra``, ``rb``, …"""
    return [raw(name) | {"node-name": f"r{name}"} for name, _ in zip("abcdefgh", letters, strict=False)]


@pytest.mark.parametrize(
    ("letters", "threshold"),
    [("xyzzz", 3), ("xxyyzzz", 3), ("xxyy", 2), ("xyxy", 2), ("xxy", 3), ("yxx", 2), ("xzzzy", 2), ("xxx", 3)],
)
def test_votes(letters: str, threshold: int, tmp_path: Path) -> None:
    """Who wins, who is reported in which order, and that the losers are made alike."""
    script = [
        quorum(*kids(letters), vote_threshold=threshold, rewrite_corrupted=True), io("q", "read 4992 16"),
        *(io(f"r{name}", f"read -P {ord(letter)} 5000 1") for name in "abcdefg"[: len(letters)] for letter in "xyz"),
    ]  # fmt: skip
    real, ours = both(machine(), tmp_path, script, content(letters))
    assert real == ours


def failing(name: str, image: str, **errors: int) -> dict[str, Any]:
    """A blkdebug node that fails requests of these types with these errors; ``_`` stands for ``-``."""
    rules = [{"event": "none", "iotype": kind.replace("_", "-"), "errno": number} for kind, number in errors.items()]
    return {"driver": "blkdebug", "node-name": name, "image": raw(image), "inject-error": rules}


ONE_BAD = failing("x0", "a", write=28, write_zeroes=28, flush=5, discard=5, block_status=5)
ERRORS: dict[str, list[dict[str, Any]]] = {
    "read": [quorum(failing("x0", "a", read=28), raw("b"), raw("c")), io("q", "read 1000 10")],
    "read in vain": [quorum(failing("x0", "a", read=28), raw("b")), io("q", "read 4096 1024")],
    "errors of two kinds": [
        quorum(failing("x0", "a", read=28), failing("x1", "b", read=5), raw("c")), io("q", "read 4096 1024"),
    ],
    "write": [quorum(ONE_BAD, raw("b"), vote_threshold=1), io("q", "write 4096 1024"), io("q", "discard 0 64k")],
    "write in vain": [quorum(ONE_BAD, raw("b")), io("q", "write 4096 1024")],
    "zero in vain": [quorum(ONE_BAD, raw("b")), io("q", "write -z 4096 1024")],
    "flush": [quorum(ONE_BAD, failing("x1", "b", flush=28)), io("q", "flush")],
    "flush in vain": [
        quorum(failing("x0", "a", flush=5), failing("x1", "b", flush=28)), io("q", "write 0 512"), io("q", "flush"),
    ],
    "status": [quorum(ONE_BAD, raw("b")), io("q", "map")],
    "fifo": [
        quorum(failing("x0", "a", read=5), failing("x1", "b", read=28), raw("c"), read_pattern="fifo"),
        io("q", "read 4096 1024"),
    ],
    "fifo in vain": [
        quorum(failing("x0", "a", read=28), failing("x1", "b", read=5), read_pattern="fifo"), io("q", "read 4096 1024"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_and_events(name: str, tmp_path: Path) -> None:
    """Which events tell of which failures."""
    real, ours = both(machine(), tmp_path, [*ERRORS[name], do("query-name")], FILES)
    assert real == ours


def mending(*more: Any, device: str = "q", replaces: str = "x0", **members: Any) -> list[dict[str, Any]]:
    """A copy of the quorum takes the place of one of its children; ``more`` is told before it does."""
    return [
        do("blockdev-mirror", job_id="j", device=device, target="x3", sync="full", replaces=replaces, **members),
        *more, wait("BLOCK_JOB_READY"), do("job-complete", id="j"), wait("BLOCK_JOB_COMPLETED"), *LOOK,
    ]  # fmt: skip


NODES = [add("file", f"x{number}", filename=name) for number, name in enumerate("abce")]
VOTERS = [*NODES, quorum("x0", "x1", "x2")]
ONE_MORE = add("quorum", "q2", children=["x0"], vote_threshold=1)
FAILING = [do("blockdev-mirror", job_id="j", device="q", target="x3", sync="full", replaces="x0")]
REPLACES: dict[str, list[dict[str, Any]]] = {
    "a child": [*VOTERS, *mending()],
    "a child, while it is written to": [*VOTERS, *mending(copy_mode="write-blocking")],
    "a child that others use": [*VOTERS, ONE_MORE, *FAILING],
    "a child that others read": [*VOTERS, add("raw", "r", file="x0", read_only=True), *FAILING],
    "a child that others have come to use": [*VOTERS, *mending(ONE_MORE)],
    "a grandchild": [*NODES, ONE_MORE, quorum("q2", "x1", "x2"), *FAILING],
    "a child below a filter": [*VOTERS, add("compress", "over", file="q"), *FAILING],
    "a child, seen through a filter": [*VOTERS, add("copy-on-read", "over", file="q"), *mending(device="over")],
}  # fmt: skip


@pytest.mark.parametrize("name", REPLACES)
def test_a_copy_of_a_quorum_takes_the_place_of_a_bad_child(name: str, tmp_path: Path) -> None:
    """This is how a child is mended; but nobody who uses it besides the quorum may be shown other data."""
    real, ours = both(DAEMONS, tmp_path, REPLACES[name], [*FILES, ["truncate", "-s", "1M", "e"]])
    assert real == ours
