"""Guest devices as far as the block layer sees them, and the ``-drive`` option that makes them.

Models a virtio disk (``if=virtio``) and a drive without a device (``if=none``): what they take of their node, the path under
which query-block names the device, and the counters that only a device keeps (semantics.md section 14.2). Differs from QEMU
in that other interfaces, and options that need a machine around the disk (``werror=stop``, ``snapshot=on``), are refused by
name instead of being emulated in part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from qblock.backend import BlockBackend
from qblock.clock import Clock
from qblock.driver import Json
from qblock.errors import BlockIOError, CommandError, InvalidParameter
from qblock.graph import check_identifier
from qblock.node import BlockDriverState
from qblock.opening import merge
from qblock.options import fields, option, split_keyval, unflatten_dotted, visit
from qblock.permissions import Perm
from qblock.throttle_limits import DRIVE_NAMES, NO_LIMITS, ThrottleLimits, changed_limits

if TYPE_CHECKING:
    from qblock.system import BlockSystem

CacheMode = Literal["writeback", "none", "writethrough", "directsync", "unsafe"]

CACHE_MODES: Final[Mapping[str, tuple[bool, bool, bool]]] = {
    # mode: (bypass the page cache, ignore flushes, durable on completion)
    "writeback": (False, False, False),
    "none": (True, False, False),
    "writethrough": (False, False, True),
    "directsync": (True, False, True),
    "unsafe": (False, True, False),
}
"""What the cache modes of the tools and of ``-drive`` mean."""


@attrs.frozen
class DriveOptions:
    """The members of ``-drive`` that are not options of the image's nodes. ``rest`` holds those, nested.

    ``limits`` and ``group`` are its ``throttling.`` members.
    """

    file: str | None = option(None, doc="the image: a file name or json:{…}")
    interface: Literal["virtio", "none"] = option("none", doc="what the drive is connected to", name="if")
    format: str | None = option(None, doc="format of the image; probed when absent")
    id: str | None = option(None, doc="name of the drive; made from interface and index when absent")
    index: int | None = option(None, doc="number of the drive on its interface")
    cache: CacheMode = option("writeback", doc="cache mode")
    writeback: bool | None = option(None, doc="the disk has a write cache; overrides the mode", name="cache.writeback")
    aio: Literal["threads", "native", "io_uring"] = option("threads", doc="how the file driver runs requests")
    discard: Literal["ignore", "off", "unmap", "on"] = option("ignore", doc="whether discards reach the image")
    detect_zeroes: Literal["off", "on", "unmap"] = option("off", doc="turn writes of zeroes into zero writes")
    readonly: bool = option(False, doc="open the image read-only")
    read_only: bool = option(False, doc="the same")
    copy_on_read: bool = option(False, doc="copy what is read from the backing file into the image")
    media: Literal["disk"] = option("disk", doc="kind of medium")
    snapshot: Literal["off"] = option("off", doc="throw changes away at the end; not offered")
    werror: Literal["report"] = option("report", doc="what the device does on a write error")
    rerror: Literal["report"] = option("report", doc="what the device does on a read error")
    rest: Mapping[str, Any] = option({}, doc="options of the image's nodes")
    limits: ThrottleLimits = option(NO_LIMITS, doc="limits of its rate", name="throttling")
    group: str | None = option(None, doc="throttle group to join, by default one of the drive's name")


_OWN: Final = frozenset(field.name.replace("_", "-") for field in attrs.fields(DriveOptions)) - {
    "interface",
    "rest",
    "limits",
    "group",
} | {"if"}


def parse_drive(options: str | Mapping[str, Json], *, default_interface: str = "none") -> DriveOptions:
    """``-drive`` options from text or a nested object; raises `CommandError` and `InvalidParameter`."""
    flat = dict(split_keyval(options, implied_key="file") if isinstance(options, str) else options)
    own: dict[str, Json] = {"if": default_interface}
    # These stand beside members of the nodes' options of the same names (file.locking), which overrule them.
    own |= {key: flat.pop(key) for key in ("file", "cache") if isinstance(flat.get(key), str)}
    given = unflatten_dotted(flat)
    limits, group = _take_limits(given)
    own |= {key: value for key, value in given.items() if key in _OWN and not isinstance(value, Mapping)}
    rest = {key: value for key, value in given.items() if key not in own or isinstance(value, Mapping)}
    if "driver" in rest:
        if "format" in own:
            raise CommandError("'format' and 'driver' are the same option of a drive; give one of them")
        own["format"] = rest.pop("driver")
    if isinstance(cache := rest.get("cache"), Mapping) and "writeback" in cache:
        rest["cache"] = dict(cache)
        own["cache.writeback"] = rest["cache"].pop("writeback")
    if "readonly" in own and "read-only" in own:
        raise CommandError("'readonly' and 'read-only' are the same option of a drive; give one of them")
    drive: DriveOptions = visit(DriveOptions, own, strings=True)
    if drive.file == "":
        drive = attrs.evolve(drive, file=None)
    if drive.detect_zeroes == "unmap" and drive.discard not in ("on", "unmap"):
        raise InvalidParameter("detect-zeroes", "can be 'unmap' only together with discard=unmap")
    return attrs.evolve(drive, rest=rest, limits=limits, group=group)


_SHORT_LIMITS: Final = {
    DRIVE_NAMES[field.attribute]: field.wire for field in fields(ThrottleLimits) if not field.wire.endswith("length")
}
"""The older names of most limits: ``bps_rd`` for ``throttling.bps-read``."""


def _take_limits(given: dict[str, Any]) -> tuple[ThrottleLimits, str | None]:
    """Take the limits of a drive, under either of their names, and the group out of ``given``."""
    throttling = given.pop("throttling", {})
    if not isinstance(throttling, Mapping):
        raise InvalidParameter("throttling", "has members: give throttling.bps-total and the like")
    members = dict(throttling)
    for short, name in (*_SHORT_LIMITS.items(), ("group", "group")):
        if short in given:
            if name in members:
                raise CommandError(f"'throttling.{name}' and '{short}' are the same option of a drive; give one of them")
            members[name] = given.pop(short)
    group = members.pop("group", None)
    if group is not None and not isinstance(group, str):
        raise InvalidParameter("throttling.group", "must be a string")
    return changed_limits(NO_LIMITS, members, path="throttling", strings=True), group


def node_options(drive: DriveOptions) -> dict[str, Any]:
    """The options of the image's top node that a drive's own options stand for, with ``rest`` merged in."""
    direct, no_flush, _ = CACHE_MODES[drive.cache]
    options: dict[str, Any] = {
        "cache": {"direct": direct, "no-flush": no_flush},
        "discard": "unmap" if drive.discard in ("on", "unmap") else "ignore",
        "detect-zeroes": drive.detect_zeroes,
        "auto-read-only": True,
    }
    if drive.aio != "threads":
        options["file"] = {"aio": drive.aio}
    return merge(options, drive.rest)


# -------------------------------------------------------------------------------------------------------- guest devices


@attrs.define(eq=False)
class DeviceAccounting:
    """Counts a device's requests as query-blockstats shows them; implements `backend.Accounting`. Times in nanoseconds."""

    clock: Clock
    counters: dict[str, int] = attrs.field(factory=dict)
    last_access_ns: int | None = None

    def start(self) -> int:
        """See `backend.Accounting`."""
        return self.clock.now_ns()

    def finish(self, operation: str, length: int, started: int, error: BlockIOError | None) -> None:
        """See `backend.Accounting`."""
        now = self.clock.now_ns()
        self.last_access_ns = now
        prefix = _PREFIXES[operation]
        if error is not None:
            self._add(f"failed_{prefix}_operations", 1)
            return
        self._add(f"{prefix}_operations", 1)
        self._add(f"{prefix}_total_time_ns", now - started)
        if prefix != "flush":
            self._add(f"{prefix}_bytes", length)

    def refused(self, operation: str) -> None:
        """See `backend.Accounting`."""
        self._add(f"invalid_{_PREFIXES[operation]}_operations", 1)

    def snapshot(self) -> dict[str, int]:
        """The counters now, with ``idle_time_ns`` once there was a request."""
        idle = {} if self.last_access_ns is None else {"idle_time_ns": self.clock.now_ns() - self.last_access_ns}
        return {**self.counters, **idle}

    def _add(self, name: str, count: int) -> None:
        self.counters[name] = self.counters.get(name, 0) + count


_PREFIXES: Final = {"read": "rd", "write": "wr", "zero": "wr", "discard": "unmap", "flush": "flush"}


@attrs.define(eq=False)
class GuestDevice:
    """A device of the guest on a backend. ``path`` is what query-block shows as ``qdev``; ``model`` e.g. ``virtio-blk``."""

    id: str
    model: str
    path: str
    backend: BlockBackend
    accounting: DeviceAccounting
    removable: bool = False

    def __repr__(self) -> str:
        return f"<GuestDevice {self.id!r} {self.model} on {self.backend!r}>"


DISK_SHARES: Final = Perm.ALL & ~Perm.WRITE
"""What a virtio disk lets others do to its node: all but write; it is told when block_resize changes its size."""


def attach_disk(system: BlockSystem, backend: BlockBackend) -> GuestDevice:
    """Connect a virtio disk to ``backend``: it takes reading and writing, and is counted. Raises `PermissionConflict`."""
    node = backend.node
    perm = Perm.CONSISTENT_READ if node.read_only else Perm.CONSISTENT_READ | Perm.WRITE
    backend.set_permissions(perm, DISK_SHARES)
    number = sum(device.model == "virtio-blk" for device in system.devices.values())
    path = f"/machine/peripheral-anon/device[{number}]/virtio-backend"
    device = GuestDevice(backend.name, "virtio-blk", path, backend, DeviceAccounting(system.clock))
    backend.device = device
    backend.accounting = device.accounting
    system.devices[device.id] = device
    return device


async def attach_drive(system: BlockSystem, drive: DriveOptions) -> BlockBackend:
    """Open a drive's image and connect it as its interface says. On failure nothing stays."""
    name = drive.id or _free_name(system, drive)
    _, _, writethrough = CACHE_MODES[drive.cache]
    check_identifier(name, parameter="id")
    system.graph.check_name_is_free(name, kind="device")
    node = await _open_medium(system, drive)
    backend: BlockBackend | None = None
    try:
        # The name may have been taken since it was looked at.
        backend = BlockBackend(system.graph, name, perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
        backend.writethrough = writethrough if drive.writeback is None else not drive.writeback
        backend.on_write_error = drive.werror
        backend.on_read_error = drive.rerror
        if drive.limits.are_set:
            throttle = system.env.throttle_groups.join(drive.group or name)
            throttle.group.set_limits(drive.limits)
            backend.limit(throttle)
        if node is not None:
            backend.insert(node)
            prepare_medium(system, node, filename=drive.file or node.node_name, copy_on_read=drive.copy_on_read)
        if drive.interface != "none":
            attach_disk(system, backend)
    except BaseException:
        if backend is not None:
            backend.close()
        await system.opener.close_orphans()
        raise
    return backend


def prepare_medium(system: BlockSystem, node: BlockDriverState, *, filename: str, copy_on_read: bool) -> None:
    """What a drive does with an image that has been put in: ``filename`` is what warnings call it."""
    if copy_on_read and node.read_only:
        system.env.warn(f"Drive '{filename}' is read-only: nothing can be copied into it on reads")
    elif copy_on_read:
        node.copy_on_read = 1
    if node.probed:
        system.env.warn(
            f"No format was given for '{filename}', and it was guessed to be raw: writes to its first sector are restricted. "
            "Give format=raw to lift that"
        )


async def _open_medium(system: BlockSystem, drive: DriveOptions) -> BlockDriverState | None:
    options = node_options(drive)
    if drive.file is not None:
        read_only = drive.readonly or drive.read_only
        return await system.opener.open_image(drive.file, fmt=drive.format, read_only=read_only, options=options)
    if isinstance(drive.rest.get("file"), Mapping) or drive.format is not None:
        return await _open_described(system, drive, options)
    if drive.rest:
        raise InvalidParameter(next(iter(drive.rest)), "is unexpected in a drive without a medium")
    if drive.interface != "none":
        raise CommandError(f"A disk with if={drive.interface} needs a medium: give file=…")
    return None


async def _open_described(system: BlockSystem, drive: DriveOptions, options: dict[str, Any]) -> BlockDriverState:
    """A medium given by node options (``file.driver=…``) instead of a file name."""
    if drive.format is not None:
        options["driver"] = drive.format
    options["read-only"] = drive.readonly or drive.read_only
    return await system.opener.open_described(options)


def _free_name(system: BlockSystem, drive: DriveOptions) -> str:
    """``virtio0``, ``none0``, …: the name of a drive without an id."""
    taken = {backend.name for backend in system.graph.backends}
    if drive.index is not None:
        return f"{drive.interface}{drive.index}"
    number = 0
    while f"{drive.interface}{number}" in taken:
        number += 1
    return f"{drive.interface}{number}"
