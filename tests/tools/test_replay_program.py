"""`qblock replay` and `qblock` as programs: command lines, exit codes, whole machines."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qblock.__main__ import main
from qblock.testing.images import make_image
from qblock.testing.machines import ServedMachine, drive_text

MiB = 1 << 20
DOCUMENT = Path(__file__).parents[2] / "docs" / "replay.md"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script that docs/replay.md shows."""
    found = re.search(r"^```qmp\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    path = tmp_path / "mirror.qmp"
    path.write_text(found[1])
    return path


def test_the_script_in_the_document_runs(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine of its own, on virtual time: the same transcript every time."""
    transcripts = []
    for _ in range(2):
        assert main(["replay", "--seed", "1", str(script)]) == 0
        transcripts.append(capsys.readouterr().out)
    assert transcripts[0] == transcripts[1]
    assert "ok BLOCK_JOB_READY has come" in transcripts[0]
    assert "ok the script has run to its end" in transcripts[0]


def test_the_same_script_runs_against_a_server_on_a_socket(
    script: Path, qblock_served: ServedMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it would against QEMU."""
    assert main(["replay", "--socket", qblock_served.socket_path, "--output", "json", str(script)]) == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert entries[0]["value"].keys() == {"QMP"}
    assert entries[-1]["kind"] == "ok"


def test_a_guest_writes_and_reads_on_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the disks that -drive gives it; a read that finds something else ends the run."""
    disk = make_image(tmp_path / "disk.qcow2", MiB)
    path = tmp_path / "guest.qmp"
    write = '{"guest": {"device": "virtio0", "write": {"offset": "64k", "length": 512, "pattern": 7}}}'
    read = '{"guest": {"device": "virtio0", "read": {"offset": "64k", "length": 1024, "pattern": 7}}}'
    flush = '{"guest": {"device": "virtio0", "flush": {}}}'
    path.write_text(f"{write}\n{flush}\n{read}\n")
    assert main(["replay", "-drive", drive_text(disk, "virtio0", "qcow2"), str(path)]) == 1
    text = capsys.readouterr().out
    assert "FAILED line 3: the guest's read failed: the byte at 66048 is 0x00, not 0x07" in text


def test_time_is_advanced_by_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mirror with a speed limit is half done after half of its time."""
    disk = make_image(tmp_path / "disk.qcow2", 8 * MiB, {0: b"x" * 8 * MiB})
    path = tmp_path / "slow.qmp"
    path.write_text("""
        {"execute": "drive-mirror", "arguments": {"device": "virtio0", "target": "${OUT}", "sync": "full",
            "format": "qcow2", "speed": 1048576, "buf-size": 1048576}}
        {"advance": "4s"} {"execute": "query-block-jobs"} {"expect": {"return": [{"ready": false}]}}
        {"wait": {"event": "BLOCK_JOB_READY", "timeout": "5s"}}
    """)
    out = f"OUT={tmp_path / 'out.qcow2'}"
    arguments = ["--define", out, "-drive", drive_text(disk, "virtio0", "qcow2")]
    assert main(["replay", *arguments, str(path)]) == 0, capsys.readouterr()


def test_a_script_may_come_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` as for other programs; real time is there as well."""
    monkeypatch.setattr("sys.stdin", io.StringIO('{"execute": "query-version"} {"advance": "1ms"}'))
    assert main(["replay", "--clock", "real", "-"]) == 0


def test_an_unmet_expectation_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the last line of the transcript says why."""
    path = tmp_path / "wrong.qmp"
    path.write_text('{"execute": "query-version"}\n{"expect": {"return": {"qemu": {"major": 99}}}}')
    assert main(["replay", str(path)]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].endswith("at return.qemu.major: expected 99, got 7")
    assert said.err.startswith("qblock replay: line 2")


@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "b"], ["--output", "xml", "SCRIPT"], ["--define", "x", "SCRIPT"], ["--nonsense", "SCRIPT"], ["missing.qmp"],
     ["--socket", "s", "--seed", "1", "SCRIPT"], ["--seed", "many", "SCRIPT"], ["--define"]],
)  # fmt: skip
def test_a_wrong_command_line_is_exit_code_2(
    arguments: list[str], script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing was tried then."""
    assert main(["replay", *(str(script) if word == "SCRIPT" else word for word in arguments)]) == 2
    assert capsys.readouterr().err.startswith("qblock replay: ")


def test_a_server_that_is_not_there_is_exit_code_1(script: Path, tmp_path: Path) -> None:
    """The script is right, but cannot be performed."""
    assert main(["replay", "--socket", f"unix:{tmp_path / 'nothing'}", str(script)]) == 1


# ------------------------------------------------------------------------------------------------------------- qblock


def piped(lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input is no terminal and has these lines."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))


def test_lines_can_be_piped_into_qblock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole mirror as a shell script would do it; the same seed prints the same."""
    make_image(tmp_path / "disk.qcow2", 4 * MiB, {0: b"x" * MiB})
    lines = f"""
        guest start virtio0 100
        step 1s
        drive_mirror -f virtio0 {tmp_path}/copy.qcow2 qcow2
        run until READY
        block_job_complete virtio0
        run until COMPLETED
        guest stop virtio0
        info block virtio0
        graph
    """
    transcripts = []
    drive = drive_text(tmp_path / "disk.qcow2", "virtio0", "qcow2")
    for _ in range(2):
        piped(lines, monkeypatch)
        assert main(["--clock", "virtual", "--seed", "1", "-drive", drive]) == 0
        transcripts.append(capsys.readouterr().out)
        (tmp_path / "copy.qcow2").unlink()
        (tmp_path / "disk.qcow2").unlink()
        make_image(tmp_path / "disk.qcow2", 4 * MiB, {0: b"x" * MiB})
    assert transcripts[0] == transcripts[1]
    assert "BLOCK_JOB_READY virtio0; the time is 1s" in transcripts[0]
    assert "(copy.qcow2)" in transcripts[0].splitlines()[-1]


def test_nodes_of_the_command_line_are_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """-blockdev in both spellings; --option=value and -option value are the same."""
    piped("graph\nnonsense\n", monkeypatch)
    keyval, as_json = "driver=memory,node-name=a,size=1M", '{"driver": "null-co", "node-name": "b"}'
    assert main(["-blockdev", keyval, f"--blockdev={as_json}"]) == 1
    text = capsys.readouterr().out
    assert "a: memory, 1 MiB" in text
    assert "b: null-co, 1 GiB" in text


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--nonsense"], 2), (["replya"], 2), (["-drive"], 2), (["--clock", "lunar"], 2), (["-monitor", "vnc"], 2),
     (["-drive", "file=/nonexistent/x.qcow2"], 1), (["-blockdev", "{oops"], 1), (["-qmp", "carrier-pigeon"], 1)],
)  # fmt: skip
def test_what_cannot_be_started_says_so(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown options are errors, and so is a disk that is not there."""
    piped("", monkeypatch)
    assert main(arguments) == code
    assert capsys.readouterr().err.startswith("qblock: ")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A `qblock` without a prompt on virtual time, and a connection to its monitor."""
    path = tmp_path / "qmp"
    command = [sys.executable, "-m", "qblock", "-monitor", "none", "--clock", "virtual", "-qmp"]
    with subprocess.Popen([*command, f"unix:{path},server=on,wait=off"]) as process:
        try:
            with _connected(path, process) as connection:
                yield process, connection
        finally:
            process.kill()


def _connected(path: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    """A connection to the socket at ``path``, as soon as somebody listens there."""
    while True:
        assert process.poll() is None
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            time.sleep(0.01)
        else:
            return connection


def ask(connection: socket.socket, command: str, **arguments: str) -> Any:
    """Execute a QMP command on a bare socket; events are skipped."""
    members = {name.replace("_", "-"): value for name, value in arguments.items()}
    connection.sendall(json.dumps({"execute": command, "arguments": members}).encode())
    text = ""
    while True:
        text += connection.recv(65536).decode()
        for line in text.splitlines():
            if line.startswith(('{"return"', '{"error"')):
                return json.loads(line)


def test_without_a_prompt_qmp_clients_move_time_and_end_the_machine(
    server: tuple[subprocess.Popen[bytes], socket.socket],
) -> None:
    """The learning commands are part of the human monitor, which QMP reaches."""
    process, connection = server
    ask(connection, "qmp_capabilities")
    assert ask(connection, "human-monitor-command", command_line="step 2s")["return"] == "the time is 2s\r\n"
    assert ask(connection, "quit") == {"return": {}}
    assert process.wait(timeout=30) == 0


def test_without_a_prompt_a_signal_ends_the_machine_well(
    server: tuple[subprocess.Popen[bytes], socket.socket],
) -> None:
    """Jobs are cancelled and images closed, as by the command."""
    process, _ = server
    process.terminate()
    assert process.wait(timeout=30) == 0


def test_help_and_version_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """In both spellings."""
    for arguments in (["--help"], ["-h"], ["replay", "--help"]):
        assert main(arguments) == 0
        assert capsys.readouterr().out.startswith("usage: qblock")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qblock version 0.")
