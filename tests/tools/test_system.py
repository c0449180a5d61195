"""qblock-system: what it answers, accepts, refuses; its monitors, its clock, its beginning and its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qblock.options import split_opts
from qblock.tools.arguments import UsageError
from qblock.tools.system import main
from qblock.tools.system_options import FLAGS, IDLE_FLAGS, IDLE_VALUED, REFUSED, VALUED, Given, parse_options
from qblock.tools.system_plan import Plan

PROGRAM = (sys.executable, "-m", "qblock.tools.system")


# ---------------------------------------------------------------------------------------------------------- the command line


def test_every_option_is_in_one_table() -> None:
    """An option has an effect, or none, or is refused."""
    tables = [VALUED, FLAGS, IDLE_VALUED, IDLE_FLAGS, frozenset(REFUSED)]
    assert len(frozenset().union(*tables)) == sum(map(len, tables))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_had_is_refused_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the reason, and exit code 1."""
    assert main([f"-{name}", "x"]) == 1
    assert REFUSED[name] in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["-nosuch"], ["-drive"], ["--drive=x"], ["-S", "-set", "drive.x.file=y"], ["-set", "x"]])
def test_what_is_no_option_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As in QEMU: no values after an equals sign, no -set before what it is about."""
    assert main(argv) == 1
    assert "qblock-system: " in capsys.readouterr().err


def test_a_file_of_options_and_settings_become_options(tmp_path: Path) -> None:
    """-readconfig and -set; a comma in a value is written twice in key=value text."""
    file = tmp_path / "m.cfg"
    file.write_text('# mine\n[drive "d"]\n  file = "a,b"\n\n[machine]\ntype = "q35"\n')
    given = parse_options(["-readconfig", str(file), "-set", "drive.d.if=none", "--S", "disk.img"])
    assert given == [
        Given("drive", "id=d,file=a,,b,if=none"), Given("machine", "type=q35"), Given("S"), Given("hda", "disk.img"),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["[nosuch]", "key = 1", 'key = "v"', "[drive", '[set "x"]', "[drive]\nnonsense"])
def test_a_file_that_is_no_file_of_options_is_refused(text: str, tmp_path: Path) -> None:
    """With the number of the line."""
    file = tmp_path / "m.cfg"
    file.write_text(text)
    with pytest.raises(UsageError, match="line"):
        parse_options(["-readconfig", str(file)])


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["-version"], "QEMU emulator version 7.2.22"),
        (["-help"], "usage: qblock-system"),
        (["-machine", "help"], "pc-i440fx-7.2        Standard PC (i440FX + PIIX, 1996) (default)"),
        (["-device", "help"], 'name "scsi-cd", bus SCSI, desc "virtual SCSI CD-ROM"'),
        (["-device", "lsi,help"], "lsi53c895a options:"),
        (["-device", "virtio-net,help"], "virtio-net-pci options:"),
        (["-accel", "help"], "Accelerators supported in QEMU binary:\ntcg"),
        (["-object", "help"], "  throttle-group"),
        (["-chardev", "help"], "  socket"),
        (["-cpu", "help"], "Available CPUs:"),
        (["-trace", "help"], "mirror_start"),
    ],
)
def test_questions_are_answered(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Management software asks before it starts a machine."""
    assert main(argv) == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["-machine", "nosuch"],
        ["-machine", "pc,nosuch=1"],
        ["-machine", "pc,pflash7=x"],
        ["-accel", "nosuch"],
        ["-vga", "nosuch"],
        ["-m", "nosuch"],
        ["-smp", "nosuch"],
        ["-uuid", "nosuch"],
        ["-seed", "nosuch"],
        ["-global", "nosuch"],
        ["-action", "reboot=nosuch"],
        ["-chardev", "null,id=c", "-chardev", "null,id=c"],
        ["-chardev", "null,id=c", "-mon", "c", "-mon", "c"],
        ["-mon", "nosuch"],
        ["-chardev", "null,id=c", "-mon", "c,mode=nosuch"],
        ["-chardev", "null,id=c", "-mon", "c,nosuch=1"],
        ["-qmp", "nosuch:x"],
        ["-device", "{"],
        ["-device", "nosuch,help"],
        ["-object", "nosuch,id=x"],
        ["-add-fd", "fd=1,set=1"],
        ["-add-fd", "fd=999,set=1"],
        ["-add-fd", "fd=x,set=1"],
        ["-pidfile", "/nosuch/pid"],
    ],
)
def test_mistakes_end_with_code_1(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is served."""
    assert main(["-nodefaults", "-S", *argv]) == 1
    assert capsys.readouterr().err.startswith("qblock-system: ")


@pytest.mark.parametrize(
    "argv",
    [
        ["-name", "x,nosuch=1"], ["-m", "64,nosuch=1"], ["-m", "64,slots"], ["-rtc", "nosuch=1"], ["-msg", "timestamp=x"],
        ["-sandbox", "nosuch"], ["-action", "panic=nosuch"], ["-overcommit", "nosuch=1"], ["-chardev", "null,id=1"],
        ["-tb-size", "5"], ["-chardev", "null,id=c", "-chardev", "null,id=d", "-mon", "c,id=m", "-mon", "d,id=m"],
        ["-smp", "256"], ["-smp", "2,sockets=3"], ["-smp", "2,maxcpus=1"], ["-m", "1G,slots=1"], ["-m", "1G,maxmem=512M"],
        ["-boot", "x"], ["-boot", "cc"], ["-boot", "once=1"], ["-boot", "splash-time=70000"], ["-rtc", "base=nosuch"],
        ["-rtc", "clock=nosuch"], ["-watchdog-action", "nosuch"], ["-drive", "if=none,throttling.bps-read=1M"],
        ["-drive", "if=none,file=x,node-name="], ["-parallel", "null"] * 4, ["-qmp", "unix:q,server,nowait,reconnect=0"],
        ["-drive", "disk.img"], ["-smp", "2,nosuch=1"], ["-uuid", "11111111222233334444555555555555"],
    ],
)  # fmt: skip
def test_what_has_no_effect_is_checked_all_the_same(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake in an option is a mistake, as in the real program."""
    assert main(["-nodefaults", "-S", *argv]) == 1
    assert capsys.readouterr().err.startswith("qblock-system: ")


def test_a_word_alone_is_a_switch(tmp_path: Path) -> None:
    """Older scripts say ``server,nowait``; a comma in a value is written twice, and the first word may stand for its option."""
    assert split_opts("socket,path=a,,b,server,nowait,", implied_key="backend") == {
        "backend": "socket", "path": "a,b", "server": "on", "wait": "off",
    }  # fmt: skip
    with running(tmp_path, "-S", "-chardev", "socket,id=c,path=q,server,nowait", "-mon", "c,mode=control,pretty"):
        client = Client(tmp_path / "q")
        assert client.line() == "{\n"
        client.lines.close()
        client.socket.close()


def test_defaults_give_way_to_what_was_asked_for() -> None:
    """As the real program decides it."""
    asked = ["-device", "ide-cd", "-nic", "none", "-serial", "null", "-serial", "null", "-smp", "2,cores=2"]
    plan = Plan.of(parse_options(asked))
    assert list(plan.default_drives) == ["floppy", "sdcard"]
    assert (plan.fittings.nic, plan.fittings.serial, plan.fittings.vga, plan.fittings.cpu) == (0, 2, 1, 2)
    assert not Plan.of(parse_options(["-nodefaults"])).default_drives
    assert Plan.of(parse_options(["-smp", "sockets=2,cores=3"])).fittings.cpu == 6
    assert Plan.of(parse_options(["-machine", "none,accel=kvm:qtest"])).virtual_time


# ------------------------------------------------------------------------------------------------------------- the program


@contextmanager
def running(tmp_path: Path, *options: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """The program in a directory; it must be gone at the end."""
    line = [*PROGRAM, "-nodefaults", *options]
    with subprocess.Popen(
        line, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


class Client:
    """A connection to a socket of the program, by bytes or by lines."""

    def __init__(self, path: Path) -> None:
        for _ in range(1500):
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(str(path))
            except OSError:
                self.socket.close()
                time.sleep(0.02)
            else:
                break
        self.socket.settimeout(30)
        self.lines = self.socket.makefile("rw")

    def line(self, sent: str | None = None) -> str:
        """Send a line, if one is given, and receive one."""
        if sent is not None:
            self.socket.sendall(f"{sent}\n".encode())
        return self.lines.readline()

    def ask(self, command: str, **arguments: Any) -> Any:
        """The result of a QMP command; events, and the greeting, are dropped."""
        reply = json.loads(self.line(json.dumps({"execute": command, "arguments": arguments})))
        while "return" not in reply:
            assert "error" not in reply
            reply = json.loads(self.line())
        return reply["return"]


Connect = Callable[[Path], Client]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes clients, and closes them at the end."""
    made: list[Client] = []

    def make(path: Path) -> Client:
        made.append(Client(path))
        return made[-1]

    yield make
    for client in made:
        client.lines.close()
        client.socket.close()


def test_monitors_of_all_kinds_serve_the_same_machine(tmp_path: Path, connect: Connect) -> None:
    """A QMP client, a pretty one, a human, a port that nobody is behind; quit ends them all."""
    sockets = {name: f"unix:{name},server=on,wait=off" for name in ("a", "b", "c", "d")}
    options = ("-S", "-qmp", sockets["a"], "-qmp-pretty", sockets["b"], "-serial", sockets["d"], "-name", "guest=m,process=x",
               "-chardev", "socket,id=c,path=c,server=on,wait=off", "-mon", "chardev=c")  # fmt: skip
    with running(tmp_path, *options) as process:
        plain, pretty, human, port = (connect(tmp_path / name) for name in "abcd")
        assert "QMP" in json.loads(plain.line())
        assert pretty.line() == "{\n"
        port.socket.sendall(b"is anybody there?\n")
        assert human.line("info name") == "QEMU 7.2.22 monitor - type 'help' for more information\n"
        assert human.line() == "(qemu) info name\n" and human.line() == "m\n"
        plain.ask("qmp_capabilities")
        labels = {entry["label"]: entry["frontend-open"] for entry in plain.ask("query-chardev")}
        assert labels == {"c": True, "compat_monitor0": True, "compat_monitor1": True, "serial0": True}
        human.socket.sendall(b"quit\n")
        assert process.wait(30) == 0


def test_a_port_that_is_taken_is_passed_over(tmp_path: Path, connect: Connect) -> None:
    """``to=`` says how far; ``ipv4`` which protocol; the port in use is shown."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = f"socket,id=c,host=localhost,port={port},to={port + 20},ipv4=on,server=on,wait=off,nodelay"
        with running(tmp_path, "-S", "-chardev", where, "-qmp", "unix:q,server=on,wait=off,telnet=off"):
            qmp = connect(tmp_path / "q")
            qmp.ask("qmp_capabilities")
            shown = {entry["label"]: entry["filename"] for entry in qmp.ask("query-chardev")}
            assert shown["c"].startswith("disconnected:tcp:127.0.0.1:")
            assert port < int(shown["c"].partition(",")[0].rpartition(":")[2]) <= port + 20


def test_it_goes_on_when_nobody_reads_what_it_prints(tmp_path: Path, connect: Connect) -> None:
    """The program that has started it is gone, with its ends of the pipes: the line about a new image is lost, nothing else."""
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    with running(tmp_path, "-drive", "if=virtio,id=d,file=disk.raw,format=raw", "-qmp", "unix:q,server=on,wait=off") as process:
        client = connect(tmp_path / "q")
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
        client.line()
        client.ask("qmp_capabilities")
        client.ask("trace-event-set-state", name="job_*", enable=True)
        client.ask("blockdev-snapshot-sync", device="d", **{"snapshot-file": "top.qcow2"})
        client.ask("blockdev-snapshot-sync", device="d", **{"snapshot-file": "more.qcow2"})
        client.ask("block-stream", device="d")
        assert client.ask("query-status")["running"]


def test_time_moves_as_the_qtest_client_says(tmp_path: Path, connect: Connect) -> None:
    """A backup with a limit of a mebibyte a second: nothing happens until the clock is stepped."""
    nodes = [("-blockdev", f"driver=null-co,node-name={name},size=4194304,read-zeroes=on") for name in "st"]
    options = ("-accel", "qtest", "-qtest", "unix:clock,server=on,wait=off", "-qmp", "unix:q,server=on,wait=off")
    with running(tmp_path, *options, *nodes[0], *nodes[1]) as process:
        qmp, clock = connect(tmp_path / "q"), connect(tmp_path / "clock")
        qmp.ask("qmp_capabilities")
        qmp.ask("blockdev-mirror", device="s", target="t", sync="full", **{"job-id": "j"}, speed=1 << 20)
        assert clock.line("clock_set 500000000") == "OK 500000000\n"
        assert qmp.ask("query-jobs")[0]["status"] == "running"
        assert int(clock.line("clock_step").split()[1]) > 500000000
        assert clock.line("clock_set 10000000000") == "OK 10000000000\n"
        assert qmp.ask("query-jobs")[0]["status"] == "ready"
        assert clock.line("clock_step 5") == "OK 10000000005\n"
        for line in ("inb 0x60", "clock_step x", "clock_step -1", "clock_set", ""):
            assert clock.line(line).startswith("FAIL ")
        qmp.ask("quit")
        assert process.wait(30) == 0


def test_without_the_qtest_accelerator_nobody_moves_time(tmp_path: Path, connect: Connect) -> None:
    """As the real program without it answers."""
    with running(tmp_path, "-S", "-qtest", "unix:t,server=on,wait=off"):
        assert connect(tmp_path / "t").line("clock_step 5") == "FAIL Unknown command 'clock_step'\n"


def test_a_signal_shuts_the_machine_down_and_says_so(tmp_path: Path, connect: Connect) -> None:
    """SHUTDOWN with the reason; the pid file is there as long as the machine is; the exit code is 0."""
    with running(tmp_path, "-S", "-pidfile", "pid", "-qmp", "unix:q,server=on,wait=off") as process:
        qmp = connect(tmp_path / "q")
        qmp.ask("qmp_capabilities")
        assert int((tmp_path / "pid").read_text()) == process.pid
        process.send_signal(signal.SIGTERM)
        event = json.loads(qmp.line())
        assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": False, "reason": "host-signal"})
        assert process.wait(30) == 0
        assert not (tmp_path / "pid").exists()


def test_a_daemon_returns_when_it_can_be_used(tmp_path: Path, connect: Connect) -> None:
    """Nobody has to wait for its sockets."""
    line = [*PROGRAM, "-nodefaults", "-S", "-daemonize", "-pidfile", "pid", "-qmp", "unix:q,server=on,wait=off"]
    subprocess.run(line, cwd=tmp_path, check=True, timeout=60)
    qmp = connect(tmp_path / "q")
    qmp.ask("qmp_capabilities")
    qmp.ask("quit")
    assert qmp.line() == ""
    assert subprocess.run([*line[:3], "-daemonize", "-mon", "x"], capture_output=True, check=False).returncode == 1


def test_sockets_can_be_handed_over_as_descriptors(tmp_path: Path, connect: Connect) -> None:
    """As libvirt does: it listens before it starts the machine."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "q"))
        listener.listen(1)
        fd = listener.fileno()
        options = ("-chardev", f"socket,id=m,fd={fd},server=on,wait=off", "-mon", "chardev=m,id=monitor,mode=control")
        with running(tmp_path, "-S", *options, pass_fds=(fd,)) as process:
            qmp = connect(tmp_path / "q")
            qmp.ask("qmp_capabilities")
            qmp.ask("quit")
            assert process.wait(30) == 0


def test_a_terminal_of_its_own_can_be_the_monitor(tmp_path: Path) -> None:
    """-monitor pty: the name of the terminal is printed."""
    with running(tmp_path, "-S", "-monitor", "pty") as process:
        assert process.stdout is not None
        name = process.stdout.readline().split()[4]
        terminal = os.open(name, os.O_RDWR | os.O_NOCTTY)
        os.write(terminal, b"quit\n")
        assert process.wait(30) == 0
        os.close(terminal)


def test_a_file_can_be_handed_over_as_a_descriptor(tmp_path: Path, connect: Connect) -> None:
    """-add-fd: the name of the file is not known to the program."""
    (tmp_path / "disk").write_bytes(b"x" * 4096)
    with open(tmp_path / "disk", "r+b") as disk:
        fd = disk.fileno()
        options = ("-add-fd", f"fd={fd},set=7,opaque=mine", "-drive", "if=none,id=d,format=raw,file=/dev/fdset/7")
        with running(tmp_path, "-S", *options, "-qmp", "unix:q,server=on,wait=off", pass_fds=(fd,)) as process:
            qmp = connect(tmp_path / "q")
            qmp.ask("qmp_capabilities")
            (shown,) = qmp.ask("query-fdsets")
            assert (shown["fdset-id"], shown["fds"][0]["opaque"]) == (7, "mine")
            line = 'qemu-io d "write -q -P 0x41 0 512"'
            qmp.ask("human-monitor-command", **{"command-line": line})
            qmp.ask("quit")
            assert process.wait(30) == 0
    assert (tmp_path / "disk").read_bytes()[:513] == b"A" * 512 + b"x"
