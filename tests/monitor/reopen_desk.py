"""A machine with a drive, an image to go to, and an eye on the steps of drive-reopen; the images are slow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest

from qblock.backend import BlockBackend
from qblock.drivers.file import FileDriver
from qblock.errors import CommandError
from qblock.guest import UNKNOWN, ContentMap, Guest
from qblock.image import open_image
from qblock.monitor.client import QmpError
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import MachineOptions
from qblock.testing.images import make_image
from qblock.testing.machines import LocalMachine
from qblock.units import MiB

SIZE = 8 * MiB
OLD, NEW = b"o" * 4096, b"n" * 4096
MACHINES = (Dialect.SYSTEM, Dialect.RFC_2012)


class SlowFileDriver(FileDriver):
    """A file of which nothing is had at once, so that others get their turn between the steps."""

    async def open(self) -> None:
        await self.env.clock.sleep_ns(1_000_000)
        await super().open()

    async def flush(self) -> None:
        await self.env.clock.sleep_ns(1_000_000)
        await super().flush()

    async def close(self) -> None:
        await self.env.clock.sleep_ns(1_000_000)
        await super().close()


@attrs.define(eq=False)
class Desk:
    """A machine with the drive ``virtio0`` on ``old``, beside which there is ``new``; ``steps`` are the trace events."""

    local: LocalMachine
    path: Path
    steps: list[str] = attrs.field(factory=list)
    guest: Guest = attrs.field(init=False)
    backend: BlockBackend = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        with suppress(CommandError):  # there is none where no device has the drive
            self.guest = self.local.machine.guest("virtio0")
        self.backend = self.local.machine.system.graph.find_backend("virtio0")

    def reopen(self, filename: str | Path = "new", **members: Any) -> Any:
        return self.local.qmp.execute(
            "drive-reopen", device="virtio0", new_image_file=str(self.path / filename), **members
        )

    def name_witness(self, name: str = "w", file: str = "witness") -> None:
        """As management does: open the file, pass it with getfd, close it here."""

        async def pass_on() -> None:
            fd = os.open(self.path / file, os.O_WRONLY | os.O_CREAT)
            await self.local.qmp.client.execute("getfd", fdname=name, fds=[fd])
            os.close(fd)

        self.local.run(pass_on())

    def start_guest(self, writes_per_second: int = 1000) -> None:
        async def start() -> None:
            self.local.machine.start_guest("virtio0", writes_per_second=writes_per_second)

        self.local.run(start())

    def stop_guest(self) -> None:
        self.local.run(self.local.machine.stop_guest("virtio0"))

    def mirror(self, **members: Any) -> None:
        """Start the mirror of the dialect, to ``copy``."""
        how = {"full": True} if self.local.machine.hub.dialect is Dialect.RFC_2012 else {"sync": "full"}
        target = str(self.path / "copy")
        self.local.qmp.execute("drive-mirror", device="virtio0", target=target, format="qcow2", **how, **members)

    def mirror_until_in_sync(self) -> None:
        self.mirror()
        for _ in range(200):
            (job,) = self.local.qmp.execute("query-block-jobs")
            if job["offset"] == job["len"] and job.get("ready", True):
                return
            self.local.advance("10ms")
        raise AssertionError("the mirror did not come into sync")

    def medium(self) -> str | None:
        """The file that the drive has now."""
        root = self.local.machine.system.graph.find_backend("virtio0").root
        if root is None:
            return None
        name = root.node.driver.filename()
        return None if name is None else os.path.relpath(name, self.path)


def prove(content: ContentMap, image: Path) -> int:
    """An image that is closed holds what a guest has written; the result is how many bytes are known."""
    known = 0
    with open_image(image) as disk:
        for run, tag in content.runs():
            if tag != UNKNOWN:
                content.check(run.offset, memoryview(disk.read(run.offset, run.length)), str(image))
                known += run.length
    return known


@contextmanager
def desk(path: Path, dialect: Dialect = Dialect.SYSTEM, drive: str = "format=qcow2") -> Iterator[Desk]:
    if not (path / "old").exists():
        make_image(path / "old", SIZE, {0: OLD})
        make_image(path / "new", SIZE, {0: NEW})
    with LocalMachine(options=MachineOptions(seed=0, dialect=dialect)) as local:
        local.machine.system.registry.register(SlowFileDriver)
        local.run(local.machine.add_drive(f"if=virtio,id=virtio0,file={path}/old,{drive}"))
        result = Desk(local, path)
        local.machine.system.env.trace.listen(
            "drive_reopen_*", lambda name, members: result.steps.append(name.removeprefix("drive_reopen_"))
        )
        yield result


def on_step(table: Desk, step: str, action: Callable[[], object]) -> None:
    table.local.machine.system.env.trace.listen(f"drive_reopen_{step}", lambda name, members: action())


@contextmanager
def no_descriptor_is_left(table: Desk, *, kept: int = 0) -> Iterator[None]:
    """Images may be exchanged meanwhile, so what counts is that nothing but images is open in the end."""

    def held() -> int:
        names = os.listdir("/proc/self/fd")
        links = [os.readlink(f"/proc/self/fd/{n}") for n in names if os.path.exists(f"/proc/self/fd/{n}")]
        return sum(link.endswith(("/witness", "/dev/full")) or link.startswith("pipe:") for link in links)

    before = held()
    yield
    assert held() == before + kept


def error_of(action: Callable[..., Any], *args: Any, **members: Any) -> QmpError:
    with pytest.raises(QmpError) as caught:
        action(*args, **members)
    return caught.value
