"""The names of what there is on a machine, for `qmp_words`: commands made with them are mostly about something that exists."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

from qblock.chain import backing_chain
from qblock.driver import SupportsSnapshots
from qblock.errors import QBlockError
from qblock.monitor.machine import Machine
from qblock.node import BlockDriverState
from qblock.units import KiB
from qmp_words import ODD, Json, Namer

T = TypeVar("T")
SIZE = 256 * KiB
"""Bytes of most disks."""
FILES = ("base", "mid", "top", "disk", "spare0", "spare1", "small", "raw", "new0", "new1", "new2")
LIKELY = {
    "driver": 1, "node-name": 0.95, "job-id": 0.9, "id": 0.8, "device": 0.6, "size": 0.7, "limits": 0.8, "format": 0.7,
    "base-node": 0.4, "top-node": 0.4, "backing": 0.3, "discard": 0.4, "mode": 0.6, "inject-error": 0.3, "speed": 0.3,
    "auto-finalize": 0.3, "auto-dismiss": 0.3, "properties": 0.3, "completion-mode": 0.5, "iter-time": 1,
}  # fmt: skip
"""How probable optional members are; others are as `UNLIKELY`."""
UNLIKELY = 0.08
ABOUT_NODES = {
    "blockdev-del", "block_resize", "block-set-write-threshold", "blockdev-insert-medium", "x-blockdev-amend",
    "blockdev-snapshot-sync",
}  # fmt: skip
"""Commands whose ``node-name`` is that of a node which is there; others give it to a new one."""
EVENTS = (
    "write_aio", "read_aio", "cluster_alloc", "flush_to_disk", "l2_update", "pwritev", "l2_alloc_write", "refblock_alloc",
    "cluster_free", "l1_update", "l2_load",
)  # fmt: skip
IO = (
    "read 0 4k", "write -P 9 64k 4k", "write -z 0 64k", "discard 0 64k", "flush", "aio_write -P 3 8k 4k", "aio_flush", "map",
    "length", "truncate 512k", "alloc 0", "write -c 0 64k", "reopen -r", "reopen -w", "info", "zzz", "", "write 0", "help",
    "quit",
)  # fmt: skip


class Things(Namer):
    """Names of what there is on the machine, for the most part; the other words are as likely to make sense as not."""

    def __init__(self, machine: Machine, folder: Path, random: Random) -> None:
        self.system, self.graph, self.folder, self.random = machine.system, machine.system.graph, folder, random

    def pick(self, names: Sequence[T], default: T) -> T:
        return self.random.choice(names) if names else default

    def nodes(self, *drivers: str) -> list[BlockDriverState]:
        return [node for node in self.graph.nodes.values() if not drivers or node.driver.name in drivers]

    def node(self) -> str:
        """A node, or a device, which stands for its node."""
        names = [node.node_name for node in self.nodes()] + self.disks() * 3
        return self.pick(names, "none")

    def disks(self) -> list[str]:
        """Names of backends, which block jobs and old commands go by."""
        return [backend.name for backend in self.graph.backends if backend.name]

    def devices(self) -> list[str]:
        """Ids and paths of devices."""
        return [device.id or device.path for device in self.system.devices.devices]

    def top(self) -> str:
        """What a job can be about."""
        images = [node.node_name for node in self.nodes("qcow2") if not node.parents]
        return self.pick([*self.disks() * 2, *images], "top")

    def below(self, name: str) -> list[str]:
        """The chain that begins with a node or device."""
        try:
            return [node.node_name for node in backing_chain(self.graph.lookup(name))]
        except QBlockError:
            return [self.node()]

    def spare(self, like: str = "", *drivers: str) -> str:
        """A node that nobody uses, of the size of ``like`` if there is one."""
        free = [node for node in self.nodes(*drivers) if not node.parents and not node.read_only]
        with contextlib.suppress(QBlockError):
            length = self.graph.lookup(like).length
            free = [node for node in free if node.length == length] or free
        return self.pick([node.node_name for node in free], self.node())

    def bitmap(self) -> tuple[str, str]:
        """A node and the name of one of its bitmaps."""
        own = [(node.node_name, bitmap.name) for node in self.nodes() for bitmap in node.dirty_bitmaps if bitmap.name]
        return self.pick(own, (self.node(), "b0"))

    def snapshots(self) -> list[tuple[str, str]]:
        """Nodes with internal snapshots, and their names."""
        images = [node for node in self.nodes("qcow2") if isinstance(node.driver, SupportsSnapshots)]
        return [(node.node_name, one.name) for node in images for one in node.driver.snapshots()]

    def job(self) -> str:
        return self.pick([job.id for job in self.system.jobs.jobs if job.id is not None], "j0")

    def file(self) -> str:
        return str(self.folder / self.random.choice(FILES))

    def hmp(self) -> str:
        """A line for people."""
        disk, job = self.top(), self.job()
        image, number = f"{self.file()},format=qcow2", self.random.randrange(3)
        infos = ("block", "block -v", "block -n", "blockstats", "block-jobs", "status", "snapshots", "qtree", "zz", "")
        return self.random.choice((
            *(f'qemu-io {self.node()} "{self.random.choice(IO)}"' for _ in range(12)), *(f"info {what}" for what in infos),
            f"block_stream {disk}", f"block_job_cancel -f {job}", f"block_job_pause {job}", f"block_job_resume {job}",
            f"block_job_complete {job}", f"block_job_set_speed {job} 1M", f"block_resize {disk} 512K", f"commit {disk}",
            "commit all", f"drive_add 0 if=none,id=d{number},file={image}", f"drive_del {disk}", "stop", "cont", "help", "?", "",
            f"drive_add -n 0 driver=qcow2,node-name=n{number},file={self.file()}", '"', "zz", "savevm s3", f"eject -f {disk}",
            f"drive_backup -f {disk} {self.folder}/new0", f"drive_mirror -n {disk} {self.folder}/spare0",
            f"snapshot_blkdev {disk} {self.folder}/new{number}", f"snapshot_blkdev_internal {disk} s{number}",
            f"snapshot_delete_blkdev_internal {disk} s{number}", f"change cd {self.file()}",
            f"device_add virtio-blk-pci,drive=d{number},id=dv{number}", f"device_del {self.pick(self.devices(), 'x')}",
            f"drive_reopen {disk} {self.file()} qcow2",
        ))  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------- words

    def text(self, member: str, owner: str) -> str:
        random = self.random
        match member:
            case _ if random.random() < 0.02:
                return str(random.choice(ODD))
            case "job-id":
                return f"j{random.randrange(5)}"
            case "id" | "device" if owner.startswith(("job-", "block-job-")):
                return self.job()
            case "id" if owner.startswith(("object-", "throttle-group", "secret")):
                return random.choice(("group", "other", "key"))
            case "throttle-group" | "group":
                return random.choice(("group", "other"))
            case "id" if owner == "device_add":
                return f"dv{random.randrange(3)}"
            case "driver" if owner == "device_add":
                return random.choice(("virtio-blk-pci", "scsi-hd", "scsi-cd", "virtio-scsi-pci", "nvme", "ide-hd", "zz"))
            case "typename":
                return random.choice(("virtio-blk-pci", "scsi-cd", "zz"))
            case "bus":
                return random.choice(("scsi0.0", "pci.0", "zz"))
            case "id" if "snapshot" in owner:
                return random.choice("12")
            case "id":
                return self.pick(["cd", "cd", *self.devices()], "x")
            case "filename" | "snapshot-file" | "new-image-file" | "base" | "top" | "backing-file" | "config" | "witness":
                return self.file()
            case "target" if owner.startswith("drive-"):
                return self.file()
            case "bitmap" | "bitmaps":
                return self.bitmap()[1]
            case "target" | "name" if "bitmap" in owner:
                return self.bitmap()[1] if random.random() < 0.6 else f"b{random.randrange(3)}"
            case "name" if "snapshot" in owner:
                return f"s{random.randrange(3)}"
            case "name" if owner.startswith("trace"):
                return random.choice(("qmp_enter_*", "job_*", "*", "zz"))
            case "format" | "backing-fmt":
                return random.choice(("qcow2", "qcow2", "raw", "zz"))
            case "snapshot-node-name":
                return f"n{random.randrange(12)}"
            case "node-name" if owner == "blockdev-insert-medium":
                return self.spare()
            case "node-name" if owner not in ABOUT_NODES:
                return f"n{random.randrange(12)}"
            case "filter-node-name":
                return f"f{random.randrange(3)}"
            case "child":
                return random.choice(("children.0", "children.1", "children.2", "file"))
            case "path":
                return random.choice(("/objects/group", "/objects", "/", "group", "/objects/key"))
            case "property":
                return random.choice(("limits", "x-iops-total", "type", "data"))
            case "command-line":
                return self.hmp()
        return self.node()

    def number(self, member: str, owner: str) -> int:
        random = self.random
        match member:
            case _ if random.random() < 0.02:
                return random.choice([number for number in ODD if type(number) is int])
            case "size":
                return random.choice((SIZE, SIZE, SIZE, SIZE // 2, SIZE * 2, SIZE + 512, 0, 513))
            case "speed":
                return random.choice((0, 0, 64 * KiB, 256 * KiB))
            case "granularity" | "cluster-size" | "buf-size" | "max-chunk":
                return random.choice((4096, 65536, 512, 0))
            case "latency-ns":
                return random.choice((0, 1000, 1000000))
            case "refcount-bits":
                return random.choice((1, 8, 16, 64))
            case "errno":
                return random.choice((5, 28))
            case "iter-time":
                return 1
        if "iops" in member or "bps" in member:
            return random.choice((0, 0, 0, 1000, 1 << 20))
        return random.choice((0, 1, 2, 3, 512, 4096, 65536))

    def choices(self, member: str, values: Sequence[str]) -> Sequence[str]:
        usual = {
            "driver": ("qcow2", "qcow2", "file", "memory", "raw", "quorum"), "sync": ("full", "top"), "event": EVENTS,
            "on-error": ("report",), "on-source-error": ("report",), "on-target-error": ("report",), "preallocation": ("off",),
        }.get(member, ())  # fmt: skip
        return [*values, *(value for value in usual * 3 if value in values)]

    def anything(self, member: str, owner: str) -> Json:
        match member:
            case "data" if owner == "blockdev-mirror":
                return {"device": self.top(), "target": self.spare(), "sync": "full"}
            case "options" if owner == "blockdev-reopen":
                return self.reopened()
            case "options":
                keys = {"compat": "1.1", "lazy-refcounts": True, "refcount-bits": 64, "size": SIZE * 2, "encrypt": {}}
                return {"driver": "qcow2"} | dict(self.random.sample(list(keys.items()), self.random.randrange(3)))
        return self.random.choice((1, "x", {"iops-total": 100}, {"x": []}))

    def probability(self, member: str) -> float:
        return LIKELY.get(member, UNLIKELY)

    def reopened(self) -> Json:
        """Options for a node that is there, most of them as they are."""
        node = self.pick(self.nodes(), None)
        if node is None:
            return {}
        names = {name: edge.node.node_name for name, edge in node.children.items()}
        options: dict[str, Json] = {"driver": node.driver.name, "node-name": node.node_name}
        if node.driver.name == "quorum":
            options |= {"children": list(names.values()), "vote-threshold": 1}
        else:
            options |= names
        for name in ("filename", "size", "throttle-group"):
            if (value := getattr(node.driver.options, name.replace("-", "_"), None)) is not None:
                options[name] = value
        more = {"read-only": self.random.random() < 0.5, "discard": "unmap", "detect-zeroes": "on"}
        more |= {"backing": None, "file": self.node()}
        return options | dict(self.random.sample(list(more.items()), self.random.choice((0, 1, 1, 2))))

    # ------------------------------------------------------------------------------------------------------- sentences

    def fit(self, command: str, arguments: dict[str, Json]) -> None:
        """Change what words by themselves hardly ever get right: members that depend on one another."""
        match command:
            case "transaction":
                for action in arguments["actions"]:
                    self.fit(str(action["type"]), action["data"])
            case "block-commit" | "block-stream" | "drive-mirror" | "drive-backup" | "blockdev-mirror" | "blockdev-backup":
                self._fit_job(command, arguments)
            case "blockdev-snapshot":
                arguments |= {"node": self.top(), "overlay": self.spare("", "qcow2")}
            case "blockdev-snapshot-sync" if "device" in arguments:
                arguments.pop("node-name", None)
                arguments |= {"device": self.top(), "snapshot-file": str(self.folder / f"new{self.random.randrange(3)}")}
            case "blockdev-create" if arguments["options"]["driver"] == "qcow2":
                arguments["options"] |= {"file": self.spare("", "file", "memory"), "size": SIZE}
            case "x-blockdev-amend":
                arguments["node-name"] = self.pick([node.node_name for node in self.nodes("qcow2")], "top")
            case "block_resize":
                arguments.pop(self.random.choice(("device", "node-name")), None)
            case "eject" | "blockdev-open-tray" | "blockdev-close-tray" | "blockdev-change-medium":
                arguments.pop("device" if "id" in arguments else "id", None)
            case "block_set_io_throttle":
                arguments |= {name: 0 for name in arguments if name.endswith(("_rd", "_wr"))}
                for name in [name for name in arguments if "_max" in name]:
                    del arguments[name]
                arguments |= {"device": self.pick(self.disks(), "x")}
                arguments.pop("id", None)
            case "blockdev-snapshot-internal-sync":
                arguments["device"] = self.top()
            case "blockdev-snapshot-delete-internal-sync":
                arguments["device"], arguments["name"] = self.pick(self.snapshots(), (self.top(), "s0"))
                arguments.pop("id", None)
            case "block-dirty-bitmap-merge":
                arguments["node"], arguments["target"] = self.bitmap()
                names = [bitmap.name for bitmap in self.graph.lookup(arguments["node"]).dirty_bitmaps if bitmap.name]
                arguments["bitmaps"] = self.random.sample(names, min(len(names), 2))
            case "device_add":
                arguments |= {"drive": self.pick(self.disks(), "x") if self.random.random() < 0.3 else self.spare()}
                arguments.pop("bus", None)
            case "change-backing-file":
                arguments["device"] = self.top()
                arguments["image-node-name"] = self.pick(self.below(arguments["device"]), "x")
            case "x-blockdev-change":
                arguments["parent"] = self.pick([node.node_name for node in self.nodes("quorum")], self.node())
                arguments.pop("child" if "node" in arguments else "node", None)
                if "child" not in arguments:
                    arguments["node"] = self.spare()
            case _ if "bitmap" in command and command != "block-dirty-bitmap-add" and "name" in arguments:
                arguments["node"], arguments["name"] = self.bitmap()

    def _fit_job(self, command: str, arguments: dict[str, Json]) -> None:
        device = arguments["device"] = self.top()
        chain = self.below(device)
        first = self.random.randrange(len(chain))
        second = self.random.randrange(first, len(chain))
        for name in ("base", "top", "backing-file", "replaces", "bottom"):
            arguments.pop(name, None)
        arguments |= {name: chain[at] for name, at in (("top-node", first), ("base-node", second)) if name in arguments}
        if command.startswith("blockdev-"):
            arguments["target"] = self.spare(device)
        if arguments.get("sync") in ("incremental", "bitmap"):
            bitmaps = [bitmap.name for bitmap in self.graph.lookup(chain[0]).dirty_bitmaps if bitmap.name]
            arguments |= {"bitmap": self.pick(bitmaps, "b0"), "bitmap-mode": "on-success"}
        else:
            arguments.pop("bitmap", None)
            arguments.pop("bitmap-mode", None)
