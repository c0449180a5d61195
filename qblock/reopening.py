"""Changing the options of an open node in place: read-only to read-write and back, and what a driver can change.

Models ``bdrv_reopen`` (semantics.md section 10.2), narrowed to one node and the storage below it that was opened with it. All
that can fail is done first (`Driver.prepare_reopen`, then permissions in a `Transaction`); then everything is switched over,
or nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from qblock.drain import drained
from qblock.driver import Json
from qblock.errors import BlockIOError, InvalidParameter
from qblock.node import BlockDriverState
from qblock.nodespec import NodeFlags, NodeSpec, SpecReader, child_fields
from qblock.options import fields
from qblock.permissions import ChildRole
from qblock.requests import flush
from qblock.transaction import Transaction

if TYPE_CHECKING:
    from qblock.opening import Opener


@attrs.frozen(eq=False)
class _Step:
    """What is to become of one node. ``detect_zeroes`` is None when only read-only is switched."""

    node: BlockDriverState
    options: Any
    flags: NodeFlags
    detect_zeroes: str | None = None


async def reopen(
    opener: Opener,
    node: BlockDriverState,
    *,
    read_only: bool | None = None,
    options: Mapping[str, Json] | None = None,
) -> None:
    """Switch ``node`` to ``read_only``, or give it ``options`` (complete, as ``blockdev-reopen`` takes them).

    The storage below follows when it was not added by the monitor and has no other user. Raises `CommandError` (options
    that cannot be changed, users that write) and `BlockIOError`; then nothing has changed.
    """
    if options is not None:
        spec = _spec(opener, node, options)
        step = _Step(node, spec.options, spec.flags, spec.common.detect_zeroes)
    else:
        assert read_only is not None, "nothing to change"
        step = _Step(node, node.driver.options, attrs.evolve(NodeFlags.of(node), read_only=read_only))
    async with drained(node):
        await _perform(opener, [*_storage_steps(node, read_only=step.flags.read_only), step])
    if options is not None:
        node.options_given = dict(options)


def _spec(opener: Opener, node: BlockDriverState, options: Mapping[str, Json]) -> NodeSpec:
    spec = SpecReader(opener.registry).read(options, NodeFlags(discard_unmap=node.discard_unmap))
    if spec.driver is not type(node.driver):
        raise InvalidParameter("driver", f"cannot be changed: node '{node.node_name}' is a {node.driver.name} node")
    if spec.common.node_name not in (None, node.node_name):
        raise InvalidParameter("node-name", f"cannot be changed: the node is called '{node.node_name}'")
    for field in child_fields(spec.driver):
        _check_child(node, field.wire, spec)
    # Children are compared as nodes above, so they do not count as changed options here.
    kept = {
        field.attribute: getattr(node.driver.options, field.attribute)
        for field in fields(spec.driver.options_class)
        if field.role is not None
    }
    return attrs.evolve(spec, options=attrs.evolve(spec.options, **kept))


def _check_child(node: BlockDriverState, name: str, spec: NodeSpec) -> None:
    """Children can be repeated, not replaced: ``blockdev-reopen`` here leaves the graph as it is."""
    present = node.children.get(name)
    if name not in spec.children:
        if present is not None:
            raise InvalidParameter(name, f"is missing: node '{node.node_name}' has such a child, which must be named")
        return
    wanted = spec.children[name]
    if wanted is None and present is None:
        return
    if present is None or getattr(wanted, "name", None) != present.node.node_name:
        raise InvalidParameter(name, f"cannot be changed while node '{node.node_name}' is open; name its present child")


def _storage_steps(node: BlockDriverState, *, read_only: bool) -> list[_Step]:
    """The storage nodes below that follow, lowest first."""
    steps: list[_Step] = []
    edges = [node.storage, node.children.get("data-file")]
    while edges:
        edge = edges.pop()
        if edge is None or edge.role is ChildRole.FILTERED:
            continue
        below = edge.node
        if below.monitor_owned or len(below.parents) > 1 or below.read_only == read_only:
            continue
        flags = attrs.evolve(NodeFlags.of(below), read_only=read_only)
        steps.insert(0, _Step(below, below.driver.options, flags))
        edges += [below.storage, below.children.get("data-file")]
    return steps


async def _perform(opener: Opener, steps: list[_Step]) -> None:
    for step in steps:
        if not step.node.read_only and step.flags.read_only:
            await flush(step.node)
    prepared: list[_Step] = []
    try:
        for step in steps:
            step.node.driver.check_reopen(step.options, read_only=step.flags.read_only)
            prepared.append(step)
            await step.node.driver.prepare_reopen(step.options, read_only=step.flags.read_only)
        with Transaction() as change:
            for step in steps:
                _set_flags(step, change)
            opener.graph.refresh_permissions([step.node for step in reversed(steps)], change)
    except BaseException:
        for step in reversed(prepared):
            step.node.driver.abort_reopen()
        for step in prepared:
            with contextlib.suppress(BlockIOError):  # it has poisoned the node, which says so at the next write
                await step.node.driver.settle_reopen()
        raise
    for step in steps:
        step.node.driver.commit_reopen(step.options, read_only=step.flags.read_only)
    for step in steps:
        await step.node.driver.settle_reopen()


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
