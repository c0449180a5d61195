"""The files of a run, on two modelled disks: what driver ``file`` is in a machine of this lab.

A file lies on the disk that its directory is named for (``source`` or ``target``). Each request takes the time that the disk's
model says, then happens for real, and is recorded. Differs from the product's driver: a flush costs modelled time only and
is remembered for the question what a power cut would leave; holes are not looked for, so that the host's file system does
not show; and there is no copying inside the host.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import ClassVar, Final

import attrs

from qblock.driver import CreateContext
from qblock.drivers.file import FileDriver
from qblock.drivers.file.driver import FileCreateOptions
from qblock.errors import BlockIOError
from qblock.extents import Data, Extent, Zero
from qblock.lab.compare.disks import Disk
from qblock.lab.compare.history import NO_BYTES, Flushed, Made, Read, Recorder, Resized, Wrote
from qblock.node import BdrvChild

SOURCE: Final = "source"
TARGET: Final = "target"


@attrs.frozen(eq=False)
class Storage:
    """The disks of a machine, by name, and the directory in which each has one of its own."""

    directory: Path
    disks: dict[str, Disk]
    recorder: Recorder

    def place(self, filename: str) -> tuple[Disk, str]:
        """The disk that a file lies on, and the file's name relative to the directory; a stranger lies on the source's."""
        path = Path(filename)
        name = path.relative_to(self.directory).as_posix() if path.is_relative_to(self.directory) else filename
        return self.disks.get(name.partition("/")[0], self.disks[SOURCE]), name


class ModelledFile(FileDriver):
    """See the module. ``storage`` is set by the subclass that a machine gets."""

    storage: ClassVar[Storage]

    async def open(self) -> None:
        await super().open()
        self.prefers_copy_range = False
        self.disk, self.file = self.storage.place(self.options.filename)

    @classmethod
    async def create(cls, options: FileCreateOptions, context: CreateContext) -> None:
        disk, file = cls.storage.place(options.filename)
        await disk.write(file, 0, 0)
        await super().create(options, context)
        cls.storage.recorder.add(Made(context.env.clock.now_ns(), file))
        if options.size:
            cls.storage.recorder.add(Resized(context.env.clock.now_ns(), file, options.size))

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.disk.read(self.file, offset, len(buffer))
        await super().read_into(offset, buffer)
        self.storage.recorder.add(Read(self.env.clock.now_ns(), self.file, offset, len(buffer)))

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        await self.disk.write(self.file, offset, len(buffer))
        await super().write_from(offset, buffer)
        self._wrote(offset, len(buffer), self.storage.recorder.keep(buffer))
        if fua:
            await self.flush()

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        await self.disk.write(self.file, offset, 0)
        await super().write_zeroes(offset, length, may_unmap=may_unmap, no_fallback=no_fallback)
        self._wrote(offset, min(length, self.length() - offset), NO_BYTES)
        if fua:
            await self.flush()

    async def discard(self, offset: int, length: int) -> None:
        await self.disk.write(self.file, offset, 0)
        await super().discard(offset, length)
        self._wrote(offset, min(length, self.length() - offset), NO_BYTES)

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        await self.disk.write(self.file, 0, 0)
        await super().truncate(length, exact=exact, preallocation=preallocation)
        self.storage.recorder.add(Resized(self.env.clock.now_ns(), self.file, length))

    async def flush(self) -> None:
        began = len(self.storage.recorder.records)
        await self.disk.flush()
        self.storage.recorder.add(Flushed(self.env.clock.now_ns(), self.file, began))

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        return Data(length, offset) if offset < self.length() else Zero(length, offset)

    async def copy_range(self, offset: int, target: BdrvChild, target_offset: int, length: int) -> None:
        raise BlockIOError(errno.ENOTSUP)

    def _wrote(self, offset: int, length: int, place: int) -> None:
        self.storage.recorder.add(Wrote(self.env.clock.now_ns(), self.file, offset, length, place))


def modelled_file(where: Storage) -> type[FileDriver]:
    """Driver ``file`` for one machine: register it in that machine's registry."""

    class FileOnTheseDisks(ModelledFile):
        storage = where

    return FileOnTheseDisks
