"""``null-co`` and ``null-aio``: storage that keeps nothing, for measurements and tests.

Models QEMU's null drivers (semantics.md section 17): a size, an optional latency per request, and reads that leave the buffer
as it is unless ``read-zeroes`` is on. The two names differ in QEMU by how a request waits; here they are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from attrs import frozen

from qblock.driver import Driver, Json, NodeInfo
from qblock.errors import CommandError, InvalidParameter
from qblock.extents import Extent, Unallocated, Zero
from qblock.options import DriverOptions, option
from qblock.units import GiB
from qblock.zeroes import fill_zero


@frozen
class NullOptions(DriverOptions):
    """``BlockdevOptionsNull``."""

    size: int = option(GiB, doc="size of the disk in bytes")
    latency_ns: int = option(0, doc="emulated latency of each request in nanoseconds")
    read_zeroes: bool = option(False, doc="reads fill the buffer with zeroes", since="4.1")


class NullDriver(Driver):
    """What both names do."""

    options_class: ClassVar[type[DriverOptions]] = NullOptions
    is_protocol: ClassVar[bool] = True
    options: NullOptions

    async def open(self) -> None:
        """See `Driver`."""
        if self.options.size < 0:
            raise InvalidParameter("size", f"cannot be negative ({self.options.size})")
        if self.options.latency_ns < 0:
            raise InvalidParameter("latency-ns", f"cannot be negative ({self.options.latency_ns})")

    def length(self) -> int:
        """See `Driver`."""
        return self.options.size

    async def _wait(self) -> None:
        if self.options.latency_ns:
            await self.env.clock.sleep_ns(self.options.latency_ns)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`; the buffer keeps its content unless ``read-zeroes`` is on."""
        if self.options.read_zeroes:
            fill_zero(buffer)
        await self._wait()

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`; what is written is gone."""
        await self._wait()

    async def flush(self) -> None:
        """See `Driver`."""
        await self._wait()

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """See `Driver`: zero with ``read-zeroes``, else nothing is held and what is read is undefined."""
        return Zero(length, offset) if self.options.read_zeroes else Unallocated(length)

    def allocated_size(self) -> int | None:
        """See `Driver`: nothing is kept."""
        return 0

    def info(self) -> NodeInfo:
        """See `Driver`."""
        return NodeInfo(dirty=None)

    def filename(self) -> str | None:
        """See `Driver`: ``null-co://``, unless an option was given that changes what the disk shows."""
        return None if self.node.options_given.keys() & {"size", "read-zeroes"} else f"{self.name}://"

    @classmethod
    def parse_filename(cls, filename: str, parse: Callable[[str], dict[str, Json]]) -> dict[str, Json] | None:
        """See `Driver`: only ``null-co://`` itself."""
        if filename != f"{cls.name}://":
            raise CommandError(f"'{filename}' is no file name of {cls.name}: the only one is '{cls.name}://'")
        return {"driver": cls.name}


class NullCoDriver(NullDriver):
    """``null-co``."""

    name: ClassVar[str] = "null-co"


class NullAioDriver(NullDriver):
    """``null-aio``."""

    name: ClassVar[str] = "null-aio"
