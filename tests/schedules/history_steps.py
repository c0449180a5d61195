"""The steps of random histories of a machine: jobs, transactions and bitmaps, and what they mean for the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from history_machine import Disk, HistoryMachine, Known
from history_model import Tracked
from job_histories import BLOCK, CLUSTER, View
from qblock.monitor.client import QmpError
from qblock.node import BlockDriverState
from qblock.units import KiB

POLICIES = ("report", "ignore", "enospc", "stop", "auto")
SPEEDS = (0, 0, 512 * KiB, 4096 * KiB)


class JobSteps(HistoryMachine):
    """What can be told jobs, transactions and bitmaps."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.known_targets: dict[str, str] = {}
        self.groups: list[list[str]] = []
        """Jobs that can only end well together."""
        self.sinking: dict[str, str] = {}
        """Active images that are being committed, by the ids of the jobs."""
        self.tops: dict[str, list[str]] = {}
        """Targets of backups of the top image of a disk."""
        self.keeping: dict[str, View] = {}
        """What the targets of endless backups show as long as these run, by the ids of the jobs."""

    # ----------------------------------------------------------------------------------------------------------- chances

    def common(self, *policies: str) -> dict[str, Any]:
        """What every job is told."""
        chance = self.random.random
        return {
            "speed": self.random.choice(SPEEDS), "auto-finalize": chance() < 0.8, "auto-dismiss": chance() < 0.9,
            **{name: self.random.choice(POLICIES) for name in policies},
        }  # fmt: skip

    def job(self, known: Known) -> str:
        """A new id."""
        name = f"j{self.number()}"
        self.known[name] = known
        return name

    def chained(self) -> Disk:
        """A disk on a chain of images."""
        return self.random.choice(self.disks[:2])

    def above(self, disk: Disk) -> str:
        """The node that the device is plugged into."""
        device = self.device(disk)
        return self.source(disk).node_name if device is None or device.root is None else device.root.node.node_name

    # -------------------------------------------------------------------------------------------------------- single jobs

    async def commit(self) -> None:
        """Inner layers or the active one, any pair of a chain."""
        disk = self.chained()
        chain = self.chain(disk)
        if len(chain) < 2:
            return
        high, low = sorted(self.random.sample(range(len(chain)), 2))
        top, base, active = chain[high], chain[low], high == 0
        told = self.views.get(top.node_name)

        def ended(at_end: View | None) -> None:
            if not active:
                self.views[base.node_name] = told
            elif self.chain(disk)[0] is base:
                self.views[top.node_name] = None
                self.moved(disk)
            else:
                self.views[base.node_name] = at_end

        job = self.job(Known(ended, disk=disk))
        more = {} if active else {"backing-file": base.node_name}
        await self.tell("block-commit", {
            "job-id": job, "device": self.above(disk), "top-node": top.node_name, "base-node": base.node_name,
            **more, **self.common("on-error"),
        })  # fmt: skip
        self.views[base.node_name] = None
        self.written_below(base, hidden_by=top)
        if active:
            self.sinking[job] = top.node_name
        for tracked in self.bitmaps.values():
            tracked.bounded &= tracked.node is not base

    def keep_inside(self, image: str, tag: str, view: View) -> None:
        """There is a snapshot inside of an image. While the image is committed, what is written to it is written below, too."""
        self.inside[image, tag] = None if self.sinks(image) else view

    def sinks(self, image: str) -> bool:
        """Whether an active image is being committed."""
        return any(name == image and self.known[job].result is None for job, name in self.sinking.items())

    async def stream(self) -> None:
        """Into any image of a chain, down to any base."""
        chain = self.chain(self.chained())
        high = self.random.randrange(len(chain))
        base = self.random.choice([None, *chain[high + 1 :]])
        for key in self.inside:
            if key[0] == chain[high].node_name:
                self.inside[key] = None
        below = {"base-node": base.node_name, "backing-file": base.node_name} if base is not None else {}
        await self.tell("block-stream", {
            "job-id": self.job(Known()), "device": chain[high].node_name, **below, **self.common("on-error")
        })  # fmt: skip

    async def mirror(self) -> None:
        """A chain into a new image: all of it, or its top."""
        disk = self.chained()
        chain = self.chain(disk)
        root, source, target = self.source(disk).node_name, chain[0].node_name, f"m{self.number()}"
        replaces = {"replaces": source} if root != source else {}
        top = len(chain) > 1 and self.random.random() < 0.4
        await self.image(target, chain[1].node_name if top else None, chain[0].length)

        def ended(at_end: View | None) -> None:
            if self.chain(disk)[0].node_name == target:
                self.views[source] = at_end
                self.moved(disk)
            elif self.views.get(target, at_end) is not None:
                self.views[target] = at_end

        def failed() -> None:
            self.views[target] = None

        await self.tell("blockdev-mirror", {
            "job-id": self.job(Known(ended, failed, disk=disk)), "device": root, "target": target, **replaces,
            "sync": "top" if top else "full",
            "granularity": CLUSTER, "buf-size": 4 * CLUSTER, "copy-mode": self.random.choice(("background", "write-blocking")),
            **self.common("on-source-error", "on-target-error"),
        })  # fmt: skip
        self.views.setdefault(target, View(b"", frozenset()))

    async def mend_quorum(self) -> None:
        """A new child takes the place of the bad one, when it holds everything."""
        target = await self.storage(f"v{self.number()}-new", len(self.disks[2].guest.model))
        quorum, bad = self.graph.nodes["quorum"], self.weak

        def ended(at_end: View | None) -> None:
            if any(edge.node.node_name == target for edge in quorum.children.values()):
                self.weak = target

        await self.tell("blockdev-mirror", {
            "job-id": self.job(Known(ended)), "device": "quorum", "target": target, "sync": "full", "replaces": bad,
            "granularity": CLUSTER, **self.common("on-source-error", "on-target-error"),
        })  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- transactions

    async def transact(self) -> None:
        """One to four actions at once, alone or as a group; some can only fail, and then nothing has happened."""
        grouped, count = self.random.random() < 0.5, self.random.randrange(1, 5)
        makers: list[Callable[[Disk], Any]] = [self._backup]
        if not grouped:
            makers += [self._snapshot, self._inside, self._bitmap, self._bitmap]
        ids, actions = set(self.known), []
        for _ in range(count):
            actions.append(await self.random.choice(makers)(self.random.choice(self.disks)))
        if self.random.random() < 0.15:
            actions.insert(self.random.randrange(count + 1), {"type": "abort", "data": {}})
        group = sorted(set(self.known) - ids)
        more = {"properties": {"completion-mode": "grouped"}} if grouped else {}
        try:
            await self.tell("transaction", {"actions": [one for one in actions if one], **more})
        except QmpError:
            assert not {job.id for job in self.bench.jobs.jobs} & set(group), "jobs of a transaction that has failed"
            raise
        finally:
            self.at_moment.clear()
        if grouped:
            self.groups.append(group)

    async def _backup(self, disk: Disk) -> dict[str, Any]:
        """A backup, with a bitmap where there is one."""
        source, target = self.source(disk), f"c{self.number()}"
        usable = [one for one in self.bitmaps.values() if one.node is source]
        tracked = self.random.choice(usable) if usable and self.random.random() < 0.8 else None
        sync, mode = self.random.choice(("full", "full", "top", "none")), None
        if tracked is not None:
            sync = self.random.choice(("incremental", "bitmap", "bitmap", "full"))
            mode = self.random.choice(("on-success", "always", "never"))
            mode = "on-success" if sync == "incremental" or (sync, mode) == ("full", "never") else mode
        chain = self.chain(disk)
        below = tracked.anchor if tracked is not None and sync != "full" else None
        if sync == "top" and len(chain) > 1:
            below = chain[1].node_name
        elif sync == "none":
            below = source.node_name
        await self.image(target, below, source.length)
        known = Known()
        job = self.job(known)
        self.at_moment.append(lambda: self._begin_backup(disk, known, (job, target, sync, mode, below), tracked))
        more = {} if tracked is None else {"bitmap": tracked.name, "bitmap-mode": mode}
        if sync == "none":
            self.endless.add(job)
        return {"type": "blockdev-backup", "data": {
            "job-id": job, "device": source.node_name, "target": target, "sync": sync, "compress": self.random.random() < 0.1,
            **more, **self.common("on-source-error", "on-target-error"),
        }}  # fmt: skip

    def _begin_backup(
        self, disk: Disk, known: Known, told: tuple[str, str, str, str | None, str | None], tracked: Tracked | None
    ) -> None:
        """This is the moment that the backup must show."""
        job, target, sync, mode, below = told
        chain = self.chain(disk)
        view = disk.guest.capture()
        if sync == "none":
            self.keeping[job] = view

            def stop() -> None:
                self.keeping.pop(job, None)

            known.ended, known.failed = (lambda at_end: stop()), stop
            self.known_targets[job] = target
            return
        self.views[target] = view
        if sync == "top" and [node.node_name for node in chain[1:2]] != [name for name in [below] if name]:
            self.views[target] = None  # a snapshot in the same transaction: something else is on top than was meant
        elif sync == "top":
            self.tops.setdefault(disk.id, []).append(target)
        known.failed = lambda: self.views.update({target: None})
        if tracked is None:
            return
        since, anchored = disk.guest.mark(tracked.node), tracked.anchor == below is not None and self.views.get(below) is not None
        since.recording = tracked.mark.recording
        if sync != "full" and not anchored:
            blocks = range(len(view.data) // BLOCK)
            loose = view.loose | {index for index in blocks if index not in tracked.mark.surely}
            self.views[target] = View(view.data, loose)

        def ended(at_end: View | None) -> None:
            if mode == "never":
                disk.guest.marks.remove(since)
                return
            disk.guest.marks.remove(tracked.mark)
            tracked.mark = since
            tracked.anchor = target if since.recording and (sync == "full" or anchored) else None

        def failed() -> None:
            self.views[target] = None
            disk.guest.marks.remove(since)
            if mode == "always":
                tracked.mark.surely, tracked.anchor = since.surely, None
                tracked.bounded = False  # what was not copied is told in clusters of the job

        known.ended, known.failed = ended, failed

    async def _snapshot(self, disk: Disk) -> dict[str, Any] | None:
        """A new image on top."""
        if disk is self.disks[2]:
            return None
        active, overlay = self.chain(disk)[0], f"o{self.number()}"
        await self.image(overlay, None, active.length, **{"backing-file": active.node_name, "backing-fmt": "qcow2"})

        def act() -> None:
            if self.chain(disk)[0].node_name != overlay:
                return  # a job had ended meanwhile, and the disk was another image
            self.views[active.node_name] = disk.guest.capture()
            for target in self.tops.pop(disk.id, ()):  # what is on top is asked in the course of a job: QEMU loses it as well
                self.views[target] = None

        self.at_moment.append(act)
        return {"type": "blockdev-snapshot", "data": {"node": active.node_name, "overlay": overlay}}

    async def _inside(self, disk: Disk) -> dict[str, Any] | None:
        """A snapshot inside of the active image."""
        if disk is self.disks[2]:
            return None
        active, tag = self.chain(disk)[0].node_name, f"s{self.number()}"

        def act() -> None:
            self.keep_inside(active, tag, disk.guest.capture())

        self.at_moment.append(act)
        return {"type": "blockdev-snapshot-internal-sync", "data": {"device": active, "name": tag}}

    # ------------------------------------------------------------------------------------------------------------ bitmaps

    async def _bitmap(self, disk: Disk) -> dict[str, Any]:
        """An action on a bitmap of a disk, which takes effect at the moment of its transaction."""
        source = self.source(disk)
        own = [one for one in self.bitmaps.values() if one.node is source]
        kind = self.random.choice(("add", "clear", "enable", "disable", "merge", "remove")) if own else "add"
        if kind == "add":
            return self.add_bitmap(disk, source)
        tracked = self.random.choice(own)
        data: dict[str, Any] = {"node": source.node_name, "name": tracked.name}
        sources = self.random.sample(own, self.random.randrange(1, len(own) + 1))
        if kind == "merge":
            data = {"node": source.node_name, "target": tracked.name}
            data["bitmaps"] = [self.random.choice((one.name, {"node": source.node_name, "name": one.name})) for one in sources]

        def act() -> None:
            self._change_bitmap(disk, tracked, kind, sources)

        self.at_moment.append(act)
        return {"type": f"block-dirty-bitmap-{kind}", "data": data}

    def add_bitmap(self, disk: Disk, source: BlockDriverState) -> dict[str, Any]:
        """The action; what is to be noted at its moment is the last entry of ``at_moment``."""
        name, persistent = f"b{self.number()}", source.driver.name == "qcow2" and self.random.random() < 0.5

        def act() -> None:
            self.bitmaps[name] = Tracked(name, source, disk.guest.mark(source), persistent=persistent)

        self.at_moment.append(act)
        grain = self.random.choice((512, CLUSTER, 4 * CLUSTER))
        data = {"node": source.node_name, "name": name, "granularity": grain, "persistent": persistent}
        return {"type": "block-dirty-bitmap-add", "data": data}

    def _change_bitmap(self, disk: Disk, tracked: Tracked, kind: str, sources: list[Tracked]) -> None:
        guest = disk.guest
        match kind:
            case "clear":
                guest.marks.remove(tracked.mark)
                recording, tracked.mark = tracked.mark.recording, guest.mark(tracked.node)
                tracked.mark.recording, tracked.anchor, tracked.bounded = recording, None, True
            case "remove":
                del self.bitmaps[tracked.name]
            case "enable" | "disable":
                tracked.mark.recording = kind == "enable"
                tracked.mark.before |= guest.under_way
                tracked.anchor = None
            case "merge":
                for one in sources:
                    tracked.mark.surely |= one.mark.surely
                    tracked.mark.maybe |= one.mark.maybe
                    tracked.bounded &= one.bounded

    async def bitmap(self) -> None:
        """One action on a bitmap, by itself: nothing is at rest then."""
        disk = self.random.choice(self.disks)
        action = await self._bitmap(disk)
        act = self.at_moment.pop()
        before = disk.guest.mark()
        try:
            if action["type"].endswith(("-merge", "-disable")):
                self.at_moment.append(act)
                await self.tell("transaction", {"actions": [action]})
                return
            await self.tell(action["type"], action["data"])
            act()
            if (tracked := self.bitmaps.get(action["data"]["name"])) is not None:
                tracked.mark.maybe |= before.maybe
        finally:
            self.at_moment.clear()
            disk.guest.marks.remove(before)
