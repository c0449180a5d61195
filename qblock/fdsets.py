"""Sets of file descriptors that the program was given: files under the names ``/dev/fdset/N``.

Models ``-add-fd``, ``add-fd`` and ``query-fdsets`` of QEMU: management opens a file, perhaps one that the program could not open
itself, and each opening of ``/dev/fdset/N`` takes the descriptor of the set that fits what it is opened for. Differs from QEMU in
that a descriptor which is removed is closed at once, since every user has a duplicate.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Mapping
from typing import Final

import attrs

from qblock.errors import BlockIOError, CommandError

PREFIX: Final = "/dev/fdset/"


@attrs.frozen
class SetMember:
    """A descriptor of a set; ``opaque`` is what its owner says of it."""

    fd: int
    opaque: str | None = None


class FdSets:
    """The sets of one block system, by number."""

    def __init__(self) -> None:
        self._sets: dict[int, list[SetMember]] = {}

    @property
    def sets(self) -> Mapping[int, list[SetMember]]:
        """The sets, by number; the member added last comes first."""
        return self._sets

    def add(self, fd: int, number: int | None = None, opaque: str | None = None) -> int:
        """Take ``fd`` over into a set, or (None) into a new one; gives the number of the set. Raises `CommandError`."""
        if number is None:
            number = next(n for n in range(len(self._sets) + 1) if n not in self._sets)
        if number < 0:
            raise CommandError(f"The number of a set of descriptors is 0 or more, not {number}")
        self._sets.setdefault(number, []).insert(0, SetMember(fd, opaque))
        return number

    def remove(self, number: int, fd: int | None = None) -> None:
        """Close one descriptor of a set, or all; a set that is empty is gone. Raises `CommandError` when there is none."""
        members = self._sets.get(number, [])
        leaving = [member for member in members if fd is None or member.fd == fd]
        if not leaving:
            which = "" if fd is None else f" {fd} in the"
            raise CommandError(f"There is no descriptor{which} set {number}")
        for member in leaving:
            members.remove(member)
            os.close(member.fd)
        if not members:
            del self._sets[number]

    def open(self, name: str, flags: int) -> int:
        """A duplicate of the descriptor for ``/dev/fdset/N`` that was opened as ``flags`` ask; the caller owns it.

        Raises ``BlockIOError``: ``ENOENT`` without such a set, ``EACCES`` when none of its descriptors fits.
        """
        text = name.removeprefix(PREFIX)
        members = self._sets.get(int(text)) if text.isascii() and text.isdigit() else None
        if members is None:
            raise BlockIOError(errno.ENOENT, f"Could not open '{name}'")
        for member in members:
            if fcntl.fcntl(member.fd, fcntl.F_GETFL) & os.O_ACCMODE == flags & os.O_ACCMODE:
                return fcntl.fcntl(member.fd, fcntl.F_DUPFD_CLOEXEC, 3)
        raise BlockIOError(errno.EACCES, f"Could not open '{name}': no descriptor in the set was opened in that way")

    def close(self) -> None:
        """Close all descriptors."""
        for number in list(self._sets):
            self.remove(number)
