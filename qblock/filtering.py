"""`FilterDriver`: the base of drivers that pass requests on to one child at the same place; `outcomes` for those with several.

Models QEMU's filter drivers (semantics.md sections 7 and 17): a filter has one filtered child, is as long as it, and block
status and chains look through it. A subclass overrides what it does differently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from qblock import requests
from qblock.driver import Driver, NodeInfo
from qblock.errors import BlockIOError
from qblock.extents import Extent

if TYPE_CHECKING:
    from qblock.node import BdrvChild


async def outcomes(work: Iterable[Coroutine[Any, Any, None]]) -> list[BlockIOError | None]:
    """Do all of ``work`` at once, each to its end; the errors, None for what has been done well."""

    async def outcome(one: Coroutine[Any, Any, None]) -> BlockIOError | None:
        try:
            await one
        except BlockIOError as error:
            return error
        return None

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(outcome(one)) for one in work]
    return [task.result() for task in running]


class FilterDriver(Driver):
    """Forwards everything to the filtered child, whose edge is `child`."""

    is_filter: ClassVar[bool] = True
    supports_write_zeroes: ClassVar[bool] = True
    supports_discard: ClassVar[bool] = True
    supports_copy_range: ClassVar[bool] = True
    hides_surplus: ClassVar[bool] = False
    """True when the child may be longer than the filter, by what nobody has asked for yet."""

    @property
    def child(self) -> BdrvChild:
        """The edge to the filtered child."""
        edge = self.node.filtered
        assert edge is not None, f"{self.node!r} has no filtered child"
        return edge

    async def open(self) -> None:
        """See `Driver`: nothing to read."""

    def check_place(self) -> None:
        """Raise `CommandError` when the filter, which was opened by itself, cannot be over the node that it has been put over."""

    def length(self) -> int:
        """See `Driver`: the child's; what it was last, once the filter is taken out."""
        edge = self.node.filtered
        return self.node.length if edge is None else edge.node.length

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        await requests.read_into(self.child, offset, buffer)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        await requests.write_from(self.child, offset, buffer, fua=fua)

    async def flush(self) -> None:
        """See `Driver`: nothing to do once the filter is taken out."""
        edge = self.node.filtered
        if edge is None:
            return
        below = edge.node
        if below.driver.wants_debug_events:
            await below.driver.reach_event("flush_to_os")
            await below.driver.reach_event("flush_to_disk")
        await requests.flush(below)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`."""
        await requests.write_zeroes(self.child, offset, length, may_unmap=may_unmap, no_fallback=no_fallback, fua=fua)

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`."""
        await requests.discard(self.child, offset, length)

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """See `Driver`."""
        return await requests.block_status(self.child.node, offset, length, want_zero=want_zero)

    async def copy_range(self, offset: int, target: BdrvChild, target_offset: int, length: int) -> None:
        """See `Driver`."""
        await requests.copy_range(self.child, offset, target, target_offset, length)

    async def receive_range(self, offset: int, source: BdrvChild, source_offset: int, length: int) -> None:
        """See `Driver`."""
        await requests.copy_range(source, source_offset, self.child, offset, length)

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """See `Driver`."""
        await requests.truncate(self.child, length, exact=exact, preallocation=preallocation)

    def info(self) -> NodeInfo:
        """See `Driver`: the child's."""
        return self.child.node.driver.info()

    def filename(self) -> str | None:
        """See `Driver`: None, since the filter is needed to open this again."""
        return None
