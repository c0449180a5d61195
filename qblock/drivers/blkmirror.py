"""The ``blkmirror`` filter: what is written to one image is written to a second one as well.

Models the driver of the proposal of March 2012 that the seed competed with (rfc-2012.md): reads go to the source, the filtered
child ``file``; writes, zero writes and discards go to the source and to ``target`` at the same time, the request is done when
both are, and the first error is the guest's; a flush goes to the source only. The target is opened without its backing file.
It is a filter and no job: it copies nothing by itself. What was there before has to be streamed through it
(`jobs/stream_through.py`), and until then the target is no copy of anything.

A file name ``blkmirror:FORMAT:target`` or ``blkmirror:target`` gives a node without a source, to be put over one
(`Graph.append`); until that has happened its requests fail with ``ENOMEDIUM``.

Three things differ from the proposal, each where a literal reading of it would give a target that differs from the guest's disk.
Requests that overlap go one after the other, so that the same one wins on both sides. Where the target's header names a backing
file (which shows again when the target is opened with it), a cluster that the target does not have yet is written whole, its
other bytes read from the source, and a discard becomes a zero write there, since an empty cluster would uncover old data. And
the target follows when the disk is resized.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, ClassVar, Final

from attrs import define, field, frozen

from qblock import requests
from qblock.driver import Json, NodeInfo, SupportsBacking
from qblock.errors import BlockIOError, CommandError
from qblock.extents import Unallocated
from qblock.filtering import FilterDriver
from qblock.options import ChildRef, DriverOptions, child
from qblock.permissions import ANY_WRITE, ChildRole, Perm, PermissionPair
from qblock.serialising import wake_waiters
from qblock.units import align_down, align_up

if TYPE_CHECKING:
    from qblock.node import BdrvChild

PREFIX: Final = "blkmirror:"


# ---------------------------------------------------------------------------------------------------------------- names


@frozen
class BlkmirrorName:
    """What ``blkmirror:FORMAT:target`` says; ``format`` is None when it is to be probed."""

    format: str | None
    target: str


def parse_blkmirror_name(name: str) -> BlkmirrorName:
    """Take a name of the form ``blkmirror:FORMAT:target`` or ``blkmirror:target`` apart; raises `CommandError`.

    What stands before the next colon is the format unless there is a slash in it, so a path may have colons in it, and a
    relative one with a colon in its first part is written ``./a:b``. A ``json:`` name stands for itself.
    """
    rest = name.removeprefix(PREFIX)
    if rest == name:
        raise CommandError(f"'{name}' does not begin with '{PREFIX}'")
    first, colon, target = rest.partition(":")
    if not colon or "/" in first or first == "json":
        first, target = "", rest
    elif not first:
        raise CommandError(f"'{name}' has no format between its colons; leave out one of them to have it probed")
    if not target:
        raise CommandError(f"'{name}' names no target; it is to be {PREFIX}FORMAT:target or {PREFIX}target")
    return BlkmirrorName(first or None, target)


# --------------------------------------------------------------------------------------------------------------- driver


@frozen
class BlkmirrorOptions(DriverOptions):
    """The options of a mirror; without ``file`` it waits to be put over its source."""

    file: ChildRef = child(ChildRole.FILTERED, doc="the source: what the guest reads", optional=True)
    target: ChildRef = child(ChildRole.DATA, doc="the second image that is written", standalone=True)


@define(eq=False)
class _Claim:
    """A range in which a request writes, and who waits for its end."""

    start: int
    end: int
    waiters: list[asyncio.Future[None]] = field(factory=list)


class BlkmirrorDriver(FilterDriver):
    """See the module."""

    name: ClassVar[str] = "blkmirror"
    options_class: ClassVar[type[DriverOptions]] = BlkmirrorOptions
    supports_copy_range: ClassVar[bool] = False
    names_whole_nodes: ClassVar[bool] = True

    options: BlkmirrorOptions

    @property
    def child(self) -> BdrvChild:
        """The edge to the source; raises ``BlockIOError(ENOMEDIUM)`` when there is none yet."""
        edge = self.node.filtered
        if edge is None:
            raise BlockIOError(errno.ENOMEDIUM, f"Node '{self.node.node_name}' has not been put over a source yet")
        return edge

    @property
    def target(self) -> BdrvChild:
        """The edge to the target."""
        return self.node.children["target"]

    @cached_property
    def hides_backing(self) -> bool:
        """Whether the target's header names a backing file, which is not open."""
        driver = self.target.node.driver
        return isinstance(driver, SupportsBacking) and driver.backing_link() is not None

    @cached_property
    def _unit(self) -> int:
        """Parts of what many bytes the target must not be given, where it has none of these bytes yet."""
        return max(self.target.node.driver.info().cluster_size, 1) if self.hides_backing else 1

    @cached_property
    def _claims(self) -> list[_Claim]:
        return []

    async def open(self) -> None:
        """See `Driver`. Raises `CommandError` when the target cannot be one."""
        self.check_place()

    def check_place(self) -> None:
        """See `FilterDriver`: also when the target is open with its backing file, or shorter than the source."""
        target = self.target.node
        if target.backing is not None:
            raise CommandError(
                f"Node '{target.node_name}' is open with its backing image '{target.backing.node.node_name}', and cannot be "
                "the target of a blkmirror: open it with backing null"
            )
        source = self.node.filtered
        if source is not None and target.length < source.node.length:
            raise CommandError(
                f"The target '{target.node_name}' has {target.length} bytes: too few for a copy of '{source.node.node_name}', "
                f"which has {source.node.length}"
            )

    async def close(self) -> None:
        """See `Driver`."""
        if (hit := self.env.trace.blkmirror_remove) is not None:
            hit(node=self.node.node_name)

    def length(self) -> int:
        """See `Driver`: the source's; the target's while there is no source."""
        return self.target.node.length if self.node.filtered is None else super().length()

    def info(self) -> NodeInfo:
        """See `Driver`: the source's."""
        return NodeInfo() if self.node.filtered is None else super().info()

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """See `Driver`: on the target writing when anybody writes, and nobody else may; that others look is their affair."""
        if role is ChildRole.FILTERED:
            return super().child_permissions(role, perm, shared)
        writes = Perm.WRITE if perm & ANY_WRITE else Perm.NONE
        return PermissionPair(writes | perm & Perm.RESIZE, Perm.CONSISTENT_READ)

    @classmethod
    def parse_filename(cls, filename: str, parse: Callable[[str], dict[str, Json]]) -> dict[str, Json]:
        """See `Driver`: ``blkmirror:FORMAT:target`` or ``blkmirror:target``; the source comes when the node is put over it."""
        name = parse_blkmirror_name(filename)
        storage = parse(name.target)
        if name.format is None:
            return {"driver": cls.name, "target": {"file": storage}}
        if name.format == storage["driver"]:
            return {"driver": cls.name, "target": storage}
        return {"driver": cls.name, "target": {"driver": name.format, "file": storage}}

    # ------------------------------------------------------------------------------------------------------- requests

    async def flush(self) -> None:
        """See `Driver`: the source only."""
        if (hit := self.env.trace.blkmirror_flush) is not None:
            hit(node=self.node.node_name)
        await super().flush()

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        if (hit := self.env.trace.blkmirror_write) is not None:
            hit(node=self.node.node_name, offset=offset, length=len(buffer))
        await self._both(
            offset,
            len(buffer),
            partial(super().write_from, offset, buffer, fua=fua),
            partial(self._write_target, offset, buffer),
        )

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`."""
        if (hit := self.env.trace.blkmirror_write_zeroes) is not None:
            hit(node=self.node.node_name, offset=offset, length=length)
        how = {"may_unmap": may_unmap, "no_fallback": no_fallback}
        await self._both(
            offset,
            length,
            partial(super().write_zeroes, offset, length, fua=fua, **how),
            partial(self._zero_target, offset, length, **how),
        )

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`."""
        if (hit := self.env.trace.blkmirror_discard) is not None:
            hit(node=self.node.node_name, offset=offset, length=length)
        await self._both(
            offset, length, partial(super().discard, offset, length), partial(self._discard_target, offset, length)
        )

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """See `Driver`: both; the target is never shorter than the source."""
        source, target = self.child, self.target
        for edge in (target, source) if length > source.node.length else (source, target):
            await requests.truncate(edge, length, exact=exact, preallocation=preallocation)

    async def _both(
        self, offset: int, length: int, source: Callable[[], Awaitable[None]], target: Callable[[], Awaitable[None]]
    ) -> None:
        """Let both change the range at the same time; raises the first error when both have ended."""
        unit = self._unit
        claim = await self._claim(align_down(offset, unit), align_up(offset + length, unit))
        errors: list[tuple[str, Exception]] = []
        try:
            async with asyncio.TaskGroup() as sides:
                sides.create_task(_note_error("target", target, errors), name=f"{self.node.node_name}: target")
                await _note_error("source", source, errors)
        finally:
            self._claims.remove(claim)
            wake_waiters(claim.waiters)
        if errors:
            if (hit := self.env.trace.blkmirror_error) is not None:
                for side, error in errors:
                    hit(node=self.node.node_name, side=side, offset=offset, length=length, error=error)
            raise errors[0][1]

    async def _claim(self, start: int, end: int) -> _Claim:
        """Wait until no older request is at the range; a younger one waits for this one."""
        claim = _Claim(start, end)
        self._claims.append(claim)
        try:
            while (other := self._older_conflict(claim)) is not None:
                waiter = asyncio.get_running_loop().create_future()
                other.waiters.append(waiter)
                await waiter
        except BaseException:
            self._claims.remove(claim)
            wake_waiters(claim.waiters)
            raise
        return claim

    def _older_conflict(self, claim: _Claim) -> _Claim | None:
        for other in self._claims:
            if other is claim:
                return None
            if other.start < claim.end and claim.start < other.end:
                return other
        raise AssertionError("the claim is not registered")

    # ----------------------------------------------------------------------------------------------------- the target

    async def _write_target(self, offset: int, buffer: memoryview) -> None:
        start, end = await self._complete_ends(offset, offset + len(buffer), buffer)
        if start < end:
            await requests.write_from(self.target, start, buffer[start - offset : end - offset])

    async def _zero_target(self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool) -> None:
        start, end = await self._complete_ends(offset, offset + length, None)
        if start < end:
            await requests.write_zeroes(
                self.target, start, end - start, may_unmap=may_unmap, no_fallback=no_fallback
            )

    async def _discard_target(self, offset: int, length: int) -> None:
        if not self.hides_backing:
            await requests.discard(self.target, offset, length)
            return
        end = offset + length
        start, stop = align_up(offset, self._unit), end if end == self.length() else align_down(end, self._unit)
        if start < stop:
            await requests.write_zeroes(self.target, start, stop - start, may_unmap=True)

    async def _complete_ends(self, offset: int, end: int, data: memoryview | None) -> tuple[int, int]:
        """Write the first and the last cluster of a request whole where it covers a part that the target does not have.

        ``data`` is what the request writes (None: zeroes). Returns start and end of what is still to be written.
        """
        start, stop = offset, end
        if self._unit == 1:
            return start, stop
        if await self._complete(align_down(offset, self._unit), offset, end, data):
            start = min(align_down(offset, self._unit) + self._unit, end)
        last = align_down(end - 1, self._unit)
        if start <= last and await self._complete(last, offset, end, data):
            stop = max(last, start)
        return start, stop

    async def _complete(self, start: int, offset: int, end: int, data: memoryview | None) -> bool:
        """Do the part of [offset, end) in the cluster at ``start``; False when the target can be given just that part."""
        stop = min(start + self._unit, self.length())
        if offset <= start and stop <= end:
            return False
        held = await requests.block_status(self.target.node, start, stop - start, want_zero=False)
        if not isinstance(held, Unallocated):
            return False
        block = memoryview(bytearray(stop - start))
        await requests.read_into(self.child, start, block)
        first, last = max(offset, start), min(end, stop)
        block[first - start : last - start] = bytes(last - first) if data is None else data[first - offset : last - offset]
        await requests.write_from(self.target, start, block)
        return True


async def _note_error(
    side: str, request: Callable[[], Awaitable[None]], errors: list[tuple[str, Exception]]
) -> None:
    try:
        await request()
    except Exception as error:  # raised by the caller, when the other side has ended too
        errors.append((side, error))
