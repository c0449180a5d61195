"""A machine with three disks for random histories: its images, its guests, its jobs, and how all of it is judged in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any, ClassVar

import attrs

from history_model import Guest, Photo, Tracked, not_left
from job_histories import BLOCK, CLUSTER, SIZE, View
from qblock.backend import BlockBackend
from qblock.chain import backing_chain, contains
from qblock.devices.device import GuestDevice
from qblock.devices.tree import Device
from qblock.driver import CheckFix, SupportsBacking, SupportsSnapshots
from qblock.errors import QBlockError
from qblock.monitor.client import QmpClient
from qblock.node import BlockDriverState
from qblock.permissions import Perm
from qblock.snapshots import find_snapshot
from qblock.testing.graphs import assert_consistent
from qblock.testing.jobbench import Faults, JobBench, ShakyMemory, driver_of
from qblock.units import align_down
from random_histories import bring_jobs_to_their_ends

CHAINS = (("base0", "mid0", "top0"), ("base1", "top1"))
VOTERS = ("q0", "q1", "q2")
GROUPS = ("g0", "g1")


class KeptMemory(ShakyMemory):
    """Shaky memory whose content can be looked at when it is closed. As with a file, no sector is ever written by half."""

    name: ClassVar[str] = "kept-memory"

    left: bytes | None = None

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `ShakyMemory`."""
        self.faults.count("write")
        half = align_down(len(buffer) // 2, 512)
        await self._dawdle()
        if half:
            await super(ShakyMemory, self).write_from(offset, buffer[:half])
            await self._dawdle()
        await super(ShakyMemory, self).write_from(offset + half, buffer[half:])
        await self._dawdle()

    async def close(self) -> None:
        """See `Driver`."""
        self.left = self.content()
        await super().close()


@attrs.define(eq=False)
class Disk:
    """A disk of the machine. ``root``: the node that its device was plugged into; ``image``: the one that it is on in the end."""

    id: str
    root: str
    image: str = attrs.field(init=False)
    spoilt: bool = attrs.field(init=False, default=False)
    guest: Guest = attrs.field(init=False)


@attrs.define(eq=False)
class Known:
    """What is known of a job: what its good end means, what its bad end, and the moment at which it started."""

    ended: Callable[[View | None], None] = lambda at_end: None
    failed: Callable[[], None] = lambda: None
    pending: View | None = None
    disk: Disk | None = None
    result: bool | None = None


class HistoryMachine:
    """The machine. ``views`` has what each image must show, ``inside`` what its internal snapshots, None where nobody knows."""

    def __init__(self, seed: int) -> None:
        self.bench = JobBench(seed)
        self.random = Random(seed)
        self.system, self.graph = self.bench.system, self.bench.graph
        self.system.registry.register(KeptMemory)
        self.files: dict[str, KeptMemory] = {}
        self.nodes: set[str] = set()
        """The nodes that there should be."""
        self.views: dict[str, View | None] = {}
        self.inside: dict[tuple[str, str], View | None] = {}
        self.known: dict[str, Known] = {}
        self.bitmaps: dict[str, Tracked] = {}
        self.photos: list[Photo] = []
        self.weak = VOTERS[0]
        """The only child of the quorum that may fail."""
        self.loading: dict[str, bytes] = {}
        """What a snapshot that is being loaded makes of a disk."""
        self.at_moment: list[Callable[[], None]] = []
        """What to note when the transaction that is being prepared takes effect."""
        self.endless: set[str] = set()
        """Backups that only keep what is overwritten."""
        self._last: dict[str, BlockDriverState] = {}
        self.log: list[str] = []
        self.count = 0
        self.living = True
        self.qmp: QmpClient
        self.bench.listeners.append(self._heard)

    async def tell(self, command: str, arguments: Mapping[str, Any] | None = None, **members: Any) -> Any:
        """Execute a command; raises `QmpError`."""
        return await self.qmp.execute(command, arguments, **members)

    # ------------------------------------------------------------------------------------------------------------- making

    def number(self) -> int:
        """A new one."""
        self.count += 1
        return self.count

    async def storage(self, name: str, size: int = 0) -> str:
        """A node that takes its time; returns its name."""
        options = {"driver": KeptMemory.name, "node-name": name, "size": size}
        node = await self.system.opener.open_blockdev(options)
        node.monitor_owned = True
        assert isinstance(node.driver, KeptMemory)
        node.driver.random = Random(self.random.random())
        self.files[name] = node.driver
        self.nodes.add(name)
        return name

    async def image(self, name: str, below: str | None, size: int, **header: str) -> BlockDriverState:
        """A new qcow2 node over storage of its own, over ``below``."""
        file = await self.storage(f"{name}-file")
        if below is not None:
            header = {"backing-file": below, "backing-fmt": "qcow2"}
        options = {"file": file, "size": size, "cluster-size": CLUSTER, **header}
        slow, self.files[file].random = self.files[file].random, None
        await self.system.opener.create_image("qcow2", options)
        self.files[file].random = slow
        node = await self.system.opener.open_blockdev(self.image_options(name, below))
        node.monitor_owned = True
        self.nodes.add(name)
        return node

    def image_options(self, name: str, below: str | None) -> dict[str, Any]:
        """How an image is opened."""
        return {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": below, "discard": "unmap"}

    async def make(self) -> None:
        """All of it."""
        self.system.board.build(self.system)
        self.qmp = await QmpClient.in_process(self.system)
        self.system.env.trace.listen("transaction_commit", self._moment)
        for group in GROUPS:
            await self.tell("object-add", {"qom-type": "throttle-group", "id": group})
        for names in CHAINS:
            below: str | None = None
            for name in names:
                node = await self.image(name, below, SIZE)
                await self._fill(node)
                self.views[name] = View(await self.shown(node) or b"", frozenset())
                below = name
        for name in VOTERS:
            await self.storage(name, SIZE)
        await self._add("t1", driver="throttle", throttle_group="g0", file="top1")
        # Nothing is rewritten: who reads what is being written would put back old data, in QEMU as well.
        await self._add("quorum", driver="quorum", children=list(VOTERS), vote_threshold=2)
        self.disks = [Disk("vd0", "top0"), Disk("vd1", "t1"), Disk("vd2", "quorum")]
        for disk in self.disks:
            self._last[disk.id] = self.graph.nodes[disk.root]
            await self.plug(disk, disk.root)
            disk.guest = self._guest(disk)
            disk.guest.begin(await self.shown(self.graph.nodes[disk.root]) or b"")

    async def _fill(self, node: BlockDriverState) -> None:
        writer = self.bench.disk(node)
        for _ in range(12):
            start = self.random.randrange(SIZE // 512) * 512
            await writer.write(start, self.random.randbytes(min(self.random.choice((512, 4096, 9000)), SIZE - start)))
        await writer.flush()
        writer.close()

    async def _add(self, name: str, **options: Any) -> None:
        await self.tell("blockdev-add", {"node-name": name, **{key.replace("_", "-"): value for key, value in options.items()}})
        self.nodes.add(name)

    async def remove(self, name: str) -> None:
        """A node that there was."""
        await self.tell("blockdev-del", {"node-name": name})
        self.nodes.discard(name)

    async def plug(self, disk: Disk, drive: str) -> None:
        """Plug its device in."""
        policy = {kind: self.random.choice(("report", "stop", "enospc")) for kind in ("werror", "rerror")}
        await self.tell("device_add", {"driver": "virtio-blk-pci", "id": disk.id, "drive": drive, **policy})

    def _guest(self, disk: Disk) -> Guest:
        return Guest(self.system, Random(self.random.random()), lambda: self.device(disk), lambda: self.source(disk))

    # ---------------------------------------------------------------------------------------------------------- looking

    def device(self, disk: Disk) -> GuestDevice | None:
        """Its device, None while it is unplugged."""
        device = self.plugged(disk)
        return None if device is None or device.leaving else next(one for one in self.system.devices if one.id == disk.id)

    def plugged(self, disk: Disk) -> Device | None:
        """Its device as long as it is there."""
        return next((device for device in self.system.devices.devices if device.id == disk.id), None)

    def source(self, disk: Disk) -> BlockDriverState:
        """What backups of a disk are of, and its bitmaps: the active image; the filter or quorum that stays for ever."""
        if disk.root != "top0":
            return self.graph.nodes[disk.root]
        for device in self.system.devices:
            if device.id == disk.id and device.root is not None:
                self._last[disk.id] = next(iter(backing_chain(device.root.node)))
        return self._last[disk.id]

    def chain(self, disk: Disk) -> list[BlockDriverState]:
        """The images of a disk, top first; none for the quorum."""
        return [node for node in backing_chain(self.source(disk)) if node.driver.name == "qcow2"]

    async def shown(self, node: BlockDriverState) -> bytes | None:
        """What a node shows, if somebody may look and it can tell."""
        reader = BlockBackend(self.graph, perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
        try:
            reader.insert(node)
            return await reader.read(0, node.length)
        except QBlockError:
            return None
        finally:
            reader.close()

    # -------------------------------------------------------------------------------------------------------- the model

    def _heard(self, event: str, data: Mapping[str, Any]) -> None:
        known = self.known.get(str(data.get("id", data.get("device", ""))))
        if known is None:
            return
        if event == "JOB_STATUS_CHANGE" and data["status"] == "pending" and known.disk is not None:
            known.pending = known.disk.guest.capture()
        elif event == "BLOCK_JOB_COMPLETED" and "error" not in data:
            known.result = True
            known.ended(known.pending)
        elif event in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
            known.result = False
            known.failed()

    def _moment(self, name: str, members: Mapping[str, object]) -> None:
        """Called when the first action of a transaction takes effect: nothing is under way on the disks that it is about."""
        if members["index"] == 0:
            for act in self.at_moment:
                act()
            self.at_moment.clear()

    def written_below(self, node: BlockDriverState, *, hidden_by: BlockDriverState | None = None) -> None:
        """Somebody may write to ``node``: nobody knows what the images over it show, unless ``hidden_by`` lies between."""
        for views in (self.views, self.inside):
            for key in views:
                image = self.graph.nodes.get(key if isinstance(key, str) else key[0])
                if image is None or image is node or not contains(image, node):
                    continue
                if hidden_by is None or not contains(image, hidden_by) or (isinstance(key, tuple) and image is hidden_by):
                    views[key] = None  # type: ignore[index]

    def moved(self, disk: Disk) -> None:
        """The guest's disk is another image now."""
        active = self.chain(disk)[0]
        self.views.pop(active.node_name, None)
        self.written_below(active)

    def take_photo(self) -> None:
        """As if the program were killed now."""
        disks = []
        for disk in self.disks[:2]:
            blocks = [list(values) for values in disk.guest.survivors]
            if (other := self.loading.get(disk.id)) is not None:
                for index, values in enumerate(blocks):
                    values.append(other[index * BLOCK : (index + 1) * BLOCK])
            disks.append((self.chain(disk)[0].node_name, blocks))
        files = {name: driver.content() for name, driver in self.files.items()}
        self.photos.append(Photo(files, disks, self._persistent()))

    def _persistent(self) -> list[tuple[str, str, set[int]]]:
        return [(one.node.node_name, one.name, one.mark.surely.copy()) for one in self.bitmaps.values() if one.persistent]

    def last_photo(self) -> Photo:
        """When all is closed: nothing may be left out."""
        disks = []
        for disk in self.disks[:2]:
            model = disk.guest.model
            blocks = [[bytes(model[at : at + BLOCK])] for at in range(0, len(model), BLOCK)]
            disks.append((disk.image, [] if disk.spoilt else blocks))
        return Photo({name: driver.left or b"" for name, driver in self.files.items()}, disks, self._persistent())

    # ---------------------------------------------------------------------------------------------------------- the end

    async def end_jobs(self) -> None:
        """Everything works again, and every job is told to come to its end; not well where a failed flush has spoilt an image."""
        for driver in self.files.values():
            driver.faults = Faults()
        await bring_jobs_to_their_ends(self.bench, self.random, endless=self.endless)

    async def look(self) -> None:
        """Everything is where it belongs, and nothing else is there."""
        for disk in self.disks:
            if not disk.guest.poisoned:
                seen = await self.shown(self.source(disk))
                assert seen is not None and disk.guest.capture().agrees(seen), f"{disk.id} is not what the guest wrote"
        assert not self.disks[2].guest.failed, "the quorum failed with one bad child"
        assert_consistent(self.graph)
        assert set(self.graph.nodes) == self.nodes, "nodes that were left behind, or taken away"
        assert len(list(self.graph.backends)) == len(self.disks)
        for node in self.graph.nodes.values():
            assert not node.blockers and not node.quiesce_counter, node
            assert not any(edge.frozen for edge in node.children.values()), node
            for bitmap in node.dirty_bitmaps:
                assert bitmap.name in self.bitmaps and not bitmap.busy and bitmap.successor is None, (node, bitmap)
        for tracked in self.bitmaps.values():
            self._look_at_bitmap(tracked)
        active = [self.chain(disk)[0] for disk in self.disks[:2]]
        for name, view in self.views.items():
            node = self.graph.nodes[name]
            if view is not None and node.poisoned is None and node not in active:
                seen = await self.shown(node)
                assert seen is not None and view.agrees(seen), f"{name} does not show what it must"

    def _look_at_bitmap(self, tracked: Tracked) -> None:
        bitmap = next(one for one in tracked.node.dirty_bitmaps if one.name == tracked.name)
        lost = [index for index in tracked.mark.surely if not bitmap.get(index * BLOCK)]
        assert not lost, f"{tracked.name} has forgotten {lost}"
        if tracked.bounded:
            grain = bitmap.granularity
            clusters = _covered(tracked.mark.maybe, BLOCK, CLUSTER)  # what is written is filled up to whole ones
            allowed = _covered(clusters, CLUSTER, grain)
            much = [at for at in range(bitmap.granules) if bitmap.get(at * grain) and at not in allowed]
            assert not much, f"{tracked.name} ({grain}) has made up {much}"


def _covered(numbers: set[int], size: int, grain: int) -> set[int]:
    """The pieces of ``grain`` bytes that lie wholly or partly in these pieces of ``size`` bytes."""
    return {at for number in numbers for at in range(number * size // grain, -(-(number + 1) * size // grain))}


async def judge(photo: Photo, inside: Mapping[tuple[str, str], View | None] | None = None) -> None:
    """Open the storage of a photo: all images are sound, and show what they must, as must the snapshots ``inside`` of them."""
    bench = await _developed(photo)
    for image, blocks in photo.disks:
        node = await _opened(bench, image)
        seen = await _content(bench, node)
        wrong = not_left(seen, blocks)
        assert not wrong, f"after a crash {image} has lost {wrong}"
        for layer in backing_chain(node):
            found = await layer.driver.check(CheckFix.NONE)
            assert not found.corruptions, (layer, found)
    for image, name, surely in photo.bitmaps:
        node = await _opened(bench, image)
        for bitmap in node.dirty_bitmaps:
            trusted = bitmap.name == name and not bitmap.inconsistent
            lost = [index for index in surely if trusted and not bitmap.get(index * BLOCK)]
            assert not lost, f"after a crash {name} in {image} has forgotten {lost}, and does not say so"
    await bench.close()
    for (image, tag), view in (inside or {}).items():
        bench = await _developed(photo)
        await _go_back(bench, image, tag, view)
        await bench.close()


async def _developed(photo: Photo) -> JobBench:
    """A bench with the storage of a photo."""
    bench = JobBench(None)
    for name, content in photo.files.items():
        node = await bench.node(name, len(content))
        await driver_of(node).write_from(0, memoryview(content))
    return bench


async def _go_back(bench: JobBench, image: str, tag: str, view: View | None) -> None:
    node = await _opened(bench, image)
    assert isinstance(node.driver, SupportsSnapshots)
    found = find_snapshot(node.driver.snapshots(), name=tag)
    assert found is not None, f"{image} has lost its snapshot {tag}"
    node.dirty_bitmaps.clear()  # they would not see it
    await node.driver.apply_snapshot(found)
    if view is not None:
        assert view.agrees(await _content(bench, node)), f"the snapshot {tag} of {image} is not what it was"


async def _opened(bench: JobBench, image: str) -> BlockDriverState:
    """An image over those that the headers name."""
    if image in bench.graph.nodes:
        return bench.graph.nodes[image]
    alone = {"driver": "qcow2", "node-name": image, "file": f"{image}-file", "backing": None}
    node = await bench.system.opener.open_blockdev(alone)
    assert isinstance(node.driver, SupportsBacking)
    link = node.driver.backing_link()
    if link is not None:
        below = await _opened(bench, link.filename)
        await bench.system.opener.close_node(node)
        node = await bench.system.opener.open_blockdev({**alone, "backing": below.node_name})
    node.monitor_owned = True
    return node


async def _content(bench: JobBench, node: BlockDriverState) -> bytes:
    reader = BlockBackend(bench.graph, perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
    reader.insert(node)
    try:
        return await reader.read(0, node.length)
    finally:
        reader.close()
