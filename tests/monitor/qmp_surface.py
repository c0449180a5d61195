"""Clients who say anything: commands made from the schema, most of them sensible, some with a mistake, to machines with a chain
of images, other nodes, devices with a guest, and faults.

Every command is answered, with an error of a known class or with what the schema says; events are in the schema too, and jobs
change their status as they may. When everything has been removed again, nothing is left: no node, permission, job, object, task
or descriptor. Both dialects of today are told everything they know.

As a program it looks for trouble as long as it is told to::

    python tests/monitor/qmp_surface.py --seed 0 --count 1000

A life is found again by its number: ``--seed N --count 1``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import io
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from qblock.errors import QBlockError
from qblock.jobs.state import TRANSITIONS, JobStatus
from qblock.monitor.client import QmpClient, QmpConnectionLost, QmpError
from qblock.monitor.dialects import Dialect
from qblock.monitor.machine import Machine, MachineOptions
from qblock.testing.graphs import assert_consistent
from qblock.testing.images import make_chain, make_image
from qblock.testing.machines import LocalMachine, drive_text
from qblock.testing.schedules import Fifo, Seeded
from qblock.testing.simloop import describe_wait
from qblock.units import KiB
from qmp_things import EVENTS, SIZE, Things
from qmp_words import Json, Schema, Words, spoilt

T = TypeVar("T")
PATIENCE_S = 600
"""Virtual seconds in which every command is answered."""
CLASSES = {"GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap"}
PROPOSED_CLASSES = {"drive-reopen": {"DeviceInUse", "FdNotFound", "OpenFileFailed", "IOError"}}
"""What a command that was never merged answers besides."""
RARE = {"quit": 0.02, "qmp_capabilities": 0.1, "query-qmp-schema": 0.05, "trace-event-set-state": 0.2, "system_reset": 0.3}
"""How often commands come; others come once, or as `OFTEN` says."""
OFTEN = {
    "blockdev-add": 12, "blockdev-mirror": 5, "block-commit": 6, "block-stream": 6, "blockdev-backup": 5, "transaction": 6,
    "blockdev-snapshot": 4, "blockdev-reopen": 4, "blockdev-create": 2, "x-blockdev-amend": 2, "human-monitor-command": 6,
    "blockdev-del": 2, "job-cancel": 2, "job-complete": 3, "job-finalize": 2, "job-dismiss": 2, "blockdev-snapshot-sync": 2,
    "block-dirty-bitmap-add": 3, "drive-mirror": 2, "drive-backup": 2, "x-blockdev-change": 3, "device_add": 3, "object-add": 2,
    "blockdev-open-tray": 2, "blockdev-remove-medium": 2, "blockdev-insert-medium": 3, "block-job-pause": 2,
}  # fmt: skip


def _templates() -> Path:
    """A folder with the images that every life begins with; it is made once, and goes with the process."""
    return Path(_made().name)


@functools.cache
def _made() -> tempfile.TemporaryDirectory[str]:
    made = tempfile.TemporaryDirectory(prefix="qblock-surface-")
    folder, data = Path(made.name), Random(0).randbytes(64 * KiB)
    make_chain(folder, SIZE, [("base", {0: data}), ("mid", {32 * KiB: data}), ("top", {64 * KiB: data[:4096]})])
    for name, size in (("disk", SIZE), ("spare0", SIZE), ("spare1", SIZE), ("small", SIZE // 2)):
        make_image(folder / name, size, cluster_size=4096)
    (folder / "raw").write_bytes(bytes(SIZE))
    return made


class Life:
    """One machine from its start to its end, and what was said to it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = Random(seed), folder
        self.dialect = Dialect.STORAGE_DAEMON if seed % 3 == 2 else Dialect.SYSTEM
        self.trail: list[str] = []
        self.accepted: dict[str, int] = {}
        self.complaints: list[str] = []
        self.statuses: dict[str, JobStatus] = {}
        self.beside: list[asyncio.Task[Any]] = []
        self.guest_works = True
        self.machine: Machine
        self.client: QmpClient
        self.things: Things
        self.schema: Schema
        self.words: Words

    # ------------------------------------------------------------------------------------------------------------ telling

    async def within(self, work: Coroutine[Any, Any, T], what: str) -> T:
        """Its result, which must come."""
        task = asyncio.ensure_future(work)
        await asyncio.wait([task], timeout=PATIENCE_S)
        if task.done():
            return task.result()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        waits = (f"{one.get_name()}: {describe_wait(one.get_coro())}" for one in others)
        raise AssertionError("\n  ".join([f"{what} never ends", *waits]))

    async def tell(self, command: str, arguments: Mapping[str, Json], client: QmpClient | None = None) -> bool:
        """Execute a command; was it accepted? Fails unless it is answered as it should."""
        text = f"{command} {dict(arguments)}"
        self.trail.append(text)
        refusal: QmpError | None = None
        with self.descriptor(command) as fds:
            try:
                reply = await self.within((client or self.client).execute(command, arguments, fds=fds), text)
            except QmpError as error:
                refusal = error
            except QmpConnectionLost:
                assert self.machine.hub.quitting, text
                return False
        if refusal is not None:
            self.trail.append(f"    {refusal.error_class}: {refusal}")
            assert refusal.error_class in CLASSES | PROPOSED_CLASSES.get(command, set()), refusal
            assert "bug in qblock" not in str(refusal), self.complaints
            return False
        self.schema.check(reply, self.schema.commands[command]["ret-type"], f"the reply to {command}")
        self.accepted[command] = self.accepted.get(command, 0) + 1
        return True

    @contextlib.contextmanager
    def descriptor(self, command: str) -> Iterator[list[int]]:
        """What goes along with a command."""
        if command not in ("getfd", "add-fd") or self.random.random() < 0.3:
            yield []
            return
        fd = os.open("/dev/null", os.O_RDWR)
        try:
            yield [fd]
        finally:
            os.close(fd)

    def heard(self, name: str, data: Mapping[str, Json], when: tuple[int, int]) -> None:
        """Events are what the schema says, and jobs follow the table."""
        del when
        self.trail.append(f"    {name} {dict(data)}")
        try:
            assert name in self.schema.events, name
            self.schema.check(dict(data), self.schema.events[name]["arg-type"], name)
            if name == "JOB_STATUS_CHANGE":
                before, status = self.statuses.get(data["id"], JobStatus.UNDEFINED), JobStatus(data["status"])
                assert status in TRANSITIONS[before], f"{data['id']}: {before} -> {status}"
                self.statuses[data["id"]] = JobStatus.UNDEFINED if status is JobStatus.NULL else status
        except AssertionError as error:
            self.complaints.append(f"event {name}: {error}")

    # ------------------------------------------------------------------------------------------------------------- living

    async def run(self, machine: Machine) -> None:
        """All of it."""
        self.machine = machine
        machine.hub.report, machine.hub.output = self.complaints.append, lambda text: None
        self.client = await QmpClient.in_process(machine.hub)
        self.schema = Schema(await self.client.execute("query-qmp-schema"))
        self.things = Things(machine, self.folder, self.random)
        self.words = Words(self.schema, self.random, self.things)
        machine.hub.subscribe(self.heard)
        await self.furnish()
        guest = asyncio.ensure_future(self.guest())
        for _ in range(self.random.choice((20, 40, 80))):
            await self.step()
            self.look()
            if machine.hub.quitting:
                break
        self.guest_works = False
        if not machine.hub.quitting:
            await self.come_to_rest(guest)
        if not machine.hub.quitting:
            await self.remove_everything()
        await self.within(asyncio.wait([guest, *self.beside]), "what goes on beside")
        for task in (guest, *self.beside):
            task.result()
        await self.client.close()
        assert not self.complaints, self.complaints

    async def furnish(self) -> None:
        """Something to begin with, all of which must work."""
        path, fault = self.folder / "disk", []
        if self.random.random() < 0.4:
            once = self.random.random() < 0.5
            fault = [{"event": self.random.choice(EVENTS), "errno": self.random.choice((5, 28)), "once": once}]
        top = {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": str(self.folder / "top")}}
        storage = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)}, "inject-error": fault}
        nodes: list[dict[str, Json]] = [
            {"driver": "memory", "node-name": "memory", "size": SIZE},
            {"driver": "quorum", "node-name": "votes", "vote-threshold": 1, "children": [{"driver": "memory", "size": SIZE}] * 2},
            {"driver": "raw", "node-name": "raw", "file": {"driver": "file", "filename": str(self.folder / "raw")}},
            {"driver": "qcow2", "node-name": "faulty", "file": storage, "discard": "unmap"},
            {"driver": "qcow2", "node-name": "spare", "file": {"driver": "file", "filename": str(self.folder / "spare0")}},
        ]
        if self.dialect is Dialect.SYSTEM:
            await self.machine.add_drive(drive_text(self.folder / "top", "disk", "qcow2"))
            await self.sure("device_add", {"driver": "virtio-scsi-pci", "id": "scsi0"})
            await self.sure("device_add", {"driver": "scsi-cd", "id": "cd", "bus": "scsi0.0"})
        else:
            nodes.append(top)
        for node in nodes:
            await self.sure("blockdev-add", node)
        await self.sure("object-add", {"qom-type": "throttle-group", "id": "group", "limits": {"iops-total": 1000}})
        if self.dialect is Dialect.SYSTEM:
            policy = self.random.choice(({}, {"werror": "stop", "rerror": "stop"}))
            await self.sure("device_add", {"driver": "virtio-blk-pci", "id": "second", "drive": "faulty", **policy})

    async def sure(self, command: str, arguments: Mapping[str, Json]) -> None:
        assert await self.tell(command, arguments), self.trail[-1]

    def sentence(self) -> tuple[str, dict[str, Json]]:
        """A command with its arguments."""
        names = list(self.schema.commands)
        [command] = self.random.choices(names, [RARE.get(name, OFTEN.get(name, 1)) for name in names])
        arguments = self.words.arguments(command)
        if self.random.random() < 0.85:
            self.things.fit(command, arguments)
        return command, spoilt(arguments, self.random) if self.random.random() < 0.06 else arguments

    async def step(self) -> None:
        """A command, or some from several clients at once, or one whose client does not wait for the answer."""
        chance = self.random.random()
        if chance < 0.15:
            await asyncio.sleep(self.random.choice((0, 0.001, 0.05, 1, 10)))
        elif chance < 0.25:
            clients = [await QmpClient.in_process(self.machine.hub) for _ in range(self.random.choice((2, 3)))]
            sentences = [(*self.sentence(), client) for client in clients]
            await asyncio.gather(*(self.tell(*one) for one in sentences))
            await asyncio.gather(*(client.close() for client in clients))
        elif chance < 0.3:
            await self.leave()
        else:
            await self.tell(*self.sentence())

    async def leave(self) -> None:
        """The client goes away in the middle of a command."""
        client = await QmpClient.in_process(self.machine.hub)
        command, arguments = self.sentence()
        self.trail.append(f"a client leaves with {command} {arguments}")
        request = asyncio.ensure_future(client.execute(command, arguments))
        for _ in range(self.random.choice((0, 1, 2, 5, 20))):
            await asyncio.sleep(0)
        self.beside.append(asyncio.ensure_future(client.close()))
        await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait([request])
        assert request.cancelled() or isinstance(request.exception(), QmpError | QmpConnectionLost | None)

    async def guest(self) -> None:
        """Somebody uses the disks, whatever becomes of them."""
        while self.guest_works and not self.machine.hub.quitting:
            await asyncio.sleep(self.random.choice((0.001, 0.02, 0.3)))
            disks = list(self.machine.system.devices)
            if not disks:
                continue
            with contextlib.suppress(QBlockError):
                disk, length = self.random.choice(disks), self.random.choice((512, 4096, 64 * KiB))
                if disk.length < length:
                    continue
                offset = self.random.randrange((disk.length - length) // 512 + 1) * 512
                match self.random.randrange(5):
                    case 0:
                        await disk.read_into(offset, memoryview(bytearray(length)))
                    case 1:
                        await disk.flush()
                    case 2:
                        await disk.discard(offset, length)
                    case _:
                        await disk.write_from(offset, memoryview(self.random.randbytes(length)))

    # ------------------------------------------------------------------------------------------------------------- the end

    def look(self) -> None:
        """Whatever is going on, the graph is one."""
        graph = self.machine.system.graph
        own = {
            node: node.quiesce_counter - sum(edge.node.quiesce_counter for edge in node.children.values())
            for node in graph.nodes.values()
        }
        assert min(own.values(), default=0) >= 0, own
        assert_consistent(graph, own)
        assert not self.complaints, self.complaints

    async def come_to_rest(self, guest: asyncio.Task[None]) -> None:
        """Jobs end, whatever they do now; nobody works any more, and nothing shows that somebody did."""
        jobs = self.machine.system.jobs
        if self.dialect is Dialect.SYSTEM:
            await self.sure("set-action", {"reboot": "reset"})
        for attempt in range(40):
            if self.dialect is Dialect.SYSTEM:
                await self.sure("cont", {})
                if attempt > 10 and not guest.done():  # its request fails again whenever the machine goes on
                    await self.sure("system_reset", {})
            for job in list(jobs.jobs):
                if job.id is not None:
                    verbs = ("job-resume", "job-finalize", "job-dismiss", "job-complete" if attempt < 2 else "job-cancel")
                    for verb in verbs:
                        await self.tell(verb, {"id": job.id})
            await asyncio.sleep(1)
            if not jobs.jobs and guest.done():
                break
        assert not jobs.jobs and guest.done(), f"what does not end: {jobs.jobs} {guest}"
        if self.beside:
            await self.within(asyncio.wait(self.beside), "what goes on beside")
        self.look()
        nodes = self.machine.system.graph.nodes.values()
        copying = {node for node in nodes if node.driver.name == "copy-before-write"}
        keepers = copying | {edge.node for node in copying for edge in node.children.values()}
        for node in nodes:
            assert not node.blockers and not node.quiesce_counter, node
            assert not any(edge.frozen for edge in node.children.values()), node
            assert not any(bitmap.busy for bitmap in node.dirty_bitmaps), node
            assert node in keepers or all(bitmap.name for bitmap in node.dirty_bitmaps), node

    async def remove_everything(self) -> None:
        """By commands, until nothing is there."""
        system = self.machine.system
        for device in system.devices.devices.copy():
            await self.tell("device_del", {"id": device.id or device.path})
        if self.dialect is Dialect.SYSTEM:
            await self.sure("system_reset", {})  # which a device leaves at that the guest has not let go of
        for name in self.things.disks():
            await self.tell("human-monitor-command", {"command-line": f"drive_del {name}"})
        gone = [""]
        while gone:
            gone = [name for name in list(system.graph.nodes) if await self.tell("blockdev-del", {"node-name": name})]
        for name in list(system.objects.objects):
            await self.tell("object-del", {"id": name})
        for number in list(system.env.fdsets.sets):
            await self.tell("remove-fd", {"fdset-id": number})
        for device in list(self.machine.hub.plugged):
            await self.sure("chardev-remove", {"id": device.label})
        graph, left = system.graph, [system.devices.devices, system.objects.objects, system.env.fdsets.sets]
        assert not any([graph.nodes, graph.backends, *left]), f"{graph.nodes} {graph.backends} {left}"


def live(seed: int) -> Life:
    """Live the life of ``seed``; a failure says which one it is, and all that was said."""
    with tempfile.TemporaryDirectory(prefix="qblock-surface-") as home:
        folder = Path(home, "images")
        shutil.copytree(_templates(), folder)
        life, before = Life(seed, folder), _descriptors()
        options = MachineOptions(seed=seed, dialect=life.dialect)
        schedule = Seeded(seed) if seed % 2 else Fifo()
        try:
            with contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()), LocalMachine(schedule, options) as local:
                local.run(_alone(life.run(local.machine), life.complaints.append))
            assert _descriptors() == before, "descriptors that stay open"
        except BaseException as error:
            error.add_note("\n  ".join([f"life {seed}, {life.dialect.value}:", *life.trail]))
            raise
    return life


async def _alone(work: Coroutine[Any, Any, None], complain: Callable[[str], None]) -> None:
    """What the loop has to complain about is heard, and no task stays behind."""
    loop, before = asyncio.get_running_loop(), asyncio.all_tasks()
    loop.set_exception_handler(lambda loop, context: complain(str(context)))
    await work
    await asyncio.sleep(60)
    gc.collect(0)
    assert asyncio.all_tasks() <= before, asyncio.all_tasks() - before


def _descriptors() -> dict[str, str]:
    """Those of this process, with what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    wanted = parser.parse_args()
    failures, said, accepted = 0, 0, dict[str, int]()
    for seed in range(wanted.seed, wanted.seed + wanted.count):
        try:
            for command, count in (life := live(seed)).accepted.items():
                accepted[command] = accepted.get(command, 0) + count
            said += sum(not line.startswith("    ") for line in life.trail)
        except Exception:
            failures += 1
            sys.stdout.write(f"{traceback.format_exc()}\n")
            sys.stdout.flush()
    counts = " ".join(f"{name}:{count}" for name, count in sorted(accepted.items()))
    sys.stdout.write(f"{said} commands, accepted of them: {counts}\n")
    sys.stdout.write(f"{wanted.count} lives from {wanted.seed} on, {failures} failures\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
