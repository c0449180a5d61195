"""Trace events beside the real programs: their names, their lines, and what the monitor tells of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qblock.tracing import DECLARED

pytestmark = pytest.mark.qemu

OURS = re.compile(
    "drive_reopen_|witness_|blkmirror_|stream_through_|transaction_|co_sleep_|job_cancel_sync_|mirror_flush_generation"
    "|block_copy_(start|iteration|dirty|switch)$|qmp_block_commit$"
)
"""Events that QEMU 7.2 does not have, and some of which it could not."""
DAEMON = ("--chardev", "stdio,id=c", "--monitor", "chardev=c")
REAL_DAEMON = ("qemu-storage-daemon", *DAEMON)
OUR_DAEMON = (sys.executable, "-m", "qblock.tools.storage_daemon", *DAEMON)
REAL_MACHINE = ("qemu-system-x86_64", "-machine", "none", "-display", "none", "-nodefaults", "-qmp", "stdio")
OUR_MACHINE = (sys.executable, "-m", "qblock", "-monitor", "none", "-qmp", "stdio")
NODE = {"driver": "null-co", "node-name": "n", "size": 1 << 20, "read-zeroes": True}
LAYERS = {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}}


def talk(program: Sequence[str], commands: Sequence[dict[str, Any]], *, until: str = "") -> list[Any]:
    """The replies to qmp_capabilities and to ``commands``, each given when the one before is answered.

    The program is told to quit when a job has come to the state ``until``.
    """
    replies: list[Any] = []
    states: set[str] = set()
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def take() -> None:
            assert process.stdout is not None
            message = json.loads(process.stdout.readline())
            if "return" in message or "error" in message:
                replies.append(message)
            states.add(message.get("data", {}).get("status", ""))

        try:
            for number, command in enumerate([{"execute": "qmp_capabilities"}, *commands], 1):
                print(json.dumps(command), file=process.stdin, flush=True)
                while len(replies) < number:
                    take()
            while until and until not in states:
                take()
            process.communicate(json.dumps({"execute": "quit"}), timeout=20)
        finally:
            process.kill()
    return replies


def events_of(program: str) -> set[str]:
    """What ``--trace help`` of a real program lists."""
    done = subprocess.run([program, "--trace", "help"], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_events_have_qemus_names_or_are_known_as_ours() -> None:
    """A name of QEMU's is not used for something else, and none of ours pretends to be QEMU's."""
    real = events_of("qemu-system-x86_64") | events_of("qemu-storage-daemon")
    assert {name for name in DECLARED if not OURS.match(name)} <= real
    assert {name for name in DECLARED if OURS.match(name)} & real == set()


def comparable(path: Path) -> list[str]:
    """The lines of a log without addresses and names; the speed that QEMU sets at the start is not told."""
    lines = []
    for line in path.read_text().splitlines():
        if "verb set-speed" not in line:
            text = re.sub(r"\b(job|bs|s|base|opaque) (0x[0-9a-f]+|\(nil\)|None|\S+)", r"\1 -", line)
            lines.append(text.removesuffix(" opaque -"))
    return lines


def test_a_job_leaves_the_same_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of an overlay, from its command to its end, and a command that fails."""
    monkeypatch.chdir(tmp_path)
    commands = [
        {"execute": "blockdev-add", "arguments": LAYERS},
        {"execute": "block-stream", "arguments": {"device": "top", "job-id": "j"}},
    ]
    logs = []
    for name, program in (("real", REAL_DAEMON), ("ours", OUR_DAEMON)):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "256k"], check=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "top.qcow2"], check=True)
        wanted = ["--trace", f"job_*,file={name}", "--trace", f"stream_start,file={name}", "--trace", f"qmp_block_s*,file={name}"]
        talk([*program, *wanted], commands, until="null")
        logs.append(comparable(tmp_path / name))
    real, ours = logs
    assert sorted(ours) == sorted(real)
    assert [line for line in ours if line.startswith("job_")] == [line for line in real if line.startswith("job_")]


def test_commands_leave_the_same_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments on the way in; on the way out the reply and 1, or the error (in our words) and 0.

    QEMU makes its greeting with query-version, and says so; ours comes without a command.
    """
    monkeypatch.chdir(tmp_path)
    commands = [
        {"execute": "blockdev-add", "arguments": NODE},
        {"execute": "query-jobs"},
        {"execute": "blockdev-del", "arguments": {"node-name": "nobody"}},
        {"execute": "blockdev-del", "arguments": {"name": "wrong member"}},
    ]
    logs = []
    for name, program in (("real", REAL_DAEMON), ("ours", OUR_DAEMON)):
        talk([*program, "--trace", f"qmp_en*,file={name}", "--trace", f"qmp_ex*,file={name}"], commands)
        lines = [line for line in (tmp_path / name).read_text().splitlines() if "_query_version" not in line]
        logs.append([re.sub(r"(qmp_exit_\w+) [^{\[].* 0$", r"\1 - 0", _sorted(line)) for line in lines])
    assert logs[1] == logs[0]


def _sorted(line: str) -> str:
    """The members of JSON in one order: QEMU prints them in that of its schema."""
    found = re.match(r"(\w+) (\{.*\}|\[.*\])(.*)", line)
    return f"{found[1]} {json.dumps(json.loads(found[2]), sort_keys=True)}{found[3]}" if found else line


def monitor_line(line: str) -> dict[str, Any]:
    """A line of the human monitor as a QMP command."""
    return {"execute": "human-monitor-command", "arguments": {"command-line": line}}


def test_monitors_tell_the_same_of_trace_events() -> None:
    """State asked for and changed, by name and by pattern, over QMP and at the prompt; mistakes in our own words."""
    get, change = "trace-event-get-state", "trace-event-set-state"
    commands: list[dict[str, Any]] = [
        {"execute": get, "arguments": {"name": "mirror_before_*"}},
        {"execute": get, "arguments": {"name": "nothing_like_*"}},
        {"execute": get, "arguments": {"name": "nothing"}},
        {"execute": get, "arguments": {"name": "mirror_start", "vcpu": 0}},
        {"execute": change, "arguments": {"name": "mirror_before_*", "enable": True}},
        {"execute": change, "arguments": {"name": "nothing", "enable": True, "ignore-unavailable": True}},
        {"execute": get, "arguments": {"name": "mirror_before_*"}},
        monitor_line("trace-event mirror_before_f* off"),
        monitor_line("trace-event nothing_like_* on"),
        monitor_line("info trace-events mirror_before_*"),
        monitor_line("info trace-events job_completed"),
    ]
    real, ours = (talk(program, commands) for program in (REAL_MACHINE, OUR_MACHINE))
    assert [_without_text(reply) for reply in ours] == [_without_text(reply) for reply in real]


def _without_text(reply: Any) -> Any:
    return {**reply, "error": reply["error"]["class"]} if "error" in reply else reply
