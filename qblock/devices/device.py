"""The disk of a guest device: its backend, its tray, its error actions, its statistics, and the guest's requests to it.

Models the block side of QEMU's device models (semantics.md sections 14 and 15). A request of the guest that fails is reported to
it, ignored, or stops the machine: then it waits here and is tried again when the machine goes on. What a person does by
``qemu-io`` goes to the backend itself, past all this, as in QEMU.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final, Literal

import attrs

from qblock.accounting import DeviceAccounting, Operation
from qblock.backend import IO_FAILED, IO_NOSPACE, IO_OK, BlockBackend
from qblock.devices.models import DiskTraits
from qblock.errors import BlockIOError, CommandError
from qblock.permissions import Perm
from qblock.runstate import RunControl, RunState

if TYPE_CHECKING:
    from qblock.driver import Json
    from qblock.node import BdrvChild, BlockDriverState
    from qblock.transaction import Transaction

ErrorPolicy = Literal["report", "ignore", "enospc", "stop"]


@attrs.define(eq=False)
class GuestDevice:
    """A guest device's disk.

    ``id`` is the device's id or empty; ``model`` its model; ``name`` what query-block shows as ``qdev``: an id or a path.
    ``tray_open`` and ``locked`` are the tray's state, if it has one. ``share_rw``: others may write to its node as well.
    """

    id: str
    model: str
    name: str
    traits: DiskTraits
    backend: BlockBackend
    accounting: DeviceAccounting
    run: RunControl
    emit: Callable[[str, Mapping[str, Json]], None]
    removable: bool = False
    has_tray: bool = False
    share_rw: bool = False
    tray_open: bool = attrs.field(default=False, init=False)
    locked: bool = attrs.field(default=False, init=False)

    # ------------------------------------------------------------------------------------------------- its place in the graph

    def permissions_on(self, node: BlockDriverState | None) -> tuple[Perm, Perm]:
        """What it takes of ``node`` and shares; of none: what it would take of a node that can be written."""
        takes = Perm.CONSISTENT_READ
        if self.traits.writes and (node is None or not node.read_only or self.traits.needs_writable):
            takes |= Perm.WRITE
        shares = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        shares |= Perm.WRITE if self.share_rw else Perm.NONE
        return takes, shares | (Perm.RESIZE if self.traits.follows_size else Perm.NONE)

    def insert(self, node: BlockDriverState, change: Transaction | None = None) -> None:
        """Put a medium in; raises `PermissionConflict` and `ReadOnlyNode`, and then nothing has changed."""
        before = self.backend.perm, self.backend.shared
        self.backend.set_permissions(*self.permissions_on(node), change)
        try:
            self.backend.insert(node, change)
        except BaseException:
            self.backend.set_permissions(*before, change)
            raise

    @property
    def shown_name(self) -> str:
        """What messages call it: the name of its backend, or its own."""
        return self.backend.name or self.name

    # ------------------------------------------------------------------------------------------------------------- the tray

    def move_tray(self, *, is_open: bool) -> None:
        """Open or close the tray, with the event DEVICE_TRAY_MOVED; nothing happens when it stands so, or there is none."""
        if not self.has_tray or self.tray_open is is_open:
            return
        self.tray_open = is_open
        self.emit("DEVICE_TRAY_MOVED", {"device": self.backend.name, "id": self.name, "tray-open": is_open})

    def lock_tray(self, *, locked: bool) -> None:
        """The guest locks its tray or unlocks it. Raises `CommandError` when there is none."""
        if not self.has_tray:
            raise CommandError(f"Device '{self.shown_name}' has no tray")
        self.locked = locked

    def reset(self) -> None:
        """The machine is reset: the tray is closed and unlocked, and nobody is told, as nothing was moved by hand."""
        self.tray_open = self.locked = False

    def state(self) -> dict[str, bool]:
        """What a snapshot of the machine keeps of it."""
        return {"tray-open": self.tray_open, "locked": self.locked} if self.has_tray else {}

    def restore(self, state: Mapping[str, Json]) -> None:
        """Be again as when `state` was asked; nobody is told, as nothing was moved by hand."""
        if self.has_tray:
            self.tray_open, self.locked = state.get("tray-open") is True, state.get("locked") is True

    # --------------------------------------------------------------------------------------------------- the guest's requests

    @property
    def length(self) -> int:
        """Size of the disk in bytes; raises ``BlockIOError(ENOMEDIUM)`` when there is none."""
        return self.backend.length

    @property
    def root(self) -> BdrvChild | None:
        """The edge to the medium."""
        return self.backend.root

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; raises `BlockIOError`."""
        await self._request("read", offset, len(buffer), lambda: self.backend.read_into(offset, buffer))

    async def write_from(self, offset: int, buffer: memoryview) -> None:
        """Write ``buffer`` at ``offset``; raises `BlockIOError`."""
        await self._request("write", offset, len(buffer), lambda: self.backend.write_from(offset, buffer))

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """Make the range read as zeroes; raises `BlockIOError`."""
        zero = self.backend.write_zeroes
        await self._request("zero", offset, length, lambda: zero(offset, length, may_unmap=may_unmap))

    async def discard(self, offset: int, length: int) -> None:
        """The content of the range is no longer needed; raises `BlockIOError`."""
        await self._request("discard", offset, length, lambda: self.backend.discard(offset, length))

    async def flush(self) -> None:
        """Make all completed writes durable; raises `BlockIOError`."""
        await self._request("flush", 0, 0, self.backend.flush)

    async def _request(
        self, operation: Operation, offset: int, length: int, run: Callable[[], Awaitable[None]]
    ) -> None:
        self._check_range(operation, offset, length)
        self._check_writing(operation)
        started = self.accounting.start()
        while True:
            try:
                await run()
            except BlockIOError as error:
                action = self._act_on(operation, error)
                if action == "stop":
                    if await self.run.until_running():
                        continue
                    raise BlockIOError(errno.ECANCELED, "the machine was reset or ended before a second try") from error
                if action == "report":
                    self.accounting.failed(operation, started)
                    raise
            self.accounting.done(operation, length, started)
            return

    def _check_range(self, operation: Operation, offset: int, length: int) -> None:
        """What lies outside of the disk is refused by the device: no error action is taken. An empty drive answers by itself."""
        root = self.backend.root
        if root is not None and (offset < 0 or offset + length > root.node.length):
            self.accounting.refused(operation)
            raise BlockIOError(errno.EIO, f"{length} bytes at {offset} are not inside the disk of {root.node.length} bytes")

    def _check_writing(self, operation: Operation) -> None:
        """A disk that was read-only when the device took it stays so for the guest, also when its node can be written later."""
        root = self.backend.root
        if operation in _CHANGES and root is not None and not root.may_write and not root.node.read_only:
            self.accounting.refused(operation)
            raise BlockIOError(errno.EPERM, f"The disk '{self.shown_name}' is read-only for the guest")

    # ---------------------------------------------------------------------------------------------------------- error actions

    @property
    def io_status(self) -> str | None:
        """How an error has stopped the machine last, as query-block shows it; None where no policy lets one do so."""
        backend = self.backend
        may_stop = backend.on_write_error in ("enospc", "stop") or backend.on_read_error == "stop"
        return backend.io_status if self.traits.io_status and may_stop else None

    def _act_on(self, operation: Operation, error: BlockIOError) -> Literal["report", "ignore", "stop"]:
        """What becomes of a failed request; says so, and stops the machine when that is to be done."""
        is_read = operation == "read"
        nospace = error.errno == errno.ENOSPC
        action = _ACTIONS[self.backend.on_read_error if is_read else self.backend.on_write_error][nospace]
        if not self.traits.error_actions or self.backend.root is None:
            return "report"
        if action == "stop" and self.backend.io_status == IO_OK:
            self.backend.io_status = IO_NOSPACE if nospace else IO_FAILED
        self.emit(
            "BLOCK_IO_ERROR",
            {
                "device": self.backend.name,
                "node-name": self.backend.node.node_name,
                "operation": "read" if is_read else "write",
                "action": action,
                **({} if self.io_status is None else {"nospace": nospace}),
                "reason": _reason(error),
            },
        )
        if action == "stop":
            self.run.stop(RunState.IO_ERROR)
        return action

    def __repr__(self) -> str:
        return f"<GuestDevice {self.name!r} {self.model} on {self.backend!r}>"


_CHANGES: Final = frozenset({"write", "zero", "discard"})
_ACTIONS: Final[Mapping[str, tuple[Literal["report", "ignore", "stop"], Literal["report", "ignore", "stop"]]]] = {
    # policy: (what is done about most errors, what about a full storage)
    "report": ("report", "report"),
    "ignore": ("ignore", "ignore"),
    "stop": ("stop", "stop"),
    "enospc": ("report", "stop"),
}


def _reason(error: BlockIOError) -> str:
    """The text of the error's number, which clients of QEMU are used to."""
    return BlockIOError(error.errno or errno.EIO).strerror or "Input/output error"
