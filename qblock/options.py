"""Options as frozen attrs classes: how a field is declared, and how JSON or key=value text becomes an instance.

Models QAPI's input visitors: a strict one for JSON (an int is not a str) and one for ``key=value`` text, where every leaf
is a string. The wire name of a field is its name with ``-`` for ``_``. Differs from QEMU in that the same class also
carries the documentation (``doc``, ``since``) from which schema and help are read. Errors are `InvalidParameter` with the
path of the member, e.g. ``options[0].file``.
"""

from __future__ import annotations

import enum
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, TypeVar, Union

import attrs

from qblock.errors import CommandError, InvalidParameter
from qblock.units import parse_size

if TYPE_CHECKING:
    from qblock.permissions import ChildRole

T = TypeVar("T")

INT64_MAX: Final = (1 << 63) - 1
MAX_DEPTH: Final = 250
"""How deep options in text may be nested."""
_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'', re.DOTALL)
_STRING_PART: Final = re.compile(r"\\'|\\.|\"", re.DOTALL)
_SHOWN: Final = 200
"""Characters of a value that a message repeats."""


class Absent(enum.Enum):
    """The type of `ABSENT`: a member that was not given, where null means something else."""

    ABSENT = "absent"

    def __bool__(self) -> bool:
        return False


ABSENT: Final = Absent.ABSENT

ChildRef: TypeAlias = str | Mapping[str, Any] | Absent | None
"""How options name a child: a node's name, the options of a new node, None (explicitly none), or `ABSENT`."""


@attrs.frozen
class DriverOptions:
    """Base of all drivers' option classes; has no option of its own."""


class Field(NamedTuple):
    """What is declared of one option: see `option`. ``type`` is the resolved annotation."""

    attribute: str
    wire: str
    type: Any
    default: Any
    doc: str
    since: str
    role: ChildRole | None
    nullable: bool
    standalone: bool
    many: bool
    probed: bool

    @property
    def required(self) -> bool:
        """Whether the member must be given."""
        return self.default is attrs.NOTHING


# ----------------------------------------------------------------------------------------------------------- declaring


def option(default: Any, *, doc: str, since: str = "", name: str | None = None) -> Any:
    """A member that may be left out. ``default`` is its value then; ``name`` the wire name if it is not the field's."""
    return attrs.field(default=default, kw_only=True, metadata={"doc": doc, "since": since, "name": name})


def required(*, doc: str, since: str = "", name: str | None = None, nullable: bool = False) -> Any:
    """A member that must be given; ``nullable``: as JSON null, too."""
    return attrs.field(kw_only=True, metadata={"doc": doc, "since": since, "name": name, "nullable": nullable})


def child(
    role: ChildRole,
    *,
    doc: str,
    optional: bool = False,
    nullable: bool = False,
    standalone: bool = False,
    probed: bool = False,
    since: str = "",
    name: str | None = None,
) -> Any:
    """A child node, given by name or as the options of a new node. Annotate the field with `ChildRef`.

    ``nullable``: JSON null is allowed and means that there shall be none, unlike a member left out (`ABSENT`).
    ``standalone``: a whole image beside the node's own, which is opened without its backing file, and probed where text does
    not tell its driver.
    ``probed``: an image that is probed where text does not tell its driver, and opened with its backing file.
    """
    metadata = {
        "doc": doc, "since": since, "name": name, "role": role, "nullable": nullable, "standalone": standalone,
        "probed": probed,
    }  # fmt: skip
    return attrs.field(default=ABSENT if optional else attrs.NOTHING, kw_only=True, metadata=metadata)


def children(role: ChildRole, *, doc: str, since: str = "") -> Any:
    """A list of child nodes, each given as by `child`; they are called ``NAME.0``, ``NAME.1`` and so on.

    Annotate the field with ``tuple[ChildRef, ...]``.
    """
    return attrs.field(kw_only=True, metadata={"doc": doc, "since": since, "role": role, "many": True})


def fields(cls: type[Any]) -> tuple[Field, ...]:
    """The members of an options class, in order of declaration, with their types resolved."""
    known: tuple[Field, ...] | None = cls.__dict__.get("__qblock_fields__")
    if known is None:
        known = _read_fields(cls)
        cls.__qblock_fields__ = known
    return known


def _read_fields(cls: type[Any]) -> tuple[Field, ...]:
    hints = typing.get_type_hints(cls)
    result = []
    for attribute in attrs.fields(cls):
        meta = attribute.metadata
        wire = meta.get("name") or attribute.name.replace("_", "-")
        default: Any = attribute.default
        if make := getattr(default, "factory", None):
            default = make()
        about = (meta.get("doc", ""), meta.get("since", ""), meta.get("role"), meta.get("nullable", False))
        kind = (meta.get("standalone", False), meta.get("many", False), meta.get("probed", False))
        result.append(Field(attribute.name, wire, hints[attribute.name], default, *about, *kind))
    return tuple(result)


# ------------------------------------------------------------------------------------------------------------- reading


def visit(cls: type[T], given: Any, *, path: str = "", strings: bool = False) -> T:
    """An instance of the attrs class ``cls`` from JSON (``strings``: from key=value text, where leaves are strings).

    Raises `InvalidParameter`: a member is missing, unexpected, or of the wrong type.
    """
    made: T = (_TEXT if strings else _JSON).members(cls, given, path)
    return made


class _Visitor:
    """Values of annotated types from JSON."""

    def members(self, cls: Any, given: Any, path: str) -> Any:
        if not isinstance(given, Mapping):
            raise InvalidParameter(path or "arguments", "must be an object")
        known = fields(cls)
        wires = {field.wire for field in known}
        for key in given:
            if key not in wires:
                raise InvalidParameter(_join(path, key), "is unexpected")
        values: dict[str, Any] = {}
        for field in known:
            where = _join(path, field.wire)
            if field.wire in given:
                if given[field.wire] is None and not field.nullable:
                    raise InvalidParameter(where, "must not be null")
                values[field.attribute] = self.value(field.type, given[field.wire], where)
            elif field.required:
                raise InvalidParameter(where, "is missing")
        return cls(**{_init_name(name): value for name, value in values.items()})

    def value(self, kind: Any, given: Any, path: str) -> Any:
        origin = typing.get_origin(kind)
        if kind is Any:
            return given
        if origin in (Union, types.UnionType):
            return self.alternate(typing.get_args(kind), given, path)
        if origin is Literal:
            return _choice(typing.get_args(kind), given, path)
        if origin in (list, tuple, Sequence) or (isinstance(origin, type) and issubclass(origin, Sequence)):
            return self.array(origin, typing.get_args(kind)[0], given, path)
        if origin is not None and issubclass(origin, Mapping):
            if not isinstance(given, Mapping):
                raise InvalidParameter(path, "must be an object")
            return given
        if attrs.has(kind):
            return self.members(kind, given, path)
        if issubclass(kind, enum.Enum):
            return kind(_choice(tuple(member.value for member in kind), given, path))
        return self.scalar(kind, given, path)

    def array(self, origin: Any, item: Any, given: Any, path: str) -> Any:
        if not isinstance(given, (list, tuple)):
            raise InvalidParameter(path, "must be an array")
        values = [self.value(item, value, _join(path, index)) for index, value in enumerate(given)]
        return values if origin is list else tuple(values)

    def alternate(self, kinds: Sequence[Any], given: Any, path: str) -> Any:
        """A value of one of several kinds: chosen by the JSON type of what is given, like QAPI's alternates."""
        kinds = [kind for kind in kinds if kind is not Absent]
        if given is None:
            if type(None) in kinds:
                return None
            raise InvalidParameter(path, "must not be null")
        kinds = [kind for kind in kinds if kind is not type(None)]
        fitting = [kind for kind in kinds if self.fits(typing.get_origin(kind) or kind, given)]
        if not fitting:
            names = " or ".join(dict.fromkeys(_name(kind) for kind in kinds))
            raise InvalidParameter(path, f"must be {names}")
        return self.value(fitting[0], given, path)

    def fits(self, origin: Any, given: Any) -> bool:
        if origin is Any:
            return True
        if isinstance(given, Mapping):
            return attrs.has(origin) or (isinstance(origin, type) and issubclass(origin, Mapping))
        if isinstance(given, (list, tuple)):
            return isinstance(origin, type) and issubclass(origin, Sequence) and origin is not str
        if origin is Literal or (isinstance(origin, type) and issubclass(origin, enum.Enum)):
            return isinstance(given, str)
        return self.fits_scalar(origin, given)

    def fits_scalar(self, kind: Any, given: Any) -> bool:
        if isinstance(given, bool):
            return kind is bool
        return isinstance(given, (int, float) if kind is float else kind)

    def scalar(self, kind: Any, given: Any, path: str) -> Any:
        if kind is float and isinstance(given, (int, float)) and not isinstance(given, bool):
            return _finite(given, path)
        if not isinstance(given, kind) or (kind is int and isinstance(given, bool)):
            raise InvalidParameter(path, f"has the wrong type: it must be {_name(kind)}")
        return _in_int64(given, path) if kind is int else given


class _TextVisitor(_Visitor):
    """The same from key=value text: a string may stand for a value of another type."""

    def fits_scalar(self, kind: Any, given: Any) -> bool:
        return kind in (str, int, bool, float)

    def scalar(self, kind: Any, given: Any, path: str) -> Any:
        return _parse_scalar(kind, given, path) if isinstance(given, str) else super().scalar(kind, given, path)


_JSON: Final = _Visitor()
_TEXT: Final = _TextVisitor()


def _init_name(attribute: str) -> str:
    return attribute.lstrip("_")


def _join(path: str, key: object) -> str:
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


def _choice(values: Sequence[Any], given: Any, path: str) -> Any:
    if not isinstance(given, str):
        raise InvalidParameter(path, "must be a string")
    if given not in values:
        raise InvalidParameter(path, f"does not accept the value '{given:.{_SHOWN}}'; it takes {', '.join(map(str, values))}")
    return given


_NAMES: Final = {str: "a string", int: "an integer", bool: "a boolean", float: "a number"}


def _name(kind: Any) -> str:
    origin = typing.get_origin(kind) or kind
    if origin in _NAMES:
        return _NAMES[origin]
    if origin is Literal or (isinstance(origin, type) and issubclass(origin, enum.Enum)):
        return "a string"
    return "an object" if attrs.has(origin) or issubclass(origin, Mapping) else "an array"


def _in_int64(given: int, path: str) -> int:
    if not -INT64_MAX - 1 <= given <= INT64_MAX:
        raise InvalidParameter(path, "does not fit into 64 bits (with sign)")
    return given


def _finite(given: float, path: str) -> float:
    try:
        if math.isfinite(given):
            return float(given)
    except OverflowError:
        pass
    raise InvalidParameter(path, "must be a finite number")


def _parse_scalar(kind: Any, given: str, path: str) -> Any:
    if kind is str:
        return given
    if kind is bool:
        if given in ("on", "yes", "true", "y"):
            return True
        if given in ("off", "no", "false", "n"):
            return False
        raise InvalidParameter(path, f"must be 'on' or 'off', not '{given:.{_SHOWN}}'")
    try:
        if kind is float:
            return _finite(float(given), path)
        return _in_int64(int(given) if _NEGATIVE.fullmatch(given) else parse_size(given), path)
    except ValueError:
        raise InvalidParameter(path, f"must be {_name(kind)}, not '{given:.{_SHOWN}}'") from None


_NEGATIVE: Final = re.compile(r"-[0-9]{1,20}")


# ------------------------------------------------------------------------------------------------------------- writing


def dump(value: Any) -> Any:
    """JSON of an attrs object: wire names, members that are None or `ABSENT` left out; other values as they are."""
    result: list[Any] = [value]
    pending: list[tuple[Any, Any]] = [(result, 0)]
    while pending:  # no recursion: images have as many backing images as a user likes
        holder, key = pending.pop()
        item = holder[key]
        below: dict[Any, Any] | list[Any]
        if isinstance(item, enum.Enum):
            holder[key] = item.value
            continue
        if attrs.has(type(item)):
            pairs = ((field.wire, getattr(item, field.attribute)) for field in fields(type(item)))
            below = {wire: part for wire, part in pairs if part is not None and part is not ABSENT}
        elif isinstance(item, Mapping):
            below = dict(item)
        elif isinstance(item, (list, tuple)):
            below = list(item)
        else:
            continue
        holder[key] = below
        parts = below.items() if isinstance(below, dict) else enumerate(below)
        pending += [(below, name) for name, part in parts if type(part) not in _PLAIN]
    return result[0]


_PLAIN: Final = frozenset({str, int, bool, float, type(None)})
"""The types of most values, which are JSON as they are."""


# ----------------------------------------------------------------------------------------------------------- spellings

_ITEM: Final = re.compile(r"((?:[^,]|,,)*)(?:,|\Z)")
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,5}")


def parse_keyval(text: str, *, implied_key: str | None = None) -> dict[str, Any]:
    """``a=1,b.c=x,,y`` as nested dicts of strings; a doubled comma stands for one. Raises `CommandError`.

    A first item without ``=`` is the value of ``implied_key`` where there is one. Of a key given twice the last one counts;
    a comma at the end is allowed.
    """
    return unflatten_dotted(split_keyval(text, implied_key=implied_key))


def parse_options(text: str, *, implied_key: str | None = None) -> tuple[dict[str, Any], bool]:
    """What an option of a command line holds, JSON or as `parse_keyval` reads it; and whether the values are text (no JSON).

    Raises `CommandError`.
    """
    if not text.lstrip().startswith("{"):
        return parse_keyval(text, implied_key=implied_key), True
    try:
        return dict(_parse_json(text)), False
    except (ValueError, RecursionError) as error:
        raise CommandError(f"this is not JSON: {error}: {_shown(text)}") from None


def parse_opts(text: str, *, implied_key: str | None = None) -> tuple[dict[str, Any], bool]:
    """What an option holds: JSON, or as `split_opts` reads it; and whether the values are text. Raises `CommandError`."""
    if text.lstrip().startswith("{"):
        return parse_options(text)
    return dict(split_opts(text, implied_key=implied_key)), True


def split_items(text: str) -> list[str]:
    """What stands between the commas of such a text; a doubled comma is one that belongs to an item."""
    # The last match is the empty one at the end of the text.
    return [match[1].replace(",,", ",") for match in list(_ITEM.finditer(text))[:-1]]


def split_keyval(text: str, *, implied_key: str | None = None) -> dict[str, str]:
    """The keys of such a text, dots and all, with their values; raises as `parse_keyval`."""
    flat: dict[str, str] = {}
    for index, item in enumerate(split_items(text)):
        key, equals, value = item.partition("=")
        if not equals:
            if index or implied_key is None:
                raise CommandError(f"'{item:.{_SHOWN}}' is not of the form key=value")
            key, value = implied_key, item
        if not all(key.split(".")):
            raise CommandError(f"'{key:.{_SHOWN}}' is not a key: a part of it is empty")
        flat[key] = value
    return flat


def split_opts(text: str, *, implied_key: str | None = None) -> dict[str, str]:
    """The same of a text as older options (``-drive``, ``-chardev``, ``-device``) take it: a word alone is a switch.

    ``server`` is ``server=on``, ``nowait`` is ``wait=off``.
    """
    flat: dict[str, str] = {}
    for index, item in enumerate(split_items(text)):
        key, equals, value = item.partition("=")
        if not equals:
            if not index and implied_key is not None:
                key, value = implied_key, item
            else:
                key, value = (item[2:], "off") if item.startswith("no") else (item, "on")
        if not key:
            raise CommandError(f"There is nothing before '{item:.{_SHOWN}}' that it could be the value of")
        flat[key] = value
    return flat


def unflatten_dotted(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{"file.driver": "file"}`` as ``{"file": {"driver": "file"}}``; keys 0, 1, … make lists. Raises `CommandError`.

    Objects may be nested in ``flat`` too, and are merged with what dotted keys say; nothing of ``flat`` itself is changed.
    """
    nested: dict[str, Any] = {}
    _place(nested, flat, "", 0)
    return {key: _lists(value, key) for key, value in nested.items()}


def _place(nested: dict[str, Any], given: Mapping[str, Any], path: str, depth: int) -> None:
    """Enter the leaves of ``given`` into ``nested``, in which every dict is one that was made here."""
    for key, value in given.items():
        where = f"{path}{key}"
        *parents, last = key.split(".")
        below = depth + len(parents) + 1
        if below > MAX_DEPTH:
            raise CommandError(f"The options are nested more than {MAX_DEPTH} deep at '{where:.{_SHOWN}}…'")
        place = nested
        for part in parents:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise CommandError(f"'{where}' and a shorter key contradict each other")
        if isinstance(value, Mapping):
            if not isinstance(place.setdefault(last, {}), dict):
                raise CommandError(f"'{where}' and a shorter key contradict each other")
            _place(place[last], value, f"{where}.", below)
        elif last in place:
            raise CommandError(f"'{where}' is given twice, or contradicts a longer key")
        else:
            place[last] = value


def _lists(value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        return value
    items = {key: _lists(item, f"{path}.{key}") for key, item in value.items()}
    if not items or not all(_INDEX.fullmatch(key) for key in items):
        return items
    if sorted(map(int, items)) != list(range(len(items))):
        raise CommandError(f"The elements of '{path}' must be numbered from 0 without gaps")
    return [items[str(index)] for index in range(len(items))]


def parse_json_filename(filename: str) -> dict[str, Any] | None:
    """The options in a ``json:{…}`` file name (dotted keys are allowed in it), or None for any other name."""
    if not filename.startswith("json:"):
        return None
    shown = _shown(filename)
    try:
        value = _parse_json(filename[5:])
    except (ValueError, RecursionError) as error:
        raise CommandError(f"The file name '{shown}' does not hold valid JSON behind 'json:': {error}") from None
    if not isinstance(value, dict):
        raise CommandError(f"The file name '{shown}' must hold a JSON object behind 'json:'")
    return unflatten_dotted(value)


def double_quoted(text: str) -> str:
    """A JSON text in which strings may be in single quotes, as QEMU takes it, in the only spelling that JSON has."""
    if "'" not in text:
        return text
    return _STRING.sub(lambda found: _double_quoted(found[0]), text)


def _double_quoted(token: str) -> str:
    single = token[0] == "'"

    def respell(found: re.Match[str]) -> str:
        part = found[0]
        return "'" if part == "\\'" else '\\"' if part == '"' and single else part

    return f'"{_STRING_PART.sub(respell, token[1:-1])}"'


def _shown(text: str) -> str:
    """As much of a text as an error message has room for."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _parse_json(text: str) -> Any:
    """The value of a JSON text without keys given twice; raises `ValueError` and, when it is too deep, `RecursionError`."""
    return json.loads(double_quoted(text), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key is given twice")
    return members


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
