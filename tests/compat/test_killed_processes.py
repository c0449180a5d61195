"""A qblock process killed with SIGKILL leaves images that open, check without errors, and hold every flushed write.

The process is the real program over a real QMP socket; the real qemu-img and qemu-io look at what it left.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

pytestmark = pytest.mark.qemu

MiB = 1 << 20
BLOCK = 4096
SIZE = 48 * MiB


@attrs.define
class Machine:
    """A `qblock` process with one drive ``virtio0``, driven over QMP like management software drives QEMU."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    buffer: bytes = b""
    events: list[dict[str, Any]] = attrs.field(factory=list)

    def message(self) -> dict[str, Any]:
        while b"\n" not in self.buffer:
            data = self.channel.recv(65536)
            if not data:
                raise EOFError("the machine is gone")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return dict(json.loads(line))

    def execute(self, command: str, **arguments: Any) -> Any:
        self.channel.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = self.message()
            if "event" in message:
                self.events.append(message)
            elif "return" in message:
                return message["return"]
            else:
                raise AssertionError(message)

    def io(self, line: str) -> None:
        reply = self.execute("human-monitor-command", **{"command-line": f'qemu-io virtio0 "{line}"'})
        assert "Error" not in reply, reply

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)
        self.channel.close()


def start_machine(top: Path, work: Path) -> Machine:
    path = work / "qmp.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "qblock", "-drive", f"if=virtio,id=virtio0,file={top},format=qcow2",
         "-qmp", f"unix:{path},server=on,wait=off", "-monitor", "none"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while True:
        channel = socket.socket(socket.AF_UNIX)
        try:
            channel.connect(str(path))
            break
        except OSError:
            channel.close()
            assert process.poll() is None, f"qblock exited with {process.returncode}"
            assert time.monotonic() < deadline, "no socket after 30 s"
            time.sleep(0.02)
    machine = Machine(process, channel)
    machine.message()
    machine.execute("qmp_capabilities")
    return machine


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Three qcow2 layers made by the real qemu-img, each with data of its own (patterns 1, 2, 3)."""
    layers = [tmp_path / name for name in ("base.qcow2", "mid.qcow2", "top.qcow2")]
    backing: list[str] = []
    for number, layer in enumerate(layers, start=1):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(layer), str(SIZE)], check=True)
        command = f"write -q -P {number} {number * 4 * MiB} {16 * MiB}"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, str(layer)], check=True, stdout=subprocess.DEVNULL)
        backing = ["-b", str(layer), "-F", "qcow2"]
    return layers[-1]


@pytest.fixture
def machine(chain: Path, tmp_path: Path) -> Iterator[Machine]:
    running = start_machine(chain, tmp_path)
    yield running
    if running.process.poll() is None:
        running.kill()
    running.channel.close()


@attrs.define
class Writer:
    """Writes random blocks, flushes now and then, and remembers what a flush has promised."""

    machine: Machine
    rng: random.Random
    durable: dict[int, int] = attrs.field(factory=dict)
    pending: dict[int, int] = attrs.field(factory=dict)
    pattern: Iterator[int] = attrs.field(factory=lambda: itertools.cycle(range(10, 250)))

    def step(self) -> None:
        for _ in range(self.rng.randrange(1, 6)):
            offset = self.rng.randrange(SIZE // BLOCK) * BLOCK
            value = next(self.pattern)
            self.durable.pop(offset, None)
            self.machine.io(f"write -q -P {value} {offset} {BLOCK}")
            self.pending[offset] = value
        if self.rng.random() < 0.5:
            self.machine.io("flush")
            self.durable |= self.pending
            self.pending.clear()


def assert_chain_sound(top: Path, durable: dict[int, int]) -> None:
    for layer in sorted(top.parent.glob("*.qcow2")):
        if layer.name == "target.qcow2":
            continue
        check = subprocess.run(["qemu-img", "check", "-q", str(layer)], capture_output=True, text=True, check=False)
        assert check.returncode in (0, 3), f"{layer.name}: {check.stdout}{check.stderr}"
    script = "".join(f"read -q -P {value} {offset} {BLOCK}\n" for offset, value in durable.items())
    run = subprocess.run(
        ["qemu-io", "-r", "-f", "qcow2", str(top)], input=script, capture_output=True, text=True, check=False
    )
    assert "verification failed" not in run.stdout, run.stdout
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("steps", [0, 3, 25])
@pytest.mark.parametrize("operation", ["mirror", "backup", "stream", "commit", "active commit"])
def test_sigkill_during_a_job_loses_no_flushed_write(
    machine: Machine, chain: Path, tmp_path: Path, operation: str, steps: int
) -> None:
    """The plug is pulled on the process at an early, a middle and a late moment of the job while a guest writes."""
    writer = Writer(machine, random.Random(f"{operation}{steps}"))
    writer.step()
    if operation in ("mirror", "backup"):
        machine.execute(f"drive-{operation}", device="virtio0", target=str(tmp_path / "target.qcow2"), format="qcow2",
                        sync="full", speed=20 * MiB)  # fmt: skip
    elif operation == "stream":
        machine.execute("block-stream", device="virtio0", speed=20 * MiB)
    else:
        top = {"top": str(tmp_path / "mid.qcow2")} if operation == "commit" else {}
        machine.execute("block-commit", device="virtio0", speed=20 * MiB, **top)
    for _ in range(steps):
        writer.step()
    machine.kill()
    assert_chain_sound(chain, writer.durable)


def test_sigkill_right_after_a_backup_leaves_the_disk_of_its_moment(machine: Machine, chain: Path, tmp_path: Path) -> None:
    """After BLOCK_JOB_COMPLETED the target is durable: sound, and all of what the disk held at the command, and nothing newer."""
    writer = Writer(machine, random.Random(9))
    writer.step()
    machine.io("flush")
    writer.durable |= writer.pending
    before = dict(writer.durable)
    target = tmp_path / "target.qcow2"
    machine.execute("drive-backup", device="virtio0", target=str(target), format="qcow2", sync="full", speed=40 * MiB)
    while not any(event["event"] == "BLOCK_JOB_COMPLETED" for event in machine.events):
        writer.step()
    machine.kill()
    subprocess.run(["qemu-img", "check", "-q", str(target)], check=True)
    assert_chain_sound(target, before)
    assert_chain_sound(chain, writer.durable)


def test_sigkill_right_after_the_stream_relinked_the_image_leaves_a_full_image(machine: Machine, chain: Path) -> None:
    """After BLOCK_JOB_COMPLETED of a stream the header must already be without its backing file."""
    writer = Writer(machine, random.Random(7))
    machine.execute("block-stream", device="virtio0")
    while not any(event["event"] == "BLOCK_JOB_COMPLETED" for event in machine.events):
        writer.step()
    machine.kill()
    info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(chain)]))
    assert "backing-filename" not in info
    assert_chain_sound(chain, writer.durable)


@pytest.mark.parametrize("active", [False, True])
def test_sigkill_right_after_a_commit_leaves_everything_in_the_shorter_chain(
    machine: Machine, chain: Path, tmp_path: Path, active: bool
) -> None:
    """After BLOCK_JOB_COMPLETED the header names the base, or the base is all there is."""
    writer = Writer(machine, random.Random(8 + active))
    top = {} if active else {"top": str(tmp_path / "mid.qcow2")}
    machine.execute("block-commit", device="virtio0", **top)
    while not any(event["event"] == "BLOCK_JOB_COMPLETED" for event in machine.events):
        writer.step()
        if any(event["event"] == "BLOCK_JOB_READY" for event in machine.events):
            machine.events.clear()
            machine.execute("block-job-complete", device="virtio0")
    writer.step()
    machine.kill()
    if active:
        assert_chain_sound(tmp_path / "base.qcow2", writer.durable)
    else:
        info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(chain)]))
        assert info["backing-filename"] == str(tmp_path / "base.qcow2")
        assert_chain_sound(chain, writer.durable)


def test_a_full_disk_stops_a_commit_until_there_is_room(tmp_path: Path) -> None:
    """The base's filesystem is full: the job waits, the guest goes on; when there is room the same place is tried again."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=False).returncode != 0:
        pytest.skip("this environment does not allow mounting a tmpfs")
    layers = [small / "base.qcow2", tmp_path / "mid.qcow2", tmp_path / "top.qcow2"]
    try:
        backing: list[str] = []
        for layer in layers:
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(layer), str(SIZE)], check=True)
            backing = ["-b", str(layer), "-F", "qcow2"]
        subprocess.run(["qemu-io", "-c", f"write -q -P 2 0 {16 * MiB}", str(layers[1])], check=True)
        machine = start_machine(layers[2], tmp_path)
        writer = Writer(machine, random.Random(4))
        machine.execute("block-commit", device="virtio0", top=str(layers[1]), **{"on-error": "enospc"})
        while not any(event["event"] == "BLOCK_JOB_ERROR" for event in machine.events):
            writer.step()
        assert all(
            event["data"]["action"] == "stop" for event in machine.events if event["event"] == "BLOCK_JOB_ERROR"
        )
        (job,) = machine.execute("query-block-jobs")
        assert (job["io-status"], job["paused"]) == ("nospace", True)
        writer.step()
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        machine.execute("block-job-resume", device="virtio0")
        while not (done := [event for event in machine.events if event["event"] == "BLOCK_JOB_COMPLETED"]):
            writer.step()
        assert "error" not in done[0]["data"]
        machine.io("flush")
        machine.execute("quit")
        machine.process.wait(timeout=30)
        machine.channel.close()
        assert_chain_sound(layers[2], writer.durable)
        subprocess.run(["qemu-img", "check", "-q", str(layers[0])], check=True)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_full_disk_stops_the_mirror_and_never_the_guest(machine: Machine, chain: Path, tmp_path: Path) -> None:
    """The target's filesystem is full: the mirror reports ENOSPC, the guest keeps writing, nothing hangs."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=False)
    if mounted.returncode != 0:
        pytest.skip("this environment does not allow mounting a tmpfs")
    try:
        machine.execute(
            "drive-mirror", device="virtio0", target=str(small / "target.qcow2"), format="qcow2", sync="full"
        )
        writer = Writer(machine, random.Random(3))
        while not any(event["event"] == "BLOCK_JOB_COMPLETED" for event in machine.events):
            writer.step()
        completed = next(event for event in machine.events if event["event"] == "BLOCK_JOB_COMPLETED")
        assert "error" in completed["data"]
        assert any(
            event["event"] == "BLOCK_JOB_ERROR" and event["data"]["operation"] == "write" for event in machine.events
        )
        writer.step()
        machine.io("flush")
        machine.execute("quit")
        machine.process.wait(timeout=30)
        assert_chain_sound(chain, writer.durable)
    finally:
        subprocess.run(["umount", str(small)], check=True)
