"""What a trace event costs: a call site that is off, one that is on, and a guest's small writes with and without a listener.

    python benchmarks/trace_cost.py [--rounds N]

The first three numbers are for the pattern that call sites use, less the time of an empty loop.
"""

from __future__ import annotations

import argparse
import asyncio
import timeit
from collections.abc import Mapping

from qblock.tracing import Trace

LOOPS = 1_000_000
WRITES = 5_000
SITE = "if (hit := trace.mirror_one_iteration) is not None:\n    hit(job='j', offset=0, length=65536)"


def main() -> None:
    """Print nanoseconds for each call site, and microseconds for each write through a blkmirror on memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    trace = Trace()
    empty = best("pass", trace, rounds)
    off = best(SITE, trace, rounds) - empty
    undo = trace.listen("mirror_*", lambda name, members: None)
    heard = best(SITE, trace, rounds) - empty
    undo()
    texts: list[str] = [""]

    def log(name: str, members: Mapping[str, object]) -> None:
        texts[0] = trace.line(name, members)

    trace.log = log
    trace.switch("mirror_*", on=True)
    logged = best(SITE, trace, rounds) - empty
    print(f"a call site: {off:.0f} ns off, {heard:.0f} ns with a listener, {logged:.0f} ns with a line made of it")
    quiet = min(asyncio.run(guest_writes(listening=False)) for _ in range(rounds))
    listened = min(asyncio.run(guest_writes(listening=True)) for _ in range(rounds))
    print(f"a 4 KiB write through blkmirror: {quiet:.1f} us off, {listened:.1f} us with a listener")


def best(statement: str, trace: Trace, rounds: int) -> float:
    """Nanoseconds for one execution."""
    return min(timeit.repeat(statement, globals={"trace": trace}, number=LOOPS, repeat=rounds)) / LOOPS * 1e9


async def guest_writes(*, listening: bool) -> float:
    """Microseconds for one write to a drive on memory with a blkmirror over it."""
    from qblock.system import BlockSystem

    async with BlockSystem.create() as system:
        if listening:
            system.env.trace.listen("blkmirror_*", lambda name, members: None)
        sides = {side: {"driver": "memory", "size": 1 << 20} for side in ("file", "target")}
        backend = await system.drive_add({"if": "virtio", "id": "d", "driver": "blkmirror", **sides})
        buffer = memoryview(bytes(4096))
        began = timeit.default_timer()
        for _ in range(WRITES):
            await backend.write_from(0, buffer)
        return (timeit.default_timer() - began) / WRITES * 1e6


if __name__ == "__main__":
    main()
