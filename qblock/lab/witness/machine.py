"""The machine of the experiment: a process with a disk, a guest that writes to it, and a QMP socket.

Its time is virtual and passes only as the parent says. It stops at every step of drive-reopen (its trace events) until the
parent lets it go on, or kills it there. The guest is a part of the machine and dies with it; what it has told the world, its
journal, does not.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Final

import attrs

from qblock.clock import Clock, CoSleep, LoopClock
from qblock.guest import GuestDisk
from qblock.lab.witness.disk import GUEST_JOURNAL, SOURCE, GuestKind, flushed_entry, make_write, write_entry
from qblock.lab.witness.durability import watch
from qblock.lab.witness.plan import DEVICE, LONGEST_TICK_NS, TICK_NS, Plan, Victim
from qblock.lab.witness.processes import Message, Wire
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import Machine, MachineOptions, qmp_socket
from qblock.testing.machines import drive_text
from qblock.testing.simloop import SimLoop

BEGIN, OPENED, DONE = "drive_reopen_begin", "drive_reopen_opened", "drive_reopen_done"
ROLLBACK: Final = "drive_reopen_rollback"
TRACED: Final = ("drive_reopen_*", "mirror_one_iteration")
"""The events at which the machine stops; those of the mirror only while drive-reopen waits for it."""
GUEST_GOES_ON: Final = "guest_goes_on"
"""The step at which the guest has, for the first time since the new image was opened, been told that its data is safe."""


@attrs.define(eq=False)
class Writer:
    """The guest: writes, flushes, writes that down, and waits for its next tick, or for a `poke`."""

    disk: GuestDisk
    kind: GuestKind
    journal: Path
    clock: Clock
    random: Random
    number: int = 0
    _stopping: bool = False
    _pause: CoSleep = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._pause = CoSleep(self.clock)

    async def run(self, stop_at: Stops) -> None:
        """Write until `stop`."""
        journal = os.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while not self._stopping:
                self.number += 1
                write = make_write(self.kind, self.number)
                os.write(journal, write_entry(write))
                await self.disk.write_from(write.offset, memoryview(write.content))
                await self.disk.flush()
                os.write(journal, flushed_entry(self.number))
                stop_at.guest_has_flushed()
                await self._pause.sleep_ns(self.random.randrange(TICK_NS, LONGEST_TICK_NS))
        finally:
            os.close(journal)

    def poke(self) -> None:
        """Do not wait for the next tick."""
        self._pause.wake()

    def stop(self) -> None:
        """Write no more after the write that is under way."""
        self._stopping = True
        self.poke()


@attrs.define(eq=False)
class Stops:
    """Where the machine stops: tells the parent of a step, and waits, without a turn of the loop, for its "go"."""

    wire: Wire
    writer: Writer
    orders: deque[Message] = attrs.field(factory=deque)
    """What the parent has said and the machine has not begun to do."""
    ordered: asyncio.Event = attrs.field(factory=asyncio.Event)
    _reopening: bool = False
    _guest_awaited: bool = False

    def traced(self, name: str, members: Mapping[str, object]) -> None:
        """The sink of the trace events."""
        del members
        if name == BEGIN:
            self._reopening = True
        if not self._reopening:
            return
        if name == OPENED:
            self._guest_awaited = True
        if name in (DONE, ROLLBACK):
            self._reopening = False
        self.stop(name)
        self.writer.poke()

    def guest_has_flushed(self) -> None:
        """The guest's journal says so now."""
        if self._guest_awaited:
            self._guest_awaited = False
            self.stop(GUEST_GOES_ON)

    def stop(self, name: str) -> None:
        """Stand still at the step ``name``."""
        self.wire.send(step=name)
        while (message := self.wire.receive())["order"] != "go":
            self._take(message)

    def read_order(self) -> None:
        """The parent has said something while the machine was running; a stop in between may have taken it already."""
        if self.wire.has_news:
            self._take(self.wire.receive())

    def _take(self, order: Message) -> None:
        self.orders.append(order)
        self.ordered.set()


def machine_process(plan: Plan, directory: Path, socket: Path, wire: Wire) -> None:
    """Everything that the machine's process does. Ends when management quits the machine."""
    if plan.victim is Victim.HOST:
        watch(directory)
    with asyncio.Runner(loop_factory=lambda: SimLoop(manual=True)) as runner:
        runner.run(_run(plan, directory, socket, wire))


async def _run(plan: Plan, directory: Path, socket: Path, wire: Wire) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimLoop)
    drive = drive_text(directory / SOURCE, DEVICE, "qcow2")
    options = MachineOptions(drives=(drive,), qmp=(qmp_socket(socket),), seed=plan.seed, dialect=Dialect.RFC_2012)
    machine = await Machine.open(options, clock=LoopClock(), virtual_time=loop)
    writer = Writer(machine.guest(DEVICE).disk, plan.guest, directory / GUEST_JOURNAL, machine.clock, Random(plan.seed))
    stops = Stops(wire, writer)
    for pattern in TRACED:
        machine.system.env.trace.listen(pattern, stops.traced)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(writer.run(stops), name="guest")
        orders = tasks.create_task(_follow_orders(loop, stops), name="orders")
        wire.send(step="machine-up")
        await machine.hub.wait_quit()
        writer.stop()
        orders.cancel()
    await machine.close()


async def _follow_orders(loop: SimLoop, stops: Stops) -> None:
    """Let time pass, or things settle, as the parent says, and tell it when that is done."""
    loop.add_reader(stops.wire.sock, stops.read_order)
    try:
        while True:
            while not stops.orders:
                stops.ordered.clear()
                await stops.ordered.wait()
            order = stops.orders.popleft()
            if order["order"] == "advance":
                await loop.advance(order["ns"])
            else:
                await loop.settle()
            stops.wire.send(done=order["order"])
    finally:
        loop.remove_reader(stops.wire.sock)
