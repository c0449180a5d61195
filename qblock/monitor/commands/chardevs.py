"""Commands about character devices: which there can be, coming, going, being exchanged.

Models ``chardev-add`` and its kin of QEMU 7.2, with the kinds of `chardev`. What is plugged in has no user: no command attaches
a monitor to it, here as there; a guest's port that nobody is behind takes what comes and says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import attrs

from qblock.driver import Json
from qblock.errors import CommandError, InvalidParameter
from qblock.monitor.chardev import BACKENDS, ChardevOptions, chardev_from
from qblock.monitor.command import CommandContext, NoArguments, command
from qblock.options import dump, option, required, visit

if TYPE_CHECKING:
    from qblock.monitor.hub import Chardev, MonitorHub


@attrs.frozen
class UnixSocketAddress:
    """Data of an address of the type ``unix``."""

    path: str = required(doc="the socket file")


@attrs.frozen
class InetSocketAddress:
    """Data of an address of the type ``inet``."""

    host: str = required(doc="name or number of the host; empty to listen everywhere")
    port: str = required(doc="number of the port")
    to: int | None = option(None, doc="last port to try")
    ipv4: bool | None = option(None, doc="whether IPv4 may be used")
    ipv6: bool | None = option(None, doc="whether IPv6 may be used")


@attrs.frozen
class SocketAddressLegacy:
    """An address; what ``data`` is made of depends on ``type``."""

    KINDS: ClassVar[Mapping[str, Any]] = {"inet": InetSocketAddress, "unix": UnixSocketAddress}

    type: str = required(doc="kind of the address")
    data: Mapping[str, Json] = required(doc="the address")


@attrs.frozen
class ChardevFile:
    """Data of a ``file``."""

    out: str = required(doc="the file that output goes to")
    append: bool = option(False, doc="keep what is in it")


@attrs.frozen
class ChardevSocket:
    """Data of a ``socket``."""

    addr: SocketAddressLegacy = required(doc="where to listen or to connect")
    server: bool = option(True, doc="listen")
    wait: bool | None = option(None, doc="only false: nobody waits for a client while the machine is on")
    nodelay: bool = option(False, doc="send small packets at once")
    telnet: bool = option(False, doc="only false")
    tn3270: bool = option(False, doc="only false")
    websocket: bool = option(False, doc="only false")
    reconnect: int | None = option(None, doc="only 0, and not for a server")


@attrs.frozen
class ChardevStdio:
    """Data of ``stdio``."""

    signal: bool | None = option(None, doc="of no effect: a terminal stays as it is")


@attrs.frozen
class ChardevCommon:
    """Data of kinds that need none."""


@attrs.frozen
class ChardevVC:
    """Data of a ``vc``, on which nobody looks."""

    width: int | None = option(None, doc="of no effect")
    height: int | None = option(None, doc="of no effect")
    cols: int | None = option(None, doc="of no effect")
    rows: int | None = option(None, doc="of no effect")


@attrs.frozen
class ChardevBackend:
    """A kind of character device; what ``data`` is made of depends on ``type``."""

    KINDS: ClassVar[Mapping[str, Any]] = {
        "file": ChardevFile, "null": ChardevCommon, "pty": ChardevCommon, "socket": ChardevSocket, "stdio": ChardevStdio,
        "vc": ChardevVC,
    }  # fmt: skip

    type: str = required(doc="kind of the device")
    data: Mapping[str, Json] = required(doc="where it leads")


@attrs.frozen
class ChardevArguments:
    """Arguments of chardev-add and chardev-change."""

    id: str = required(doc="id of the device")
    backend: ChardevBackend = required(doc="what it is to be")


@attrs.frozen
class ChardevIdArguments:
    """Names a character device."""

    id: str = required(doc="id of the device")


@attrs.frozen
class ChardevReturn:
    """Reply of chardev-add and chardev-change."""

    pty: str | None = option(None, doc="the terminal that was made for it")


@attrs.frozen
class ChardevBackendInfo:
    """Entry of query-chardev-backends."""

    name: str = required(doc="the kind")


def _data(union: SocketAddressLegacy | ChardevBackend, path: str) -> Any:
    """The data of a union, read as its type says; raises `InvalidParameter`."""
    kind = union.KINDS.get(union.type)
    if kind is None:
        raise InvalidParameter(f"{path}.type", f"does not accept '{union.type:.100}'; it takes {', '.join(union.KINDS)}")
    return visit(kind, union.data, path=f"{path}.data")


_PLAIN_MEMBERS: Final = {"out": "path"}


def read_backend(label: str, backend: ChardevBackend) -> ChardevOptions:
    """The character device that ``backend`` describes; raises `InvalidParameter` and `CommandError`."""
    data = _data(backend, "backend")
    members = {_PLAIN_MEMBERS.get(name, name): value for name, value in dump(data).items() if value is not None}
    if isinstance(data, ChardevSocket):
        if data.server and data.reconnect is not None:
            raise InvalidParameter("backend.data.reconnect", "is for sockets that connect (server=false)")
        if data.wait and data.server:
            raise InvalidParameter("backend.data.wait", "cannot be true while the machine is on")
        members.pop("addr")
        members |= {name: value for name, value in dump(_data(data.addr, "backend.data.addr")).items() if value is not None}
        for name in ("telnet", "tn3270", "websocket"):
            members[name] = "on" if members[name] else "off"
        if data.server:
            members["wait"] = False
    return chardev_from({**members, "backend": backend.type, "id": label})


async def plug_chardev(hub: MonitorHub, options: ChardevOptions) -> Chardev:
    """Make a character device of that label, and let it be there; raises `CommandError`."""
    if hub.make_chardev is None:
        raise CommandError("Character devices cannot be added to this program")
    if options.address is None and any(device.options.address is None for device in hub.chardevs):
        raise CommandError("Standard input and output have a character device already")
    device = hub.make_chardev(options)
    await device.start()
    hub.plugged.append(device)
    return device


def find_chardev(hub: MonitorHub, label: str) -> Chardev:
    """The character device of that id; raises `CommandError`, also for one that has a user."""
    device = next((device for device in hub.chardevs if device.label == label), None)
    if device is None:
        raise CommandError(f"There is no character device '{label}'")
    if device.frontend_open:
        raise CommandError(f"The character device '{label}' is in use")
    return device


async def add_chardev(hub: MonitorHub, options: ChardevOptions) -> Chardev:
    """Plug in a new one, whose id must be free; raises `CommandError`."""
    if any(device.label == options.label for device in hub.chardevs):
        raise CommandError(f"There is a character device '{options.label}' already")
    return await plug_chardev(hub, options)


async def change_chardev(hub: MonitorHub, options: ChardevOptions) -> Chardev:
    """Put another one in the place of the one of that id; when that fails, nothing has changed. Raises `CommandError`."""
    before = find_chardev(hub, options.label)
    device = await plug_chardev(hub, options)
    await _unplug(hub, before)
    return device


async def remove_chardev(hub: MonitorHub, label: str) -> None:
    """Take out the one of that id; raises `CommandError` when there is none, or it has a user."""
    await _unplug(hub, find_chardev(hub, label))


async def _unplug(hub: MonitorHub, device: Chardev) -> None:
    await device.close()
    if device in hub.plugged:
        hub.plugged.remove(device)


def _made(device: Chardev) -> ChardevReturn:
    kind, _, where = device.filename.partition(":")
    return ChardevReturn(pty=where if kind == "pty" else None)


@command("query-chardev-backends", since="2.0", returns=list[ChardevBackendInfo])
async def query_chardev_backends(ctx: CommandContext, args: NoArguments) -> list[ChardevBackendInfo]:
    """List the kinds of character devices."""
    del ctx, args
    return [ChardevBackendInfo(name=name) for name in BACKENDS]


@command("chardev-add", since="1.4", returns=ChardevReturn)
async def chardev_add(ctx: CommandContext, args: ChardevArguments) -> ChardevReturn:
    """Add a character device."""
    return _made(await add_chardev(ctx.hub, read_backend(args.id, args.backend)))


@command("chardev-change", since="2.10", returns=ChardevReturn)
async def chardev_change(ctx: CommandContext, args: ChardevArguments) -> ChardevReturn:
    """Put another character device in the place of one that nobody uses."""
    return _made(await change_chardev(ctx.hub, read_backend(args.id, args.backend)))


@command("chardev-remove", since="1.4")
async def chardev_remove(ctx: CommandContext, args: ChardevIdArguments) -> None:
    """Remove a character device that nobody uses."""
    await remove_chardev(ctx.hub, args.id)
