"""Who holds locks on an image file, as far as the kernel tells.

Models nothing of QEMU, which only says that it failed to get a lock. Locks of open file descriptions have no owner for the
kernel; the descriptors that carry them are found in ``/proc``. Processes of other users cannot be looked into: they are unknown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Final

import attrs

from qblock.drivers.file.locks import UNSHARED, USED
from qblock.permissions import PERMISSION_NAMES, SINGLE_PERMISSIONS

_LOCK: Final = re.compile(r"^(?:lock:\s*)?\d+: (\w+)\s+ADVISORY\s+\w+\s+(-?\d+) (\w+):(\w+):(\d+) (\d+) (\d+|EOF)", re.MULTILINE)


@attrs.frozen
class LockHolder:
    """A process with an image open: what it uses the image for, and what it does not let others do (permission names).

    ``pid`` and ``program`` are None when the system does not tell whose the locks are.
    """

    pid: int | None
    program: str | None
    uses: tuple[str, ...]
    forbids: tuple[str, ...]

    def __str__(self) -> str:
        return f"process {self.pid} ({self.program})" if self.pid is not None else "a process of another user"

    @property
    def writes(self) -> bool:
        """Whether it may change the image."""
        return "write" in self.uses or "resize" in self.uses


def lock_holders(fd: int, *, except_fd: int | None = None) -> list[LockHolder]:
    """The holders of locks on the file of ``fd``, by process id; ``except_fd`` of this process does not count."""
    try:
        wanted = os.fstat(fd)
        processes = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    except OSError:
        return []
    holders = []
    seen: set[int] = set()
    for pid in processes:
        found = set(_locked_bytes(pid, wanted, except_fd=except_fd if pid == os.getpid() else None))
        if found:
            holders.append(_holder(pid, _command_of(pid), found))
            seen |= found
    unknown = _all_locked_bytes(wanted) - seen
    if unknown and except_fd is None:
        holders.append(_holder(None, None, unknown))
    return holders


def _holder(pid: int | None, program: str | None, found: set[int]) -> LockHolder:
    names = [PERMISSION_NAMES[single] for single in SINGLE_PERMISSIONS]
    return LockHolder(
        pid,
        program,
        tuple(name for n, name in enumerate(names) if USED + n in found),
        tuple(name for n, name in enumerate(names) if UNSHARED + n in found),
    )


def _locked_bytes(pid: int, wanted: os.stat_result, *, except_fd: int | None) -> Iterator[int]:
    """The bytes that descriptors of the process keep locked in the file."""
    folder = f"/proc/{pid}"
    try:
        names = os.listdir(f"{folder}/fd")
    except OSError:
        return  # it is somebody else's, or gone
    for name in names:
        try:
            found = os.stat(f"{folder}/fd/{name}")
            if (found.st_dev, found.st_ino) != (wanted.st_dev, wanted.st_ino) or int(name) == except_fd:
                continue
            with open(f"{folder}/fdinfo/{name}", encoding="utf-8") as stream:
                text = stream.read()
        except OSError:
            continue  # closed meanwhile
        for match in _LOCK.finditer(text):
            if match[1] == "OFDLCK":
                yield from _range(match)


def _all_locked_bytes(wanted: os.stat_result) -> set[int]:
    """The bytes that anybody keeps locked in the file."""
    try:
        with open("/proc/locks", encoding="utf-8") as stream:
            text = stream.read()
    except OSError:
        return set()
    place = (os.major(wanted.st_dev), os.minor(wanted.st_dev), wanted.st_ino)
    found: set[int] = set()
    for match in _LOCK.finditer(text):
        if match[1] == "OFDLCK" and (int(match[3], 16), int(match[4], 16), int(match[5])) == place:
            found.update(_range(match))
    return found


def _range(match: re.Match[str]) -> range:
    first = int(match[6])
    last = UNSHARED + len(SINGLE_PERMISSIONS) if match[7] == "EOF" else int(match[7])
    return range(first, min(last, UNSHARED + len(SINGLE_PERMISSIONS)) + 1)


def _command_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as stream:
            return stream.read().strip()
    except OSError:
        return "?"
