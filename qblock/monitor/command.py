"""What a monitor command is: one async function with one frozen argument class, and tables of them by dialect.

QMP, HMP, introspection and the docs all read the same `Command` objects. Which commands a dialect has is told by
`dialects.py`. A command that is not complete is not in a table, so it answers CommandNotFound.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from qblock.errors import CommandError, CommandNotFound
from qblock.monitor import visitor
from qblock.monitor.dialects import BOTH, Dialect, belonging_to

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.monitor.descriptors import FdBatch
    from qblock.monitor.hub import MonitorHub
    from qblock.monitor.session import MonitorSession
    from qblock.system import BlockSystem


@attrs.frozen
class CommandContext:
    """What a command may touch: the block system, the program around it, and the session that asked (for its descriptors).

    ``session`` is None for a command that no QMP session gave (the REPL, the command line); ``fds`` is the batch of
    descriptors that the request may claim from.
    """

    hub: MonitorHub
    session: MonitorSession | None = None
    fds: FdBatch | None = None

    @property
    def system(self) -> BlockSystem:
        """The block system that this monitor drives."""
        return self.hub.system

    @property
    def dialect(self) -> Dialect:
        """Whose command set is in force."""
        return self.hub.dialect


@attrs.frozen
class NoArguments:
    """The arguments of a command that takes none."""


Handler = Callable[[CommandContext, Any], Awaitable[Any]]


@attrs.frozen
class Command:
    """One command. ``since`` is the QEMU version that brought it, ``features`` its QAPI feature flags.

    ``returns`` is the shape of the reply: an attrs class, a list of one, ``str``, or None for the empty object.

    Some commands take an object whose members depend on a member of it (blockdev-add on ``driver``): their handler gets the
    JSON object itself and has it checked by whoever knows. Such a command is `checks_itself`, and ``arguments`` is the class
    of the members that there are always.

    A command that is ``alone`` is executed while no other one is (see `turns.py`).
    """

    name: str
    handler: Handler
    arguments: type[Any]
    since: str
    returns: Any = None
    oob: bool = False
    checks_itself: bool = False
    alone: bool = False
    features: tuple[str, ...] = ()
    dialects: frozenset[Dialect] = BOTH

    @property
    def doc(self) -> str:
        """The first paragraph of the handler's docstring."""
        return (inspect.getdoc(self.handler) or "").split("\n\n")[0].replace("\n", " ")

    async def run(self, ctx: CommandContext, arguments: Mapping[str, Json]) -> Json:
        """Check the arguments, execute, and give the result as JSON; raises `QBlockError`."""
        given = arguments if self.checks_itself else visitor.arguments(self.arguments, arguments)
        if self.oob:
            return visitor.reply(await self.handler(ctx, given))
        async with ctx.hub.executing(alone=self.alone):
            return visitor.reply(await self.handler(ctx, given))


_Function = TypeVar("_Function", bound=Callable[..., Awaitable[Any]])


def command(
    name: str,
    *,
    since: str,
    returns: Any = None,
    oob: bool = False,
    open_arguments: type[Any] | None = None,
    alone: bool = False,
    features: tuple[str, ...] = (),
    dialects: frozenset[Dialect] = BOTH,
) -> Callable[[_Function], Command]:
    """Make a `Command` of an async function ``(ctx, args)``; the annotation of ``args`` is its argument class.

    ``open_arguments`` makes a command that checks its arguments itself, see `Command`.
    """

    def decorate(function: _Function) -> Command:
        hint = list(inspect.signature(function).parameters.values())[1].annotation
        return Command(
            name,
            function,
            open_arguments or (hint if isinstance(hint, type) else function.__globals__[hint]),
            since,
            returns=returns,
            oob=oob,
            checks_itself=open_arguments is not None,
            alone=alone,
            features=features,
            dialects=dialects,
        )

    return decorate


class CommandTable(Mapping[str, Command]):
    """The commands of one dialect, by name, in alphabetical order."""

    def __init__(self, dialect: Dialect, commands: Iterable[Command]) -> None:
        self.dialect = dialect
        self._commands = {command.name: command for command in belonging_to(dialect, commands)}

    @classmethod
    def of_modules(cls, dialect: Dialect, modules: Iterable[ModuleType]) -> CommandTable:
        """All `Command` objects that the modules define and ``dialect`` has."""
        return cls(dialect, (value for m in modules for value in vars(m).values() if isinstance(value, Command)))

    def __getitem__(self, name: str) -> Command:
        return self._commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._commands)

    def __len__(self) -> int:
        return len(self._commands)

    def find(self, name: str, *, oob: bool = False) -> Command:
        """The command ``name``; raises `CommandNotFound`, or `CommandError` if ``oob`` and it must wait its turn."""
        found = self._commands.get(name)
        if found is None:
            raise CommandNotFound(name)
        if oob and not found.oob:
            raise CommandError(f"The command '{name}' cannot be executed out of band; send it with 'execute'")
        return found
