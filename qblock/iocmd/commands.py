"""The table of the commands, and ``quit`` and ``help``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qblock.iocmd import asking, reading, steering, writing
from qblock.iocmd.shell import CommandFailed, IoCommand, IoShell, command_table
from qblock.iocmd.writing import FILL_BYTE


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
_VERIFIED: Final = f"""{_COMMON}
 -P, -- verify that every byte is this one
 -v, -- show the data"""
_FILLED: Final = f"""{_COMMON}
 -f, -- durable when the command returns (force unit access)
 -P, -- the byte to write (default {FILL_BYTE:#x})"""
_ZEROED: Final = """ -z, -- write zeroes without a buffer
 -u, -- with -z: the space may be given back"""
_LATER: Final = """ -i, -- only count an invalid request, for the statistics

 The result is printed when it completes; aio_flush waits for it."""
_READ: Final = f"""{_VERIFIED}
 -s, -- where in the data the verification begins
 -l, -- and its length
 -b, -- read from the state of a machine, beside the disk
 -p, -- without meaning, for old scripts"""
_WRITE: Final = f"""{_FILLED}
 -s, -- fill with the content of a file
{_ZEROED}
 -n, -- with -z: fail rather than write a buffer of zeroes
 -c, -- store whole clusters compressed
 -b, -- write to the state of a machine, beside the disk
 -p, -- without meaning, for old scripts"""
_REOPEN: Final = """ What is not named stays as it is. For example: reopen -o lazy-refcounts=on

 -r, -- make the image read-only
 -w, -- make it writable
 -c, -- another cache mode: none, writeback, writethrough, directsync or unsafe
 -o, -- other options, as key=value,..."""
_BREAK: Final = """ blkdebug must be below the image (blkdebug::FILE). The next aio request that comes to the event
 stops there until 'resume'."""

COMMANDS: Final[Mapping[str, IoCommand]] = command_table(
    IoCommand("abort", steering.abort, "crashes the program", needs_image=False),
    IoCommand("aio_flush", writing.aio_flush, "waits for all aio requests"),
    IoCommand("aio_read", reading.aio_read, "starts a read", "[-Ciqv] [-P pattern] off len [len..]", 2, None,
              details=f"{_VERIFIED}\n{_LATER}"),
    IoCommand("aio_write", writing.aio_write, "starts a write", "[-Cfiquz] [-P pattern] off len [len..]", 2, None,
              details=f"{_FILLED}\n{_ZEROED}\n{_LATER}"),
    IoCommand("alloc", asking.alloc, "counts the allocated bytes of a range", "offset [count]", 1, 2),
    IoCommand("break", steering.set_breakpoint, "holds a request at an event", "event tag", 2, 2, details=_BREAK),
    IoCommand("discard", writing.discard, "gives a range back", "[-Cq] off len", 2, None, ("d",), details=_COMMON),
    IoCommand("flush", writing.flush, "makes all completed writes durable", aliases=("f",)),
    IoCommand("help", _help, "shows the commands", "[command]", 0, 1, ("?",), needs_image=False),
    IoCommand("info", asking.info, "shows what the format says of the image", aliases=("i",)),
    IoCommand("length", asking.length, "shows the length", aliases=("l",)),
    IoCommand("map", asking.show_map, "shows which areas are allocated in the top image"),
    IoCommand("quit", _quit, "ends the program", "", 0, None, ("q",), needs_image=False),
    IoCommand("read", reading.read, "reads a range", "[-bCpqv] [-P pattern [-s off] [-l len]] off len", 2, None, ("r",),
              details=_READ),
    IoCommand("readv", reading.readv, "reads a range into several buffers", "[-Cqv] [-P pattern] off len [len..]", 2, None,
              details=_VERIFIED),
    IoCommand("remove_break", steering.remove_breakpoint, "forgets a breakpoint", "tag", 1, 1),
    IoCommand("reopen", steering.reopen, "gives the image other options", "[-r | -w] [-c cache] [-o options]", 0, None,
              details=_REOPEN),
    IoCommand("resume", steering.resume, "lets a request go on that is held", "tag", 1, 1),
    IoCommand("sigraise", steering.raise_signal, "sends a signal to the program", "signal", 1, 1, needs_image=False),
    IoCommand("sleep", asking.sleep, "waits this many milliseconds", "ms", 1, 1, needs_image=False),
    IoCommand("truncate", writing.truncate, "changes the length", "[-m prealloc_mode] off", 1, 3, ("t",)),
    IoCommand("wait_break", steering.wait_for_breakpoint, "waits until a request is held", "tag", 1, 1),
    IoCommand("write", writing.write, "writes a range", "[-bcCfnpquz] [-P pattern | -s source_file] off len", 2, None, ("w",),
              details=_WRITE),
    IoCommand("writev", writing.writev, "writes a range from several buffers", "[-Cfq] [-P pattern] off len [len..]", 2, None,
              details=_FILLED),
)  # fmt: skip
