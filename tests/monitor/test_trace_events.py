"""Trace events at the monitor: switched on and off over QMP and HMP, and the events of the monitor itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qblock.monitor.client import QmpError
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import MachineOptions
from qblock.testing.machines import LocalMachine


@pytest.fixture
def machine() -> Iterator[LocalMachine]:
    """A machine whose log is `lines`."""
    with LocalMachine() as made:
        yield made


@pytest.fixture
def lines(machine: LocalMachine) -> list[str]:
    """What is logged."""
    logged: list[str] = []
    trace = machine.machine.system.env.trace
    trace.log = lambda name, members: logged.append(trace.line(name, members))
    return logged


def test_a_command_is_told_with_its_arguments_and_its_reply(machine: LocalMachine, lines: list[str]) -> None:
    """On the way in as JSON, on the way out with 1."""
    machine.qmp.execute("trace-event-set-state", name="qmp_e[nx]*_stop", enable=True)
    machine.qmp.execute("trace-event-set-state", name="qmp_enter_block_*", enable=True)
    machine.qmp.execute("stop")
    with pytest.raises(QmpError):
        machine.qmp.execute("block-job-cancel", device="nobody")
    assert lines == ["qmp_enter_stop {}", "qmp_exit_stop {} 1", 'qmp_enter_block_job_cancel {"device": "nobody"}']


def test_a_command_that_fails_is_told_with_its_error(machine: LocalMachine, lines: list[str]) -> None:
    """And 0. Arguments that are wrong are no execution."""
    machine.qmp.execute("trace-event-set-state", name="qmp_*_block_job_pause", enable=True)
    for wrong in ({"device": "nobody"}, {"nonsense": 1}):
        with pytest.raises(QmpError) as caught:
            machine.qmp.execute("block-job-pause", wrong)
        if "device" in wrong:
            text = caught.value.args[0]
    assert lines[0] == 'qmp_enter_block_job_pause {"device": "nobody"}'
    assert lines[1].startswith("qmp_exit_block_job_pause ")
    assert lines[1].endswith(" 0")
    assert lines[1].removeprefix("qmp_exit_block_job_pause ").removesuffix(" 0") in text
    assert len(lines) == 2


def test_events_are_told_as_the_dialect_shows_them(machine: LocalMachine, lines: list[str]) -> None:
    """One trace event for each QMP event, also when no client is there to get it."""
    machine.machine.system.env.trace.switch("qmp_event_*", on=True)

    async def a_job_is_created() -> None:
        machine.machine.system.emit("JOB_STATUS_CHANGE", {"id": "j", "status": "created"})

    machine.qmp.execute("stop")
    machine.run(a_job_is_created())
    assert lines == ["qmp_event_stop", "qmp_event_job_status_change id=j status=created"]


def test_what_is_on_is_shown(machine: LocalMachine, lines: list[str]) -> None:
    """Over QMP and at the prompt it is the same state; one event is off again."""
    machine.qmp.hmp("trace-event mirror_before_* on")
    machine.qmp.execute("trace-event-set-state", name="mirror_before_drain", enable=False)
    assert machine.qmp.hmp("info trace-events mirror_before_*").splitlines() == [
        "mirror_before_sleep : state 1",
        "mirror_before_drain : state 0",
        "mirror_before_flush : state 1",
    ]
    assert machine.qmp.execute("trace-event-get-state", name="mirror_before_s*") == [
        {"name": "mirror_before_sleep", "state": "enabled", "vcpu": False}
    ]
    every = machine.qmp.hmp("info trace-events").splitlines()
    assert "qmp_enter_quit : state 0" in every
    assert lines == []


def test_those_who_only_listen_do_not_change_what_is_shown(machine: LocalMachine) -> None:
    """A lab that watches must not be seen."""
    machine.machine.system.env.trace.listen("*", lambda name, members: None)
    assert " : state 1" not in machine.qmp.hmp("info trace-events")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trace-event nothing on", "There is no trace event 'nothing'"),
        ("info trace-events nothing", "There is no trace event 'nothing'"),
        ("trace-event mirror_start", "Expected 'on' or 'off'"),
        ("trace-event mirror_start on 1", "there are no CPUs here"),
        ("info trace-events mirror_start 0", "there are no CPUs here"),
    ],
)
def test_mistakes_are_told_without_the_word_error(machine: LocalMachine, line: str, said: str) -> None:
    """As QEMU prints them; nothing is switched."""
    answer = machine.qmp.hmp(line)
    assert said in answer
    assert not answer.startswith("Error:")
    assert not machine.machine.system.env.trace.is_logged("mirror_start")


def test_a_pattern_that_fits_nothing_is_no_mistake(machine: LocalMachine) -> None:
    """It may fit what another version has."""
    machine.qmp.execute("trace-event-set-state", name="nothing_*", enable=True)
    assert machine.qmp.execute("trace-event-get-state", name="nothing_*") == []
    assert machine.qmp.hmp("trace-event nothing_* on") == ""


@pytest.mark.parametrize(
    ("second", "told"),
    [("abort", ["prepare 0", "prepare 1", "abort 0", "clean 1", "clean 0"]),
     ("block-dirty-bitmap-add", ["prepare 0", "prepare 1", "commit 0", "commit 1", "clean 1", "clean 0"])],
)  # fmt: skip
def test_the_steps_of_a_transaction_are_told(machine: LocalMachine, second: str, told: list[str]) -> None:
    """All are prepared before the first takes effect; undone and cleaned backwards."""
    steps: list[str] = []
    machine.machine.system.env.trace.listen(
        "transaction_*", lambda name, members: steps.append(f"{name.removeprefix('transaction_')} {members['index']}")
    )
    machine.qmp.execute("blockdev-add", {"driver": "memory", "node-name": "n", "size": 1 << 20})
    bitmap = {"type": "block-dirty-bitmap-add", "data": {"node": "n", "name": "a"}}
    other = {"type": second, "data": {} if second == "abort" else {"node": "n", "name": "b"}}
    if second == "abort":
        with pytest.raises(QmpError):
            machine.qmp.execute("transaction", actions=[bitmap, other])
    else:
        machine.qmp.execute("transaction", actions=[bitmap, other])
    assert steps == told


def test_lines_of_the_human_monitor_are_told(machine: LocalMachine, lines: list[str]) -> None:
    """As they were typed; the commands that they execute are not QMP's."""
    machine.qmp.hmp("trace-event handle_hmp_* on")
    machine.machine.system.env.trace.switch("qmp_enter_query_*", on=True)
    machine.qmp.hmp("info   status")
    assert lines == ["handle_hmp_command cmdline: info   status"]


def test_the_table_of_commands_is_the_dialects() -> None:
    """2012 had no blockdev-add to trace."""
    names = {}
    for dialect in (Dialect.SYSTEM, Dialect.RFC_2012):
        with LocalMachine(options=MachineOptions(dialect=dialect)) as machine:
            names[dialect] = {event.name for event in machine.machine.system.env.trace.matching("qmp_enter_*")}
    assert "qmp_enter_blockdev_add" in names[Dialect.SYSTEM]
    assert "qmp_enter_blockdev_add" not in names[Dialect.RFC_2012]
    assert "qmp_enter_drive_mirror" in names[Dialect.RFC_2012]
