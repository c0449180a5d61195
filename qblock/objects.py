"""User-creatable objects (``object-add``, ``--object``): secrets, throttle groups and I/O threads, which others refer to
by id.

Models QEMU's QOM objects as far as the block layer here has a use for them; other types are refused by name. Differs from QEMU in
that an object's secret is never shown again.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Protocol

import attrs

from qblock.driver import Json
from qblock.environment import Environment
from qblock.errors import CommandError, DuplicateName, InvalidParameter
from qblock.graph import check_identifier
from qblock.iothreads import IOThread, IOThreadSettings, check_settings
from qblock.options import dump, fields, option, required, visit
from qblock.throttle_limits import NO_LIMITS, ThrottleLimits, changed_limits
from qblock.throttling import ThrottleGroup


@attrs.frozen
class ObjectOptions:
    """The members that the options of all objects have."""

    qom_type: str = required(doc="the type of the object")
    id: str = required(doc="name of the object")


@attrs.frozen
class SecretOptions(ObjectOptions):
    """``SecretProperties``: in plain or base64 form, or encrypted by another secret (``keyid`` and ``iv``)."""

    data: str | None = option(None, doc="the secret itself; anybody who can list processes sees it", since="2.6")
    file: str | None = option(None, doc="file that holds the secret", since="2.6")
    format: Literal["raw", "base64"] = option("raw", doc="how data or the file are encoded", since="2.6")
    keyid: str | None = option(None, doc="secret of 32 bytes that this one is encrypted by (AES-256-CBC)", since="2.6")
    iv: str | None = option(None, doc="initialisation vector of the encryption, in base64", since="2.6")


class UserObject(Protocol):
    """An object."""

    @property
    def kind(self) -> str:
        """Its type."""

    @property
    def properties(self) -> Mapping[str, str]:
        """The properties that are shown, with their QOM types."""

    def get(self, name: str) -> Json:
        """The value of a property out of ``properties``."""

    def set(self, name: str, value: Json) -> None:
        """Change a property; raises `CommandError`."""

    def delete(self) -> None:
        """Undo what making the object did; raises `CommandError` while it is in use."""


# -------------------------------------------------------------------------------------------------------------- secrets


@attrs.frozen(eq=False)
class Secret:
    """A secret, which drivers find under its id in `Environment.secrets`."""

    kind: ClassVar[str] = "secret"
    properties: ClassVar[Mapping[str, str]] = {
        "format": "QCryptoSecretFormat", **dict.fromkeys(("file", "keyid", "iv"), "string")
    }  # fmt: skip

    options: SecretOptions = attrs.field(repr=False)
    env: Environment = attrs.field(repr=False)

    @classmethod
    def make(cls, env: Environment, given: Mapping[str, Json], *, strings: bool) -> Secret:
        """Read the secret; raises `InvalidParameter` and `CommandError`."""
        options = visit(SecretOptions, given, strings=strings)
        env.secrets[options.id] = _read_secret(options, env.secrets)
        return cls(options, env)

    def get(self, name: str) -> Json:
        """See `UserObject`."""
        return getattr(self.options, name) or ""

    def set(self, name: str, value: Json) -> None:
        """See `UserObject`: a secret stays as it is."""
        raise CommandError(f"'{name}' of the secret '{self.options.id}' cannot be changed; make another secret")

    def delete(self) -> None:
        """See `UserObject`: images that were opened with it keep their keys."""
        del self.env.secrets[self.options.id]


def _read_secret(options: SecretOptions, known: Mapping[str, bytes]) -> bytes:
    if (options.data is None) == (options.file is None):
        raise CommandError(f"The secret '{options.id}' needs either 'data' or 'file'")
    try:
        raw = options.data.encode() if options.data is not None else Path(options.file or "").read_bytes()
        decoded = base64.b64decode(raw, validate=True) if options.format == "base64" else raw
        return decoded if options.keyid is None else _decrypted(options, decoded, known)
    except OSError as error:
        raise CommandError(
            f"The secret '{options.id}' could not be read from '{options.file}': {error.strerror}"
        ) from None
    except binascii.Error as error:
        raise CommandError(f"The secret '{options.id}' is not valid base64: {error}") from None


def _decrypted(options: SecretOptions, data: bytes, known: Mapping[str, bytes]) -> bytes:
    """The secret under the encryption; raises `CommandError` and `binascii.Error`."""
    from qblock.crypto.secrets import decrypt_secret  # noqa: PLC0415 - only management software encrypts secrets

    assert options.keyid is not None
    if options.keyid not in known:
        raise CommandError(f"The secret '{options.id}' is encrypted by a secret '{options.keyid}', which is not there")
    if options.iv is None:
        raise CommandError(f"The secret '{options.id}' is encrypted, and needs an 'iv'")
    return decrypt_secret(data, key=known[options.keyid], vector=base64.b64decode(options.iv, validate=True))


# ------------------------------------------------------------------------------------------------------- throttle groups

THROTTLE_TWINS: Final = {f"x-{field.wire}": field.wire for field in fields(ThrottleLimits)}
"""The members of limits as properties of their own, which can be set only when the object is made."""


@attrs.frozen
class ThrottleGroupOptions(ObjectOptions):
    """``ThrottleGroupProperties``, without the unstable ``x-`` twins of the members of ``limits``."""

    limits: ThrottleLimits | None = option(None, doc="limits that the members keep to together", since="2.11")


@attrs.frozen(eq=False)
class ThrottleGroupObject:
    """A throttle group that stays without members. ``limits`` can be changed at any time."""

    kind: ClassVar[str] = "throttle-group"
    properties: ClassVar[Mapping[str, str]] = {"limits": "ThrottleLimits", **dict.fromkeys(THROTTLE_TWINS, "int")}

    group: ThrottleGroup
    env: Environment = attrs.field(repr=False)

    @classmethod
    def make(cls, env: Environment, given: Mapping[str, Json], *, strings: bool) -> ThrottleGroupObject:
        """Make the group; raises `InvalidParameter`, `CommandError` and `DuplicateName`."""
        plain = {key: value for key, value in given.items() if key not in THROTTLE_TWINS}
        options = visit(ThrottleGroupOptions, plain, strings=strings)
        twins = {THROTTLE_TWINS[key]: value for key, value in given.items() if key in THROTTLE_TWINS}
        limits = changed_limits(NO_LIMITS, twins | dict(given.get("limits", {})), strings=strings)
        group = env.throttle_groups.create(options.id)
        group.set_limits(limits)
        return cls(group, env)

    def get(self, name: str) -> Json:
        """See `UserObject`."""
        values: dict[str, Any] = dump(self.group.limits)
        return values if name == "limits" else values[THROTTLE_TWINS[name]]

    def set(self, name: str, value: Json) -> None:
        """See `UserObject`: members of ``limits`` that are not given stay as they are."""
        if name != "limits":
            raise CommandError(f"'{name}' can be set only when the object is made; change 'limits' instead")
        self.group.set_limits(changed_limits(self.group.limits, value))

    def delete(self) -> None:
        """See `UserObject`."""
        self.env.throttle_groups.delete(self.group.name)


# ----------------------------------------------------------------------------------------------------------- I/O threads


@attrs.frozen
class IOThreadOptions(ObjectOptions, IOThreadSettings):
    """``IothreadProperties``."""


@attrs.frozen(eq=False)
class IOThreadObject:
    """An I/O thread, to which nodes and devices can be assigned. All properties can be changed at any time."""

    kind: ClassVar[str] = "iothread"
    properties: ClassVar[Mapping[str, str]] = {field.wire: "int" for field in fields(IOThreadSettings)}

    thread: IOThread

    @classmethod
    def make(cls, env: Environment, given: Mapping[str, Json], *, strings: bool) -> IOThreadObject:
        """Make the thread; raises `InvalidParameter` and `CommandError`."""
        options = visit(IOThreadOptions, given, strings=strings)
        settings = IOThreadSettings(**{name: getattr(options, name) for name in attrs.fields_dict(IOThreadSettings)})
        check_settings(settings)
        return cls(IOThread(options.id, settings))

    def get(self, name: str) -> Json:
        """See `UserObject`."""
        return dump(self.thread.settings)[name]

    def set(self, name: str, value: Json) -> None:
        """See `UserObject`."""
        self.thread.change({name: value})

    def delete(self) -> None:
        """See `UserObject`: what was assigned to it stays so, as in QEMU, which does not ask either."""


# ---------------------------------------------------------------------------------------------------------------- table

Make = Callable[..., UserObject]

OBJECT_OPTIONS: Final[Mapping[str, type[ObjectOptions]]] = {
    "secret": SecretOptions, "throttle-group": ThrottleGroupOptions, "iothread": IOThreadOptions,
}  # fmt: skip
"""The options of each type of objects."""
_MAKERS: Final[Mapping[str, Make]] = {
    "secret": Secret.make, "throttle-group": ThrottleGroupObject.make, "iothread": IOThreadObject.make,
}  # fmt: skip


IDLE_KINDS: Final = frozenset(
    {
        "can-bus", "cryptodev-backend-builtin", "filter-buffer", "filter-dump", "input-linux", "main-loop",
        "memory-backend-file", "memory-backend-memfd", "memory-backend-ram", "rng-builtin", "rng-egd", "rng-random",
        "thread-context",
    }
)  # fmt: skip
"""Types that a machine with a processor would have a use for."""


@attrs.frozen(eq=False)
class IdleObject:
    """An object that is there, with whatever it was given, and has no effect."""

    properties: ClassVar[Mapping[str, str]] = {}

    kind: str

    def get(self, name: str) -> Json:
        """See `UserObject`: nothing is shown."""
        raise CommandError(f"A '{self.kind}' shows no property '{name}'")

    def set(self, name: str, value: Json) -> None:
        """See `UserObject`."""
        raise CommandError(f"A '{self.kind}' has no property '{name}' that could be changed")

    def delete(self) -> None:
        """See `UserObject`: nothing uses it."""


OBJECT_PROPERTIES: Final[Mapping[str, Mapping[str, str]]] = {
    kind.kind: kind.properties for kind in (Secret, ThrottleGroupObject, IOThreadObject)
}
"""The properties of the objects of each type that has an effect, with their QOM types."""


def object_kinds(*, idle: bool = True) -> list[str]:
    """The types of objects that a machine takes, in alphabetical order; without the ``idle`` ones those of a storage daemon."""
    return sorted({*_MAKERS, *(IDLE_KINDS if idle else ())})


class ObjectTable:
    """The objects of one system, by id. With ``takes_idle`` types are accepted that have no effect (`IDLE_KINDS`)."""

    def __init__(self, env: Environment) -> None:
        self.objects: dict[str, UserObject] = {}
        self.takes_idle = False
        self._env = env

    def add(self, options: Mapping[str, Json], *, strings: bool = False) -> None:
        """Make the object that ``options`` (``qom-type``, ``id`` and the type's own) describe.

        Raises `InvalidParameter` for an unknown type, `DuplicateName`, `CommandError`.
        """
        kind, name = options.get("qom-type"), options.get("id")
        if not isinstance(kind, str):
            raise InvalidParameter("qom-type", "is missing" if kind is None else "must be a string")
        is_idle = self.takes_idle and kind in IDLE_KINDS
        if kind not in _MAKERS and not is_idle:
            raise InvalidParameter("qom-type", f"cannot be '{kind}': objects here are of the types {', '.join(_MAKERS)}")
        if not isinstance(name, str):
            raise InvalidParameter("id", "is missing" if name is None else "must be a string")
        check_identifier(name, parameter="id")
        if name in self.objects:
            raise DuplicateName("object", name)
        self.objects[name] = IdleObject(kind) if is_idle else _MAKERS[kind](self._env, options, strings=strings)

    def iothread(self, name: str) -> IOThread | None:
        """The I/O thread of that name, if there is one."""
        found = self.objects.get(name)
        return found.thread if isinstance(found, IOThreadObject) else None

    def delete(self, name: str) -> None:
        """Remove an object; raises `CommandError` when there is none, or when it is in use."""
        if name not in self.objects:
            raise CommandError(f"There is no object '{name}'")
        self.objects[name].delete()
        del self.objects[name]
