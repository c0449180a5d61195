"""Finding drivers by name.

Models QEMU's list of block drivers. Differs in that drivers are found by entry point (group ``qblock.drivers``), so other
packages can add some, and are imported when first asked for: opening a raw file does not load qcow2. Our own drivers are
also known without asking the package metadata, which is slow to load and absent when running from a source tree.
"""

from __future__ import annotations

import importlib
from typing import Final

from qblock.driver import Driver
from qblock.errors import CommandError

GROUP: Final = "qblock.drivers"
"""The entry point group of drivers."""

OWN_DRIVERS: Final = {
    "blkdebug": "qblock.drivers.blkdebug:BlkdebugDriver",
    "blklogwrites": "qblock.drivers.blklogwrites:BlklogwritesDriver",
    "blkmirror": "qblock.drivers.blkmirror:BlkmirrorDriver",
    "blkverify": "qblock.drivers.blkverify:BlkverifyDriver",
    "compress": "qblock.drivers.compress:CompressDriver",
    "copy-before-write": "qblock.drivers.copy_before_write:CopyBeforeWriteDriver",
    "copy-on-read": "qblock.drivers.copy_on_read:CopyOnReadDriver",
    "file": "qblock.drivers.file:FileDriver",
    "memory": "qblock.drivers.memory:MemoryDriver",
    "null-aio": "qblock.drivers.null:NullAioDriver",
    "null-co": "qblock.drivers.null:NullCoDriver",
    "preallocate": "qblock.drivers.preallocate:PreallocateDriver",
    "qcow2": "qblock.drivers.qcow2.driver:Qcow2Driver",
    "quorum": "qblock.drivers.quorum:QuorumDriver",
    "raw": "qblock.drivers.raw:RawDriver",
    "throttle": "qblock.drivers.throttle:ThrottleDriver",
    "snapshot-access": "qblock.drivers.snapshot_access:SnapshotAccessDriver",
}
"""Our drivers; a test keeps this equal to the entry points in pyproject.toml."""


class UnknownDriver(CommandError):
    """There is no driver of that name; ``name`` is it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no driver '{name}'; 'qblock-img --help' lists those there are")
        self.name = name


class DriverRegistry:
    """The drivers that one block system knows. Each system has its own, so that tests can add drivers to one."""

    def __init__(self) -> None:
        self._classes: dict[str, type[Driver]] = {}
        self._others: dict[str, str] | None = None

    def register(self, driver: type[Driver]) -> None:
        """Add a driver, or put it in the place of one of the same name."""
        self._classes[driver.name] = driver

    def get(self, name: str) -> type[Driver]:
        """The driver class of that name; raises `UnknownDriver`."""
        if name not in self._classes:
            where = OWN_DRIVERS.get(name) or self._entry_points().get(name)
            if where is None:
                raise UnknownDriver(name)
            module, _, attribute = where.partition(":")
            self._classes[name] = getattr(importlib.import_module(module), attribute)
        return self._classes[name]

    def names(self) -> list[str]:
        """The names of all drivers, sorted."""
        return sorted({*OWN_DRIVERS, *self._entry_points(), *self._classes})

    def formats(self) -> list[type[Driver]]:
        """The drivers that can be probed for: image formats, raw last."""
        classes = [self.get(name) for name in self.names()]
        formats = [driver for driver in classes if not driver.is_protocol and not driver.is_filter]
        return sorted(formats, key=lambda driver: driver.name == "raw")

    def _entry_points(self) -> dict[str, str]:
        if self._others is None:
            metadata = importlib.import_module("importlib.metadata")
            self._others = {point.name: point.value for point in metadata.entry_points(group=GROUP)}
        return self._others
