"""The ``throttle`` filter: requests wait so that those of all members of a group keep to the group's limits.

Models QEMU's filter of that name (semantics.md section 13): reads, writes, zero writes and discards are counted, flushes are not.
The group is made by ``object-add``, or by a drive that has limits of its own.
"""

from __future__ import annotations

from typing import Any, ClassVar

from attrs import frozen

from qblock import requests
from qblock.environment import Environment
from qblock.filtering import FilterDriver
from qblock.node import BlockDriverState
from qblock.options import ChildRef, DriverOptions, child, required
from qblock.permissions import ChildRole
from qblock.throttling import ThrottleMember


@frozen
class ThrottleOptions(DriverOptions):
    """``BlockdevOptionsThrottle``."""

    throttle_group: str = required(doc="the group whose limits hold", since="2.11")
    file: ChildRef = child(ChildRole.FILTERED, doc="the node to which requests go", since="2.11")


class ThrottleDriver(FilterDriver):
    """A member of a throttle group. The group can be changed while the node is open."""

    name: ClassVar[str] = "throttle"
    options_class: ClassVar[type[DriverOptions]] = ThrottleOptions
    supports_copy_range: ClassVar[bool] = False
    supports_compressed: ClassVar[bool] = True

    options: ThrottleOptions
    member: ThrottleMember | None = None

    def __init__(self, node: BlockDriverState, options: Any, env: Environment) -> None:
        super().__init__(node, options, env)
        self._next_member: ThrottleMember | None = None

    async def open(self) -> None:
        """See `Driver`. Raises `CommandError` when there is no such group."""
        self.member = self._join(self.options)

    def _join(self, options: ThrottleOptions) -> ThrottleMember:
        member = self.env.throttle_groups.find(options.throttle_group).join()
        member.set_drained(self.node.quiesce_counter > 0)
        return member

    async def close(self) -> None:
        """See `Driver`."""
        if self.member is not None:
            self.member.leave()

    async def _admit(self, length: int, *, is_write: bool) -> None:
        assert self.member is not None, f"{self.node!r} is not open"
        await self.member.admit(length, is_write=is_write)

    # ------------------------------------------------------------------------------------------------------- requests

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        await self._admit(len(buffer), is_write=False)
        await super().read_into(offset, buffer)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        await self._admit(len(buffer), is_write=True)
        await super().write_from(offset, buffer, fua=fua)

    async def write_compressed(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        await self._admit(len(buffer), is_write=True)
        await requests.write_compressed(self.child, offset, buffer)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`."""
        await self._admit(length, is_write=True)
        await super().write_zeroes(offset, length, may_unmap=may_unmap, no_fallback=no_fallback, fua=fua)

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`."""
        await self._admit(length, is_write=True)
        await super().discard(offset, length)

    # ----------------------------------------------------------------------------------------------- drain and reopen

    def drained_begin(self) -> None:
        """See `Driver`: what waits for the limits goes on at once."""
        if self.member is not None:
            self.member.set_drained(True)

    def drained_end(self) -> None:
        """See `Driver`."""
        if self.member is not None:
            self.member.set_drained(False)

    def check_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`: the group can be changed; children are the graph's."""
        assert isinstance(options, ThrottleOptions)

    async def prepare_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`. Raises `CommandError` when there is no group of the new name."""
        if options.throttle_group != self.options.throttle_group:
            self._next_member = self._join(options)

    def commit_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`: the old group is left; nothing waits in it, since the node is drained."""
        super().commit_reopen(options, read_only=read_only)
        if self._next_member is not None:
            left, self.member = self.member, self._next_member
            self._next_member = None
            assert left is not None, f"{self.node!r} is not open"
            left.leave()

    def abort_reopen(self) -> None:
        """See `Driver`."""
        if self._next_member is not None:
            self._next_member.leave()
            self._next_member = None
