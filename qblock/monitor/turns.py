"""Whose turn it is: commands of different monitors run side by side, but a transaction runs alone.

QEMU's monitors are one thread, which executes one command at a time. Ours only take turns where it matters: while a transaction
has changed the graph and may still have to change it back, no other command looks at it or changes it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


class Turns:
    """Lets commands in: any number at once, or one that is `alone`. A command may execute another one inside itself."""

    def __init__(self) -> None:
        self._inside: Counter[asyncio.Task[Any] | None] = Counter()
        self._alone: asyncio.Task[Any] | None = None
        self._waiters: list[asyncio.Future[None]] = []

    @asynccontextmanager
    async def taken(self, *, alone: bool = False) -> AsyncIterator[None]:
        """The turn of one command, around its execution. ``alone``: no other command runs meanwhile.

        Who waits to be alone does not keep others out, so a command that waits for another one gets what it waits for.
        """
        task = asyncio.current_task()
        outermost = task not in self._inside
        while self._must_wait(task, alone=alone):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        self._inside[task] += 1
        if alone:
            self._alone = task
        try:
            yield
        finally:
            self._inside[task] -= 1
            if outermost:
                del self._inside[task]
            if alone or outermost:
                self._end_of_turn(task)

    def _must_wait(self, task: asyncio.Task[Any] | None, *, alone: bool) -> bool:
        if self._alone is not None and self._alone is not task:
            return True
        return alone and any(other is not task for other in self._inside)

    def _end_of_turn(self, task: asyncio.Task[Any] | None) -> None:
        if self._alone is task:
            self._alone = None
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
