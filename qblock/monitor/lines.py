"""Sessions that go line by line: the human monitor on a character device, the qtest protocol, and nobody at all.

Models HMP in readline mode as far as programs see it: greeting, prompt, the line, its output with CR LF. Differs from QEMU in
that a line is echoed as it is, not letter by letter with control sequences; a terminal edits and shows lines itself. The qtest
protocol is that of QEMU's documentation, as far as it moves time; without virtual time there is no such command, as in QEMU
without its ``qtest`` accelerator.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qblock.errors import QBlockError
from qblock.monitor.command import CommandContext
from qblock.monitor.qmp import QEMU_VERSION

if TYPE_CHECKING:
    from qblock.clock import VirtualTime
    from qblock.driver import Json
    from qblock.monitor.hub import MonitorHub
    from qblock.monitor.link import Link

PROMPT: Final = "(qemu) "
MAX_LINE: Final = 1 << 16
"""Bytes after which a line that does not end is given up."""


class LineSession(ABC):
    """Takes one line after the other from its link, which the server sets before `run`."""

    link: Link

    def __init__(self, hub: MonitorHub) -> None:
        self.hub = hub
        self._partial = b""
        self._lines: deque[str] = deque()
        self._wakeup = asyncio.Event()
        self._ended = False

    def received(self, data: bytes, fds: Sequence[int]) -> None:
        """See `link.Receiver`; descriptors are of no use here."""
        for fd in fds:
            os.close(fd)
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > MAX_LINE:
            self._partial = b""
        self._lines += [line.decode(errors="replace").rstrip("\r") for line in lines]
        self._wakeup.set()

    def ended(self) -> None:
        """See `link.Receiver`."""
        self._ended = True
        self._wakeup.set()

    def event(self, name: str, data: Mapping[str, Json], when: tuple[int, int]) -> None:
        """Events are QMP's."""

    def wake(self) -> None:
        """Look again whether the program quits."""
        self._wakeup.set()

    def stop(self) -> None:
        """End after the line that is executed."""
        self._lines.clear()
        self.ended()

    async def run(self) -> None:
        """Serve until the other side is gone or the program quits."""
        self.hub.sessions.append(self)
        try:
            self.begin()
            while True:
                while self._lines and not self.hub.quitting:
                    await self.serve(self._lines.popleft())
                    await self.link.drain()
                if self._ended or self.hub.quitting:
                    break
                self._wakeup.clear()
                await self._wakeup.wait()
        finally:
            self.hub.sessions.remove(self)

    def begin(self) -> None:
        """Greet."""

    @abstractmethod
    async def serve(self, line: str) -> None:
        """Execute one line and answer."""


class HumanSession(LineSession):
    """The human monitor. ``echo``: what comes is shown again, since no terminal has done it."""

    def __init__(self, hub: MonitorHub, *, echo: bool = True) -> None:
        super().__init__(hub)
        self._echo = echo

    def begin(self) -> None:
        """The greeting, and the first prompt."""
        version = ".".join(map(str, QEMU_VERSION))
        self._say(f"QEMU {version} monitor - type 'help' for more information\n{PROMPT}")

    async def serve(self, line: str) -> None:
        """The line again, its output, and the next prompt."""
        if self._echo:
            self._say(f"{line}\n")
        output = await self.hub.hmp.run(CommandContext(self.hub), line)
        self._say(output.text if self.hub.quitting else output.text + PROMPT)

    def _say(self, text: str) -> None:
        self.link.send(text.replace("\n", "\r\n").encode())


class QtestSession(LineSession):
    """The qtest protocol: ``clock_step [NS]`` and ``clock_set NS``. ``time`` is None on real time."""

    def __init__(self, hub: MonitorHub, time: VirtualTime | None) -> None:
        super().__init__(hub)
        self._time = time

    async def serve(self, line: str) -> None:
        """``OK NOW`` or ``FAIL REASON``."""
        words = line.split()
        if not words:
            self._say("FAIL There is no command in the line")
            return
        try:
            self._say(await self._answer(words))
        except (QBlockError, ValueError) as error:
            self._say(f"FAIL {error}")

    async def _answer(self, words: Sequence[str]) -> str:
        time = self._time
        match words:
            case ["clock_step", *rest] if time is not None and len(rest) <= 1:
                due = await time.next_timer_ns() if not rest else None
                ns = _number(rest[0]) if rest else 0 if due is None else due - time.now_ns
                await time.advance(ns)
            case ["clock_set", moment] if time is not None:
                await time.advance(max(0, _number(moment) - time.now_ns))
            case _:
                return f"FAIL Unknown command '{words[0]}'"
        return f"OK {time.now_ns}"

    def _say(self, text: str) -> None:
        self.link.send(f"{text}\n".encode())


def _number(text: str) -> int:
    value = int(text, 0)
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{text} is no number of nanoseconds")
    return value


class DeafSession(LineSession):
    """Nobody: what comes is dropped. A guest's serial port without a guest, say."""

    def received(self, data: bytes, fds: Sequence[int]) -> None:
        """See `link.Receiver`."""
        del data
        for fd in fds:
            os.close(fd)

    async def serve(self, line: str) -> None:
        """Nothing comes here."""
