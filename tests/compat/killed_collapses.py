"""A machine over real files that is killed again and again while its chain is collapsed.

A story begins with a chain of images that the real qemu-img has made. Our program runs a machine on it, with a guest that writes,
and is told to stream, commit, mirror, back up and take snapshots, several at once; then it gets SIGKILL. What it leaves is judged
by the real programs: every file of the chain passes `qemu-img check` with leaks at most, and the active image shows all that a
flush has promised the guest. On those files the machine is started anew.

As a program it looks for trouble as long as it is told to::

    python tests/compat/killed_collapses.py --seed 0 --count 100

A number makes the same plan again, though not the same moment of the kill.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

from qblock.monitor.client import QmpClient, QmpConnectionLost, QmpError
from qblock.units import KiB, MiB

SIZE = 2 * MiB
BLOCK = 4 * KiB
BLOCKS = SIZE // BLOCK
LEAKS = 3
"""Exit code of a check that has found clusters which nobody uses."""
KILLS = 4
STARTING_S = 60
SPEEDS = (0, 0, MiB, 8 * MiB)


class Disk:
    """What the guest's disk must hold: for each block the bytes that it may be full of, the last one written behind the others.

    Those are what was there at the last flush, and what has been written since then: a killed program need not have written
    its tables, just as QEMU.
    """

    def __init__(self) -> None:
        self.blocks = [[0] for _ in range(BLOCKS)]

    def write(self, index: int, value: int) -> None:
        """Has been written."""
        self.blocks[index].append(value)

    def flush(self) -> None:
        """Everything that has been written stays."""
        self.blocks = [values[-1:] for values in self.blocks]

    def check(self, content: bytes) -> None:
        """Is it so?"""
        assert len(content) == SIZE
        for index, allowed in enumerate(self.blocks):
            block = content[index * BLOCK : (index + 1) * BLOCK]
            assert any(block == bytes([value]) * BLOCK for value in allowed), f"block {index} is {block[:4]!r}, not {allowed}"
            self.blocks[index] = [block[0]]


def output_of(*words: object) -> str:
    """Standard output of a real program, which must succeed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


class Story:
    """One chain from its beginning through all kills. ``active`` is the image that the guest has."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = Random(seed), folder
        self.disk = Disk()
        self.trail: list[str] = []
        self.files = 0
        self.active = self.new_file()
        self.client: QmpClient
        self.moves: dict[str, Path] = {}
        """Which image is the active one when a job has ended well, by the id of the job."""

    def new_file(self) -> Path:
        """A name for one more image."""
        self.files += 1
        return self.folder / f"image{self.files}.qcow2"

    # --------------------------------------------------------------------------------------------------------- the chain

    def lengthen(self) -> None:
        """The real programs put layers with data on the chain until it is long enough for much to happen."""
        for _ in range(self.random.randrange(3, 6) - len(self.chain())):
            below = ["-b", self.active, "-F", "qcow2"] if self.active.exists() else []
            cluster = self.random.choice(("4k", "64k"))
            layer = self.new_file()
            output_of("qemu-img", "create", "-f", "qcow2", "-o", f"cluster_size={cluster}", *below, layer, SIZE)
            script = []
            for _ in range(20):
                index, count = self.random.randrange(BLOCKS - 8), self.random.randrange(1, 9)
                value = self.random.randrange(1, 256)
                script += ["-c", f"write -P {value} {index * BLOCK} {count * BLOCK}"]
                for block in range(index, index + count):
                    self.disk.write(block, value)
            output_of("qemu-io", "-f", "qcow2", *script, layer)
            self.disk.flush()
            self.active = layer

    def chain(self) -> list[Path]:
        """The files as their headers name them, the active one first."""
        if not self.active.exists():
            return []
        layers = json.loads(output_of("qemu-img", "info", "-U", "--backing-chain", "--output=json", self.active))
        return [Path(layer["filename"]) for layer in layers]

    def judge(self) -> None:
        """What the kill has left."""
        for layer in self.chain():
            checked = subprocess.run(["qemu-img", "check", str(layer)], capture_output=True, text=True, check=False)
            assert checked.returncode in (0, LEAKS), f"{layer.name}: {checked.stdout} {checked.stderr}"
        seen = self.folder / "seen"
        output_of("qemu-img", "convert", "-O", "raw", self.active, seen)
        self.disk.check(seen.read_bytes())

    # ------------------------------------------------------------------------------------------------------- the machine

    async def live(self) -> None:
        """All of it."""
        for _ in range(KILLS):
            self.lengthen()
            self.trail.append(f"machine on {self.active.name}, chain {[layer.name for layer in self.chain()]}")
            process = await self.start()
            try:
                for _ in range(self.random.randrange(1, 40)):
                    await self.step()
            finally:
                process.kill()
                await process.wait()
                with contextlib.suppress(QmpConnectionLost):
                    await self.client.wait_event("what it still said is read")
                await self.client.close()
            self.note_ends()
            self.judge()

    async def start(self) -> asyncio.subprocess.Process:
        """Our program, with a client."""
        socket = self.folder / "qmp.sock"
        socket.unlink(missing_ok=True)
        self.moves.clear()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "qblock", "-drive", f"if=virtio,id=disk,file={self.active},format=qcow2",
            "-qmp", f"unix:{socket},server=on,wait=off", "-monitor", "none", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(STARTING_S):
            while True:
                with contextlib.suppress(OSError):
                    self.client = await QmpClient.connect(str(socket))
                    return process
                assert process.returncode is None
                await asyncio.sleep(0.02)

    async def step(self) -> None:
        """The guest does something, or management does."""
        chance = self.random.random()
        if chance < 0.75:
            await self.guest()
        else:
            action: Callable[[], Awaitable[None]] = self.random.choice(
                (self.stream, self.stream, self.commit, self.commit, self.commit_active, self.mirror, self.backup, self.snapshot)
            )
            self.trail.append(action.__name__)
            with contextlib.suppress(QmpError):  # most often because another job is there
                await action()
                self.trail[-1] += " begun"
        for event in list(self.client.events):
            if event.name == "BLOCK_JOB_READY" and self.random.random() < 0.7:
                self.client.events.remove(event)
                with contextlib.suppress(QmpError):
                    await self.client.execute("job-complete", id=event.data["device"])
        self.note_ends()

    def note_ends(self) -> None:
        """A job that has ended well may have moved the guest to another image."""
        for event in list(self.client.events):
            if event.name == "BLOCK_JOB_COMPLETED":
                self.client.events.remove(event)
                self.trail.append(f"{event.data['device']} completed {event.data.get('error', '')}")
                if "error" not in event.data:
                    self.active = self.moves.get(event.data["device"], self.active)

    async def guest(self) -> None:
        """One request."""
        index = self.random.randrange(BLOCKS)
        value = self.random.choice((0, self.random.randrange(1, 256)))
        verb = "write -q -z" if value == 0 else f"write -q -P {value}"
        line = "flush" if self.random.random() < 0.2 else f"{verb} {index * BLOCK} {BLOCK}"
        answer = await self.client.hmp(f'qemu-io disk "{line}"')
        assert not answer, (line, answer)
        if line == "flush":
            self.disk.flush()
        else:
            self.disk.write(index, value)

    # -------------------------------------------------------------------------------------------------------- management

    def a_job(self, kind: str) -> dict[str, object]:
        """Arguments that all jobs have."""
        return {"job-id": f"{kind}{self.random.randrange(1 << 30)}", "device": "disk", "speed": self.random.choice(SPEEDS)}

    async def stream(self) -> None:
        """All layers above some base move into the active image."""
        below = self.chain()[1:]
        base = {"base": str(self.random.choice(below))} if below and self.random.random() < 0.7 else {}
        await self.client.execute("block-stream", {**self.a_job("stream"), **base})

    async def commit(self) -> None:
        """Inner layers move down."""
        below = self.chain()[1:]
        if len(below) > 1:
            top = self.random.randrange(len(below) - 1)
            base = self.random.randrange(top + 1, len(below))
            await self.client.execute("block-commit", {**self.a_job("commit"), "top": str(below[top]), "base": str(below[base])})

    async def commit_active(self) -> None:
        """The active image moves down, and the guest with it."""
        below = self.chain()[1:]
        if below:
            base, job = self.random.choice(below), self.a_job("active")
            self.moves[str(job["job-id"])] = base
            await self.client.execute("block-commit", {**job, "base": str(base)})

    async def mirror(self) -> None:
        """The guest moves to a new image."""
        target, job = self.new_file(), self.a_job("mirror")
        self.moves[str(job["job-id"])] = target
        sync = self.random.choice(("full", "top"))
        await self.client.execute("drive-mirror", {**job, "target": str(target), "format": "qcow2", "sync": sync})

    async def backup(self) -> None:
        """A copy that nobody uses."""
        target = {"target": str(self.new_file()), "format": "qcow2", "sync": "full"}
        await self.client.execute("drive-backup", {**self.a_job("backup"), **target})

    async def snapshot(self) -> None:
        """A new layer becomes the active one."""
        layer = self.new_file()
        await self.client.execute("blockdev-snapshot-sync", device="disk", snapshot_file=str(layer), format="qcow2")
        self.active = layer
        self.moves.clear()  # what jobs move to now lies below it


def live(seed: int) -> list[str]:
    """Live the story of ``seed``; gives what happened in it, as the notes of a failure do."""
    with tempfile.TemporaryDirectory(prefix="qblock-kills-") as folder:
        story = Story(seed, Path(folder))
        try:
            asyncio.run(story.live())
        except BaseException as error:
            error.add_note("\n  ".join([f"story {seed}:", *story.trail]))
            raise
        return story.trail


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    wanted = parser.parse_args()
    failures = 0
    for seed in range(wanted.seed, wanted.seed + wanted.count):
        try:
            live(seed)
        except Exception:
            failures += 1
            sys.stdout.write(f"{traceback.format_exc()}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{wanted.count} stories with {KILLS} kills each from {wanted.seed} on, {failures} failures\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
