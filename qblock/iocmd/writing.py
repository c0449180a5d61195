"""The commands that write: ``write``, ``writev``, ``aio_write``, ``discard``, ``flush``, ``aio_flush``, ``truncate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qblock.errors import BlockIOError, CommandError
from qblock.iocmd.reporting import counted, failed, refuse_request, report
from qblock.iocmd.shell import AlreadySaid, CommandFailed, IoShell, options_of
from qblock.iocmd.words import check_sectors, number, pattern_byte, total_length
from qblock.permissions import Perm

FILL_BYTE: Final = 0xCD
_EXCLUSIVE: Final = (
    ("bz", "-b and -z cannot be specified at the same time"),
    ("bf", "-f and -b or -c cannot be specified at the same time"),
    ("cf", "-f and -b or -c cannot be specified at the same time"),
)


async def _write_request(
    shell: IoShell, verb: str, options: Mapping[str, str], offset: int, length: int, *, data: memoryview | None
) -> None:
    """Write ``data``, or zeroes without a buffer when it is None, and report."""
    started = shell.clock.now_ns()
    fua = "f" in options
    try:
        shell.allow(Perm.WRITE)
        if data is not None and "b" in options:
            await shell.image.save_vm_state(offset, data)
        elif data is None:
            await shell.image.write_zeroes(
                offset, length, may_unmap="u" in options, no_fallback="n" in options, fua=fua
            )
        else:
            write = shell.image.write_compressed(offset, data) if "c" in options else None
            await (write or shell.image.write_from(offset, data, fua=fua))
    except BlockIOError as error:
        raise failed(shell, verb, error) from None
    report(shell, "wrote", options, offset=offset, length=length, started_ns=started)


def _file_pattern(path: str, length: int) -> memoryview:
    """``length`` bytes of the file's content, repeated as often as it takes."""
    try:
        with open(path, "rb") as file:
            content = file.read(length)
    except OSError as error:
        raise CommandFailed(f"{path}: {error.strerror}", to_stderr=True) from None
    if not content:
        raise CommandFailed(f"{path}: file is empty", to_stderr=True)
    return memoryview((content * (length // len(content) + 1))[:length])


def _payload(shell: IoShell, options: Mapping[str, str], length: int) -> memoryview | None:
    """What a write command writes; None for zeroes."""
    if sum(letter in options for letter in "zPs") > 1:
        raise CommandFailed("Only one of -z, -P, and -s can be specified at the same time")
    for letter in "nu":
        if letter in options and "z" not in options:
            raise CommandFailed(f"-{letter} requires -z to be specified")
    if "z" in options:
        return None
    buffer = shell.buffer(length)
    if "s" in options:
        buffer[:] = _file_pattern(options["s"], length)
    else:
        buffer[:] = bytes([pattern_byte(options["P"]) if "P" in options else FILL_BYTE]) * length
    return buffer


async def write(shell: IoShell, name: str, args: list[str]) -> None:
    """``write``: one range, of the disk or (-b) of the state of a machine."""
    options, rest = options_of(shell, name, args, "bcCfnpP:qs:uz")
    for letters, text in _EXCLUSIVE:
        if all(letter in options for letter in letters):
            raise CommandFailed(text)
    if len(rest) != 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    offset = number(rest[0])
    length = total_length(rest[1:], limit="n" not in options, note=" without -n")
    data = _payload(shell, options, length)
    if "b" in options:
        check_sectors(offset, length)
    await _write_request(shell, "write", options, offset, length, data=data)


async def writev(shell: IoShell, name: str, args: list[str]) -> None:
    """``writev``: one range from several buffers."""
    options, rest = options_of(shell, name, args, "CfP:q")
    if len(rest) < 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    offset, length = number(rest[0]), total_length(rest[1:])
    await _write_request(shell, "writev", options, offset, length, data=_payload(shell, options, length))


async def aio_write(shell: IoShell, name: str, args: list[str]) -> None:
    """``aio_write``: the result is printed when it is there."""
    options, rest = options_of(shell, name, args, "CfiP:quz")
    if len(rest) < 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    if "z" in options and len(rest) != 2:
        raise CommandFailed("-z supports only a single length parameter")
    if "i" in options:
        refuse_request(shell, "write")
        return
    offset, length = number(rest[0]), total_length(rest[1:])
    if "z" in options:
        options.pop("P", None)  # QEMU takes both here, and writes zeroes
    data = _payload(shell, options, length)
    shell.allow(Perm.WRITE)
    request = _write_request(shell, "aio_write", options, offset, length, data=data)
    shell.spawn(request if data is None else counted(shell, "write", length, request))


async def discard(shell: IoShell, name: str, args: list[str]) -> None:
    """``discard``: a range is given back."""
    options, rest = options_of(shell, name, args, "Cq")
    if len(rest) != 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    offset, length = number(rest[0]), total_length(rest[1:])
    shell.allow(Perm.WRITE)
    started = shell.clock.now_ns()
    try:
        await shell.image.discard(offset, length)
    except BlockIOError as error:
        raise failed(shell, "discard", error) from None
    report(shell, "discard", options, offset=offset, length=length, started_ns=started)


async def flush(shell: IoShell, name: str, args: list[str]) -> None:
    """``flush``: all completed writes become durable. Its failure is no reply of a monitor, as in QEMU."""
    try:
        await shell.image.flush()
    except BlockIOError as error:
        shell.err(f"{shell.program}: {error}")
        raise AlreadySaid from error


async def aio_flush(shell: IoShell, name: str, args: list[str]) -> None:
    """``aio_flush``: waits for all aio requests, and is in the statistics as a flush."""
    await counted(shell, "flush", 0, shell.finish())


async def truncate(shell: IoShell, name: str, args: list[str]) -> None:
    """``truncate``: another length, with -m and space for what is added."""
    options, rest = options_of(shell, name, args, "m:")
    if len(rest) != 1:
        raise CommandFailed(shell.table[name].synopsis(name))
    preallocation = options.get("m", "off")
    if preallocation not in ("off", "metadata", "falloc", "full"):
        raise CommandError(f"'{preallocation}' is no preallocation mode: use off, metadata, falloc or full")
    length = number(rest[0])
    shell.allow(Perm.WRITE | Perm.RESIZE)
    await shell.image.truncate(length, exact=False, preallocation=preallocation)
