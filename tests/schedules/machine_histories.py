"""Random histories of a machine with three disks, told by QMP what management software tells, while its guest writes.

The disks are a chain of images, a chain below a throttle filter, and a quorum. What is told: every job with every policy, groups
of jobs and of other actions in transactions, bitmaps of all kinds, backups that go on from bitmaps, images and filters put in
and taken out, larger disks, snapshots outside and inside of images and of the whole machine, devices pulled and plugged;
requests of the storage fail meanwhile. A model (`history_model`) knows what each image must show as long as nobody writes below
it, what bitmaps must know, and what must be found in the files had the program been killed at this or that moment. Run many::

    python tests/schedules/machine_histories.py 0 2000
"""

from __future__ import annotations

import asyncio
from typing import Any

import attrs

from history_machine import GROUPS, Disk, judge
from history_model import WRITERS
from history_steps import SPEEDS, JobSteps
from job_histories import BLOCK, View
from qblock.monitor.client import QmpError
from qblock.testing.jobbench import Faults
from random_histories import live_many, live_one

PART = "/machine/peripheral/{}/virtio-backend"
"""Where the part of a device is that has the disk."""


@attrs.define(eq=False)
class Fleece:
    """A filter that keeps what a disk showed at one moment, and a node to read it."""

    filter: str
    access: str
    view: View


class MachineHistory(JobSteps):
    """One history."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.busy = False
        """Somebody else sees to it that the machine goes on."""
        self.fleece: Fleece | None = None
        self.looking = asyncio.Lock()
        self.guests: list[asyncio.Task[None]] = []
        self.saved: dict[str, tuple[tuple[str, ...], list[bytes]]] = {}
        """What disks held when snapshots of the machine were made: names of the images, and contents."""
        self.filters: list[str] = []

    # --------------------------------------------------------------------------------------------------- the graph changes

    async def resize(self) -> None:
        """A larger disk."""
        disk = self.chained()
        source = self.source(disk)
        if self.fleece is not None:
            return  # what is kept would become longer, too
        try:
            await self.tell("block_resize", {"node-name": source.node_name, "size": source.length + 16 * BLOCK})
        finally:
            disk.guest.grow(source.length)

    async def limits(self) -> None:
        """Other limits for a group, or for a device."""
        total = self.random.choice((0, 200, 1000))
        if self.random.random() < 0.5:
            path = f"/objects/{self.random.choice(GROUPS)}"
            await self.tell("qom-set", {"path": path, "property": "limits", "value": {"iops-total": total}})
        else:
            await self._limit(self.random.choice(self.disks), total)

    async def _limit(self, disk: Disk, iops: int) -> None:
        others = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr"), 0)
        await self.tell("block_set_io_throttle", {"id": PART.format(disk.id), "iops": iops, **others})

    async def regroup(self) -> None:
        """The throttle filter of a disk goes to the other group."""
        child = self.graph.nodes["t1"].children["file"].node.node_name
        await self._reopen({"driver": "throttle", "node-name": "t1", "throttle-group": self.random.choice(GROUPS), "file": child})

    async def _reopen(self, *options: dict[str, Any]) -> None:
        """Several nodes at once, sometimes with one more that cannot be; then nothing has changed."""
        bad = {"driver": "qcow2", "node-name": "t1", "file": "t1"}
        given = [*options, bad] if self.random.random() < 0.2 else list(options)
        await self.tell("blockdev-reopen", {"options": given})
        assert given[-1] is not bad

    async def interpose(self) -> None:
        """A filter between an image and its backing image or its storage, or out of there."""
        image = self.random.choice(self.chain(self.chained()))
        options = self.image_options(image.node_name, image.backing.node.node_name if image.backing else None)
        options["file"] = image.children["file"].node.node_name
        place = self.random.choice(("file", "backing"))
        if options[place] is None:
            return
        if options[place] in self.filters:
            name = options[place]
            options[place] = self.graph.nodes[name].children["file"].node.node_name
            await self._reopen(options)
            self.filters.remove(name)
            await self.remove(name)
            return
        name = f"f{self.number()}"
        kind = self.random.choice(({"driver": "copy-on-read"}, {"driver": "throttle", "throttle-group": "g1"}))
        await self.tell("blockdev-add", {"node-name": name, **kind, "file": options[place]})
        self.nodes.add(name)
        options[place] = name
        try:
            await self._reopen(options)
        except QmpError:
            await self.remove(name)
            raise
        self.filters.append(name)

    async def switch(self) -> None:
        """An inner image becomes read-only, or writable again."""
        chain = self.chain(self.chained())
        image = self.random.choice(chain)
        if image is not chain[0]:
            options = self.image_options(image.node_name, image.backing.node.node_name if image.backing else None)
            options["file"] = image.children["file"].node.node_name
            await self._reopen({**options, "read-only": not image.read_only})

    async def fleecing(self) -> None:
        """Keep what a disk shows at this moment, for somebody who reads it; or look what has been kept, and let go of it."""
        if self.fleece is not None:
            await self.peek()
            await self._stop_fleecing()
            return
        disk, number = self.disks[1], self.number()
        target = await self.image(f"k{number}", None, self.source(disk).length)
        child, fleece = self.graph.nodes["t1"].children["file"].node.node_name, (f"w{number}", f"a{number}")
        policy = {"on-cbw-error": self.random.choice(("break-guest-write", "break-snapshot"))}
        options = {"driver": "copy-before-write", "node-name": fleece[0], "file": child, "target": target.node_name, **policy}
        await self.tell("blockdev-add", options)
        self.nodes.add(fleece[0])
        view, since = disk.guest.capture(), disk.guest.mark()
        try:
            await self.tell("blockdev-reopen", {"options": [self._root(fleece[0])]})
        except QmpError:
            await self.remove(fleece[0])
            raise
        finally:
            disk.guest.marks.remove(since)
        self.fleece = Fleece(*fleece, View(view.data, view.loose | since.maybe))
        await self.tell("blockdev-add", {"driver": "snapshot-access", "node-name": fleece[1], "file": fleece[0]})
        self.nodes.add(fleece[1])

    def _root(self, child: str) -> dict[str, Any]:
        group = self.graph.nodes["t1"].driver.options.throttle_group
        return {"driver": "throttle", "node-name": "t1", "throttle-group": group, "file": child}

    async def _stop_fleecing(self) -> None:
        if self.fleece is None:
            return
        async with self.looking:
            fleece, self.fleece = self.fleece, None
        if fleece.access in self.nodes:
            await self.remove(fleece.access)
        below = self.graph.nodes[fleece.filter].children["file"].node.node_name
        await self.tell("blockdev-reopen", {"options": [self._root(below)]})
        await self.remove(fleece.filter)

    async def watcher(self) -> None:
        """Somebody reads what is being kept, all the time."""
        while self.living:
            await asyncio.sleep(0.03)
            await self.peek()

    async def peek(self) -> None:
        """What is being kept is there as long as it is."""
        async with self.looking:
            await self._peek()

    async def _peek(self) -> None:
        for job, view in list(self.keeping.items()):
            seen = await self.shown(self.graph.nodes[self.known_targets[job]])
            if seen is not None and self.keeping.get(job) is view:
                assert view.agrees(seen), f"{self.known_targets[job]} does not show what was overwritten"
        if (fleece := self.fleece) is not None and fleece.access in self.nodes:
            seen = await self.shown(self.graph.nodes[fleece.access])
            if seen is not None and self.fleece is fleece:
                assert fleece.view.agrees(seen), f"{fleece.access} does not show what was overwritten"

    # -------------------------------------------------------------------------------------------------- jobs and the machine

    async def verb(self) -> None:
        """Somebody tells some job something."""
        jobs = [job.id for job in self.bench.jobs.jobs if job.id is not None]
        if not jobs:
            return
        job, random = self.random.choice(jobs), self.random
        match random.randrange(8):
            case 0:
                await self.tell(random.choice(("job-pause", "job-resume")), {"id": job})
            case 1:
                await self.tell(random.choice(("block-job-pause", "block-job-resume")), {"device": job})
            case 2:
                await self.tell("block-job-cancel", {"device": job, "force": random.random() < 0.5})
            case 3:
                await self.tell("job-cancel", {"id": job})
            case 4 | 5:
                await self.tell("job-complete", {"id": job})
            case 6:
                await self.tell(random.choice(("job-finalize", "job-dismiss")), {"id": job})
            case 7:
                await self.tell("block-job-set-speed", {"device": job, "speed": random.choice(SPEEDS)})

    async def fault(self) -> None:
        """Some requests of some file fail."""
        able = [name for name in self.files if name == self.weak or name.endswith("-file")]
        name, operation = self.random.choice(able), self.random.choice(("read", "write", "flush"))
        active = {f"{self.chain(disk)[0].node_name}-file" for disk in self.disks[:2]}
        first = self.random.randrange(1, 12)
        if operation != "flush" or name not in active:
            self.files[name].faults = Faults(operation, first, first + self.random.randrange(4), self.random.choice((5, 28)))

    async def stop(self) -> None:
        """The machine is stopped for a while."""
        await self.tell("stop")

    async def replug(self) -> None:
        """A device is pulled out, and plugged in again."""
        disk = self.random.choice(self.disks)
        device = self.device(disk)
        if device is None or device.root is None:
            return
        place = device.root.node.node_name
        await self.tell("device_del", {"id": disk.id})
        for _ in range(1000):
            await asyncio.sleep(0.001)
            if self.plugged(disk) is None:
                break
        await self.plug(disk, place if place in self.graph.nodes else self.source(disk).node_name)

    async def plug_all(self) -> None:
        """Those that could not be plugged in again."""
        for disk in self.disks:
            if self.device(disk) is None:
                await self.plug(disk, disk.root if disk.root != "top0" else self.source(disk).node_name)

    async def lose_child(self) -> None:
        """The quorum goes on without the bad one."""
        if self.weak:
            await self.tell("x-blockdev-change", {"parent": "quorum", "child": "children.0"})
            self.weak = ""

    # ------------------------------------------------------------------------------------------------ the machine's snapshots

    async def _alone(self, command: str, tag: str, names: list[str]) -> bool:
        """A job with the guest at rest; returns whether it has succeeded."""
        job = f"j{self.number()}"
        await self.tell(command, {"job-id": job, "tag": tag, "vmstate": names[0], "devices": names})
        while True:
            [found] = [one for one in await self.tell("query-jobs") if one["id"] == job]
            if found["status"] == "concluded":
                await self.tell("job-dismiss", {"id": job})
                return "error" not in found
            await asyncio.sleep(0.001)

    async def keep_machine(self) -> None:
        """Snapshots of the chains' disks at once, or back to one of them."""
        disks = self.disks[:2]
        held = [await disk.guest.hold() for disk in disks]
        self.busy = True
        try:
            if not all(held):
                return
            names = [self.chain(disk)[0].node_name for disk in disks]
            sinking = {name for name in names if self.sinks(name)}
            tags = [tag for tag, (places, _) in self.saved.items() if places == tuple(names)]
            if tags and self.random.random() < 0.7:
                await self._go_back(disks, names, self.random.choice(tags))
            elif await self._alone("snapshot-save", tag := f"v{self.number()}", names):
                self.saved[tag] = tuple(names), [bytes(disk.guest.model) for disk in disks]
                for disk, name in zip(disks, names, strict=True):
                    self.inside[name, tag] = None if name in sinking else disk.guest.capture()
        finally:
            self.busy = False
            for disk in disks:
                disk.guest.held = False

    async def _go_back(self, disks: list[Disk], names: list[str], tag: str) -> None:
        contents = self.saved[tag][1]
        self.loading = {disk.id: content for disk, content in zip(disks, contents, strict=True)}
        done = await self._alone("snapshot-load", tag, names)
        for disk, content in zip(disks, contents, strict=True):
            for driver in self.files.values():
                driver.faults = Faults()
            device = self.device(disk)
            if device is None or disk.guest.poisoned:
                continue
            seen = await device.backend.read(0, device.length)
            assert seen == content or (not done and disk.guest.capture().agrees(seen)), f"{disk.id} has not gone back"
            if seen != disk.guest.model:
                self.written_below(self.chain(disk)[0])
                disk.guest.begin(seen)
            del self.loading[disk.id]

    # ------------------------------------------------------------------------------------------------------------ the whole

    async def keeper(self) -> None:
        """The machine goes on when an error has stopped it."""
        while not all(task.done() for task in self.guests):
            await asyncio.sleep(0.005)
            if not self.system.run.running and not self.busy:
                if not self.living:  # what can never succeed is taken back
                    await self.tell("system_reset")
                await self.tell("cont")

    async def photographer(self) -> None:
        """Now and then the program could be killed."""
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(self.random.random() * self.random.choice((0.02, 0.2, 1)))
            if self.living:
                self.take_photo()

    async def step(self) -> None:
        """Anything."""
        often = (
            self.commit, self.stream, self.mirror, self.transact, self.transact, self.transact, self.verb, self.verb, self.fault
        )  # fmt: skip
        rare = (
            self.bitmap, self.bitmap, self.resize, self.limits, self.regroup, self.interpose, self.switch, self.fleecing,
            self.peek, self.replug, self.keep_machine, self.stop, self.mend_quorum, self.lose_child,
        )  # fmt: skip
        step = self.random.choice(often if self.random.random() < 0.65 else rare)
        try:
            await step()
            self.log.append(step.__name__)
        except QmpError as error:
            self.log.append(f"{step.__name__}: {error}")
        await asyncio.sleep(self.random.choice((0, 0.001, 0.01, 0.1)))

    async def run(self) -> None:
        """Make it, live it, end it, and look."""
        await self.make()
        for disk in self.disks:
            if self.random.random() < 0.6:
                action = self.add_bitmap(disk, self.source(disk))
                await self.tell(action["type"], action["data"])
                self.at_moment.pop()()
        guests = [disk.guest for disk in self.disks]
        async with asyncio.TaskGroup() as group:
            for guest in guests:
                self.guests += [group.create_task(guest.writer(number)) for number in range(WRITERS)]
                self.guests.append(group.create_task(guest.flusher()))
            for helper in (self.keeper(), self.photographer(), self.watcher()):
                group.create_task(helper)
            for _ in range(self.random.randrange(4, 20)):
                await self.step()
            await self._come_to_rest()
        if not self.disks[1].guest.poisoned:
            await self.look()
        for group_of_jobs in self.groups:
            results = {self.known[job].result for job in group_of_jobs}
            assert len(results) == 1, f"jobs of one group have ended differently: {group_of_jobs} {results}"
        for disk in self.disks[:2]:
            disk.image, disk.spoilt = self.chain(disk)[0].node_name, disk.guest.poisoned
        await self.qmp.close()
        await self.bench.close()
        await self._judge_photos()

    async def _come_to_rest(self) -> None:
        self.busy = False
        for group in GROUPS:
            await self.tell("qom-set", {"path": f"/objects/{group}", "property": "limits", "value": {"iops-total": 0}})
        await self.end_jobs()
        await self.peek()
        try:
            await self._stop_fleecing()
        except QmpError:  # an image that was given up cannot be taken from where it is
            if not self.disks[1].guest.poisoned:
                raise
        await self.plug_all()
        for disk in self.disks:
            await self._limit(disk, 0)
        if not self.system.run.running:
            await self.tell("cont")
        for disk in self.disks:
            disk.guest.running = False
        self.living = False

    async def _judge_photos(self) -> None:
        """What a kill would have left, and what the end has left."""
        for photo in self.photos:
            await judge(photo)
        last = self.last_photo()
        await judge(last, self.inside)


def live(seed: int) -> list[str]:
    """Live the history of ``seed``; returns its steps. A failure says which one it is."""
    return live_one(MachineHistory, seed)


if __name__ == "__main__":
    live_many(live)
