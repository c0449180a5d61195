"""A dialect is data: the commands, the events and the classes of errors that a monitor of its time had."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest

from qblock import errors
from qblock.monitor.command import Command
from qblock.monitor.commands import table
from qblock.monitor.dialects import MACHINE_DIALECTS, Dialect, belonging_to, dialect_named
from qblock.monitor.hmp import HmpMonitor
from qblock.monitor.machine import MachineOptions
from qblock.monitor.qmp import QmpSession
from qblock.testing.images import make_chain
from qblock.testing.machines import LocalMachine

HISTORIC = [dialect for dialect in Dialect if dialect.traits.inherits is not None]


@attrs.frozen
class Dated:
    """The least that a candidate is."""

    name: str
    since: str
    dialects: frozenset[Dialect]
    body: str = ""


def test_a_dialect_inherits_what_is_old_enough_and_replaces_what_it_has_itself() -> None:
    """1.10 is younger than 1.1: versions are numbers, not text."""
    today, then = frozenset({Dialect.SYSTEM}), frozenset({Dialect.RFC_2012})
    candidates = [
        Dated("old", "0.14", today),
        Dated("new", "1.3", today),
        Dated("newer", "1.10", today),
        Dated("changed", "1.1", today, "today"),
        Dated("changed", "1.1", then, "then"),
        Dated("daemon", "0.14", frozenset({Dialect.STORAGE_DAEMON})),
    ]
    assert [one.name for one in belonging_to(Dialect.SYSTEM, candidates)] == ["changed", "new", "newer", "old"]
    assert [(one.name, one.body) for one in belonging_to(Dialect.RFC_2012, candidates)] == [("changed", "then"), ("old", "")]


@pytest.mark.parametrize("dialect", HISTORIC, ids=lambda dialect: dialect.value)
def test_historic_dialects_have_no_command_of_a_later_time(dialect: Dialect) -> None:
    """Who tries 2012 must not succeed with the means of 2022."""
    commands = table(dialect)
    assert {"query-block", "query-block-jobs", "block-job-cancel", "getfd", "quit"} <= set(commands)
    assert not {"blockdev-add", "blockdev-mirror", "block-job-complete", "job-cancel", "query-jobs"} & set(commands)
    names = {name for command in HmpMonitor(commands) for name in command.names}
    assert {"info block-jobs", "block_job_cancel", "drive_add"} <= names
    assert not {"block_job_complete", "block_job_pause", "qemu-io"} & names


@pytest.mark.parametrize("command", [c for d in HISTORIC for c in table(d).values()], ids=lambda command: command.name)
def test_their_commands_are_documented_and_their_arguments_are_frozen_classes(command: Command) -> None:
    """As those of the default dialect."""
    assert command.doc.endswith(".")
    assert all(field.metadata["doc"] for field in attrs.fields(command.arguments))


def test_a_dialect_is_chosen_by_name() -> None:
    """As on the command line; a wrong name is answered with the right ones."""
    assert [dialect_named(dialect.value) for dialect in MACHINE_DIALECTS] == list(MACHINE_DIALECTS)
    with pytest.raises(errors.CommandError, match="rfc-2012"):
        dialect_named("rfc-2013")


def test_errors_are_called_as_they_were_called_then() -> None:
    """Since 1.2 most errors are GenericError; before, their classes told what had happened."""
    busy = errors.NodeBusy("disk", "a job uses it")
    assert Dialect.SYSTEM.error_class(busy) == "GenericError"
    assert Dialect.RFC_2012.error_class(busy) == "DeviceInUse"
    assert Dialect.RFC_2012.error_class(errors.BlockIOError(5)) == "IOError"
    assert Dialect.SYSTEM.error_class(errors.UnknownFd("fd")) == "GenericError"
    assert Dialect.RFC_2012.error_class(errors.UnknownFd("fd")) == "FdNotFound"
    assert {dialect.error_class(errors.DeviceNotFound("x")) for dialect in Dialect} == {"DeviceNotFound"}
    assert {dialect.error_class(errors.CommandError("what")) for dialect in Dialect} == {"GenericError"}


def test_events_are_those_of_the_time_with_the_members_of_the_time() -> None:
    """SHUTDOWN told no reason, and the states of a job were its own affair."""
    data = {"guest": False, "reason": "host-qmp-quit"}
    assert Dialect.SYSTEM.event_data("SHUTDOWN", data) == data
    assert Dialect.RFC_2012.event_data("SHUTDOWN", data) == {}
    assert Dialect.RFC_2012.event_data("JOB_STATUS_CHANGE", {"id": "x", "status": "ready"}) is None


def test_there_is_no_band_to_be_out_of_before_it_was_invented() -> None:
    """Commands out of band came with 2.12: a client of 2012 is not told of them, and one of today cannot have them."""
    session = QmpSession("qblock", Dialect.RFC_2012)
    assert json.loads(session.greeting())["QMP"]["capabilities"] == []
    with pytest.raises(errors.InvalidParameter, match="oob"):
        session.negotiate(["oob"])


def test_a_stream_in_the_old_dialect_shows_one_event(tmp_path: Path) -> None:
    """The whole way: a machine of 2012 runs a job that has its states, and shows only its end."""
    *_, top = make_chain(tmp_path, "1M", [("base", {0: b"b" * 4096}), ("top", {})])
    with LocalMachine(options=MachineOptions(dialect=Dialect.RFC_2012)) as machine:
        machine.add_drive(top)
        machine.qmp.execute("block-stream", device="virtio0")
        machine.qmp.wait_event("BLOCK_JOB_COMPLETED", device="virtio0", type="stream")
        assert machine.machine.event_names("completed") == {"BLOCK_JOB_COMPLETED"}
        assert machine.machine.event_names("ready") == frozenset()
        machine.advance("1s")
        machine.qmp.execute("quit")
        assert [event.name for event in machine.qmp.events()] == ["SHUTDOWN"]
