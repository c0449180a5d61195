"""Management in the experiment: a process that moves a running disk to another image over QMP, and what it does when it is
started again after a crash.

All that it remembers over a crash is its journal, a text file that it makes durable line by line, and the witness: an empty file
of which it sends the machine a descriptor. `decide` is the rule of the protocol (rfc-2012.md): no byte, nothing has gone to the
new image, start from the old one; the byte, the new image is complete and may hold newer data, start from it.
"""

from __future__ import annotations

import asyncio
import enum
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from qblock.lab.witness.disk import SOURCE
from qblock.lab.witness.durability import watch
from qblock.lab.witness.plan import DEVICE, LONGEST_TICK_NS, MANAGEMENT_JOURNAL, POLL_NS, WITNESS, Part, Plan, Victim
from qblock.lab.witness.processes import LabError, Wire
from qblock.monitor.client import QmpClient, QmpConnectionLost, QmpError

if TYPE_CHECKING:
    from qblock.driver import Json

POLLS: Final = 100
MIRRORING, IN_SYNC, ABOUT = "mirror asked for", "in sync", "about to reopen"
SWITCHED, REFUSED = "switched", "not switched"
RESTARTED: Final = "restarted"
_MACHINE_SAYS: Final = "the machine says: "
_GO_ON: Final = "go on with: "


class Image(enum.Enum):
    """What the guest can go on with."""

    SOURCE = "source"
    TARGET = "target"


class Ground(enum.Enum):
    """What a decision rests on."""

    JOURNAL = "journal"
    """Management has written down enough itself."""
    BYTE = "byte"
    """The witness says it."""
    MACHINE = "machine"
    """It is still there and could be asked."""
    NOTHING = "nothing"
    """It cannot be known."""


@attrs.frozen
class Decision:
    """Which image a guest goes on with (None: it cannot be known), and why."""

    image: Image | None
    ground: Ground


def decide(lines: Sequence[str], witness: bytes | None) -> Decision:
    """Decide from management's journal and the content of the witness (None: there is none)."""
    for line in reversed(lines):
        if line.startswith(_MACHINE_SAYS):
            return Decision(Image(line.removeprefix(_MACHINE_SAYS)), Ground.MACHINE)
    if SWITCHED in lines:
        return Decision(Image.TARGET, Ground.JOURNAL)
    if ABOUT not in lines or REFUSED in lines:
        return Decision(Image.SOURCE, Ground.JOURNAL)
    if witness is None:
        return Decision(None, Ground.NOTHING)
    return Decision(Image.TARGET if witness else Image.SOURCE, Ground.BYTE)


def conclusion(decision: Decision) -> str:
    """How management notes its decision, as the last line of its journal."""
    image = decision.image.value if decision.image is not None else "what?"
    return f"{_GO_ON}{image} ({decision.ground.value})"


def read_witness(directory: Path) -> bytes | None:
    """The content of the witness; None when there is none."""
    path = directory / WITNESS
    return path.read_bytes() if path.exists() else None


@attrs.frozen
class Journal:
    """A text file; each line is durable when `note` returns."""

    path: Path

    def note(self, line: str) -> None:
        """Add a line."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(fd, f"{line}\n".encode())
            os.fsync(fd)
        finally:
            os.close(fd)

    def lines(self) -> list[str]:
        """What was noted so far."""
        return self.path.read_text().splitlines() if self.path.exists() else []


def management_process(plan: Plan, directory: Path, socket: Path, wire: Wire) -> None:
    """Everything that management's process does, from its start or its start anew."""
    if plan.victim is Victim.HOST:
        watch(directory)
    management = Management(plan, directory, socket, wire, Journal(directory / MANAGEMENT_JOURNAL))
    asyncio.run(management.run())


@attrs.frozen
class Management:
    """One life of management."""

    plan: Plan
    directory: Path
    socket: Path
    wire: Wire
    journal: Journal

    async def run(self) -> None:
        """Move the disk; or, when there is a journal already, see what became of it."""
        first_life = not self.journal.lines()
        if first_life:
            self.journal.note("started")
        else:
            self.journal.note(RESTARTED)
        try:
            async with await QmpClient.connect(str(self.socket)) as qmp:
                if first_life:
                    await self._move(qmp)
                await self._ask(qmp)
                self._sleep(POLL_NS)
                await qmp.execute("quit")
        except (QmpConnectionLost, OSError):
            if ABOUT in self.journal.lines():
                self.journal.note("the machine is gone")
        decision = decide(self.journal.lines(), read_witness(self.directory))
        self.journal.note(conclusion(decision))

    # -------------------------------------------------------------------------------------------------------- protocol

    async def _move(self, qmp: QmpClient) -> None:
        target = str(self.directory / self.plan.target)
        self._step("before-mirror")
        self.journal.note(MIRRORING)
        await qmp.execute("drive-mirror", device=DEVICE, target=target, format=self.plan.format, full=True)
        self._step("mirror-started")
        await self._until_in_sync(qmp)
        self.journal.note(IN_SYNC)
        self._step("in-sync-noted")
        arguments: dict[str, Json] = {"device": DEVICE, "new-image-file": target, "format": self.plan.format}
        if self.plan.part is not Part.WITHOUT:
            await self._send_witness(qmp)
            self._step("witness-sent")
            arguments["witness"] = WITNESS
        self._sleep(POLL_NS + self.plan.delay * LONGEST_TICK_NS)
        self.journal.note(ABOUT)
        self._step("intent-noted")
        outcome = await self._reopen(qmp, arguments)
        self._step("reply-received")
        self.journal.note(outcome)
        self._step("outcome-noted")
        self._sleep(POLL_NS)
        self._step("later")

    async def _reopen(self, qmp: QmpClient, arguments: Mapping[str, Json]) -> str:
        """What is to be noted about it."""
        try:
            await qmp.execute("drive-reopen", arguments)
        except QmpError:
            if self.plan.part is not Part.REFUSED:
                raise
            return REFUSED
        return SWITCHED

    async def _until_in_sync(self, qmp: QmpClient) -> None:
        for _ in range(POLLS):
            self._sleep(POLL_NS)
            jobs: Sequence[Mapping[str, Json]] = await qmp.execute("query-block-jobs")
            if jobs and jobs[0]["offset"] == jobs[0]["len"]:
                return
        raise LabError("the mirror does not come to its end")

    async def _send_witness(self, qmp: QmpClient) -> None:
        """The witness is there, empty and durable, before anybody relies on it."""
        path = self.directory / WITNESS
        path.touch(exist_ok=False)
        fd = os.open(path, os.O_RDONLY if self.plan.part is Part.REFUSED else os.O_WRONLY)
        try:
            os.fsync(fd)
            directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(directory)
            os.close(directory)
            await qmp.execute("getfd", fdname=WITNESS, fds=[fd])
        finally:
            os.close(fd)

    async def _ask(self, qmp: QmpClient) -> None:
        """The machine knows best, as long as it is there."""
        disks: Sequence[Mapping[str, Json]] = await qmp.execute("query-block")
        inserted = next(disk["inserted"] for disk in disks if disk["device"] == DEVICE)
        image = Image.SOURCE if Path(inserted["file"]).name == SOURCE else Image.TARGET
        self.journal.note(f"{_MACHINE_SAYS}{image.value}")

    # ----------------------------------------------------------------------------------------------------------- the lab

    def _step(self, name: str) -> None:
        """Stand still until the parent lets us go on, or kills us."""
        self.wire.send(step=name)
        self.wire.receive()

    def _sleep(self, ns: int) -> None:
        """Let virtual time pass."""
        self.wire.send(sleep=ns)
        self.wire.receive()
