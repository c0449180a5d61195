"""Byte-range locks that make programs refuse each other's images.

Models the image locking of QEMU's file driver (image-locking.md), byte for byte: a permission in use is a shared lock on byte
100 + n, one that is not shared is a lock on byte 200 + n. Conflicts are found by asking whether an exclusive lock would be
granted, so nobody ever waits. The locks belong to an open file description of their own, so they survive a change of the
data descriptor on reopen. Differs from QEMU in that a refusal names the processes that have the file open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

from qblock.errors import BlockIOError, ImageLocked
from qblock.permissions import PERMISSION_NAMES, SINGLE_PERMISSIONS, Perm

USED: Final = 100
UNSHARED: Final = 200
"""Where the bytes begin that stand for what an opener uses, and for what it does not share."""
_OFD_GETLK: Final = 36
_OFD_SETLK: Final = 37
_FLOCK: Final = "hhqqi4x"  # struct flock on 64-bit Linux: type, whence, start, length, pid
_MOST_NAMED: Final = 3


def _lock_bytes(perm: Perm, shared: Perm) -> frozenset[int]:
    """The bytes that an opener with these permissions keeps locked."""
    used = {USED + n for n, single in enumerate(SINGLE_PERMISSIONS) if single in perm}
    unshared = {UNSHARED + n for n, single in enumerate(SINGLE_PERMISSIONS) if single not in shared}
    return frozenset(used | unshared)


class FileLocks:
    """The locks of one opener of ``filename``; ``fd`` (readable) is this object's own, and closed by `close`."""

    def __init__(self, fd: int, filename: str) -> None:
        self._fd = fd
        self._filename = filename
        self._settled: frozenset[int] = frozenset()
        self._locked: set[int] = set()

    def supported(self) -> bool:
        """Whether the file system and the kernel know such locks."""
        try:
            self._conflicts(USED)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return False
            raise
        return True

    def take(self, perm: Perm, shared: Perm) -> None:
        """Lock what these permissions need beyond what is held; raises `ImageLocked`, and then holds what it held before."""
        before = set(self._locked)
        wanted = _lock_bytes(perm, shared)
        try:
            for byte in sorted(wanted - before):
                self._set(byte, fcntl.F_RDLCK)
            for n, single in enumerate(SINGLE_PERMISSIONS):
                for mine, theirs in ((USED + n, UNSHARED + n), (UNSHARED + n, USED + n)):
                    if mine in wanted and self._conflicts(theirs):
                        raise self._refusal(single, needed=mine < UNSHARED)
        except OSError as error:
            self._keep_only(before)
            raise BlockIOError(error.errno or errno.EIO, f"Cannot lock '{self._filename}'") from error
        except ImageLocked:
            self._keep_only(before)
            raise

    def settle(self, perm: Perm, shared: Perm) -> None:
        """These permissions are final: give back what they do not need."""
        self._settled = _lock_bytes(perm, shared)
        self._keep_only(self._settled)

    def revert(self) -> None:
        """Give back what was taken since the last `settle`."""
        self._keep_only(self._settled)

    def close(self) -> None:
        """Give everything back, also when others have the same open file description."""
        self._keep_only(frozenset())
        os.close(self._fd)

    def _keep_only(self, wanted: frozenset[int] | set[int]) -> None:
        for byte in sorted(self._locked - wanted):
            self._set(byte, fcntl.F_UNLCK)

    def _set(self, byte: int, kind: int) -> None:
        fcntl.fcntl(self._fd, _OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))
        if kind == fcntl.F_UNLCK:
            self._locked.discard(byte)
        else:
            self._locked.add(byte)

    def _conflicts(self, byte: int) -> bool:
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind: int = struct.unpack(_FLOCK, fcntl.fcntl(self._fd, _OFD_GETLK, question))[0]
        return kind != fcntl.F_UNLCK

    def _refusal(self, single: Perm, *, needed: bool) -> ImageLocked:
        return ImageLocked(self._filename, PERMISSION_NAMES[single], needed=needed, holders=holders_of(self._fd))


def holders_of(fd: int) -> str:
    """Who else holds locks on the file of ``fd``, as "process 12 (qemu-img)", …; empty when the system does not tell."""
    from qblock.drivers.file.holders import lock_holders  # noqa: PLC0415  start-up time: only a refusal names them

    own = os.getpid()
    holders = [one for one in lock_holders(fd, except_fd=fd) if one.pid is not None]
    named = ["another node of this process" if one.pid == own else str(one) for one in holders]
    if len(named) > _MOST_NAMED:
        named[_MOST_NAMED:] = [f"{len(named) - _MOST_NAMED} more"]
    return ", ".join(named)
