"""The ways of moving a disk, as management drives them: through a monitor, by the commands of their time.

A strategy is data: the dialect it is spoken in, what starts it and waits until the copy is in step, and what then switches the
guest over (None: it does so by itself).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from qblock.errors import QBlockError
from qblock.lab.compare.history import Recorder, Told
from qblock.monitor.client import QmpClient, QmpError, QmpEvent
from qblock.monitor.dialects import Dialect
from qblock.units import MILLISECOND_NS, SECOND_NS, format_duration

if TYPE_CHECKING:
    from qblock.driver import Json

DEVICE: Final = "virtio0"
TARGET_NAME: Final = "target/copy.qcow2"
WITNESS_NAME: Final = "witness"
POLL_NS: Final = 20 * MILLISECOND_NS


class GaveUp(QBlockError):
    """Management has lost patience, or the operation has failed; the text says which."""


@attrs.define(eq=False)
class Management:
    """Whoever runs the machine: sends commands, sees replies and events, and writes all of it down.

    It waits at most ``patience_ns`` for the copy to be in step. Texts are recorded without the name of the directory.
    """

    client: QmpClient
    recorder: Recorder
    directory: Path
    patience_ns: int

    @property
    def target(self) -> str:
        """The file name of the copy."""
        return str(self.directory / TARGET_NAME)

    def masked(self, text: str) -> str:
        """``text`` without the directory, whose name differs from run to run."""
        return text.replace(f"{self.directory}/", "").replace(str(self.directory), ".")

    def note(self, direction: str, text: str) -> None:
        """Write down something that was said."""
        self.recorder.add(Told(self.recorder.clock.now_ns(), direction, self.masked(text)))

    async def execute(self, command: str, arguments: dict[str, Json] | None = None, *, quiet: bool = False) -> Json:
        """A QMP command; raises `QmpError`. ``quiet``: a poll, which is not worth a record."""
        return await self._said(command, f"{command} {arguments or ''}".strip(), arguments or {}, quiet=quiet)

    async def hmp(self, line: str) -> str:
        """An HMP command; raises `GaveUp` when it prints an error."""
        output = str(await self._said("human-monitor-command", line, {"command-line": line}, quiet=False))
        if output.startswith("Error:"):
            raise GaveUp(self.masked(output.strip()))
        return output

    async def _said(self, command: str, text: str, arguments: dict[str, Json], *, quiet: bool) -> Json:
        if not quiet:
            self.note("sent", text)
        try:
            result = await self.client.execute(command, arguments)
        except QmpError as error:
            self.note("error", f"{error.error_class}: {error}")
            raise
        if not quiet:
            self.note("reply", str(result).strip())
        return result

    async def event(self, *names: str) -> QmpEvent:
        """Wait for one of these events; raises `GaveUp` when it does not come, or tells of an error."""
        try:
            async with asyncio.timeout(self.patience_ns / SECOND_NS):
                event = await self.client.wait_event(*names)
        except TimeoutError:
            raise GaveUp(f"{' or '.join(names)} did not come within {format_duration(self.patience_ns)}") from None
        self.note("event", event.name)
        if "error" in event.data or event.name == "BLOCK_JOB_CANCELLED":
            raise GaveUp(" ".join([event.name, *filter(None, [event.data.get("error")])]))
        return event

    async def offset_is_len(self) -> None:
        """Ask again and again until the job's ``offset`` is its ``len``: what ready was before there was an event for it."""
        deadline = self.recorder.clock.now_ns() + self.patience_ns
        while self.recorder.clock.now_ns() < deadline:
            jobs = await self.execute("query-block-jobs", quiet=True)
            if not jobs:
                raise GaveUp("the job has ended")
            if jobs[0]["offset"] == jobs[0]["len"] > 0:
                self.note("reply", f"offset == len == {jobs[0]['len']}")
                return
            await self.recorder.clock.sleep_ns(POLL_NS)
        raise GaveUp(f"offset was not len within {format_duration(self.patience_ns)}")

    async def hand_over_witness(self) -> str:
        """Pass a descriptor of the witness file by ``getfd``; returns its name."""
        path = self.directory / WITNESS_NAME
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            await self.client.execute("getfd", {"fdname": WITNESS_NAME}, fds=[fd])
        finally:
            os.close(fd)
        self.recorder.witness = path
        return WITNESS_NAME


Step = Callable[[Management], Awaitable[None]]


@attrs.frozen(kw_only=True)
class Strategy:
    """See the module. ``mirror`` is the command by which this dialect starts one more mirror, for the question whether it may."""

    name: str
    title: str
    dialect: Dialect
    start: Step
    switch: Step | None
    mirror: tuple[str, dict[str, Json]]


# ------------------------------------------------------------------------------------------------------------- how they go


async def _start_2012(management: Management) -> None:
    await management.execute(
        "drive-mirror", {"device": DEVICE, "target": management.target, "format": "qcow2", "full": True}
    )
    await management.offset_is_len()


async def _reopen_with_witness(management: Management) -> None:
    witness = await management.hand_over_witness()
    await management.execute(
        "drive-reopen",
        {"device": DEVICE, "new-image-file": management.target, "format": "qcow2", "witness": witness},
    )


async def _start_blkmirror(management: Management) -> None:
    await management.execute(
        "drive-mirror",
        {"device": DEVICE, "target": management.target, "format": "qcow2", "mode": "no-backing-file"},
    )
    await management.execute("block-stream", {"device": DEVICE})
    await management.event("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


async def _reopen(management: Management) -> None:
    await management.execute(
        "drive-reopen", {"device": DEVICE, "new-image-file": management.target, "format": "qcow2"}
    )


def block_copy_line(filename: str) -> str:
    """The HMP command of 2011 that copies the disk to a file."""
    escaped = filename.replace("\\", "\\\\").replace('"', '\\"')
    return f'block_copy {DEVICE} "{escaped}"'


async def _block_copy(management: Management) -> None:
    await management.hmp(block_copy_line(management.target))
    await management.event("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


def _start_mirror(**more: Json) -> Step:
    async def start(management: Management) -> None:
        await management.execute(
            "drive-mirror",
            {"device": DEVICE, "target": management.target, "format": "qcow2", "sync": "full", **more},
        )
        await management.event("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")

    return start


async def _complete(management: Management) -> None:
    await management.execute("block-job-complete", {"device": DEVICE})
    await management.event("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


_MIRROR: Final = ("drive-mirror", {"device": DEVICE, "format": "qcow2", "sync": "full"})
STRATEGIES: Final = (
    Strategy(
        name="rfc-2012", title="mirror job of April 2012, drive-reopen with witness", dialect=Dialect.RFC_2012,
        start=_start_2012, switch=_reopen_with_witness,
        mirror=("drive-mirror", {"device": DEVICE, "format": "qcow2", "full": True}),
    ),
    Strategy(
        name="blkmirror", title="blkmirror of March 2012 and a stream through it, drive-reopen",
        dialect=Dialect.BLKMIRROR_2012, start=_start_blkmirror, switch=_reopen,
        mirror=("drive-mirror", {"device": DEVICE, "format": "qcow2", "mode": "no-backing-file"}),
    ),
    Strategy(
        name="block-copy", title="live block copy of June 2011", dialect=Dialect.BLOCK_COPY_2011,
        start=_block_copy, switch=None, mirror=("block_copy", {"device": DEVICE}),
    ),
    Strategy(
        name="mirror", title="mirror of 7.2, block-job-complete", dialect=Dialect.SYSTEM,
        start=_start_mirror(), switch=_complete, mirror=_MIRROR,
    ),
    Strategy(
        name="write-blocking", title="the same with copy-mode write-blocking", dialect=Dialect.SYSTEM,
        start=_start_mirror(**{"copy-mode": "write-blocking"}), switch=_complete, mirror=_MIRROR,
    ),
    Strategy(
        name="semi-sync", title="the same with flushes that wait for the target (never merged)", dialect=Dialect.SYSTEM,
        start=_start_mirror(**{"copy-mode": "semi-sync"}), switch=_complete, mirror=_MIRROR,
    ),
)  # fmt: skip
