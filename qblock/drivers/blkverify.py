"""The ``blkverify`` filter: everything is done on two nodes, and both must give the same.

Models QEMU's test driver of that name (semantics.md section 17): a disk under test beside a raw file that is trusted. What is
read comes from ``test``; block status is that of ``raw``, which is what the filter lies on. A difference of content or of errors
ends the program by `Environment.fatal`; in a library it fails the request. Zeroes are written as data, discards are not passed
on, and only ``test`` is flushed, as in QEMU. Differs from QEMU in that a resize is refused; there it changes ``raw`` alone.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from attrs import frozen

from qblock import requests
from qblock.driver import Json
from qblock.errors import BlockIOError, CommandError
from qblock.filtering import FilterDriver, outcomes
from qblock.node import BdrvChild
from qblock.options import ChildRef, DriverOptions, child
from qblock.permissions import ChildRole


@frozen
class BlkverifyOptions(DriverOptions):
    """``BlockdevOptionsBlkverify``."""

    raw: ChildRef = child(ChildRole.FILTERED, doc="the node that is trusted", since="2.9")
    test: ChildRef = child(ChildRole.DATA, doc="the node under test", probed=True, since="2.9")


class BlkverifyDriver(FilterDriver):
    """Compares ``test`` with ``raw``."""

    name: ClassVar[str] = "blkverify"
    names_storage: ClassVar[bool] = True
    options_class: ClassVar[type[DriverOptions]] = BlkverifyOptions
    supports_write_zeroes: ClassVar[bool] = False
    supports_discard: ClassVar[bool] = False
    supports_copy_range: ClassVar[bool] = False
    supports_reopen: ClassVar[bool] = False
    hides_surplus: ClassVar[bool] = True
    flushes_writes_only: ClassVar[bool] = True

    @property
    def test(self) -> BdrvChild:
        """The edge to the node under test."""
        return self.node.children["test"]

    def length(self) -> int:
        """See `Driver`: the length of the node under test."""
        return self.test.node.driver.length()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        expected = memoryview(bytearray(len(buffer)))
        await self._both(
            f"read offset={offset} bytes={len(buffer)}",
            requests.read_into(self.test, offset, buffer),
            requests.read_into(self.child, offset, expected),
        )
        if buffer != expected:
            at = next(index for index in range(len(buffer)) if buffer[index] != expected[index])
            self._differ(f"read offset={offset} bytes={len(buffer)} contents mismatch at offset {offset + at}")

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        if offset + len(buffer) > self.child.node.length:
            self._differ(f"write offset={offset} bytes={len(buffer)} beyond the end of raw ({self.child.node.length})")
        await self._both(
            f"write offset={offset} bytes={len(buffer)}",
            requests.write_from(self.test, offset, buffer, fua=fua),
            requests.write_from(self.child, offset, buffer),
        )

    async def flush(self) -> None:
        """See `Driver`: what is trusted is thrown away after the test."""
        await requests.flush(self.test.node)

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """See `Driver`: refused."""
        raise BlockIOError(errno.ENOTSUP, f"Node '{self.node.node_name}' compares two disks, which cannot be resized together")

    async def _both(self, what: str, *work: Coroutine[Any, Any, None]) -> None:
        """Do it on ``test`` and ``raw`` at once; raises the error of ``test`` when both have failed alike."""
        errors = await outcomes(work)
        of_test, of_raw = (0 if error is None else -(error.errno or errno.EIO) for error in errors)
        if of_test != of_raw:
            self._differ(f"{what} return value mismatch {of_test} != {of_raw}")
        if errors[0] is not None:
            raise errors[0]

    def _differ(self, how: str) -> None:
        self.env.fatal(f"blkverify: {how}")
        raise BlockIOError(errno.EIO, f"Node '{self.node.node_name}' is not like its raw copy: {how}")

    # ---------------------------------------------------------------------------------------------------------- names

    def allocated_size(self) -> int | None:
        """See `Driver`: not told, as in QEMU."""
        return None

    def filename(self) -> str | None:
        """See `Driver`: ``blkverify:RAW:TEST``, where both have plain names."""
        raw, test = self.child.node.driver.filename(), self.test.node.driver.filename()
        return None if raw is None or test is None else f"blkverify:{raw}:{test}"

    @classmethod
    def parse_filename(cls, filename: str, parse: Callable[[str], dict[str, Json]]) -> dict[str, Json] | None:
        """See `Driver`: ``blkverify:RAW:TEST``; the format of TEST is probed."""
        raw, colon, test = filename.removeprefix("blkverify:").partition(":")
        if not colon or not raw or not test:
            raise CommandError(f"'{filename}' is not of the form blkverify:RAW:TEST")
        return {"driver": cls.name, "raw": parse(raw), "test": {"file": parse(test)}}
