"""A lab that is ended by a signal leaves nothing behind: no directories, no processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

STARTED = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup or in the background of a script
signal.signal(signal.SIGINT, signal.default_int_handler)
from qblock.__main__ import main
{before}
sys.exit(main(['lab', *sys.argv[1:]]))
"""
FIRST_CASE = """
from qblock.lab.witness import case as place
start = place._Case._start_management
def telling(self):
    start(self)
    print('started', file=sys.stderr, flush=True)
place._Case._start_management = telling
"""
WORKING = """
from qblock.lab.witness import experiment as place
speaking, times = place._speaking, []
def telling(workers):
    times.append(1)
    if len(times) == 5: print('started', file=sys.stderr, flush=True)
    return speaking(workers)
place._speaking = telling
"""
EXAMINING = """
from qblock.lab.compare import report as place
look = place.look_at_crashes
def telling(*args, **members):
    print('started', file=sys.stderr, flush=True)
    return look(*args, **members)
place.look_at_crashes = telling
"""
RUNNING = """
from qblock.lab.compare import comparison as place
perform = place.perform
def telling(*args, **members):
    print('started', file=sys.stderr, flush=True)
    return perform(*args, **members)
place.perform = telling
"""


def living(session: int) -> list[str]:
    """The processes of a session, without those that are dead and not yet waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its) == session and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("args", "before"),
    [
        (["witness"], FIRST_CASE),
        (["witness"], WORKING),
        (["compare", "--only", "mirror", "--size", "8M"], RUNNING),
        (["compare", "--only", "mirror", "--size", "8M"], EXAMINING),
    ],
    ids=["a first case", "workers", "a run", "crashes"],
)
def test_a_signal_leaves_no_files_and_no_processes(
    tmp_path: Path, args: list[str], before: str, number: signal.Signals
) -> None:
    """Whenever it comes; the exit code tells which it was. Whatever was forked has ended before the program has."""
    command = [sys.executable, "-c", STARTED.format(before=before), *args]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    lab = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    assert lab.stderr is not None
    ready, _, _ = select.select([lab.stderr], [], [], 60)
    assert ready and lab.stderr.readline() == b"started\n"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("qblock-")]
    lab.send_signal(number)
    assert lab.wait(timeout=60) == 128 + number
    assert living(lab.pid) == []
    lab.stderr.close()
    assert list(tmp_path.iterdir()) == []


def test_nohup_is_respected(tmp_path: Path) -> None:
    """A signal that was ignored when the lab was started stays ignored."""
    before = f"import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{RUNNING}".replace(
        "return perform", "os.kill(os.getpid(), signal.SIGHUP); return perform"
    )
    command = [sys.executable, "-c", STARTED.format(before=before), "compare", "--only", "mirror", "--size", "8M"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=100, check=False)
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []
