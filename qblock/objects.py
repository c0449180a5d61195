"""User-creatable objects (``object-add``, ``--object``): secrets, which other options refer to by id.

Models QEMU's QOM objects as far as the block layer here has a use for them: ``secret``. Other types are refused by name. Differs
from QEMU in that an object's secret is never shown again.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import attrs

from qblock.driver import Json
from qblock.errors import CommandError, DuplicateName, InvalidParameter
from qblock.graph import check_identifier
from qblock.options import option, required, visit


@attrs.frozen
class SecretOptions:
    """``SecretProperties``, in plain or base64 form; encrypted secrets (``keyid``) are not offered."""

    qom_type: str = required(doc="the type of the object")
    id: str = required(doc="name of the object")
    data: str | None = option(None, doc="the secret itself; anybody who can list processes sees it", since="2.6")
    file: str | None = option(None, doc="file that holds the secret", since="2.6")
    format: Literal["raw", "base64"] = option("raw", doc="how data or the file are encoded", since="2.6")


@attrs.frozen
class Secret:
    """A secret under the name ``id``."""

    id: str
    value: bytes = attrs.field(repr=False)


def _load(options: SecretOptions) -> Secret:
    if (options.data is None) == (options.file is None):
        raise CommandError(f"The secret '{options.id}' needs either 'data' or 'file'")
    try:
        raw = options.data.encode() if options.data is not None else Path(options.file or "").read_bytes()
        value = base64.b64decode(raw, validate=True) if options.format == "base64" else raw
    except OSError as error:
        raise CommandError(
            f"The secret '{options.id}' could not be read from '{options.file}': {error.strerror}"
        ) from None
    except binascii.Error as error:
        raise CommandError(f"The secret '{options.id}' is not valid base64: {error}") from None
    return Secret(options.id, value)


class ObjectTable:
    """The objects of one system, by id."""

    def __init__(self, values: dict[str, bytes] | None = None) -> None:
        self.secrets: dict[str, Secret] = {}
        self._values = values if values is not None else {}
        """What drivers see of them (`Environment.secrets`)."""

    def add(self, options: Mapping[str, Json], *, strings: bool = False) -> None:
        """Make the object that ``options`` (``qom-type``, ``id`` and the type's own) describe.

        Raises `InvalidParameter` for an unknown type, `DuplicateName`, `CommandError`.
        """
        kind = options.get("qom-type")
        if not isinstance(kind, str):
            raise InvalidParameter("qom-type", "is missing" if kind is None else "must be a string")
        if kind != "secret":
            raise InvalidParameter("qom-type", f"cannot be '{kind}': only objects of the type secret are offered")
        given: SecretOptions = visit(SecretOptions, options, strings=strings)
        check_identifier(given.id, parameter="id")
        if given.id in self.secrets:
            raise DuplicateName("object", given.id)
        secret = self.secrets[given.id] = _load(given)
        self._values[given.id] = secret.value

    def delete(self, name: str) -> None:
        """Remove an object; raises `CommandError` when there is none."""
        if self.secrets.pop(name, None) is None:
            raise CommandError(f"There is no object '{name}'")
        del self._values[name]
