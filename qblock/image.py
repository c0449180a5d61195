"""Disk images for plain scripts: open, read, write and map them without a line of asyncio.

`open_image` (as ``qblock.open``) gives an `Image` whose methods block until done. Everything beneath is the block
layer itself, on an event loop that the image owns and that runs only inside its methods. Offsets and lengths are
bytes. Differs from QEMU's tools in that a backing file which an image merely mentions is opened only when asked for:
``backing=True``.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import warnings
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from qblock import status
from qblock.backend import BlockBackend
from qblock.chain import skip_filters
from qblock.clock import RealClock
from qblock.driver import CheckFix, CheckResult, SupportsBacking, SupportsCheck, SupportsSnapshots
from qblock.environment import Environment
from qblock.errors import BlockIOError, CommandError
from qblock.graph import Graph
from qblock.imagebitmaps import ImageBitmaps, store_bitmaps
from qblock.node import BlockDriverState
from qblock.opening import Opener
from qblock.permissions import Perm
from qblock.policy import OpenPolicy
from qblock.registry import DriverRegistry
from qblock.snapshots import SnapshotInfo, find_described
from qblock.units import align_up, parse_size

if TYPE_CHECKING:
    from typing_extensions import Buffer  # known to type checkers; collections.abc has it from 3.12 on

T = TypeVar("T")


@attrs.frozen
class MapExtent:
    """A run of bytes of an image, as ``qemu-img map --output=json`` tells it.

    ``depth`` is the layer that answers, 0 for the top. ``present``: stored in some layer (otherwise it reads as
    zeroes). ``offset`` is where the run lies in that layer's file, None when it has no plain place.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None

    @property
    def end(self) -> int:
        """The first byte behind the run."""
        return self.start + self.length


@attrs.frozen
class ImageInfo:
    """What an image is: sizes in bytes; ``allocated`` is what it takes on its host, ``cluster_size`` 0 when it has none.

    ``backing_filename`` and ``backing_format`` are what its header says. ``specific`` are facts that only its format has, by the
    names of QMP's ``ImageInfoSpecific`` (``compat``, ``refcount-bits``, ``bitmaps``, ...).
    """

    filename: str | None
    format: str
    length: int
    allocated: int | None
    cluster_size: int
    backing_filename: str | None
    backing_format: str | None = None
    encrypted: bool = False
    snapshots: tuple[SnapshotInfo, ...] = ()
    specific: Mapping[str, Any] = attrs.field(factory=dict)


def describe(node: BlockDriverState) -> ImageInfo:
    """`ImageInfo` of an open image."""
    node = skip_filters(node)
    driver = node.driver
    link = driver.backing_link() if isinstance(driver, SupportsBacking) else None
    return ImageInfo(
        filename=driver.filename(),
        format=driver.name,
        length=node.length,
        allocated=driver.allocated_size(),
        cluster_size=driver.info().cluster_size,
        backing_filename=link.filename if link is not None else None,
        backing_format=link.format if link is not None else None,
        encrypted=driver.encrypted,
        snapshots=driver.snapshots() if isinstance(driver, SupportsSnapshots) else (),
        specific=(driver.specific_info() or {}).get("data", {}),
    )


def _environment() -> Environment:
    return Environment(
        clock=RealClock(),
        executor=ThreadPoolExecutor(max_workers=4, thread_name_prefix="qblock-image"),
        random=Random(),
        emit=lambda event, data: None,
        warn=lambda text: warnings.warn(text, stacklevel=2),
    )


def _unlocking(env: Environment, passphrase: str | None) -> dict[str, Any]:
    """Options of a node that unlock it; the passphrase becomes a secret of the environment."""
    if passphrase is None:
        return {}
    env.secrets["passphrase"] = passphrase.encode()
    return {"encrypt": {"key-secret": "passphrase"}}


class Image:
    """An open image. A context manager: leaving it flushes and closes. Not for use by two threads at once."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        writable: bool = False,
        fmt: str | None = None,
        backing: bool = False,
        snapshot: str | None = None,
        passphrase: str | None = None,
    ) -> None:
        if writable and snapshot is not None:
            raise CommandError("a snapshot can only be read: apply it, or open it without writable=True")
        self.path = os.fspath(path)
        self.writable = writable
        self._loop = asyncio.new_event_loop()
        self._env = _environment()
        self._graph = Graph(random=self._env.random)
        policy = OpenPolicy.follow() if backing else OpenPolicy.deny()
        self._opener = Opener(self._graph, DriverRegistry(), self._env, policy)
        writing = Perm.WRITE | Perm.RESIZE if writable else Perm.NONE
        self._backend = BlockBackend(
            self._graph, perm=Perm.CONSISTENT_READ | writing, shared=Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED,
            description=f"the image '{self.path}'",
        )  # fmt: skip
        self._closed = False
        try:
            unlocking = _unlocking(self._env, passphrase)
            node = self._run(self._opener.open_image(self.path, fmt=fmt, read_only=not writable, options=unlocking))
            self._backend.insert(node)
            if snapshot is not None:
                driver = self._snapshotted()
                self._run(driver.view_snapshot(find_described(driver.snapshots(), snapshot)))
        except BaseException:
            self.close()
            raise

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise ValueError(f"the image '{self.path}' is closed")
        try:
            return self._loop.run_until_complete(work)
        except RuntimeError:
            work.close()
            raise

    # ------------------------------------------------------------------------------------------------------- questions

    @property
    def length(self) -> int:
        """The size of the disk in the image, in bytes."""
        return self._backend.length

    def __len__(self) -> int:
        return self.length

    def info(self) -> ImageInfo:
        """Format, sizes and backing file."""
        return describe(self._backend.node)

    def map(self, offset: int = 0, length: int | None = None) -> Iterator[MapExtent]:
        """What is stored where, from ``offset`` on, in runs that are as long as they can be."""
        end = self.length if length is None else min(self.length, offset + length)
        held: MapExtent | None = None
        while offset < end:
            found = self._run(self._status(offset, end - offset))
            if held is not None and _continues(held, found):
                held = attrs.evolve(held, length=held.length + found.length)
            else:
                if held is not None:
                    yield held
                held = found
            offset = found.end
        if held is not None:
            yield held

    async def _status(self, offset: int, length: int) -> MapExtent:
        found = await status.chain_status(self._backend.node, offset, length)
        return MapExtent(
            offset, found.length, found.depth, found.present, found.zero, found.data, found.compressed, found.offset
        )

    # ------------------------------------------------------------------------------------------------------------ data

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; raises `BlockIOError` when they are not all inside the image."""
        return self._run(self._backend.read(offset, length))

    def readinto(self, offset: int, buffer: Buffer) -> None:
        """Fill ``buffer`` (a bytearray, a writable memoryview, …) from ``offset``."""
        with memoryview(buffer) as view, view.cast("B") as flat:
            self._run(self._backend.read_into(offset, flat))

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data`` at ``offset``; it must fit in the image. Durable after the next `flush`."""
        self._check_writable()
        with memoryview(data) as view, view.cast("B") as flat:
            self._run(self._backend.write_from(offset, flat))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Make the range read as zeroes; with ``unmap`` the space may be given back."""
        self._check_writable()
        self._run(self._backend.write_zeroes(offset, length, may_unmap=unmap))

    def discard(self, offset: int, length: int) -> None:
        """The content of the range is no longer needed; what it reads as afterwards depends on the format."""
        self._check_writable()
        self._run(self._backend.discard(offset, length))

    def flush(self) -> None:
        """Return when all that was written is on disk."""
        if self.writable:
            self._run(self._backend.flush())

    def check(self) -> CheckResult:
        """Verify the format's own metadata, repairing nothing; raises `CommandError` for a format that has no check."""
        driver = skip_filters(self._backend.node).driver
        if not isinstance(driver, SupportsCheck):
            raise CommandError(f"images of the format '{driver.name}' cannot be checked")
        return self._run(_checked(driver))

    def resize(self, length: int) -> None:
        """Change the size of the disk; what is added reads as zeroes."""
        self._check_writable()
        self._run(self._backend.truncate(length))

    # ------------------------------------------------------------------------------------------------------- snapshots

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """The internal snapshots, oldest first; none where the format has none."""
        driver = skip_filters(self._backend.node).driver
        return driver.snapshots() if isinstance(driver, SupportsSnapshots) else ()

    def create_snapshot(self, name: str) -> SnapshotInfo:
        """Keep the disk as it is now, under ``name``, which need not be a new one: the id is. Durable on return."""
        self._check_writable()
        return self._run(self._snapshotted().create_snapshot(name))

    def apply_snapshot(self, snapshot: SnapshotInfo) -> None:
        """Make the disk what it was, in size and content; what it holds now is lost unless a snapshot has it."""
        self._check_writable()
        self._run(self._snapshotted().apply_snapshot(snapshot))

    def delete_snapshot(self, snapshot: SnapshotInfo) -> None:
        """Forget a snapshot, and give its space back."""
        self._check_writable()
        self._run(self._snapshotted().delete_snapshot(snapshot))

    def _snapshotted(self) -> SupportsSnapshots:
        driver = skip_filters(self._backend.node).driver
        if not isinstance(driver, SupportsSnapshots):
            raise CommandError(f"images of the format '{driver.name}' have no snapshots")
        return driver

    # --------------------------------------------------------------------------------------------------------- bitmaps

    @property
    def bitmaps(self) -> ImageBitmaps:
        """The persistent bitmaps by name. Changes need ``writable=True``, and are stored when the image is closed."""
        return ImageBitmaps(skip_filters(self._backend.node), self._run)

    def as_file(self) -> ImageFile:
        """A raw file object over the image, for whatever wants one; closing it leaves the image open."""
        return ImageFile(self)

    def _check_writable(self) -> None:
        if not self.writable:
            raise BlockIOError(errno.EROFS, f"the image '{self.path}' was opened without writable=True")

    # ------------------------------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Flush and close; closing twice is harmless."""
        if self._closed:
            return
        try:
            self._run(self._close())
        finally:
            self._closed = True
            self._env.executor.shutdown(wait=True)
            self._loop.close()

    async def _close(self) -> None:
        try:
            if self.writable and self._backend.root is not None:
                await self._backend.flush()
                await store_bitmaps(skip_filters(self._backend.node))
        finally:
            if self._backend.root is not None:
                self._backend.remove()
            await self._opener.close_orphans()

    @property
    def closed(self) -> bool:
        """Whether the image has been closed."""
        return self._closed

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "writable" if self.writable else "read-only"
        return f"<Image {self.path!r} {state}>"


async def _checked(driver: SupportsCheck) -> CheckResult:
    return await driver.check(CheckFix.NONE)


def _continues(first: MapExtent, second: MapExtent) -> bool:
    """True when one run can be told as part of the other."""
    if first.offset is not None and second.offset is not None:
        meets = first.offset + first.length == second.offset
    else:
        meets = first.offset is second.offset
    kinds = [(run.depth, run.present, run.zero, run.data, run.compressed) for run in (first, second)]
    return meets and kinds[0] == kinds[1]


class ImageFile(io.RawIOBase):
    """An `Image` as a raw binary file of fixed size: ``io.BufferedReader(image.as_file())`` and the like work."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def writable(self) -> bool:
        """As the image was opened."""
        return self.image.writable

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As for any file; the position may be behind the end, where reads give nothing."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.image.length}[whence]
        if start + offset < 0:
            raise ValueError(f"negative position {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Read as much as fits and is there; 0 at the end."""
        with memoryview(buffer) as view, view.cast("B") as flat:
            count = max(0, min(len(flat), self.image.length - self._position))
            if count:
                self.image.readinto(self._position, flat[:count])
        self._position += count
        return count

    def write(self, data: Buffer) -> int:
        """Write what fits before the end of the disk, which does not grow; nothing fits: ``BlockIOError(ENOSPC)``."""
        with memoryview(data) as view, view.cast("B") as flat:
            count = max(0, min(len(flat), self.image.length - self._position))
            if len(flat) and not count:
                raise BlockIOError(errno.ENOSPC, f"the disk in '{self.image.path}' ends at {self.image.length}")
            self.image.write(self._position, flat[:count])
        self._position += count
        return count

    def truncate(self, size: int | None = None) -> int:
        """Resize the disk to ``size``, or to the position."""
        length = self._position if size is None else size
        self.image.resize(length)
        return length

    def flush(self) -> None:
        """See `Image.flush`; nothing is left to do when the image was closed first."""
        if not self.closed and not self.image.closed:
            self.image.flush()


def open_image(
    path: str | os.PathLike[str],
    *,
    writable: bool = False,
    fmt: str | None = None,
    backing: bool = False,
    snapshot: str | None = None,
    passphrase: str | None = None,
) -> Image:
    """Open the image at ``path`` for a ``with`` block.

    ``fmt`` names the format (None: look at the content; raw images that strangers wrote should be named as such).
    ``backing=True`` also opens the backing files that the image names; without it an overlay is refused with
    `OpenDenied`. ``snapshot`` shows an internal snapshot (its id or name) in place of the disk, for reading.
    ``passphrase`` unlocks an encrypted image (the package ``cryptography`` is needed then). Raises `ImageError`, `CommandError`
    or `BlockIOError` (an `OSError`).
    """
    return Image(path, writable=writable, fmt=fmt, backing=backing, snapshot=snapshot, passphrase=passphrase)


def create(
    path: str | os.PathLike[str],
    size: int | str,
    *,
    fmt: str = "qcow2",
    backing: str | os.PathLike[str] | None = None,
    backing_fmt: str | None = None,
    passphrase: str | None = None,
    **options: Any,
) -> None:
    """Make a new image of ``size`` bytes (or text such as ``"64M"``), in place of whatever is at ``path``.

    ``options`` are the format's creation options as QMP names them, with ``_`` for ``-`` (``cluster_size=65536``). An
    overlay over ``backing`` needs ``backing_fmt`` too; a relative name is meant from the directory of ``path``.
    With a ``passphrase`` the image is encrypted with LUKS; ``encrypt`` may say more (``encrypt={"cipher-alg": "aes-128"}``).
    Raises `CommandError` for options that make no sense, `BlockIOError` when the file cannot be written.
    """
    wire = {name.replace("_", "-"): value for name, value in options.items()}
    if backing is not None:
        wire |= {"backing-file": os.fspath(backing), "backing-fmt": backing_fmt}
    length = parse_size(size) if isinstance(size, str) else size
    env = _environment()
    if passphrase is not None:
        wire["encrypt"] = {"format": "luks", **_unlocking(env, passphrase)["encrypt"], **wire.get("encrypt", {})}
    opener = Opener(Graph(random=env.random), DriverRegistry(), env, OpenPolicy.deny())
    try:
        asyncio.run(_create(opener, os.fspath(path), fmt, {**wire, "size": align_up(length, 512)}))
    finally:
        env.executor.shutdown(wait=True)


async def _create(opener: Opener, path: str, fmt: str, options: dict[str, Any]) -> None:
    if fmt == "raw":
        await opener.create_image("file", {"filename": path, **options})
        return
    await opener.create_image("file", {"filename": path, "size": 0})
    try:
        await opener.create_image(fmt, {"file": {"driver": "file", "filename": path}, **options})
    except BaseException:
        os.unlink(path)
        raise
