"""Reading scripts, matching replies, and runs against a scripted server."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from qblock.clock import LoopClock
from qblock.errors import CommandError
from qblock.monitor.replay import (
    Execute,
    GuestPort,
    JsonTranscript,
    MonitorGuest,
    Replay,
    ReplayFailure,
    StreamWire,
    TextTranscript,
    Transcript,
)
from qblock.monitor.script import (
    Advance,
    Command,
    Comment,
    Expect,
    GuestIO,
    ScriptError,
    Wait,
    differences,
    matches,
    parse_script,
)
from qblock.testing.simloop import run

SECOND = 1_000_000_000

# ------------------------------------------------------------------------------------------------------------- reading


def test_a_script_is_a_stream_of_values_with_comments() -> None:
    """Values may share lines or spread over several; comment signs inside strings are text."""
    steps = parse_script("""
        # set up
        {"execute": "blockdev-add", "id": 1,   // the disk
         "arguments": {"driver": "file", "filename": "/tmp/a#b//c"}}
        {"expect": {"return": {}}} {"advance": "10s"} {"advance": 1.5}
        {"wait": {"event": "BLOCK_JOB_READY", "data": {"device": "j"}, "timeout": "100ms"}}
        {"wait": "STOP"}
        {"guest": {"device": "virtio0", "write": {"offset": "64k", "length": 512, "pattern": 7}}}
        {"guest": {"device": "virtio0", "read": {"offset": 0, "length": 512}}} {"guest": {"device": "d", "flush": {}}}
        {"comment": "done"}
    """)
    assert steps == [
        Command(3, {"execute": "blockdev-add", "id": 1, "arguments": {"driver": "file", "filename": "/tmp/a#b//c"}}),
        Expect(5, {"return": {}}),
        Advance(5, 10 * SECOND),
        Advance(5, 3 * SECOND // 2),
        Wait(6, "BLOCK_JOB_READY", {"device": "j"}, SECOND // 10),
        Wait(7, "STOP", {}),
        GuestIO(8, "virtio0", "write", 65536, 512, 7),
        GuestIO(9, "virtio0", "read", 0, 512),
        GuestIO(9, "d", "flush"),
        Comment(10, "done"),
    ]


def test_variables_are_filled_into_strings() -> None:
    """One script for any directory."""
    (step,) = parse_script('{"execute": "x", "arguments": {"a": ["${DIR}/f", 1]}}', {"DIR": "/tmp/d"})
    assert isinstance(step, Command)
    assert step.message["arguments"] == {"a": ["/tmp/d/f", 1]}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("\n\n{oops", "line 3: not JSON"),
        ("[1]", "line 1: a step is a JSON object"),
        ("{}", "a step is a JSON object"),
        ('{"expct": {}}', "'expct' is not a step"),
        ('{"expect": {}, "advance": 1}', "a step has one member"),
        ('{"wait": {"data": {}}}', "wait needs 'event'"),
        ('{"wait": {"event": "X", "tiemout": 1}}', "wait does not know 'tiemout'"),
        ('{"wait": {"event": 1}}', "has the wrong type"),
        ('{"wait": 7}', "wait wants an object"),
        ('{"advance": "soon"}', "is not a duration"),
        ('{"guest": {"device": "d"}}', "exactly one of write, read and flush"),
        ('{"guest": {"device": "d", "read": {"offset": 0, "length": "x"}}}', "is not a size"),
        ('{"guest": {"device": "d", "write": {"offset": 0, "length": 1, "pattern": 256}}}', "pattern is a byte"),
        ('{"execute": "${WHERE}"}', "--define WHERE=VALUE"),
    ],
)
def test_a_mistake_in_a_script_is_reported_with_its_line(text: str, complaint: str) -> None:
    """Nothing has been sent yet when a script turns out to be wrong."""
    with pytest.raises(ScriptError) as caught:
        parse_script(text)
    assert complaint in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- comparing


@pytest.mark.parametrize(
    ("pattern", "actual"),
    [
        ({}, {"a": 1}), ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}, "d": 3}), ([{"a": 1}, {}], [{"a": 1, "b": 2}, {"c": 3}]),
        ("x", "x"), (None, None), (1, 1.0), ([], []),
    ],
)  # fmt: skip
def test_a_pattern_matches_when_it_is_part_of_the_reply(pattern: Any, actual: Any) -> None:
    """Scripts mention what matters; everything else may differ between servers and versions."""
    assert matches(pattern, actual)


@pytest.mark.parametrize(
    ("pattern", "actual", "complaint"),
    [
        ({"a": [{"b": 1}]}, {"a": [{"b": 2}]}, "at a[0].b: expected 1, got 2"),
        ({"a": 1}, {"b": 1}, "at a: expected 1, got no such member (there are: b)"),
        ({"a": 1}, {}, "at a: expected 1, got no such member"),
        ([1], [1, 2], "at the top: expected 1 items, got 2 items: [1, 2]"),
        ({"a": True}, {"a": 1}, "at a: expected true, got 1"),
        ({"a": {}}, {"a": []}, "at a: expected {}, got []"),
    ],
)
def test_a_difference_says_which_path_what_was_expected_and_what_came(
    pattern: Any, actual: Any, complaint: str
) -> None:
    """The first thing a person wants to know about a failed script."""
    assert [str(item) for item in differences(pattern, actual)] == [complaint]
    assert not matches(pattern, actual)


# ------------------------------------------------------------------------------------------------------------- running


@attrs.define
class ScriptedServer:
    """A `Wire` to a server that answers each command with prepared messages; a number among them is a delay in ns."""

    answers: list[list[Any]]
    sent: list[Any] = attrs.field(factory=list)
    _out: asyncio.Queue[Any] = attrs.field(init=False, factory=asyncio.Queue)

    def __attrs_post_init__(self) -> None:
        self._out.put_nowait({"QMP": {}})

    async def send(self, value: Any) -> None:
        self.sent.append(value)
        answer = [{"return": {}}] if value.get("execute") == "qmp_capabilities" else self.answers.pop(0)
        for message in answer:
            self._out.put_nowait(message)

    async def receive(self) -> Any:
        while isinstance(message := await self._out.get(), int):
            await LoopClock().sleep_ns(message)
        return message


@attrs.define
class RecordingGuest:
    """A `GuestPort` that remembers what it was asked."""

    requests: list[GuestIO] = attrs.field(factory=list)

    async def perform(self, request: GuestIO, execute: Execute) -> str:
        self.requests.append(request)
        if request.device == "broken":
            raise OSError(5, "Input/output error")
        return "done"


def replay(
    script: str,
    *answers: list[Any],
    transcript: Callable[[Callable[[str], object]], Transcript] = TextTranscript,
    guest: GuestPort | None = None,
) -> tuple[str, ScriptedServer, RecordingGuest, Exception | None]:
    """Run a script on virtual time; returns transcript, server, guest and what failed."""
    out = io.StringIO()

    async def main() -> tuple[ScriptedServer, RecordingGuest, Exception | None]:
        server, recording = ScriptedServer(list(answers)), RecordingGuest()
        try:
            await Replay(server, LoopClock(), transcript(out.write), guest or recording).run(parse_script(script))
        except ReplayFailure as failure:
            return server, recording, failure
        return server, recording, None

    server, recording, failure = run(main)
    return out.getvalue(), server, recording, failure


def test_a_run_is_written_down_in_both_directions_with_times() -> None:
    """The transcript is what one reads, compares and mails around."""
    text, server, _, failure = replay(
        '{"execute": "go", "id": 1} {"expect": {"return": 7}} {"advance": "2s"} {"comment": "bye"}',
        [{"return": 7, "id": 1}],
    )
    assert failure is None
    assert server.sent == [{"execute": "qmp_capabilities"}, {"execute": "go", "id": 1}]
    assert text.splitlines() == [
        '[    0.000000] <- {"QMP": {}}',
        '[    0.000000] -> {"execute": "qmp_capabilities"}',
        '[    0.000000] <- {"return": {}}',
        '[    0.000000] -> {"execute": "go", "id": 1}',
        '[    0.000000] <- {"return": 7, "id": 1}',
        "[    0.000000] ok the last reply is as expected",
        "[    0.000000] -- advance 2s",
        "[    2.000000] -- bye",
        "[    2.000000] ok the script has run to its end",
    ]


def test_the_json_transcript_is_one_object_a_line() -> None:
    """For programs that read along."""
    text, *_ = replay('{"advance": "1500ms"}', transcript=JsonTranscript)
    entries = [json.loads(line) for line in text.splitlines()]
    assert entries[-1] == {"time": 1.5, "kind": "ok", "value": "the script has run to its end"}
    assert [entry["kind"] for entry in entries] == ["received", "sent", "received", "step", "ok"]


def test_a_script_that_negotiates_itself_is_left_alone() -> None:
    """`enable: [oob]` is the script's business."""
    _, server, _, failure = replay('{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
    assert failure is None
    assert len(server.sent) == 1


def test_the_first_unmet_expectation_ends_the_run() -> None:
    """Nothing is sent after it, and the message names path, expected and got."""
    text, server, _, failure = replay(
        '{"execute": "a"}\n{"expect": {"return": {"status": "ready"}}}\n{"execute": "b"}',
        [{"return": {"status": "running"}}],
    )
    assert str(failure) == (
        'line 2: the last reply is not as expected; at return.status: expected "ready", got "running"'
    )
    assert len(server.sent) == 2
    assert "FAILED line 2" in text


def test_wait_takes_the_oldest_event_that_fits_and_each_only_once() -> None:
    """Two jobs send the same events; the data tell them apart, and two waits want two events."""
    ready = [{"event": "READY", "data": {"device": name}} for name in "ab"]
    text, _, _, failure = replay(
        '{"execute": "go"} {"wait": {"event": "READY", "data": {"device": "b"}}} {"wait": "READY"} {"wait": "READY"}',
        [{"return": {}}, SECOND, *ready, 5 * SECOND, ready[0]],
    )
    assert failure is None
    assert text.count("READY has come") == 3
    assert "[    6.000000] ok READY has come" in text


def test_wait_gives_up_after_its_timeout_and_says_what_came_instead() -> None:
    """On virtual time 30 s of waiting cost nothing."""
    event = {"event": "JOB_STATUS_CHANGE", "data": {"id": "j", "status": "running"}}
    wait = '{"wait": {"event": "JOB_STATUS_CHANGE", "data": {"status": "ready"}, "timeout": "2s"}}'
    text, _, _, failure = replay('{"execute": "go"}' + wait, [{"return": {}}, event])
    assert 'at status: expected "ready", got "running"' in str(failure)
    assert "[    2.000000] FAILED" in text
    _, _, _, failure = replay('{"execute": "go"} {"wait": {"event": "STOP"}}', [{"return": {}}, event])
    assert "did not come within 30s; what came instead: JOB_STATUS_CHANGE" in str(failure)


def test_a_reply_with_another_id_is_a_failure() -> None:
    """The ids show that replies and commands belong together."""
    *_, failure = replay('{"execute": "a", "id": 1}', [{"return": {}, "id": 2}])
    assert "the reply has the id 2, not 1" in str(failure)


@pytest.mark.parametrize("script", ['{"execute": "a"}', '{"execute": "b"} {"wait": "X"}'])
def test_a_server_that_goes_away_ends_the_run(script: str) -> None:
    """Nothing hangs: neither the wait for a reply nor the one for an event."""
    *_, failure = replay(script, [None] if '"a"' in script else [{"return": {}}, None])
    assert "the server has closed the connection" in str(failure)


def test_guest_requests_go_to_the_guest() -> None:
    """The guest is not the monitor: it reaches its disk by its own way."""
    _, _, guest, failure = replay('{"guest": {"device": "d", "write": {"offset": 0, "length": 512, "pattern": 1}}}')
    assert failure is None
    assert guest.requests == [GuestIO(1, "d", "write", 0, 512, 1)]
    *_, failure = replay('{"guest": {"device": "broken", "flush": {}}}')
    assert "the guest's flush failed" in str(failure)


def test_a_foreign_servers_guest_is_reached_through_hmp() -> None:
    """One script, two servers: QEMU's own disks are written with the HMP command qemu-io."""
    sent: list[Any] = []

    async def execute(command: str, arguments: Any) -> str:
        sent.append((command, arguments["command-line"]))
        return "Error: no such device\r\n" if "nope" in arguments["command-line"] else ""

    async def main() -> None:
        guest = MonitorGuest()
        assert await guest.perform(GuestIO(1, "virtio0", "write", 0, 512, 7), execute) == "done"
        assert "stays with the server" in await guest.perform(GuestIO(1, "virtio0", "read", 0, 512, 7), execute)
        with pytest.raises(CommandError, match="no such device"):
            await guest.perform(GuestIO(1, "nope", "flush"), execute)

    run(main)
    assert sent == [
        ("human-monitor-command", 'qemu-io virtio0 "write -P 7 0 512"'),
        ("human-monitor-command", 'qemu-io virtio0 "read -P 7 0 512"'),
        ("human-monitor-command", 'qemu-io nope "flush"'),
    ]


def test_the_guests_commands_are_not_what_expect_looks_at() -> None:
    """They go over the script's own connection, since a server may serve one client only."""
    _, server, _, failure = replay(
        '{"execute": "a"} {"guest": {"device": "d", "flush": {}}} {"expect": {"return": 1}}',
        [{"return": 1}], [{"event": "X"}, {"return": ""}], guest=MonitorGuest(),
    )  # fmt: skip
    assert failure is None
    assert server.sent[-1]["execute"] == "human-monitor-command"
    *_, failure = replay(
        '{"guest": {"device": "d", "flush": {}}}', [{"error": {"desc": "no HMP here"}}], guest=MonitorGuest()
    )
    assert "no HMP here" in str(failure)


def test_a_stream_wire_reads_values_not_lines(tmp_path: Path) -> None:
    """A server may send several values in one piece, or one in several."""
    path = str(tmp_path / "qmp")

    async def main() -> list[Any]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(b'{"QMP": {}} {"ret')
            await asyncio.sleep(1)
            writer.write(b'urn": [1,\n2]}')
            writer.close()
            await writer.wait_closed()

        async with await asyncio.start_unix_server(serve, path):
            wire = await StreamWire.connect(f"unix:{path}")
            await wire.send({"execute": "x"})
            received = [await wire.receive(), await wire.receive(), await wire.receive()]
            await wire.close()
        return received

    assert run(main) == [{"QMP": {}}, {"return": [1, 2]}, None]
