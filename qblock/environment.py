"""What drivers may use of the world: time, threads, randomness, secrets, and where to report.

It is made by the `BlockSystem`, or by a tool that opens a few images, and handed down to every node.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any

import attrs

from qblock.errors import BlockIOError, NodeNotFound
from qblock.fdsets import FdSets
from qblock.tracing import Trace

if TYPE_CHECKING:
    from qblock.clock import Clock
    from qblock.node import BlockDriverState
    from qblock.throttling import ThrottleGroups


def _no_node(name: str) -> BlockDriverState:
    raise NodeNotFound(name)


def _fail_request(text: str) -> None:
    raise BlockIOError(errno.EIO, text)


@attrs.frozen
class Environment:
    """What a driver may use of the world, handed down by the BlockSystem: time, threads, randomness and where to report.

    ``emit(event, data)`` sends a QMP event; ``warn(text)`` tells the person at the console. ``loop_is_shared`` is False in
    programs in which nobody waits for the loop meanwhile: what the page cache can take or give is copied at once there.
    ``trace`` has the trace events, see `tracing`.
    """

    clock: Clock
    executor: Executor
    random: Random
    emit: Callable[[str, Mapping[str, Any]], None]
    warn: Callable[[str], None]
    fatal: Callable[[str], None] = attrs.field(default=_fail_request, repr=False)
    """Told of what ends a program (a difference between disks that must be alike); where it returns, or in a library, only the
    request fails."""
    loop_is_shared: bool = True
    trace: Trace = attrs.field(factory=Trace)
    secrets: dict[str, bytes] = attrs.field(factory=dict, repr=False)
    """The values of secret objects, by id."""
    fdsets: FdSets = attrs.field(factory=FdSets, repr=False)
    """Descriptors that files under ``/dev/fdset/N`` are opened from."""
    find_node: Callable[[str], BlockDriverState] = attrs.field(default=_no_node, repr=False)
    """The node that a device or node name means, for options that name one which is no child; raises `NodeNotFound`."""

    @cached_property
    def throttle_groups(self) -> ThrottleGroups:
        """The groups whose members share limits, by name."""
        from qblock.throttling import ThrottleGroups  # noqa: PLC0415  start-up time: most throttle nothing

        return ThrottleGroups(self.clock)
