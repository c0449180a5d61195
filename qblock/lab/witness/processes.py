"""Children of the experiment: real processes, forked, spoken to over a pair of sockets, and killed with SIGKILL.

A kill leaves what a real one leaves: files as the kernel has them, no locks, no sockets, nothing in memory. A child whose
parent has gone ends by itself, because its socket ends. The parent must have no other threads when it forks.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import attrs

from qblock.errors import QBlockError
from qblock.lab.ending import begin_anew, forget_duty, held_up, note_duty

PATIENCE_S: Final = 60.0
"""Real seconds after which a child that says nothing is considered to hang."""
_MAX_MESSAGE: Final = 1 << 17

Message = dict[str, Any]


class LabError(QBlockError):
    """The experiment itself has failed: a child broke down or hangs."""


class Ended(Exception):
    """The other side has gone."""


@attrs.define(eq=False)
class Wire:
    """One end of a connection between parent and child; messages keep their bounds."""

    sock: socket.socket

    @classmethod
    def pair(cls) -> tuple[Wire, Wire]:
        """Two connected ends."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    def send(self, **message: Any) -> None:
        """Send a message; raises `Ended`."""
        try:
            self.sock.sendall(json.dumps(message).encode())
        except (BrokenPipeError, ConnectionResetError):
            raise Ended from None

    def receive(self) -> Message:
        """Wait for a message; raises `Ended`, or `LabError` when none comes or the other side tells that it broke down."""
        try:
            data = self.sock.recv(_MAX_MESSAGE)
        except TimeoutError:
            raise LabError(f"a process of the experiment says nothing for {PATIENCE_S:.0f} seconds") from None
        except ConnectionResetError:
            data = b""
        if not data:
            raise Ended
        message: Message = json.loads(data)
        if "broken" in message:
            raise LabError(message["broken"])
        return message

    @property
    def has_news(self) -> bool:
        """Whether `receive` would return at once."""
        return bool(select.select([self.sock], [], [], 0)[0])

    def close(self) -> None:
        """Let go of this end."""
        self.sock.close()


class ParentWire(Wire):
    """A child's end: when the parent has gone, the child ends at once."""

    def send(self, **message: Any) -> None:
        """See `Wire`."""
        try:
            super().send(**message)
        except Ended:
            os._exit(1)

    def receive(self) -> Message:
        """See `Wire`."""
        try:
            return super().receive()
        except Ended:
            os._exit(1)


@attrs.define(eq=False)
class Child:
    """A forked process and the parent's end of its wire."""

    pid: int
    wire: Wire
    alive: bool = True

    @classmethod
    def fork(cls, body: Callable[[Wire], None], *, log: Path, strangers: Iterable[Wire] = ()) -> Child:
        """Run ``body`` in a child, which lets go of the wires of ``strangers`` first. What it prints goes to ``log``."""
        ours, its = Wire.pair()
        ours.sock.settimeout(PATIENCE_S)
        sys.stdout.flush()
        sys.stderr.flush()
        with held_up():
            pid = os.fork()
            if pid:
                its.close()
                child = cls(pid, ours)
                note_duty(child.end)
                return child
            begin_anew()
        code = 1
        try:
            for wire in (ours, *strangers):
                wire.close()
            _print_to(log)
            code = _run_body(body, ParentWire(its.sock))
        finally:
            os._exit(code)  # the parent's frames above us are not ours to unwind

    def kill(self) -> None:
        """End it now; when this returns, all it held is free."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def end(self) -> None:
        """Ask it to end, together with its own children, and wait until all of them have."""
        if self.alive:
            os.kill(self.pid, signal.SIGTERM)
            self.wait()

    def wait(self) -> None:
        """Wait until it has ended."""
        if self.alive:
            os.waitpid(self.pid, 0)
            self.alive = False
            forget_duty(self.end)
            self.wire.close()


def _print_to(log: Path) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(fd, stream)
    os.close(fd)


def _run_body(body: Callable[[Wire], None], wire: Wire) -> int:
    try:
        body(wire)
    except Exception:
        wire.send(broken=traceback.format_exc())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
