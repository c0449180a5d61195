"""What can be done to dirty bitmaps, alone or in a transaction.

Models semantics.md section 11; the rules are in `qblock.bitmaps`. As in QEMU a bitmap changes
when the action is prepared, so that the next one can use it; one that is to be removed is busy until that is final. A
persistent one is taken out of its image when the transaction is committed; QEMU does so when it is prepared.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import attrs

from qblock.actions.action import Action
from qblock.bitmaps import BitmapUse, bitmap_of, check_merge, check_use, forget_stored, new_bitmap
from qblock.dirty import DirtyBitmap, DirtyContent
from qblock.errors import QBlockError
from qblock.graph import Graph
from qblock.node import BlockDriverState

if TYPE_CHECKING:
    from qblock.system import BlockSystem

@attrs.frozen
class BitmapName:
    """Names a bitmap: ``name`` on the device or node ``node``."""

    node: str
    name: str


def find_bitmap(graph: Graph, node_name: str, name: str) -> tuple[BlockDriverState, DirtyBitmap]:
    """The node and its bitmap; raises `NodeNotFound` or `CommandError`."""
    node = graph.lookup(node_name)
    return node, bitmap_of(node, name)


class BitmapAction(Action):
    """An action on a bitmap of the device or node ``node``. None of its steps waits, so `perform_alone` can do it at once."""

    def __init__(self, system: BlockSystem, node: str) -> None:
        super().__init__(system)
        self.node_name = node

    def watched(self) -> Iterable[BlockDriverState]:
        """See `Action`: what is written meanwhile must be in the bitmap or not, for sure."""
        graph = self.system.graph
        device = [backend.root.node for backend in graph.backends if backend.root and backend.name == self.node_name]
        if self.node_name and device:
            return device[:1]
        return [graph.nodes[self.node_name]] if self.node_name in graph.nodes else []

    @abc.abstractmethod
    def change(self) -> None:
        """Do it, or raise and have done nothing."""

    @abc.abstractmethod
    def undo(self) -> None:
        """Make it as it was before `change`."""

    async def prepare(self) -> None:
        """See `Action`."""
        self.change()

    def commit(self) -> None:
        """See `Action`: it is done already."""

    async def abort(self) -> None:
        """See `Action`."""
        self.undo()

    def perform_alone(self) -> None:
        """Do this action by itself. As in QEMU that drains nothing."""
        self.change()
        self.commit()


class AddBitmap(BitmapAction):
    """``block-dirty-bitmap-add``. ``granularity`` in bytes, None for the default."""

    kind: ClassVar[str] = "block-dirty-bitmap-add"

    def __init__(
        self,
        system: BlockSystem,
        bitmap: BitmapName,
        *,
        granularity: int | None = None,
        persistent: bool = False,
        disabled: bool = False,
    ) -> None:
        super().__init__(system, bitmap.node)
        self.name = bitmap.name
        self.granularity = granularity
        self.persistent = persistent
        self.disabled = disabled
        self._added: tuple[BlockDriverState, DirtyBitmap] | None = None

    def change(self) -> None:
        """See `BitmapAction`."""
        node = self.system.graph.lookup(self.node_name)
        bitmap = new_bitmap(
            node, self.name, granularity=self.granularity, persistent=self.persistent, enabled=not self.disabled
        )
        node.dirty_bitmaps.append(bitmap)
        self._added = node, bitmap

    def undo(self) -> None:
        """See `BitmapAction`."""
        assert self._added is not None
        node, bitmap = self._added
        node.dirty_bitmaps.remove(bitmap)


class _Named(BitmapAction):
    """An action on a bitmap that there is already."""

    def __init__(self, system: BlockSystem, bitmap: BitmapName) -> None:
        super().__init__(system, bitmap.node)
        self.name = bitmap.name
        self._node: BlockDriverState
        self._bitmap: DirtyBitmap

    def _find(self, use: BitmapUse) -> DirtyBitmap:
        self._node, self._bitmap = find_bitmap(self.system.graph, self.node_name, self.name)
        check_use(self._bitmap, use)
        return self._bitmap


class RemoveBitmap(_Named):
    """``block-dirty-bitmap-remove``: the bitmap is busy until it is sure that it goes."""

    kind: ClassVar[str] = "block-dirty-bitmap-remove"

    def change(self) -> None:
        """See `BitmapAction`."""
        self._find(BitmapUse.REMOVE).busy = True

    def commit(self) -> None:
        """See `Action`."""
        self._node.dirty_bitmaps.remove(self._bitmap)

    async def afterwards(self) -> None:
        """See `Action`."""
        try:
            await self.forget()
        except QBlockError as error:
            self.system.env.warn(f"Bitmap '{self.name}' could not be taken out of its image: {error}")

    async def forget(self) -> None:
        """Take a persistent bitmap out of its image; see `bitmaps.forget_stored`."""
        await forget_stored(self._node, self._bitmap)

    def undo(self) -> None:
        """See `BitmapAction`."""
        self._bitmap.busy = False


class _Switch(_Named):
    enabled: ClassVar[bool]

    def change(self) -> None:
        """See `BitmapAction`."""
        bitmap = self._find(BitmapUse.SWITCH)
        self._was_enabled = bitmap.enabled
        bitmap.enabled = self.enabled

    def undo(self) -> None:
        """See `BitmapAction`."""
        self._bitmap.enabled = self._was_enabled


class EnableBitmap(_Switch):
    """``block-dirty-bitmap-enable``: record writes from now on."""

    kind: ClassVar[str] = "block-dirty-bitmap-enable"
    enabled: ClassVar[bool] = True


class DisableBitmap(_Switch):
    """``block-dirty-bitmap-disable``: stop recording; what is dirty stays dirty."""

    kind: ClassVar[str] = "block-dirty-bitmap-disable"
    enabled: ClassVar[bool] = False


class ClearBitmap(_Named):
    """``block-dirty-bitmap-clear``: make all of it clean."""

    kind: ClassVar[str] = "block-dirty-bitmap-clear"

    def change(self) -> None:
        """See `BitmapAction`."""
        bitmap = self._find(BitmapUse.CHANGE)
        self._before: DirtyContent = bitmap.content()
        bitmap.clear()

    def undo(self) -> None:
        """See `BitmapAction`."""
        self._bitmap.restore(self._before)


class MergeBitmaps(_Named):
    """``block-dirty-bitmap-merge``: add what is dirty in ``sources`` to one bitmap."""

    kind: ClassVar[str] = "block-dirty-bitmap-merge"

    def __init__(self, system: BlockSystem, bitmap: BitmapName, sources: Sequence[BitmapName]) -> None:
        super().__init__(system, bitmap)
        self.sources = sources

    def change(self) -> None:
        """See `BitmapAction`."""
        target = self._find(BitmapUse.CHANGE)
        found = [self._source(source, target) for source in self.sources]
        self._before: DirtyContent = target.content()
        for bitmap in found:
            target.merge(bitmap)

    def _source(self, source: BitmapName, target: DirtyBitmap) -> DirtyBitmap:
        _, bitmap = find_bitmap(self.system.graph, source.node, source.name)
        check_merge(bitmap, target)
        return bitmap

    def undo(self) -> None:
        """See `BitmapAction`."""
        self._bitmap.restore(self._before)
