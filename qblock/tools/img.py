"""``qblock-img``: offline work on images, with qemu-img 7.2's command line, exit codes and output layout.

Each sub-command is a module of its own, imported when it is chosen: ``qblock-img info`` starts fast. Differs from
QEMU in its error texts, which are our own.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Final, NoReturn, cast

from qblock.errors import QBlockError
from qblock.tools.arguments import UsageError
from qblock.tools.console import PROGRAM_VERSION, complain, ending_quietly, leave

if TYPE_CHECKING:
    from qblock.tools.images import Watch

SUBCOMMANDS: Final[Mapping[str, str]] = {
    "amend": "amend [-f FMT | --image-opts] [-t CACHE] [--force] [-p] [-q] -o OPTIONS FILE",
    "bench": "bench [-c COUNT] [-d DEPTH] [-f FMT | --image-opts] [--flush-interval=N [--no-drain]] [-i AIO] [-o OFFSET]\n"
    "        [--pattern=BYTE] [-q] [-s SIZE] [-S STEP] [-t CACHE] [-w] [-U] FILE",
    "bitmap": "bitmap (--add | --remove | --clear | --enable | --disable | --merge SOURCE)... [-b FILE [-F FMT]]\n"
    "         [-g GRANULARITY] [-f FMT | --image-opts] FILE BITMAP",
    "check": "check [-q] [-f FMT | --image-opts] [--output=human|json] [-r leaks|all] [-T CACHE] [-U] [--explain] FILE",
    "commit": "commit [-f FMT | --image-opts] [-t CACHE] [-b BASE] [-r RATE] [-d] [-p] [-q] FILE",
    "compare": "compare [-f FMT] [-F FMT | --image-opts] [-T CACHE] [-p] [-q] [-s] [-U] FILE1 FILE2",
    "convert": "convert [-f FMT | --image-opts] [-O FMT | --target-image-opts] [-B BACKING [-F FMT]] [-o OPTIONS]\n"
    "          [-t CACHE] [-T CACHE] [-n [--target-is-zero]] [-C | -c] [-m COROUTINES] [-p] [-q] [-S SIZE] [-U] [-W]\n"
    "          [-l SNAPSHOT] [-r RATE] [--salvage] [--bitmaps [--skip-broken-bitmaps]]\n"
    "          FILE [FILE2 ...] OUTPUT",
    "create": "create [-q] [-f FMT] [-b BACKING [-F FMT]] [-u] [-o OPTIONS] FILE [SIZE]",
    "dd": "dd [-f FMT | --image-opts] [-O FMT] [-U] [bs=BYTES] [count=BLOCKS] [skip=BLOCKS] if=FILE of=FILE",
    "diff": "diff [-f FMT] [-F FMT | --image-opts] [--output=human|json] [-T CACHE] [-q] [-s] [-U] FILE1 FILE2",
    "info": "info [-f FMT | --image-opts] [--output=human|json] [--backing-chain | --chain] [-U] FILE",
    "measure": "measure [--output=human|json] [-O FMT] [-o OPTIONS]\n"
    "          [--size N | [-f FMT | --image-opts] [-l SNAPSHOT] [-U] FILE]",
    "map": "map [-f FMT | --image-opts] [--output=human|json | --graph] [-s OFFSET] [-l LENGTH] [-U] FILE",
    "rebase": "rebase [-f FMT | --image-opts] [-t CACHE] [-T CACHE] [-p] [-q] [-U] [-u] -b BACKING [-F FMT] FILE",
    "resize": "resize [-f FMT | --image-opts] [--preallocation=off|metadata|falloc|full] [-q] [--shrink] FILE [+|-]SIZE",
    "snapshot": "snapshot [--image-opts] [-U] [-q] [-l | -a NAME | -c NAME | -d NAME] FILE",
}

PROGRAM: Final = "qblock-img"
_HELP: Final = """usage: qblock-img [-T TRACE] COMMAND [OPTIONS]
Works on disk images that no machine is using.

  -h, --help     show this
  -V, --version  show the version
  -T, --trace [enable=]PATTERN[,events=FILE][,file=FILE][,timestamp=on]
                 write lines about what happens inside ('help' lists the events)

All commands but bench take --object secret,id=NAME,... for encrypted images.

Commands:
"""


def main(argv: list[str] | None = None) -> int:
    """The program: returns its exit code."""
    args = sys.argv[1:] if argv is None else argv
    return ending_quietly(lambda: _run(args))


def program() -> NoReturn:
    """The entry point of the installed program."""
    _import_asyncio()
    leave(main())


def _import_asyncio() -> None:
    """Import asyncio as it is where Python has no OpenSSL: loading that takes a tenth of the time of a short command.

    Nothing here speaks TLS over asyncio. Afterwards ``ssl`` can be imported by who wants it (a driver of somebody else's).
    """
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    if "ssl" not in modules:
        modules["ssl"] = None  # importing it fails now
        try:
            importlib.import_module("asyncio")
        finally:
            del modules["ssl"]


def _run(args: list[str]) -> int:
    try:
        traces, args = _take_traces(args)
        if not traces:
            return _perform(args)
        return _perform_traced(args, traces)
    except UsageError as error:
        return _usage_failure(str(error))
    except QBlockError as error:
        complain(PROGRAM, str(error))
        return 1


def _take_traces(args: list[str]) -> tuple[list[str], list[str]]:
    """The values of --trace before the command, and what follows them."""
    traces = []
    while args and (args[0] in ("-T", "--trace") or args[0].startswith("--trace=")):
        option, equals, value = args[0].partition("=")
        if not equals and len(args) < 2:
            raise UsageError(f"the option {option} needs a value")
        traces.append(value if equals else args[1])
        args = args[1:] if equals else args[2:]
    return traces, args


def _perform_traced(args: list[str], traces: list[str]) -> int:
    from contextlib import closing

    from qblock.tools.tracing import Tracer, asks_for_list, print_events
    from qblock.tracing import Trace

    if asks_for_list(traces):
        print_events(Trace())
        return 0
    with closing(Tracer.of(PROGRAM, traces)) as tracer:
        return _perform(args, lambda env: tracer.attach(env.trace, env.clock))


def _perform(args: list[str], watch: Watch | None = None) -> int:
    if args and args[0] in ("-V", "--version"):
        print(f"qblock-img version {PROGRAM_VERSION}")
        return 0
    if not args:
        return _usage_failure("Not enough arguments: a command is missing")
    if args[0] in ("-h", "--help") or (args[0] in SUBCOMMANDS and args[1:2] in (["-h"], ["--help"])):
        _print_help()
        return 0
    name, *rest = args
    if name not in SUBCOMMANDS:
        return _usage_failure(f"'{name}' is not a command")
    command = _load(f"qblock.tools.img_{name}")
    from qblock.tools.images import OnlyHelp

    try:
        code: int = command.run(rest, watch)
    except OnlyHelp:
        return 0
    return code


def _load(name: str) -> ModuleType:
    """Import a sub-command; the collector pauses meanwhile, since what is imported stays."""
    gc.disable()
    module = importlib.import_module(name)
    gc.freeze()
    gc.enable()
    return module


def _print_help() -> None:
    print(_HELP + "\n".join(f"  {usage}" for usage in SUBCOMMANDS.values()))


def _usage_failure(text: str) -> int:
    complain("qblock-img", text)
    print("Try 'qblock-img --help' for more information", file=sys.stderr)
    return 1


if __name__ == "__main__":
    program()
