"""blkdebug on the real programs and on qblock: options, names, limits, permissions, rules, and the requests that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qmp_pair import DAEMONS, both, do, io, wait
from test_filters_vs_qemu import LOOK, NULL, add, file, machine

pytestmark = pytest.mark.qemu

IMAGES = [
    ["truncate", "-s", "1M", "a.raw"], ["qemu-img", "create", "-q", "-f", "qcow2", "q.qcow2", "1M"],
    ["sh", "-c", "printf '[inject-error]\\nevent = \"none\"\\nerrno = \"13\"\\nsector = \"8\"\\n' > rules.conf"],
]  # fmt: skip


def debug(image: Any = NULL, **members: Any) -> dict[str, Any]:
    return add("blkdebug", "d", image=image, **members)


def rule(event: str = "none", **members: Any) -> dict[str, Any]:
    return {"event": event, **members}


GONE = do("blockdev-del", node_name="d")
OPTIONS = [
    debug(file("a.raw")), *LOOK, GONE, debug({"driver": "raw", "file": file("a.raw")}, config="rules.conf"), *LOOK, GONE,
    debug(file("a.raw"), align=4096), *LOOK, GONE, debug(align=4096, max_transfer=8192, opt_write_zero=8192), *LOOK, GONE,
    debug(inject_error=[rule(errno=28, once=True)]), *LOOK, GONE,
    debug(inject_error=[rule("read_aio", iotype="read", sector=5, immediately=True, state=1), rule(errno=5)],
          set_state=[{"event": "write_aio", "new_state": 2}, {"event": "l2_load", "state": 2, "new_state": 3}]), *LOOK, GONE,
    debug(take_child_perms=["write"], unshare_child_perms=["consistent-read", "resize"]), *LOOK, GONE,
    debug(file("a.raw"), discard="unmap", read_only=True), *LOOK, GONE,
    debug(align=1000), debug(align=-512), debug(align=1 << 31), debug(align=0), GONE, debug(align=1), GONE,
    debug(max_transfer=1000, align=512), debug(max_transfer=-1), debug(max_transfer=1 << 32), debug(max_transfer=513), GONE,
    debug(opt_write_zero=1000, align=512), debug(max_write_zero=1000, opt_write_zero=512), debug(opt_discard=700, align=512),
    debug(max_discard=1536, opt_discard=1024), debug(config="none.conf"), debug(inject_error=[rule("nope")]),
    debug(inject_error=[{"errno": 5}]), debug(inject_error=[rule(iotype="nope")]), debug(set_state=[{"event": "none"}]),
    debug(take_child_perms=["nope"]), add("blkdebug", "d"), debug(None), debug("nope"), debug(bogus=1),
    debug(inject_error=rule()), debug(inject_error=[rule(errno="5")]),
]  # fmt: skip


def test_options_names_and_permissions(tmp_path: Path) -> None:
    """Everything that can be said to a node, and what queries tell of it."""
    real, ours = both(DAEMONS, tmp_path, OPTIONS, IMAGES)
    assert _unordered(real) == _unordered(ours)


def _unordered(value: Any) -> Any:
    """With ``json:`` names as the objects that they are: QEMU orders their many keys by a hash."""
    if isinstance(value, str) and value.startswith("json:"):
        return _unordered(json.loads(value[5:]))
    if isinstance(value, dict):
        return {key: _unordered(item) for key, item in value.items()}
    return [_unordered(item) for item in value] if isinstance(value, list) else value


REQUESTS = (
    "write 0 64k", "read 0 64k", "read 4k 512", "write 4k 512", "write -z 0 4k", "write -z 64k 100k", "discard 0 64k", "flush",
    "read 100 100", "write 100 100", "map", "read 0 512",
)  # fmt: skip
RULES = {
    "no rule": "",
    "any": "inject-error.0.event=none",
    "once": "inject-error.0.event=none,inject-error.0.once=on",
    "reads": "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=28",
    "zero writes": "inject-error.0.event=none,inject-error.0.iotype=write-zeroes",
    "discards": "inject-error.0.event=none,inject-error.0.iotype=discard",
    "block status": "inject-error.0.event=none,inject-error.0.iotype=block-status",
    "a sector": "inject-error.0.event=none,inject-error.0.sector=8",
    "sector 0, immediately": "inject-error.0.event=none,inject-error.0.sector=0,inject-error.0.immediately=on",
    "the first of two": "inject-error.0.event=none,inject-error.0.errno=28,inject-error.1.event=none,inject-error.1.errno=5",
    "none at first": "inject-error.0.event=none,inject-error.0.errno=0,inject-error.1.event=none,inject-error.1.errno=5",
    "from a write on": "inject-error.0.event=pwritev,inject-error.0.errno=28",
    "after a write": "inject-error.0.event=pwritev_done,inject-error.0.errno=28",
    "zero write on": "inject-error.0.event=pwritev_zero,inject-error.0.errno=28",
    "in state 2": "inject-error.0.event=pwritev,inject-error.0.state=2,set-state.0.event=pwritev,set-state.0.new_state=2",
    "in state 1": "inject-error.0.event=pwritev,inject-error.0.state=1,set-state.0.event=pwritev,set-state.0.new_state=2",
    "of the file": "config=rules.conf",
    "file and options": "config=rules.conf,inject-error.0.event=none,inject-error.0.errno=28",
    "aligned": "align=4096,inject-error.0.event=pwritev_rmw_head,inject-error.0.errno=28",
    "aligned, read": "align=4096,inject-error.0.event=pwritev_rmw_after_head,inject-error.0.errno=28",
}


@pytest.mark.parametrize("name", RULES)
def test_the_same_requests_fail(name: str, tmp_path: Path) -> None:
    """With the same errors, on storage without a format."""
    outputs = []
    for program in (["qemu-io"], [sys.executable, "-m", "qblock.tools.io"]):
        for make in IMAGES:
            subprocess.run(make, cwd=tmp_path, check=True)
        options = f"driver=blkdebug,image.driver=file,image.filename=a.raw,{RULES[name]}".rstrip(",")
        commands = [part for line in REQUESTS for part in ("-c", line)]
        line = [*program, "-t", "writeback", "--image-opts", *commands, options]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        outputs.append([line for line in done.stdout.splitlines() if "ops" not in line])
    assert outputs[0] == outputs[1]


BREAKS = {
    "held and let go": ("break write_aio A", "aio_write 0 64k", "wait_break A", "resume A", "aio_flush"),
    "removed before": ("break write_aio A", "remove_break A", "aio_write 0 64k", "aio_flush"),
    "two on one step": (
        "break pwritev A", "break pwritev B", "aio_write 0 512", "sleep 50", "resume A", "sleep 50", "resume B", "aio_flush",
    ),
    "the same twice": (
        "break pwritev A", "break pwritev A", "aio_write 0 512", "sleep 50", "resume A", "sleep 50", "resume A", "aio_flush",
    ),
    "of two requests one": ("break pwritev A", "aio_write 0 512", "aio_write 512 512", "sleep 50", "resume A", "aio_flush"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_requests_are_held_at_breakpoints(name: str, tmp_path: Path) -> None:
    """What is printed when a request stops, goes on, and is done."""
    outputs = []
    for program in (["qemu-io"], [sys.executable, "-m", "qblock.tools.io"]):
        for make in IMAGES:
            subprocess.run(make, cwd=tmp_path, check=True)
        commands = [part for line in BREAKS[name] for part in ("-c", line)]
        line = [*program, "-f", "raw", *commands, "blkdebug::a.raw"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        outputs.append((done.returncode, [text for text in done.stdout.splitlines() if "ops" not in text]))
    assert outputs[0] == outputs[1]


STEPS = {
    "reading from below": ("read_backing_aio", "aio_read 0 4k"),
    "copying from below": ("cow_read", "aio_write 0 4k"),
    "a flush": ("flush_to_os", "aio_write -f 0 64k"),
}


@pytest.mark.parametrize("name", STEPS)
def test_requests_stop_at_the_step_itself(name: str, tmp_path: Path) -> None:
    """Also where the step leads to another file, or to nothing."""
    event, request = STEPS[name]
    outputs = []
    for program in (["qemu-io"], [sys.executable, "-m", "qblock.tools.io"]):
        for make in (
            ["qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "1M"],
            ["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 1M", "base.qcow2"],
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"],
        ):
            subprocess.run(make, cwd=tmp_path, check=True)
        lines = (f"break {event} A", request, "wait_break A", "resume A", "aio_flush")
        commands = [part for line in lines for part in ("-c", line)]
        line = [*program, "-t", "writeback", "-f", "qcow2", *commands, "blkdebug::top.qcow2"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        outputs.append((done.returncode, [text for text in done.stdout.splitlines() if "ops" not in text]))
    assert outputs[0] == outputs[1]


HELD_MACHINE = machine("-drive", "if=none,id=d,format=qcow2,node-name=top,file=blkdebug::held.qcow2")
HELD_IMAGES = [
    ["qemu-img", "create", "-q", "-f", "qcow2", "held.qcow2", "1M"],
    ["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 1M", "held.qcow2"],
]
MIRROR = do("drive-mirror", device="d", job_id="j", target="m.qcow2", sync="full", format="qcow2")
LOOK_AT_JOBS = do("query-block-jobs")
HOLDING = {
    "cancelled while it is held": [
        io("d", "break read_aio bp"), io("d", "break write_aio bp"), MIRROR, io("d", "wait_break bp"), LOOK_AT_JOBS,
        do("block-job-cancel", device="j"), LOOK_AT_JOBS, io("d", "remove_break bp"), wait("JOB_STATUS_CHANGE", status="null"),
        LOOK_AT_JOBS, io("d", "remove_break bp"), do("query-block"),
    ],
    "paused while it is held": [
        io("top", "break read_aio bp"), MIRROR, io("d", "wait_break bp"), do("block-job-pause", device="j"), LOOK_AT_JOBS,
        io("d", "resume bp"), wait("JOB_STATUS_CHANGE", status="paused"), LOOK_AT_JOBS,
    ],
    "paused by each command on its node": [
        MIRROR, wait("BLOCK_JOB_READY"), io("top", "length"), io("top", "read 0 4k"), io("d", "read 0 4k"), LOOK_AT_JOBS,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", HOLDING)
def test_jobs_are_held_at_breakpoints_of_a_machine(name: str, tmp_path: Path) -> None:
    """What scripts do to look at a job in the middle of its work."""
    real, ours = both(HELD_MACHINE, tmp_path, HOLDING[name], HELD_IMAGES)
    assert real == ours
