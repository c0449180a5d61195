"""The commands that read: ``read``, ``readv``, ``aio_read``."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from qblock.errors import BlockIOError
from qblock.iocmd.reporting import all_bytes, counted, dump, failed, refuse_request, report
from qblock.iocmd.shell import AlreadySaid, CommandFailed, IoShell, options_of
from qblock.iocmd.words import check_sectors, number, pattern_byte, total_length


@attrs.frozen
class _Check:
    """What a read must find: ``pattern`` in every byte from ``start`` for ``length`` bytes of the buffer."""

    pattern: int
    start: int
    length: int


def _check_of(shell: IoShell, name: str, options: Mapping[str, str], length: int) -> _Check | None:
    if "P" not in options:
        if "s" in options or "l" in options:
            raise CommandFailed(shell.table[name].synopsis(name))
        return None
    pattern = pattern_byte(options["P"])
    start = number(options["s"]) if "s" in options else 0
    span = number(options["l"]) if "l" in options else max(length - start, 0)
    if start + span > length:
        raise CommandFailed("pattern verification range exceeds end of read data")
    return _Check(pattern, start, span)


async def _read_request(
    shell: IoShell, verb: str, options: Mapping[str, str], offset: int, length: int, *, check: _Check | None
) -> bool:
    """Read, verify, dump and report; False when the pattern was not found. Raises CommandFailed on an I/O error."""
    buffer = shell.buffer(length)
    started = shell.clock.now_ns()
    try:
        if "b" in options:
            await shell.image.load_vm_state(offset, buffer)
        else:
            await shell.image.read_into(offset, buffer)
    except BlockIOError as error:
        raise failed(shell, verb, error) from None
    matches = True
    if check is not None:
        matches = all_bytes(buffer[check.start : check.start + check.length], check.pattern)
        if not matches:
            shell.out(f"Pattern verification failed at offset {offset + check.start}, {check.length} bytes")
    if "v" in options and "q" not in options:
        dump(shell, offset, buffer)
    report(shell, "read", options, offset=offset, length=length, started_ns=started)
    return matches


async def read(shell: IoShell, name: str, args: list[str]) -> None:
    """``read``: one range, of the disk or (-b) of the state of a machine."""
    options, rest = options_of(shell, name, args, "bCl:pP:qs:v")
    if len(rest) != 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    offset, length = number(rest[0]), total_length(rest[1:])
    check = _check_of(shell, name, options, length)
    if "b" in options:
        check_sectors(offset, length)
    if not await _read_request(shell, "read", options, offset, length, check=check):
        raise AlreadySaid


async def readv(shell: IoShell, name: str, args: list[str]) -> None:
    """``readv``: one range into several buffers."""
    options, rest = options_of(shell, name, args, "CP:qv")
    if len(rest) < 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    offset, length = number(rest[0]), total_length(rest[1:])
    check = _check_of(shell, name, options, length)
    if not await _read_request(shell, "read", options, offset, length, check=check):
        raise AlreadySaid


async def aio_read(shell: IoShell, name: str, args: list[str]) -> None:
    """``aio_read``: the result is printed when it is there."""
    options, rest = options_of(shell, name, args, "CiP:qv")
    if len(rest) < 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    if "i" in options:
        refuse_request(shell, "read")
        return
    offset, length = number(rest[0]), total_length(rest[1:])
    check = _check_of(shell, name, options, length)

    async def request() -> None:
        await _read_request(shell, "readv", options, offset, length, check=check)

    shell.spawn(counted(shell, "read", length, request()))
