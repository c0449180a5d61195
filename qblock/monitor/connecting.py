"""Resolving addresses and connecting sockets without holding up the loop."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final

from qblock.monitor.chardev import TcpAddress, UnixAddress

_FAMILIES: Final = {None: socket.AF_UNSPEC, "ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}


async def resolve(address: TcpAddress, *, passive: bool) -> tuple[int, int, int, Any]:
    """Family, type, protocol and socket address of ``address``; ``passive`` to listen there. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host or None, address.port, family=_FAMILIES[address.family], type=socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE if passive else 0,
    )  # fmt: skip
    family, kind, protocol, _, where = found[0]
    return family, kind, protocol, where


async def connect_socket(address: UnixAddress | TcpAddress) -> socket.socket:
    """A connected, non-blocking stream socket; raises `OSError`."""
    where: Any
    if isinstance(address, UnixAddress):
        family, kind, protocol, where = int(socket.AF_UNIX), int(socket.SOCK_STREAM), 0, address.path
    else:
        family, kind, protocol, where = await resolve(address, passive=False)
    sock = socket.socket(family, kind, protocol)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock
