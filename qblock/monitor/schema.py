"""query-qmp-schema: all commands, events and types of a monitor, read off the classes that it uses.

Models QAPI introspection: types are known by numbers only, so that nobody depends on their names; arrays are called
``[type]``. What is described is what qblock has, never what QEMU has besides.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Union

import attrs

from qblock import options
from qblock.driver import Driver
from qblock.monitor.command import Command, CommandTable
from qblock.monitor.commands.blockdev import BlockdevCreateArguments
from qblock.monitor.commands.transaction import ACTIONS, TransactionAction
from qblock.monitor.dialects import Dialect
from qblock.monitor.events import EVENTS
from qblock.nodespec import CommonOptions
from qblock.objects import OBJECT_OPTIONS, THROTTLE_TWINS, ObjectOptions
from qblock.options import Field, option, required

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.registry import DriverRegistry

_BUILTINS: Final[Mapping[Any, tuple[str, str]]] = {
    str: ("str", "string"),
    int: ("int", "int"),
    bool: ("bool", "boolean"),
    float: ("number", "number"),
    type(None): ("null", "null"),
    Any: ("any", "value"),
    object: ("any", "value"),
}


@attrs.frozen
class SchemaInfo:
    """Entry of query-qmp-schema; ``meta-type`` brings the members of one of `_ENTRIES`."""

    name: str = required(doc="name of the command, event or type")
    meta_type: Literal["builtin", "enum", "array", "object", "alternate", "command", "event"] = required(doc="its kind")
    features: list[str] | None = option(None, doc="feature flags")


@attrs.frozen
class _Builtin:
    json_type: Literal["string", "number", "int", "boolean", "null", "object", "array", "value"] = required(doc="in JSON")


@attrs.frozen
class _EnumValue:
    name: str = required(doc="the value")
    features: list[str] | None = option(None, doc="feature flags")


@attrs.frozen
class _Enum:
    members: list[_EnumValue] = required(doc="its values")
    values: list[str] = required(doc="the same by name")


@attrs.frozen
class _Array:
    element_type: str = required(doc="type of its elements")


@attrs.frozen
class _ObjectMember:
    name: str = required(doc="name of the member")
    type: str = required(doc="type of its value")
    default: Any = option(None, doc="there is one, null where it is not told, if the member is optional")
    features: list[str] | None = option(None, doc="feature flags")


@attrs.frozen
class _Variant:
    case: str = required(doc="value of the tag")
    type: str = required(doc="object whose members come in then")


@attrs.frozen
class _Object:
    members: list[_ObjectMember] = required(doc="what it always has")
    tag: str | None = option(None, doc="member that tells the variants apart")
    variants: list[_Variant] | None = option(None, doc="what a value of the tag brings")


@attrs.frozen
class _Alternative:
    type: str = required(doc="what the value may be")


@attrs.frozen
class _Alternate:
    members: list[_Alternative] = required(doc="what its values may be")


@attrs.frozen
class _Command:
    arg_type: str = required(doc="object of its arguments")
    ret_type: str = required(doc="type of its reply")
    allow_oob: bool | None = option(None, doc="may overtake others")


@attrs.frozen
class _Event:
    arg_type: str = required(doc="object of its data")


_ENTRIES: Final[Mapping[str, type[Any]]] = {
    "builtin": _Builtin,
    "enum": _Enum,
    "array": _Array,
    "object": _Object,
    "alternate": _Alternate,
    "command": _Command,
    "event": _Event,
}


def introspect(commands: CommandTable, registry: DriverRegistry) -> list[Json]:
    """The reply of query-qmp-schema for this table of commands, with the drivers of ``registry``."""
    schema = _Schema(registry, commands.dialect)
    for command in commands.values():
        schema.add_command(command)
    for name, kind in EVENTS.items():
        if commands.dialect.has_event(name, kind.dialects):
            schema.entries.append({"name": name, "meta-type": "event", "arg-type": schema.type_name(kind.data)})
    return schema.entries


class _Schema:
    """Collects entries; types get their numbers in the order in which they are met."""

    def __init__(self, registry: DriverRegistry, dialect: Dialect) -> None:
        self.entries: list[Json] = []
        self._registry = registry
        self._dialect = dialect
        self._names: dict[Any, str] = {}
        self._numbers = 0

    def add_command(self, command: Command) -> None:
        """Enter a command with the types that it uses."""
        entry: dict[str, Json] = {
            "name": command.name,
            "meta-type": "command",
            "arg-type": self._arguments(command),
            "ret-type": self._empty() if command.returns is None else self.type_name(command.returns),
        }
        if command.oob:
            entry["allow-oob"] = True
        if command.features:
            entry["features"] = list(command.features)
        self.entries.append(entry)

    def type_name(self, kind: Any) -> str:
        """The name of a type, which is entered when it is met for the first time."""
        kind = _widened(kind)
        if kind in _BUILTINS:
            name, json_type = _BUILTINS[kind]
            return self._once(name, {"name": name, "meta-type": "builtin", "json-type": json_type})
        if kind in self._names:
            return self._names[kind]
        origin = typing.get_origin(kind)
        if origin in (list, tuple, Sequence):
            return self._array_of(self.type_name(typing.get_args(kind)[0]))
        if origin in (Union, types.UnionType):
            return self._alternate(kind, [self.type_name(part) for part in typing.get_args(kind)])
        if origin is Literal:
            return self._enum(kind, typing.get_args(kind))
        if isinstance(origin or kind, type) and issubclass(origin or kind, Mapping | dict):
            return self.type_name(Any)
        if issubclass(kind, enum.Enum):
            return self._enum(kind, [member.value for member in kind])
        return self._action() if kind is TransactionAction else self._object(kind)

    # ------------------------------------------------------------------------------------------------------ kinds of types

    def _array_of(self, element: str) -> str:
        return self._once(f"[{element}]", {"name": f"[{element}]", "meta-type": "array", "element-type": element})

    def _once(self, name: str, entry: dict[str, Json]) -> str:
        if name not in self._names:
            self._names[name] = name
            self.entries.append(entry)
        return name

    def _new(self, key: Any, meta_type: str) -> dict[str, Json]:
        name = str(self._numbers)
        self._numbers += 1
        self._names[key] = name
        entry: dict[str, Json] = {"name": name, "meta-type": meta_type}
        self.entries.append(entry)
        return entry

    def _enum(self, key: Any, values: Sequence[str]) -> str:
        entry = self._new(key, "enum")
        entry["members"] = [{"name": value} for value in values]
        entry["values"] = list(values)
        return str(entry["name"])

    def _alternate(self, key: Any, parts: Sequence[str]) -> str:
        entry = self._new(key, "alternate")
        entry["members"] = [{"type": part} for part in parts]
        return str(entry["name"])

    def _empty(self) -> str:
        if "empty" not in self._names:
            self._new("empty", "object")["members"] = []
        return self._names["empty"]

    def _object(self, cls: type[Any]) -> str:
        if not attrs.fields(cls):
            return self._empty()
        if cls in self._names:
            return self._names[cls]
        entry = self._new(cls, "object")
        kinds: Mapping[str, type[Any]] | None = getattr(cls, "KINDS", None)
        if kinds is not None:
            return self._union(entry, kinds)
        entry["members"] = [self._member(field, cls) for field in options.fields(cls)]
        if cls is SchemaInfo:
            entry["tag"] = "meta-type"
            entry["variants"] = [{"case": kind, "type": self._object(part)} for kind, part in _ENTRIES.items()]
        return str(entry["name"])

    def _member(self, field: Field, owner: type[Any]) -> dict[str, Json]:
        member: dict[str, Json] = {"name": field.wire}
        if field.role is not None:
            one = self._child(nullable=field.nullable)
            member["type"] = self._array_of(one) if field.many else one
        elif owner is BlockdevCreateArguments and field.wire == "options":
            member["type"] = self._create_options()
        elif field.nullable:
            member["type"] = self._or_null(self.type_name(_without_none(field.type)))
        else:
            member["type"] = self.type_name(_without_none(field.type))
        if not field.required:
            member["default"] = None
        return member

    # -------------------------------------------------------------------------------------------------------- transactions

    def _action(self) -> str:
        """TransactionAction: for each kind of action an object that has its arguments as ``data``."""
        kinds = ACTIONS[self._dialect]
        entry = self._new(TransactionAction, "object")
        return self._union(entry, {name: kind.arguments for name, kind in kinds.items()})

    def _union(self, entry: dict[str, Json], kinds: Mapping[str, type[Any]]) -> str:
        """A type whose ``data`` depends on its ``type``."""
        entry["members"] = [{"name": "type", "type": self._enum(("kinds of", entry["name"]), list(kinds))}]
        entry["tag"] = "type"
        entry["variants"] = [{"case": name, "type": self._wrapped(cls)} for name, cls in kinds.items()]
        return str(entry["name"])

    def _wrapped(self, arguments: type[Any]) -> str:
        if ("data", arguments) not in self._names:
            entry = self._new(("data", arguments), "object")
            entry["members"] = [{"name": "data", "type": self._object(arguments)}]
        return self._names["data", arguments]

    # ------------------------------------------------------------------------------------------------------------- drivers

    def _arguments(self, command: Command) -> str:
        if command.arguments is CommonOptions:
            return self._node_options()
        if command.arguments is ObjectOptions:
            return self._object_options()
        return self._object(command.arguments)

    def _node_options(self) -> str:
        """BlockdevOptions: the members all nodes have, and those of each driver."""
        if "node options" in self._names:
            return self._names["node options"]
        drivers = {name: self._registry.get(name) for name in sorted(self._registry.names())}
        entry = self._new("node options", "object")
        members = [
            self._member(field, CommonOptions) for field in options.fields(CommonOptions) if field.wire != "driver"
        ]
        driver = {"name": "driver", "type": self._enum("node drivers", list(drivers))}
        entry["members"] = [driver, *members]
        entry["tag"] = "driver"
        entry["variants"] = [
            {"case": name, "type": self._object(driver.options_class)} for name, driver in drivers.items()
        ]
        return str(entry["name"])

    def _object_options(self) -> str:
        """ObjectOptions: the members all objects have, and those of each type."""
        shared = {field.wire for field in options.fields(ObjectOptions)}
        entry = self._new("object options", "object")
        kind = {"name": "qom-type", "type": self._enum("object types", list(OBJECT_OPTIONS))}
        entry["members"] = [kind, {"name": "id", "type": self.type_name(str)}]
        entry["tag"] = "qom-type"
        entry["variants"] = []
        for name, cls in OBJECT_OPTIONS.items():
            variant = self._new(("object", cls), "object")
            variant["members"] = [self._member(field, cls) for field in options.fields(cls) if field.wire not in shared]
            if name == "throttle-group":
                twins = ({"name": twin, "type": "int", "default": None, "features": ["unstable"]} for twin in THROTTLE_TWINS)
                variant["members"] += twins
            entry["variants"].append({"case": name, "type": variant["name"]})
        return str(entry["name"])

    def _create_options(self) -> str:
        """BlockdevCreateOptions: what each driver that can create images wants to know."""
        classes = {name: _create_class(self._registry.get(name)) for name in sorted(self._registry.names())}
        creators = {name: cls for name, cls in classes.items() if cls is not None}
        entry = self._new("create options", "object")
        entry["members"] = [{"name": "driver", "type": self._enum("create drivers", list(creators))}]
        entry["tag"] = "driver"
        entry["variants"] = [{"case": name, "type": self._object(cls)} for name, cls in creators.items()]
        return str(entry["name"])

    def _or_null(self, kind: str) -> str:
        """StrOrNull, or the like for another type."""
        key = f"{kind} or null"
        return self._names.get(key) or self._alternate(key, [kind, self.type_name(type(None))])

    def _child(self, *, nullable: bool) -> str:
        """BlockdevRef, or BlockdevRefOrNull."""
        key = "child or null" if nullable else "child"
        if key in self._names:
            return self._names[key]
        parts = [self._node_options(), self.type_name(str)]
        return self._names.get(key) or self._alternate(key, [*parts, self.type_name(type(None))] if nullable else parts)


def _create_class(driver: type[Driver]) -> type[Any] | None:
    return getattr(driver, "create_options_class", None)


def _without_none(kind: Any) -> Any:
    """``X`` for ``X | None``: that a member may be absent is said by its default."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        parts = tuple(part for part in typing.get_args(kind) if part not in (type(None), options.Absent))
        return Union[parts]  # noqa: UP007 - the parts are only known at run time
    return kind


def _widened(kind: Any) -> Any:
    return Any if kind is object else kind
