"""Changing the options of open nodes in place: flags, what a driver can change, other backing and file nodes.

Models ``bdrv_reopen`` and ``blockdev-reopen`` (semantics.md section 10.2). All that can fail is done first
(`Driver.prepare_reopen`, then edges and permissions in a `Transaction`); then everything is switched over, or nothing.

A description is complete: what it omits goes back to its default, ``discard`` excepted. What it says of read-only and of the
cache is passed on to the children that were opened together with the node; what it omits leaves those as they are. A child is
given by the name of a node; ``backing`` and ``file`` may name another one, whose content is not looked at. One that was opened by
options among those of its parent, or because the image names it, can be described there again, and is reopened along with it.
An option that was not given before is refused even with its default value, unless the driver says that it can come and go, as in
QEMU. Differs from QEMU in that a node may be described only once, in that an empty list is nothing to do (7.2 crashes on it), and
in what is left of a node that cannot become read-only because of a user that writes: its bitmaps are marked as in use again (7.2
leaves them as stored, and refuses writes from then on).
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from qblock.chain import skip_implicit
from qblock.drain import drained_begin, drained_end
from qblock.driver import Json, SupportsBacking
from qblock.errors import BlockIOError, CommandError, InvalidParameter, NodeNotFound
from qblock.node import BlockDriverState
from qblock.nodespec import NO_FLAGS, NodeFlags, NodeReference, NodeSpec, SpecReader, child_fields
from qblock.options import Field, fields
from qblock.permissions import ChildRole
from qblock.requests import flush, refresh_length
from qblock.transaction import Transaction

if TYPE_CHECKING:
    from qblock.opening import Opener

_REPLACEABLE: Final = frozenset({"file", "backing"})
"""The children that can become other nodes."""


@attrs.frozen(eq=False)
class _Step:
    """What is to become of one node. ``detect_zeroes`` and ``given`` are None when only flags are switched.

    ``children`` are those that change, by name; None: the child goes away. ``inherits``: what ``given`` omits of flags comes from
    the node's parent, whose description it is in.
    """

    node: BlockDriverState
    options: Any
    flags: NodeFlags
    detect_zeroes: str | None = None
    given: Mapping[str, Json] | None = None
    children: Mapping[str, BlockDriverState | None] = attrs.field(factory=dict)
    inherits: bool = False


async def reopen(opener: Opener, node: BlockDriverState, *, read_only: bool) -> None:
    """Switch ``node`` to ``read_only``.

    The storage below follows when it was not added by the monitor and has no other user. Raises `CommandError` (users that
    write) and `BlockIOError`; then nothing has changed.
    """
    step = _Step(node, node.driver.options, attrs.evolve(NodeFlags.of(node), read_only=read_only))
    await _perform(opener, [*_followers(node, {"read_only": read_only}), step])


async def reopen_described(
    opener: Opener, descriptions: Sequence[Mapping[str, Json]], *, strings: bool = False
) -> None:
    """Give nodes new options, all or none of them: each description is complete and has the ``node-name`` of its node.

    With ``strings`` leaves may be text. Raises `CommandError` (options that cannot be changed, users that write, loops) and
    `BlockIOError`; nothing has changed then. Nodes that lose their last user are closed.
    """
    steps: dict[BlockDriverState, _Step] = {}
    for index, given in enumerate(descriptions):
        path = f"options[{index}]"
        for step in _described(opener, given, _named(opener, given, path), path, strings=strings):
            if step.node in steps and steps[step.node].given is not None:
                raise InvalidParameter(f"{path}.node-name", f"names '{step.node.node_name}' a second time")
            for follower in _followers(step.node, _passed_on(step)):
                steps.setdefault(follower.node, follower)
            steps[step.node] = step
    await _perform(opener, list(steps.values()))
    await opener.close_orphans()


# ------------------------------------------------------------------------------------------------- what a node is to be


def _named(opener: Opener, given: Mapping[str, Json], path: str) -> BlockDriverState:
    name = given.get("node-name")
    if not isinstance(name, str):
        raise InvalidParameter(f"{path}.node-name", "is missing" if name is None else "must be a string")
    return opener.graph.find_node(name)


def _described(
    opener: Opener,
    given: Mapping[str, Json],
    node: BlockDriverState,
    path: str,
    *,
    strings: bool,
    inherited: NodeFlags | None = None,
) -> list[_Step]:
    """What becomes of ``node`` by its description, after what becomes of the children that are described in it."""
    name = node.node_name
    kept = attrs.evolve(inherited or NO_FLAGS, discard_unmap=node.discard_unmap, aio=node.aio)
    spec = SpecReader(opener.registry, strings=strings).read(given, kept, path=path)
    if spec.driver is not type(node.driver):
        raise InvalidParameter(f"{path}.driver", f"cannot be changed: node '{name}' is a {node.driver.name} node")
    _check_given(node, given, path)
    steps: list[_Step] = []
    children: dict[str, BlockDriverState | None] = {}
    for field in child_fields(spec.driver):
        described = given.get(field.wire)
        if isinstance(described, Mapping) and _is_described_in(node, field.wire):
            below, where = node.children[field.wire].node, f"{path}.{field.wire}"
            _check_same_name(described, below, where)
            flags = spec.flags.for_child(node.children[field.wire].role)
            steps += _described(opener, described, below, where, strings=strings, inherited=flags)
        elif (child := _wanted_child(opener, node, field, spec)) is not _Kept.KEPT:
            children[field.wire] = child
    _check_support(node, replaced=children)
    # Children are compared as nodes above, so they do not count as changed options here.
    same = {
        field.attribute: getattr(node.driver.options, field.attribute)
        for field in fields(spec.driver.options_class)
        if field.role is not None
    }
    options = attrs.evolve(spec.options, **same)
    step = _Step(node, options, spec.flags, spec.common.detect_zeroes, given, children, inherits=inherited is not None)
    return [*steps, step]


def _check_given(node: BlockDriverState, given: Mapping[str, Json], path: str) -> None:
    """Raise for an option that is there now and was not before, or the other way round, unless the driver does not mind."""
    before = node.options_given
    if "force-share" in given or "force-share" in before:
        raise InvalidParameter(f"{path}.force-share", f"cannot be changed, nor be given again: node '{node.node_name}' is open")
    for field in fields(type(node.driver).options_class):
        name = field.wire
        if field.role is not None or (name in given) is (name in before):
            continue
        if name not in (node.driver.reopens_with if name in given else node.driver.reopens_without):
            was = ("not given", "cannot be now") if name in given else ("given", "must be again")
            raise InvalidParameter(f"{path}.{name}", f"was {was[0]} when node '{node.node_name}' was opened, and {was[1]}")


def _is_described_in(node: BlockDriverState, name: str) -> bool:
    """Whether the child was opened along with ``node``, by options among its own or because its image names it, and is there."""
    edge = node.children.get(name)
    if edge is None or edge.node.monitor_owned:
        return False
    if isinstance(node.options_given.get(name), Mapping):
        return True
    return edge.role is ChildRole.BACKING and name not in node.options_given and not edge.node.implicit


def _check_same_name(given: Mapping[str, Json], node: BlockDriverState, path: str) -> None:
    before = node.options_given.get("node-name")
    if given.get("node-name", before) != before:
        raise InvalidParameter(f"{path}.node-name", f"cannot be changed: the node is called '{node.node_name}'")


class _Kept(enum.Enum):
    """Says of a child that it stays as it is."""

    KEPT = enum.auto()


def _wanted_child(
    opener: Opener, node: BlockDriverState, field: Field, spec: NodeSpec
) -> BlockDriverState | Literal[_Kept.KEPT] | None:
    """The node that the child is to be, or None for no child."""
    name, edge = field.wire, node.children.get(field.wire)
    present = edge.node if edge is not None else None
    if name not in spec.children:
        if present is not None or (field.role is ChildRole.BACKING and _names_backing(node)):
            raise InvalidParameter(name, f"is missing: say which node the '{name}' child of '{node.node_name}' shall be")
        return _Kept.KEPT
    reference = spec.children[name]
    if reference is None:
        wanted = None
    elif isinstance(reference, NodeReference):
        wanted = opener.graph.lookup(reference.name)
    else:
        raise InvalidParameter(name, f"must be the name of a node: node '{node.node_name}' is open already")
    if wanted is present or (present is not None and wanted is skip_implicit(present)):
        return _Kept.KEPT
    comes_or_goes = present is None or wanted is None
    if name not in _REPLACEABLE or (comes_or_goes and field.role is not ChildRole.BACKING):
        present_child = "leave it out" if present is None else "name its present child"
        raise InvalidParameter(name, f"cannot be changed while node '{node.node_name}' is open; {present_child}")
    if present is not None and present.implicit:
        raise CommandError(f"The '{name}' child of '{node.node_name}' cannot be changed while a job has a filter there")
    return wanted


def _check_support(node: BlockDriverState, *, replaced: Collection[str] = ()) -> None:
    """Raise unless ``node``, and all that was opened with it but for ``replaced`` children, can be opened again."""
    if not node.driver.supports_reopen:
        raise CommandError(
            f"Node '{node.node_name}' cannot be given other options: {node.driver.name} has none that can change"
        )
    for name, edge in node.children.items():
        if name not in replaced and _came_with_parent(edge.node):
            _check_support(edge.node)


def _came_with_parent(node: BlockDriverState) -> bool:
    """Whether it was described in the node above, and nobody else uses it."""
    return not node.monitor_owned and len(node.parents) == 1


def _names_backing(node: BlockDriverState) -> bool:
    driver = node.driver
    return isinstance(driver, SupportsBacking) and driver.backing_link() is not None


def _passed_on(step: _Step) -> dict[str, bool]:
    """The flags that a description sets expressly, or takes from one around it: children opened with the node take them over."""
    assert step.given is not None
    cache = step.given.get("cache")
    stated = {
        "read_only": "read-only" in step.given,
        "auto_read_only": "auto-read-only" in step.given,
        "cache_direct": isinstance(cache, Mapping) and "direct" in cache,
        "cache_no_flush": isinstance(cache, Mapping) and "no-flush" in cache,
    }
    return {name: getattr(step.flags, name) for name, is_stated in stated.items() if is_stated or step.inherits}


def _followers(node: BlockDriverState, changes: Mapping[str, Any]) -> list[_Step]:
    """The nodes below that take over ``changes`` of flags, lowest first: those opened with ``node`` that nobody else uses."""
    steps: list[_Step] = []
    edges = [(edge, changes) for edge in node.children.values()]
    while edges:
        edge, wanted = edges.pop()
        below = edge.node
        if edge.role is ChildRole.FILTERED or not _came_with_parent(below):
            continue
        own = _own_flags(below)
        if edge.role is ChildRole.BACKING:
            own |= {"read_only", "auto_read_only"}
        wanted = {name: value for name, value in wanted.items() if name not in own}
        flags = attrs.evolve(NodeFlags.of(below), **wanted)
        if flags != NodeFlags.of(below):
            steps.insert(0, _Step(below, below.driver.options, flags))
            edges += [(under, wanted) for under in below.children.values()]
    return steps


def _own_flags(node: BlockDriverState) -> set[str]:
    """The flags of the cache that ``node`` was given for itself."""
    cache = node.options_given.get("cache")
    given = cache if isinstance(cache, Mapping) else {}
    return {name for name, key in (("cache_direct", "direct"), ("cache_no_flush", "no-flush")) if key in given}


# ----------------------------------------------------------------------------------------------------------- doing it


async def _perform(opener: Opener, steps: list[_Step]) -> None:
    nodes = [step.node for step in steps]
    try:
        with opener.graph.holding(nodes):
            await _perform_drained(opener, steps, nodes)
    finally:
        if set(nodes).intersection(opener.graph.orphans()):  # a user has gone meanwhile
            await opener.close_orphans()


async def _perform_drained(opener: Opener, steps: list[_Step], nodes: list[BlockDriverState]) -> None:
    await drained_begin(nodes)
    try:
        await _prepare(steps)
        try:
            with Transaction() as change:
                _switch(opener, steps, change)
        except BaseException:
            await _give_up(steps)
            raise
        for step in steps:
            step.node.driver.commit_reopen(step.options, read_only=step.flags.read_only)
            if step.given is not None:
                step.node.options_given = _remembered(step.node, step.given, step.children)
            if "file" in step.children:
                refresh_length(step.node)
        for step in steps:
            await step.node.driver.settle_reopen()
    finally:
        drained_end(nodes)


def _remembered(
    node: BlockDriverState, given: Mapping[str, Json], moved: Mapping[str, BlockDriverState | None]
) -> dict[str, Json]:
    """What was given, but of children that stay, by what they were opened: they can be described by it again."""
    opened = {
        name: node.options_given[name]
        for name in node.children.keys() & node.options_given.keys()
        if name not in moved and _is_described_in(node, name)
    }
    return {**given, **{name: options for name, options in opened.items() if isinstance(given.get(name), str)}}


async def _prepare(steps: Sequence[_Step]) -> None:
    """All that may fail and has to wait; undone when a step of it fails."""
    for step in steps:
        if not step.node.read_only and (step.flags.read_only or "file" in step.children):
            await flush(step.node)
    prepared: list[_Step] = []
    try:
        for step in steps:
            step.node.driver.check_reopen(step.options, read_only=step.flags.read_only)
            step.node.driver.check_cache(direct=step.flags.cache_direct)
            prepared.append(step)
            await step.node.driver.prepare_reopen(step.options, read_only=step.flags.read_only)
    except BaseException:
        await _give_up(prepared)
        raise


async def _give_up(prepared: Sequence[_Step]) -> None:
    for step in reversed(prepared):
        step.node.driver.abort_reopen()
    for step in prepared:
        with contextlib.suppress(BlockIOError):  # it has poisoned the node, which says so at the next write
            await step.node.driver.settle_reopen()


def _switch(opener: Opener, steps: Sequence[_Step], change: Transaction) -> None:
    """Flags, edges and permissions of all nodes, at once."""
    with opener.graph.deferred_permissions(change):
        for step in steps:
            if step.node.closed:  # while this waited for a driver
                raise NodeNotFound(step.node.node_name)
            _set_flags(step, change)
            _set_options(step, change)
            for name, child in step.children.items():
                _set_child(opener, step.node, name, child, change)
        opener.graph.refresh_permissions([step.node for step in reversed(steps)], change)
    for step in steps:
        if "file" in step.children:
            # What a driver checks against its file, as a window that lies inside, must be true of the other file too.
            step.node.driver.check_reopen(step.options, read_only=step.flags.read_only)


def _set_flags(step: _Step, change: Transaction) -> None:
    node = step.node
    before, detect_zeroes = NodeFlags.of(node), node.detect_zeroes

    def undo() -> None:
        before.set_on(node)
        node.detect_zeroes = detect_zeroes

    change.add(abort=undo)
    step.flags.set_on(node)
    if step.detect_zeroes is not None:
        node.detect_zeroes = step.detect_zeroes


def _set_options(step: _Step, change: Transaction) -> None:
    """Before permissions are computed: what a driver takes of its children can depend on its options, as a window of raw does."""
    driver = step.node.driver
    change.add(abort=partial(setattr, driver, "options", driver.options))
    driver.options = step.options


def _set_child(
    opener: Opener, node: BlockDriverState, name: str, child: BlockDriverState | None, change: Transaction
) -> None:
    if child is not None and child.closed:
        raise NodeNotFound(child.node_name)
    edge = node.children.get(name)
    if name == "backing":
        opener.graph.set_backing(node, child, change)
    else:
        assert edge is not None and child is not None, "only a backing child can come and go"
        opener.graph.replace_child(edge, child, change)
