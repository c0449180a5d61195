"""``qblock-io``: read, write and inspect one image by small commands, with qemu-io 7.2's command line and output.

The commands are those of `qblock.iocmd`, plus ``open`` and ``close``. Without -c they are read from standard input, each behind
the prompt ``qemu-io> `` (printed also when input is a file, as QEMU does, so that outputs can be compared).
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import closing
from typing import Final, NoReturn

import attrs

from qblock.errors import CommandError, QBlockError
from qblock.iocmd.commands import COMMANDS
from qblock.iocmd.shell import AlreadySaid, CommandFailed, IoCommand, IoShell, command_table, options_of
from qblock.nodespec import DISCARD_WORDS
from qblock.options import parse_keyval
from qblock.tools.arguments import Arguments, UsageError, aio_mode, is_writethrough
from qblock.tools.console import PROGRAM_VERSION, complain, ending_quietly, leave
from qblock.tools.images import ImageArguments, ImageSession, OnlyHelp, cache_flags, run_session, with_secrets
from qblock.tools.tracing import Tracer, asks_for_list, print_events
from qblock.tracing import Trace

PROMPT: Final = "qemu-io> "
MISALIGNMENT: Final = 16
"""Where in a page the buffers of -m begin."""

HELP: Final = """usage: qblock-io [OPTIONS] [-c COMMAND]... [FILE]
Reads and writes a disk image by commands.

  -c, --cmd COMMAND    run this command (may be given several times); otherwise commands come from standard input
  -f, --format FMT     format of the image (otherwise it is probed)
  -r, --read-only      open it read-only
  -s, --snapshot       write to a temporary overlay, which is gone at the end
  -n, --nocache        same as -t none
  -t, --cache MODE     none, writeback, writethrough, directsync or unsafe
  -d, --discard MODE   ignore (off) or unmap (on)
  -C, --copy-on-read   copy what is read from the backing file into the image
  -i, --aio MODE       threads, io_uring, or native (also called -k), which needs -n or -t none
  -m, --misalign       let the buffers of requests begin inside of a block
  -U, --force-share    open it although another program writes to it (needs -r)
  --image-opts         FILE is a list of options: driver=...,file.filename=...
  --object OBJECT      secret,id=NAME,...
  -T, --trace [enable=]PATTERN[,events=FILE][,file=FILE][,timestamp=on]
                       write lines about what happens inside ('help' lists the events)
  -h, --help           show this
  -V, --version        show the version

'qblock-io -c help' lists the commands."""

_OPEN_LETTERS: Final = "rsCnkUt:d:i:o:"
_OPEN: Final = """ -r, -- read-only
 -s, -- write to a temporary overlay, which is gone when the image is closed
 -C, -- copy what is read from the backing file into the image
 -n, -- same as -t none
 -U, -- although another program writes to it (needs -r)
 -t, -- the cache mode: none, writeback, writethrough, directsync or unsafe
 -d, -- what becomes of discards: ignore (off) or unmap (on)
 -i, -- the aio mode: threads, io_uring, or native (also called -k)
 -o, -- options for the block driver, as key=value,..."""
_LONG: Final = {
    "cmd=": "c", "format=": "f", "read-only": "r", "snapshot": "s", "nocache": "n", "copy-on-read": "C", "misalign": "m",
    "native-aio": "k", "aio=": "i", "cache=": "t", "discard=": "d", "trace=": "T", "force-share": "U", "help": "h",
    "version": "V", "image-opts": "image-opts", "object=": "object",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The program: returns its exit code."""
    args = sys.argv[1:] if argv is None else argv
    return ending_quietly(lambda: _run(args))


def _run(args: list[str]) -> int:
    try:
        arguments = Arguments(args, "hVc:d:f:rsnCmki:t:T:U", _LONG)
        if "h" in arguments:
            print(HELP)
            return 0
        if "V" in arguments:
            print(f"qblock-io version {PROGRAM_VERSION}")
            return 0
        if asks_for_list(arguments.all("T")):
            print_events(Trace())
            return 0
        if len(arguments.words) > 1:
            raise UsageError("expecting at most one image file name")
        arguments.check_image_opts()
        wanted = _wanted(arguments, arguments.words[0]) if arguments.words else None
        with closing(Tracer.of("qblock-io", arguments.all("T"))) as tracer:
            return run_session(
                lambda session: _Program(session).run(arguments, wanted),
                with_secrets(arguments, lambda env: tracer.attach(env.trace, env.clock)),
            )
    except OnlyHelp:
        return 0
    except UsageError as error:
        complain("qblock-io", str(error))
        print(HELP)
    except QBlockError as error:
        complain("qblock-io", str(error))
    return 1


def _wanted(arguments: Arguments, name: str, *, image_opts: bool = False) -> ImageArguments:
    """How to open an image, from the options of the program or of its open command."""
    cache = "none" if "n" in arguments else arguments.get("t", "writeback")
    discard = arguments.get("d", "unmap") or ""
    if discard not in DISCARD_WORDS:
        raise CommandError(f"Invalid discard option: '{discard}' (choose from {', '.join(DISCARD_WORDS)})")
    if "C" in arguments and "r" in arguments:
        raise CommandError("-C copies into the image, which -r forbids")
    return ImageArguments(
        name,
        fmt=arguments.get("f"),
        image_opts=image_opts or "image-opts" in arguments,
        writable="r" not in arguments,
        force_share="U" in arguments,
        flags=attrs.evolve(
            cache_flags(cache, discard=DISCARD_WORDS[discard] == "unmap"), aio=aio_mode(arguments, "k")
        ),
        writethrough=is_writethrough(cache),
        copy_on_read="C" in arguments,
        temporary="s" in arguments,
    )


class _Program:
    """One run: the session that opens images, and the shell that works on the one that is open."""

    def __init__(self, session: ImageSession) -> None:
        self._session = session

    async def run(self, arguments: Arguments, wanted: ImageArguments | None) -> int:
        try:
            async with asyncio.TaskGroup() as tasks:
                return await self._run(arguments, wanted, tasks)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _run(self, arguments: Arguments, wanted: ImageArguments | None, tasks: asyncio.TaskGroup) -> int:
        shell = IoShell(
            backend=None,
            clock=self._session.environment.clock,
            out=print,
            err=_print_error,
            start=tasks.create_task,
            table={**COMMANDS, **self._commands()},
            opener=self._session.opener,
            misalign=MISALIGNMENT if "m" in arguments else 0,
        )
        if wanted is not None and not await self._open_image(shell, wanted):
            return 1
        failed = 0
        lines = _given(arguments.all("c")) if "c" in arguments else _typed()
        async for line in lines:
            failed |= await shell.execute(line)
            if shell.quit:
                break
        await shell.finish_all()
        return failed

    async def _open_image(self, shell: IoShell, wanted: ImageArguments) -> bool:
        try:
            shell.backend = await self._session.open(wanted)
        except QBlockError as error:
            shell.err(f"qblock-io: can't open device {wanted.name}: {error}")
            return False
        return True

    def _commands(self) -> dict[str, IoCommand]:
        usage = "[-rsCnU] [-t cache] [-d discard] [-o options] [path]"
        return command_table(
            IoCommand("open", self._open, "opens an image", usage, 1, None, ("o",), needs_image=False, details=_OPEN),
            IoCommand("close", self._close, "closes the image", aliases=("c",)),
        )

    async def _open(self, shell: IoShell, name: str, args: list[str]) -> None:
        if shell.backend is not None:
            raise CommandFailed("an image is open already: close it first", to_stderr=True)
        options_of(shell, name, args, _OPEN_LETTERS)
        given = Arguments(args, _OPEN_LETTERS)
        options = given.get("o")
        if options is None and len(given.words) != 1:
            raise CommandFailed(shell.table[name].synopsis(name))
        if options is not None:
            parse_keyval(options)
            if given.words:
                options += ",file.filename=" + given.words[0].replace(",", ",,")
        wanted = _wanted(given, options if options is not None else given.words[0], image_opts=options is not None)
        if not await self._open_image(shell, wanted):
            raise AlreadySaid

    async def _close(self, shell: IoShell, name: str, args: list[str]) -> None:
        await shell.finish_all()
        backend, shell.backend = shell.image, None
        await self._session.close(backend)


def _print_error(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr)


async def _given(lines: Iterable[str]) -> AsyncIterator[str]:
    for line in lines:
        yield line


async def _typed() -> AsyncIterator[str]:
    """Lines from standard input, read in a thread so that aio requests go on meanwhile."""
    loop = asyncio.get_running_loop()
    if os.isatty(0) and os.isatty(1):
        import readline  # noqa: F401 - line editing for input(), only for a person at a terminal
    while True:
        line = await loop.run_in_executor(None, _next_line)
        if line is None:
            return
        yield line


def _next_line() -> str | None:
    try:
        if os.isatty(0) and os.isatty(1):
            return input(PROMPT)
        print(PROMPT, end="", flush=True)
        return sys.stdin.readline() or None
    except EOFError:
        return None


def program() -> NoReturn:
    """The entry point of the installed program."""
    leave(main())


if __name__ == "__main__":
    program()
