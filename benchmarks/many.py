"""Many nodes and many jobs in one daemon, the real one beside qblock's: does the time grow with their number, or faster?

    python benchmarks/many.py [--counts 50,125,250,500,1000] [--real-at-most N] [--rounds N] [--only TEXT] [--json FILE]

Each line is one kind of work, with its milliseconds at each number of nodes (of jobs there are a fifth as many): the real
daemon's, ours, and the ratio. What grows linearly doubles when the number does. The real daemon is left out at large numbers:
what it does in a chain takes time by the cube of the length.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from daemons import OURS, REAL, Daemon, daemon
from harness import need_qemu, qemu, workspace

QUERIES = 10
"""Commands that are repeated so often, and told by one."""
DEEP_AT_MOST = 50
"""Layers up to which the query that is not flat is asked: each of its entries has all images below, and these have long names."""
Timings = dict[str, float]


def side_by_side(running: Daemon, count: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Nodes that have nothing to do with each other, and mirrors between them."""

    def add() -> None:
        for number in range(count):
            running.call("blockdev-add", {"driver": "null-co", "node-name": f"n{number}", "size": 1 << 20})

    def flat() -> None:
        for _ in range(QUERIES):
            running.call("query-named-block-nodes", {"flat": True})

    def delete() -> None:
        for number in range(count):
            running.call("blockdev-del", {"node-name": f"n{number}"})

    jobs = range(count // 5)

    def mirrors() -> None:
        for number in jobs:
            source, target = f"n{2 * number}", f"n{2 * number + 1}"
            members = {"job-id": f"j{number}", "device": source, "target": target, "sync": "full"}
            running.send("blockdev-mirror", members)
        wait_for_all(running, "BLOCK_JOB_READY", len(jobs))

    def query_jobs() -> None:
        for _ in range(QUERIES):
            running.call("query-block-jobs")

    def cancel() -> None:
        for number in jobs:
            running.send("block-job-cancel", {"device": f"j{number}"})
        wait_for_all(running, "BLOCK_JOB_COMPLETED", len(jobs))

    yield "side by side: add", add
    yield f"side by side: query, flat ({QUERIES} times)", flat
    yield "mirrors at once, a fifth as many: to READY", mirrors
    yield f"mirrors at once: query ({QUERIES} times)", query_jobs
    yield "mirrors at once: end all", cancel
    yield "side by side: delete", delete


def chained(running: Daemon, count: int, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Snapshots one over the other."""

    def add(name: str, image: Path, **members: object) -> None:
        file = {"driver": "file", "node-name": f"{name}-file", "filename": str(image)}
        running.call("blockdev-add", {"driver": "qcow2", "node-name": name, "file": file, **members})

    def snapshots() -> None:
        add("c0", folder / "0")
        for number in range(1, count):
            add(f"c{number}", folder / str(number), backing=None)
            running.call("blockdev-snapshot", {"node": f"c{number - 1}", "overlay": f"c{number}"})

    def query(*, flat: bool) -> None:
        running.call("query-named-block-nodes", {"flat": flat})

    def reopen() -> None:
        top = f"c{count - 1}"
        options = {"driver": "qcow2", "node-name": top, "file": f"{top}-file", "backing": f"c{count - 2}"}
        for read_only in (True, False) * (QUERIES // 2):
            running.call("blockdev-reopen", {"options": [{**options, "read-only": read_only}]})

    def commit() -> None:
        words = {"job-id": "j", "device": f"c{count - 1}", "top-node": f"c{count // 2}", "base-node": "c0"}
        running.measure("block-commit", words, until="BLOCK_JOB_COMPLETED")

    yield "chain: add, and take a snapshot into it", snapshots
    yield "chain: query, flat", lambda: query(flat=True)
    if count <= DEEP_AT_MOST:
        yield "chain: query, not flat", lambda: query(flat=False)
    yield f"chain: reopen the top read-only and back ({QUERIES} times)", reopen
    yield "chain: commit the lower half", commit


def wait_for_all(running: Daemon, event: str, count: int) -> None:
    """Wait for an event of each of so many jobs."""
    for _ in range(count):
        running.wait_for(event)


def measure(program: str, folder: Path, count: int, only: str) -> Timings:
    """Milliseconds of each kind of work with ``count`` nodes."""
    timings: Timings = {}
    works = (side_by_side, lambda running, count: chained(running, count, folder))
    for work in works:
        with daemon(program, folder) as running:
            for title, step in work(running, count):
                started = time.perf_counter()
                step()
                if only in title:
                    timings[title] = (time.perf_counter() - started) * 1000
    return timings


def make_images(folder: Path, count: int) -> None:
    """Empty images, so that all that is measured is the work on the graph."""
    qemu("create", "-q", "-f", "qcow2", folder / "0", "1M")
    for number in range(1, count):
        shutil.copyfile(folder / "0", folder / str(number))


def shown(best: list[float]) -> str:
    """The cell of the table: both and the ratio, or ours alone."""
    return " / ".join(f"{one:.0f}" for one in best) + (f" ({best[0] / best[1]:.2f})" if len(best) == 2 else "")


def main() -> None:
    """Both daemons at each number; a line for each kind of work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="50,125,250,500,1000", help="numbers of nodes (default 50,125,250,500,1000)")
    parser.add_argument("--real-at-most", type=int, default=250, help="largest number for the real daemon (default 250)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each program (default 2)")
    parser.add_argument("--only", default="", help="tell only the lines with this text")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    options = parser.parse_args()
    need_qemu("qemu-img", "qemu-storage-daemon")
    counts = [int(word) for word in options.counts.split(",")]
    table: dict[str, dict[int, list[float]]] = {}
    with workspace() as folder:
        make_images(folder, max(counts))
        for count in counts:
            programs = (REAL, OURS) if count <= options.real_at_most else (OURS,)
            rounds = [[measure(program, folder, count, options.only) for program in programs] for _ in range(options.rounds)]
            for title in rounds[0][0]:
                best = [min(run[side][title] for run in rounds) for side in range(len(programs))]
                table.setdefault(title, {})[count] = best
    print(f"{'milliseconds: QEMU / qblock (ratio)':<58}" + "".join(f"{count:>22}" for count in counts))
    for title, columns in table.items():
        print(f"{title:<58}" + "".join(f"{shown(columns.get(count, [])):>22}" for count in counts))
    if options.json is not None:
        options.json.write_text(json.dumps({"milliseconds": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
