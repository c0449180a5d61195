"""Space in a host file: allocate, punch and zero ranges, and find its holes.

Models no class of QEMU; it is what driver.py needs from Linux beyond the ``os`` module (``fallocate`` with its modes). All
functions block, and raise `OSError`; ``EOPNOTSUPP`` where the file system cannot. Offsets and lengths are bytes.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import os
from typing import Final

from qblock.extents import Data, Zero
from qblock.units import KiB, MiB
from qblock.zeroes import zero_view

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10

_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_NOCOW: Final = 0x00800000
_FS_IOC_FSGETXATTR: Final = 0x801C581F
_FS_IOC_FSSETXATTR: Final = 0x401C5820
_XFLAG_EXTSIZE: Final = 0x00000800

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs
_MEMORY_FILE_SYSTEMS: Final = (0x01021994, 0x858458F6)  # tmpfs, ramfs (statfs(2))
_RESERVING_FILE_SYSTEMS: Final = (0xEF53,)  # ext4
_SHARING_FILE_SYSTEMS: Final = (0x9123683E, 0x58465342, 0xCA451A4E)  # btrfs, XFS, bcachefs
_RESERVED_WRITE: Final = 256 * KiB
_FIRST_BLOCK: Final = 4096


def _file_system(fd: int) -> int:
    """The type of the file system as statfs(2) tells it; 0 when it does not."""
    answer = (ctypes.c_long * 64)()  # struct statfs begins with the type, a long, and is shorter than this
    return answer[0] if _fstatfs(fd, answer) == 0 else 0


def shares_blocks(fd: int) -> bool:
    """Whether ``copy_file_range`` may share blocks on the file's file system instead of copying them."""
    return _file_system(fd) in _SHARING_FILE_SYSTEMS


def is_in_memory(fd: int) -> bool:
    """Whether the file lives in memory only, so that reading it never waits for a disk."""
    return _file_system(fd) in _MEMORY_FILE_SYSTEMS


def gains_by_reserving(fd: int) -> bool:
    """Whether `write_reserved` pays off: ext4 takes large writes into reserved space in two thirds of the time."""
    return _file_system(fd) in _RESERVING_FILE_SYSTEMS


def _change_space(fd: int, mode: int, offset: int, length: int) -> None:
    while _fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def allocate(fd: int, offset: int, length: int) -> None:
    """Reserve space for the range; the file grows as needed, and unwritten parts read as zeroes."""
    _change_space(fd, 0, offset, length)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the space of the range back; it reads as zeroes, the size stays."""
    _change_space(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make the range read as zeroes, with space reserved for it; the file grows as needed."""
    _change_space(fd, _ZERO_RANGE, offset, length)


def write_fully(fd: int, offset: int, buffer: memoryview) -> None:
    """Write all of ``buffer``, going on after short writes."""
    done = os.pwrite(fd, buffer, offset)
    while done < len(buffer):
        count = os.pwrite(fd, buffer[done:], offset + done)
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += count


def write_reserved(fd: int, offset: int, buffer: memoryview) -> None:
    """As `write_fully`; space for a large write is reserved in one step, instead of by the file system page by page.

    Where that fails the write will tell. Costs 1 microsecond where there was space already.
    """
    if len(buffer) >= _RESERVED_WRITE:
        with contextlib.suppress(OSError):
            _change_space(fd, _KEEP_SIZE, offset, len(buffer))
    write_fully(fd, offset, buffer)


def write_zero_data(fd: int, offset: int, length: int) -> None:
    """Write zeroes as plain data; past the page cache no more than what is aligned could be, so that it takes part here."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        cached = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            write_zero_data(cached, offset, length)
            os.fdatasync(cached)
        finally:
            os.close(cached)
        return
    end = offset + length
    while offset < end:
        count = min(MiB, end - offset)
        write_fully(fd, offset, zero_view(count))
        offset += count


def find_extent(fd: int, offset: int, length: int) -> Data | Zero:
    """Whether data or a hole begins at ``offset``, and how far it goes (at most ``length``); behind the end is a hole."""
    try:
        start = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return Zero(length, offset)
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return Data(length, offset)  # the file system cannot tell
        raise
    if start > offset:
        return Zero(min(length, start - offset), offset)
    end = os.lseek(fd, offset, os.SEEK_HOLE)
    # A file that is being cut off meanwhile can answer with an earlier end; the rest is then found at the next question.
    return Data(min(length, end - offset) if end > offset else length, offset)


def avoid_copy_on_write(fd: int) -> None:
    """Switch copy-on-write of the file system off for an empty file (btrfs)."""
    flags = array.array("L", [0])
    fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
    flags[0] |= _FS_NOCOW
    fcntl.ioctl(fd, _FS_IOC_SETFLAGS, flags)


def set_extent_size_hint(fd: int, size: int) -> None:
    """Ask the file system to allocate in units of ``size`` bytes (XFS); 0 is no hint."""
    attributes = array.array("I", [0] * 7)  # struct fsxattr: xflags, extsize, nextents, projid, cowextsize, padding
    fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, attributes)
    attributes[0] = attributes[0] | _XFLAG_EXTSIZE if size else attributes[0] & ~_XFLAG_EXTSIZE
    attributes[1] = size
    fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, attributes)


def make_hole(fd: int, offset: int, length: int) -> None:
    """Make the range read as zeroes without space for it; the file grows as needed."""
    size = os.fstat(fd).st_size
    end = offset + length
    if offset < size:
        punch_hole(fd, offset, length)
    if end > size:
        os.ftruncate(fd, end)


def make_zero(fd: int, offset: int, length: int) -> None:
    """Make the range read as zeroes with space for it; the file grows as needed."""
    try:
        zero_range(fd, offset, length)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        punch_hole(fd, offset, length)
        allocate(fd, offset, length)


def resize(fd: int, old: int, new: int, preallocation: str) -> None:
    """Change the size from ``old`` to ``new``; an added area gets space by ``preallocation`` (off, falloc, full).

    A file that was empty gets its first block written, as in QEMU: what alignment ``O_DIRECT`` needs can be found by reading
    data, not a hole. When the space cannot be had the size is ``old`` again.
    """
    if new <= old:
        os.ftruncate(fd, new)
        return
    try:
        if preallocation == "falloc":
            allocate(fd, old, new - old)
        if preallocation in ("off", "falloc"):
            os.ftruncate(fd, new)
            if not old:
                write_zero_data(fd, 0, min(new, _FIRST_BLOCK))
        else:
            write_zero_data(fd, old, new - old)
            os.fsync(fd)
    except OSError:
        os.ftruncate(fd, old)
        raise


def copy_fully(source: int, target: int, source_offset: int, target_offset: int, length: int) -> None:
    """Copy between files inside the kernel; ``EOPNOTSUPP`` where the source ends before."""
    done = 0
    while done < length:
        count = os.copy_file_range(source, target, length - done, source_offset + done, target_offset + done)
        if not count:
            raise OSError(errno.EOPNOTSUPP, "the source ends before")
        done += count
