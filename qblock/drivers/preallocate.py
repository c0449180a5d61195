"""The ``preallocate`` filter: below a format, the file grows in large steps.

Models QEMU's filter of that name (semantics.md section 17). A write behind the end makes room up to a boundary well beyond it,
as zeroes; the surplus is not part of the node, and is cut off when the node is closed, is made read-only, or has no parent any
more that may resize it. It works only while a parent takes the write and resize permissions; without these it passes
everything on. As long as there is a surplus the filter keeps both permissions on its child, so that it can cut.

Differs from QEMU in that ``prealloc-align`` cannot be 0.

Two ends are kept: that of the data, which is the length of the node, and that of the file, which is the child's. ``_growing``
protects the area behind the end of the file as it was when the lock was taken: what writes there waits until room is made.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar, Final

from attrs import frozen

from qblock import requests
from qblock.environment import Environment
from qblock.errors import BlockIOError, InvalidParameter
from qblock.filtering import FilterDriver
from qblock.node import BdrvChild, BlockDriverState
from qblock.options import ChildRef, DriverOptions, child, option
from qblock.permissions import ChildRole, Perm, PermissionPair
from qblock.units import MiB, align_up

_NEEDED: Final = Perm.WRITE | Perm.RESIZE
_SECTOR: Final = 512


@frozen
class PreallocateOptions(DriverOptions):
    """``BlockdevOptionsPreallocate``. Sizes are bytes."""

    file: ChildRef = child(ChildRole.FILTERED, doc="the node whose file grows", since="6.0")
    prealloc_align: int = option(MiB, doc="the file ends at a multiple of this", since="6.0")
    prealloc_size: int = option(128 * MiB, doc="how far the file goes beyond a write, at least", since="6.0")


class PreallocateDriver(FilterDriver):
    """Keeps a surplus behind the data. ``data_end`` is None while the filter has not got its permissions."""

    name: ClassVar[str] = "preallocate"
    options_class: ClassVar[type[DriverOptions]] = PreallocateOptions
    reopens_with: ClassVar[frozenset[str]] = frozenset({"prealloc-align", "prealloc-size"})
    hides_surplus: ClassVar[bool] = True

    options: PreallocateOptions

    def __init__(self, node: BlockDriverState, options: Any, env: Environment) -> None:
        super().__init__(node, options, env)
        self.data_end: int | None = None
        self._file_end = 0
        self._growing = asyncio.Lock()

    async def open(self) -> None:
        """See `Driver`. Raises `InvalidParameter`."""
        self._check(self.options)

    def length(self) -> int:
        """See `Driver`: without the surplus."""
        return self.child.node.driver.length() if self.data_end is None else self.data_end

    @property
    def surplus(self) -> int:
        """Bytes of the file behind the data."""
        return 0 if self.data_end is None else max(0, self._file_end - self.data_end)

    # ------------------------------------------------------------------------------------------------------- requests

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        await self._make_room(offset + len(buffer))
        await super().write_from(offset, buffer, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`."""
        await self._make_room(offset + length)
        await super().write_zeroes(offset, length, may_unmap=may_unmap, no_fallback=no_fallback, fua=fua)

    async def receive_range(self, offset: int, source: BdrvChild, source_offset: int, length: int) -> None:
        """See `Driver`."""
        await self._make_room(offset + length)
        await super().receive_range(offset, source, source_offset, length)

    async def _make_room(self, end: int) -> None:
        """Before a write up to ``end``: the file reaches there, and beyond, or the write will make it so."""
        if self.data_end is None:
            return
        if end > self._file_end:
            async with self._growing:
                start = max(self._file_end, self.data_end)
                self.data_end = max(self.data_end, end)
                if end > self._file_end:
                    await self._grow(start, align_up(end + self.options.prealloc_size, self.options.prealloc_align))
        self.data_end = max(self.data_end, end)

    async def _grow(self, start: int, target: int) -> None:
        try:
            await requests.write_zeroes(self.child, start, target - start, no_fallback=True)
        except BlockIOError:
            pass  # full, or unable to: then the file grows by the write itself
        self._file_end = self.child.node.driver.length()

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """See `Driver`: an added area is what the caller wants it to be; the surplus serves only where that is ``falloc``."""
        async with self._growing:
            if self.data_end is not None and length > self.data_end:
                if preallocation == "falloc" and length <= self._file_end:
                    self.data_end = length
                    return
                await self._cut()
            await super().truncate(length, exact=exact, preallocation=preallocation)
            if self.data_end is not None:
                self.data_end = self._file_end = self.child.node.driver.length()

    async def _cut(self) -> None:
        """Cut the surplus off; ``_growing`` is held."""
        if not self.surplus:
            return
        assert self.data_end is not None
        self._file_end = self.data_end  # who writes behind it from now on waits for the lock
        await requests.truncate(self.child, self.data_end)

    # ---------------------------------------------------------------------------------------- permissions and the end

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """See `Driver`: nobody else may change a file that has a surplus, or could get one."""
        pair = super().child_permissions(role, perm, shared)
        if perm & _NEEDED != _NEEDED and not self.surplus:
            return pair
        return PermissionPair(pair.perm | _NEEDED, pair.shared & ~_NEEDED)

    def set_permissions(self, perm: Perm, shared: Perm) -> None:
        """See `Driver`: begin to preallocate, or stop."""
        is_active = perm & _NEEDED == _NEEDED
        self.unsettled = self.surplus > 0 and not is_active
        if is_active and self.data_end is None:
            self.data_end = self._file_end = self.child.node.driver.length()
        elif not is_active and not self.surplus:
            self.data_end = None

    async def settle(self) -> None:
        """See `Driver`: cut the surplus off, unless the node may be resized again by now."""
        async with self._growing:
            if not self.unsettled:
                return
            self.unsettled = False
            try:
                await self._cut()
            except BlockIOError as error:
                self.env.warn(f"Node '{self.node.node_name}': what was preallocated could not be cut off: {error}")
            self.data_end = None

    async def close(self) -> None:
        """See `Driver`."""
        async with self._growing:
            await self._cut()

    # --------------------------------------------------------------------------------------------------------- reopen

    def check_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`: both sizes can be changed; children are the graph's. Raises `InvalidParameter`."""
        self._check(options)

    async def prepare_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`: a node that becomes read-only, or lies on another file, cannot cut any more."""
        async with self._growing:
            await self._cut()

    def commit_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`: the file may be another one now."""
        super().commit_reopen(options, read_only=read_only)
        if self.data_end is not None:
            self.data_end = self._file_end = self.child.node.driver.length()
            requests.refresh_length(self.node)

    def _check(self, options: PreallocateOptions) -> None:
        unit = max(_SECTOR, self.child.node.driver.limits.request_alignment)
        if options.prealloc_align < unit or options.prealloc_align % unit:
            raise InvalidParameter("prealloc-align", f"cannot be {options.prealloc_align}: it must be a multiple of {unit}")
        if options.prealloc_size < 0:
            raise InvalidParameter("prealloc-size", f"cannot be negative ({options.prealloc_size})")
