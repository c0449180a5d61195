"""``qblock-storage-daemon``: block nodes and jobs without a machine, driven over QMP.

Takes the command line of qemu-storage-daemon 7.2: options are carried out in the order given. Differs from QEMU: exports
(--export, --nbd-server) are refused, monitors speak QMP only (mode=control), and a chardev that no monitor uses is an error. The
line that tells about a new image goes to standard error while a monitor speaks on standard output. With --dialect, which is
ours, the monitors speak as those of a proposal of 2011 or 2012.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs

from qblock.errors import CommandError, InvalidParameter, QBlockError
from qblock.options import parse_options, parse_opts
from qblock.streams import tell
from qblock.tools.arguments import Arguments, UsageError
from qblock.tools.background import in_background, remove_file, write_pid
from qblock.tools.console import PROGRAM_VERSION, complain, end_program, ending_quietly
from qblock.tools.tracing import Tracer, asks_for_list, monitor_trace, print_events

if TYPE_CHECKING:
    from qblock.monitor.chardev import ChardevOptions
    from qblock.monitor.dialects import Dialect
    from qblock.monitor.hub import MonitorHub
    from qblock.system import BlockSystem
    from qblock.tracing import Trace

PROGRAM: Final = "qblock-storage-daemon"
NO_EXPORTS: Final = "exports are not supported by this version; nodes and jobs are reached through --monitor"

HELP: Final = """usage: qblock-storage-daemon [OPTIONS]
Runs block nodes and jobs, driven over QMP. Options are carried out in the order given.

  --blockdev driver=DRIVER,node-name=NAME,...   add a node (also as JSON)
  --chardev socket,id=ID,path=PATH[,server=on][,wait=off]
  --chardev socket,id=ID,host=HOST,port=PORT[,server=on][,wait=off]
  --chardev stdio,id=ID                         where a monitor listens or connects
  --monitor chardev=ID[,mode=control]   serve QMP there
  --object TYPE,id=ID,...                       add an object (also as JSON)
  --dialect NAME                                whose commands the monitors have: 7.2 (default), rfc-2012,
                                                blkmirror-2012, block-copy-2011
  -T, --trace [enable=]PATTERN[,events=FILE][,file=FILE][,timestamp=on]
                                                write lines about events ('help' lists them; also as JSON)
  --pidfile PATH                                write the process id when everything is set up
  --daemonize                                   go to the background when everything is set up
  -h, --help                                    show this
  -V, --version                                 show the version"""

_LONG: Final = {
    "blockdev=": "blockdev", "chardev=": "chardev", "monitor=": "monitor", "object=": "object", "export=": "export",
    "nbd-server=": "nbd-server", "pidfile=": "pidfile", "daemonize": "daemonize", "trace=": "T", "dialect=": "dialect",
    "help": "h", "version": "V",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The program: returns its exit code."""
    args = sys.argv[1:] if argv is None else argv
    return ending_quietly(lambda: _run(args))


def _run(args: list[str]) -> int:
    tracer = Tracer(PROGRAM)
    try:
        arguments = Arguments(args, "hVT:", _LONG)
        if arguments.words:
            raise UsageError(f"Unexpected argument: {arguments.words[0]}")
        if _answer_questions(arguments):
            return 0
        for text in arguments.all("T"):
            tracer.configure(text)
        if "daemonize" in arguments:
            return in_background(PROGRAM, lambda ready: asyncio.run(_serve(arguments, tracer, ready)))
        asyncio.run(_serve(arguments, tracer, lambda: None))
    except UsageError as error:
        complain(PROGRAM, f"{error}\nTry '{PROGRAM} --help' for more information")
        return 1
    except QBlockError as error:
        complain(PROGRAM, str(error))
        return 1
    finally:
        tracer.close()
    return 0


def _answer_questions(arguments: Arguments) -> bool:
    """Print what --help, --version and --trace help ask for; True when one of them was there."""
    if "h" in arguments:
        print(HELP)
    elif "V" in arguments:
        print(f"{PROGRAM} version {PROGRAM_VERSION}")
    elif asks_for_list(arguments.all("T")):
        trace = monitor_trace(_dialect(arguments.get("dialect")))
        _declare_events(trace)
        print_events(trace)
    else:
        return False
    return True


def _declare_events(trace: Trace) -> None:
    """The trace events of the daemon's own life."""
    trace.declare("program_ready", "All options are carried out", "")
    trace.declare("program_exit", "The program was told to quit, and begins to close everything", "")
    trace.declare("blockdev_opened", "A node of the command line is there", "node_name={node_name}")
    trace.declare("monitor_listening", "A monitor can be used", "chardev={chardev}")


# ------------------------------------------------------------------------------------------------------------ serving


async def _serve(arguments: Arguments, tracer: Tracer, ready: Callable[[], None]) -> None:
    """Carry out the options in their order, then serve until told to quit; everything is closed on the way out."""
    from qblock.monitor.hub import MonitorHub
    from qblock.monitor.lines import DeafSession
    from qblock.monitor.server import MonitorServer
    from qblock.policy import OpenPolicy
    from qblock.system import BlockSystem

    def announce(text: str) -> None:
        tell(f"{text}\n", sys.stderr if setup.talks_on_stdio else sys.stdout)

    async with AsyncExitStack() as stack:
        created = BlockSystem.create(policy=OpenPolicy.follow(), announce=announce, fatal=end_program)
        system = await stack.enter_async_context(created)
        hub = MonitorHub(system, dialect=_dialect(arguments.get("dialect")))
        hub.make_chardev = partial(MonitorServer, hub, make_session=DeafSession, used=False)
        _declare_events(system.env.trace)
        tracer.watch(system)
        hub.open()
        stack.push_async_callback(hub.close)
        setup = _Setup(system, hub, stack)
        for name, text in arguments.given:
            await setup.carry_out(name, text)
        setup.check_chardevs()
        _quit_on_signals(hub)
        if path := arguments.get("pidfile"):
            write_pid(path)
            stack.callback(remove_file, path)
        ready()
        if (hit := system.env.trace.extra.get("program_ready")) is not None:
            hit()
        await hub.wait_quit()
        if (hit := system.env.trace.extra.get("program_exit")) is not None:
            hit()


def _dialect(name: str | None) -> Dialect:
    """The dialect of ``--dialect``; that of 7.2 is the daemon's own, not the machine's. Raises `CommandError`."""
    from qblock.monitor.dialects import Dialect, dialect_named

    chosen = Dialect.SYSTEM if name is None else dialect_named(name)
    return Dialect.STORAGE_DAEMON if chosen is Dialect.SYSTEM else chosen


def _quit_on_signals(hub: MonitorHub) -> None:
    """SIGTERM, SIGINT and SIGHUP quit as the command does: jobs are cancelled, images are closed."""
    loop = asyncio.get_running_loop()
    quitting: list[asyncio.Task[None]] = []

    def begin() -> None:
        if not quitting:
            quitting.append(loop.create_task(hub.quit(), name="quit on a signal"))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, begin)


@attrs.define(eq=False)
class _Setup:
    """Carries out one option after the other."""

    system: BlockSystem
    hub: MonitorHub
    stack: AsyncExitStack
    chardevs: dict[str, ChardevOptions] = attrs.field(factory=dict)
    used: set[str] = attrs.field(factory=set)

    async def carry_out(self, name: str, text: str) -> None:
        """One option; those that are not about the order of things were dealt with before."""
        match name:
            case "blockdev":
                await self._blockdev(text)
            case "chardev":
                self._chardev(text)
            case "monitor":
                await self._monitor(text)
            case "object":
                await self._object(text)
            case "export" | "nbd-server":
                raise CommandError(f"--{name}: {NO_EXPORTS}")

    async def _blockdev(self, text: str) -> None:
        options, strings = parse_options(text, implied_key="driver")
        if "node-name" not in options:
            raise InvalidParameter("node-name", "is missing: without a name nobody could use the node")
        node = await self.system.opener.open_blockdev(options, strings=strings)
        node.monitor_owned = True
        if (hit := self.system.env.trace.extra.get("blockdev_opened")) is not None:
            hit(node_name=node.node_name)

    def _chardev(self, text: str) -> None:
        from qblock.monitor.chardev import chardev_from

        options = chardev_from(parse_opts(text, implied_key="backend")[0])
        if options.label in self.chardevs:
            raise CommandError(f"there are two character devices called '{options.label}'")
        self.chardevs[options.label] = options

    async def _monitor(self, text: str) -> None:
        from qblock.monitor.server import MonitorServer

        options, _ = parse_opts(text, implied_key="chardev")
        label = options.pop("chardev", None)
        mode = options.pop("mode", "control")
        options.pop("id", None)
        pretty = options.pop("pretty", "off")
        for name in options:
            raise InvalidParameter(name, "is unexpected: --monitor takes chardev, mode and pretty")
        if mode != "control":
            raise InvalidParameter("mode", "must be 'control': the daemon has no HMP monitor")
        if pretty not in ("off", False):
            raise InvalidParameter("pretty", "must be 'off': replies are one line each here")
        if label not in self.chardevs:
            raise CommandError(f"--monitor: there is no character device '{label}'; give its --chardev first")
        if label in self.used:
            raise CommandError(f"--monitor: the character device '{label}' has a monitor already")
        self.used.add(label)
        server = MonitorServer(self.hub, self.chardevs[label])
        await self.stack.enter_async_context(server)
        if (hit := self.system.env.trace.extra.get("monitor_listening")) is not None:
            hit(chardev=label)

    async def _object(self, text: str) -> None:
        options, strings = parse_options(text, implied_key="qom-type")
        await self.system.add_object(options, strings=strings)

    @property
    def talks_on_stdio(self) -> bool:
        """Whether a monitor speaks QMP on standard output, where nothing else may be printed then."""
        return any(self.chardevs[label].address is None for label in self.used)

    def check_chardevs(self) -> None:
        """Raise when a character device has no user: nobody would ever answer there."""
        unused = sorted(self.chardevs.keys() - self.used)
        if unused:
            raise CommandError(f"no --monitor uses the character device '{unused[0]}'")


if __name__ == "__main__":
    sys.exit(main())
