"""Semi-synchronous mirroring: a guest's flush is answered when the target is flushed up to the same write generation.

Models an idea of the summer of 2012 that was never merged (rfc-2012.md, "Never merged"); here it is the copy mode ``semi-sync``
of 7.2's mirror commands. Writes are answered as in background mode, as soon as the source has them; only a flush waits. That is
what a guest relies on anyway: what it has not flushed may be lost in a crash. So *whatever happens after READY, the target
holds, durably, everything that the guest has flushed*. Background mode promises nothing of the kind; write-blocking mode has
every answered write in the target, but does not flush it there.

How it is done. The filter counts the guest's writes when they have ended (`MirrorTop.generation`). A flush notes the count,
flushes the source, and waits here until the target is known to be durable up to that count. A *round* brings it there: what
is dirty at its beginning is copied at once, whatever the speed limit, copies under way are waited for, then the target is
flushed. All flushes that come while a round is going on share the next one. The copying that is going on otherwise stands
back meanwhile.

- *Before READY* no flush waits: it would last as long as the whole copy. More exactly, they wait from the moment at which the
  two sides were first equal; READY follows the flush of the target.
- *Paused* jobs keep the promise. A round is no part of the job's own run: a pause stops the copying in the background, not what
  a guest waits for (as in write-blocking mode). This also rules out that a drained section waits for a guest's flush, which
  waits for the job, which the section has paused.
- *A failed request* (of target or source) ends the round: the policy is applied, BLOCK_JOB_ERROR is sent, then the flushes are
  answered as the source has answered them. The promise is void until a later round succeeds. After ``stop`` flushes do not
  wait as long as the ``io-status`` of the job is not ok. Holding them would stop the guest, and every drained section with it.
- *The end* of the job, whichever, answers all flushes: after a switch the guest flushes the target itself; a job that was
  cancelled or failed promises nothing any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, Protocol

import attrs

NOTHING: Final = -1
"""The generation up to which a target is durable when nothing is known of it."""


class RoundHost(Protocol):
    """The job, as its `GuestFlushes` see it."""

    @property
    def may_promise(self) -> bool:
        """Whether copying works, as far as is known."""

    async def catch_up(self) -> int:
        """Copy what is dirty now and flush the target; returns the generation that is to be durable then. What failed is told
        by `GuestFlushes.doubt`.
        """

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """See `Job`."""

    def at_rest(self) -> None:
        """See `Job`."""


@attrs.define(eq=False)
class GuestFlushes:
    """The flushes that wait for the target. ``active``: the sides have been equal, so that flushes wait. ``durable`` is the
    write generation up to which the target is known to be durable. ``doubts`` counts failed requests.
    """

    host: RoundHost
    active: bool = attrs.field(default=False, init=False)
    durable: int = attrs.field(default=NOTHING, init=False)
    doubts: int = attrs.field(default=0, init=False)
    _waiting: list[tuple[int, asyncio.Future[None]]] = attrs.field(factory=list, init=False, repr=False)
    _rounds: asyncio.Task[None] | None = attrs.field(default=None, init=False, repr=False)

    @property
    def busy(self) -> bool:
        """Whether a round is going on: it may write to the target although the job is paused."""
        return self._rounds is not None

    async def reached(self, generation: int) -> None:
        """Wait until the target is durable up to ``generation``, or until there is nothing to wait for (see the module)."""
        if not self.active or generation <= self.durable or not self.host.may_promise:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((generation, waiter))
        if self._rounds is None:
            self._rounds = self.host.spawn(self._work(), "rounds for guest flushes")
        await waiter

    def known(self, generation: int) -> None:
        """The target has been flushed, and held everything up to ``generation`` before."""
        self.durable = max(self.durable, generation)

    def doubt(self) -> None:
        """A request has failed: the round does not bring the target up to date. What was durable there may be gone, but only
        where something younger was being copied; so every flush from now on asks for a later generation anyway.
        """
        self.doubts += 1

    async def stop(self) -> None:
        """No flush waits any more; returns when the last round has ended."""
        self.active = False
        self._release()
        if self._rounds is not None:
            await asyncio.wait([self._rounds])

    async def _work(self) -> None:
        try:
            while self._waiting and self.host.may_promise:
                doubts = self.doubts
                generation = await self.host.catch_up()
                if doubts == self.doubts and self.host.may_promise:
                    self.known(generation)
                self._release(generation)
        finally:
            self._rounds = None
            self._release()
            self.host.at_rest()

    def _release(self, generation: int | None = None) -> None:
        """Let the flushes up to ``generation`` go on, or all of them."""
        waiting, self._waiting = self._waiting, []
        for at, waiter in waiting:
            if generation is not None and at > generation:
                self._waiting.append((at, waiter))
            elif not waiter.done():
                waiter.set_result(None)
