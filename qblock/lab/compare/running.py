"""Carrying out one strategy: a machine on virtual time, its disks modelled, a guest at work, and everything recorded.

What is left in the directory of a run: the images as they were at the beginning (in ``start`` of the whole comparison), the
history, and the images as they are at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import attrs

from qblock.clock import LoopClock
from qblock.lab.compare.disks import DISKS, Disk, DiskModel
from qblock.lab.compare.history import Entered, Recorder
from qblock.lab.compare.load import BLOCK, LabGuest, Pace, initial_tags, marked, requests_of
from qblock.lab.compare.storage import SOURCE, TARGET, Storage, modelled_file
from qblock.lab.compare.strategies import DEVICE, GaveUp, Management, Strategy
from qblock.monitor.client import QmpClient, QmpError
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import Machine, MachineOptions
from qblock.testing.images import make_chain
from qblock.testing.machines import drive_text
from qblock.testing.simloop import run
from qblock.units import SECOND_NS

START: Final = "start"
LAYERS: Final = ("base.qcow2", "top.qcow2")
CONTROL: Final = "control"
"""The run in which nothing is moved: what the guest costs by itself."""
BEFORE, COPYING, IN_STEP, SWITCHING, AFTER, GAVE_UP = "before", "copying", "in step", "switching", "after", "gave up"
PATIENT_PHASES, PATIENT_PASSES = 4, 8
"""Management waits for a copy to be in step as long as so many phases last, and moving the whole disk so many times takes."""


@attrs.frozen(kw_only=True)
class Settings:
    """What a comparison is made with; ``size`` in bytes. The same settings give the same histories.

    A ``steady`` guest makes no pauses in its writing.
    """

    seed: int
    disk: str
    size: int
    steady: bool = False

    @property
    def model(self) -> DiskModel:
        """The disks."""
        return DISKS[self.disk]

    @property
    def pace(self) -> Pace:
        """How much the guest does."""
        pace = self.model.pace
        return pace.steady() if self.steady else pace

    @property
    def patience_ns(self) -> int:
        """How long management waits for a copy to be in step."""
        return PATIENT_PHASES * self.pace.phase_ns + PATIENT_PASSES * self.size * SECOND_NS // self.model.bandwidth


def make_start(settings: Settings, directory: Path) -> None:
    """Make the two images that every strategy begins with."""
    start = directory / START
    start.mkdir(parents=True)
    layers = []
    for name, tags in zip(LAYERS, initial_tags(settings.seed, settings.size), strict=True):
        layers.append((name, {block * BLOCK: marked(tag, block) for block, tag in sorted(tags.items())}))
    make_chain(start, settings.size, layers)


def lay_out(start: Path, directory: Path) -> None:
    """Put the images of the beginning into the directory of a run, each disk in a directory of its own."""
    (directory / TARGET).mkdir(parents=True)
    (directory / SOURCE).mkdir()
    for name in LAYERS:
        shutil.copyfile(start / name, directory / SOURCE / name)


@attrs.define(eq=False)
class Site:
    """A machine with modelled disks, its monitor and its recorder."""

    machine: Machine
    management: Management
    recorder: Recorder


@contextlib.asynccontextmanager
async def running_machine(settings: Settings, directory: Path, dialect: Dialect) -> AsyncIterator[Site]:
    """A machine whose disk is ``source/top.qcow2`` in ``directory``."""
    clock = LoopClock()
    recorder = Recorder(directory, clock)
    machine = await Machine.open(MachineOptions(seed=settings.seed, dialect=dialect), clock=clock)
    try:
        disks = {name: Disk(settings.model, clock) for name in (SOURCE, TARGET)}
        machine.system.registry.register(modelled_file(Storage(directory, disks, recorder)))
        await machine.add_drive(drive_text(directory / SOURCE / LAYERS[-1], DEVICE, "qcow2"))
        async with await QmpClient.in_process(machine.hub) as client:
            yield Site(machine, Management(client, recorder, directory, settings.patience_ns), recorder)
    finally:
        await machine.close()
        recorder.close()


def perform(strategy: Strategy | None, settings: Settings, directory: Path, *, until_ns: int = 0) -> int:
    """Carry out a strategy (None: the control, which ends at ``until_ns``); returns when it ended, in virtual nanoseconds."""
    lay_out(directory.parent / START, directory)

    async def main() -> int:
        dialect = strategy.dialect if strategy is not None else Dialect.SYSTEM
        async with running_machine(settings, directory, dialect) as site:
            base, top = initial_tags(settings.seed, settings.size)
            graph, clock = site.machine.system.graph, site.recorder.clock
            guest = LabGuest(graph, DEVICE, clock, site.recorder, tags=base | top)
            async with asyncio.TaskGroup() as group:
                group.create_task(guest.run(requests_of(settings.seed, settings.size, settings.pace)), name="guest")
                if strategy is None:
                    site.recorder.add(Entered(clock.now_ns(), BEFORE))
                    await clock.sleep_ns(until_ns - clock.now_ns())
                else:
                    await _go_through(strategy, settings, site)
                guest.stop()
            return clock.now_ns()

    return run(main)


async def _go_through(strategy: Strategy, settings: Settings, site: Site) -> None:
    clock, management = site.recorder.clock, site.management

    def enter(phase: str) -> None:
        site.recorder.add(Entered(clock.now_ns(), phase))

    pause_ns = settings.pace.phase_ns
    enter(BEFORE)
    await clock.sleep_ns(pause_ns)
    enter(COPYING)
    try:
        await strategy.start(management)
        if strategy.switch is not None:
            enter(IN_STEP)
            await clock.sleep_ns(pause_ns)
            enter(SWITCHING)
            await strategy.switch(management)
        enter(AFTER)
    except (GaveUp, QmpError) as error:
        management.note("gave up", str(error))
        enter(GAVE_UP)
    await clock.sleep_ns(pause_ns)
