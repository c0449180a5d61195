#!/usr/bin/env python3
# ruff: noqa: T201
"""Copy a running machine's disk to a new image, over its QMP socket: an example of software that one wants to test.

Uses the standard library only. The copy is made with drive-mirror: when the mirror is in step with the disk (BLOCK_JOB_READY), it
is told to stop, and the target is the disk as it was at that moment. How this script is tested without any machine is shown in
test_backup_script.py beside it, and explained in docs/testing-your-software.md.

    backup_script.py SOCKET DEVICE TARGET [--speed BYTES_PER_SECOND]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from types import TracebackType
from typing import Any


class BackupFailed(Exception):
    """The machine refused, or the copy broke off. No target is left behind."""


class Monitor:
    """A QMP connection: one JSON value after the other, in both directions."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._text = ""
        self._events: list[dict[str, Any]] = []
        self._next()  # the greeting
        self.execute("qmp_capabilities")

    def _next(self) -> dict[str, Any]:
        """The next JSON value; values need not come one a line, nor in one piece."""
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text)
            except json.JSONDecodeError:
                data = self._socket.recv(65536)
                if not data:
                    raise BackupFailed("the machine has closed its monitor") from None
                self._text += data.decode()
            else:
                self._text = self._text[end:].lstrip()
                assert isinstance(value, dict)
                return value

    def execute(self, command: str, **arguments: Any) -> Any:
        """Execute a command and return what it returns. Members whose names have a ``-`` are written with ``_``."""
        members = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": members}).encode())
        while True:
            message = self._next()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise BackupFailed(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    def next_event(self) -> dict[str, Any]:
        """The next event; those that came before a reply are first."""
        return self._events.pop(0) if self._events else self._next()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()


def backup(path: str, device: str, target: str, *, speed: int = 0) -> int:
    """Copy ``device`` of the machine whose monitor is at ``path`` to ``target`` (qcow2); returns the bytes copied."""
    job = f"backup-{device}"
    with Monitor(path) as monitor:
        if os.path.exists(target):
            raise BackupFailed(f"{target} exists already")
        try:
            monitor.execute(
                "drive-mirror", job_id=job, device=device, target=target, format="qcow2", sync="full", speed=speed
            )
            return _follow(monitor, job)
        except BaseException:
            if os.path.exists(target):
                os.unlink(target)
            raise


def _follow(monitor: Monitor, job: str) -> int:
    while True:
        event = monitor.next_event()
        data = event.get("data", {})
        if data.get("device") != job:
            continue
        if event["event"] == "BLOCK_JOB_READY":
            monitor.execute("block-job-cancel", device=job)  # in step: stop here, and keep what was copied
        elif event["event"] == "BLOCK_JOB_COMPLETED":
            if "error" in data:
                raise BackupFailed(data["error"])
            return int(data["len"])
        elif event["event"] == "BLOCK_JOB_CANCELLED":
            raise BackupFailed("somebody cancelled the backup")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Copy a running machine's disk over its QMP socket.")
    parser.add_argument("socket")
    parser.add_argument("device")
    parser.add_argument("target")
    parser.add_argument("--speed", type=int, default=0, help="bytes per second (default: no limit)")
    options = parser.parse_args()
    try:
        copied = backup(options.socket, options.device, options.target, speed=options.speed)
    except (BackupFailed, OSError) as error:
        print(f"backup failed: {error}", file=sys.stderr)
        return 1
    print(f"{copied} bytes copied to {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
