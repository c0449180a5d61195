"""drive-reopen loses no guest write, whatever the interleaving: mirrors in sync or not, images that cannot be opened, retries."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest

from qblock.drivers.file import FileDriver
from qblock.guest import Workload
from qblock.monitor.client import QmpError
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import Machine, MachineOptions
from qblock.testing.images import make_image
from qblock.testing.machines import LocalMachine, drive_text
from qblock.testing.schedules import Seeded
from qblock.units import KiB, MiB

SEEDS = range(12)
SIZE = 2 * MiB
OUTSIDE = frozenset({"closed", "opened", "witness_written", "witness_synced", "rollback"})
"""Steps at which the guest's requests must be standing still since the one before."""


class RestlessFileDriver(FileDriver):
    """A file whose answers take their time, each another one."""

    random: ClassVar[Random]

    async def _dawdle(self) -> None:
        if delay := self.random.choice((0, 0, 100_000, 900_000)):
            await self.env.clock.sleep_ns(delay)
        else:
            await asyncio.sleep(0)

    async def open(self) -> None:
        await self._dawdle()
        await super().open()

    async def flush(self) -> None:
        await self._dawdle()
        await super().flush()

    async def close(self) -> None:
        await self._dawdle()
        await super().close()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._dawdle()
        await super().read_into(offset, buffer)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        await self._dawdle()
        await super().write_from(offset, buffer, fua=fua)


def watch_the_guest(machine: Machine, steps: list[str]) -> None:
    """Note the steps; between the closing and the end the guest gets no answer."""
    counters = machine.guest("virtio0").counters
    last: list[tuple[int, ...]] = []

    def listen(name: str, members: Any) -> None:
        step = name.removeprefix("drive_reopen_")
        now = (counters.writes, counters.zero_writes, counters.discards, counters.reads, counters.flushes)
        if step in OUTSIDE - {"closed"} or (step == "done" and steps[-1] != "begin"):
            assert last == [now], f"the guest was answered between {steps[-1]} and {step}"
        last[:] = [now]
        steps.append(step)

    machine.system.env.trace.listen("drive_reopen_*", listen)


async def attempt(local: LocalMachine, path: Path, random: Random, number: int) -> tuple[str, str]:
    """One try of management: what came of it, and the name of the target."""
    machine, client = local.machine, local.qmp.client
    target = f"copy{number}"
    how: dict[str, Any] = {"full": True} if machine.hub.dialect is Dialect.RFC_2012 else {"sync": "full"}
    await client.execute("drive-mirror", device="virtio0", target=f"{path}/{target}", format="qcow2", **how)
    await asyncio.sleep(random.choice((0.001, 0.3, 0.6, 0.6)))
    filename = random.choice((target, target, "nosuch"))
    fd = os.open(path / f"witness{number}", os.O_WRONLY | os.O_CREAT)
    await client.execute("getfd", fdname="w", fds=[fd])
    os.close(fd)
    try:
        await client.execute("drive-reopen", device="virtio0", new_image_file=f"{path}/{filename}", witness="w")
    except QmpError as refusal:
        return refusal.error_class, target
    return "moved", target


@pytest.mark.parametrize("dialect", [Dialect.SYSTEM, Dialect.RFC_2012])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_acknowledged_write_is_in_the_image_that_the_drive_has(
    seed: int, dialect: Dialect, tmp_path: Path
) -> None:
    """And the byte is there exactly if the drive has moved."""
    random = Random(seed)
    RestlessFileDriver.random = Random(seed + 1)
    make_image(tmp_path / "old", SIZE, {0: b"o" * 64 * KiB})
    with LocalMachine(Seeded(seed), MachineOptions(seed=seed, dialect=dialect)) as local:
        machine = local.machine
        machine.system.registry.register(RestlessFileDriver)
        local.run(machine.add_drive(drive_text(tmp_path / "old", "virtio0", "qcow2")))
        guest, steps = machine.guest("virtio0"), list[str]()
        watch_the_guest(machine, steps)
        outcomes: list[str] = []

        async def main() -> None:
            guest.start(Workload(interval_ns=random.choice((500_000, 2_000_000)), depth=random.choice((1, 4))))
            current = "old"
            for number in range(3):
                await asyncio.sleep(0.02)
                outcome, target = await attempt(local, tmp_path, random, number)
                outcomes.append(outcome)
                assert ("closed" in steps) is (outcome != "DeviceInUse")
                steps.clear()
                current = target if outcome == "moved" else current
                assert guest.disk.backend.node.driver.filename() == str(tmp_path / current)
                assert (tmp_path / f"witness{number}").stat().st_size == (outcome == "moved")
            await asyncio.sleep(0.02)
            await guest.stop()
            assert guest.counters.failed == 0
            assert await guest.verify(guest.disk.read_into)

        local.run(main())
        assert set(outcomes) <= {"moved", "DeviceInUse", "OpenFileFailed"}
        assert not any(os.readlink(f"/proc/self/fd/{fd}").startswith(f"{tmp_path}/witness") for fd in descriptors())


def descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
