"""A shell for the commands: finds them, runs them, and keeps what they have started.

Commands by name are given to it (`commands.COMMANDS`, and those that a program adds).
"""

from __future__ import annotations

import asyncio
import getopt
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from qblock.breakpoints import Caller
from qblock.driver import SupportsBreakpoints
from qblock.errors import CommandError, QBlockError
from qblock.permissions import Perm

if TYPE_CHECKING:
    from qblock.backend import BlockBackend
    from qblock.clock import Clock
    from qblock.node import BlockDriverState
    from qblock.opening import Opener


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
    run: Callable[[IoShell, str, list[str]], Coroutine[Any, Any, None]]
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

    ``program`` stands before messages of the block layer. aio commands run as tasks of ``start`` and are waited for by `finish`.
    ``opener`` is what ``reopen`` needs. ``elsewhere`` gives what else is under way that may bring requests to a breakpoint, as
    futures of its end. Buffers begin ``misalign`` bytes into a page. ``quit`` is True after the command of that name, ``pending``
    are the aio requests that have not been answered.
    """

    backend: BlockBackend | None
    clock: Clock
    out: Callable[[str], None]
    err: Callable[[str], None]
    start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    table: Mapping[str, IoCommand]
    program: str = "qblock-io"
    opener: Opener | None = None
    elsewhere: Callable[[], Iterable[asyncio.Future[Any]]] = tuple
    misalign: int = 0
    quit: bool = False
    pending: dict[asyncio.Task[None], Caller] = attrs.field(factory=dict)

    @property
    def image(self) -> BlockBackend:
        """The backend that commands work on; only for commands that need one."""
        assert self.backend is not None
        return self.backend

    async def execute(self, line: str, *, complain: Callable[[str], None] | None = None) -> int:
        """Run one line; 0 when it did what it says, 1 when not. Words are separated by blanks, there is no quoting.

        What the block layer refuses is said by ``complain``, or else goes to ``err``.
        """
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
            if complain is not None:
                complain(str(error))
            else:
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
        with Caller(hurry=self._hurry).calling():
            await command.run(self, name, args)

    def _hurry(self, tag: str) -> None:
        self.err(f"{self.program}: '{tag}' holds a command that all others wait for, and is resumed: use aio_ commands")

    def find_keeper(self) -> SupportsBreakpoints | None:
        """The first driver from the image downwards that can hold requests."""
        node: BlockDriverState | None = self.image.root.node if self.image.root is not None else None
        while node is not None:
            if isinstance(node.driver, SupportsBreakpoints):
                return node.driver
            edge = node.filtered or node.storage
            node = edge.node if edge is not None else None
        return None

    @property
    def held(self) -> list[str]:
        """The tags that hold aio requests."""
        return [tag for caller in self.pending.values() for tag in caller.held]

    @property
    def has_requests_that_move(self) -> bool:
        """Whether there is an aio request that no breakpoint holds."""
        return any(not caller.held for caller in self.pending.values())

    async def until_news(self, *news: asyncio.Future[Any]) -> None:
        """Wait until an aio request is answered, one is held, or breakpoints are removed; or for one of ``news``."""
        listener: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if (keeper := self.find_keeper()) is not None:
            keeper.breakpoints.listen(listener)
        await asyncio.wait((*self.pending, listener, *news), return_when=asyncio.FIRST_COMPLETED)

    async def finish(self) -> None:
        """Wait until every aio request has completed and printed its result; raises `CommandFailed` if one is held."""
        while self.pending:
            if self.held:
                tags = ", ".join(self.held)
                raise CommandFailed(f"requests are held at breakpoints ({tags}): resume them first", to_stderr=True)
            await self.until_news()

    async def finish_all(self) -> None:
        """As `finish`, at the end of all commands: requests that are held go on."""
        while self.pending:
            if (keeper := self.find_keeper()) is not None:
                for tag in self.held:
                    keeper.breakpoints.resume(tag)
            await self.until_news()

    def buffer(self, length: int) -> memoryview:
        """A buffer of zeroes for a request."""
        return memoryview(bytearray(length + self.misalign))[self.misalign :]

    def spawn(self, request: Coroutine[Any, Any, None]) -> None:
        """Start an aio request; when it fails it says so, and that is all."""
        caller = Caller()

        async def run() -> None:
            try:
                with caller.calling():
                    await request
            except CommandFailed as failure:
                self.out(failure.text)
            except QBlockError as error:
                self.err(f"{self.program}: {error}")
            finally:
                del self.pending[task]

        task = self.start(run())
        self.pending[task] = caller

    def allow(self, needed: Perm) -> None:
        """Take permissions on the image that the command at hand needs; raises when the image is read-only."""
        backend = self.image
        if needed & (Perm.WRITE | Perm.RESIZE) and backend.node.read_only:
            raise CommandError(f"'{backend.node.node_name}' is read-only")
        if needed & ~backend.perm:
            backend.set_permissions(backend.perm | needed, backend.shared)


def _expected(command: IoCommand) -> str:
    if command.most is None:
        return f"at least {command.least} arguments"
    if command.most == command.least:
        return f"{command.least} arguments"
    return f"between {command.least} and {command.most} arguments"


def options_of(shell: IoShell, name: str, args: list[str], letters: str) -> tuple[dict[str, str], list[str]]:
    """Single-letter options (anywhere in the line) and the rest; raises `CommandFailed` with the synopsis."""
    try:
        given, rest = getopt.gnu_getopt(args, letters)
    except getopt.GetoptError as error:
        shell.err(f"{name}: {error.msg}")
        raise CommandFailed(shell.table[name].synopsis(name)) from None
    return {option[1]: value for option, value in given}, rest


def command_table(*commands: IoCommand) -> dict[str, IoCommand]:
    """Commands by name and alias."""
    return {name: command for command in commands for name in (command.name, *command.aliases)}
