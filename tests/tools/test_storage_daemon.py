"""qblock-storage-daemon as a process: options in order, QMP over sockets, signals, background, refusals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qblock.tools.storage_daemon import main

PROGRAM = [sys.executable, "-m", "qblock.tools.storage_daemon"]


class Monitor:
    """A bare QMP client on a socket file: JSON values, however they are cut."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.text = ""
        assert "QMP" in self.next()
        assert self.ask("qmp_capabilities") == {"return": {}}

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def next(self) -> dict[str, Any]:
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text)
            except json.JSONDecodeError:
                data = self.socket.recv(65536)
                assert data, "the daemon has closed the connection"
                self.text += data.decode()
            else:
                self.text = self.text[end:].lstrip()
                return dict(value)

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "event" in (answer := self.next()):
            pass
        return answer


@contextmanager
def daemon(*args: str) -> Iterator[subprocess.Popen[str]]:
    """A running daemon that is ready (its pid file is there)."""
    ready = Path("ready.pid").absolute()
    with subprocess.Popen(
        [*PROGRAM, *args, "--pidfile", str(ready)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while not (ready.exists() and ready.read_text().endswith("\n")):
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                os.sched_yield()
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


DISK = ("--blockdev", "driver=memory,node-name=disk,size=1M")
SOCKET = ("--chardev", "socket,id=c,path=qmp,server=on,wait=off", "--monitor", "chardev=c")


@pytest.mark.parametrize(
    "monitor",
    [
        SOCKET,
        (
            "--chardev",
            '{"backend": "socket", "id": "c", "path": "qmp", "server": true, "wait": false}',
            "--monitor",
            "c",
        ),
        (*SOCKET[:3], '{"chardev": "c", "mode": "control"}'),
    ],
)
def test_nodes_and_monitors_are_set_up_and_quit_ends_it(monitor: tuple[str, ...]) -> None:
    """Key=value and JSON spellings mean the same."""
    with daemon(*DISK, "--blockdev", '{"driver": "raw", "node-name": "top", "file": "disk"}', *monitor) as process:
        with Monitor("qmp") as qmp:
            nodes = qmp.ask("query-named-block-nodes")["return"]
            assert [node["node-name"] for node in nodes] == ["top", "disk"]
            assert qmp.ask("quit") == {"return": {}}
        assert process.wait(20) == 0
    assert not Path("qmp").exists()
    assert not Path("ready.pid").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_cleanly(number: signal.Signals) -> None:
    """Images are flushed and closed: the qcow2 file is clean afterwards."""
    from qblock.tools.img import main as img

    assert img(["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]) == 0
    blockdev = "driver=qcow2,node-name=a,file.driver=file,file.filename=a.qcow2"
    with daemon("--blockdev", blockdev, *SOCKET) as process:
        with Monitor("qmp"):
            process.send_signal(number)
            assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert img(["check", "-q", "a.qcow2"]) == 0
    assert not Path("qmp").exists()


def test_daemonize_returns_when_clients_can_connect() -> None:
    """A script may go on at once: the socket is there, the pid file too."""
    done = subprocess.run(
        [*PROGRAM, *DISK, *SOCKET, "--pidfile", "pid", "--daemonize"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with Monitor("qmp") as qmp:
        assert int(Path("pid").read_text()) > 0
        assert qmp.ask("quit") == {"return": {}}
    while os.path.exists("pid"):
        os.sched_yield()


def test_daemonize_reports_failures_of_the_set_up() -> None:
    """The exit code and the message are the caller's to see."""
    done = subprocess.run(
        [*PROGRAM, "--daemonize", "--blockdev", "driver=file,node-name=a,filename=missing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "missing" in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--export", "nbd,id=e,node-name=disk"], "exports are not supported"),
        (["--nbd-server", "addr.type=unix,addr.path=x"], "exports are not supported"),
        (["--monitor", "chardev=nobody"], "there is no character device 'nobody'"),
        (["--chardev", "socket,id=c,path=qmp,server=on,wait=off"], "no --monitor uses"),
        (["--chardev", "spice,id=c"], "spice"),
        (["--chardev", "stdio"], "id"),
        (["--chardev", "stdio,id=c", "--monitor", "chardev=c,mode=readline"], "control"),
        (["--blockdev", "driver=memory,size=1M"], "node-name"),
        (["--blockdev", "driver=nonsense,node-name=a"], "nonsense"),
        (["--blockdev", "{broken"], "JSON"),
        (["--blockdev", "driver=memory,node-name=a,size=1M", "--blockdev", "driver=memory,node-name=a"], "a"),
        (["--object", "nonsense,id=o"], "nonsense"),
        (["--trace", "events=nowhere"], "cannot read 'nowhere'"),
        (["--trace", "file=/nowhere/log"], "cannot write '/nowhere/log'"),
        (["--trace", "enable=*,timestamp=maybe"], "timestamp"),
        (["--trace", "enable=*,other=1"], "other"),
        (["--nonsense"], "not understood"),
        (["word"], "Unexpected argument: word"),
    ],
)
def test_mistakes_are_refused_with_a_reason(args: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, one message, and nothing is left behind."""
    assert main(args) == 1
    error = capfd.readouterr().err
    assert error.startswith("qblock-storage-daemon: ")
    assert said in error
    assert not Path("qmp").exists()


def test_options_are_carried_out_in_their_order(capfd: pytest.CaptureFixture[str]) -> None:
    """A node can only refer to nodes that were given before it."""
    top = ("--blockdev", "driver=raw,node-name=top,file=disk")
    assert main([*top, *DISK]) == 1
    assert "disk" in capfd.readouterr().err


def test_help_version_and_the_list_of_trace_events(capfd: pytest.CaptureFixture[str]) -> None:
    """They answer and end, whatever else is on the line."""
    lists = ((["-T", "help"], "qmp_event_block_job_ready"), (["--trace", "?"], "mirror_start"))
    for args, said in ((["--help"], "--blockdev"), (["-V"], "7.2"), *lists):
        assert main(args) == 0
        assert said in capfd.readouterr().out


@pytest.mark.parametrize(
    "trace", ["enable=*,file=log", '{"enable": "qmp_event_*", "file": "log"}', "qmp_event_job_*,file=log"]
)
def test_traces_show_what_happened(trace: str) -> None:
    """One line for each event of the chosen names."""
    with daemon("-T", trace, *DISK, "--blockdev", "driver=memory,node-name=copy,size=1M", *SOCKET) as process:
        with Monitor("qmp") as qmp:
            answer = qmp.ask("blockdev-mirror", **{"job-id": "j", "device": "disk", "target": "copy", "sync": "full"})
            assert answer == {"return": {}}
            qmp.ask("quit")
        assert process.wait(20) == 0
    lines = Path("log").read_text().splitlines()
    assert "qmp_event_job_status_change id=j status=created" in lines
    assert ("program_ready" in lines) == trace.startswith("enable=*")


def test_a_monitor_on_standard_input_and_output() -> None:
    """`--chardev stdio`: the way to talk to it from a pipe."""
    script = '{"execute":"qmp_capabilities"}{"execute":"query-version"}\n{"execute":"quit"}'
    done = subprocess.run(
        [*PROGRAM, *DISK, "--chardev", "stdio,id=c", "--monitor", "chardev=c"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    values = [json.loads(line) for line in done.stdout.splitlines()]
    assert "QMP" in values[0]
    assert values[2]["return"]["qemu"]["major"] == 7


def test_the_client_from_pypi_works_with_it() -> None:
    """qemu.qmp is what people use: connect, execute, events, disconnect."""
    qmp = pytest.importorskip("qemu.qmp")

    async def talk() -> list[str]:
        client = qmp.QMPClient("test")
        await client.connect("qmp")
        names = [node["node-name"] for node in await client.execute("query-named-block-nodes")]
        await client.disconnect()
        return names

    with daemon(*DISK, *SOCKET):
        assert asyncio.run(talk()) == ["disk"]
        assert asyncio.run(talk()) == ["disk"], "and a second client after the first"


def test_the_driver_of_a_node_may_stand_first_without_its_key() -> None:
    """As qemu-storage-daemon takes it."""
    with daemon("--blockdev", "memory,node-name=disk,size=1M", *SOCKET), Monitor("qmp") as monitor:
        assert [node["node-name"] for node in monitor.ask("query-named-block-nodes")["return"]] == ["disk"]
        assert monitor.ask("quit") == {"return": {}}


def test_the_line_about_a_new_image_stays_out_of_the_way_of_a_client() -> None:
    """QEMU prints it to standard output; where a client reads that, it goes to standard error."""
    commands = [
        {"execute": "qmp_capabilities"},
        {"execute": "blockdev-snapshot-sync",
         "arguments": {"node-name": "disk", "snapshot-node-name": "top", "snapshot-file": "top.qcow2"}},
        {"execute": "quit"},
    ]  # fmt: skip
    Path("disk.raw").write_bytes(bytes(1 << 20))
    node = "driver=raw,node-name=disk,file.driver=file,file.filename=disk.raw"
    done = subprocess.run(
        [*PROGRAM, "--blockdev", node, "--chardev", "stdio,id=c", "--monitor", "c"],
        input="".join(map(json.dumps, commands)), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == (
        "Formatting 'top.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib size=1048576 "
        "backing_file=disk.raw backing_fmt=raw lazy_refcounts=off refcount_bits=16\n"
    )
    assert all(json.loads(line) for line in done.stdout.splitlines())


def test_that_nobody_reads_its_messages_any_more_is_nothing_to_it() -> None:
    """Whoever collected the log has gone: commands that say something are answered all the same, as by QEMU."""
    commands = [
        {"execute": "qmp_capabilities"},
        {"execute": "blockdev-snapshot-sync",
         "arguments": {"node-name": "disk", "snapshot-node-name": "top", "snapshot-file": "top.qcow2"}},
        {"execute": "query-jobs"},
        {"execute": "quit"},
    ]  # fmt: skip
    Path("disk.raw").write_bytes(bytes(1 << 20))
    node = "driver=raw,node-name=disk,file.driver=file,file.filename=disk.raw"
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*PROGRAM, "--blockdev", node, "--chardev", "stdio,id=c", "--monitor", "c"],
            input="".join(map(json.dumps, commands)), stdout=subprocess.PIPE, stderr=writing, text=True, timeout=60, check=True,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert ["return" in json.loads(line) for line in done.stdout.splitlines()[1:]] == [True] * 4
    assert Path("top.qcow2").exists()


def test_it_speaks_the_dialects_of_2012_too() -> None:
    """A node takes the place of the device; a signal leaves a mirror that is in sync as two equal images."""
    from qblock.tools.img import main as img

    assert img(["create", "-q", "-f", "qcow2", "a.qcow2", "2M"]) == 0
    blockdev = "driver=qcow2,node-name=a,file.driver=file,file.filename=a.qcow2"
    with daemon("--dialect", "rfc-2012", "--blockdev", blockdev, *SOCKET) as process, Monitor("qmp") as qmp:
        assert qmp.ask("query-jobs")["error"]["class"] == "CommandNotFound"
        assert qmp.ask("drive-mirror", device="none", target="t", full=True)["error"]["class"] == "DeviceNotFound"
        assert qmp.ask("drive-mirror", device="a", target="copy.qcow2", full=True) == {"return": {}}
        while (job := qmp.ask("query-block-jobs")["return"][0])["offset"] < job["len"]:
            os.sched_yield()
        assert job == {"type": "mirror", "device": "a", "len": 2 << 20, "offset": 2 << 20, "speed": 0}
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert img(["compare", "a.qcow2", "copy.qcow2"]) == 0


def test_its_default_dialect_is_the_daemons_own() -> None:
    """7.2 means the storage daemon of 7.2 here, which has no machine to stop; what is no dialect is refused."""
    with daemon("--dialect", "7.2", *DISK, *SOCKET), Monitor("qmp") as qmp:
        assert qmp.ask("stop")["error"]["class"] == "CommandNotFound"
        assert qmp.ask("quit") == {"return": {}}
    done = subprocess.run([*PROGRAM, "--dialect", "rfc-2011"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "rfc-2012" in done.stderr
