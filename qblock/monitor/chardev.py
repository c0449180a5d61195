"""Where a monitor listens or connects: the options of ``--chardev`` and the short form that ``-qmp`` takes.

Models QEMU's ``socket`` (unix, TCP and descriptors), ``stdio``, ``null``, ``file``, ``pty`` and ``vc`` character devices.
Differs from QEMU: abstract unix sockets, TLS, telnet, websockets, reconnecting, log files and devices with
several users (mux) are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias, cast

import attrs

from qblock.errors import CommandError, InvalidParameter
from qblock.options import split_items, split_opts


@attrs.frozen
class UnixAddress:
    """A socket file."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@attrs.frozen
class TcpAddress:
    """A TCP endpoint; an empty ``host`` listens on all interfaces.

    ``last_port``: up to which one the next port is tried when one is taken. ``family`` is the only one to use, if not None.
    """

    host: str
    port: int
    last_port: int | None = None
    family: Literal["ipv4", "ipv6"] | None = None

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


@attrs.frozen
class FdAddress:
    """A socket that the program was started with: one that listens, or one that is connected."""

    fd: int

    def __str__(self) -> str:
        return f"fd:{self.fd}"


@attrs.frozen
class FileAddress:
    """A file that output goes to; ``append`` keeps what is in it."""

    path: str
    append: bool = False

    def __str__(self) -> str:
        return "file"


@attrs.frozen
class PlainAddress:
    """``null`` and ``vc`` (what comes is dropped, nothing is ever read) or ``pty`` (a new terminal)."""

    kind: Literal["null", "pty", "vc"]

    def __str__(self) -> str:
        return self.kind


SocketAddress: TypeAlias = UnixAddress | TcpAddress
Address: TypeAlias = SocketAddress | FdAddress | FileAddress | PlainAddress


@attrs.frozen
class ChardevOptions:
    """A character device: ``address`` is None for stdio.

    A ``server`` listens and serves one client at a time, the next one when that one has gone; with ``wait`` the program starts
    only when a client has come. Otherwise it connects, once.
    """

    label: str
    address: Address | None
    server: bool = False
    wait: bool = True
    nodelay: bool = False


_UNUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(("telnet", "tn3270", "websocket", "mux", "abstract"), "off"), "tight": "on", "reconnect": "0",
}  # fmt: skip
"""Options that are understood as long as they ask for nothing, and the value with which they do not."""
BACKENDS: Final = ("file", "null", "pty", "socket", "stdio", "vc")
"""The kinds of character devices."""
_SOCKET: Final = frozenset({"path", "host", "port", "to", "ipv4", "ipv6", "fd", "server", "wait", "delay", "nodelay", *_UNUSED})
MAX_PORT: Final = 0xFFFF
_PLAIN: Final = frozenset({"null", "pty", "vc"})


def chardev_from(options: Mapping[str, object]) -> ChardevOptions:
    """What --chardev says, read into a mapping of strings, ``backend`` among them (server and wait may be JSON booleans).

    Raises `CommandError`.
    """
    given = dict(options)
    backend, label = given.pop("backend", None), given.pop("id", None)
    if not isinstance(label, str):
        raise InvalidParameter("id", "is missing: a character device needs a name")
    if backend == "stdio":
        given.pop("signal", None)  # a terminal stays as it is
        _refuse_others(given, frozenset())
        return ChardevOptions(label, None)
    if backend in _PLAIN:
        _refuse_others(given, frozenset({"width", "height", "cols", "rows"} if backend == "vc" else ()))
        return ChardevOptions(label, PlainAddress(cast(Literal["null", "pty", "vc"], backend)))
    if backend == "file":
        _refuse_others(given, frozenset({"path", "append"}))
        return ChardevOptions(label, FileAddress(_path(given), _flag(given, "append", default=False)))
    if backend != "socket":
        raise InvalidParameter("backend", f"is '{backend}'; the character devices there are: {', '.join(BACKENDS)}")
    _refuse_others(given, _SOCKET)
    return _socket(label, given)


def parse_short(text: str, label: str) -> ChardevOptions:
    """``unix:PATH[,server=on][,wait=off]``, ``tcp:HOST:PORT[,…]`` or ``stdio``, as -qmp takes it.

    A comma in the path is written twice.
    """
    first, *rest = split_items(text) or [""]
    kind, _, where = first.partition(":")
    given: dict[str, object] = dict(split_opts(",".join(item.replace(",", ",,") for item in rest)))
    _refuse_others(given, _SOCKET - {"path", "host", "port", "fd"})
    if kind == "unix":
        return _socket(label, given | {"path": where})
    if kind == "tcp":
        host, _, port = where.rpartition(":")
        return _socket(label, given | {"host": host.strip("[]"), "port": port})
    if text == "stdio":
        return ChardevOptions(label, None)
    if text in _PLAIN or (kind == "vc" and text):
        return ChardevOptions(label, PlainAddress(cast(Literal["null", "pty", "vc"], kind)))
    if kind == "file" and where:
        return ChardevOptions(label, FileAddress(where))
    raise CommandError(
        f"'{text}' is no character device; there are unix:PATH, tcp:HOST:PORT, stdio, null, pty, vc and file:PATH"
    )


def _path(given: Mapping[str, object]) -> str:
    path = given.get("path")
    if not isinstance(path, str) or not path:
        raise InvalidParameter("path", "is missing: it names the file")
    return path


def _refuse_others(given: Mapping[str, object], known: frozenset[str]) -> None:
    for key in given:
        if key not in known:
            raise InvalidParameter(key, "is unexpected: this kind of character device has no such option")


def _socket(label: str, given: Mapping[str, object]) -> ChardevOptions:
    for name, value in _UNUSED.items():
        if str(given.get(name, value)) != value:
            raise InvalidParameter(name, f"can only be {value}: there is nothing else here")
    server = _flag(given, "server", default=False)
    if not server and "wait" in given:
        raise InvalidParameter("wait", "is for sockets that listen (server=on)")
    if server and "reconnect" in given:
        raise InvalidParameter("reconnect", "is for sockets that connect (server=off)")
    wait = _flag(given, "wait", default=True)
    path = given.get("path")
    if "fd" in given:
        return _inherited(label, given, server=server, wait=wait)
    if isinstance(path, str) and path:
        if "host" in given or "port" in given:
            raise InvalidParameter("path", "and 'host' exclude each other")
        return ChardevOptions(label, UnixAddress(path), server=server, wait=server and wait)
    nodelay = _flag(given, "nodelay", default=False) or not _flag(given, "delay", default=True)
    return ChardevOptions(label, _tcp(given), server=server, wait=server and wait, nodelay=nodelay)


def _tcp(given: Mapping[str, object]) -> TcpAddress:
    numbers = {name: str(given[name]) for name in ("port", "to") if name in given}
    for name, text in {"port": "", **numbers}.items():
        if not text.isdigit() or int(text) > MAX_PORT:
            raise InvalidParameter(name, f"must be a number from 0 to {MAX_PORT} (or give a 'path')")
    last = int(numbers["to"]) if "to" in numbers else None
    families: tuple[Literal["ipv4", "ipv6"], ...] = ("ipv4", "ipv6")
    allowed = [name for name in families if _flag(given, name, default=True)]
    wanted = [name for name in families if name in given and name in allowed] or allowed
    if not allowed:
        raise InvalidParameter("ipv6", "and 'ipv4' are off: there is no other protocol")
    return TcpAddress(str(given.get("host", "")), int(numbers["port"]), last, wanted[0] if len(wanted) == 1 else None)


def _inherited(label: str, given: Mapping[str, object], *, server: bool, wait: bool) -> ChardevOptions:
    if given.keys() & {"path", "host", "port"}:
        raise InvalidParameter("fd", "and an address exclude each other")
    text = str(given["fd"])
    if not text.isdigit():
        raise InvalidParameter("fd", "must be the number of a descriptor that the program was started with")
    return ChardevOptions(label, FdAddress(int(text)), server=server, wait=server and wait)


def _flag(given: Mapping[str, object], key: str, *, default: bool) -> bool:
    value = given.get(key, default)
    if isinstance(value, bool):
        return value
    if value not in ("on", "off"):
        raise InvalidParameter(key, "must be 'on' or 'off'")
    return value == "on"
