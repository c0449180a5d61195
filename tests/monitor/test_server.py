"""Monitors on real sockets: one client at a time, descriptors, permissions of the socket file, clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from qblock.errors import CommandError
from qblock.monitor.chardev import ChardevOptions, TcpAddress, UnixAddress, chardev_from, parse_short
from qblock.monitor.client import QmpClient, QmpError
from qblock.monitor.hub import MonitorHub
from qblock.monitor.qmp import Phase
from qblock.monitor.server import MonitorServer
from qblock.monitor.session import MAX_BACKLOG
from qblock.options import parse_keyval
from qblock.system import BlockSystem


def serve(options: ChardevOptions, test: Callable[[MonitorHub, MonitorServer], Awaitable[None]]) -> None:
    """Run ``test`` while a monitor is served."""

    async def main() -> None:
        async with BlockSystem.create() as system:
            hub = MonitorHub(system, report=lambda text: None)
            hub.open()
            async with MonitorServer(hub, options) as server:
                await asyncio.wait_for(test(hub, server), 60)
            await hub.close()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until ``condition`` holds."""
    while not condition():  # noqa: ASYNC110 - nobody signals what the tests look at
        await asyncio.sleep(0)


@pytest.fixture
def at(tmp_path: Path) -> ChardevOptions:
    """A listening unix socket."""
    return ChardevOptions("mon0", UnixAddress(str(tmp_path / "qmp")), server=True, wait=False)


def path_of(options: ChardevOptions) -> str:
    """The socket's file."""
    assert isinstance(options.address, UnixAddress)
    return options.address.path


def test_the_socket_file_is_private_and_goes_with_the_server(at: ChardevOptions) -> None:
    """Who can connect can do anything to the images."""

    async def test(hub: MonitorHub, server: MonitorServer) -> None:
        assert stat.S_IMODE(os.stat(path_of(at)).st_mode) == 0o600

    serve(at, test)
    assert not os.path.exists(path_of(at))


def test_a_stale_socket_file_is_replaced_and_another_file_is_not(at: ChardevOptions) -> None:
    """As QEMU does, save that a file which is no socket may be somebody's image."""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path_of(at))
    stale.close()

    async def test(hub: MonitorHub, server: MonitorServer) -> None:
        async with await QmpClient.connect(path_of(at)) as client:
            assert (await client.execute("query-version"))["qemu"]["major"] == 7

    serve(at, test)
    Path(path_of(at)).write_text("precious")
    with pytest.raises(CommandError, match="no socket"):
        serve(at, test)
    assert Path(path_of(at)).read_text() == "precious"


def test_a_socket_file_is_private_from_the_first_moment_and_there_only_once_it_can_be_connected_to(
    at: ChardevOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for the file and then connects must not be refused, nor anybody else be let in."""
    seen = []

    def rename(source: str, target: str, rename: Callable[[str, str], None] = os.rename) -> None:
        assert not os.path.exists(target)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(source)
        seen.append(stat.S_IMODE(os.stat(source).st_mode))
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename)

    async def test(hub: MonitorHub, server: MonitorServer) -> None:
        assert os.listdir(os.path.dirname(path_of(at))) == ["qmp"]

    serve(at, test)
    assert seen == [0o600]


@pytest.mark.parametrize("room", [0, -1])
def test_a_socket_path_may_be_as_long_as_the_system_allows_and_no_longer(room: int) -> None:
    """The name that a socket has at first must not take from what the user may choose."""

    async def test(hub: MonitorHub, server: MonitorServer) -> None:
        async with await QmpClient.connect(path) as client:
            assert (await client.execute("query-version"))["qemu"]["major"] == 7

    with tempfile.TemporaryDirectory(prefix="qblock") as directory:
        path = os.path.join(directory, "é" + "x" * (104 - len(directory) - room))
        options = ChardevOptions("mon0", UnixAddress(path), server=True, wait=False)
        if room == 0:
            serve(options, test)
        else:
            with pytest.raises(CommandError, match="107 bytes"):
                serve(options, test)
        assert os.listdir(directory) == []


def test_the_second_client_is_served_when_the_first_has_gone(at: ChardevOptions) -> None:
    """One client at a time, as on a character device of QEMU."""

    async def test(hub: MonitorHub, server: MonitorServer) -> None:
        first = await QmpClient.connect(path_of(at))
        second = asyncio.create_task(QmpClient.connect(path_of(at)))
        assert (await first.execute("query-chardev"))[0] == {
            "label": "mon0", "filename": f"unix:{path_of(at)},server=on", "frontend-open": True,
        }  # fmt: skip
        assert not second.done()
        await first.close()
        client = await second
        assert len(hub.sessions) == 1
        await client.close()

    serve(at, test)


def test_commands_sent_before_the_end_of_the_stream_are_answered(at: ChardevOptions) -> None:
    """``printf … | socat`` must work."""

    async def test(hub: MonitorHub, server: MonitorServer) -> None:
        reader, writer = await asyncio.open_unix_connection(path_of(at))
        writer.write(b'{"execute":"qmp_capabilities"}{"execute":"query-version","id":1}')
        writer.write_eof()
        lines = (await reader.read()).splitlines()
        assert [json.loads(line).get("id") for line in lines] == [None, None, 1]
        writer.close()

    serve(at, test)


def test_descriptors_come_with_getfd_and_are_closed_when_nobody_claims_them(at: ChardevOptions, tmp_path: Path) -> None:
    """Every path must close them: a forgotten descriptor keeps an image open."""
    (tmp_path / "file").write_text("x")

    def held() -> int:
        links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return sum(os.path.exists(link) and os.readlink(link) == str(tmp_path / "file") for link in links)

    async def test(hub: MonitorHub, server: MonitorServer) -> None:
        async with await QmpClient.connect(path_of(at)) as client:
            with open(tmp_path / "file", encoding="ascii") as file:
                with pytest.raises(QmpError, match="file descriptor"):
                    await client.execute("getfd", fdname="a")
                await client.execute("getfd", fdname="a", fds=[file.fileno()])
                assert held() == 2
                await client.execute("getfd", fdname="a", fds=[file.fileno()])
                assert held() == 2
                await client.execute("closefd", fdname="a")
                assert held() == 1
                with pytest.raises(QmpError, match="named 'a'"):
                    await client.execute("closefd", fdname="a")
                with pytest.raises(QmpError, match="digit"):
                    await client.execute("getfd", fdname="9", fds=[file.fileno()])
                await client.execute("query-version", fds=[file.fileno(), file.fileno()])
                assert held() == 3
                await client.execute("query-version", fds=[file.fileno()])
                assert held() == 2
                await client.execute("getfd", fdname="kept", fds=[file.fileno()])
                output = await client.execute("human-monitor-command", {"command-line": "getfd h"}, fds=[file.fileno()])
                assert output == ""
        await until(lambda: not hub.sessions)
        assert held() == 0

    serve(at, test)


def test_a_client_that_does_not_read_is_cut_off_and_hurts_nobody(at: ChardevOptions) -> None:
    """Events must not pile up without bound."""

    async def test(hub: MonitorHub, server: MonitorServer) -> None:
        _, writer = await asyncio.open_unix_connection(path_of(at), limit=1)
        writer.write(b'{"execute":"qmp_capabilities"}')
        await until(lambda: bool(hub.sessions) and hub.sessions[0].qmp.phase is Phase.COMMANDS)
        (session,) = hub.sessions
        for _ in range(2 * MAX_BACKLOG // 10_000):
            hub.system.emit("TEST", {"text": "x" * 10_000})
            assert session.link.backlog <= MAX_BACKLOG + 20_000
        await until(lambda: not hub.sessions)
        writer.close()
        async with await QmpClient.connect(path_of(at)) as client:
            await client.execute("query-version")

    serve(at, test)


def test_a_server_can_be_closed_while_a_client_does_not_read(at: ChardevOptions) -> None:
    """Nobody may keep the program from ending."""

    async def test(hub: MonitorHub, server: MonitorServer) -> None:
        _, writer = await asyncio.open_unix_connection(path_of(at), limit=1)
        writer.write(b'{"execute":"qmp_capabilities"}' + b'{"execute":"query-qmp-schema"}' * 100)
        await until(lambda: bool(hub.sessions) and hub.sessions[0].link.backlog > 1 << 16)
        await server.close()
        assert not hub.sessions
        writer.close()

    serve(at, test)


def test_standard_input_and_output_serve_a_client() -> None:
    """``--chardev stdio``, fed from a pipe or a file."""
    script = b'{"execute":"qmp_capabilities"}{"execute":"query-version","id":1}{"execute":"quit","id":2}'
    argv = [sys.executable, "-m", "qblock.tools.storage_daemon", "--chardev", "stdio,id=c", "--monitor", "chardev=c"]
    done = subprocess.run(argv, input=script, capture_output=True, timeout=60, check=True)
    assert [json.loads(line).get("id") for line in done.stdout.splitlines()] == [None, None, 1, 2]
    with tempfile.TemporaryFile() as file:
        file.write(script)
        file.seek(0)
        done = subprocess.run(argv, stdin=file, capture_output=True, timeout=60, check=True)
    assert [json.loads(line).get("id") for line in done.stdout.splitlines()] == [None, None, 1, 2]


def test_a_hundred_megabytes_in_one_message_are_an_error_and_the_connection_lives(at: ChardevOptions) -> None:
    """Hostile input: a clear error, bounded memory."""

    async def test(hub: MonitorHub, server: MonitorServer) -> None:
        reader, writer = await asyncio.open_unix_connection(path_of(at))
        await reader.readline()
        writer.write(b'{"execute":"qmp_capabilities"}')
        await reader.readline()
        writer.write(b'{"execute":"x","id":"')
        for _ in range(100):
            writer.write(b"a" * (1 << 20))
            await writer.drain()
        writer.write(b'"}{"execute":"query-version","id":7}')
        assert "larger" in json.loads(await reader.readline())["error"]["desc"]
        assert json.loads(await reader.readline())["id"] == 7
        writer.close()

    serve(at, test)


def test_tcp_works_too_and_shows_its_port() -> None:
    """Port 0 lets the system choose."""

    async def test(hub: MonitorHub, server: MonitorServer) -> None:
        assert server.filename == f"disconnected:tcp:127.0.0.1:{server.port},server=on"
        async with await QmpClient.connect(TcpAddress("127.0.0.1", server.port)) as client:
            (chardev,) = await client.execute("query-chardev")
            assert " <-> 127.0.0.1:" in chardev["filename"]

    serve(parse_short("tcp:127.0.0.1:0,server=on,wait=off", "t"), test)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("socket,id=c,path=/p,server=on,wait=off", ChardevOptions("c", UnixAddress("/p"), True, False)),
        ("socket,id=c,path=/p", ChardevOptions("c", UnixAddress("/p"), False, False)),
        ("socket,id=c,host=::1,port=1,server=on", ChardevOptions("c", TcpAddress("::1", 1), True, True)),
        ("stdio,id=c", ChardevOptions("c", None)),
    ],
)
def test_chardev_options_are_read_as_qemu_reads_them(text: str, expected: ChardevOptions) -> None:
    """The defaults: connect, and if listening, wait."""
    assert chardev_from(parse_keyval(text, implied_key="backend")) == expected


@pytest.mark.parametrize(
    "text",
    ["socket,path=/p", "socket,id=c", "pipe,id=c", "socket,id=c,path=/p,bogus=1", "socket,id=c,path=/p,wait=off"],
)
def test_chardev_options_that_do_not_fit_are_refused(text: str) -> None:
    """No option is accepted and ignored."""
    with pytest.raises(CommandError):
        chardev_from(parse_keyval(text, implied_key="backend"))


@pytest.mark.parametrize("text", ["unix:/p,server,nowait", "unix:/p,server=on,wait=off"])
def test_the_short_form_takes_old_and_new_switches(text: str) -> None:
    """Old command lines still exist."""
    assert parse_short(text, "m") == ChardevOptions("m", UnixAddress("/p"), True, False)


def test_commas_in_the_path_of_the_short_form_are_written_twice() -> None:
    """As in every option of QEMU; an equals sign is just a character."""
    assert parse_short("unix:/a,,b=c,server=on,wait=off", "m") == ChardevOptions("m", UnixAddress("/a,b=c"), True, False)
    for text in ("", "unix:", "unix:/a,b", "tcp:host", "ptyx"):
        with pytest.raises(CommandError):
            parse_short(text, "m")
