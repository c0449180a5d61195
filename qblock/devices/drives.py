"""Drives: the ``-drive`` option, the image that it names, and the device that belongs to its interface.

Models qemu-system-x86_64 7.2: a drive is a backend with a name, made from its interface and its place there; ``if=virtio`` adds a
virtio disk, ``if=ide``, ``floppy`` and ``pflash`` go where the board has a place for them, ``if=none`` waits for a device.
Differs from QEMU in that a board without places for an interface refuses it before the image is opened.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from qblock.accounting import DeviceAccounting
from qblock.backend import BlockBackend
from qblock.devices.board import UNPOLICED, Place
from qblock.devices.models import MODELS
from qblock.devices.plugging import Request, plug
from qblock.driver import Json
from qblock.errors import CommandError, InvalidParameter
from qblock.graph import check_identifier
from qblock.node import BlockDriverState
from qblock.nodespec import NodeFlags
from qblock.opening import merge
from qblock.options import fields, option, split_keyval, unflatten_dotted, visit
from qblock.permissions import Perm
from qblock.throttle_limits import DRIVE_NAMES, NO_LIMITS, ThrottleLimits, changed_limits

if TYPE_CHECKING:
    from qblock.system import BlockSystem

CacheMode = Literal["writeback", "none", "off", "writethrough", "directsync", "unsafe"]

CACHE_MODES: Final[Mapping[str, tuple[bool, bool, bool]]] = {
    # mode: (bypass the page cache, ignore flushes, durable on completion)
    "writeback": (False, False, False),
    "off": (True, False, False),
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
    interface: Literal["none", "ide", "scsi", "floppy", "pflash", "mtd", "sd", "virtio", "xen"] = option(
        "none", doc="what the drive is connected to", name="if"
    )
    format: str | None = option(None, doc="format of the image; probed when absent")
    id: str | None = option(None, doc="name of the drive; made from interface and index when absent")
    index: int | None = option(None, doc="number of the drive on its interface")
    bus: int | None = option(None, doc="the interface's bus that it is on")
    unit: int | None = option(None, doc="its place on that bus")
    cache: CacheMode = option("writeback", doc="cache mode")
    writeback: bool | None = option(None, doc="the disk has a write cache; overrides the mode", name="cache.writeback")
    aio: Literal["threads", "native", "io_uring"] = option("threads", doc="how the file driver runs requests")
    discard: Literal["ignore", "off", "unmap", "on"] = option("ignore", doc="whether discards reach the image")
    detect_zeroes: Literal["off", "on", "unmap"] = option("off", doc="turn writes of zeroes into zero writes")
    readonly: bool = option(False, doc="open the image read-only")
    read_only: bool = option(False, doc="the same")
    copy_on_read: bool = option(False, doc="copy what is read from the backing file into the image")
    media: Literal["disk", "cdrom"] = option("disk", doc="kind of medium; a CD-ROM is read-only")
    snapshot: bool = option(False, doc="write into a temporary image, which is thrown away at the end")
    werror: Literal["report", "ignore", "stop", "enospc"] | None = option(None, doc="what a device does on a write error")
    rerror: Literal["report", "ignore", "stop"] | None = option(None, doc="what a device does on a read error")
    stats_account_failed: bool = option(True, doc="failed requests count for the times in query-blockstats")
    stats_account_invalid: bool = option(True, doc="refused requests end the idle time in query-blockstats")
    stats_intervals: list[int] = option((), doc="seconds over which query-blockstats tells times apart")
    rest: Mapping[str, Any] = option({}, doc="options of the image's nodes")
    limits: ThrottleLimits = option(NO_LIMITS, doc="limits of its rate", name="throttling")
    group: str | None = option(None, doc="throttle group to join, by default one of the drive's name")

    @property
    def is_cdrom(self) -> bool:
        """Whether the medium is a CD-ROM."""
        return self.media == "cdrom"

    @property
    def wants_read_only(self) -> bool:
        """Whether nothing may be written to the disk."""
        return self.readonly or self.read_only or self.is_cdrom

    @property
    def opens_read_only(self) -> bool:
        """Whether nothing may be written to the image: with ``snapshot`` it goes to the temporary one."""
        return self.wants_read_only or self.snapshot


MAX_INTERVAL: Final = (1 << 32) - 1
"""The longest of ``stats-intervals`` in seconds."""
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
    _check_numbers({name: own[name] for name in ("index", "bus", "unit") if name in own})
    drive: DriveOptions = visit(DriveOptions, own, strings=True)
    if isinstance(rest.get("node-name"), str):
        check_identifier(rest["node-name"], parameter="node-name")
    if drive.file == "":
        drive = attrs.evolve(drive, file=None)
    for seconds in drive.stats_intervals:
        if not 0 < seconds <= MAX_INTERVAL:
            raise InvalidParameter("stats-intervals", f"must be from 1 to {MAX_INTERVAL} seconds, not {seconds}")
    return attrs.evolve(drive, rest=rest, limits=limits, group=group)


def _check_numbers(given: Mapping[str, Json]) -> None:
    """Raise `InvalidParameter` for text that is no plain number: these take no suffixes, unlike sizes."""
    for name, value in given.items():
        try:
            int(value, 0) if isinstance(value, str) else value
        except ValueError:
            raise InvalidParameter(name, f"must be a number without a suffix, not '{value:.100}'") from None


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
    _check_numbers({f"throttling.{name}": value for name, value in members.items()})
    if group is not None and not isinstance(group, str):
        raise InvalidParameter("throttling.group", "must be a string")
    return changed_limits(NO_LIMITS, members, path="throttling", strings=True), group


def node_options(drive: DriveOptions) -> dict[str, Any]:
    """The options of the image's top node that a drive's own options stand for, with ``rest`` merged in."""
    direct, no_flush, _ = CACHE_MODES[drive.cache]
    options: dict[str, Any] = {
        "cache": {"direct": direct, "no-flush": no_flush},
        "discard": "unmap" if drive.discard in ("on", "unmap") else "ignore",
        "detect-zeroes": "on" if drive.detect_zeroes == "unmap" else drive.detect_zeroes,
        "auto-read-only": True,
    }
    return merge(options, drive.rest)


async def attach_drive(system: BlockSystem, drive: DriveOptions, *, connect: bool = True) -> BlockBackend:
    """Open a drive's image and give the drive its place; with ``connect`` a virtio disk is plugged in for it. On failure nothing
    stays.

    Drives of other interfaces have to be there before the board is built, which connects them.
    """
    board = system.board
    place = board.place_for(drive.interface, drive.index, drive.bus, drive.unit)
    if board.built and drive.interface not in ("none", "virtio"):
        raise CommandError(f"A drive with if={drive.interface} cannot be added any more; use if=none and device_add")
    if drive.interface in UNPOLICED and (drive.werror or drive.rerror):
        raise InvalidParameter("werror" if drive.werror else "rerror", f"is not for drives with if={drive.interface}")
    name = drive.id if drive.id is not None else board.name_for(drive.interface, place, is_cdrom=drive.is_cdrom)
    check_identifier(name, parameter="id")
    system.graph.check_name_is_free(name, kind="device")
    node = await _open_medium(system, drive)
    backend: BlockBackend | None = None
    try:
        # The name may have been taken since it was looked at.
        backend = BlockBackend(system.graph, name, perm=Perm.CONSISTENT_READ, shared=Perm.ALL)
        board.drives.append(Place(drive.interface, *place, drive.is_cdrom, backend))
        backend.writethrough = CACHE_MODES[drive.cache][2] if drive.writeback is None else not drive.writeback
        backend.on_write_error = drive.werror or "enospc"
        backend.on_read_error = drive.rerror or "report"
        intervals = tuple(drive.stats_intervals)
        backend.accounting = DeviceAccounting(
            system.clock, drive.stats_account_failed, drive.stats_account_invalid, intervals
        )
        if drive.limits.are_set:
            throttle = system.env.throttle_groups.join(drive.group or name)
            throttle.group.set_limits(drive.limits)
            backend.limit(throttle)
        if node is not None:
            backend.insert(node)
            prepare_medium(system, node, filename=drive.file or node.node_name, copy_on_read=drive.copy_on_read)
        if connect and drive.interface == "virtio":
            plug(system, Request(MODELS["virtio-blk-pci"], "", None, {"drive": name}), hot=False)
    except BaseException:
        if backend is not None:
            backend.close()
            board.forget(backend)
        await system.opener.close_orphans()
        raise
    return backend


def prepare_medium(system: BlockSystem, node: BlockDriverState, *, filename: str, copy_on_read: bool) -> None:
    """What a drive does with an image that has been put in: ``filename`` is what warnings call it."""
    if copy_on_read and node.read_only:
        system.env.warn(f"Drive '{filename}' is read-only: nothing can be copied into it on reads")
    elif copy_on_read:
        node.copy_on_read = 1
    if node.probed and not node.read_only:
        system.env.warn(
            f"No format was given for '{filename}', and it was guessed to be raw: writes to its first sector are restricted. "
            "Give format=raw to lift that"
        )


async def _open_medium(system: BlockSystem, drive: DriveOptions) -> BlockDriverState | None:
    node = await _open_image(system, drive)
    if node is not None:
        node.detect_zeroes = drive.detect_zeroes  # a drive's can be unmap without discard=unmap, unlike a node's
    return node if node is None or not drive.snapshot else await _put_above(system, node, read_only=drive.wants_read_only)


async def _put_above(system: BlockSystem, node: BlockDriverState, *, read_only: bool) -> BlockDriverState:
    """A temporary image above ``node``, which goes when it is closed: its file has lost its name already."""
    handle, path = tempfile.mkstemp(prefix="vl.", dir=os.environ.get("TMPDIR", "/var/tmp"))
    os.close(handle)
    file = {"driver": "file", "filename": path}
    node.monitor_owned = True  # until the image above uses it
    try:
        await system.opener.create_image("qcow2", {"file": file, "size": node.length})
        options = {
            "driver": "qcow2", "file": file, "backing": node.node_name, "cache": {"no-flush": True}, "read-only": read_only,
        }  # fmt: skip
        return await system.opener.open_described(options)
    finally:
        node.monitor_owned = False
        os.unlink(path)


async def _open_image(system: BlockSystem, drive: DriveOptions) -> BlockDriverState | None:
    options = node_options(drive)
    if drive.file is not None:
        read_only = drive.opens_read_only
        return await system.opener.open_image(
            drive.file, fmt=drive.format, read_only=read_only, options=options, inherited=NodeFlags(aio=drive.aio)
        )
    if isinstance(drive.rest.get("file"), Mapping) or drive.format is not None:
        return await _open_described(system, drive, options)
    if drive.rest:
        raise InvalidParameter(next(iter(drive.rest)), "is unexpected in a drive without a medium")
    if drive.interface == "virtio":
        raise CommandError(f"A disk with if={drive.interface} needs a medium: give file=…")
    return None


async def _open_described(system: BlockSystem, drive: DriveOptions, options: dict[str, Any]) -> BlockDriverState:
    """A medium given by node options (``file.driver=…``) instead of a file name."""
    if drive.format is not None:
        options["driver"] = drive.format
    options["read-only"] = drive.opens_read_only
    return await system.opener.open_described(options, inherited=NodeFlags(aio=drive.aio))
