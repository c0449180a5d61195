"""4 KiB reads and writes all over a qcow2 image, 64 requests in flight: qemu-img bench beside qblock's library.

Both go through the image with the same long stride, which touches another cluster each time. The time of ours is that of the
requests alone, as is the one that qemu-img bench prints.

    python benchmarks/random_io.py [--size MIB] [--count N] [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from harness import Comparison, MiB, Run, best_of, fill, need_qemu, workspace

DEPTH = 64
BLOCK = 4096
STRIDE = 4096 * 4099


def theirs(image: Path, count: int, *, write: bool) -> Run:
    """qemu-img bench."""
    words = ["qemu-img", "bench", "-f", "qcow2", "-t", "writeback", "-c", str(count), "-d", str(DEPTH), "-s", str(BLOCK)]
    output = subprocess.check_output([*words, "-S", str(STRIDE), *(["-w"] if write else []), str(image)], text=True)
    found = re.search(r"completed in ([0-9.]+) seconds", output)
    assert found is not None, output
    return Run(float(found[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)


def ours(image: Path, count: int, *, write: bool) -> Run:
    """This script in a process of its own, so that its memory can be measured."""
    words = [sys.executable, __file__, "--inner", str(image), "--count", str(count), *(["--write"] if write else [])]
    seconds, memory = subprocess.check_output(words, text=True).split()
    return Run(float(seconds), int(memory))


async def inner(image: str, count: int, *, write: bool) -> None:
    """64 workers on one backend."""
    from qblock.backend import BlockBackend
    from qblock.permissions import Perm
    from qblock.system import BlockSystem

    async with BlockSystem.create() as system:
        node = await system.opener.open_image(image, fmt="qcow2", read_only=False)
        backend = BlockBackend(system.graph, perm=Perm.CONSISTENT_READ | Perm.WRITE, shared=Perm.ALL)
        backend.insert(node)
        offsets = iter([number * STRIDE % (backend.length - BLOCK) // BLOCK * BLOCK for number in range(count)])

        async def work() -> None:
            buffer = memoryview(bytearray(b"\x55" * BLOCK))
            transfer = backend.write_from if write else backend.read_into
            for offset in offsets:
                await transfer(offset, buffer)

        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(DEPTH):
                tasks.create_task(work())
        seconds = time.perf_counter() - started
        backend.close()
    status = Path("/proc/self/status").read_text()
    print(seconds, int(status.split("VmHWM:")[1].split()[0]) * 1024)


def main() -> None:
    """Make the image, run both in turns, print two lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of the image (default 1024)")
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        asyncio.run(inner(options.inner, options.count, write=options.write))
        return
    need_qemu("qemu-img")
    with workspace() as folder:
        fill(folder / "raw", options.size * MiB, share=1)
        image = folder / "image"
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "raw", image], check=True)
        for write in (False, True):
            real, mine = best_of(
                lambda write=write: theirs(image, options.count, write=write),
                lambda write=write: ours(image, options.count, write=write),
                rounds=options.rounds,
            )
            title = f"4 KiB {'writes' if write else 'reads'}, {DEPTH} in flight"
            Comparison(title, real, mine, options.count, "op/s").show()


if __name__ == "__main__":
    main()
