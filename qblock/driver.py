"""What a driver is: the class that gives a node its behaviour, and the registry that finds it by name.

Models QEMU's ``BlockDriver`` with its callbacks, narrowed: five methods must be written, the rest have correct defaults, a
missing feature is a missing type (the ``Supports…`` protocols below). A driver instance belongs to one node for that node's
life. It is called from ``requests.py`` only, which has already checked range, permission, alignment and drain state.
"""

from __future__ import annotations

import abc
import enum
import errno
import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import attrs

from qblock.errors import BlockIOError, CommandError
from qblock.extents import Data, Extent, Fragment
from qblock.options import DriverOptions
from qblock.permissions import ChildRole, Perm, PermissionPair, default_child_permissions

if TYPE_CHECKING:
    from qblock.breakpoints import Breakpoints
    from qblock.dirty import DirtyBitmap
    from qblock.environment import Environment
    from qblock.findings import Finding
    from qblock.node import BdrvChild, BlockDriverState
    from qblock.snapshots import SnapshotInfo

Json: TypeAlias = Any
"""A JSON value: dict with str keys, list, str, int, float, bool or None."""

Progress: TypeAlias = Callable[[int, int], None]
"""Hears how far an operation is: bytes done, and bytes in all. It must be quick, and may raise to end the operation."""


def no_progress(done: int, total: int) -> None:
    """The `Progress` of those who do not ask."""


@attrs.frozen
class Limits:
    """What requests a driver takes, in bytes; 0 means no limit. The border splits and aligns to these.

    ``zero_alignment`` and ``discard_alignment`` are the unit below which write_zeroes and discard are not efficient
    (the qcow2 cluster); parts that do not fill a unit are still passed to the driver, as requests of their own.
    """

    request_alignment: int = 1
    max_transfer: int = 0
    zero_alignment: int = 1
    max_write_zeroes: int = 0
    discard_alignment: int = 1
    max_discard: int = 0


@attrs.frozen
class NodeInfo:
    """What ``BlockDriverInfo`` tells: ``cluster_size`` in bytes (0: the driver has none), ``dirty`` = not shut down cleanly.

    ``dirty`` is None for storage that keeps nothing and so cannot say. ``vm_state_offset`` is the guest offset behind the disk
    at which the state of a machine begins (0: there is no place for one).
    """

    cluster_size: int = 0
    dirty: bool | None = False
    compressed: bool = False
    vm_state_offset: int = 0


class Driver(abc.ABC):
    """Behaviour of one node. Subclasses set the class variables, take their options from ``self.options``.

    All offsets and lengths are bytes. Methods that move data raise `BlockIOError` with an errno; ``open`` raises
    `ImageError` or `BlockIOError`.
    """

    name: ClassVar[str]
    """The driver's name in options and on the wire, e.g. ``qcow2``."""
    options_class: ClassVar[type[DriverOptions]]
    """Frozen attrs class of the driver's own options, made with ``options.option()`` and ``options.child()``."""
    is_protocol: ClassVar[bool] = False
    """True when the driver is itself the storage (file, memory, null): it has no storage child."""
    is_filter: ClassVar[bool] = False
    supports_backing: ClassVar[bool] = False
    supports_reopen: ClassVar[bool] = True
    """Whether ``blockdev-reopen`` may describe a node anew; turning read-only and back is possible without it."""
    reopens_with: ClassVar[frozenset[str]] = frozenset()
    """Options that can be given when an open node is described anew, though they were not given before."""
    reopens_without: ClassVar[frozenset[str]] = frozenset()
    """Options that can be left out then, though they were given before."""
    zero_initialised: ClassVar[bool] = False
    """True when a freshly created image is known to read as zeroes."""
    mends_children: ClassVar[bool] = False
    """True when what the node shows does not depend on any one child: a copy of it may take the place of each of them."""
    names_whole_nodes: ClassVar[bool] = False
    """True when a file name that begins with the driver's name means a node of the driver, and not the storage of an image."""
    names_storage: ClassVar[bool] = False
    """True when a file name that begins with the driver's name means the storage of an image, though the driver is a filter."""
    encrypted: bool = False
    """True when what the node shows is stored encrypted."""
    flushes_writes_only: ClassVar[bool] = False
    """True when a flush without a write since the last one would have nothing to do: the driver is not asked then."""
    probes_storage: bool = False
    """True while data of this node may lie on holes of its storage child that read as zeroes (raw, preallocated metadata):
    block status then asks the child about every data extent that has an offset."""

    def __init__(self, node: BlockDriverState, options: Any, env: Environment) -> None:
        self.node = node
        self.options = options
        self.env = env
        self.limits = Limits()

    # ------------------------------------------------------------------------------------------- must be written

    @abc.abstractmethod
    async def open(self) -> None:
        """Read what is needed to serve requests; children are attached already (``self.node.children``)."""

    @abc.abstractmethod
    def length(self) -> int:
        """The present size in bytes (not rounded). Must not block: drivers keep it."""

    @abc.abstractmethod
    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (writable, format B, contiguous) from ``offset``; what lies behind the end reads as zero."""

    @abc.abstractmethod
    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """Write all of ``buffer`` at ``offset``; with ``fua`` it is durable on return. A protocol driver grows as needed."""

    @abc.abstractmethod
    async def flush(self) -> None:
        """Make all completed writes durable: own metadata first, then (format drivers) flush of the storage child."""

    # ---------------------------------------------------------------------------------------- have correct defaults

    supports_write_zeroes: ClassVar[bool] = False
    supports_discard: ClassVar[bool] = False
    supports_copy_range: ClassVar[bool] = False

    supports_compressed: ClassVar[bool] = False
    """True when `write_compressed` is there."""

    prefers_copy_range: bool = False
    """True while `copy_range` into this node costs less than a copy by buffer: storage that shares blocks (reflinks)."""

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """Make the range read as zeroes cheaply. ``BlockIOError(ENOTSUP)``: the border writes buffers of zeroes instead."""
        raise BlockIOError(errno.ENOTSUP)

    async def write_compressed(self, offset: int, buffer: memoryview) -> None:
        """Store whole clusters in packed form. EINVAL for parts of one, EIO where something is stored already."""
        raise BlockIOError(errno.ENOTSUP)

    async def discard(self, offset: int, length: int) -> None:
        """The content is no longer needed. ``BlockIOError(ENOTSUP)`` is ignored by the border."""
        raise BlockIOError(errno.ENOTSUP)

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """What is stored from ``offset`` on: one extent of at most ``length`` bytes (at least 1).

        ``want_zero=False``: the caller asks for allocation only, so costly probing for zeroes may be left out.
        """
        return Data(length, offset if self.is_protocol else None)

    async def copy_range(
        self, offset: int, target: BdrvChild, target_offset: int, length: int
    ) -> None:
        """Copy from this node to ``target`` without a buffer. ``BlockIOError(ENOTSUP)``: the caller copies by buffer."""
        raise BlockIOError(errno.ENOTSUP)

    async def receive_range(self, offset: int, source: BdrvChild, source_offset: int, length: int) -> None:
        """The other end of `copy_range`: take ``length`` bytes from ``source`` to ``offset`` of this node without a buffer.

        A format driver maps the range and hands the pieces to ``requests.copy_range(source, …, child, …)``.
        """
        raise BlockIOError(errno.ENOTSUP)

    async def truncate(self, length: int, *, exact: bool = True, preallocation: str = "off") -> None:
        """Change the size. A driver that cannot raises ``BlockIOError(ENOTSUP)``."""
        raise BlockIOError(errno.ENOTSUP)

    async def close(self) -> None:
        """Write back what is cached and let go of resources; called once, with no request in flight."""

    def allocated_size(self) -> int | None:
        """Bytes that the image takes on its host ("disk size"), or None when unknown."""
        child = self.node.storage
        return child.node.driver.allocated_size() if child is not None else None

    def info(self) -> NodeInfo:
        """Cluster size and the like; a filter answers for its child."""
        return NodeInfo()

    def specific_info(self) -> Mapping[str, Json] | None:
        """``ImageInfoSpecific`` as QMP shows it ({"type": …, "data": {…}}), or None."""
        return None

    def filename(self) -> str | None:
        """The plain file name from which exactly this node can be opened again, or None when it takes options."""
        child = self.node.storage
        if child is None:
            return None
        below = child.node
        while not self.is_filter and below.filtered is not None:
            below = below.filtered.node
        # A format on a format (a raw window on a qcow2 image) is not what the name alone would give.
        is_plain = self.is_filter or below.driver.is_protocol
        return child.node.driver.filename() if is_plain else None

    # --------------------------------------------------------------------------------------------------- fault injection

    wants_debug_events: ClassVar[bool] = False
    """True when `debug_event` does something. A parent looks at it once, when it opens, and raises no events otherwise."""

    def debug_event(self, event: str) -> None:
        """Before its requests here, a parent has come to a step of its work (one of `drivers.blkdebug.BlkdebugEvent`)."""

    async def reach_event(self, event: str) -> None:
        """The same where the parent can wait: a breakpoint may hold its request here, and not only when it comes down here."""
        self.debug_event(event)

    # ------------------------------------------------------------------------------------------------ drained sections

    def drained_begin(self) -> None:
        """The first of the drained sections that the node is in begins: what waits inside the driver must be let go."""

    def drained_end(self) -> None:
        """The last of them has ended."""

    # ----------------------------------------------------------------------------------- permissions (never blocking)

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """What this node takes and shares on a child, given the cumulative needs (``perm``, ``shared``) of its own parents."""
        return default_child_permissions(self, role, perm, shared)

    def check_permissions(self, perm: Perm, shared: Perm) -> None:
        """Take what ``perm``/``shared`` need beyond what is held (file locks); raise to refuse. Undone by `abort_permissions`."""

    def set_permissions(self, perm: Perm, shared: Perm) -> None:
        """The change is final: give back what is no longer needed."""

    def abort_permissions(self) -> None:
        """The change was called off: give back what `check_permissions` took."""

    unsettled: bool = False
    """True while permissions are gone for which `settle` is still to do something."""

    async def settle(self) -> None:
        """What takes waiting after `set_permissions`; called when the user that had the permissions is gone."""

    # --------------------------------------------------------------------------------------------------------- reopen

    def check_reopen(self, options: Any, *, read_only: bool) -> None:
        """Raise when these options cannot be changed in place (the default allows only equal options)."""
        if options != self.options:
            from_, to = attrs.asdict(self.options), attrs.asdict(options)
            changed = sorted(key for key in from_ if from_[key] != to.get(key))
            raise CommandError(f"Node '{self.node.node_name}': '{', '.join(changed)}' cannot be changed while it is open")

    def check_cache(self, *, direct: bool) -> None:
        """Raise `BlockIOError` when the page cache cannot be bypassed from now on; only storage has to do with it."""

    async def prepare_reopen(self, options: Any, *, read_only: bool) -> None:
        """Do what may fail before the change (open a second descriptor, flush before going read-only)."""

    def commit_reopen(self, options: Any, *, read_only: bool) -> None:
        """Switch over; cannot fail."""
        self.options = options

    def abort_reopen(self) -> None:
        """Drop what `prepare_reopen` made."""

    async def settle_reopen(self) -> None:
        """What takes waiting after `commit_reopen` or `abort_reopen`, before the node's users go on."""

    # --------------------------------------------------------------------------------------------- names and probing

    @classmethod
    def parse_filename(cls, filename: str, parse: Callable[[str], dict[str, Json]]) -> dict[str, Json] | None:
        """The options, ``driver`` among them, for a file name that begins with the driver's name and a colon.

        ``parse`` gives those of a file name inside of it. None: the driver has no such names. Raises `CommandError`.
        """
        return None

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """How sure (0 to 100) this format is, given the first 2048 bytes of a file. raw answers 1; 0 means no."""
        return 0


# ------------------------------------------------------------------------------------------------- capability protocols


class CheckFix(enum.Flag):
    """What a check is allowed to repair."""

    NONE = 0
    LEAKS = enum.auto()
    ERRORS = enum.auto()


@attrs.frozen
class CheckResult:
    """Outcome of an image check; counts are clusters, as in QMP's ``ImageCheck``. ``findings`` are lines for a person.

    ``details`` are the same findings as values. ``refused``: why nothing was repaired, although it was asked for.
    """

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int | None = None
    total_clusters: int | None = None
    allocated_clusters: int | None = None
    fragmented_clusters: int | None = None
    compressed_clusters: int | None = None
    findings: tuple[str, ...] = ()
    details: tuple[Finding, ...] = ()
    refused: str | None = None


if TYPE_CHECKING:
    from abc import ABCMeta as _MetaOfProtocols
else:
    _MetaOfProtocols = type(Protocol)  # a kind of ABCMeta that has no public name


class _OfClasses(_MetaOfProtocols):
    """Makes ``isinstance`` of a protocol a question about the class, asked once; Python 3.11 looks at all members each time."""

    def __instancecheck__(self, instance: object) -> bool:
        kind: Any = type(instance)
        return _offers(kind, self)


@functools.cache
def _offers(kind: type, protocol: Any) -> bool:
    # Methods and class members: what is only annotated may be set when a driver is made.
    return all(getattr(kind, name, None) is not None for name in vars(protocol) if not name.startswith("_"))


@runtime_checkable
class SupportsCheck(Protocol, metaclass=_OfClasses):
    """The format can verify its own metadata."""

    async def check(self, fix: CheckFix, *, explain: bool = False, progress: Progress = no_progress) -> CheckResult:
        """``explain``: the details are to say who is concerned, whatever that costs."""


@attrs.frozen
class Measurement:
    """Bytes that a new image takes: at first, when all of its disk is in use, and for persistent bitmaps beside that.

    ``bitmaps`` is None where source or format have none.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None


@runtime_checkable
class SupportsMeasure(Protocol, metaclass=_OfClasses):
    """The driver can tell how large an image would become."""

    @classmethod
    def measure(
        cls,
        options: Mapping[str, Json],
        length: int,
        source: BlockDriverState | None,
        progress: Progress = no_progress,
    ) -> Awaitable[Measurement]:
        """Of an image with these creation options and a disk of ``length`` bytes, with the content of ``source`` if any."""


@attrs.frozen
class BackingLink:
    """What an image's header says of its backing file; ``format`` may be absent."""

    filename: str
    format: str | None


@runtime_checkable
class SupportsBacking(Protocol, metaclass=_OfClasses):
    """The format stores a link to a backing file."""

    def backing_link(self) -> BackingLink | None: ...

    async def change_backing_link(self, link: BackingLink | None) -> None: ...


@runtime_checkable
class SupportsAmend(Protocol, metaclass=_OfClasses):
    """What is otherwise chosen when an image is made can be changed later."""

    async def amend(self, options: Mapping[str, Json], progress: Progress) -> None:
        """Do what ``options`` say, by their names on command lines; durable on return. The image must be open for writing.

        ``progress`` gets what is done of what there is to do. Raises `CommandError` with nothing changed, and `BlockIOError`
        with some of it done. Nobody else may be using the image.
        """


@runtime_checkable
class SupportsKeySlots(Protocol, metaclass=_OfClasses):
    """The format can be encrypted in a way that lets passphrases be added and erased while the image is open."""

    async def change_key_slots(self, options: Mapping[str, Json], *, force: bool = False) -> None:
        """Do what ``options`` (``QCryptoBlockAmendOptionsLUKS``) ask for; durable on return.

        ``force`` allows to lose the last passphrase. Raises `CommandError`, then nothing has changed, and `BlockIOError`.
        """


@runtime_checkable
class SupportsOpenAmend(Protocol, metaclass=_OfClasses):
    """Something can be changed while the image is in use (``x-blockdev-amend``). The options class is a frozen attrs one."""

    amend_options_class: ClassVar[type[DriverOptions]]

    async def amend_open(self, options: Any, *, force: bool) -> None:
        """Do what the options ask for; durable on return. ``force`` allows to lose data.

        Raises `CommandError`, then nothing has changed, and `BlockIOError`.
        """


@runtime_checkable
class SupportsDataFile(Protocol, metaclass=_OfClasses):
    """The format can keep its data in another file, the child ``data-file``, whose name the image may tell."""

    async def data_file_link(self) -> str | None:
        """Called before `Driver.open`, with all given children attached: the name of the data file that is to be opened.

        None: the image has none, or it was given. Raises `CommandError` and `ImageError`.
        """


@runtime_checkable
class SupportsSnapshots(Protocol, metaclass=_OfClasses):
    """The format keeps internal snapshots of its disk. What changes them is called with the node drained, or by its only user.

    Names may occur several times, ids are given by the format. ``vm_state_size`` bytes of the state of a machine
    (`SupportsVmState`) go into the snapshot, and are no longer beside the disk then. ``view_snapshot`` makes a node that is
    open for reading only show a snapshot instead of the disk, with the size that the disk had then, or with ``keep_size`` the
    one that it has now. `CommandError` when the snapshot is not there, `BlockIOError` when the format or the image does not
    allow the change: then nothing has changed.
    """

    def snapshots(self) -> tuple[SnapshotInfo, ...]: ...

    async def create_snapshot(
        self, name: str, *, icount: int | None = None, vm_clock_ns: int = 0, vm_state_size: int = 0
    ) -> SnapshotInfo: ...

    async def apply_snapshot(self, snapshot: SnapshotInfo) -> None: ...

    async def delete_snapshot(self, snapshot: SnapshotInfo) -> None: ...

    async def view_snapshot(self, snapshot: SnapshotInfo, *, keep_size: bool = False) -> None: ...


@runtime_checkable
class SupportsVmState(Protocol, metaclass=_OfClasses):
    """The format can keep the state of a machine beside its disk. Offsets count from the beginning of the state."""

    def vm_state_offset(self) -> int: ...

    async def load_vm_state(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; what was never saved reads as zeroes. Raises `BlockIOError`."""

    async def save_vm_state(self, offset: int, buffer: memoryview) -> None:
        """Write all of ``buffer``; durable after a flush. Raises `BlockIOError`."""


@runtime_checkable
class SupportsBreakpoints(Protocol, metaclass=_OfClasses):
    """Requests can be held at steps of the work (blkdebug)."""

    breakpoints: Breakpoints

    def set_breakpoint(self, event: str, tag: str, tell: Callable[[str], None]) -> None: ...


@runtime_checkable
class SupportsBitmaps(Protocol, metaclass=_OfClasses):
    """The format stores persistent dirty bitmaps: those of its node, when it is closed or made read-only."""

    @property
    def can_store_bitmaps(self) -> bool:
        """Whether the image can do so as it is: older ones may not."""

    def check_new_bitmap(self, bitmap: DirtyBitmap) -> None:
        """Raise `CommandError` when ``bitmap``, which is not on the node yet, could not be stored."""

    async def forget_bitmap(self, name: str) -> None:
        """Take a bitmap that was removed from the node out of the image, durably. Raises `BlockIOError`."""

    async def store_bitmaps(self) -> None:
        """Store them now, durably, as closing would. Raises `BlockIOError`, where closing only warns."""


@runtime_checkable
class SupportsFragments(Protocol, metaclass=_OfClasses):
    """The driver can tell of many extents in one answer, where data lie here and there."""

    async def fragments(self, offset: int, length: int, *, after: int, gaps: bool = False) -> list[Fragment]:
        """The runs of plain data from ``offset`` on, each in another place than where the one before it ends.

        Without gaps, or with such in which nothing is allocated.
        They end before what is no plain data, or ``length`` bytes away; a driver may stop anywhere, and need not begin. The data
        before ``offset`` end at ``after``: when those there only go on, there are no fragments.
        """


@runtime_checkable
class SupportsPointInTime(Protocol, metaclass=_OfClasses):
    """The node keeps what its disk held at one moment, while it goes on being written. What is not kept gives ``EACCES``."""

    async def read_snapshot_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with what was at ``offset`` at that moment."""

    async def snapshot_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """As `Driver.block_status`, of what was there."""

    async def discard_snapshot(self, offset: int, length: int) -> None:
        """What was in this range need not be kept any longer."""


@runtime_checkable
class SupportsChildren(Protocol, metaclass=_OfClasses):
    """The driver has a list of equal children, to which some can be added and from which some can be taken while it is open
    (``x-blockdev-change``). Who does that changes the edges himself, in a drained section.
    """

    def new_child(self, node: BlockDriverState) -> tuple[str, ChildRole]:
        """The name and role for ``node`` as the next child; raises `CommandError` when it will not do, or none does."""

    def check_child_can_go(self, name: str) -> None:
        """Raise `CommandError` when the child ``name`` is needed."""


@runtime_checkable
class SupportsEmptying(Protocol, metaclass=_OfClasses):
    """The format can give up all that its disk holds, so that the backing node shows through everywhere."""

    async def make_empty(self) -> None:
        """Durable on return. No request may be under way, and the node must be writable. Raises `BlockIOError`."""


class CreateContext(Protocol):
    """What `SupportsCreate.create` may use: the environment, and a way to open (and afterwards drop) the file to write to."""

    @property
    def env(self) -> Environment: ...

    async def open_reference(self, ref: Json) -> CreateTarget: ...


class CreateTarget(Protocol):
    """An opened node that a format is created on; close with `release`."""

    def length(self) -> int: ...

    def filename(self) -> str | None: ...

    async def read_into(self, offset: int, buffer: memoryview) -> None: ...

    async def write_from(self, offset: int, buffer: memoryview) -> None: ...

    async def write_zeroes(self, offset: int, length: int) -> None: ...

    async def truncate(self, length: int, *, preallocation: str = "off") -> None: ...

    async def flush(self) -> None: ...

    async def release(self) -> None: ...


@runtime_checkable
class SupportsCreate(Protocol, metaclass=_OfClasses):
    """The driver can make new images (``blockdev-create``). ``create_options_class`` is a frozen attrs options class."""

    create_options_class: ClassVar[type[DriverOptions]]

    @classmethod
    def create(cls, options: Any, context: CreateContext) -> Awaitable[None]: ...
