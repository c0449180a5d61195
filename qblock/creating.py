"""Making new images, as ``blockdev-create`` does: a protocol driver makes the file, a format driver writes itself into it.

Models semantics.md section 4.6. The file for a format is given as a node's name or as options; what is opened here for that is
closed again here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import attrs

from qblock.backend import BlockBackend
from qblock.driver import BackingLink, Json, SupportsCreate
from qblock.environment import Environment
from qblock.errors import CommandError, InvalidParameter
from qblock.filenames import has_protocol
from qblock.formatting import formatting_line
from qblock.options import visit
from qblock.permissions import Perm

if TYPE_CHECKING:
    from qblock.opening import Opener


class CannotCreate(CommandError):
    """The driver has no way to make new images; ``driver`` names it."""

    def __init__(self, driver: str) -> None:
        super().__init__(f"The driver '{driver}' cannot make new images")
        self.driver = driver


@attrs.define(eq=False)
class NodeTarget:
    """A node that an image is being made on; implements `driver.CreateTarget`."""

    _opener: Opener
    _backend: BlockBackend

    def length(self) -> int:
        """The present size in bytes."""
        return self._backend.length

    def filename(self) -> str | None:
        """The file name that means this node, if there is one."""
        return self._backend.node.driver.filename()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``."""
        await self._backend.read_into(offset, buffer)

    async def write_from(self, offset: int, buffer: memoryview) -> None:
        """Write ``buffer`` at ``offset``, growing the node when it is too short."""
        if (end := offset + len(buffer)) > self._backend.length:
            await self._backend.truncate(end, exact=False)
        await self._backend.write_from(offset, buffer)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Zero a range, growing the node when it is too short."""
        if (end := offset + length) > self._backend.length:
            await self._backend.truncate(end, exact=False)
        await self._backend.write_zeroes(offset, length)

    async def truncate(self, length: int, *, preallocation: str = "off") -> None:
        """Set the size in bytes."""
        await self._backend.truncate(length, preallocation=preallocation)

    async def flush(self) -> None:
        """Make it durable."""
        await self._backend.flush()

    async def release(self) -> None:
        """Let go of the node; it is closed when it was opened for this."""
        self._backend.close()
        await self._opener.close_orphans()


@attrs.frozen(eq=False)
class OpenerCreateContext:
    """What a driver's ``create`` may use; implements `driver.CreateContext`."""

    env: Environment
    _opener: Opener

    async def open_reference(self, ref: Json) -> NodeTarget:
        """The node that ``ref`` (a name, or options) means, with the right to write and resize. Raises as opening does."""
        opener = self._opener
        if isinstance(ref, str):
            node = opener.graph.lookup(ref)
        elif isinstance(ref, Mapping):
            node = await opener.open_blockdev(ref, strings=True, root=False)
        else:
            raise InvalidParameter("file", "must be the name of a node, or an object with the options of one")
        perm = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
        backend = BlockBackend(opener.graph, perm=perm, shared=Perm.ALL, description="image creation")
        try:
            backend.insert(node)
        except BaseException:
            backend.close()
            await opener.close_orphans()
            raise
        return NodeTarget(opener, backend)


def is_plain(fmt: str) -> bool:
    """Whether an image of the format is nothing but the file."""
    return fmt in ("raw", "file")


async def create_image_file(
    opener: Opener, filename: str, fmt: str, *, size: int, backing: BackingLink | None, announce: Callable[[str], None]
) -> None:
    """Make the image file of a command that takes a file name; ``announce`` is told what, as QEMU prints it.

    ``backing`` is for the header and is not looked at. Raises as `create_image`, and `CommandError` for a name with a protocol;
    nothing is announced or made when the name or the format will not do, and a file that was not there before is removed again.
    """
    path = _path_of(opener, filename)
    plain = is_plain(fmt)
    _creating_class(opener, "file" if plain else fmt)
    shown: dict[str, Json] = {"size": size}
    options: dict[str, Json] = {"size": size}
    if backing is not None:
        shown |= {"backing_file": backing.filename, "backing_fmt": backing.format}
        options |= {"backing-file": backing.filename, "backing-fmt": backing.format}
    announce(formatting_line(filename, fmt, shown))
    if plain:
        await create_image(opener, "file", {"filename": path, "size": size})
        return
    fresh = not os.path.lexists(path)
    await create_image(opener, "file", {"filename": path, "size": 0})
    try:
        await create_image(opener, fmt, {"file": {"driver": "file", "filename": path}, **options})
    except BaseException:
        if fresh:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise


def _path_of(opener: Opener, filename: str) -> str:
    """The path of the file to make; raises `CannotCreate` and `CommandError` for a name that stands for something else."""
    path = filename.removeprefix("file:")
    if path != filename or not has_protocol(filename):
        return path
    protocol = filename.partition(":")[0]
    if protocol in opener.registry.names():
        raise CannotCreate(protocol)
    raise CommandError(f"'{filename}' begins with a protocol that there is no driver for; write './…' for a file")


async def create_image(opener: Opener, driver: str, options: Mapping[str, Json], *, strings: bool = False) -> None:
    """Make a new image; ``options`` are the members of ``BlockdevCreateOptions`` without ``driver``.

    With ``strings`` leaves may be text. Raises `CannotCreate`, `InvalidParameter` and what the driver raises.
    """
    cls, parsed = check_create_options(opener, driver, options, strings=strings)
    await cls.create(parsed, OpenerCreateContext(opener.env, opener))


def check_create_options(
    opener: Opener, driver: str, options: Mapping[str, Json], *, strings: bool = False
) -> tuple[type[SupportsCreate], object]:
    """The driver's class and its checked creation options; what ``blockdev-create`` checks before its job starts."""
    creating = _creating_class(opener, driver)
    return creating, visit(creating.create_options_class, options, strings=strings)


def _creating_class(opener: Opener, driver: str) -> type[SupportsCreate]:
    cls = opener.registry.get(driver)
    if not hasattr(cls, "create_options_class"):
        raise CannotCreate(driver)
    return cast(type[SupportsCreate], cls)
