"""Running in threads what would hold up the loop, many calls at a time, at little cost for each.

Models QEMU's thread pool, which does ``aio=threads`` and packing. asyncio's ``run_in_executor`` wakes a thread for every call and
the loop for every result; with many small requests under way that costs more than the requests. Here calls wait in a queue which
a few workers empty, and all results that are ready are handed over in one turn of the loop. A worker lasts as long as there is
work.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

_Result = TypeVar("_Result")
_Args = TypeVarTuple("_Args")

BLOCKING: Final = 8
"""Calls of one queue that run at the same time and wait for something, such as a disk."""
COMPUTING: Final = min(os.cpu_count() or 1, 6)
"""The same of those that compute."""


class _Call:
    """One call: ``answer`` is what its caller waits for; ``let_go`` is set by a cancelled caller that waits for the thread."""

    __slots__ = ("answer", "args", "finished", "function", "let_go")

    def __init__(self, answer: asyncio.Future[Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.answer = answer
        self.function = function
        self.args = args
        self.finished = False
        self.let_go: asyncio.Future[None] | None = None


class ThreadQueue:
    """The calls of one file or image. Made and used on one loop; functions run in up to ``workers`` threads of ``executor``.

    ``_lock`` protects ``_calls`` against a worker that leaves while a call is being added, nothing else.
    """

    def __init__(self, executor: Executor, workers: int = BLOCKING) -> None:
        self._executor = executor
        self._most = workers
        self._lock = threading.Lock()
        self._calls: deque[_Call] = deque()
        self._results: deque[tuple[_Call, Any, Exception | None]] = deque()
        self._workers = 0
        self._announced = False

    async def run(self, function: Callable[[Unpack[_Args]], _Result], *args: *_Args) -> _Result:
        """Call ``function`` in a thread and give its result or its exception.

        A cancelled caller goes on only when the thread has let go of what it works on (a descriptor, a buffer).
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_Result] = loop.create_future()
        call = _Call(answer, function, args)
        with self._lock:
            self._calls.append(call)
            hire = self._workers < self._most
            self._workers += hire
        if hire:
            loop.run_in_executor(self._executor, self._work, loop)
        try:
            return await answer
        except asyncio.CancelledError:
            while not call.finished:
                call.let_go = loop.create_future()
                with contextlib.suppress(asyncio.CancelledError):
                    await call.let_go
            raise

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """What a worker does: calls, until there are none left."""
        while True:
            with self._lock:
                if not self._calls:
                    self._workers -= 1
                    return
                call = self._calls.popleft()
            try:
                self._results.append((call, call.function(*call.args), None))
            except Exception as error:
                self._results.append((call, None, error))
            # Cleared before results are taken: what is appended later is either seen by that turn or announced anew.
            if not self._announced:
                self._announced = True
                loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        self._announced = False
        results = self._results
        while results:
            call, result, error = results.popleft()
            call.finished = True
            if call.let_go is not None and not call.let_go.done():
                call.let_go.set_result(None)
            if call.answer.done():
                continue  # its caller has been cancelled
            if error is None:
                call.answer.set_result(result)
            else:
                call.answer.set_exception(error)
