"""--trace of the programs: what is logged, where to, and what is a mistake."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest

from qblock.__main__ import main as qblock
from qblock.tools import img, io, storage_daemon

OPENED = 'bdrv_open_common bs # filename "disk.qcow2" format_name "{}"'


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image in an empty directory, which is where we are."""
    monkeypatch.chdir(tmp_path)
    assert img.main(["create", "-q", "-f", "qcow2", "disk.qcow2", "1M"]) == 0


def logged(text: str) -> list[str]:
    """Lines of a log without the numbers of nodes."""
    return [re.sub(r"#block\d+", "#", line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("program", "rest"),
    [(img.main, ["info", "disk.qcow2"]), (io.main, ["-c", "length", "disk.qcow2"])],
    ids=["img", "io"],
)
@pytest.mark.parametrize("option", [["-T", "bdrv_*"], ["--trace=enable=bdrv_o*"], ["--trace", "*", "--trace", "-[!b]*"]])
def test_the_lines_go_to_standard_error(
    program: Callable[[list[str]], int], rest: list[str], option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two images are opened, the file and what is in it; what the program is for is printed as ever."""
    assert program([*option, *rest]) == 0
    printed = capsys.readouterr()
    assert logged(printed.err) == [OPENED.format("file"), OPENED.format("qcow2")]
    assert printed.out


def test_a_file_lists_the_events_and_another_one_takes_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Comments and empty lines are passed over; a log is begun anew each time; an unknown name is told with its place."""
    Path("events").write_text("# what is opened\n\nbdrv_open_common\nno_such_event\n-mirror_start\n")
    Path("log").write_text("of yesterday\n")
    assert img.main(["--trace", "events=events,file=log", "info", "disk.qcow2"]) == 0
    assert capsys.readouterr().err == "qblock-img: events:4: warning: trace event 'no_such_event' does not exist\n"
    assert logged(Path("log").read_text()) == [OPENED.format("file"), OPENED.format("qcow2")]


def test_time_stamps_are_those_of_the_machines_clock(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On virtual time two runs give the same stamps: the log can be compared."""
    monkeypatch.setattr("sys.stdin", StringIO("drive_mirror virtio0 copy.qcow2\nrun 100ms\nquit\n"))
    drive = ["-drive", "if=virtio,id=virtio0,file=disk.qcow2,format=qcow2"]
    assert qblock(["--trace", "mirror_before_flush,timestamp=on", "--clock", "virtual", *drive]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\d+@1334275200", "PID@", line) for line in lines] == [
        "PID@.000000:mirror_before_flush s virtio0",
        "PID@.100000:mirror_before_flush s virtio0",
    ]


def test_a_replay_can_be_traced(capsys: pytest.CaptureFixture[str]) -> None:
    """The machine that is made for the run has trace events like any other; one behind a socket has its own."""
    Path("script").write_text('{"execute": "query-status"}')
    assert qblock(["replay", "--trace", "qmp_enter_query_*", "script"]) == 0
    assert capsys.readouterr().err == "qmp_enter_query_status {}\n"
    assert qblock(["replay", "--trace", "*", "--socket", "nowhere", "script"]) == 2
    assert "--trace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "first", "has", "lacks"),
    [
        (img.main, [], "bdrv_open_common", "qmp_enter_query_status"),
        (io.main, [], "bdrv_open_common", "qmp_enter_query_status"),
        (qblock, [], "qmp_enter_query_status", "program_ready"),
        (qblock, ["replay"], "qmp_exit_query_status", "program_ready"),
        (storage_daemon.main, [], "program_ready", "qmp_enter_query_status"),
    ],
)
@pytest.mark.parametrize("word", ["help", "?", "list"])
def test_a_program_lists_its_events(
    program: Callable[[list[str]], int], first: list[str], has: str, lacks: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In alphabetical order, and those of commands only where there are such commands."""
    assert program([*first, "--trace", word]) == 0
    names = capsys.readouterr().out.split()
    assert names == sorted(names)
    assert has in names
    assert lacks not in names


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("events=nowhere", "cannot read 'nowhere'"),
        ("file=/nowhere/log", "cannot write '/nowhere/log'"),
        ("*,timestamp=maybe", "must be 'on' or 'off', not 'maybe'"),
        ("*,color=red", "'color' is unexpected"),
        ('{"enable": 1}', "must be a string"),
        ('{"enable"', "this is not JSON"),
    ],
)
@pytest.mark.parametrize(
    ("program", "rest"),
    [(img.main, ["info", "disk.qcow2"]), (io.main, ["-c", "length", "disk.qcow2"]), (qblock, ["--monitor", "none"])],
    ids=["img", "io", "qblock"],
)
def test_mistakes_are_refused_before_anything_is_done(
    program: Callable[[list[str]], int], rest: list[str], value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, and a reason."""
    assert program(["--trace", value, *rest]) == 1
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_lines_that_cannot_be_written_are_lost_and_nothing_else_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of the log is full: one warning, and the mirror comes to its end."""
    monkeypatch.setattr("sys.stdin", StringIO("drive_mirror virtio0 copy.qcow2\nrun 1s\nquit\n"))
    drive = ["-drive", "if=virtio,id=virtio0,file=disk.qcow2,format=qcow2"]
    assert qblock([*drive, "--dialect", "rfc-2012", "--clock", "virtual", "--trace", "*,file=/dev/full"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "qblock: warning: not all of the trace could be written: No space left on device\n"
    assert "the time is 1s" in printed.out
    assert img.main(["compare", "-q", "disk.qcow2", "copy.qcow2"]) == 0
