"""The commands that change how requests go: ``reopen``, breakpoints of blkdebug, signals.

``reopen`` gives the image new options with what it has kept, as qemu-io does, while ``blockdev-reopen`` takes complete ones.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from qblock.errors import CommandError
from qblock.iocmd.shell import CommandFailed, IoShell, options_of
from qblock.iocmd.words import number
from qblock.node import BlockDriverState
from qblock.nodespec import DISCARD_WORDS, MediumFlags
from qblock.options import dump, parse_keyval
from qblock.permissions import Perm

CACHE_MODES: Final[Mapping[str, tuple[bool, bool, bool]]] = {
    "none": (True, False, False),
    "off": (True, False, False),
    "directsync": (True, False, True),
    "writeback": (False, False, False),
    "writethrough": (False, False, True),
    "unsafe": (False, True, False),
}
"""For each mode of -c: whether the page cache is bypassed, whether flushes are ignored, whether each write is durable."""


async def reopen(shell: IoShell, name: str, args: list[str]) -> None:
    """``reopen``: the image becomes read-only or writable, or gets another cache mode or other options."""
    options, rest = options_of(shell, name, args, "rwc:o:")
    if rest:
        raise CommandFailed(shell.table[name].synopsis(name))
    if "r" in options and "w" in options:
        raise CommandError("-r and -w contradict each other")
    assert shell.opener is not None, "the program gives one"
    image = shell.image
    wanted = parse_keyval(options["o"]) if "o" in options else {}
    cache = options.get("c")
    if cache is not None and cache not in CACHE_MODES:
        raise CommandError(f"Invalid cache option: '{cache}' (choose from {', '.join(CACHE_MODES)})")
    if cache is not None and "cache" in wanted:
        raise CommandError("the cache mode was given twice: by -c, and among the options of -o")
    if "read-only" in wanted and ("r" in options or "w" in options):
        raise CommandError("-r and -w are other ways to give the option read-only: use one of them")
    description = _present_options(image.node)
    if cache is not None:
        direct, no_flush, _ = CACHE_MODES[cache]
        description["cache"] = {"direct": direct, "no-flush": no_flush}
    if "r" in options or "w" in options:
        description["read-only"] = "r" in options
    if wanted.get("discard") in DISCARD_WORDS:
        wanted["discard"] = DISCARD_WORDS[wanted["discard"]]
    description = {**description, **wanted}
    if "r" in options:
        image.set_permissions(image.perm & ~(Perm.WRITE | Perm.RESIZE), image.shared)
    await shell.opener.reopen_described([description], strings=True)
    if cache is not None:
        image.writethrough = CACHE_MODES[cache][2]


def _present_options(node: BlockDriverState) -> dict[str, Any]:
    """A complete description of the node as it is, its children by name."""
    children = {name: edge.node.node_name for name, edge in node.children.items()}
    given = node.options_given.keys() - children.keys()
    options = {key: value for key, value in dump(node.driver.options).items() if key in given}
    backing = {"backing": None} if node.driver.supports_backing and node.backing is None else {}
    return {
        **options,
        **children,
        **backing,
        "driver": node.driver.name,
        "node-name": node.node_name,
        "read-only": node.read_only,
        **MediumFlags.of(node).options(),
    }


# --------------------------------------------------------------------------------------------------------- breakpoints


async def set_breakpoint(shell: IoShell, name: str, args: list[str]) -> None:
    """``break``: the next request that comes to an event is held."""
    keeper = shell.find_keeper()
    if keeper is None:
        raise CommandFailed("Could not set breakpoint: there is no blkdebug node below the image")
    try:
        keeper.set_breakpoint(args[0], args[1], shell.out)
    except CommandError as error:
        raise CommandFailed(f"Could not set breakpoint: {error}") from None


async def remove_breakpoint(shell: IoShell, name: str, args: list[str]) -> None:
    """``remove_break``: breakpoints are forgotten, and what they hold goes on."""
    keeper = shell.find_keeper()
    if keeper is None or not keeper.breakpoints.remove(args[0]):
        raise CommandFailed(f"Could not remove breakpoint {args[0]}: there is none of that name")


async def wait_for_breakpoint(shell: IoShell, name: str, args: list[str]) -> None:
    """``wait_break``: until a request is held. Unlike in QEMU that fails when no request is left that could be."""
    keeper, tag = shell.find_keeper(), args[0]
    while keeper is not None and not keeper.breakpoints.holds(tag):
        elsewhere = tuple(shell.elsewhere())
        if not keeper.breakpoints.is_set(tag) or not (elsewhere or shell.has_requests_that_move):
            keeper = None
        else:
            await shell.until_news(*elsewhere)
    if keeper is None:
        raise CommandFailed(f"no request is under way that could be held as '{tag}'")


async def resume(shell: IoShell, name: str, args: list[str]) -> None:
    """``resume``: a request goes on that is held."""
    keeper = shell.find_keeper()
    if keeper is None or not keeper.breakpoints.resume(args[0]):
        raise CommandFailed(f"Could not resume request: none is held as '{args[0]}'")
    await asyncio.sleep(0)  # so that it says so before the next command does anything


# ------------------------------------------------------------------------------------------------------------- signals


async def raise_signal(shell: IoShell, name: str, args: list[str]) -> None:
    """``sigraise``: the program gets a signal, as if somebody had sent it."""
    value = number(args[0])
    if value >= 1 << 31 or (value and value not in signal.valid_signals()):
        raise CommandFailed(f"signal argument '{args[0]}' is no valid signal")
    sys.stdout.flush()
    if value:
        _default_action(value)
        os.kill(os.getpid(), value)


async def abort(shell: IoShell, name: str, args: list[str]) -> NoReturn:
    """``abort``: the program crashes; nothing is flushed or closed."""
    sys.stdout.flush()
    os.abort()


def _default_action(number: int) -> None:
    """Python catches SIGINT to raise an exception: what is sent here shall do what it does to any program."""
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
