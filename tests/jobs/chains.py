"""A chain of four qcow2 layers with a disk on top, for tests of the jobs that make chains shorter."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs

from qblock.backend import BlockBackend
from qblock.clock import LoopClock
from qblock.driver import BackingLink, SupportsBacking
from qblock.errors import BlockIOError
from qblock.jobs.active_commit import start_commit
from qblock.jobs.commit import CommitJob
from qblock.jobs.commit_plan import CommitRequest
from qblock.jobs.mirror_job import MirrorJob
from qblock.jobs.stream import StreamJob, StreamRequest, start_stream
from qblock.node import BlockDriverState
from qblock.opening import OpenPolicy
from qblock.permissions import Perm
from qblock.system import BlockSystem
from qblock.units import KiB, MiB

SIZE = 4 * MiB
NAMES = ("base", "low", "mid", "top")


@attrs.define
class Chain:
    """Four qcow2 layers, open in one system; each has a MiB of its own, and all share the first 64 KiB."""

    system: BlockSystem
    disk: BlockBackend
    events: list[tuple[str, Mapping[str, Any]]]
    directory: Path

    def node(self, name: str) -> BlockDriverState:
        """A node by its name."""
        return self.system.graph.find_node(name)

    def link(self, name: str) -> BackingLink | None:
        """What the header of a layer says."""
        driver = self.node(name).driver
        assert isinstance(driver, SupportsBacking)
        return driver.backing_link()

    def path(self, name: str) -> str:
        """The file of a layer."""
        return str(self.directory / f"{name}.qcow2")

    async def stream(self, device: str = "disk", **members: Any) -> StreamJob:
        """Stream into a node, as job ``j`` unless told otherwise."""
        request = StreamRequest(**({"job_id": "j"} | members))
        return await start_stream(self.system, device=device, request=request)

    async def commit(self, device: str = "disk", **members: Any) -> CommitJob | MirrorJob:
        """Commit layers, as job ``j`` unless told otherwise."""
        request = CommitRequest(**({"job_id": "j"} | members))
        return await start_commit(self.system, device=device, request=request)

    def layers(self, top: str = "top") -> list[str]:
        """The chain's images, as the graph is now."""
        return [node.node_name for node in self.system.graph.backing_chain(self.node(top))]

    def is_at_rest(self) -> bool:
        """Whether no job has left anything behind."""
        nodes = self.system.graph.nodes.values()
        return not any(
            node.blockers or node.quiesce_counter or any(edge.frozen for edge in node.children.values()) for node in nodes
        ) and [backend.name for backend in self.system.graph.backends] == ["disk"]

    @property
    def story(self) -> list[str]:
        """The events as words."""
        return [data["status"] if name == "JOB_STATUS_CHANGE" else name for name, data in self.events]


@asynccontextmanager
async def chain(directory: Path, *, sizes: Mapping[str, int] | None = None) -> AsyncIterator[Chain]:
    """A chain with a disk on top; each layer is a named node of the monitor."""
    async with BlockSystem.create(clock=LoopClock(), policy=OpenPolicy.deny()) as system:
        events: list[tuple[str, Mapping[str, Any]]] = []
        system.events.subscribe(lambda name, data, when: events.append((name, data)))
        below: str | None = None
        for number, name in enumerate(NAMES):
            path = str(directory / f"{name}.qcow2")
            await system.opener.create_image("file", {"filename": path, "size": 0})
            options: dict[str, Any] = {"file": {"driver": "file", "filename": path}}
            backing = {} if below is None else {"backing-file": f"{below}.qcow2", "backing-fmt": "qcow2"}
            await system.opener.create_image("qcow2", {**options, "size": (sizes or {}).get(name, SIZE), **backing})
            node = await system.opener.open_blockdev(
                {"driver": "qcow2", "node-name": name, "backing": below, **options}
            )
            node.monitor_owned = True
            writer = BlockBackend(system.graph, perm=Perm.WRITE, shared=Perm.ALL)
            writer.insert(node)
            await writer.write(0, bytes([number + 1]) * 64 * KiB)
            await writer.write(number * MiB + 512, bytes([number + 1]) * (MiB - 512))
            writer.close()
            below = name
        disk = BlockBackend(
            system.graph, "disk", perm=Perm.CONSISTENT_READ | Perm.WRITE, shared=Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        )
        disk.insert(system.graph.find_node("top"))
        yield Chain(system, disk, events, directory)


class Faulty:
    """Makes all reads (or writes) of a node's storage fail until mended."""

    def __init__(self, node: BlockDriverState, method: str = "read_into", error: int = errno.EIO) -> None:
        assert node.storage is not None
        self.driver, self.method, self.error = node.storage.node.driver, method, error
        setattr(self.driver, method, self.fail)

    async def fail(self, *args: object, **members: object) -> None:
        """What the storage does instead."""
        raise BlockIOError(self.error)

    def mend(self) -> None:
        """The storage works again."""
        vars(self.driver).pop(self.method, None)
