"""External snapshots: an overlay takes the place of a node, which becomes its backing image.

Models ``blockdev-snapshot`` and ``blockdev-snapshot-sync`` (semantics.md section 10.5) with QEMU's order of checks; the single
commands are transactions of one action, as there. Afterwards the old image is read-only, the overlay has taken its place
above it, and only ``blockdev-snapshot-sync`` has written a header. Undone, it leaves a file that it has made.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import attrs

from qblock.actions.action import Action
from qblock.blockers import OpType
from qblock.creating import create_image_file
from qblock.drain import drained
from qblock.driver import SupportsBacking
from qblock.errors import CommandError, InvalidParameter, QBlockError
from qblock.filtering import FilterDriver
from qblock.naming import link_to
from qblock.node import BlockDriverState
from qblock.nodespec import NodeFlags
from qblock.permissions import Perm
from qblock.requests import flush, refresh_length, refresh_lengths_above
from qblock.transaction import Transaction

if TYPE_CHECKING:
    from qblock.system import BlockSystem

FindNode = Callable[[], BlockDriverState]
"""Finds what an action is about when its turn has come; raises `CommandError`."""


class _Snapshot(Action):
    """Puts an overlay on top of the node that ``find`` gives."""

    def __init__(self, system: BlockSystem, find: FindNode) -> None:
        super().__init__(system)
        self._find = find
        self._change = Transaction()
        self._node: BlockDriverState
        self._is_filter = False
        self._above: BlockDriverState

    @abc.abstractmethod
    async def _overlay(self, node: BlockDriverState) -> BlockDriverState:
        """What is to take the place of ``node``."""

    async def prepare(self) -> None:
        """See `Action`."""
        node = self._node = self._find()
        await self.drain(node)
        self.system.graph.check_op(node, OpType.EXTERNAL_SNAPSHOT)
        if not node.read_only:
            await flush(node)
        overlay = await self._overlay(node)
        self._above = overlay
        async with drained(overlay):
            _check_overlay(overlay)
            self.system.graph.check_op(node, OpType.EXTERNAL_SNAPSHOT)
            try:
                self.system.graph.append(overlay, onto=node, change=self._change)
                if isinstance(overlay.driver, FilterDriver):
                    self._is_filter = True
                    refresh_length(overlay)
                    overlay.driver.check_place()
            except BaseException:
                self._change.abort()
                raise

    def commit(self) -> None:
        """See `Action`."""
        self._change.commit()
        refresh_lengths_above(self._above)

    async def afterwards(self) -> None:
        """See `Action`: the image below is not written to any more, unless what was put over it is a filter."""
        node = self._node
        if node.driver.supports_reopen and not node.read_only and not self._is_filter:
            with contextlib.suppress(QBlockError):
                await self.system.opener.reopen(node, read_only=True)

    async def abort(self) -> None:
        """See `Action`."""
        self._change.abort()


class Snapshot(_Snapshot):
    """``blockdev-snapshot``: the overlay is the device or node ``overlay``, opened before with backing null."""

    kind: ClassVar[str] = "blockdev-snapshot"

    def __init__(self, system: BlockSystem, *, node: str, overlay: str) -> None:
        super().__init__(system, lambda: system.graph.lookup(node))
        self._overlay_name = overlay

    async def _overlay(self, node: BlockDriverState) -> BlockDriverState:
        return self.system.graph.lookup(self._overlay_name)


@attrs.frozen(kw_only=True)
class SnapshotFile:
    """The file of an overlay: to be made (``create``) or there already. ``node_name`` is for its node; ``names_node`` tells
    that the node to be snapshotted was given by the name of a node.
    """

    filename: str
    format: str = "qcow2"
    node_name: str | None = None
    create: bool = True
    names_node: bool = False


class SnapshotToFile(_Snapshot):
    """``blockdev-snapshot-sync``: the overlay is an image file, which is made first unless it exists."""

    kind: ClassVar[str] = "blockdev-snapshot-sync"

    def __init__(self, system: BlockSystem, find: FindNode, target: SnapshotFile) -> None:
        super().__init__(system, find)
        self.target = target
        self._opened: BlockDriverState | None = None

    async def _overlay(self, node: BlockDriverState) -> BlockDriverState:
        target, graph = self.target, self.system.graph
        if target.names_node and target.node_name is None:
            raise InvalidParameter("snapshot-node-name", "is needed when a node is named, since it will be below")
        if target.node_name is not None:
            graph.check_name_is_free(target.node_name)
        if target.create:
            await self._create(node)
        overlay = await self.system.opener.open_image(
            target.filename, fmt=target.format, read_only=node.read_only, backing=False, node_name=target.node_name,
            inherited=NodeFlags.of(node).for_another(),
        )  # fmt: skip
        overlay.monitor_owned = True  # until it has users of its own
        self._opened = overlay
        return overlay

    async def _create(self, node: BlockDriverState) -> None:
        """An image whose header names ``node``'s image as its backing file."""
        system, fmt = self.system, self.target.format
        image = system.graph.skip_filters(node)
        driver = system.registry.get(fmt)
        if not driver.supports_backing or not issubclass(driver, SupportsBacking):
            raise CommandError(f"Images of format '{fmt}' cannot have a backing file")
        link = link_to(image)
        await create_image_file(
            system.opener, self.target.filename, fmt, size=node.length, backing=link, announce=system.announce
        )

    async def prepare(self) -> None:
        """See `Action`."""
        try:
            await super().prepare()
        except BaseException:
            await self._let_go()
            raise

    async def afterwards(self) -> None:
        """See `Action`."""
        await super().afterwards()
        await self._let_go()

    async def abort(self) -> None:
        """See `Action`."""
        await super().abort()
        await self._let_go()

    async def _let_go(self) -> None:
        """Close the overlay if nobody else uses it."""
        if self._opened is not None:
            self._opened.monitor_owned = False
            self._opened = None
            await self.system.opener.close_orphans()


def _check_overlay(overlay: BlockDriverState) -> None:
    for edge in overlay.parents:
        # Who only writes, as a job that fills the overlay does, need not see it complete.
        if Perm.CONSISTENT_READ in edge.perm:
            raise CommandError(f"The overlay '{overlay.node_name}' is in use: {edge.parent.describe_user()}")
    if overlay.backing is not None:
        raise CommandError(f"The overlay '{overlay.node_name}' has a backing image already; open it with backing null")
    if not (overlay.driver.supports_backing or _awaits_place(overlay)):
        raise CommandError(f"The overlay '{overlay.node_name}' ({overlay.driver.name}) cannot have a backing image")


def _awaits_place(overlay: BlockDriverState) -> bool:
    """Whether it is a filter that was opened to be put over something (``blkmirror:FORMAT:target``)."""
    return overlay.driver.is_filter and overlay.filtered is None
