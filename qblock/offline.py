"""One operation on images that nobody else is using, for plain scripts: a graph and a loop of its own, closed at the end.

What `resizing`, `rebasing` and `committing` have in common beneath their blocking functions. Differs from `image` in that
nothing stays open between calls.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random
from typing import Final, TypeVar

from qblock.backend import BlockBackend
from qblock.clock import RealClock
from qblock.environment import Environment
from qblock.graph import Graph
from qblock.node import BlockDriverState
from qblock.opening import Opener
from qblock.permissions import Perm
from qblock.policy import OpenPolicy
from qblock.registry import DriverRegistry

T = TypeVar("T")

WRITING: Final = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE


def run_offline(body: Callable[[Opener], Awaitable[T]], *, backing: bool) -> T:
    """Run ``body`` with an opener on a loop of its own; with ``backing`` files that images mention are opened as well."""
    env = Environment(
        clock=RealClock(),
        executor=ThreadPoolExecutor(max_workers=8, thread_name_prefix="qblock-image"),
        random=Random(),
        emit=lambda event, data: None,
        warn=lambda text: warnings.warn(text, stacklevel=2),
        loop_is_shared=False,
    )
    policy = OpenPolicy.follow() if backing else OpenPolicy.deny()

    async def main() -> T:
        opener = Opener(Graph(random=env.random), DriverRegistry(), env, policy)
        try:
            return await body(opener)
        finally:
            await opener.close_orphans()

    try:
        return asyncio.run(main())
    finally:
        env.executor.shutdown(wait=True)


@contextmanager
def using(opener: Opener, node: BlockDriverState, *, name: str, perm: Perm = WRITING) -> Iterator[BlockBackend]:
    """A backend on ``node`` while the block lasts; the caller closes what has no user any more afterwards."""
    backend = BlockBackend(opener.graph, perm=perm, shared=Perm.ALL, description=f"the image '{os.fspath(name)}'")
    try:
        backend.insert(node)
        yield backend
    finally:
        backend.close()
