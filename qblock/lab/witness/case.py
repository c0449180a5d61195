"""One case: a machine and its management are started, one or both are killed at a step, and whoever is left goes on.

The parent of both is their clock and their fate. Only one of them moves at a time: management stands still at each of its steps
until the machine has come to rest, and the machine stands still at each of its own. So a case takes the same course every time.
"""

from __future__ import annotations

import os
import select
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import attrs

from qblock.lab.witness.disk import BASE, SOURCE
from qblock.lab.witness.durability import COPIES, cut_power
from qblock.lab.witness.machine import machine_process
from qblock.lab.witness.management import management_process
from qblock.lab.witness.plan import MANAGEMENT_JOURNAL, POLL_NS, WITNESS, Plan, Victim
from qblock.lab.witness.processes import Child, Ended, LabError, Message

_OVER: Message = {"ended": True}


def run_case(plan: Plan, directory: Path, *, disk: Path, socket: Path) -> list[str]:
    """Perform ``plan`` in ``directory``, which must be empty, on a copy of the chain in ``disk``; returns the steps that
    were taken before the kill. ``socket``: the path of the QMP socket. Raises `LabError`, and `StepNotTaken`.
    """
    os.link(disk / BASE, directory / BASE)  # nobody writes to it
    shutil.copyfile(disk / SOURCE, directory / SOURCE)
    case = _Case(plan, directory, socket)
    try:
        case.run()
    finally:
        case.end()
    if plan.step is not None and plan.step not in case.steps:
        raise StepNotTaken(f"the step '{plan.step}' was never reached; there are {', '.join(case.steps)}")
    return case.steps


class StepNotTaken(LabError):
    """In this case the step does not come."""


@attrs.define(eq=False)
class _Case:
    plan: Plan
    directory: Path
    socket: Path
    steps: list[str] = attrs.field(factory=list)
    _seen: Counter[str] = attrs.field(factory=Counter)
    _struck: bool = False
    _machine: Child = attrs.field(init=False)
    _management: Child = attrs.field(init=False)
    _children: list[Child] = attrs.field(factory=list)
    _held: Message | None = None
    """What management has reported while the machine was still moving."""
    _moving: bool = False
    """The machine carries out an order."""

    def run(self) -> None:
        """From the start to the end of both."""
        body = partial(machine_process, self.plan, self.directory, self.socket)
        self._machine = self._start("machine", body)
        self._receive(self._machine)  # it is up
        self._start_management()
        self._perform()
        if not self._management_lived():
            self._let_time_pass()
            self._start_management()
            self._perform()
        while self._machine.alive:
            if "step" in self._receive(self._machine):
                self._machine.wire.send(order="go")

    def end(self) -> None:
        """Nothing of the case lives on; logs without a word are removed, and what the start anew after a power cut watched."""
        for child in self._children:
            child.kill()
        for log in self.directory.glob("*.log"):
            if not log.stat().st_size:
                log.unlink()
        shutil.rmtree(self.directory / COPIES, ignore_errors=True)

    def _management_lived(self) -> bool:
        return not self._struck or self.plan.victim is Victim.MACHINE

    # ---------------------------------------------------------------------------------------------------------- processes

    def _start(self, name: str, body: partial[None]) -> Child:
        strangers = [child.wire for child in self._children if child.alive]
        child = Child.fork(body, log=self.directory / f"{name}.log", strangers=strangers)
        self._children.append(child)
        return child

    def _start_management(self) -> None:
        self._held = None
        body = partial(management_process, self.plan, self.directory, self.socket)
        self._management = self._start("management", body)

    def _perform(self) -> None:
        """Let both go on until management has come to its end, or was killed."""
        while self._management.alive:
            who, message = self._next()
            if "step" in message and self._reached(message["step"]):
                self._strike()
            if who.alive:
                who.wire.send(order="go")

    def _reached(self, name: str) -> bool:
        """Take note of a step; True when it is the one for the kill."""
        if self._struck:
            return False
        self._seen[name] += 1
        step = name if self._seen[name] == 1 else f"{name}#{self._seen[name]}"
        self.steps.append(step)
        return step == self.plan.step

    def _strike(self) -> None:
        self._struck = True
        if self.plan.victim is not Victim.MACHINE:
            self._management.kill()  # first: it could still note that the machine is gone, which stands still
        if self.plan.victim is not Victim.MANAGEMENT:
            self._machine.kill()
            self._moving = False
        if self.plan.victim is Victim.HOST:
            cut_power(self.directory, (SOURCE, self.plan.target, WITNESS, MANAGEMENT_JOURNAL))

    # ------------------------------------------------------------------------------------------------------- who is next

    def _next(self) -> tuple[Child, Message]:
        """Who has something to report; the machine is heard first, and management when the machine rests."""
        while self._machine.alive:
            if not self._moving and self._held is None and not self._machine_speaks():
                self._held = self._receive(self._management)
                self._order("settle")
                continue
            message = self._receive(self._machine)
            if "step" in message:
                return self._machine, message
            self._moving = False
            if self._held is not None and "sleep" in self._held:
                self._order("advance", self._held.pop("sleep"))
            elif self._held is not None:
                break
        message = self._held if self._held is not None else self._receive(self._management)
        self._held = None
        return self._management, message

    def _machine_speaks(self) -> bool:
        """Wait until one of them speaks; True when it is the machine, whose message is left where it is."""
        ready, _, _ = select.select([self._machine.wire.sock, self._management.wire.sock], [], [])
        return self._machine.wire.sock in ready

    def _order(self, order: str, ns: int = 0) -> None:
        try:
            self._machine.wire.send(order=order, ns=ns)
            self._moving = True
        except Ended:
            self._machine.wait()

    def _receive(self, child: Child) -> Message:
        """What a child says; when it has ended, that."""
        try:
            return child.wire.receive()
        except Ended:
            child.wait()
            return _OVER

    def _let_time_pass(self) -> None:
        """Nobody manages the machine for a while."""
        if self._machine.alive and not self._moving:
            self._order("settle")
        ordered = False
        while self._machine.alive:
            message = self._receive(self._machine)
            if "step" in message:
                self._machine.wire.send(order="go")
            elif "done" in message and not ordered:
                ordered = True
                self._order("advance", POLL_NS)
            elif "done" in message:
                break
        self._moving = False
