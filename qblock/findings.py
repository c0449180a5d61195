"""What a check of an image finds: one value for each finding, with all that a person needs to decide what to do.

QEMU's checks print lines and count; qblock's give values besides, from which ``qblock-img check --explain`` is made.
"""

from __future__ import annotations

import enum

import attrs

from qblock.ranges import ByteRange


class Severity(enum.Enum):
    """What a finding endangers: the content of the disk, or only space."""

    CORRUPTION = "corruption"
    LEAK = "leak"


@attrs.frozen(kw_only=True)
class Finding:
    """One thing that is wrong with an image.

    ``kind`` is a short name that programs can look at, ``text`` the line of the classic report. ``meaning`` says what it is,
    ``repair`` what repairing does (or that nothing can be done). ``place`` is where in the image file the damaged thing lies,
    ``guest`` which parts of the disk it concerns and ``users`` who refers to what lies there. ``fixed``: it has been repaired.
    """

    kind: str
    severity: Severity
    text: str
    meaning: str
    repair: str
    place: ByteRange | None = None
    guest: tuple[ByteRange, ...] = ()
    users: tuple[str, ...] = ()
    fixed: bool = False
