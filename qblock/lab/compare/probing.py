"""What one may do while a disk is being moved: it is tried, each time in a short run of its own, without a guest.

A question is asked while the data is being copied, and again (where there is such a phase) while the copy is in step. When
it is allowed, the run goes on to its end, to see whether the operation survives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from qblock.errors import QBlockError
from qblock.lab.compare.running import COPYING, IN_STEP, START, Settings, Site, lay_out, running_machine
from qblock.lab.compare.strategies import DEVICE, GaveUp, Management, Strategy, block_copy_line
from qblock.monitor.client import QmpError
from qblock.testing.simloop import run
from qblock.units import SECOND_NS, MiB

if TYPE_CHECKING:
    from qblock.driver import Json

SIZE: Final = 8 * MiB
"""The disk of these runs, in bytes: long enough to be in the middle of copying when we ask."""
_MIDDLE: Final = 0.5
_HUMAN: Final = "human-monitor-command"


@attrs.frozen(kw_only=True)
class Probe:
    """What came of a question. ``text`` is the refusal; ``then`` says what became of the operation when it was allowed."""

    name: str
    phase: str
    command: str
    allowed: bool
    text: str
    then: str


Question = Callable[[Strategy, Path], tuple[str, dict[str, "Json"]]]


def _mirror_again(strategy: Strategy, directory: Path) -> tuple[str, dict[str, Json]]:
    command, arguments = strategy.mirror
    target = str(directory / "target/other.qcow2")
    if command == "block_copy":
        return _HUMAN, {"command-line": block_copy_line(target)}
    return command, {**arguments, "target": target}


QUESTIONS: Final[Mapping[str, Question]] = {
    "live snapshot": lambda _, directory: (
        "blockdev-snapshot-sync",
        {"device": DEVICE, "snapshot-file": str(directory / "target/snap.qcow2"), "format": "qcow2"},
    ),
    "stream": lambda _, __: ("block-stream", {"device": DEVICE}),
    "another mirror": _mirror_again,
    "resize": lambda _, __: ("block_resize", {"device": DEVICE, "size": SIZE + MiB}),
    "drive_del": lambda _, __: (_HUMAN, {"command-line": f"drive_del {DEVICE}"}),
}
"""What is tried, and the command for it."""


def ask_everything(strategy: Strategy, settings: Settings, directory: Path) -> list[Probe]:
    """Ask all questions in all phases; ``directory`` is for the files of the short runs, ``start`` images beside it."""
    small = attrs.evolve(settings, size=SIZE)
    phases = (COPYING, IN_STEP) if strategy.switch is not None else (COPYING,)
    copy_ns = _time_to_copy(strategy, small, directory / "undisturbed")
    probes = []
    for phase in phases:
        for number, (name, question) in enumerate(QUESTIONS.items()):
            place = directory / f"{phase.replace(' ', '-')}-{number}"
            delay = int(copy_ns * _MIDDLE) if phase == COPYING else 0
            command = question(strategy, place)
            probes.append(_ask(_Inquiry(strategy, small, place, name, phase, delay), command))
    return probes


@attrs.frozen
class _Inquiry:
    strategy: Strategy
    settings: Settings
    directory: Path
    name: str
    phase: str
    delay_ns: int


def _time_to_copy(strategy: Strategy, settings: Settings, directory: Path) -> int:
    """How long the copying takes when nobody asks anything."""
    lay_out(directory.parent / START, directory)

    async def main() -> int:
        async with running_machine(settings, directory, strategy.dialect) as site:
            began = site.recorder.clock.now_ns()
            await strategy.start(site.management)
            return site.recorder.clock.now_ns() - began

    return run(main)


def _ask(inquiry: _Inquiry, command: tuple[str, dict[str, Json]]) -> Probe:
    lay_out(inquiry.directory.parent / START, inquiry.directory)

    async def main() -> Probe:
        async with running_machine(inquiry.settings, inquiry.directory, inquiry.strategy.dialect) as site:
            started = asyncio.ensure_future(inquiry.strategy.start(site.management))
            if inquiry.phase == COPYING:
                await site.recorder.clock.sleep_ns(inquiry.delay_ns)
            else:
                await started
            refusal = await _try(site.management, command)
            then = await _go_on(inquiry.strategy, site, started)
            return Probe(
                name=inquiry.name,
                phase=inquiry.phase,
                command=site.management.masked(_as_text(command)),
                allowed=not refusal,
                text=refusal,
                then="" if refusal else then,
            )

    return run(main)


def _as_text(command: tuple[str, dict[str, Json]]) -> str:
    name, arguments = command
    return str(arguments["command-line"]) if name == _HUMAN else f"{name} {arguments}"


async def _try(management: Management, command: tuple[str, dict[str, Json]]) -> str:
    """Execute it; returns the text of the refusal, empty when it was allowed."""
    try:
        output = await management.client.execute(*command)
    except QmpError as error:
        return management.masked(f"{error.error_class}: {error}")
    said = str(output).strip()
    return management.masked(said) if command[0] == _HUMAN and "Error" in said else ""


async def _go_on(strategy: Strategy, site: Site, started: asyncio.Future[None]) -> str:
    """Bring the operation to its end; returns what was in the way, or that nothing was."""
    await asyncio.wait([started], timeout=site.management.patience_ns / SECOND_NS)
    try:
        if not started.done():
            started.cancel()
            return "the operation does not come to its end"
        started.result()
        if strategy.switch is not None:
            await strategy.switch(site.management)
    except (GaveUp, QBlockError) as error:
        return f"the operation fails: {site.management.masked(str(error))}"
    return "the operation ends well"
