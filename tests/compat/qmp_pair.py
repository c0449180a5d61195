"""Runs one QMP script on a real QEMU program and on qblock, and brings both transcripts into a comparable form.

`do`, `add`, `hmp`, `io`, `together`, `wait` and `outside` are the words that scripts are written in.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

Json = Any
_AUTOMATIC = re.compile(r"#block\d+")
_DROPPED = {"desc", "timestamp", "package", "actual-size", "error", "reason"}
"""Members that differ by nature: texts, times, versions, how the file system allocates."""
_BUSY = re.compile(r"(Node '[^']*' is busy: ).*")
"""What HMP prints of a refusal: who stands against it is said in our own words."""


@attrs.frozen
class Pair:
    """The command lines of two programs that are to behave alike; ``{socket}`` and ``{dir}`` are filled in."""

    real: Sequence[str]
    ours: Sequence[str]


CHARDEV = ("--chardev", "socket,id=c,path={socket},server=on,wait=off", "--monitor", "chardev=c")
DAEMONS = Pair(
    real=("qemu-storage-daemon", *CHARDEV),
    ours=(sys.executable, "-m", "qblock.tools.storage_daemon", *CHARDEV),
)
QMP = ("-qmp", "unix:{socket},server=on,wait=off")
SYSTEMS = Pair(
    real=("qemu-system-x86_64", "-machine", "none", "-display", "none", "-nodefaults", *QMP),
    ours=(sys.executable, "-m", "qblock", "-monitor", "none", *QMP),
)


class Connection:
    """A bare QMP connection that hands out whatever comes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = ""
        self._decoder = json.JSONDecoder()

    def receive(self) -> Json:
        """The next message; None at the end of the stream."""
        while True:
            self._buffer = self._buffer.lstrip()
            if self._buffer:
                with contextlib.suppress(json.JSONDecodeError):
                    value, end = self._decoder.raw_decode(self._buffer)
                    self._buffer = self._buffer[end:]
                    return value
            data = self.sock.recv(1 << 16)
            if not data:
                return None
            self._buffer += data.decode()

    def execute(self, command: Json) -> tuple[list[Json], Json]:
        """The events up to the reply, and the reply."""
        self.sock.sendall(json.dumps(command).encode())
        events = []
        while "event" in (message := self.receive()):
            events.append(message)
        return events, message


@contextlib.contextmanager
def running(argv: Sequence[str], place: Path, *, killed: bool = False) -> Iterator[Connection]:
    """The program ``argv`` with ``place`` as its working directory, and a connection to it, greeting read.

    At the end it is asked to end, or (``killed``) killed.
    """
    path = place / "qmp.sock"
    filled = [part.format(socket=path, dir=place) for part in argv]
    with subprocess.Popen(filled, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            sock = _connect(path, process)
            with sock:
                connection = Connection(sock)
                assert "QMP" in connection.receive()
                yield connection
        finally:
            (process.kill if killed else process.terminate)()
            process.wait(30)


def _connect(path: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            time.sleep(0.02)
        else:
            return sock
    raise AssertionError("the program does not listen")


Step = Json
"""A command; or ``{"wait": EVENT}``: until that event (data members given must match); or ``{"outside": ARGV}``."""


def wire(members: dict[str, Any]) -> dict[str, Any]:
    """Members under their names in QMP: ``_`` stands for ``-``."""
    return {key.replace("_", "-"): value for key, value in members.items()}


def do(command: str, arguments: dict[str, Any] | None = None, **members: Any) -> dict[str, Any]:
    """A command; keywords' ``_`` stand for ``-``."""
    given = (arguments or {}) | wire(members)
    return {"execute": command, "arguments": given} if given else {"execute": command}


def add(name: str, filename: str, **members: Any) -> dict[str, Any]:
    """blockdev-add of a qcow2 image."""
    return do("blockdev-add", driver="qcow2", node_name=name, file={"driver": "file", "filename": filename}, **members)


def hmp(line: str) -> dict[str, Any]:
    """A line at the human monitor."""
    return do("human-monitor-command", command_line=line)


def io(node: str, line: str) -> dict[str, Any]:
    """A qemu-io command through the human monitor; what it prints goes to the program's standard output."""
    return hmp(f'qemu-io {node} "{line}"')


def together(*actions: tuple[str, dict[str, Any]], **properties: Any) -> dict[str, Any]:
    """A transaction of these actions."""
    given: dict[str, Any] = {"actions": [{"type": kind, "data": data} for kind, data in actions]}
    return do("transaction", given | ({"properties": wire(properties)} if properties else {}))


def wait(event: str, **data: Any) -> dict[str, Any]:
    """Wait for an event."""
    return {"wait": {"event": event, "data": data}}


def outside(*argv: str) -> dict[str, Any]:
    """Something that happens beside the program, in its directory: another program is run to its end."""
    return {"outside": argv}


def transcript(argv: Sequence[str], place: Path, script: Sequence[Step], *, killed: bool = False) -> list[Json]:
    """What the program answers to the script: per step the events and the reply; ``killed`` as for `running`.

    Events of a command that a wait follows are shown with the wait, since they may come before or after the reply.
    """
    place.mkdir(exist_ok=True)
    result: list[Json] = []
    with running(argv, place, killed=killed) as connection:
        connection.execute({"execute": "qmp_capabilities"})
        seen: list[Json] = []
        for step, following in itertools.zip_longest(script, script[1:], fillvalue={}):
            if "wait" in step:
                while not any(_matches(event, step["wait"]) for event in seen):
                    message = connection.receive()
                    assert message is not None, f"the program has gone while waiting for {step['wait']}"
                    seen.append(message)
                result.append({"step": step, "events": seen})
                seen = []
            elif "outside" in step:
                subprocess.run(step["outside"], cwd=place, check=True, stdout=subprocess.DEVNULL)
            else:
                events, reply = connection.execute(step)
                seen += events
                waits = "wait" in following
                result.append({"step": step, "reply": reply, "events": [] if waits else seen})
                seen = seen if waits else []
    return result


def _matches(event: Json, wanted: Json) -> bool:
    data = event.get("data", {})
    return event["event"] == wanted["event"] and all(data.get(k) == v for k, v in wanted.get("data", {}).items())


def comparable(result: list[Json], place: Path) -> list[Json]:
    """The transcript without what differs by nature: automatic names are numbered as they appear."""
    names: dict[str, str] = {}

    def rename(text: str) -> str:
        text = _BUSY.sub(r"\1…", text.replace(str(place), "DIR"))
        return _AUTOMATIC.sub(lambda found: names.setdefault(found[0], f"#{len(names)}"), text)

    def walk(value: Json) -> Json:
        if isinstance(value, dict):
            return {
                key: ("…" if key in _DROPPED and not isinstance(item, (dict, list)) else walk(item))
                for key, item in sorted(value.items())
                if key != "timestamp"
            }
        if isinstance(value, list):
            return [walk(item) for item in value]
        return rename(value) if isinstance(value, str) else value

    return [walk(_graph_by_names(step)) for step in result]


def _graph_by_names(step: Json) -> Json:
    """Graph dumps number their vertices as they like: edges name them instead, in alphabetical order."""
    dump = step.get("reply", {}).get("return")
    if not isinstance(dump, dict) or "edges" not in dump:
        return step
    names = {node["id"]: f"{node['type']} {_AUTOMATIC.sub('#', node['name'])}" for node in dump["nodes"]}
    edges = [edge | {"parent": names[edge["parent"]], "child": names[edge["child"]]} for edge in dump["edges"]]
    graph = {"nodes": sorted(names.values()), "edges": sorted(edges, key=lambda edge: json.dumps(edge, sort_keys=True))}
    return step | {"reply": {"return": graph}}


def both(
    pair: Pair, tmp_path: Path, script: Sequence[Step], prepare: Sequence[Sequence[str]] = ()
) -> tuple[Json, Json]:
    """The comparable transcripts of the real program and of qblock, each in a directory of its own made by ``prepare``."""
    transcripts = []
    for name, argv in (("real", pair.real), ("ours", pair.ours)):
        place = tmp_path / name
        place.mkdir()
        for line in prepare:
            subprocess.run(line, cwd=place, check=True, stdout=subprocess.DEVNULL)
        transcripts.append(comparable(transcript(argv, place, script), place))
    return transcripts[0], transcripts[1]
