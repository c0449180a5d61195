"""The ``blkdebug`` filter: requests fail where rules say so, and limits are tighter than the child's.

Models QEMU's filter of that name (semantics.md section 17). Its rules are bound to *events*: a format driver announces each
step of its work on its storage child (`Driver.debug_event`), which puts the rules of that step in force; a request is then
compared with the rules in force, in the order in which they were given (configuration file first), and the first that is
about it decides. The events ``pwritev``, ``pwritev_zero`` and ``pwritev_done`` are raised here, around the node's own writes;
``pwritev_done`` comes also after a write that failed.

Requests can be held at a step (`breakpoints`). Differs from QEMU in that a configuration file takes the members of the two rule
sections only, and that a negative errno is refused. The border raises the events of
its own work here too: ``pwritev_rmw_*`` (alignment.py), ``cor_write`` (copying_up.py); which others come is for the format above
to say.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeAlias, get_args

from attrs import evolve, frozen

from qblock.breakpoints import Breakpoints
from qblock.drain import may_hold
from qblock.driver import Json, Limits
from qblock.environment import Environment
from qblock.errors import BlockIOError, CommandError, InvalidParameter
from qblock.extents import Extent
from qblock.filtering import FilterDriver
from qblock.node import BlockDriverState
from qblock.options import ChildRef, DriverOptions, child, option, required, visit
from qblock.permissions import PERMISSION_NAMES, ChildRole, Perm, PermissionPair
from qblock.units import is_power_of_two

BlkdebugEvent: TypeAlias = Literal[
    "l1_update", "l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table", "l2_load", "l2_update",
    "l2_update_compressed", "l2_alloc_cow_read", "l2_alloc_write", "read_aio", "read_backing_aio", "read_compressed",
    "write_aio", "write_compressed", "vmstate_load", "vmstate_save", "cow_read", "cow_write", "reftable_load",
    "reftable_grow", "reftable_update", "refblock_load", "refblock_update", "refblock_update_part", "refblock_alloc",
    "refblock_alloc_hookup", "refblock_alloc_write", "refblock_alloc_write_blocks", "refblock_alloc_write_table",
    "refblock_alloc_switch_table", "cluster_alloc", "cluster_alloc_bytes", "cluster_free", "flush_to_os", "flush_to_disk",
    "pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev_rmw_tail", "pwritev_rmw_after_tail", "pwritev", "pwritev_zero",
    "pwritev_done", "empty_image_prepare", "l1_shrink_write_table", "l1_shrink_free_l2_clusters", "cor_write",
    "cluster_alloc_space", "none",
]  # fmt: skip
"""The steps of a format driver's work that can be named in rules; ``none`` happens once, when the node opens."""

IoType: TypeAlias = Literal["read", "write", "write-zeroes", "discard", "flush", "block-status"]
PermissionName: TypeAlias = Literal["consistent-read", "write", "write-unchanged", "resize"]

DEFAULT_IO_TYPES: Final = frozenset({"read", "write", "write-zeroes", "discard", "flush"})
"""What a rule without ``iotype`` applies to."""

_SECTOR: Final = 512
_MAX_LIMIT: Final = (1 << 31) - 1


@frozen(eq=False)
class InjectError:
    """``BlkdebugInjectErrorOptions``: from ``event`` on, requests that match fail."""

    event: BlkdebugEvent = required(doc="the step that puts the rule in force")
    state: int | None = option(None, doc="only in this state; any when absent or 0")
    iotype: IoType | None = option(None, doc="kind of request; all but block-status when absent", since="4.1")
    errno: int = option(errno.EIO, doc="error number (Linux's); 0: the request does not fail")
    sector: int = option(-1, doc="only requests with the first byte of this sector of 512 bytes; -1: any")
    once: bool = option(False, doc="only the first such request fails")
    immediately: bool = option(False, doc="fail without a turn of the event loop in between")

    def hits(self, io_type: str, offset: int, length: int) -> bool:
        """Whether a request for ``length`` bytes at ``offset`` is one that the rule is about."""
        if io_type not in ((self.iotype,) if self.iotype is not None else DEFAULT_IO_TYPES):
            return False
        if self.sector < 0:
            return True
        return offset <= self.sector * _SECTOR < offset + length


@frozen(eq=False)
class SetState:
    """``BlkdebugSetStateOptions``: at ``event`` the state changes."""

    event: BlkdebugEvent = required(doc="the step at which the state changes")
    state: int | None = option(None, doc="only in this state; any when absent or 0")
    new_state: int = required(doc="the state from then on", name="new_state")


@frozen
class BlkdebugOptions(DriverOptions):
    """``BlockdevOptionsBlkdebug``. Sizes are bytes; 0 or absent leaves a limit to the child."""

    image: ChildRef = child(ChildRole.FILTERED, doc="the node to which requests go")
    config: str | None = option(None, doc="file with more rules")
    align: int = option(0, doc="request alignment, a power of two")
    max_transfer: int = option(0, doc="longest read or write", since="2.10")
    opt_write_zero: int = option(0, doc="best unit of zero writes", since="2.10")
    max_write_zero: int = option(0, doc="longest zero write", since="2.10")
    opt_discard: int = option(0, doc="best unit of discards", since="2.10")
    max_discard: int = option(0, doc="longest discard", since="2.10")
    inject_error: tuple[InjectError, ...] = option((), doc="rules that let requests fail")
    set_state: tuple[SetState, ...] = option((), doc="rules that change the state")
    take_child_perms: tuple[PermissionName, ...] = option(
        (), doc="permissions to take beside what parents need", since="5.0"
    )
    unshare_child_perms: tuple[PermissionName, ...] = option(
        (), doc="permissions not to share with others", since="5.0"
    )


class BlkdebugDriver(FilterDriver):
    """Compares each request with the rules in force. ``state`` is 1 until a rule changes it.

    ``breakpoints`` are set by `set_breakpoint` only, since it knows the events.
    """

    name: ClassVar[str] = "blkdebug"
    names_storage: ClassVar[bool] = True
    options_class: ClassVar[type[DriverOptions]] = BlkdebugOptions
    supports_copy_range: ClassVar[bool] = False
    wants_debug_events: ClassVar[bool] = True
    flushes_writes_only: ClassVar[bool] = True

    options: BlkdebugOptions

    def __init__(self, node: BlockDriverState, options: Any, env: Environment) -> None:
        super().__init__(node, options, env)
        self.state = 1
        self.breakpoints = Breakpoints(lambda: may_hold(node))
        self._rules: list[InjectError | SetState] = []
        self._in_force: list[InjectError] = []
        self._take = _permissions(options.take_child_perms)
        self._unshare = _permissions(options.unshare_child_perms)

    async def open(self) -> None:
        """See `Driver`. Raises `InvalidParameter` (limits that contradict each other) and `CommandError` (config file)."""
        options = self.options
        self.limits = _limits(options, self.child.node.driver.limits.request_alignment)
        configured = read_config(Path(options.config)) if options.config is not None else []
        self._rules = [*configured, *options.inject_error, *options.set_state]
        for rule in self._rules:
            _check_rule(rule)
        self.debug_event("none")

    # ---------------------------------------------------------------------------------------------------------- rules

    def debug_event(self, event: str) -> None:
        """See `Driver`: the inject-error rules of ``event`` replace those in force, if any matches; then the state changes."""
        state = self.state
        matching: list[InjectError] = []
        for rule in self._rules:
            if rule.event != event or (rule.state and rule.state != self.state):
                continue
            if isinstance(rule, InjectError):
                matching.append(rule)
            else:
                state = rule.new_state
        if matching:
            self._in_force = matching
        self.state = state
        self.breakpoints.come_to(event)

    async def reach_event(self, event: str) -> None:
        """See `Driver`."""
        self.debug_event(event)
        await self.breakpoints.pause()

    def set_breakpoint(self, event: str, tag: str, tell: Callable[[str], None]) -> None:
        """See `Breakpoints.add`; raises `CommandError` for an event that there is not."""
        if event not in get_args(BlkdebugEvent):
            raise CommandError(f"there is no event '{event}': they are {', '.join(get_args(BlkdebugEvent))}")
        self.breakpoints.add(event, tag, tell)

    async def _meet_rules(self, io_type: str, offset: int, length: int) -> None:
        """Stand still at a breakpoint; then raise what the first rule in force that is about this request says."""
        await self.breakpoints.pause()
        for rule in self._in_force:
            if not rule.hits(io_type, offset, length):
                continue
            if rule.once:
                self._in_force.remove(rule)
                self._rules.remove(rule)
            if not rule.errno:
                return
            if not rule.immediately:
                await asyncio.sleep(0)
            raise BlockIOError(rule.errno, f"Injected by node '{self.node.node_name}' at event '{rule.event}'")

    # ------------------------------------------------------------------------------------------------------- requests

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Driver`."""
        await self._meet_rules("read", offset, len(buffer))
        await super().read_into(offset, buffer)

    async def write_from(self, offset: int, buffer: memoryview, *, fua: bool = False) -> None:
        """See `Driver`."""
        self.debug_event("pwritev")
        try:
            await self._meet_rules("write", offset, len(buffer))
            await super().write_from(offset, buffer, fua=fua)
        finally:
            self.debug_event("pwritev_done")
        await self.breakpoints.pause()

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False, fua: bool = False
    ) -> None:
        """See `Driver`."""
        self.debug_event("pwritev_zero")
        try:
            await self._meet_rules("write-zeroes", offset, length)
            await super().write_zeroes(offset, length, may_unmap=may_unmap, no_fallback=no_fallback, fua=fua)
        finally:
            self.debug_event("pwritev_done")
        await self.breakpoints.pause()

    async def discard(self, offset: int, length: int) -> None:
        """See `Driver`."""
        await self._meet_rules("discard", offset, length)
        await super().discard(offset, length)

    async def flush(self) -> None:
        """See `Driver`: rules with a sector are not about flushes."""
        await self._meet_rules("flush", 0, 0)
        await super().flush()

    async def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Extent:
        """See `Driver`."""
        await self._meet_rules("block-status", offset, length)
        return await super().block_status(offset, length, want_zero=want_zero)

    def allocated_size(self) -> int | None:
        """See `Driver`: not told, as in QEMU."""
        return None

    def filename(self) -> str | None:
        """See `Driver`: ``blkdebug:CONFIG:IMAGE``, unless rules or limits were given beside the configuration file."""
        image = self.child.node.driver.filename()
        config = self.options.config
        plain = BlkdebugOptions(
            image=self.options.image, config=config, take_child_perms=self.options.take_child_perms,
            unshare_child_perms=self.options.unshare_child_perms,
        )  # fmt: skip
        named = image is not None and self.options == plain
        return f"blkdebug:{config or ''}:{image}" if named else None

    @classmethod
    def parse_filename(cls, filename: str, parse: Callable[[str], dict[str, Json]]) -> dict[str, Json] | None:
        """See `Driver`: ``blkdebug:CONFIG:IMAGE``, in which CONFIG may be empty."""
        config, colon, image = filename.removeprefix("blkdebug:").partition(":")
        if not colon:
            raise CommandError(f"'{filename}' is not of the form blkdebug:CONFIG:IMAGE; CONFIG may be empty")
        rules = {"config": config} if config else {}
        return {"driver": cls.name, **rules, "image": parse(image)}

    def child_permissions(self, role: ChildRole, perm: Perm, shared: Perm) -> PermissionPair:
        """See `Driver`: with those of the options added and withheld."""
        pair = super().child_permissions(role, perm, shared)
        return PermissionPair(pair.perm | self._take, pair.shared & ~self._unshare)


def _check_rule(rule: InjectError | SetState) -> None:
    if rule.state is not None and rule.state < 0:
        raise InvalidParameter("state", f"cannot be negative ({rule.state})")
    if isinstance(rule, InjectError):
        if rule.errno < 0:
            raise InvalidParameter("errno", f"cannot be negative ({rule.errno}): give the error number itself")
        if rule.sector < -1:
            raise InvalidParameter("sector", f"cannot be {rule.sector}: it must be a sector number, or -1 for any")


def _permissions(names: tuple[str, ...]) -> Perm:
    result = Perm.NONE
    for perm, name in PERMISSION_NAMES.items():
        if name in names:
            result |= perm
    return result


# ------------------------------------------------------------------------------------------------------------- limits


def _limits(options: BlkdebugOptions, child_alignment: int) -> Limits:
    """The limits that ``options`` ask for; each must be a multiple of the alignment (and of its own best unit)."""
    if options.align and (options.align > _MAX_LIMIT or not is_power_of_two(options.align)):
        raise InvalidParameter("align", f"cannot be {options.align}: it must be a power of two below 2 GiB")
    align = max(options.align, child_alignment)
    _check_multiple("max-transfer", options.max_transfer, align)
    _check_multiple("opt-write-zero", options.opt_write_zero, align)
    _check_multiple("max-write-zero", options.max_write_zero, max(options.opt_write_zero, align))
    _check_multiple("opt-discard", options.opt_discard, align)
    _check_multiple("max-discard", options.max_discard, max(options.opt_discard, align))
    return evolve(
        Limits(),
        request_alignment=options.align or 1,
        max_transfer=options.max_transfer,
        zero_alignment=options.opt_write_zero or 1,
        max_write_zeroes=options.max_write_zero,
        discard_alignment=options.opt_discard or 1,
        max_discard=options.max_discard,
    )


def _check_multiple(name: str, value: int, unit: int) -> None:
    if value > _MAX_LIMIT:
        raise InvalidParameter(name, f"cannot be {value}: it must be less than 2 GiB")
    if value < 0 or value % unit:
        raise InvalidParameter(name, f"cannot be {value}: it must be a multiple of {unit}")


# -------------------------------------------------------------------------------------------------- configuration file

_SECTION: Final = re.compile(r'\[\s*([a-z-]+)(?:\s+"[^"]*")?\s*\]')
_MEMBER: Final = re.compile(r'([a-z_-]+)\s*=\s*"([^"]*)"')
_RULE_CLASSES: Final[dict[str, type[InjectError] | type[SetState]]] = {
    "inject-error": InjectError,
    "set-state": SetState,
}


def read_config(path: Path) -> list[InjectError | SetState]:
    """The rules in a configuration file; a section is one rule. Raises `CommandError` that names file and line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"The configuration file '{path}' cannot be read: {error}") from None
    rules: list[InjectError | SetState] = []
    section: tuple[str, str, dict[str, str]] | None = None
    for number, line in enumerate(lines, start=1):
        text, where = line.strip(), f"{path}:{number}"
        if not text or text.startswith("#"):
            continue
        if (heading := _SECTION.fullmatch(text)) is not None and heading[1] in _RULE_CLASSES:
            rules += _finished(section)
            section = (where, heading[1], {})
        elif (member := _MEMBER.fullmatch(text)) is not None and section is not None:
            section[2][member[1]] = member[2]
        else:
            raise CommandError(
                f"{where}: '{text}' is neither [inject-error], [set-state] nor a member of one (key = \"value\")"
            )
    return rules + _finished(section)


def _finished(section: tuple[str, str, dict[str, str]] | None) -> list[InjectError | SetState]:
    if section is None:
        return []
    where, name, members = section
    try:
        return [visit(_RULE_CLASSES[name], members, strings=True)]
    except InvalidParameter as error:
        raise CommandError(f"{where}: in [{name}]: {error}") from None
