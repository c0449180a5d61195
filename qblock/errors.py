"""Everything qblock reports on purpose, as one family of exceptions.

Models the error side of QEMU's block layer and QMP (semantics.md section 1): each error knows its QMP class, and the
fields that decisions look at are attributes. Differs from QEMU in that message texts are our own: they say what failed,
where, and what to do about it. A bug is an ``AssertionError``, never one of these.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import ClassVar


class QBlockError(Exception):
    """Root of everything reported on purpose; ``qmp_class`` is the class a monitor answers with."""

    qmp_class: ClassVar[str] = "GenericError"


# --------------------------------------------------------------------------------------------- requests of a person


class CommandError(QBlockError):
    """The request cannot be honoured as it was made; nothing was changed."""


class DeviceInUse(CommandError):
    """A device (or a node) is wanted by somebody else."""

    qmp_class = "DeviceInUse"

    def __init__(self, name: str, detail: str = "") -> None:
        super().__init__(f"'{name}' is in use{': ' if detail else ''}{detail}")
        self.name = name


class UnknownFd(CommandError):
    """No file descriptor has that name: what QEMU 7.2 gives no class of its own, and 1.1 did."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no file descriptor named '{name}'")
        self.name = name


class FdNotFound(CommandError):
    """No file descriptor was given that name with ``getfd``."""

    qmp_class = "FdNotFound"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no file descriptor named '{name}'; send it with getfd first")
        self.name = name


class OpenFileFailed(QBlockError):
    """The image ``filename`` cannot be the medium of ``device``; ``detail`` says why, ``now`` what the device has instead."""

    qmp_class = "OpenFileFailed"

    def __init__(self, filename: str, *, device: str, detail: str, now: str) -> None:
        super().__init__(f"Device '{device}' cannot have '{filename}': {detail}; {now}")
        self.filename = filename


class CommandNotFound(CommandError):
    """There is no command of that name, or it is not available in this state of the session."""

    qmp_class = "CommandNotFound"

    def __init__(self, command: str, detail: str = "is not a command of this monitor") -> None:
        super().__init__(f"'{command}' {detail}")
        self.command = command


class DeviceNotFound(CommandError):
    """No block backend or guest device of that name (class DeviceNotFound)."""

    qmp_class = "DeviceNotFound"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no device '{name}'")
        self.name = name


class DeviceNotActive(CommandError):
    """No block job of that id (class DeviceNotActive, as block-job-* commands answer), or no such device in use."""

    qmp_class = "DeviceNotActive"

    def __init__(self, name: str, detail: str = "There is no block job") -> None:
        super().__init__(f"{detail} '{name}'")
        self.name = name


class NodeNotFound(CommandError):
    """No block node of that name; class GenericError, as QEMU answers for nodes."""

    def __init__(self, name: str, detail: str = "There is no block node named") -> None:
        super().__init__(f"{detail} '{name}'")
        self.name = name


class InvalidParameter(CommandError):
    """A member of a request or an option has a value that cannot be used; ``name`` is its path."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"Parameter '{name}' {detail}")
        self.name = name


class DuplicateName(CommandError):
    """The name of a node, device, job or bitmap is taken already."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"The {kind} name '{name}' is already in use; choose another one")
        self.kind = kind
        self.name = name


class NodeBusy(CommandError):
    """An operation on a node is blocked by one of its users; ``holder`` says by which."""

    def __init__(self, node: str, holder: str) -> None:
        super().__init__(f"Node '{node}' is busy: {holder}")
        self.node = node
        self.holder = holder


class FrozenLink(CommandError):
    """An edge is frozen, by a job that relies on it; ``parent`` and ``child`` are its ends (texts), ``name`` the edge's."""

    def __init__(self, *, name: str, parent: str, child: str) -> None:
        super().__init__(f"The '{name}' link from {parent} to '{child}' cannot change while a job relies on it")
        self.name = name
        self.parent = parent
        self.child = child


class ReadOnlyNode(CommandError):
    """A node that is read-only cannot give what ``user`` takes (``permissions``: their names)."""

    def __init__(self, *, node: str, user: str, permissions: str) -> None:
        super().__init__(f"Node '{node}' is read-only, so it cannot give {permissions} to {user}; reopen it writable")
        self.node = node
        self.user = user
        self.permissions = permissions


class PermissionConflict(CommandError):
    """Two users of a node cannot share it.

    ``permissions`` is what ``user`` takes and ``holder`` does not share (``permissions.Perm`` printed as names).
    ``user_child`` and ``holder_child`` are the names of their edges to the node, empty where the conflict is with another
    program.
    """

    def __init__(
        self, *, node: str, user: str, holder: str, permissions: str, user_child: str = "", holder_child: str = ""
    ) -> None:
        as_user = f" (as its child '{user_child}')" if user_child else ""
        as_holder = f" (as its child '{holder_child}')" if holder_child else ""
        super().__init__(
            f"{user} needs {permissions} on node '{node}'{as_user}, which {holder}{as_holder} does not allow to others"
        )
        self.node = node
        self.user = user
        self.holder = holder
        self.permissions = permissions
        self.user_child = user_child
        self.holder_child = holder_child


class JobStateError(CommandError):
    """The verb is not allowed in the job's present state (semantics.md section 3.2)."""

    def __init__(self, job: str, status: str, verb: str) -> None:
        super().__init__(f"Job '{job}' is {status}, and a job in that state cannot be told to {verb}")
        self.job = job
        self.status = status
        self.verb = verb


class ImageLocked(CommandError):
    """Another opener of the file does not agree with what this one needs (image-locking.md).

    ``permission`` is its name, ``needed`` tells whether we need it and the other does not share it, or the other way round;
    ``holders`` names the processes that have the file open, as far as the system tells.
    """

    def __init__(self, filename: str, permission: str, *, needed: bool, holders: str) -> None:
        conflict = "is not shared by" if needed else "is in use and would not be shared with"
        super().__init__(
            f"Cannot lock '{filename}': its '{permission}' permission {conflict} {holders or 'another process'}; "
            "close it there first"
        )
        self.filename = filename
        self.permission = permission
        self.needed = needed
        self.holders = holders


class OpenDenied(CommandError):
    """An image names another file, and the policy in force does not open what an image merely mentions."""

    def __init__(self, *, image: str, mentions: str, what: str) -> None:
        super().__init__(
            f"'{image}' names '{mentions}' as its {what}, which the policy in force does not open; "
            f"allow it (OpenPolicy.follow()) or give the {what} yourself"
        )
        self.image = image
        self.mentions = mentions


# ------------------------------------------------------------------------------------------------------------ images


class ImageError(QBlockError):
    """The content of an image file is the trouble."""


class NotThisFormat(ImageError):
    """The file is not an image of the format that it was opened as."""

    def __init__(self, image: str, fmt: str, detail: str) -> None:
        super().__init__(f"'{image}' is not a {fmt} image: {detail}")
        self.image = image
        self.format = fmt


class UnsupportedFeature(ImageError):
    """The image uses a feature that qblock does not support; ``feature`` names it."""

    def __init__(self, image: str, feature: str) -> None:
        super().__init__(f"'{image}' uses a feature that is not supported: {feature}")
        self.image = image
        self.feature = feature


class CorruptImage(ImageError):
    """A structure of the image contradicts the format; ``offset`` is the file offset in bytes, if known."""

    def __init__(self, image: str, detail: str, *, offset: int | None = None) -> None:
        where = "" if offset is None else f" at file offset {offset:#x}"
        super().__init__(f"'{image}' is damaged{where}: {detail}; run 'qblock-img check' on it")
        self.image = image
        self.offset = offset
        self.detail = detail


# --------------------------------------------------------------------------------------------------------------- I/O


class BlockIOError(QBlockError, OSError):
    """A request failed; ``errno`` is what error policies look at (``ENOSPC`` is special to them)."""

    def __init__(self, errno: int, detail: str = "") -> None:
        OSError.__init__(self, errno, detail or os.strerror(errno))

    def __str__(self) -> str:
        text = os.strerror(self.errno or _errno.EIO)
        return text if not self.strerror or self.strerror == text else f"{self.strerror}: {text}"


class FlushFailed(BlockIOError):
    """The writes of a device could not be made durable, so that its image was not closed."""

    qmp_class = "IOError"


class FatalDamage(BlockIOError):
    """Damage was met that writing would make worse (``EIO``): the image is marked corrupt, the node gives nothing any more."""


class ImagePoisoned(ImageError, BlockIOError):
    """A metadata write failed earlier, so what is on disk is not known; writing is refused until the node is reopened.

    It is a `BlockIOError` too (``EIO``), so that error policies of jobs and devices treat it as a failed request. After
    `FatalDamage` it is ``ENOMEDIUM``, and the node must be opened anew, as in QEMU.
    """

    def __init__(self, node: str, cause: BaseException) -> None:
        if isinstance(cause, FatalDamage):
            text = f"Node '{node}' has no image any more, since it is damaged ({cause}); repair it, and open it anew"
            BlockIOError.__init__(self, _errno.ENOMEDIUM, text)
        else:
            text = f"Node '{node}' refuses writes since a metadata write failed ({cause}); reopen it"
            BlockIOError.__init__(self, _errno.EIO, text)
        self.node = node
        self.cause = cause

    def __str__(self) -> str:
        return str(self.strerror)


class JobCancelled(Exception):
    """Control flow inside jobs: raised at a pause point after a cancel request; never reaches a monitor."""
