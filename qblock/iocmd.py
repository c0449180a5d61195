"""The command language of qemu-io, on any backend: what ``qblock-io`` and the monitor's ``qemu-io`` run.

Models semantics.md section 20: layouts and exit codes are those of qemu-io 7.2, explanations of errors are our own. Only
commands on an open image live here; ``open`` and ``close`` belong to the program. Differs from QEMU: VM state (``-b``)
and breakpoints are refused by name, and a request is never larger than 2 GiB - 512 bytes unless it carries no buffer.
"""

from __future__ import annotations

import asyncio
import errno
import getopt
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final

import attrs

from qblock.errors import BlockIOError, CommandError, QBlockError
from qblock.extents import Unallocated
from qblock.imageinfo import in_order, specific_lines
from qblock.permissions import Perm
from qblock.status import block_status
from qblock.units import MILLISECOND_NS, SECOND_NS, KiB, parse_size

if TYPE_CHECKING:
    from qblock.backend import BlockBackend
    from qblock.clock import Clock

MAX_REQUEST: Final = (1 << 31) - 512
FILL_BYTE: Final = 0xCD
_COMPARE_STEP: Final = 1 << 20


class CommandFailed(Exception):
    """A command line cannot be done; ``text`` goes to the output, or to the error stream when ``to_stderr``."""

    def __init__(self, text: str, *, to_stderr: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.to_stderr = to_stderr


class AlreadySaid(Exception):
    """The command failed and has printed why."""


@attrs.frozen
class IoCommand:
    """One command: how many arguments after its name (``most`` None: any number), how it is shown in ``help``."""

    name: str
    run: Callable[[IoShell, str, list[str]], Awaitable[None]]
    summary: str
    usage: str = ""
    least: int = 0
    most: int | None = 0
    aliases: tuple[str, ...] = ()
    needs_image: bool = True
    details: str = ""

    def synopsis(self, name: str) -> str:
        """The one line that help and usage errors show."""
        return f"{name}{' ' + self.usage if self.usage else ''} -- {self.summary}"


@attrs.define(eq=False)
class IoShell:
    """Runs command lines on ``backend``; output lines go to ``out``, complaints about the line itself to ``err``.

    ``program`` stands before messages of the block layer. aio commands run as children of ``tasks`` and are waited for by
    `finish`. ``quit`` is True after the command of that name.
    """

    backend: BlockBackend | None
    clock: Clock
    out: Callable[[str], None]
    err: Callable[[str], None]
    tasks: asyncio.TaskGroup
    program: str = "qblock-io"
    table: Mapping[str, IoCommand] = attrs.field(factory=lambda: COMMANDS)
    quit: bool = False
    pending: set[asyncio.Task[None]] = attrs.field(factory=set)

    @property
    def image(self) -> BlockBackend:
        """The backend that commands work on; only for commands that need one."""
        assert self.backend is not None
        return self.backend

    async def execute(self, line: str) -> int:
        """Run one line; 0 when it did what it says, 1 when not. Words are separated by blanks, there is no quoting."""
        words = line.split()
        if not words:
            return 0
        try:
            await self._dispatch(words[0], words[1:])
        except CommandFailed as failure:
            (self.err if failure.to_stderr else self.out)(failure.text)
            return 1
        except AlreadySaid:
            return 1
        except QBlockError as error:
            self.err(f"{self.program}: {error}")
            return 1
        return 0

    async def _dispatch(self, name: str, args: list[str]) -> None:
        command = self.table.get(name)
        if command is None:
            raise CommandFailed(f'command "{name}" not found', to_stderr=True)
        if command.needs_image and self.backend is None:
            raise CommandFailed("no image is open: give one on the command line, or use 'open'", to_stderr=True)
        if len(args) < command.least or (command.most is not None and len(args) > command.most):
            raise CommandFailed(
                f"bad argument count {len(args)} to {name}, expected {_expected(command)}", to_stderr=True
            )
        await command.run(self, name, args)

    async def finish(self) -> None:
        """Wait until every aio request has completed and printed its result."""
        while self.pending:
            await asyncio.wait(tuple(self.pending))

    def spawn(self, request: Awaitable[None]) -> None:
        """Start an aio request; when it fails it says so, and that is all."""

        async def run() -> None:
            try:
                await request
            except CommandFailed as failure:
                self.out(failure.text)
            except QBlockError as error:
                self.err(f"{self.program}: {error}")

        task = self.tasks.create_task(run())
        self.pending.add(task)
        task.add_done_callback(self.pending.discard)

    def allow(self, needed: Perm) -> None:
        """Take permissions on the image that the command at hand needs; raises when the image is read-only."""
        backend = self.image
        if needed & (Perm.WRITE | Perm.RESIZE) and backend.node.read_only:
            raise CommandError(f"'{backend.node.node_name}' is read-only")
        if needed & ~backend.perm:
            backend.set_permissions(backend.perm | needed, backend.shared)


async def run_command(
    backend: BlockBackend, line: str, out: Callable[[str], None], *, clock: Clock, program: str = "qemu-io"
) -> int:
    """Run one command line on ``backend`` and wait for what it started; everything it says goes to ``out``.

    Returns 0, or 1 when the command failed.
    """
    async with asyncio.TaskGroup() as tasks:
        shell = IoShell(backend, clock, out, out, tasks, program)
        result = await shell.execute(line)
        await shell.finish()
    return result


# ------------------------------------------------------------------------------------------------------- words and numbers


def _expected(command: IoCommand) -> str:
    if command.most is None:
        return f"at least {command.least} arguments"
    if command.most == command.least:
        return f"{command.least} arguments"
    return f"between {command.least} and {command.most} arguments"


def _options(shell: IoShell, name: str, args: list[str], letters: str) -> tuple[dict[str, str], list[str]]:
    """Single-letter options (anywhere in the line) and the rest."""
    try:
        given, rest = getopt.gnu_getopt(args, letters)
    except getopt.GetoptError as error:
        shell.err(f"{name}: {error.msg}")
        raise CommandFailed(shell.table[name].synopsis(name)) from None
    return {option[1]: value for option, value in given}, rest


def number(text: str) -> int:
    """A size or an offset in bytes, with QEMU's suffixes."""
    try:
        value = parse_size(text)
    except ValueError as error:
        raise CommandFailed(f"Parsing error: {error}") from None
    if value >= 1 << 63:
        raise CommandFailed(f"Parsing error: '{text}' is too large: offsets must be below 8 EiB")
    return value


def _pattern(text: str) -> int:
    try:
        value = int(text, 8 if text.startswith("0") and text.isdigit() else 0)
    except ValueError:
        value = -1
    if not 0 <= value <= 0xFF:
        raise CommandFailed(f"{text} is not a valid pattern byte")
    return value


def _lengths(texts: list[str], *, limit: bool = True) -> int:
    """Sum of the lengths of a vector, checked like one request."""
    total = 0
    for text in texts:
        total += number(text)
        if limit and total > MAX_REQUEST:
            raise CommandFailed(f"length cannot exceed {MAX_REQUEST}, given {text}")
    return total


def _refuse(options: Mapping[str, str], refused: Mapping[str, str]) -> None:
    for letter, what in refused.items():
        if letter in options:
            raise CommandFailed(f"-{letter} is refused: {what}")


_VM_STATE: Final = {"b": "qblock does not read or write VM state"}


def format_bytes(n: float) -> str:
    """``n`` bytes in qemu-io's layout: ``64 KiB``, ``7.875 MiB``, ``100 bytes``."""
    units = ("EiB", "PiB", "TiB", "GiB", "MiB", "KiB")
    for power, unit in zip(range(6, 0, -1), units, strict=True):
        if n >= KiB**power:
            return f"{n / KiB**power:.3f}".removesuffix(".000") + f" {unit}"
    return f"{n:.6f}".removesuffix(".000000") + " bytes"


# -------------------------------------------------------------------------------------------------------------- reporting


def _clock_text(ns: int, *, fixed: bool) -> str:
    centiseconds = ns * 100 // SECOND_NS
    minutes, rest = divmod(centiseconds, 6000)
    seconds = f"{rest // 100:02}.{rest % 100:02}"
    if minutes or fixed:
        return f"{minutes // 60}:{minutes % 60:02}:{seconds}"
    return f"{seconds} sec"


def _report(
    shell: IoShell, verb: str, options: Mapping[str, str], *, offset: int, length: int, started_ns: int
) -> None:
    """The two lines after a request, one machine-readable line with -C, none with -q."""
    if "q" in options:
        return
    elapsed = shell.clock.now_ns() - started_ns
    seconds = max(elapsed, 1) / SECOND_NS
    if "C" in options:
        shell.out(f"{length},1,{_clock_text(elapsed, fixed=True)},{length / seconds:.3f},{1 / seconds:.3f}")
        return
    shell.out(f"{verb} {length}/{length} bytes at offset {offset}")
    rate = f"{format_bytes(length / seconds)}/sec and {1 / seconds:.4f} ops/sec"
    shell.out(f"{format_bytes(length)}, 1 ops; {_clock_text(elapsed, fixed=False)} ({rate})")


def _failed(shell: IoShell, verb: str, error: BlockIOError) -> CommandFailed:
    """The line that scripts look for has the errno's text only; what qblock knows beyond it goes to the error stream."""
    reason = os.strerror(error.errno or errno.EIO)
    if str(error) != reason:
        shell.err(f"{shell.program}: {error}")
    return CommandFailed(f"{verb} failed: {reason}")


def _dump(shell: IoShell, offset: int, data: memoryview) -> None:
    for at in range(0, len(data), 16):
        row = bytes(data[at : at + 16])
        text = "".join(chr(byte) if byte < 0x80 and chr(byte).isalnum() else "." for byte in row)
        shell.out(f"{offset + at:08x}:  {' '.join(f'{byte:02x}' for byte in row)}  {text}")


def _all_bytes(data: memoryview, value: int) -> bool:
    expected = bytes([value]) * min(len(data), _COMPARE_STEP)
    return all(
        data[at : at + _COMPARE_STEP] == expected[: min(_COMPARE_STEP, len(data) - at)]
        for at in range(0, len(data), _COMPARE_STEP)
    )


# --------------------------------------------------------------------------------------------------------------- reading


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
    pattern = _pattern(options["P"])
    start = number(options["s"]) if "s" in options else 0
    span = number(options["l"]) if "l" in options else max(length - start, 0)
    if start + span > length:
        raise CommandFailed("pattern verification range exceeds end of read data")
    return _Check(pattern, start, span)


async def _read_request(
    shell: IoShell, verb: str, options: Mapping[str, str], offset: int, length: int, *, check: _Check | None
) -> bool:
    """Read, verify, dump and report; False when the pattern was not found. Raises CommandFailed on an I/O error."""
    buffer = memoryview(bytearray(length))
    started = shell.clock.now_ns()
    try:
        await shell.image.read_into(offset, buffer)
    except BlockIOError as error:
        raise _failed(shell, verb, error) from None
    matches = True
    if check is not None:
        matches = _all_bytes(buffer[check.start : check.start + check.length], check.pattern)
        if not matches:
            shell.out(f"Pattern verification failed at offset {offset + check.start}, {check.length} bytes")
    if "v" in options and "q" not in options:
        _dump(shell, offset, buffer)
    _report(shell, "read", options, offset=offset, length=length, started_ns=started)
    return matches


async def _read(shell: IoShell, name: str, args: list[str]) -> None:
    options, rest = _options(shell, name, args, "abCl:pP:qs:v")
    _refuse(options, _VM_STATE)
    if len(rest) != 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    offset, length = number(rest[0]), _lengths(rest[1:])
    check = _check_of(shell, name, options, length)
    if not await _read_request(shell, "read", options, offset, length, check=check):
        raise AlreadySaid


async def _readv(shell: IoShell, name: str, args: list[str]) -> None:
    options, rest = _options(shell, name, args, "CP:qv")
    if len(rest) < 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    offset, length = number(rest[0]), _lengths(rest[1:])
    check = _check_of(shell, name, options, length)
    if not await _read_request(shell, "read", options, offset, length, check=check):
        raise AlreadySaid


async def _aio_read(shell: IoShell, name: str, args: list[str]) -> None:
    options, rest = _options(shell, name, args, "CP:qv")
    if len(rest) < 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    offset, length = number(rest[0]), _lengths(rest[1:])
    check = _check_of(shell, name, options, length)

    async def request() -> None:
        await _read_request(shell, "readv", options, offset, length, check=check)

    shell.spawn(request())


# --------------------------------------------------------------------------------------------------------------- writing


async def _write_request(
    shell: IoShell, verb: str, options: Mapping[str, str], offset: int, length: int, *, data: memoryview | None
) -> None:
    """Write ``data``, or zeroes without a buffer when it is None, and report."""
    shell.allow(Perm.WRITE)
    started = shell.clock.now_ns()
    fua = "f" in options
    try:
        if data is None:
            await shell.image.write_zeroes(
                offset, length, may_unmap="u" in options, no_fallback="n" in options, fua=fua
            )
        else:
            write = shell.image.write_compressed(offset, data) if "c" in options else None
            await (write or shell.image.write_from(offset, data, fua=fua))
    except BlockIOError as error:
        raise _failed(shell, verb, error) from None
    _report(shell, "wrote", options, offset=offset, length=length, started_ns=started)


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


def _payload(options: Mapping[str, str], length: int) -> memoryview | None:
    """What a write command writes; None for zeroes."""
    if sum(letter in options for letter in "zPs") > 1:
        raise CommandFailed("Only one of -z, -P, and -s can be specified at the same time")
    for letter in "nu":
        if letter in options and "z" not in options:
            raise CommandFailed(f"-{letter} requires -z to be specified")
    if "z" in options:
        return None
    if "s" in options:
        return _file_pattern(options["s"], length)
    return memoryview(bytes([_pattern(options["P"]) if "P" in options else FILL_BYTE]) * length)


async def _write(shell: IoShell, name: str, args: list[str]) -> None:
    options, rest = _options(shell, name, args, "bcCfnpP:qs:uz")
    _refuse(options, _VM_STATE)
    if "c" in options and "f" in options:
        raise CommandFailed("-c and -f exclude each other")
    if len(rest) != 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    offset, length = number(rest[0]), _lengths(rest[1:], limit="n" not in options)
    await _write_request(shell, "write", options, offset, length, data=_payload(options, length))


async def _writev(shell: IoShell, name: str, args: list[str]) -> None:
    options, rest = _options(shell, name, args, "CfP:q")
    if len(rest) < 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    offset, length = number(rest[0]), _lengths(rest[1:])
    await _write_request(shell, "writev", options, offset, length, data=_payload(options, length))


async def _aio_write(shell: IoShell, name: str, args: list[str]) -> None:
    options, rest = _options(shell, name, args, "CfP:quz")
    if len(rest) < 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    if "z" in options and len(rest) != 2:
        raise CommandFailed("-z supports only a single length parameter")
    offset, length = number(rest[0]), _lengths(rest[1:])
    data = _payload(options, length)
    shell.allow(Perm.WRITE)
    shell.spawn(_write_request(shell, "aio_write", options, offset, length, data=data))


async def _discard(shell: IoShell, name: str, args: list[str]) -> None:
    options, rest = _options(shell, name, args, "Cq")
    if len(rest) != 2:
        raise CommandFailed(shell.table[name].synopsis(name))
    offset, length = number(rest[0]), _lengths(rest[1:])
    shell.allow(Perm.WRITE)
    started = shell.clock.now_ns()
    try:
        await shell.image.discard(offset, length)
    except BlockIOError as error:
        raise _failed(shell, "discard", error) from None
    _report(shell, "discard", options, offset=offset, length=length, started_ns=started)


async def _flush(shell: IoShell, name: str, args: list[str]) -> None:
    await shell.image.flush()


async def _aio_flush(shell: IoShell, name: str, args: list[str]) -> None:
    await shell.finish()


async def _truncate(shell: IoShell, name: str, args: list[str]) -> None:
    options, rest = _options(shell, name, args, "m:")
    if len(rest) != 1:
        raise CommandFailed(shell.table[name].synopsis(name))
    preallocation = options.get("m", "off")
    if preallocation not in ("off", "metadata", "falloc", "full"):
        raise CommandError(f"'{preallocation}' is no preallocation mode: use off, metadata, falloc or full")
    length = number(rest[0])
    shell.allow(Perm.WRITE | Perm.RESIZE)
    await shell.image.truncate(length, exact=False, preallocation=preallocation)


# ------------------------------------------------------------------------------------------------------------- questions


async def _length(shell: IoShell, name: str, args: list[str]) -> None:
    shell.out(format_bytes(shell.image.length))


async def _allocation(shell: IoShell, offset: int, end: int) -> tuple[bool, int]:
    """Whether the top node itself holds ``offset``, and for how many bytes (up to ``end``) the answer is the same."""
    node = shell.image.node
    at, allocated = offset, None
    while at < end:
        extent = await block_status(node, at, end - at, want_zero=False)
        here = not isinstance(extent, Unallocated)
        if allocated is None:
            allocated = here
        if here is not allocated:
            break
        at += extent.length
    return bool(allocated), at - offset


async def _alloc(shell: IoShell, name: str, args: list[str]) -> None:
    offset = number(args[0])
    count = number(args[1]) if len(args) > 1 else 512
    end = max(offset, min(offset + count, shell.image.length))
    total, at = 0, offset
    while at < end:
        allocated, length = await _allocation(shell, at, end)
        total += length if allocated else 0
        at += length
    shell.out(f"{total}/{end - offset} bytes allocated at offset {format_bytes(offset)}")


async def _map(shell: IoShell, name: str, args: list[str]) -> None:
    at, end = 0, shell.image.length
    while at < end:
        allocated, length = await _allocation(shell, at, end)
        state = "    allocated" if allocated else "not allocated"
        shell.out(f"{format_bytes(length)} ({length:#x}) bytes {state} at offset {format_bytes(at)} ({at:#x})")
        at += length


async def _info(shell: IoShell, name: str, args: list[str]) -> None:
    node = shell.image.node
    shell.out(f"format name: {node.driver.name}")
    info = node.driver.info()
    if info.cluster_size:
        shell.out(f"cluster size: {format_bytes(info.cluster_size)}")
    specific = node.driver.specific_info()
    if specific is not None:
        shell.out("Format specific information:")
        for line in specific_lines(in_order(specific["data"])):
            shell.out(f"    {line}")


async def _sleep(shell: IoShell, name: str, args: list[str]) -> None:
    if not args[0].isdigit():
        raise CommandFailed(f"{args[0]} is not a valid number")
    await shell.clock.sleep_ns(int(args[0]) * MILLISECOND_NS)


async def _quit(shell: IoShell, name: str, args: list[str]) -> None:
    shell.quit = True


async def _help(shell: IoShell, name: str, args: list[str]) -> None:
    if not args:
        for command in sorted(set(shell.table.values()), key=lambda command: command.name):
            shell.out(command.synopsis(command.name))
        shell.out("\nUse 'help commandname' for extended help.")
        return
    found = shell.table.get(args[0])
    if found is None:
        raise CommandFailed(f"command {args[0]} not found")
    shell.out(found.synopsis(args[0]))
    if found.details:
        shell.out(f"\n{found.details}\n")


_COMMON: Final = """ -C, -- statistics as one line of comma separated values
 -q, -- no statistics"""
_READ_DETAILS: Final = f"""{_COMMON}
 -P, -- verify that every byte is this one
 -v, -- show the data"""
_WRITE_DETAILS: Final = f"""{_COMMON}
 -f, -- durable when the command returns (force unit access)
 -P, -- the byte to write (default {FILL_BYTE:#x})"""


def command_table(*commands: IoCommand) -> dict[str, IoCommand]:
    """Commands by name and alias."""
    return {name: command for command in commands for name in (command.name, *command.aliases)}


COMMANDS: Final[Mapping[str, IoCommand]] = command_table(
    IoCommand("read", _read, "reads a range", "[-abCqv] [-P pattern [-s off] [-l len]] off len", 2, None, ("r",),
              details=f"{_READ_DETAILS}\n -s, -- where in the data the verification begins\n -l, -- and its length"),
    IoCommand("readv", _readv, "reads a range into several buffers", "[-Cqv] [-P pattern] off len [len..]", 2, None,
              details=_READ_DETAILS),
    IoCommand("write", _write, "writes a range", "[-bcCfnquz] [-P pattern | -s source_file] off len", 2, None, ("w",),
              details=f"{_WRITE_DETAILS}\n -s, -- fill with the content of a file\n -z, -- write zeroes without a buffer\n"
              " -c, -- store whole clusters compressed\n"
              " -u, -- with -z: the space may be given back\n -n, -- with -z: fail rather than write a buffer of zeroes"),
    IoCommand("writev", _writev, "writes a range from several buffers", "[-Cfq] [-P pattern] off len [len..]", 2, None,
              details=_WRITE_DETAILS),
    IoCommand("aio_read", _aio_read, "starts a read", "[-Cqv] [-P pattern] off len [len..]", 2, None,
              details=f"{_READ_DETAILS}\n\n The result is printed when it completes; aio_flush waits for it."),
    IoCommand("aio_write", _aio_write, "starts a write", "[-Cfquz] [-P pattern] off len [len..]", 2, None,
              details=f"{_WRITE_DETAILS}\n -z, -- write zeroes\n -u, -- with -z: the space may be given back\n\n"
              " The result is printed when it completes; aio_flush waits for it."),
    IoCommand("aio_flush", _aio_flush, "waits for all aio requests"),
    IoCommand("flush", _flush, "makes all completed writes durable", aliases=("f",)),
    IoCommand("discard", _discard, "gives a range back", "[-Cq] off len", 2, None, ("d",), details=_COMMON),
    IoCommand("truncate", _truncate, "changes the length", "[-m prealloc_mode] off", 1, 3, ("t",)),
    IoCommand("length", _length, "shows the length", aliases=("l",)),
    IoCommand("alloc", _alloc, "counts the allocated bytes of a range", "offset [count]", 1, 2),
    IoCommand("map", _map, "shows which areas are allocated in the top image"),
    IoCommand("info", _info, "shows what the format says of the image", aliases=("i",)),
    IoCommand("sleep", _sleep, "waits this many milliseconds", "ms", 1, 1, needs_image=False),
    IoCommand("quit", _quit, "ends the program", "", 0, None, ("q",), needs_image=False),
    IoCommand("help", _help, "shows the commands", "[command]", 0, 1, ("?",), needs_image=False),
)  # fmt: skip
