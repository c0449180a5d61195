"""Every command is documented, typed, and takes exactly the members that QEMU 7.2 takes; introspection describes it."""

from __future__ import annotations

import enum
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

import attrs
import pytest

from qblock.monitor import replies
from qblock.monitor.command import Command
from qblock.monitor.commands import table
from qblock.monitor.dialects import Dialect
from qblock.monitor.events import EVENTS
from qblock.monitor.hmp import HmpMonitor
from qblock.monitor.schema import introspect
from qblock.options import Field, fields
from qblock.registry import DriverRegistry

QEMU: dict[str, Any] = json.loads((Path(__file__).parent / "qmp_7_2.json").read_text())
"""Arguments of the commands and data of the events as qemu-storage-daemon and qemu-system-x86_64 7.2.22 describe them."""
EXTENSIONS = {
    "drive-reopen",  # proposed in April 2012 and never merged; offered beside block-job-complete, which took its place
}
"""Commands of the default dialect that no QEMU has, each with the reason why it is there."""
COMMANDS = list(table(Dialect.SYSTEM).values())
OF_QEMU = [command for command in COMMANDS if command.name not in EXTENSIONS]
SUBSETS = {("qmp_capabilities", "enable"), ("blockdev-create", "options"), ("x-blockdev-amend", "options")}
"""Members whose values QEMU has more of, or spells by other types."""
MORE = {("drive-mirror", "copy-mode"): ["semi-sync"], ("blockdev-mirror", "copy-mode"): ["semi-sync"]}
"""Values that only we have: semi-synchronous mirroring was proposed in 2012 and never merged."""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_is_documented_and_its_arguments_are_a_frozen_class(command: Command) -> None:
    """Help, schema and docs are read off the function and the class."""
    assert command.doc.endswith(".")
    assert command.since
    assert attrs.has(command.arguments)
    instance = command.arguments.__attrs_attrs__
    assert all(field.metadata["doc"] for field in instance)
    assert command.arguments.__setattr__ is not object.__setattr__


def _shape(kind: Any) -> Any:
    """A Python annotation in the terms of the table."""
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        parts = [part for part in typing.get_args(kind) if part is not type(None)]
        return _shape(parts[0]) if len(parts) == 1 else "alternate"
    if origin is Literal:
        return sorted(typing.get_args(kind))
    if origin is list:
        return [_shape(typing.get_args(kind)[0])]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return sorted(member.value for member in kind)
    return {str: "str", int: "int", bool: "bool", Any: "any"}.get(kind, "object")


@pytest.mark.parametrize("command", [c for c in OF_QEMU if not c.checks_itself], ids=lambda command: command.name)
def test_arguments_are_those_of_qemu(command: Command) -> None:
    """Same names, same optional ones, same types: a client's messages fit both."""
    known = QEMU["commands"][command.name]["arguments"]
    ours: dict[str, Field] = {field.wire: field for field in fields(command.arguments)}
    assert ours.keys() == known.keys()
    for name, field in ours.items():
        assert (not field.required) is known[name]["optional"], name
        if (command.name, name) not in SUBSETS:
            extra = MORE.get((command.name, name), [])
            expected = sorted([*known[name]["type"], *extra]) if extra else known[name]["type"]
            assert ("alternate" if field.nullable else _shape(field.type)) == expected, name


@pytest.mark.parametrize("command", OF_QEMU, ids=lambda command: command.name)
def test_replies_have_no_members_that_qemu_does_not_have(command: Command) -> None:
    """Clients with a schema of their own must be able to read them."""
    known = QEMU["commands"][command.name]["returns"]
    kind = command.returns
    if typing.get_origin(kind) is list:
        kind = typing.get_args(kind)[0]
    if attrs.has(kind) and command.name != "query-qmp-schema":
        assert {field.wire for field in fields(kind)} <= set(known)


def test_the_daemon_has_no_command_that_qemus_does_not_have() -> None:
    """query-status and HMP belong to the system emulator."""
    daemon = table(Dialect.STORAGE_DAEMON)
    assert {command.name for command in OF_QEMU if QEMU["commands"][command.name]["daemon"]} == set(daemon)


def test_what_the_default_dialect_has_beyond_qemu_is_listed() -> None:
    """A client must not take an extension for a command of 7.2, nor a mistyped name become one."""
    assert {command.name for command in COMMANDS} - set(QEMU["commands"]) == EXTENSIONS


ACTIONS_OF_OURS = {"blockdev-mirror", "drive-mirror"}
"""Proposed in the announcement of mirroring, and taken by no QEMU."""


def test_actions_of_a_transaction_are_those_of_qemu() -> None:
    """Introspection tells clients which actions they may use, and with which members."""
    entries = {entry["name"]: entry for entry in introspect(table(Dialect.SYSTEM), DriverRegistry())}
    transaction = entries["transaction"]
    actions = next(member for member in entries[transaction["arg-type"]]["members"] if member["name"] == "actions")
    union = entries[actions["type"].strip("[]")]
    ours = {}
    for variant in union["variants"]:
        ((data,),) = (entries[variant["type"]]["members"],)
        ours[variant["case"]] = sorted(member["name"] for member in entries[data["type"]]["members"])
    assert ours.keys() - QEMU["actions"].keys() == ACTIONS_OF_OURS
    assert QEMU["actions"].keys() <= ours.keys()
    assert all(ours[name] == QEMU["actions"][name] for name in ours.keys() & QEMU["actions"].keys())


@pytest.mark.parametrize("name", EVENTS)
def test_events_are_those_of_qemu(name: str) -> None:
    """Same members, same optional ones."""
    assert {field.wire: not field.required for field in fields(EVENTS[name].data)} == QEMU["events"][name]


@pytest.mark.parametrize("dialect", Dialect)
def test_introspection_is_closed_and_has_each_name_once(dialect: Dialect) -> None:
    """Every type that is referred to is described, and JSON can carry it."""
    entries = introspect(table(dialect), DriverRegistry())
    assert json.loads(json.dumps(entries)) == entries
    names = [(entry["meta-type"] in ("command", "event"), entry["name"]) for entry in entries]
    assert len(set(names)) == len(names)
    described = {name for is_verb, name in names if not is_verb}
    referred = set()
    for entry in entries:
        referred |= {entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry}
        for part in (*entry.get("members", ()), *entry.get("variants", ())):
            referred |= {part["type"]} if "type" in part else set()
    assert referred <= described
    assert {entry["name"] for entry in entries if entry["meta-type"] == "command"} == set(table(dialect))


def test_introspection_describes_blockdev_add_by_driver() -> None:
    """The tag, and for each driver its own members; children are a name or an object."""
    entries = {(e["meta-type"], e["name"]): e for e in introspect(table(Dialect.SYSTEM), DriverRegistry())}
    options = entries["object", entries["command", "blockdev-add"]["arg-type"]]
    assert options["tag"] == "driver"
    (case,) = (variant for variant in options["variants"] if variant["case"] == "qcow2")
    members = {member["name"]: member for member in entries["object", case["type"]]["members"]}
    backing = entries["alternate", members["backing"]["type"]]
    assert {"type": "null"} in backing["members"]
    assert "default" in members["backing"]
    assert "default" not in members["file"]


def test_hmp_commands_are_documented_and_their_arguments_are_typed() -> None:
    """The REPL completes and explains them from the same objects."""
    monitor = HmpMonitor(table(Dialect.SYSTEM))
    for command in monitor:
        assert command.help, command.name
        assert all(argument.kind.lstrip("-") for argument in command.arguments), command.name
    assert {"block_stream", "drive_mirror", "info block", "qemu-io"} <= {command.name for command in monitor}


def test_replies_document_every_member() -> None:
    """Units and meanings are read off the classes."""
    for cls in vars(replies).values():
        if isinstance(cls, type) and attrs.has(cls):
            assert all(field.doc for field in fields(cls)), cls
