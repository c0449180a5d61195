"""blockdev-mirror of a three-layer qcow2 chain to a new qcow2, time to READY: the real daemon beside qblock's.

python benchmarks/mirror.py [--size MIB] [--rounds N] [--only TEXT] [--json FILE]
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from harness import BIN, BULK, MiB, Run, Table, compiled_once, main
from images import chain


class Monitor:
    """A bare QMP client."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.text = ""
        self.next()
        self.send("qmp_capabilities")
        self.next()

    def next(self) -> dict[str, Any]:
        """The next message."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text)
            except json.JSONDecodeError:
                data = self.socket.recv(65536)
                if not data:
                    raise SystemExit("the daemon has gone") from None
                self.text += data.decode()
            else:
                self.text = self.text[end:].lstrip()
                return dict(value)

    def send(self, command: str, arguments: dict[str, object] | None = None) -> None:
        """Send a command."""
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments or {}}).encode())

    def wait_for(self, event: str) -> None:
        """Read on until this event; an error ends the benchmark."""
        while (message := self.next()).get("event") != event:
            if "error" in message or message.get("event") == "BLOCK_JOB_ERROR":
                raise SystemExit(f"the mirror failed: {message}")


def mirror(daemon: str | Path, top: Path, folder: Path, *, discard: str) -> Run:
    """One mirror: seconds from the command to BLOCK_JOB_READY, and the daemon's peak memory and processor time until then."""
    target, path = folder / "target", folder / "qmp"
    size = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", top]))["virtual-size"]
    target.unlink(missing_ok=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", target, str(size)], check=True)
    words = [
        str(daemon),
        "--blockdev", f"driver=qcow2,node-name=source,file.driver=file,file.filename={top}",
        "--blockdev", f"driver=qcow2,node-name=target,discard={discard},file.driver=file,file.filename={target}",
        "--chardev", f"socket,id=c,path={path},server=on,wait=off", "--monitor", "chardev=c",
    ]  # fmt: skip
    process = subprocess.Popen(words, env=compiled_once())
    while not path.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    monitor = Monitor(path)
    started, processor = time.perf_counter(), processor_seconds(process.pid)
    monitor.send("blockdev-mirror", {"job-id": "copy", "device": "source", "target": "target", "sync": "full"})
    monitor.wait_for("BLOCK_JOB_READY")
    seconds = time.perf_counter() - started
    processor = processor_seconds(process.pid) - processor
    status = Path(f"/proc/{process.pid}/status").read_text()
    memory = int(status.split("VmHWM:")[1].split()[0]) * 1024
    monitor.send("block-job-complete", {"device": "copy"})
    monitor.wait_for("BLOCK_JOB_COMPLETED")
    monitor.send("quit")
    process.wait(60)
    monitor.socket.close()
    path.unlink(missing_ok=True)
    if subprocess.run(["qemu-img", "compare", "-q", top, target], check=False).returncode:
        raise SystemExit(f"{daemon}: the copy differs")
    return Run(seconds, memory, processor)


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare_all(table: Table) -> None:
    """Make the chain, mirror it by both in turns, for each setting of the target."""
    folder = table.folder / "mirror"
    folder.mkdir()
    top = chain(folder, table.size * MiB)
    for discard in ("unmap", "ignore"):
        table.compare(
            f"mirror of a chain to READY, discard={discard}",
            functools.partial(mirror, "qemu-storage-daemon", top, folder, discard=discard),
            functools.partial(mirror, BIN / "qblock-storage-daemon", top, folder, discard=discard),
            required=BULK,
        )


if __name__ == "__main__":
    main(__doc__, compare_all, size=2048)
