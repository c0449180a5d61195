"""The `qblock` program: its options, its exit codes, several QMP sockets, a machine that waits for ``cont``."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qblock.__main__ import main

PROGRAM = [sys.executable, "-m", "qblock"]
DISK = ("-blockdev", "memory,node-name=disk,size=1M")


def lines(*args: str, typed: str) -> subprocess.CompletedProcess[str]:
    """A run with lines from a pipe."""
    return subprocess.run([*PROGRAM, *args], input=typed, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-blokdev", "x"], "there is no option -blokdev; did you mean --blockdev?"),
        (["--clok=virtual"], "there is no option --clok=virtual; did you mean --clock?"),
        (["-enable-kvm"], "there is no option -enable-kvm"),
        (["-drive"], "the option -drive needs a value"),
        (["--clock", "fast"], "--clock takes real or virtual, not 'fast'"),
        (["--seed", "red"], "--seed takes a number, not 'red'"),
        (["dmeo"], "there is no sub-command 'dmeo'; there are demo, replay and lab"),
    ],
)
def test_wrong_options_are_errors_that_help(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is 2, and nothing is started."""
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error == f"qblock: {said}\nTry 'qblock --help' for more information\n"


@pytest.mark.parametrize("flag", ["-h", "--help", "-help"])
def test_help_names_every_option(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No option is a secret."""
    assert main([flag]) == 0
    shown = capsys.readouterr().out
    for option in ("-drive", "-blockdev", "-qmp", "-monitor", "-S", "--clock", "--seed", "--help", "--version"):
        assert f"  {option} " in shown or f", {option} " in shown, option


def test_the_image_tools_begin_without_what_only_some_commands_need() -> None:
    """Starting takes most of the time of a short command; asyncio comes later, and without OpenSSL."""
    code = "import sys; import qblock.tools.img; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    for module in ("asyncio", "ssl", "shutil", "qblock.driver"):
        assert f"'{module}'" not in done.stdout


def test_the_version_is_told_without_loading_a_machine() -> None:
    """Scripts ask for it often."""
    code = "import sys; from qblock.__main__ import main; main(['--version']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("qblock version ")
    assert "asyncio" not in done.stdout
    assert "qblock.system" not in done.stdout


def test_a_machine_may_wait_for_cont() -> None:
    """The guest does nothing before, and `stop` then changes nothing, as in QEMU."""
    typed = "info status\nguest start d 100\nstep 1s\nguest\nstop\ninfo status\ncont\ninfo status\nstep 1s\nguest\n"
    done = lines("-S", "-drive", "id=d,driver=memory,size=1M", "--clock", "virtual", typed=typed)
    shown = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert shown[0] == shown[4] == "VM status: paused (prelaunch)"
    assert shown[3] == "d  held up: 0 writes (0 B), 0 reads, 0 flushes"
    assert shown[5] == "VM status: running"
    assert shown[7].startswith("d  at work: ")


def test_several_sockets_may_have_any_name(tmp_path: Path) -> None:
    """A comma in a path is written twice; each socket serves its own client."""
    paths = [tmp_path / "a,b.sock", tmp_path / "c=d.sock"]
    options = [f"unix:{str(path).replace(',', ',,')},server=on,wait=off" for path in paths]
    command = [*PROGRAM, "-monitor", "none", *DISK, "-qmp", options[0], "-qmp", options[1]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not paths[1].exists():
                assert process.poll() is None
            for path in paths:
                with socket.socket(socket.AF_UNIX) as client, client.makefile("rw") as stream:
                    client.connect(str(path))
                    assert "QMP" in json.loads(stream.readline())
            with socket.socket(socket.AF_UNIX) as client, client.makefile("rw") as stream:
                client.connect(str(paths[0]))
                stream.write('{"execute": "qmp_capabilities"} {"execute": "quit"}')
                stream.flush()
                assert process.wait(timeout=60) == 0
        finally:
            process.kill()


def test_a_machine_without_a_prompt_prints_what_it_has_to_say(tmp_path: Path) -> None:
    """What QEMU prints to its standard output goes there, warnings to standard error, as they come."""
    disk, sock = tmp_path / "disk.raw", tmp_path / "qmp.sock"
    disk.write_bytes(bytes(1 << 20))
    command = [*PROGRAM, "-monitor", "none", "-drive", f"file={disk},id=d", "-qmp", f"unix:{sock},server=on,wait=off"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith(f"warning: No format was given for '{disk}'")
            while not sock.exists():
                assert process.poll() is None
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(sock))
                client.sendall(b'{"execute": "qmp_capabilities"}')
                for line in ('qemu-io d "length"', f"snapshot_blkdev d {tmp_path}/s.qcow2"):
                    message = {"execute": "human-monitor-command", "arguments": {"command-line": line}}
                    client.sendall(json.dumps(message).encode())
                client.sendall(b'{"execute": "quit"}')
                out, err = process.communicate(timeout=60)
            assert out.splitlines()[0] == "1 MiB"
            assert out.splitlines()[1].startswith(f"Formatting '{tmp_path}/s.qcow2', fmt=qcow2 ")
            assert err == ""
        finally:
            process.kill()
