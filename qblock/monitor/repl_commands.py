"""The REPL's own commands, beside HMP's: for looking at the machine, for playing the guest, and for moving time.

QEMU's monitor has none of these: there the guest and the clock are out of reach of the person at the console. Each
command is a `LearningCommand` with its help; they run on the machine's loop and return the text to print. Sizes are
bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

import attrs

from qblock.errors import CommandError, DeviceNotFound
from qblock.monitor.drawing import GraphDrawing, columns
from qblock.monitor.eventlog import MachineEvent
from qblock.monitor.hmp import HmpCall, HmpCommand
from qblock.monitor.hmp_grammar import parse_signature
from qblock.monitor.machine import Machine
from qblock.units import SECOND_NS, format_duration, format_size, parse_duration, parse_size

RUN_LIMIT_NS: Final = 3600 * SECOND_NS
"""How long ``run until`` lets time pass at most unless told otherwise."""


@attrs.frozen
class LearningCommand:
    """One command: ``usage`` after its name, a ``summary`` in one line, and ``details`` for ``help NAME``."""

    name: str
    usage: str
    summary: str
    details: str
    run: Callable[[Machine, Sequence[str]], Coroutine[Any, Any, str]]
    words: tuple[str, ...] = ()
    """What may stand as first argument, for completion."""


def install(machine: Machine) -> None:
    """Add the commands to the machine's human monitor, where ``human-monitor-command`` finds them too."""
    for command in LEARNING_COMMANDS.values():
        machine.hub.hmp.register(_as_hmp_command(command, machine))


def _as_hmp_command(command: LearningCommand, machine: Machine) -> HmpCommand:
    async def handler(call: HmpCall) -> None:
        text = await command.run(machine, (call.text("words") or "").split())
        if text:
            call.say(text)

    return HmpCommand(command.name, parse_signature("words:S?"), command.usage, command.summary, handler)


def _wrong(command: str) -> CommandError:
    found = LEARNING_COMMANDS[command]
    return CommandError(f"usage: {found.name} {found.usage}")


# ------------------------------------------------------------------------------------------------------------- looking


async def _graph(machine: Machine, words: Sequence[str]) -> str:
    if unknown := set(words) - {"-v", "-p"}:
        raise CommandError(f"graph does not know {min(unknown)}; usage: graph {LEARNING_COMMANDS['graph'].usage}")
    nodes = tuple(machine.system.graph.nodes.values())
    return "\n".join(GraphDrawing(nodes, full="-v" in words, permissions="-p" in words).lines())


async def _clock(machine: Machine, words: Sequence[str]) -> str:
    if words:
        raise _wrong("clock")
    seconds, microseconds = machine.clock.wall()
    passed = format_duration(machine.clock.now_ns() - machine.started_ns)
    how = "it moves only with `step` and `run`" if machine.virtual_time else "it moves by itself"
    return f"{machine.clock.kind} time, {how}\n{passed} since the start, {seconds}.{microseconds:06d} on the wall clock"


async def _watch(machine: Machine, words: Sequence[str]) -> str:
    if words not in (["on"], ["off"], []):
        raise _wrong("watch")
    if words:
        machine.watching = words == ["on"]
    return f"events are {'printed as they happen' if machine.watching else 'not printed'}"


# ---------------------------------------------------------------------------------------------------------------- time


async def _step(machine: Machine, words: Sequence[str]) -> str:
    if len(words) != 1:
        raise _wrong("step")
    ns = _duration(words[0])
    if machine.virtual_time is None:
        raise CommandError(
            "step moves virtual time, and this machine runs on real time; start qblock with --clock virtual"
        )
    await machine.virtual_time.advance(ns)
    return _now(machine)


async def _run(machine: Machine, words: Sequence[str]) -> str:
    if len(words) == 1 and words[0] != "until":
        return await _run_for(machine, _duration(words[0]))
    if len(words) < 2 or words[0] != "until":
        raise _wrong("run")
    limit_ns = RUN_LIMIT_NS
    wanted = list(words[1:])
    if len(wanted) > 2 and wanted[-2] == "within":
        limit_ns = _duration(wanted[-1])
        wanted = wanted[:-2]
    if len(wanted) == 1 and wanted[0][0].isdigit():
        return await _run_for(machine, _duration(wanted[0]))
    if len(wanted) > 2:
        raise _wrong("run")
    return await _run_until(machine, wanted[0], wanted[1] if len(wanted) == 2 else None, limit_ns)


async def _run_for(machine: Machine, ns: int) -> str:
    if machine.virtual_time is not None:
        await machine.virtual_time.advance(ns)
    else:
        await machine.clock.sleep_ns(ns)
    return _now(machine)


async def _run_until(machine: Machine, name: str, subject: str | None, limit_ns: int) -> str:
    names = machine.event_names(name)
    if not names:
        raise CommandError(f"no event is called {name}; try READY, COMPLETED, JOB_STATUS_CHANGE or another QMP event")

    def fits(event: MachineEvent) -> bool:
        return event.name in names and (subject is None or event.subject == subject)

    event = machine.events.take(fits)
    if event is None:
        event = await _pass_time_until(machine, fits, limit_ns)
    if event is None:
        return f"{' or '.join(sorted(names))} has not come in {format_duration(limit_ns)}; {_now(machine)}"
    return f"{event.describe()}; {_now(machine)}"


async def _pass_time_until(
    machine: Machine, fits: Callable[[MachineEvent], bool], limit_ns: int
) -> MachineEvent | None:
    """Let time pass until an event fits; None when ``limit_ns`` is over first."""
    coming = asyncio.ensure_future(machine.events.wait(fits))
    try:
        if machine.virtual_time is not None:
            came = await machine.virtual_time.advance_until(coming, limit_ns=limit_ns)
        else:
            limit = asyncio.ensure_future(machine.clock.sleep_ns(limit_ns))
            await asyncio.wait({coming, limit}, return_when=asyncio.FIRST_COMPLETED)
            limit.cancel()
            came = coming.done()
        return coming.result() if came else None
    finally:
        coming.cancel()


def _now(machine: Machine) -> str:
    return f"the time is {format_duration(machine.clock.now_ns() - machine.started_ns)}"


def _duration(text: str) -> int:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise CommandError(str(error)) from None


# --------------------------------------------------------------------------------------------------------------- guest


async def _guest(machine: Machine, words: Sequence[str]) -> str:
    if not words:
        return _guest_list(machine)
    if len(words) < 2 or words[0] not in _GUEST_VERBS:
        raise _wrong("guest")
    verb, device, *rest = words
    return await _unless_stopped(machine, _GUEST_VERBS[verb](machine, device, rest))


async def _unless_stopped(machine: Machine, work: Coroutine[Any, Any, str]) -> str:
    """What ``work`` says; when it stops the machine by an error instead, it waits there, and the person is told so at once."""
    run = machine.system.run
    stopped = asyncio.get_running_loop().create_future()

    def notice(running: bool) -> None:
        if not running and not stopped.done():
            stopped.set_result(None)

    request = asyncio.ensure_future(work)
    run.on_change.append(notice)
    try:
        await asyncio.wait({request, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        run.on_change.remove(notice)
    if request.done():
        return request.result()
    machine.hold(request)
    return f"the machine has stopped ({run.state.value}) before the request was done; it goes on with `cont`"


def _guest_list(machine: Machine) -> str:
    rows = [(name, machine.guest_activity(name)) for name in machine.device_names()]
    return "\n".join(columns(rows, indent="")) or "the machine has no disks; start qblock with -drive, or use drive_add"


async def _guest_start(machine: Machine, device: str, rest: Sequence[str]) -> str:
    if len(rest) > 1:
        raise _wrong("guest")
    rate = _count(rest[0]) if rest else 10
    machine.start_guest(device, writes_per_second=rate)
    return f"the guest writes to {device}, {rate} times a second"


async def _guest_stop(machine: Machine, device: str, rest: Sequence[str]) -> str:
    if rest:
        raise _wrong("guest")
    written = await machine.stop_guest(device)
    return f"the guest has stopped; it has written {format_size(written)} to {device}"


async def _guest_write(machine: Machine, device: str, rest: Sequence[str]) -> str:
    if len(rest) not in (2, 3):
        raise _wrong("guest")
    offset, length = _size(rest[0]), _size(rest[1])
    pattern = _count(rest[2]) if len(rest) == 3 else 0xCD
    await machine.guest_write(device, offset, length, pattern)
    return f"{format_size(length)} written at {offset}, pattern {pattern:#04x}"


async def _guest_read(machine: Machine, device: str, rest: Sequence[str]) -> str:
    if len(rest) not in (2, 3):
        raise _wrong("guest")
    offset, length = _size(rest[0]), _size(rest[1])
    data = await machine.guest_read(device, offset, length)
    if len(rest) == 3:
        pattern = _count(rest[2])
        wrong = next((index for index, byte in enumerate(data) if byte != pattern), None)
        if wrong is not None:
            raise CommandError(f"the byte at {offset + wrong} is {data[wrong]:#04x}, not {pattern:#04x}")
        return f"{format_size(length)} at {offset} are all {pattern:#04x}"
    return hex_dump(data[:_SHOWN], offset) + (f"\n... {length - _SHOWN} bytes more" if length > _SHOWN else "")


async def _guest_flush(machine: Machine, device: str, rest: Sequence[str]) -> str:
    if rest:
        raise _wrong("guest")
    await machine.guest_flush(device)
    return f"{device} is flushed"


async def _guest_lock(machine: Machine, device: str, rest: Sequence[str]) -> str:
    if rest not in ([], ["on"], ["off"]):
        raise _wrong("guest")
    disk = next((disk for disk in machine.system.devices if device in (disk.backend.name, disk.name)), None)
    if disk is None:
        raise DeviceNotFound(device)
    if rest:
        disk.lock_tray(locked=rest == ["on"])
    return f"the tray of {device} is {'' if disk.locked else 'not '}locked"


_SHOWN: Final = 256
_GUEST_VERBS: Final[Mapping[str, Callable[[Machine, str, Sequence[str]], Coroutine[Any, Any, str]]]] = {
    "start": _guest_start,
    "stop": _guest_stop,
    "write": _guest_write,
    "read": _guest_read,
    "flush": _guest_flush,
    "lock": _guest_lock,
}


def hex_dump(data: bytes, offset: int) -> str:
    """Lines of 16 bytes: offset, hexadecimal, printable characters."""
    lines = []
    for start in range(0, len(data), 16):
        part = data[start : start + 16]
        shown = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in part)
        lines.append(f"{offset + start:08x}  {part.hex(' '):<47}  {shown}")
    return "\n".join(lines)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise CommandError(str(error)) from None


def _count(text: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        raise CommandError(f"'{text}' is not a number") from None
    if number < 0:
        raise CommandError(f"'{text}' must not be negative")
    return number


LEARNING_COMMANDS: Final[Mapping[str, LearningCommand]] = {
    command.name: command
    for command in (
        LearningCommand(
            "graph", "[-v] [-p]", "draw the block graph",
            "Users of nodes (devices, jobs, the monitor) stand at the left, what they use below them.\n"
            "-v  draw every node; without it a format and the file under it share a line\n"
            "-p  show what each edge takes: c(onsistent read), w(rite), u(nchanged writes), r(esize)",
            _graph, ("-v", "-p"),
        ),
        LearningCommand(
            "guest", "[start|stop|write|read|flush|lock DEVICE ...]", "play the guest on a disk",
            "guest                                      what the guest does on which disk\n"
            "guest start DEVICE [WRITES_PER_SECOND]     keep writing at random places\n"
            "guest stop DEVICE                          stop that\n"
            "guest write DEVICE OFFSET LENGTH [BYTE]    one write, filled with BYTE (default 0xcd)\n"
            "guest read DEVICE OFFSET LENGTH [BYTE]     one read; with BYTE: check that it is all that\n"
            "guest flush DEVICE                         one flush\n"
            "guest lock DEVICE [on|off]                 hold the medium, or let it go",
            _guest, tuple(_GUEST_VERBS),
        ),
        LearningCommand(
            "clock", "", "tell which clock is in use and what time it is",
            "Real time moves by itself. Virtual time (qblock --clock virtual) stands still while you\n"
            "think, and moves with `step` and `run`.",
            _clock,
        ),
        LearningCommand(
            "step", "DURATION", "let virtual time pass, e.g. step 100ms",
            "Everything that falls due in that time happens, in order; then time stands still again.",
            _step,
        ),
        LearningCommand(
            "run", "DURATION | until EVENT [ID] [within DURATION]", "let time pass until something happens",
            "run 10s                      the same as step 10s; on real time it waits\n"
            "run until READY              until a BLOCK_JOB_READY event comes (any QMP event, or its last word)\n"
            "run until COMPLETED job0     only that of job0\n"
            "run until READY within 1m    give up after a minute (default: an hour)\n"
            "An event that came since the last `run until` counts.",
            _run, ("until",),
        ),
        LearningCommand(
            "watch", "[on|off]", "print events as they happen, or stop that",
            "Without an argument: tell whether they are printed.",
            _watch, ("on", "off"),
        ),
    )
}  # fmt: skip
"""The table of them all, in the order in which help lists them."""
