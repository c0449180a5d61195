"""The ``quorum`` driver: several children that hold the same disk, which vote on what is read.

Models QEMU's driver of that name (semantics.md sections 14.5 and 17). Writes, zero writes and flushes go to all children and
succeed when at least ``vote-threshold`` of them do. A read asks all children; if they disagree, the content that most of them
have wins, provided that it has ``vote-threshold`` votes (among equals that which was seen last wins). Children that failed, or
were outvoted, are reported by QUORUM_REPORT_BAD, a request without a majority by QUORUM_FAILURE. With ``read-pattern=fifo`` the
first child that can answers alone.

Differs from QEMU in that ``blkverify`` ends the program by `Environment.fatal`, which in a library only fails the read. The
children cannot be resized, nor can the quorum, as in QEMU.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ClassVar, Final, Literal

from attrs import define, field, frozen

from qblock import requests
from qblock.driver import Driver, NodeInfo
from qblock.errors import BlockIOError, CommandError, InvalidParameter
from qblock.extents import Data, Extent, Zero
from qblock.filtering import outcomes
from qblock.node import BdrvChild, BlockDriverState
from qblock.options import ChildRef, DriverOptions, children, option, required
from qblock.permissions import ChildRole, Perm, PermissionPair
from qblock.units import align_down, align_up

_SECTOR: Final = 512


@frozen
class QuorumOptions(DriverOptions):
    """``BlockdevOptionsQuorum``."""

    blkverify: bool = option(False, doc="two children that must be alike: a difference ends the program", since="2.9")
    children: tuple[ChildRef, ...] = children(ChildRole.DATA, doc="the nodes that vote", since="2.9")
    vote_threshold: int = required(doc="how many children must agree", since="2.9")
    rewrite_corrupted: bool = option(False, doc="write what has won over what was outvoted", since="2.9")
    read_pattern: Literal["quorum", "fifo"] = option("quorum", doc="ask all children, or the first that can answer", since="2.9")


@define(eq=False)
class _Version:
    """One content that was read, and the children that have it, in their order."""

    content: memoryview
    voters: list[BdrvChild] = field(factory=list)


class QuorumDriver(Driver):
    """See the module."""

    name: ClassVar[str] = "quorum"
    options_class: ClassVar[type[DriverOptions]] = QuorumOptions
    mends_children: ClassVar[bool] = True
    supports_write_zeroes: ClassVar[bool] = True
    supports_reopen: ClassVar[bool] = False

    options: QuorumOptions

    @property
    def edges(self) -> list[BdrvChild]:
        """The edges to the children, in their order."""
        return list(self.node.children.values())

    async def open(self) -> None:
        """See `Driver`. Raises `InvalidParameter` and `CommandError` (options), `BlockIOError` (children of different length)."""
        options, count = self.options, len(self.edges)
        if not count:
            raise InvalidParameter("children", "must name at least one node")
        if not 1 <= options.vote_threshold <= count:
            raise InvalidParameter("vote-threshold", f"cannot be {options.vote_threshold}: it must be from 1 to {count}")
        if options.read_pattern == "quorum" and options.blkverify:
            if count != 2 or options.vote_threshold != 2:
                raise CommandError("'blkverify' compares two children, both of which must agree: 'vote-threshold' is 2 then")
            if options.rewrite_corrupted:
                raise CommandError("'blkverify' and 'rewrite-corrupted' exclude each other")
        lengths = {edge.node.length for edge in self.edges}
        if len(lengths) > 1:
            raise BlockIOError(
                errno.EIO, f"The children of node '{self.node.node_name}' have different lengths: {sorted(lengths)} bytes"
            )

    def length(self) -> int:
        """See `Driver`: the children's, which is the same for all."""
        return self.edges[0].node.length

    # ---------------------------------------------------------------------------------------------------------- reads

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        await (self._read_first if self.options.read_pattern == "fifo" else self._read_all)(offset, buffer)

    async def _read_first(self, offset: int, buffer: memoryview) -> None:
        failure: BlockIOError | None = None
        for edge in self.edges:
            try:
                await requests.read_into(edge, offset, buffer)
            except BlockIOError as error:
                self._report("read", edge, offset, len(buffer), error)
                failure = error
            else:
                return
        assert failure is not None, "there is at least one child"
        raise failure

    async def _read_all(self, offset: int, buffer: memoryview) -> None:
        edges = self.edges
        contents = [buffer, *(memoryview(bytearray(len(buffer))) for _ in edges[1:])]

        pairs = list(zip(edges, contents, strict=True))
        failures = await outcomes(requests.read_into(edge, offset, content) for edge, content in pairs)
        self._report_all("read", edges, offset, len(buffer), failures)
        good = [pair for pair, failure in zip(pairs, failures, strict=True) if failure is None]
        self._check_count(len(good), failures, offset, len(buffer))
        first = good[0][1]
        different = next((content for _, content in good[1:] if content != first), None)
        if different is not None and self.options.blkverify:
            self._differs(offset, first, different)
        if different is not None:
            first = await self._vote(good, offset)
        if first is not buffer:
            buffer[:] = first

    def _differs(self, offset: int, one: memoryview, other: memoryview) -> None:
        at = next(index for index in range(len(one)) if one[index] != other[index])
        self.env.fatal(f"quorum: offset={offset} bytes={len(one)} contents mismatch at offset {offset + at}")
        raise BlockIOError(errno.EIO, f"The children of node '{self.node.node_name}' differ at {offset + at}")

    async def _vote(self, pairs: Sequence[tuple[BdrvChild, memoryview]], offset: int) -> memoryview:
        """The content that has won; raises `BlockIOError` when none has enough votes."""
        versions: dict[bytes, _Version] = {}
        for edge, content in pairs:
            version = versions.setdefault(hashlib.sha256(content).digest(), _Version(content))
            version.voters.append(edge)
        latest_first = list(versions.values())[::-1]
        winner = max(latest_first, key=lambda version: len(version.voters))
        length = len(winner.content)
        if len(winner.voters) < self.options.vote_threshold:
            self._fail(offset, length)
            raise BlockIOError(errno.EIO, f"The children of node '{self.node.node_name}' disagree, and no content has a majority")
        outvoted = [edge for version in latest_first if version is not winner for edge in reversed(version.voters)]
        for edge in outvoted:
            self._report("read", edge, offset, length, None)
        if self.options.rewrite_corrupted:
            await outcomes(requests.write_from(edge, offset, winner.content) for edge in outvoted)
        return winner.content

    # --------------------------------------------------------------------------------------------------------- writes

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        await self._change(offset, len(buffer), lambda edge: requests.write_from(edge, offset, buffer, fua=fua))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`: without a fallback only where all children can."""
        if no_fallback and not all(edge.node.driver.supports_write_zeroes for edge in self.edges):
            raise BlockIOError(errno.ENOTSUP)
        await self._change(
            offset,
            length,
            lambda edge: requests.write_zeroes(
                edge, offset, length, may_unmap=may_unmap, no_fallback=no_fallback, fua=fua
            ),
        )

    async def _change(self, offset: int, length: int, write: Callable[[BdrvChild], Coroutine[Any, Any, None]]) -> None:
        edges = self.edges
        failures = await outcomes(write(edge) for edge in edges)
        self._report_all("write", edges, offset, length, failures)
        self._check_count(failures.count(None), failures, offset, length)

    async def flush(self) -> None:
        """See `Driver`."""
        edges = self.edges
        failures = await outcomes(requests.flush(edge.node) for edge in edges)
        self._report_all("flush", edges, 0, 0, failures)
        if failures.count(None) < self.options.vote_threshold:
            raise _most_frequent(failures)

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """See `Driver`: data where any child has data or cannot tell, zero where all are."""
        data, zero = 0, length
        for edge in self.edges:
            try:
                extent = await requests.chain_status(edge.node, offset, length, want_zero=want_zero)
            except BlockIOError as error:
                self._report("read", edge, offset, length, error)
                return Data(length)
            if extent.zero:
                zero = min(zero, extent.length)
            else:
                data = max(data, extent.length)
        return Data(data) if data else Zero(zero)

    # -------------------------------------------------------------------------------------------------------- reports

    def _check_count(
        self, successes: int, failures: Sequence[BlockIOError | None], offset: int, length: int
    ) -> None:
        """Raise the error that most of the failed children had when too few have done it."""
        if successes < self.options.vote_threshold:
            self._fail(offset, length)
            raise _most_frequent(failures)

    def _report_all(
        self, kind: str, edges: Sequence[BdrvChild], offset: int, length: int, failures: Sequence[BlockIOError | None]
    ) -> None:
        for edge, failure in zip(edges, failures, strict=True):
            if failure is not None:
                self._report(kind, edge, offset, length, failure)

    def _report(self, kind: str, edge: BdrvChild, offset: int, length: int, error: BlockIOError | None) -> None:
        text = {} if error is None else {"error": os.strerror(error.errno or errno.EIO)}
        data = {"type": kind, **text, "node-name": edge.node.node_name, **_sectors(offset, length)}
        self.env.emit("QUORUM_REPORT_BAD", data)

    def _fail(self, offset: int, length: int) -> None:
        device = next((name for edge in self.node.parents if (name := getattr(edge.parent, "name", ""))), "")
        self.env.emit("QUORUM_FAILURE", {"reference": device or self.node.node_name, **_sectors(offset, length)})

    # ------------------------------------------------------------------------------------------------------- children

    def new_child(self, node: BlockDriverState) -> tuple[str, ChildRole]:
        """See `SupportsChildren`: the number after the highest one in use. Verifying takes two children, no more.

        7.2 takes a node of another length as well, and ends at the first write behind the end of the shorter one.
        """
        if self.options.blkverify:
            raise CommandError(f"Node '{self.node.node_name}' compares two children with each other; it takes no third one")
        if node.length != self.node.length:
            wanted = f"the children of node '{self.node.node_name}' have {self.node.length}"
            raise CommandError(f"Node '{node.node_name}' has {node.length} bytes, and {wanted}")
        last = max((int(name.partition(".")[2]) for name in self.node.children), default=-1)
        return f"children.{last + 1}", ChildRole.DATA

    def check_child_can_go(self, name: str) -> None:
        """See `SupportsChildren`."""
        if len(self.edges) <= self.options.vote_threshold:
            raise CommandError(
                f"Node '{self.node.node_name}' has {len(self.edges)} children, and {self.options.vote_threshold} must agree: "
                f"'{name}' cannot go"
            )

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """See `Driver`: nobody else may make the children differ."""
        rewrites = self.options.rewrite_corrupted and self.options.read_pattern == "quorum"
        perm |= Perm.WRITE if rewrites else Perm.NONE
        return PermissionPair(perm, shared & (Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED))

    def allocated_size(self) -> int | None:
        """See `Driver`: of all children together."""
        sizes = [edge.node.driver.allocated_size() for edge in self.edges]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def info(self) -> NodeInfo:
        """See `Driver`."""
        return NodeInfo(dirty=None)

    def filename(self) -> str | None:
        """See `Driver`: a quorum takes options."""
        return None


def _most_frequent(failures: Sequence[BlockIOError | None]) -> BlockIOError:
    """The error with the errno that occurs most often; among equals the last one."""
    errors = [error for error in failures if error is not None][::-1]
    numbers = [error.errno for error in errors]
    return max(errors, key=lambda error: numbers.count(error.errno))


def _sectors(offset: int, length: int) -> dict[str, int]:
    first = align_down(offset, _SECTOR)
    return {"sector-num": first // _SECTOR, "sectors-count": (align_up(offset + length, _SECTOR) - first) // _SECTOR}
