"""Serving monitors on character devices: unix sockets, TCP, standard input and output, a terminal of its own.

Models a monitor on a character device of QEMU: one client at a time, the next one is accepted when that one has gone; a
socket file that is in the way is replaced. Differs from QEMU: a socket file is there only once it can be connected to, it is
private to its owner (mode 0600), and a file in the way that is no socket is left alone and reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import socket
import stat
import sys
import tty
from collections.abc import Callable
from typing import Final, Protocol

import attrs

from qblock.errors import CommandError
from qblock.monitor.chardev import (
    ChardevOptions,
    FdAddress,
    FileAddress,
    PlainAddress,
    SocketAddress,
    TcpAddress,
    UnixAddress,
)
from qblock.monitor.connecting import connect_socket, resolve
from qblock.monitor.hub import MonitorHub
from qblock.monitor.link import DescriptorLink, Link, Receiver, SocketLink
from qblock.monitor.session import MonitorSession

_MAX_UNIX_PATH: Final = 107
"""Bytes that a socket's path can have: sun_path of Linux, with the zero at its end."""


class Session(Receiver, Protocol):
    """Who talks to a client over ``link``: a QMP monitor, a human monitor, ..."""

    link: Link

    async def run(self) -> None:
        """Serve until the client is gone or the program quits."""

    def stop(self) -> None:
        """End after what is being executed."""


@attrs.define(eq=False)
class MonitorServer:
    """Serves monitors of ``hub`` at ``options``. Use `start`, then `close`; or ``async with``.

    ``make_session`` makes the session of a client, by default a QMP monitor; ``used`` is whether something of the machine is
    attached there.
    """

    hub: MonitorHub
    options: ChardevOptions
    make_session: Callable[[MonitorHub], Session] = MonitorSession
    used: bool = True
    _listener: socket.socket | None = attrs.field(default=None, init=False)
    _inode: int = attrs.field(default=0, init=False)
    _session: Session | None = attrs.field(default=None, init=False)
    _task: asyncio.Task[None] | None = attrs.field(default=None, init=False)
    _peer: str = attrs.field(default="", init=False)
    _terminal: tuple[int, int] | None = attrs.field(default=None, init=False)
    _came: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)

    # ---------------------------------------------------------------------------------------------- as query-chardev shows it

    @property
    def label(self) -> str:
        """The id of the character device."""
        return self.options.label

    @property
    def frontend_open(self) -> bool:
        """Whether a monitor or another user is attached here."""
        return self.used

    @property
    def filename(self) -> str:
        """Where it leads, in QEMU's notation; ``disconnected:`` while no client is there."""
        match self.options.address:
            case None:
                return "stdio"
            case PlainAddress("pty"):
                assert self._terminal is not None
                return f"pty:{os.ttyname(self._terminal[1])}"
            case PlainAddress() | FileAddress() as plain:
                return str(plain)
        where = f"{self._bound()},server=on" if self.options.server else f"{self.options.address}"
        if self._session is None:
            return f"disconnected:{where}"
        if not self.options.server and isinstance(self.options.address, UnixAddress):
            return "unix:"  # the name of its own end, which has none
        return where + (f" <-> {self._peer}" if self._peer else "")

    def _bound(self) -> SocketAddress | FdAddress:
        """The address, with the port that the system chose if 0 was asked for."""
        address = self.options.address
        assert isinstance(address, (UnixAddress, TcpAddress, FdAddress))
        if isinstance(address, TcpAddress) and self._listener is not None:
            host, port = self._listener.getsockname()[:2]
            return TcpAddress(host, port)
        return address

    @property
    def port(self) -> int:
        """The TCP port in use."""
        bound = self._bound()
        assert isinstance(bound, TcpAddress)
        return bound.port

    # ----------------------------------------------------------------------------------------------------- start and end

    async def start(self) -> None:
        """Listen, connect, or take what the address names; with ``wait`` until a client is there. Raises `CommandError`."""
        self.hub.chardevs.insert(0, self)
        address = self.options.address
        try:
            match address:
                case None:
                    self._serve_pair(sys.stdin.fileno(), sys.stdout.fileno())
                case PlainAddress("pty"):
                    self._serve_terminal()
                case PlainAddress():
                    pass  # nobody is there, nor ever will be
                case FileAddress(path, append):
                    open(path, "ab" if append else "wb").close()
                case _:
                    await self._start_socket(address)
        except OSError as error:
            self.hub.chardevs.remove(self)
            raise CommandError(f"Cannot serve on {address or 'stdio'}: {error.strerror or error}") from error

    async def _start_socket(self, address: SocketAddress | FdAddress) -> None:
        if not self.options.server:
            self._serve(_inherited(address) if isinstance(address, FdAddress) else await connect_socket(address))
            return
        self._listener = await self._listen(address)
        self._accept_again()
        if self.options.wait:
            self.hub.report(f"Waiting for a client on {self._bound()}")
            await self._came.wait()

    async def close(self) -> None:
        """Finish the command that is executed, send what waits if it goes at once, and let go of everything."""
        if self._listener is not None:
            with contextlib.suppress(ValueError):
                asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._unlink()
        if self._session is not None:
            self._session.link.pause_reading()
            self._session.stop()
        if self._task is not None:
            await self._task
        if self._terminal is not None:
            for fd in self._terminal:
                os.close(fd)
            self._terminal = None
        if self in self.hub.chardevs:
            self.hub.chardevs.remove(self)

    async def __aenter__(self) -> MonitorServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ------------------------------------------------------------------------------------------------------------- inside

    async def _listen(self, address: SocketAddress | FdAddress) -> socket.socket:
        if isinstance(address, FdAddress):
            listener = _inherited(address)
            listener.listen(1)
        elif isinstance(address, UnixAddress):
            listener = _listen_unix(address.path)
            self._inode = os.stat(address.path).st_ino
        else:
            listener = await _listen_tcp(address)
        listener.setblocking(False)
        return listener

    def _unlink(self) -> None:
        """Remove the socket file, unless another program has put its own in its place."""
        address = self.options.address
        if isinstance(address, UnixAddress):
            with contextlib.suppress(OSError):
                if os.lstat(address.path).st_ino == self._inode:
                    os.unlink(address.path)

    def _accept_again(self) -> None:
        if self._listener is not None and self._listener.fileno() >= 0 and not self.hub.quitting:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, peer = self._listener.accept()
        except OSError:  # the client has given up, or there are no descriptors left: try at the next one
            return
        asyncio.get_running_loop().remove_reader(self._listener)
        self._peer = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else ""
        self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        if self.options.nodelay and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._begin(session := self.make_session(self.hub), SocketLink(sock, session))

    def _serve_pair(self, reading: int, writing: int) -> None:
        self._begin(session := self.make_session(self.hub), DescriptorLink(reading, writing, session))

    def _serve_terminal(self) -> None:
        """A new terminal, whose other end stays open here: else its first user who leaves would end the session."""
        self._terminal = master, slave = os.openpty()
        tty.setraw(slave)
        self.hub.output(f"char device redirected to {os.ttyname(slave)} (label {self.label})")
        self._serve_pair(master, master)

    def _begin(self, session: Session, link: DescriptorLink) -> None:
        session.link = link
        self._session = session
        self._came.set()
        self._task = asyncio.create_task(self._run(session), name=f"monitor {self.label}")

    async def _run(self, session: Session) -> None:
        try:
            await session.run()
        finally:
            session.link.close()
            self._session, self._peer = None, ""
            self._accept_again()


def _inherited(address: FdAddress) -> socket.socket:
    sock = socket.socket(fileno=address.fd)
    sock.setblocking(False)
    return sock


async def _listen_tcp(address: TcpAddress) -> socket.socket:
    """A socket at the port, or at the first one after it that is free; raises `OSError`."""
    for port in range(address.port, address.last_port or address.port):
        with contextlib.suppress(OSError):
            return await _listen_at(attrs.evolve(address, port=port))
    return await _listen_at(attrs.evolve(address, port=address.last_port or address.port))


async def _listen_at(address: TcpAddress) -> socket.socket:
    family, kind, protocol, where = await resolve(address, passive=True)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener


def _listen_unix(path: str) -> socket.socket:
    """A socket at ``path`` to which this user alone can connect, from the moment it is there; a stale one is replaced.

    It gets its place by a rename when it listens. Until then it is reached through its directory's descriptor, so that the
    other name is no longer than the system allows, whatever ``path``.
    """
    _check_place(path)
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY)
    beside = f"/proc/self/fd/{directory}/{os.path.basename(path)[:16]}.{secrets.token_hex(4)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(beside)
        os.chmod(beside, 0o600)  # nobody can connect before listen()
        listener.listen(1)
        os.rename(beside, path)
    except OSError:
        listener.close()
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    finally:
        os.close(directory)
    return listener


def _check_place(path: str) -> None:
    """Raise `OSError` if no client could name ``path``, or if something else than a socket would be replaced there."""
    if len(os.fsencode(path)) > _MAX_UNIX_PATH:
        raise OSError(errno.ENAMETOOLONG, f"the path of a socket can have {_MAX_UNIX_PATH} bytes at most; choose a shorter one")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "this file exists and is no socket; remove it, or choose another path")
