"""The command line of `qblock`: long options with one dash or two, as QEMU's own, and the machine that they describe."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import attrs

from qblock.clock import Clock, LoopClock, RealClock, VirtualTime
from qblock.monitor.machine import Machine, MachineOptions
from qblock.testing.simloop import SimLoop
from qblock.tools.arguments import UsageError


@attrs.frozen
class CommandLine:
    """What was given: option values by name, in their order, and the words that are no options."""

    values: Mapping[str, Sequence[str]]
    words: Sequence[str]

    def last(self, name: str, default: str) -> str:
        """The value of an option; the last one wins."""
        return self.values[name][-1] if self.values.get(name) else default

    def has(self, name: str) -> bool:
        """Whether an option was given."""
        return name in self.values

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """The value of an option that is one of ``choices``, of which the first is the default."""
        value = self.last(name, choices[0])
        if value not in choices:
            raise UsageError(f"--{name} takes {' or '.join(choices)}, not '{value}'")
        return value

    def number(self, name: str) -> int | None:
        """The value of an option that is a number."""
        if name not in self.values:
            return None
        text = self.last(name, "")
        try:
            return int(text, 0)
        except ValueError:
            raise UsageError(f"--{name} takes a number, not '{text}'") from None


MACHINE_OPTIONS: Final = frozenset({"drive", "blockdev", "qmp", "clock", "seed"})


def parse_command_line(argv: Sequence[str], *, valued: frozenset[str], flags: frozenset[str]) -> CommandLine:
    """Take ``argv`` apart. ``-name value``, ``--name value`` and ``--name=value`` are the same. Raises `UsageError`."""
    values: dict[str, list[str]] = {}
    words: list[str] = []
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            words += rest
            break
        if not arg.startswith("-") or arg == "-":
            words.append(arg)
            continue
        name, equals, value = arg.lstrip("-").partition("=")
        if name in flags and not equals:
            values.setdefault(name, []).append("")
        elif name in valued:
            if not equals and not rest:
                raise UsageError(f"the option {arg} needs a value")
            values.setdefault(name, []).append(value if equals else rest.pop(0))
        else:
            raise UsageError(f"there is no option {arg}")
    return CommandLine(values, words)


def machine_options(line: CommandLine) -> MachineOptions:
    """The machine that the command line describes."""
    return MachineOptions(
        drives=line.values.get("drive", ()),
        blockdevs=line.values.get("blockdev", ()),
        qmp=line.values.get("qmp", ()),
        seed=line.number("seed"),
    )


def loop_factory(clock: str, *, manual: bool) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes the loop for a ``virtual`` or ``real`` clock; ``manual``: virtual time is moved by hand."""
    return asyncio.new_event_loop if clock == "real" else lambda: SimLoop(manual=manual)


async def start_machine(options: MachineOptions) -> Machine:
    """Start a machine on the running loop, with the clock that belongs to it."""
    loop = asyncio.get_running_loop()
    virtual = loop if isinstance(loop, VirtualTime) else None
    clock: Clock = LoopClock() if virtual is not None else RealClock()
    return await Machine.open(options, clock=clock, virtual_time=virtual)
