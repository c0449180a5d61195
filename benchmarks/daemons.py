"""A storage daemon for the time of one job, and what the job costs it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import BIN, Run, compiled_once

REAL, OURS = "qemu-storage-daemon", str(BIN / "qblock-storage-daemon")


class Daemon:
    """A running daemon, and a bare QMP client on it."""

    def __init__(self, process: subprocess.Popen[bytes], client: socket.socket) -> None:
        self.process = process
        self.client = client
        self.lines = client.makefile("rb")
        self.next()
        self.send("qmp_capabilities")
        self.next()

    def next(self) -> dict[str, Any]:
        """The next message, which is a line."""
        line = self.lines.readline()
        if not line:
            raise SystemExit("the daemon has gone")
        return dict(json.loads(line))

    def send(self, command: str, arguments: Mapping[str, object] | None = None) -> None:
        """Send a command."""
        self.client.sendall(json.dumps({"execute": command, "arguments": arguments or {}}).encode())

    def call(self, command: str, arguments: Mapping[str, object] | None = None) -> None:
        """Send a command and wait for its reply; an error ends the benchmark."""
        self.send(command, arguments)
        while "return" not in (message := self.next()):
            if "error" in message:
                raise SystemExit(f"{command} failed: {message['error']}")

    def wait_for(self, event: str) -> None:
        """Read on until this event; an error ends the benchmark."""
        while (message := self.next()).get("event") != event:
            if "error" in message or message.get("event") == "BLOCK_JOB_ERROR":
                raise SystemExit(f"the job failed: {message}")

    def measure(self, command: str, arguments: Mapping[str, object], *, until: str) -> Run:
        """Send a command: seconds until an event, and the daemon's processor time meanwhile and peak memory so far."""
        started, processor = time.perf_counter(), self._processor_seconds()
        self.send(command, arguments)
        self.wait_for(until)
        seconds = time.perf_counter() - started
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        memory = int(status.split("VmHWM:")[1].split()[0]) * 1024
        return Run(seconds, memory, self._processor_seconds() - processor)

    def _processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def daemon(program: str, folder: Path, *blockdevs: str) -> Iterator[Daemon]:
    """``program`` with some nodes; it quits at the end."""
    path = folder / "qmp"
    words = [program, "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c"]
    for blockdev in blockdevs:
        words += ["--blockdev", blockdev]
    process = subprocess.Popen(words, env=compiled_once())
    try:
        with _connected(path, process) as client:
            running = Daemon(process, client)
            yield running
            running.send("quit")
            process.wait(60)
    finally:
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)


def _connected(path: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    """A connection to the daemon, as soon as it listens."""
    while process.poll() is None:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            time.sleep(0.01)
        else:
            return client
    raise SystemExit("the daemon has not started")


def node(name: str, image: Path, *options: str) -> str:
    """The text of ``--blockdev`` for a qcow2 image."""
    return ",".join(["driver=qcow2", f"node-name={name}", *options, "file.driver=file", f"file.filename={image}"])


def same_content(top: Path, target: Path) -> None:
    """End the benchmark unless both images hold the same disk."""
    if subprocess.run(["qemu-img", "compare", "-q", top, target], check=False).returncode:
        raise SystemExit("the copy differs")


def size_of(image: Path) -> int:
    """The size of the disk in an image, in bytes."""
    return int(json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", image]))["virtual-size"])
