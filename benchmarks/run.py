"""qblock beside the real QEMU programs: the same work on the same files in one run, as times and ratios.

    python benchmarks/run.py [mirror] [convert] [random] [startup] [--size 1G] [--rounds 3] [--dir DIR]

Each figure is the best of ROUNDS rounds, in which the programs take turns; ``ratio`` is the real program's time divided by
qblock's, so above 1 qblock is ahead. Files are in the page cache, as after a guest's use of them. ``peak`` is the largest
resident memory of the qblock process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qblock.backend import BlockBackend
from qblock.opening import OpenPolicy
from qblock.permissions import Perm
from qblock.system import BlockSystem

MiB = 1 << 20
STEP = 69632  # qemu-img bench's stride here: visits all clusters in an order that no read-ahead helps
REQUESTS = 200_000


def run(*command: str | Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of one command; it must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def qblock(program: str, *arguments: str | Path) -> list[str | Path]:
    """The command line of one of our programs, from the environment that runs this script."""
    return [Path(sys.executable).with_name(program), *arguments]


def make_chain(directory: Path, size: int) -> list[Path]:
    """Three qcow2 layers: a base with data in three quarters of it, and two overlays that changed every eighth MiB."""
    layers = [directory / f"layer{number}.qcow2" for number in range(3)]
    backing: list[str | Path] = []
    for number, layer in enumerate(layers):
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, layer, str(size))
        if number == 0:
            commands = [f"write -q -P 1 {start} {192 * MiB}" for start in range(0, size - 255 * MiB, 256 * MiB)]
        else:
            commands = [f"write -q -P {number + 1} {start} 512k" for start in range(number * MiB, size, 8 * MiB)]
        run("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), layer)
        backing = ["-b", layer, "-F", "qcow2"]
    return layers


# -------------------------------------------------------------------------------------------------------------- mirror


class Daemon:
    """A storage daemon with one QMP client."""

    def __init__(self, program: list[str | Path], directory: Path) -> None:
        self.path = directory / "qmp.sock"
        self.path.unlink(missing_ok=True)
        chardev = f"socket,id=qmp,path={self.path},server=on,wait=off"
        words = [*program, "--chardev", chardev, "--monitor", "chardev=qmp"]
        self.process = subprocess.Popen([str(word) for word in words])
        while not self.path.exists():
            time.sleep(0.01)
        self.socket = socket.socket(socket.AF_UNIX)
        while self.socket.connect_ex(str(self.path)):
            time.sleep(0.01)
        self.stream = self.socket.makefile("rb")
        self.stream.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        return self.wait(lambda message: "return" in message)

    def wait(self, wanted: Callable[[dict[str, Any]], bool]) -> Any:
        for line in self.stream:
            message = json.loads(line)
            if "error" in message:
                raise SystemExit(f"error reply: {message}")
            if wanted(message):
                return message
        raise SystemExit("the daemon is gone")

    def peak(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(match[1]) * 1024 if match else 0

    def close(self) -> None:
        self.execute("quit")
        self.stream.close()
        self.socket.close()
        self.process.wait()


def mirror(
    program: list[str | Path], directory: Path, top: Path, size: int, target_options: dict[str, Any]
) -> tuple[float, int]:
    """Seconds from blockdev-mirror to READY, and the daemon's peak memory."""
    target = directory / "mirror.qcow2"
    target.unlink(missing_ok=True)
    run("qemu-img", "create", "-q", "-f", "qcow2", target, str(size))
    os.sync()
    daemon = Daemon(program, directory)
    for name, path, more in (("top", top, {}), ("target", target, target_options)):
        file = {"driver": "file", "filename": str(path)}
        daemon.execute("blockdev-add", **{"driver": "qcow2", "node-name": name, "file": file, **more})
    start = time.perf_counter()
    daemon.execute("blockdev-mirror", **{"job-id": "m", "device": "top", "target": "target", "sync": "full"})
    daemon.wait(lambda message: message.get("event") == "BLOCK_JOB_READY")
    seconds, peak = time.perf_counter() - start, daemon.peak()
    daemon.execute("job-cancel", id="m")
    daemon.close()
    return seconds, peak


def mirror_rows(directory: Path, layers: list[Path], size: int) -> Iterator[tuple[str, Any, Any]]:
    for label, options in (("mirror, chain to qcow2", {"discard": "unmap"}), ("mirror, target zeroed by data", {})):
        yield (
            label,
            lambda options=options: mirror(["qemu-storage-daemon"], directory, layers[-1], size, options),
            lambda options=options: mirror(qblock("qblock-storage-daemon"), directory, layers[-1], size, options),
        )


# ------------------------------------------------------------------------------------------------------------- convert


def convert_rows(directory: Path, layers: list[Path], size: int) -> Iterator[tuple[str, Any, Any]]:
    for fmt in ("raw", "qcow2"):
        for label, source in (("one image", layers[0]), ("chain", layers[-1])):
            words = ("convert", "-f", "qcow2", "-O", fmt, source, directory / f"out.{fmt}")
            yield (
                f"convert {label} to {fmt}",
                fresh(directory, "qemu-img", *words),
                fresh(directory, *qblock("qblock-img", *words)),
            )


def fresh(directory: Path, *command: str | Path) -> Callable[[], tuple[float, int]]:
    def measure() -> tuple[float, int]:
        for left in directory.glob("out.*"):
            left.unlink()
        os.sync()
        return run(*command)

    return measure


# ------------------------------------------------------------------------------------------------------ small requests


async def random_requests(path: str, *, write: bool) -> float:
    """Seconds for `REQUESTS` requests of 4 KiB, 64 at a time, and a flush at the end when writing."""
    async with BlockSystem.create(policy=OpenPolicy.deny()) as system:
        node = await system.opener.open_image(path, fmt="qcow2", read_only=not write)
        perm = Perm.CONSISTENT_READ | (Perm.WRITE if write else Perm.NONE)
        backend = BlockBackend(system.graph, perm=perm, shared=Perm.ALL)
        backend.insert(node)
        request, limit = (backend.write_from if write else backend.read_into), backend.length - 4096
        offsets = iter([number * STEP % limit // 512 * 512 for number in range(REQUESTS)])

        async def worker() -> None:
            buffer = memoryview(bytearray(4096))
            for offset in offsets:
                await request(offset, buffer)

        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(64):
                group.create_task(worker())
        if write:
            await backend.flush()
        return time.perf_counter() - start


def random_rows(directory: Path, size: int) -> Iterator[tuple[str, Any, Any]]:
    image = directory / "random.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(size))
    run("qemu-io", "-f", "qcow2", "-c", f"write -q -P 1 0 {size}", image)
    for label, flag in (("read", []), ("write", ["-w"])):
        bench = [
            "qemu-img",
            "bench",
            *flag,
            "-c",
            str(REQUESTS),
            "-d",
            "64",
            "-s",
            "4096",
            "-S",
            str(STEP),
            "-f",
            "qcow2",
        ]
        yield (
            f"4 KiB random {label}, depth 64",
            lambda bench=bench: real_bench([*bench, image]),
            lambda w=bool(flag): ours(image, w),
        )


def real_bench(command: list[str | Path]) -> tuple[float, int]:
    output = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
    match = re.search(r"completed in ([\d.]+) seconds", output)
    assert match is not None, output
    return float(match[1]), 0


def ours(image: Path, write: bool) -> tuple[float, int]:
    words = [sys.executable, __file__, "_requests", str(image), "write" if write else "read"]
    seconds, peak = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), int(peak)


def requests_process(image: str, kind: str) -> None:
    """What `ours` runs in a process of its own."""
    seconds = asyncio.run(random_requests(image, write=kind == "write"))
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    print(seconds, int(match[1]) * 1024 if match else 0)


# ------------------------------------------------------------------------------------------------------------- startup


def startup_rows(layers: list[Path]) -> Iterator[tuple[str, Any, Any]]:
    yield "info", lambda: run("qemu-img", "info", layers[-1]), lambda: run(*qblock("qblock-img", "info", layers[-1]))


# -------------------------------------------------------------------------------------------------------------- report


def measure(rows: Iterator[tuple[str, Any, Any]], rounds: int) -> None:
    for label, real, own in rows:
        pairs = [(real(), own()) for _ in range(rounds)]
        theirs = min(pair[0][0] for pair in pairs)
        mine = min(pair[1][0] for pair in pairs)
        peak = max(pair[1][1] for pair in pairs)
        print(f"{label:32} {theirs:9.3f} s {mine:9.3f} s   {theirs / mine:6.2f}   {peak / MiB:7.0f} MiB", flush=True)


@contextmanager
def workspace(chosen: str | None) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="qblock-bench-", dir=chosen))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def main() -> None:
    if sys.argv[1:2] == ["_requests"]:
        requests_process(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=[], help="mirror, convert, random, startup; all by default")
    parser.add_argument("--size", type=int, default=1024, help="size of the images in MiB, a multiple of 256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help="where to put the images; the file system matters")
    arguments = parser.parse_args()
    what = arguments.what or ["mirror", "convert", "random", "startup"]
    with workspace(arguments.dir) as directory:
        size = arguments.size * MiB
        layers = make_chain(directory, size)
        makers = {
            "mirror": lambda: mirror_rows(directory, layers, size),
            "convert": lambda: convert_rows(directory, layers, size),
            "random": lambda: random_rows(directory, size),
            "startup": lambda: startup_rows(layers),
        }
        print(f"{'':32} {'QEMU':>11} {'qblock':>11}   {'ratio':>6}   {'peak':>11}")
        for name in what:
            measure(makers[name](), arguments.rounds)


if __name__ == "__main__":
    main()
