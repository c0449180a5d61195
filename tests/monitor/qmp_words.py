"""What query-qmp-schema says, used both ways: arguments made at random that fit it, and replies and events held against it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

Json = Any
Entry = Mapping[str, Any]
ODD: Sequence[Json] = (
    None, True, 0, -1, 1.5, 1 << 31, (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 70, "", "x", "é", "a\0b", "#block001", "json:{}",
    "x" * 300, [], {}, [[]], [None], {"driver": "qcow2"}, {"driver": {}},
)  # fmt: skip
"""What hardly any member takes."""
KINDS: Mapping[str, Callable[[Json], bool]] = {
    "string": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "value": lambda value: True,
}


class Unfit(AssertionError):
    """A value is not what the schema says."""


class Schema:
    """The entries of query-qmp-schema by name."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.types = {entry["name"]: entry for entry in entries}
        self.commands = {name: entry for name, entry in self.types.items() if entry["meta-type"] == "command"}
        self.events = {name: entry for name, entry in self.types.items() if entry["meta-type"] == "event"}

    def members(self, kind: str, value: Mapping[str, Json]) -> Iterator[Entry]:
        """The members that an object has, those included that the value of its tag brings."""
        entry = self.types[kind]
        yield from entry["members"]
        for variant in entry.get("variants", ()):
            if variant["case"] == value.get(entry["tag"]):
                yield from self.types[variant["type"]]["members"]

    def check(self, value: Json, kind: str, where: str) -> None:
        """Raises `Unfit`; ``where`` says what the value is."""
        entry = self.types[kind]
        match entry["meta-type"]:
            case "builtin" if not KINDS[entry["json-type"]](value):
                raise Unfit(f"{where}: {value!r} is not of the type {kind}")
            case "enum" if value not in entry["values"]:
                raise Unfit(f"{where}: {value!r} is none of {entry['values']}")
            case "array":
                if not isinstance(value, list):
                    raise Unfit(f"{where}: {value!r} is no array")
                for number, item in enumerate(value):
                    self.check(item, entry["element-type"], f"{where}[{number}]")
            case "alternate" if not any(self._fits(value, member["type"]) for member in entry["members"]):
                raise Unfit(f"{where}: {value!r} is none of the alternatives")
            case "object":
                self._check_object(value, kind, where)

    def _fits(self, value: Json, kind: str) -> bool:
        try:
            self.check(value, kind, "")
        except Unfit:
            return False
        return True

    def _check_object(self, value: Json, kind: str, where: str) -> None:
        if not isinstance(value, dict):
            raise Unfit(f"{where}: {value!r} is no object")
        members = {member["name"]: member for member in self.members(kind, value)}
        missing = [name for name, member in members.items() if "default" not in member and name not in value]
        if missing or not value.keys() <= members.keys():
            raise Unfit(f"{where}: missing {missing}, unknown {value.keys() - members.keys()}")
        for name, item in value.items():
            self.check(item, members[name]["type"], f"{where}.{name}")


class Namer:
    """Says what a text or a number may be by the name of its member, and how probable optional members are.

    ``owner`` is the command, the action of a transaction, or the driver that the member belongs to.
    """

    def text(self, member: str, owner: str) -> str:
        """A string."""
        raise NotImplementedError

    def number(self, member: str, owner: str) -> int:
        """An integer."""
        raise NotImplementedError

    def choices(self, member: str, values: Sequence[str]) -> Sequence[str]:
        """What to choose from where ``values`` are allowed; some may be there more often."""
        raise NotImplementedError

    def anything(self, member: str, owner: str) -> Json:
        """Any JSON."""
        raise NotImplementedError

    def probability(self, member: str) -> float:
        """Of an optional member."""
        raise NotImplementedError


class Words:
    """Makes arguments that fit the schema."""

    DEEPEST = 3
    """Nodes are not defined more deeply inside of one another."""

    def __init__(self, schema: Schema, random: Random, namer: Namer) -> None:
        self.schema, self.random, self.namer = schema, random, namer

    def arguments(self, command: str) -> dict[str, Json]:
        """For a command."""
        arguments = self._object(self.schema.commands[command]["arg-type"], command, 0)
        assert isinstance(arguments, dict)
        return arguments

    def _value(self, kind: str, member: str, owner: str, depth: int) -> Json:
        entry = self.schema.types[kind]
        match entry["meta-type"]:
            case "enum":
                return self.random.choice(self.namer.choices(member, entry["values"]))
            case "array":
                count = self.random.choice((0, 1, 1, 2, 2, 3))
                return [self._value(entry["element-type"], member, owner, depth) for _ in range(count)]
            case "alternate":
                kinds = [one["type"] for one in entry["members"]]
                if depth >= self.DEEPEST or self.random.random() < 0.5:
                    kinds = [one for one in kinds if self.schema.types[one]["meta-type"] != "object"]
                return self._value(self.random.choice(kinds), member, owner, depth + 1)
            case "object":
                return self._object(kind, owner, depth)
        match entry["json-type"]:
            case "string":
                return self.namer.text(member, owner)
            case "int":
                return self.namer.number(member, owner)
            case "number":
                return self.random.random()
            case "boolean":
                return self.random.random() < 0.5
            case "null":
                return None
        return self.namer.anything(member, owner)

    def _object(self, kind: str, owner: str, depth: int) -> dict[str, Json]:
        entry, made = self.schema.types[kind], dict[str, Json]()
        self._fill(made, entry["members"], owner, depth)
        if "tag" in entry:
            chosen = made.get(entry["tag"])
            more = [one for one in self.schema.members(kind, made) if one["name"] not in made]
            own = [one for one in more if one not in entry["members"]]
            self._fill(made, own, str(chosen), depth)
        return made

    def _fill(self, made: dict[str, Json], members: Sequence[Entry], owner: str, depth: int) -> None:
        for member in members:
            name = member["name"]
            if "default" not in member or self.random.random() < self.namer.probability(name):
                made[name] = self._value(member["type"], name, owner, depth)


def spoilt(arguments: Mapping[str, Json], random: Random) -> dict[str, Json]:
    """The same with one mistake: a member missing, too many, or of another kind."""
    made = copy.deepcopy(dict(arguments))
    objects = [one for one in _containers(made) if isinstance(one, dict)]
    places = [(one, key) for one in _containers(made) for key in (one if isinstance(one, dict) else range(len(one)))]
    if not places or random.random() < 0.2:
        random.choice(objects)[random.choice(("unknown", "driver", "size", "file", "é"))] = random.choice(ODD)
        return made
    container, key = random.choice(places)
    if random.random() < 0.2:
        del container[key]
    else:
        container[key] = random.choice(ODD)
    return made


def _containers(value: Json) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)
