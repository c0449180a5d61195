"""An event loop in a thread of its own, for synchronous code in another: a REPL at its prompt, a test that uses sockets.

The machine lives on while the other thread waits for a key or blocks in ``recv``. QEMU's counterpart is its main loop beside
the thread that a test program is. Which loop it is (plain asyncio, or one on virtual time) is the caller's choice.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs ``loop_factory()`` in a thread from `start` to `stop`. A context manager."""

    def __init__(self, loop_factory: Callable[[], asyncio.AbstractEventLoop], *, name: str = "qblock machine") -> None:
        self._factory = loop_factory
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped: asyncio.Future[None] | None = None
        self._running = threading.Event()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, once started."""
        assert self._loop is not None, "not started"
        return self._loop

    def start(self) -> None:
        """Start the thread and return when its loop runs."""
        self._thread.start()
        self._running.wait()

    def stop(self) -> None:
        """Cancel what is left on the loop, end the thread and join it."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._end)
            self._thread.join()

    def call(self, work: Coroutine[Any, Any, T], *, timeout: float | None = None) -> T:
        """Run ``work`` on the loop and block for its result; an interrupt (Ctrl-C) here cancels it there.

        So does the end of ``timeout`` real seconds, with `TimeoutError`.
        """
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout)
        except (KeyboardInterrupt, TimeoutError):
            future.cancel()
            raise

    def ask(self, question: Callable[[], T], *, timeout: float) -> T | None:
        """``question()`` evaluated on the loop; None when the loop is busy for more than ``timeout`` real seconds."""

        async def answer() -> T:
            return question()

        future = asyncio.run_coroutine_threadsafe(answer(), self.loop)
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            return None

    def when_done(self, work: Coroutine[Any, Any, object], callback: Callable[[], None]) -> None:
        """Run ``work`` on the loop, and call ``callback`` there when it is done (not when it was cancelled)."""

        async def follow() -> None:
            await work
            callback()

        asyncio.run_coroutine_threadsafe(follow(), self.loop)

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=self._factory) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = self._loop.create_future()
        self._running.set()
        await self._stopped

    def _end(self) -> None:
        if self._stopped is not None and not self._stopped.done():
            self._stopped.set_result(None)

    def __enter__(self) -> LoopThread:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
