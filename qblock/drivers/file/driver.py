"""The ``file`` driver: a regular file (or block device) of the host as storage.

Models QEMU's ``file`` with ``aio=threads`` (semantics.md section 16, image-locking.md). A small request that the page cache can
serve is done at once on the loop's thread: reads ask with ``RWF_NOWAIT`` and go to a thread only when data must come from the
disk, writes are a copy into the page cache. Everything that may take long (large requests, ``fdatasync``, allocation) runs in
the environment's executor. With ``cache.direct`` the file is open with ``O_DIRECT``, and small requests are run by the kernel
(aio.py) where it can. With ``aio=io_uring`` nothing but allocation runs in threads: what cannot be done at once goes to the
kernel by way of shared rings (ring.py).

Differs from QEMU: with ``cache.direct`` small requests are run by the kernel for ``aio=threads``, too; ``aio=native`` insists on
it, and fails where there is no such queue. ``aio-max-batch`` holds for ``aio=io_uring`` as well, where QEMU ignores it.
``pr-manager`` is refused. ``auto-read-only`` decides when the file is opened, not again with every user. Devices are taken, too,
of which character devices like ``/dev/null`` are empty. ``drop-cache`` and ``x-check-cache-dropped`` are about the end
of an incoming migration, which qblock does not have: their values all do the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeVar, TypeVarTuple, Unpack

from attrs import evolve, frozen

from qblock.driver import CreateContext, Driver, Json, Limits
from qblock.drivers.file import space
from qblock.drivers.file.access import Access, ThreadAccess
from qblock.drivers.file.direct import DirectAccess, alignment_of, set_direct
from qblock.drivers.file.locks import FileLocks
from qblock.drivers.file.ring import IoUring
from qblock.errors import BlockIOError, CommandError, InvalidParameter
from qblock.extents import Data, Extent, Zero
from qblock.fdsets import PREFIX as FDSETS
from qblock.fdsets import FdSets
from qblock.options import DriverOptions, option, required
from qblock.permissions import Perm
from qblock.threads import ThreadQueue
from qblock.units import KiB, MiB
from qblock.zeroes import fill_zero, zero_view

if TYPE_CHECKING:
    from qblock.node import BdrvChild

_Result = TypeVar("_Result")
_Args = TypeVarTuple("_Args")

INLINE_READ: Final = MiB
"""Reads up to this many bytes are tried on the loop's thread first: what is cached is copied faster than a thread wakes."""
INLINE_WRITE: Final = 256 * KiB
"""Writes up to this many bytes are copied into the page cache on the loop's thread, which takes less than 50 microseconds."""
INLINE_ALONE: Final = 16 * MiB
"""Both limits where the loop is not shared: a thread would only add two switches to each copy."""
_NEVER: Final = -1
_INLINE_SPACE: Final = MiB
_COPY_PIECE: Final = 64 * MiB
_MAX_EXTENT_SIZE_HINT: Final = (1 << 32) - 1
_NOT_SUPPORTED: Final = (
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EXDEV,
    errno.EINVAL,
    errno.EPERM,
    errno.ENODEV,
    errno.ENOTTY,
)


@frozen
class FileOptions(DriverOptions):
    """``BlockdevOptionsFile``."""

    filename: str = required(doc="path of the file")
    pr_manager: str | None = option(None, doc="persistent reservation manager; not offered", since="2.11")
    locking: Literal["auto", "on", "off"] = option("auto", doc="byte-range locks on the file", since="2.10")
    aio: Literal["threads", "native", "io_uring"] | None = option(
        None, doc="how requests are run; by default as the command line says, or threads", since="2.9"
    )
    aio_max_batch: int = option(0, doc="requests given to the kernel at once; 0: no limit", since="6.2")
    drop_cache: bool = option(True, doc="drop the page cache after an incoming migration", since="3.0")
    x_check_cache_dropped: bool = option(False, doc="check then that the page cache was dropped", since="3.0")


@frozen
class FileCreateOptions(DriverOptions):
    """``BlockdevCreateOptionsFile``."""

    filename: str = required(doc="path of the file to make or overwrite")
    size: int = required(doc="size in bytes")
    preallocation: Literal["off", "metadata", "falloc", "full"] = option("off", doc="reserve space", since="2.12")
    nocow: bool = option(False, doc="no copy-on-write of the file system (btrfs)", since="2.12")
    extent_size_hint: int | None = option(None, doc="allocation unit in bytes (XFS); 0: none", since="5.1")


def _io_error(error: OSError, detail: str) -> BlockIOError:
    return BlockIOError(error.errno or errno.EIO, detail)


def _open_storage(filename: str, flags: int, fdsets: FdSets | None = None) -> int:
    """Open a regular file or a device; never blocks on a FIFO and never creates. Raises `BlockIOError`."""
    try:
        if fdsets is not None and filename.startswith(FDSETS):
            fd = fdsets.open(filename, flags)
        else:
            fd = os.open(filename, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise _io_error(error, f"Could not open '{filename}'") from None
    except ValueError as error:
        raise BlockIOError(errno.EINVAL, f"Could not open {filename!r} ({error})") from None
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        os.set_blocking(fd, True)
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise BlockIOError(errno.EISDIR, f"Could not open '{filename}'")
    raise BlockIOError(errno.EINVAL, f"Could not open '{filename}': it is neither a regular file nor a device")


def _size_of(fd: int) -> int:
    status = os.fstat(fd)
    return status.st_size if stat.S_ISREG(status.st_mode) else os.lseek(fd, 0, os.SEEK_END)


class FileDriver(Driver):
    """One open file."""

    name: ClassVar[str] = "file"
    options_class: ClassVar[type[DriverOptions]] = FileOptions
    reopens_with: ClassVar[frozenset[str]] = frozenset({"drop-cache", "x-check-cache-dropped"})
    reopens_without: ClassVar[frozenset[str]] = frozenset({"x-check-cache-dropped"})
    create_options_class: ClassVar[type[DriverOptions]] = FileCreateOptions
    is_protocol: ClassVar[bool] = True
    zero_initialised: ClassVar[bool] = True
    supports_write_zeroes: ClassVar[bool] = True
    supports_discard: ClassVar[bool] = True
    supports_copy_range: ClassVar[bool] = True

    options: FileOptions
    _fd = -1
    _length = 0
    _is_device = False
    _failed_flush = 0
    _locks: FileLocks | None = None
    _new_fd: int | None = None
    _access: Access
    """Who runs what is not done at once."""
    _is_direct = False
    _inline_read = _NEVER
    _read_flags = os.RWF_NOWAIT
    _inline_write = _NEVER
    _write = staticmethod(space.write_fully)
    _discards_ok = 0
    _discards_failed = 0
    _discarded_bytes = 0

    # ------------------------------------------------------------------------------------------------- open and close

    async def open(self) -> None:
        """See `Driver`. Raises `BlockIOError` with the errno of opening, `CommandError` for what is not offered."""
        self._refuse_options()
        self._threads = ThreadQueue(self.env.executor)
        node = self.node
        try:
            self._fd = self._open_descriptor(read_only=node.read_only)
        except BlockIOError as error:
            if not node.auto_read_only or node.read_only or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            self._fd = self._open_descriptor(read_only=True)
            node.read_only = True
        try:
            self._is_device = not stat.S_ISREG(os.fstat(self._fd).st_mode)
            self._length = _size_of(self._fd)
            self.prefers_copy_range = space.shares_blocks(self._fd)
            if space.is_in_memory(self._fd):
                self._read_flags = 0
            if not self._is_device and space.gains_by_reserving(self._fd):
                self._write = space.write_reserved
            self._access = self._make_access(self._settle_cache())
        except BaseException:
            os.close(self._fd)
            raise
        try:
            self._open_locks()
        except BaseException:
            self._access.close()
            os.close(self._fd)
            raise

    def _refuse_options(self) -> None:
        options = self.options
        if self._aio == "native" and not self.node.cache_direct:
            raise InvalidParameter("aio", "cannot be 'native' without cache.direct=on")
        if options.pr_manager is not None:
            raise InvalidParameter("pr-manager", "is not offered: there are no persistent reservations here")

    def _open_descriptor(self, *, read_only: bool) -> int:
        flags = os.O_RDONLY if read_only else os.O_RDWR
        if self.node.cache_direct:
            flags |= os.O_DIRECT
        return _open_storage(self.options.filename, flags, self.env.fdsets)

    @property
    def _aio(self) -> str:
        return self.options.aio or self.node.aio

    def _settle_cache(self) -> int:
        """Use the page cache, or not, as the node says; the alignment of requests in bytes."""
        self._is_direct = self.node.cache_direct
        if self._is_direct:
            alignment = alignment_of(self._fd, is_device=self._is_device)
            self.limits = Limits(request_alignment=alignment)
            self._inline_read = self._inline_write = _NEVER
            return alignment
        self.limits = Limits()
        self._inline_read, self._inline_write = INLINE_READ, INLINE_WRITE
        if not self.env.loop_is_shared:
            self._inline_read = self._inline_write = INLINE_ALONE
        return 1

    def _make_access(self, alignment: int) -> Access:
        batch = self.options.aio_max_batch
        try:
            if self._aio == "io_uring":
                return IoUring(alignment, max_batch=batch)
            if self._is_direct:
                return DirectAccess(self._threads, alignment, native=self._aio == "native", max_batch=batch)
        except OSError as error:
            name = self.options.filename
            raise CommandError(f"'{name}' cannot be used with aio={self._aio}: {error.strerror}; use threads") from None
        return ThreadAccess(self._threads, self._write)

    def _open_locks(self) -> None:
        if self.options.locking == "off" or self.node.force_share:
            return
        # A description of its own, so that a reopen of the data descriptor does not drop the locks.
        if self.options.filename.startswith(FDSETS):
            fd = fcntl.fcntl(self._fd, fcntl.F_DUPFD_CLOEXEC, 3)  # there may be no other
        else:
            fd = _open_storage(self.options.filename, os.O_RDONLY)
        locks = FileLocks(fd, self.options.filename)
        try:
            if not os.path.sameopenfile(fd, self._fd):
                raise BlockIOError(errno.ESTALE, f"'{self.options.filename}' was replaced while it was being opened")
            supported = locks.supported()
            if not supported and self.options.locking == "on":
                raise CommandError(f"'{self.options.filename}' cannot be locked: its file system has no such locks")
        except BaseException:
            locks.close()
            raise
        if supported:
            self._locks = locks
        else:
            locks.close()

    async def close(self) -> None:
        """See `Driver`."""
        self._access.close()
        os.close(self._fd)
        self._fd = -1
        if self._locks is not None:
            self._locks.close()
            self._locks = None

    # ------------------------------------------------------------------------------------------------------- requests

    async def _run(self, function: Callable[[Unpack[_Args]], _Result], *args: *_Args) -> _Result:
        """Run a blocking function in a thread; cancelling waits for its end."""
        return await self._threads.run(function, *args)

    def length(self) -> int:
        """See `Driver`."""
        return self._length

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        done = 0
        if len(buffer) <= self._inline_read:
            try:
                done = os.preadv(self._fd, (buffer,), offset, self._read_flags)
                if done == len(buffer):
                    return
                if offset + done >= self._length:
                    fill_zero(buffer[done:])
                    return
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise _io_error(error, f"Reading '{self.options.filename}' at {offset} failed") from None
                self._inline_read = _NEVER
        await self._read_waiting(offset + done, buffer[done:])

    async def _read_waiting(self, offset: int, buffer: memoryview) -> None:
        try:
            await self._access.read(self._fd, offset, buffer)
        except OSError as error:
            raise _io_error(error, f"Reading '{self.options.filename}' at {offset} failed") from None

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        end = offset + len(buffer)
        try:
            if len(buffer) <= self._inline_write:
                self._write(self._fd, offset, buffer)
            else:
                await self._access.write(self._fd, offset, buffer)
        except OSError as error:
            self._length = _size_of(self._fd)
            raise _io_error(error, f"Writing '{self.options.filename}' at {offset} failed") from None
        if end > self._length:
            self._length = end
        if fua:
            await self.flush()

    async def flush(self) -> None:
        """See `Driver`. After one failure of a buffered file all flushes fail until it is reopened."""
        if self._failed_flush:
            raise BlockIOError(
                self._failed_flush,
                f"'{self.options.filename}' cannot be flushed: an earlier flush failed, and what is on disk is not known; "
                "reopen it",
            )
        try:
            await self._access.sync(self._fd)
        except OSError as error:
            if not self._is_direct:
                self._failed_flush = error.errno or errno.EIO
            raise _io_error(error, f"Flushing '{self.options.filename}' failed") from None

    # ------------------------------------------------------------------------------------------------ space and status

    async def _change_space(self, change: Callable[[int, int, int], None], offset: int, length: int) -> None:
        """Call a function of space.py; what the file system cannot do becomes ``ENOTSUP``."""
        try:
            if length <= _INLINE_SPACE:
                change(self._fd, offset, length)
            else:
                await self._run(change, self._fd, offset, length)
        except OSError as error:
            code = errno.ENOTSUP if error.errno in _NOT_SUPPORTED else error.errno or errno.EIO
            raise BlockIOError(code, f"Changing the space of '{self.options.filename}' at {offset} failed") from None

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`: a hole with ``may_unmap``, otherwise zeroes with space reserved."""
        change = space.make_hole if may_unmap and not self._is_device else space.make_zero
        try:
            await self._change_space(change, offset, length)
        finally:
            self._length = _size_of(self._fd)
        if fua:
            await self.flush()

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`."""
        try:
            await self._change_space(space.punch_hole, offset, length)
        except BlockIOError:
            self._discards_failed += 1
            raise
        self._discards_ok += 1
        self._discarded_bytes += length

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """See `Driver`: holes of the file are zero."""
        if not want_zero or self._is_device:
            return Data(length, offset)
        if offset >= self._length:
            return Zero(length, offset)
        try:
            return space.find_extent(self._fd, offset, length)
        except OSError as error:
            raise _io_error(error, f"Looking for holes of '{self.options.filename}' at {offset} failed") from None

    async def copy_range(self, offset: int, target: BdrvChild, target_offset: int, length: int) -> None:
        """See `Driver`: ``copy_file_range``, where the target is a file as well."""
        other = target.node.driver
        if not isinstance(other, FileDriver):
            raise BlockIOError(errno.ENOTSUP)
        done = 0
        try:
            while done < length:
                count = min(_COPY_PIECE, length - done)
                await self._run(space.copy_fully, self._fd, other._fd, offset + done, target_offset + done, count)
                done += count
        except OSError as error:
            code = errno.ENOTSUP if error.errno in _NOT_SUPPORTED else error.errno or errno.EIO
            raise BlockIOError(
                code, f"Copying '{self.options.filename}' to '{other.options.filename}' failed"
            ) from None
        finally:
            other._length = _size_of(other._fd)

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """See `Driver`. ``preallocation`` is off, falloc or full; the latter two only when growing."""
        filename = self.options.filename
        if self._is_device:
            self._check_device_size(length, exact=exact, preallocation=preallocation)
            return
        if preallocation == "metadata":
            raise BlockIOError(errno.ENOTSUP, f"'{filename}' cannot preallocate metadata: a plain file has none")
        if preallocation != "off" and length < self._length:
            raise BlockIOError(errno.ENOTSUP, f"'{filename}' cannot preallocate while it shrinks")
        try:
            await self._run(space.resize, self._fd, self._length, length, preallocation)
        except OSError as error:
            raise _io_error(error, f"Could not resize '{filename}' to {length} bytes") from None
        finally:
            self._length = _size_of(self._fd)

    def _check_device_size(self, length: int, *, exact: bool, preallocation: str) -> None:
        self._length = _size_of(self._fd)
        if preallocation != "off" or length > self._length or (exact and length != self._length):
            raise BlockIOError(
                errno.ENOTSUP, f"'{self.options.filename}' is a device of {self._length} bytes, which stay"
            )

    def allocated_size(self) -> int | None:
        """See `Driver`: what the file takes on its file system."""
        return os.fstat(self._fd).st_blocks * 512

    def filename(self) -> str | None:
        """See `Driver`: the other options do not change what the file holds."""
        return self.options.filename

    def statistics(self) -> Mapping[str, Json]:
        """``BlockStatsSpecificFile`` as query-blockstats shows it."""
        return {
            "driver": self.name,
            "discard-nb-ok": self._discards_ok,
            "discard-nb-failed": self._discards_failed,
            "discard-bytes-ok": self._discarded_bytes,
        }

    # -------------------------------------------------------------------------------------------- permissions, reopen

    def check_permissions(self, perm: Perm, shared: Perm) -> None:
        """See `Driver`: locks the file; raises `ImageLocked`."""
        unit = self.limits.request_alignment
        if Perm.WRITE in perm and Perm.RESIZE not in perm and self._length % unit:
            raise CommandError(
                f"'{self.options.filename}' of {self._length} bytes cannot be written in whole blocks of {unit} bytes "
                "without growing it; use cache.direct=off or resize it"
            )
        if self._locks is not None:
            self._locks.take(perm, shared)

    def set_permissions(self, perm: Perm, shared: Perm) -> None:
        """See `Driver`."""
        if self._locks is not None:
            self._locks.settle(perm, shared)

    def abort_permissions(self) -> None:
        """See `Driver`."""
        if self._locks is not None:
            self._locks.revert()

    def check_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`: what is about the end of a migration can be changed."""
        assert isinstance(options, FileOptions)
        own = self.options
        same = evolve(options, drop_cache=own.drop_cache, x_check_cache_dropped=own.x_check_cache_dropped)
        super().check_reopen(same, read_only=read_only)

    def check_cache(self, *, direct: bool) -> None:
        """See `Driver`: the file system must be able to do without the page cache, and aio=native takes nothing else."""
        if not direct and self._aio == "native":
            raise CommandError(f"'{self.options.filename}' needs cache.direct=on for aio=native")
        if not direct or self._is_direct:
            return
        try:
            set_direct(self._fd, on=True)
        except OSError as error:
            raise _io_error(error, f"'{self.options.filename}' cannot be used with cache.direct=on") from None
        set_direct(self._fd, on=False)

    async def prepare_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`: opens the file anew, which must still be the same one."""
        if read_only and self._is_written():
            await self.flush()
        fd = self._open_descriptor(read_only=read_only)
        if not os.path.sameopenfile(fd, self._fd):
            os.close(fd)
            raise BlockIOError(errno.ESTALE, f"'{self.options.filename}' is not the file any more that is open")
        self._new_fd = fd

    def _is_written(self) -> bool:
        return self.node.write_generation != self.node.flushed_generation and not self._failed_flush

    def commit_reopen(self, options: Any, *, read_only: bool) -> None:
        """See `Driver`."""
        super().commit_reopen(options, read_only=read_only)
        if self._new_fd is not None:
            os.close(self._fd)
            self._fd, self._new_fd = self._new_fd, None
            self._failed_flush = 0
        if self.node.cache_direct is not self._is_direct:
            set_direct(self._fd, on=self.node.cache_direct)
            alignment = self._settle_cache()
            if isinstance(self._access, IoUring):
                self._access.alignment = alignment
            else:
                self._access.close()
                self._access = self._make_access(alignment)

    def abort_reopen(self) -> None:
        """See `Driver`."""
        if self._new_fd is not None:
            os.close(self._new_fd)
            self._new_fd = None

    # --------------------------------------------------------------------------------------------------------- create

    @classmethod
    async def create(cls, options: FileCreateOptions, context: CreateContext) -> None:
        """Make the file, or overwrite an existing one that nobody else has unshared. Raises `BlockIOError`."""
        if options.preallocation == "metadata":
            raise InvalidParameter("preallocation", "cannot be 'metadata': a plain file has none")
        if options.size < 0:
            raise InvalidParameter("size", f"cannot be negative ({options.size})")
        if options.extent_size_hint is not None and not 0 <= options.extent_size_hint <= _MAX_EXTENT_SIZE_HINT:
            raise InvalidParameter("extent-size-hint", f"must be between 0 and {_MAX_EXTENT_SIZE_HINT} bytes")
        options = evolve(options, size=max(options.size, 512) if options.size else 0)  # the first block is written, as in QEMU
        loop = asyncio.get_running_loop()
        warnings = await loop.run_in_executor(context.env.executor, _create_file, options)
        for warning in warnings:
            context.env.warn(warning)


def _create_file(options: FileCreateOptions) -> list[str]:
    """The blocking part of `FileDriver.create`; the result are warnings."""
    filename = options.filename
    fd, made = _make_or_open(filename)
    try:
        locks = FileLocks(os.dup(fd), filename)
        try:
            if locks.supported():
                locks.take(Perm.WRITE | Perm.RESIZE, Perm.ALL & ~Perm.RESIZE)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return _clear_device(fd, options)
            os.ftruncate(fd, 0)
            warnings = _apply_hints(fd, options)
            space.resize(fd, 0, options.size, options.preallocation)
        finally:
            locks.close()
    except BaseException as error:
        if made:
            with contextlib.suppress(OSError):
                os.unlink(filename)
        if isinstance(error, OSError) and not isinstance(error, BlockIOError):
            raise _io_error(error, f"Could not create '{filename}' of {options.size} bytes") from None
        raise
    finally:
        os.close(fd)
    return warnings


def _clear_device(fd: int, options: FileCreateOptions) -> list[str]:
    """What making a file comes to on a device: its size stays, and what told its format is overwritten."""
    length = _size_of(fd)
    if options.size > length or options.preallocation != "off":
        raise BlockIOError(
            errno.ENOTSUP, f"'{options.filename}' is a device of {length} bytes, which cannot grow or be preallocated"
        )
    space.write_fully(fd, 0, zero_view(min(length, 512)))
    return []


def _make_or_open(filename: str) -> tuple[int, bool]:
    """A descriptor for writing, and whether the file was made just now."""
    try:
        return os.open(filename, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), True
    except FileExistsError:
        return _open_storage(filename, os.O_RDWR), False
    except (OSError, ValueError) as error:
        code = error.errno if isinstance(error, OSError) else None
        raise BlockIOError(code or errno.EINVAL, f"Could not create {filename!r}") from None


def _apply_hints(fd: int, options: FileCreateOptions) -> list[str]:
    """Pass hints to file systems that know them; a hint that was asked for and is not known gives a warning."""
    warnings = []
    if options.nocow:
        try:
            space.avoid_copy_on_write(fd)
        except OSError as error:
            warnings.append(f"'{options.filename}': its file system does not take nocow ({error.strerror})")
    if options.extent_size_hint is not None:
        try:
            space.set_extent_size_hint(fd, options.extent_size_hint)
        except OSError as error:
            warnings.append(f"'{options.filename}': its file system takes no extent size hint ({error.strerror})")
    return warnings
